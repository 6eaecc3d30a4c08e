"""mull end to end: a real `mull serve` (gateway, Router, one rank under Ray), asked over gRPC from this process."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import grpc.aio

from bench.peers.engines.mull_in_process import kv_bytes
from bench.peers.protocol import EngineFailed, LoadJob, serve
from bench.peers.recorder import OverTime, Recorder
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub

STOP_TIMEOUT_S = 60.0


class MullOverGrpc:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._server: subprocess.Popen[str] | None = None

    def load(self, job: LoadJob) -> int:
        command = [Path(sys.executable).parent / "mull", "serve", "--model", job.model_dir]
        command += ["--threads-per-rank", job.threads, "--max-model-len", job.max_model_len]
        command += ["--kv-memory-bytes", kv_bytes(job)]
        command += ["--max-num-seqs", job.max_streams]
        # The peers draft nothing of themselves, and random weights repeat themselves: every guess would come true.
        command += ["--num-speculative-tokens", 0]
        command += ["--grpc-port", 0, "--http-port", 0, "--metrics-port", 0, "--router-metrics-port", 0]
        self._server = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        self._stub = GenerationServiceStub(self._loop.run_until_complete(self._connect(self._address())))
        return self._server.pid

    def _address(self) -> str:
        assert self._server is not None
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if line.startswith("ready"):
                # The pipe must not fill up; nothing in it matters any more.
                threading.Thread(target=self._server.stdout.read, daemon=True).start()
                return line.split("grpc ")[1].split()[0]
        raise EngineFailed(f"mull serve ended with {self._server.wait()} before it was ready")

    async def _connect(self, address: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address)

    def prepare(self, streams: int, room: int) -> None:
        """Nothing: sized at its start."""

    def run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        try:
            self._loop.run_until_complete(asyncio.wait_for(self._run(prompts, tokens_out, recorder), recorder.left_s))
        except TimeoutError:
            raise OverTime from None

    async def _run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        async with asyncio.TaskGroup() as group:
            for stream, prompt in enumerate(prompts):
                group.create_task(self._read(stream, prompt, tokens_out, recorder))

    async def _read(self, stream: int, prompt: list[int], tokens_out: int, recorder: Recorder) -> None:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingOptions(temperature=0.0),
            max_tokens=tokens_out,
            ignore_eos=True,
            raw_tool_calls=True,
        )
        async for event in self._stub.Generate(request):
            token_ids = getattr(getattr(event, event.WhichOneof("event")), "token_ids", ())
            if token_ids:
                recorder.add(stream, list(token_ids))
        count = len(recorder.tokens[stream])
        if count != tokens_out:
            raise EngineFailed(f"{count} tokens came in the events of a stream of {tokens_out}")

    def close(self) -> None:
        """Ctrl-C, as a user would."""
        if self._server is not None and self._server.poll() is None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(STOP_TIMEOUT_S)


if __name__ == "__main__":
    serve(MullOverGrpc())
