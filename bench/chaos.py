"""200 streams on a real `mull serve` while its processes are killed: what is lost, what is wrong, how long it stalls.

    python -m bench.chaos [--streams 200] [--seconds 300] [--every 10] [--copies 2] [--tp 2] [--out FILE] [--plot PNG]

Every `--every` seconds SIGKILL hits a random rank, Router or gateway. Every stream is compared, token by token, with
the same request undisturbed, which ran before. A stream's pause is the time from a kill to its next token; those with
a second kill in them are told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.report import machine, versions, write
from mull.client import AsyncClient, CallFailed, RetryPolicy
from mull.v1 import generation_pb2 as pb
from tests.end_to_end.servers import Server, serving

NUM_REQUESTS = 40
"""Different ones; the streams take them in turns."""
TOKENS_PER_STREAM = 250
RETRY = RetryPolicy(attempts=60, resumptions=60, first_pause_s=0.1, longest_pause_s=2.0)
STREAM_TIMEOUT_S = 900.0
KINDS = {"rank": "ShardActor", "Router": "Router", "gateway": "Gateway"}
"""What is killed, and what names its processes."""
SEVERAL = "several in a row"
"""Of a pause in which the next kill came before the stream went on."""
BIN_S = 0.5


@dataclass(frozen=True)
class Kill:
    """One process was killed."""

    time_s: float
    kind: str


@dataclass
class Record:
    """What came of the streams, in seconds since the start."""

    start_s: float = field(default_factory=time.monotonic)
    kills: list[Kill] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)
    """When, and how many came at once."""
    pauses_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_whole: int = 0
    num_wrong: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.start_s

    def on_tokens(self, count: int, last_s: float) -> float:
        """A stream got tokens, the ones before at `last_s`. Returns the time."""
        now_s = self.now_s
        self.tokens.append((now_s, count))
        hits = [kill for kill in self.kills if last_s < kill.time_s]
        if hits:
            self.pauses_s[hits[0].kind if len(hits) == 1 else SEVERAL].append(now_s - hits[0].time_s)
        return now_s


def requests() -> list[pb.GenerateRequest]:
    """Greedy, sampled, penalised; thoughts with a budget; texts that go on."""
    made = []
    for number in range(NUM_REQUESTS):
        sampling = pb.SamplingOptions(seed=number, temperature=(0.0, 0.8, 1.0)[number % 3])
        if number % 5 == 0:
            sampling.presence_penalty = 0.5
        request = pb.GenerateRequest(sampling=sampling, max_tokens=TOKENS_PER_STREAM)
        if number % 4 == 0:
            message = pb.Message(role="user", content=f"What is {300 + number} + {17 * number}?")
            request.conversation.messages.append(message)
            request.thinking_budget = 150
            request.min_tokens = TOKENS_PER_STREAM // 2
        else:
            request.raw_prompt = f"{number} {number + 1} {number + 2}"
            request.ignore_eos = True
        made.append(request)
    return made


def token_ids(event: Any) -> Sequence[int]:
    """Those of a client's event."""
    return getattr(event, "token_ids", ())


async def output(client: AsyncClient, request: pb.GenerateRequest, record: Record | None = None) -> list[int]:
    """All tokens of one stream. Raises CallFailed."""
    last_s = record.now_s if record is not None else 0.0
    ids: list[int] = []
    async for event in client.stream(request):
        new = token_ids(event)
        ids += new
        if new and record is not None:
            last_s = record.on_tokens(len(new), last_s)
    return ids


async def one_stream(
    client: AsyncClient, numbers: Iterable[int], expected: Sequence[list[int]], record: Record, until_s: float
) -> None:
    """Request after request, each compared with what it must be."""
    asked = requests()
    for number in numbers:
        if record.now_s > until_s:
            return
        try:
            ids = await output(client, asked[number], record)
        except CallFailed as error:
            record.lost.append(f"at {record.now_s:.1f} s: {error}")
            continue
        if ids == expected[number]:
            record.num_whole += 1
        else:
            record.num_wrong += 1


def victims(server: Server) -> dict[str, list[psutil.Process]]:
    """The server's processes that can be killed now."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            name = process.name() + "".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        for kind, word in KINDS.items():
            if name.startswith("ray::") and word in name:
                found[kind].append(process)
    return found


async def kill_now_and_then(server: Server, record: Record, every_s: float, until_s: float) -> None:
    """Kinds in turns, so that each has its share; which process of a kind is random."""
    dice = random.Random(5)
    for kind in itertools.cycle(KINDS):
        await asyncio.sleep(every_s)
        if record.now_s >= until_s:
            return
        found = (await asyncio.to_thread(victims, server))[kind]
        if not found:
            print(f"{record.now_s:6.1f} s  no {kind} is there to kill", flush=True)
            continue
        victim = dice.choice(found)
        record.kills.append(Kill(record.now_s, kind))
        victim.send_signal(signal.SIGKILL)
        print(f"{record.now_s:6.1f} s  killed a {kind}, pid {victim.pid}", flush=True)


async def measure(server: Server, options: argparse.Namespace) -> Record:
    async with AsyncClient(server.address, retry=RETRY, timeout_s=STREAM_TIMEOUT_S) as client:
        expected = await asyncio.gather(*(output(client, request) for request in requests()))
        print(f"undisturbed: {sum(map(len, expected)):,} tokens of {len(expected)} requests", flush=True)
        record = Record()
        streams = [
            one_stream(
                client,
                itertools.islice(itertools.cycle(range(NUM_REQUESTS)), stream, None),
                expected,
                record,
                options.seconds,
            )
            for stream in range(options.streams)
        ]
        await asyncio.gather(kill_now_and_then(server, record, options.every, options.seconds), *streams)
    return record


def summary(record: Record) -> dict[str, Any]:
    return {
        "seconds": record.now_s,
        "tokens": sum(count for _, count in record.tokens),
        "streams_whole": record.num_whole,
        "streams_lost": len(record.lost),
        "lost": record.lost[:20],
        "streams_wrong": record.num_wrong,
        "kills": dict(Counter(kill.kind for kill in record.kills)),
        "longest_pause_s": {kind: max(pauses) for kind, pauses in record.pauses_s.items()},
        "median_pause_s": {kind: sorted(pauses)[len(pauses) // 2] for kind, pauses in record.pauses_s.items()},
        "kill_times": [[kill.time_s, kill.kind] for kill in record.kills],
        "tokens_per_s": rates(record),
    }


def rates(record: Record) -> list[float]:
    """Tokens a second, bin by bin."""
    bins: Counter[int] = Counter()
    for time_s, count in record.tokens:
        bins[int(time_s / BIN_S)] += count
    return [bins[number] / BIN_S for number in range(max(bins, default=0) + 1)]


def draw(record: Record, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = rates(record)
    figure, axis = pyplot.subplots(figsize=(12, 4))
    axis.fill_between([BIN_S * number for number in range(len(found))], found, step="post", alpha=0.6, linewidth=0)
    colours = dict(zip(KINDS, ("tab:orange", "tab:red", "tab:purple"), strict=True))
    for kind, colour in colours.items():
        times = [kill.time_s for kill in record.kills if kill.kind == kind]
        pauses = record.pauses_s.get(kind)
        label = f"{kind} killed, longest pause {max(pauses):.1f} s" if pauses else f"{kind} killed"
        for index, time_s in enumerate(times):
            axis.axvline(time_s, color=colour, linewidth=1, label=label if index == 0 else None)
    axis.set_xlabel("seconds")
    axis.set_ylabel("tokens/s, all streams")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, BIN_S * len(found))
    axis.legend(fontsize=8, loc="upper right")
    axis.set_title(f"{record.num_whole} streams whole, {len(record.lost)} lost, {record.num_wrong} wrong")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two kills")
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG; needs matplotlib")
    options = parser.parse_args()
    layout = ("--copies", str(options.copies), "--tp", str(options.tp), "--threads-per-rank", "1")
    room = ("--max-num-seqs", str(options.streams), "--max-num-batched-tokens", str(max(512, 2 * options.streams)))
    with serving(*layout, *room, "--max-streams", str(2 * options.streams)) as server:
        record = asyncio.run(measure(server, options))
    host, figures = machine(), summary(record)
    print(host, versions("ray", "grpcio"), sep="\n")
    print(
        *(f"{name}: {value}" for name, value in figures.items() if name not in ("tokens_per_s", "kill_times")), sep="\n"
    )
    write(options.out, {"machine": host, "versions": versions("ray", "grpcio"), "options": vars_of(options), **figures})
    if options.plot is not None:
        draw(record, options.plot)


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the run was asked for."""
    return {name: value for name, value in vars(options).items() if not isinstance(value, Path | None)}


if __name__ == "__main__":
    main()
