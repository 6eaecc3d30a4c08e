"""What a token costs in front of the engine: real gateway, real Router, ranks that answer without computing.

    python -m bench.gateway [--streams 1,16,64] [--protocols grpc,http] [--runs 5] [--out bench/results/gateway.json]

Gateway, Router and client are processes of their own, on uvloop; CPU time is theirs alone, from the kernel's
accounting, over whole requests (prompt, stream, finish). Two loads: `paced` gives the engine a step time that leaves
every token its own message, `flooded` lets the ranks answer at once, so that tokens share messages where the gateway is
the slower. A message is an event of gRPC, or a chunk of a chat completion's stream.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.report import Spread, arguments, machine, versions, write

MODEL_DIR = Path(__file__).parents[1] / "deploy" / "models" / "pocket"
START_TIMEOUT_S = 60.0
CLIENT_TIMEOUT_S = 300.0
MAX_STREAMS = 256
PROTOCOLS = ("grpc", "http")
NULL_TOKEN_ID = 40


@dataclass(frozen=True)
class Load:
    """How fast the ranks answer and how long the streams are."""

    name: str
    streams: int
    step_s: float
    tokens_per_stream: int


def loads(streams: int) -> list[Load]:
    """Paced at about half of what one core of gateway can carry, and flooded."""
    paced_s = 0.004 + 0.0004 * streams
    return [
        Load("paced", streams, paced_s, max(100, int(3 / paced_s))),
        Load("flooded", streams, 0.0, min(4000, 20_000 // streams)),
    ]


async def serve_router(step_s: float) -> None:
    """The real Router over a group without ranks; prints its address."""
    from cluster.router.router import Router
    from cluster.router.scheduler_config import SchedulerConfig
    from cluster.router.wire import ModelInfo

    config = SchedulerConfig(max_model_len=4096, max_num_seqs=MAX_STREAMS, max_num_batched_tokens=1024)
    model = ModelInfo(name="pocket", vocab_size=1024, max_model_len=4096, think_end_id=1023)
    router = Router(model, config, lambda _on_progress, _survivors: NullGroup(step_s))
    await router.start()
    print(router.address, flush=True)
    await asyncio.Event().wait()


class NullGroup:
    """A ShardGroup whose ranks answer every plan with the same token, `step_s` after the last answer."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._plans: asyncio.Queue[Any] = asyncio.Queue()
        self._next_s = 0.0

    silence_s = 0.0

    async def start(self) -> Any:
        from cluster.router.shard_group import GroupInfo
        from workers.layout import ParallelLayout
        from workers.step import RankReady

        num_blocks = MAX_STREAMS * 4096 // 32
        ready = RankReady(0, 1, "here", "none", num_blocks, 32, weight_bytes=0, kv_bytes=0, load_s=0.0)
        return GroupInfo(ParallelLayout(), [ready])

    def send(self, plans: list[Any]) -> None:
        self._plans.put_nowait(plans)

    async def receive(self) -> Any:
        from workers.step import StepResult

        plans = await self._plans.get()
        now_s = time.perf_counter()
        await asyncio.sleep(max(0.0, self._next_s - now_s))
        self._next_s = max(self._next_s, now_s) + self._step_s
        return [StepResult(plan.step, 0, [NULL_TOKEN_ID] * len(plan.sampling_slots)) for plan in plans]

    async def dissolve(self) -> Any:
        return {}

    async def stop(self) -> None:
        pass


async def serve_gateway(router: str) -> None:
    """The real gateway; prints its address."""
    from cluster.config import GatewayConfig, ModelSource
    from cluster.gateway.copies import static_addresses
    from cluster.gateway.served_model import ServedModel
    from cluster.gateway.server import GatewayServer

    model = ServedModel.load(ModelSource(path=MODEL_DIR, name="pocket"))
    server = GatewayServer(GatewayConfig(grpc_port=0, http_port=0, metrics_port=0), model, static_addresses(router))
    ports = await server.start()
    while not server.copies.state.ready:
        await server.copies.updated()
    print(f"127.0.0.1:{ports.grpc} 127.0.0.1:{ports.http}", flush=True)
    await asyncio.Event().wait()


async def run_grpc_client(address: str, streams: int, max_tokens: int) -> None:
    """Read `streams` streams to their ends; prints counts and seconds as JSON."""
    import grpc.aio

    from mull.v1 import generation_pb2 as pb
    from mull.v1.generation_pb2_grpc import GenerationServiceStub

    async with grpc.aio.insecure_channel(address) as channel:
        stub = GenerationServiceStub(channel)
        request = pb.GenerateRequest(raw_prompt="Count.<think>\n", max_tokens=max_tokens)

        async def read() -> tuple[int, int]:
            num_tokens = num_messages = 0
            async for event in stub.Generate(request):
                num_tokens += len(event.thinking_delta.token_ids)
                num_messages += event.HasField("thinking_delta")
            return num_tokens, num_messages

        await _print_counts([read() for _ in range(streams)])


async def run_http_client(address: str, streams: int, max_tokens: int) -> None:
    """The same as chat completions, on sockets of its own: a client library would take the other core for itself."""
    messages = [{"role": "user", "content": "Count."}]
    options = {"include_usage": True}
    asked = {"messages": messages, "max_tokens": max_tokens, "stream": True, "stream_options": options}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: mull\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    host, port = address.split(":")

    async def read() -> tuple[int, int]:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + body)
        num_messages, last = 0, b""
        while (line := await reader.readline()) != b"data: [DONE]\n":
            if not line:
                raise RuntimeError(f"the stream ended after {num_messages} chunks: {last!r}")
            if line.startswith(b"data: "):
                num_messages, last = num_messages + 1, line
        writer.close()
        # The first chunk has the role, the last two the finish and the usage.
        return json.loads(last[6:])["usage"]["completion_tokens"], num_messages - 3

    await _print_counts([read() for _ in range(streams)])


async def _print_counts(streams: list[Coroutine[Any, Any, tuple[int, int]]]) -> None:
    started_s = time.perf_counter()
    counts = await asyncio.gather(*streams)
    wall_s = time.perf_counter() - started_s
    tokens, messages = (sum(column) for column in zip(*counts, strict=True))
    print(json.dumps({"tokens": tokens, "messages": messages, "wall_s": wall_s}))


@contextmanager
def role(*args: str) -> Iterator[tuple[psutil.Process, str]]:
    """A server of this file in its own process, and the address it printed."""
    command = [sys.executable, "-m", "bench.gateway", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"{' '.join(command)} ended with {process.wait(START_TIMEOUT_S)} before it listened")
        yield psutil.Process(process.pid), address
    finally:
        process.kill()
        process.wait()


def measure(load: Load, protocol: str, runs: int) -> dict[str, Any]:
    """CPU-µs per token of gateway and Router over `runs` repetitions, after one to warm up."""
    router_args = ("--role", "router", "--step-s", str(load.step_s))
    with (
        role(*router_args) as (router, router_address),
        role("--role", "gateway", "--router", router_address) as (
            gateway,
            addresses,
        ),
    ):
        target = (f"{protocol}-client", addresses.split()[PROTOCOLS.index(protocol)])
        _run_once(load, target, gateway, router)
        results = [_run_once(load, target, gateway, router) for _ in range(runs)]
    columns = {name: Spread.of([result[name] for result in results]) for name in results[0]}
    return {"load": load.name, "protocol": protocol, "streams": load.streams, "step_s": load.step_s, **columns}


def _run_once(load: Load, target: tuple[str, str], gateway: psutil.Process, router: psutil.Process) -> dict[str, float]:
    role_name, address = target
    command = [sys.executable, "-m", "bench.gateway", "--role", role_name, "--address", address]
    command += ["--streams", str(load.streams), "--tokens", str(load.tokens_per_stream)]
    before = _cpu_s(gateway), _cpu_s(router)
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=CLIENT_TIMEOUT_S).stdout
    after = _cpu_s(gateway), _cpu_s(router)
    counts = json.loads(output)
    tokens = counts["tokens"]
    return {
        "gateway_cpu_us_per_token": 1e6 * (after[0] - before[0]) / tokens,
        "router_cpu_us_per_token": 1e6 * (after[1] - before[1]) / tokens,
        "tokens_per_s": tokens / counts["wall_s"],
        "tokens_per_message": tokens / counts["messages"],
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def benchmark(stream_counts: list[int], protocols: list[str], runs: int, out: Path | None) -> None:
    """Measure and print all loads."""
    about = {**machine(), **versions("grpcio", "protobuf", "uvloop", "uvicorn", "fastapi")}
    print(json.dumps(about))
    rows = []
    for streams, protocol in itertools.product(stream_counts, protocols):
        for load in loads(streams):
            row = measure(load, protocol, runs)
            rows.append(row)
            print(
                f"{load.name:8} {protocol} {streams:3} streams: gateway {row['gateway_cpu_us_per_token']} CPU-µs a "
                f"token, Router {row['router_cpu_us_per_token']}, {row['tokens_per_s']} tokens/s, "
                f"{row['tokens_per_message']} tokens a message",
                flush=True,
            )
    write(out, {"machine": about, "rows": rows})


def main() -> None:
    parser = arguments(__doc__, streams="1,16,64")
    parser.add_argument("--protocols", default=",".join(PROTOCOLS))
    parser.add_argument("--role", choices=["router", "gateway", "grpc-client", "http-client"], help=argparse.SUPPRESS)
    parser.add_argument("--step-s", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--router", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=100, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role is None:
        benchmark([int(count) for count in args.streams.split(",")], args.protocols.split(","), args.runs, args.out)
        return
    import uvloop

    if args.role == "router":
        uvloop.run(serve_router(args.step_s))
    elif args.role == "gateway":
        uvloop.run(serve_gateway(args.router))
    else:
        run_client = run_grpc_client if args.role == "grpc-client" else run_http_client
        uvloop.run(run_client(args.address, int(args.streams), args.tokens))


if __name__ == "__main__":
    main()
