"""What the harness and an engine's process say to each other: a line of JSON each, on the process's stdin and stdout.

    {"load": {…}} → {"loaded": {"pid": 7}}          pid: the root of the processes whose memory counts
    {"run": {"prompts": [[5, 9], …], "tokens_out": 32, "room": 64, "bound_s": 60}}
                  → {"ran": {"times_s": [[…], …], "tokens": [[…], …], "over": false}}
    anything      → {"failed": "why"}

The process ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Protocol

from bench.peers.recorder import OverTime, Recorder


@dataclass(frozen=True)
class LoadJob:
    """What an engine is to load, and for how much."""

    model_dir: str
    """The form that this engine reads: FP8 as published, fp32, or a GGUF file."""
    threads: int
    max_model_len: int
    max_streams: int
    kv_tokens: int
    """Tokens of all streams together that must have room."""


@dataclass(frozen=True)
class RunJob:
    """Streams that start together; greedy, no stop token."""

    prompts: list[list[int]]
    tokens_out: int
    room: int
    """Tokens that every stream may come to: what an engine sizes its buffers for, before the clock starts."""
    bound_s: float


@dataclass(frozen=True)
class RunReply:
    """When each token of each stream came, in seconds after all prompts were there."""

    times_s: list[list[float]]
    tokens: list[list[int]]
    over: bool
    """The bound was reached first."""


class Engine(Protocol):
    """An adapter: one file under `engines`, with `serve(TheEngine())` at its end."""

    def load(self, job: LoadJob) -> int:
        """Load; returns the pid of the root of the engine's processes."""
        ...

    def prepare(self, streams: int, room: int) -> None:
        """Make what a server of such a load would have at hand."""
        ...

    def run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        """Generate, telling the recorder of each token at once; OverTime goes through, with nothing left running."""
        ...

    def close(self) -> None: ...


def serve(engine: Engine) -> None:
    """Answer the harness until it closes our stdin. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        for line in sys.stdin:
            write_line(replies, _answer(engine, json.loads(line)))
    finally:
        engine.close()


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "load" in request:
            return {"loaded": {"pid": engine.load(LoadJob(**request["load"]))}}
        return {"ran": asdict(_run(engine, RunJob(**request["run"])))}
    except Exception as error:  # whatever a library raises is told to the harness, which names it in its table
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def _run(engine: Engine, job: RunJob) -> RunReply:
    engine.prepare(len(job.prompts), job.room)
    recorder = Recorder(len(job.prompts), job.bound_s)
    over = False
    try:
        engine.run(job.prompts, job.tokens_out, recorder)
    except OverTime:
        over = True
    return RunReply(recorder.times_s, recorder.tokens, over)


def write_line(stream: IO[str], message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def read_message(line: str, kind: str) -> dict[str, Any]:
    """The `kind` in a reply. Raises EngineFailed with the engine's own words where it is `failed` instead."""
    message: dict[str, Any] = json.loads(line)
    if kind not in message:
        raise EngineFailed(message.get("failed", f"answered {line[:200]!r} where {kind!r} was expected"))
    value: dict[str, Any] = message[kind]
    return value


class EngineFailed(Exception):
    """An engine could not be started or could not do what it was asked for; the message says why."""
