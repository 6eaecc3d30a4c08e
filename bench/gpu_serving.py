"""The server from end to end on this machine's GPU: clients over gRPC, gateway, Router and one rank; no Ray.

Random FP8 checkpoints of real shapes. What clients see: time to the first token, time per token after it, tokens a
second of all streams. Beside it transformers' `generate` with the same weights in bf16, where they fit.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import torch

from bench.gpu_engine import rank_alone
from bench.make_checkpoint import write_checkpoint
from bench.peers.checkpoints import FIRST_FREE_ID, write_texts
from cluster.config import ClusterConfig
from cluster.config_file import parse_config
from cluster.gateway.copies import static_addresses
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayServer
from cluster.router.assembly import make_router
from cluster.router.launchers import ProcessLauncher
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from workers.config import Device, ModelConfig
from workers.kernels.cpu.library import native
from workers.kernels.triton.choice import has_triton

START_TIMEOUT_S = 240.0
INTERPRETING = ("TRITON_INTERPRET", "MULL_GPU_KERNELS", "MULL_CPU_KERNELS")


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that come at once."""

    streams: int
    prompt: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """One checkpoint and what it is asked."""

    shape: str
    layers: int | None
    vocab: int | None
    loads: tuple[Load, ...]
    has_peer: bool
    """Its weights in fp32 fit on the disk."""


ON_GPU = (
    Served(
        shape="4b",
        layers=None,
        vocab=None,
        loads=(
            Load(streams=1, prompt=64, tokens=512),
            Load(streams=1, prompt=8192, tokens=32),
            Load(streams=64, prompt=4096, tokens=256),
        ),
        has_peer=True,
    ),
    Served(
        shape="30b-a3b",
        layers=None,
        vocab=None,
        loads=(Load(streams=1, prompt=64, tokens=512), Load(streams=64, prompt=1024, tokens=256)),
        has_peer=False,
    ),
)
TINY = (
    Served(
        shape="0.1b",
        layers=2,
        vocab=4096,
        loads=(Load(streams=1, prompt=16, tokens=8), Load(streams=3, prompt=16, tokens=8)),
        has_peer=True,
    ),
    Served(shape="0.5b-moe", layers=2, vocab=4096, loads=(Load(streams=2, prompt=16, tokens=8),), has_peer=False),
)


@dataclass(frozen=True)
class Stream:
    """When a client had its tokens, since it asked."""

    first_s: float
    last_s: float
    num_tokens: int

    @property
    def per_token_s(self) -> float:
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


def servings(device: torch.device, until: float) -> Iterator[dict[str, Any]]:
    """A row for each load; what fails is told, and so is where the time was up."""
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    if kind == "cpu":
        for name in INTERPRETING:  # a rank that interprets takes minutes for a prompt
            os.environ.pop(name, None)
        for cached in (native, has_triton):
            cached.cache_clear()
    for served in ON_GPU if kind == "cuda" else TINY:
        with tempfile.TemporaryDirectory(prefix="mull-gpu-") as scratch:
            if time.monotonic() > until:
                yield {"model": served.shape, "skipped": "the time was up"}
                continue
            directory = Path(scratch) / served.shape
            write_checkpoint(directory, served.shape, layers=served.layers, vocab=served.vocab)
            write_texts(directory, ModelConfig.from_dir(directory).vocab_size)
            if served.has_peer:
                alone = rank_alone(directory, kind == "cuda", until)
                yield from _told(served, "rank alone", lambda rows=alone: list(rows))
            yield from _told(served, "mull", lambda s=served, d=directory: asyncio.run(_measured(s, d, kind, until)))
            if served.has_peer and time.monotonic() < until:
                yield from _told(served, "transformers", lambda s=served, d=directory: _peer(s, d, device, until))


def _told(served: Served, engine: str, measure: Callable[[], list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    try:
        rows = measure()
    except Exception as failure:  # one engine that fails must not hide the others
        rows = [{"failed": f"{type(failure).__name__}: {failure}"[:400]}]
    yield from ({"model": served.shape, "engine": engine} | row for row in rows)


async def _measured(served: Served, directory: Path, device: Device, until: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    async with server(config_of(served, directory, device), device, until) as stub:
        rows.append({"start_s": time.monotonic() - started})
        for load in served.loads:
            if time.monotonic() > until:
                rows.append({"streams": load.streams, "skipped": "the time was up"})
                break
            vocab_size = ModelConfig.from_dir(directory).vocab_size
            for seed, warming in ((1, True), (2, False)):
                start = time.monotonic()
                asked = _prompts(load, vocab_size, seed)
                wanted = min(load.tokens, 8) if warming else load.tokens
                async with asyncio.timeout(max(1.0, until - start)):
                    streams = await asyncio.gather(*(_ask(stub, prompt, wanted) for prompt in asked))
            rows.append(_row(load, streams, time.monotonic() - start))
    return rows


def config_of(served: Served, directory: Path, device: Device) -> ClusterConfig:
    """Room for every load, and no drafts: random weights repeat themselves, and every guess would come true."""
    context = max(load.prompt + load.tokens for load in served.loads)
    engine = {
        "max_model_len": context + 64,
        "max_num_seqs": max(load.streams for load in served.loads),
        "max_num_batched_tokens": max(8192, max(load.streams for load in served.loads)),
        "max_prefill_slowdown": None,
        "num_speculative_tokens": 0,
        "threads_per_rank": 1,
        "graphs": "auto" if device == "cuda" else "whole",
    }
    ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
    model = {"path": str(directory), "name": served.shape}
    return parse_config({"model": model, "engine": engine, "gateway": ports})


@asynccontextmanager
async def server(config: ClusterConfig, device: Device, until: float) -> AsyncIterator[GenerationServiceStub]:
    """Gateway and Router in this process, the rank in one of its own."""
    async with AsyncExitStack() as stack:
        router = make_router(config, device, ProcessLauncher())
        await router.start()
        stack.push_async_callback(router.stop)
        model = ServedModel.load(config.model, config.engine.max_model_len)
        gateway = GatewayServer(config.gateway, model, static_addresses(router.address))
        ports = await gateway.start()
        stack.push_async_callback(gateway.drain, 0)
        async with asyncio.timeout(min(START_TIMEOUT_S, max(1.0, until - time.monotonic()))):
            while not gateway.copies.state.ready:
                await gateway.copies.updated()
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}"))
        yield GenerationServiceStub(channel)


def _prompts(load: Load, vocab_size: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_FREE_ID, vocab_size - 1) for _ in range(load.prompt)] for _ in range(load.streams)]


async def _ask(stub: GenerationServiceStub, prompt: list[int], num_tokens: int) -> Stream:
    start, first_s, last_s, count = time.perf_counter(), 0.0, 0.0, 0
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), max_tokens=num_tokens, ignore_eos=True, raw_tool_calls=True
    )
    async for event in stub.Generate(request):
        token_ids = getattr(getattr(event, event.WhichOneof("event")), "token_ids", ())
        if token_ids:
            last_s = time.perf_counter() - start
            first_s = first_s or last_s
            count += len(token_ids)
    return Stream(first_s, last_s, count)


def _row(load: Load, streams: list[Stream], took_s: float) -> dict[str, Any]:
    num_tokens = sum(stream.num_tokens for stream in streams)
    decoding_s = max(stream.last_s for stream in streams) - max(stream.first_s for stream in streams)
    return {
        "streams": load.streams,
        "prompt": load.prompt,
        "tokens": load.tokens,
        "ttft_s": statistics.median(stream.first_s for stream in streams),
        "tpot_s": statistics.median(stream.per_token_s for stream in streams),
        "tokens_per_s": num_tokens / took_s,
        "last_first_token_to_end_s": decoding_s,
        "prompt_tokens_per_s": load.streams * load.prompt / max(stream.first_s for stream in streams),
    }


def _peer(served: Served, directory: Path, device: torch.device, until: float) -> list[dict[str, Any]]:
    """transformers' generate, all streams as one batch; its weights in bf16 on a GPU, in fp32 on a CPU."""
    from transformers import AutoModelForCausalLM

    from bench.peers.weights import write_fp32

    plain = directory.with_name(f"{served.shape}-fp32")
    write_fp32(directory, plain)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).to(device).eval()
    rows: list[dict[str, Any]] = []
    for load in served.loads:
        row = {"streams": load.streams, "prompt": load.prompt}
        if time.monotonic() > until:
            return [*rows, row | {"skipped": "the time was up"}]
        ids = torch.tensor(_prompts(load, ModelConfig.from_dir(directory).vocab_size, seed=2), device=device)
        one, few = _generate_s(model, ids, 1), min(load.tokens, 64)
        more = _generate_s(model, ids, few)
        per_token_s = (more - one) / max(1, few - 1)
        took_s = one + per_token_s * (load.tokens - 1)
        rows.append(row | {"ttft_s": one, "tpot_s": per_token_s, "tokens_per_s": load.streams * load.tokens / took_s})
    return rows


def _generate_s(model: Any, ids: torch.Tensor, num_tokens: int) -> float:
    for _ in range(2):  # the first is a warm-up
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        if ids.is_cuda:
            torch.cuda.synchronize()
        took_s = time.perf_counter() - start
    return took_s
