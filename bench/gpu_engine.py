"""One rank by itself on this machine's GPU, in this process: how fast it loads, steps, reads prompts and moves KV.

A decode step is timed twice: as the rank does it, each step launched before the result of the one before it is asked
for, and as the bare recording, replayed again and again. What the first takes longer the device is idle. The same with
`deterministic`, and with KV in FP8. Symmetric memory beside NCCL needs several GPUs and is not here.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.report import Spread
from workers.checkpoint import NUM_READERS, Checkpoint
from workers.config import RunnerConfig, ShardSpec
from workers.device import device_of
from workers.errors import MullError
from workers.kernels.linear import Weight
from workers.kv_memory import kv_token_bytes
from workers.layout import ParallelLayout
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import OpenSlot, Prefill, SamplingParams, StepPlan

READ_BYTES = 4 * 2**20
"""At a time, as the loader does."""
BLOCK_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank is given."""

    loads: tuple[tuple[int, int], ...]
    """Streams, and keys of each."""
    prompt: int
    steps: int
    host_kv_bytes: int
    modes: dict[str, dict[str, Any]]
    """Changes of the config."""


ON_GPU = Work(
    loads=((1, 3840), (64, 3840)),  # all steps stay within a recording's 4096
    prompt=8192,
    steps=64,
    host_kv_bytes=8 * 10**9,
    modes={"plain": {}, "deterministic": {"deterministic": True}, "FP8 KV": {"kv_dtype": "fp8"}},
)
TINY = Work(
    loads=((1, 20), (2, 70)),
    prompt=100,
    steps=3,
    host_kv_bytes=10**7,
    modes={"plain": {}, "deterministic": {"deterministic": True}, "bf16 KV": {"kv_dtype": "bf16"}},
)


def rank_alone(directory: Path, on_gpu: bool, until: float) -> Iterator[dict[str, Any]]:
    """A row for what was measured, and one for each mode that the time was up for."""
    work = ON_GPU if on_gpu else TINY
    config = RunnerConfig(
        model_dir=str(directory),
        device="cuda" if on_gpu else "cpu",
        max_model_len=max(work.prompt, *(keys for _, keys in work.loads)) + 4 * work.steps,
        max_num_seqs=max(streams for streams, _ in work.loads),
        max_num_batched_tokens=work.prompt,
        block_size=BLOCK_SIZE,
        num_threads=None if on_gpu else 1,
        graphs="auto" if on_gpu else "whole",
        host_kv_bytes=work.host_kv_bytes,
    )
    row, weights = _loading(config)
    yield row
    for mode, changes in work.modes.items():
        if time.monotonic() > until:
            yield {"mode": mode, "skipped": "the time was up"}
            continue
        changed = replace(config, host_kv_bytes=0 if changes else work.host_kv_bytes, **changes)
        try:
            yield from ({"mode": mode} | row for row in _mode(changed, work, weights))
        except (RuntimeError, MullError) as failure:  # a mode that fails must not hide the others
            yield {"mode": mode, "failed": f"{type(failure).__name__}: {failure}"[:400]}


def _loading(config: RunnerConfig) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Beside what the same threads read of the same files into memory: both find them in the page cache."""
    device, dtype = device_of(config)
    read_bytes, read_s = _read_all(Path(config.model_dir))
    start = time.perf_counter()
    weights = Checkpoint.open(config.model_dir).read(config.spec, device=device, dtype=dtype)
    _wait(device)
    load_s = time.perf_counter() - start
    rates = {"load_bytes_per_s": read_bytes / load_s, "read_bytes_per_s": read_bytes / read_s}
    return {"loaded_gb": read_bytes / 1e9, **rates, "share_of_read_rate": read_s / load_s}, weights


def _read_all(directory: Path) -> tuple[int, float]:
    """Bytes of all weights, and the seconds that reading them takes; once before, so that the cache has them."""
    files = sorted(directory.glob("*.safetensors"))
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, READ_BYTES)]
    buffers = [bytearray(READ_BYTES) for _ in range(NUM_READERS)]

    def read(reader: int) -> int:
        count = 0
        for file, at in pieces[reader::NUM_READERS]:
            with file.open("rb", buffering=0) as opened:
                opened.seek(at)
                count += opened.readinto(buffers[reader])
        return count

    with ThreadPoolExecutor(NUM_READERS) as pool:
        for _ in range(2):
            start = time.perf_counter()
            num_bytes = sum(pool.map(read, range(NUM_READERS)))
            took_s = time.perf_counter() - start
    return num_bytes, took_s


def _mode(config: RunnerConfig, work: Work, weights: dict[str, Weight]) -> Iterator[dict[str, Any]]:
    start = time.monotonic()
    runner = ModelRunner(config, ParallelState.single(), weights=weights)
    try:
        yield {"start_s": time.monotonic() - start} | _host_copies(runner)
        for streams, keys in work.loads:
            yield {"streams": streams, "keys": keys} | _decodes(runner, streams, keys, work.steps)
        yield {"prompt": work.prompt} | _prompt(runner, work.prompt)
    finally:
        runner.leave()
        del runner
        gc.collect()
        if config.device == "cuda":
            torch.cuda.empty_cache()


def _host_copies(runner: ModelRunner) -> dict[str, Any]:
    """The rate at which blocks go to the host's memory and come back, one at a time; nothing where none are kept."""
    memory = runner.host_memory
    if memory is None:
        return {}
    itemsize = runner.kv.layers[0].itemsize
    per_token = kv_token_bytes(runner.model, ShardSpec(ParallelLayout(), 0), itemsize)
    return {"kv_copy_bytes_per_s": BLOCK_SIZE * per_token / memory.copy_s, "kv_copy_s": memory.copy_s}


def _decodes(runner: ModelRunner, streams: int, keys: int, steps: int) -> dict[str, Any]:
    """All slots decode behind so many keys, which nobody computed: their values change no time."""
    slots, blocks = list(range(streams)), -(-(keys + 4 * steps) // BLOCK_SIZE)
    opened = [
        OpenSlot(slot, list(range(slot * blocks, (slot + 1) * blocks)), keys - 1, SamplingParams()) for slot in slots
    ]
    firsts = [Prefill(slot, keys - 1, [1], True) for slot in slots]
    runner.execute(StepPlan(0, open=opened, prefills=firsts, group_tokens=[streams]))
    plan = StepPlan(0, decodes=slots, group_tokens=[streams])
    times_s = []
    for _ in range(3):  # the first is a warm-up
        start, ahead = time.perf_counter(), runner.launch(plan)
        for _ in range(steps - 1):
            launched = runner.launch(plan)
            ahead.result()
            ahead = launched
        ahead.result()
        times_s.append((time.perf_counter() - start) / steps)
    step = Spread.of(times_s[1:])
    replay_s = _replay_s(runner, plan, steps)
    runner.execute(StepPlan(0, close=slots))
    idle = {} if replay_s is None else {"replay_s": replay_s, "idle_share": max(0.0, 1 - replay_s / step.median)}
    return {"step_s": step, "tokens_per_s": streams / step.median, **idle}


def _replay_s(runner: ModelRunner, plan: StepPlan, steps: int) -> float | None:
    """Of the recording alone: the inputs of the last step stay where they are. None: steps like it are not recorded."""
    recorded = runner._decode_steps
    bucket = None if recorded is None else recorded.bucket_for(plan)
    if recorded is None or bucket is None:
        return None
    action = recorded._recorded[bucket]
    with torch.inference_mode():
        _wait(runner.device)
        start = time.perf_counter()
        for _ in range(steps):
            action()
        _wait(runner.device)
    return (time.perf_counter() - start) / steps


def _prompt(runner: ModelRunner, size: int) -> dict[str, Any]:
    opened = OpenSlot(0, list(range(-(-size // BLOCK_SIZE))), 0, SamplingParams())
    plan = StepPlan(0, open=[opened], prefills=[Prefill(0, 0, [1] * size, True)], group_tokens=[size])
    times_s = []
    for _ in range(4):
        start = time.perf_counter()
        runner.execute(plan)
        times_s.append(time.perf_counter() - start)
        runner.execute(StepPlan(0, close=[0]))
    step = Spread.of(times_s[1:])
    return {"step_s": step, "tokens_per_s": size / step.median}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
