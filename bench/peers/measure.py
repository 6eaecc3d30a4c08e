"""Runs the cells of one shape: engines in turns on each cell, all but the one that is asked stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from bench.limits import Limits
from bench.peers.capacity import Batch, Room, batches, groups
from bench.peers.cells import Cell, Figures, agreement
from bench.peers.checkpoints import Checkpoints
from bench.peers.engine_process import EngineProcess
from bench.peers.protocol import EngineFailed, LoadJob, RunJob
from bench.peers.registry import ENGINES, MULL, PEERS, EngineSpec
from bench.peers.results import CellResult, ShapeResult

Tell = Callable[[str], None]

SPARE = 0.9
"""Of the memory that is free, what engines may be loaded into."""
IDLE_S = 2.0
AGREEMENT = Cell(2, 48, 16, rounds=1, bound_s=300)


class ShapeBench:
    """One shape on the engines that are asked for."""

    def __init__(self, checkpoints: Checkpoints, cells: Sequence[Cell], threads: int, logs: Path, tell: Tell) -> None:
        self._checkpoints = checkpoints
        self._threads = threads
        self._logs = logs
        self._tell = tell
        self.result = ShapeResult(checkpoints.shape.name, [CellResult(cell) for cell in cells])
        self._num_groups = 0

    def run(self, names: Sequence[str], on_cell: Callable[[], None]) -> None:
        """Measure them all into `result`, which names what fails; `on_cell` is called when there is more in it."""
        self._on_cell = on_cell
        for name in names:
            if not ENGINES[name].python.exists():
                self.result.missing[name] = f"not installed: no {ENGINES[name].python}"
        for batch in batches(self.result.cells):
            self._run_batch(batch, [name for name in names if name not in self.result.missing])

    def _run_batch(self, batch: Batch[CellResult], names: Sequence[str]) -> None:
        room = Room.of([AGREEMENT, *[result.cell for result in batch.items]])
        needs_mb = {name: ENGINES[name].needs_mb(self._checkpoints, room.kv_tokens) for name in names}
        available_mb = SPARE * psutil.virtual_memory().available / 1e6
        found = groups(needs_mb, available_mb)
        for name, need in needs_mb.items():
            if not any(name in group for group in found):
                why = f"needs {need / 1e3:.1f} GB of the {available_mb / 1e3:.1f} GB that are free"
                for result in batch.items:
                    result.failures[name] = why
        for group in found:
            self._run_group([name for name in group if name not in self.result.missing], batch.items, room)

    def _run_group(self, group: Sequence[str], results: Sequence[CellResult], room: Room) -> None:
        self._num_groups += 1
        with ExitStack() as stack:
            engines = dict(self._started(group, room, stack))
            self._compare(engines)
            for result in results:
                result.limits.append(Limits.measure(self._threads))
                self._run_rounds(engines, result)
                self._on_cell()
            for name, engine in engines.items():
                if name not in self.result.missing:
                    self.result.memory[name] = engine.memory()
            self._on_cell()

    def _run_rounds(self, engines: dict[str, EngineProcess], result: CellResult) -> None:
        """Turns that begin with another engine each round; the round before the first warms up."""
        names = [name for name in engines if name not in result.cell.without]
        started_s = 0.0
        for round_number in range(-1, result.cell.rounds):
            if round_number == 0:
                started_s = time.monotonic()
            budget_s = result.cell.budget_s
            if round_number > 0 and budget_s is not None and time.monotonic() - started_s > budget_s:
                return
            for place in range(len(names)):
                name = names[(place + round_number) % len(names)]
                self._run_cell(name, engines[name], result, round_number)

    def _started(self, group: Sequence[str], room: Room, stack: ExitStack) -> Iterator[tuple[str, EngineProcess]]:
        for name in group:
            spec = ENGINES[name]
            self._tell(f"{self.result.shape}: loading {name}")
            log = self._logs / f"{self.result.shape} {name}.log".replace(" ", "-")
            try:
                job = self._job(spec, room)
                engine = EngineProcess(spec.python, spec.program, spec.environment, log)
                stack.callback(engine.stop)
                engine.load(job, spec.load_timeout_s)
            except EngineFailed as error:
                self.result.missing[name] = f"does not load: {error}"
                self._tell(f"{name} {self.result.missing[name]}")
                continue
            self.result.idle_cpu[name] = engine.idle_cpu(IDLE_S)
            if spec.can_be_stopped:
                engine.pause()
            yield name, engine

    def _job(self, spec: EngineSpec, room: Room) -> LoadJob:
        return LoadJob(
            model_dir=str(self._checkpoints.path(spec.form).absolute()),
            threads=self._threads,
            max_model_len=room.max_model_len,
            max_streams=room.max_streams,
            kv_tokens=room.kv_tokens,
        )

    def _compare(self, engines: dict[str, EngineProcess]) -> None:
        """Greedy tokens of each against mull's; the first request of an engine, so it warms it, too."""
        prompts = AGREEMENT.prompts(self._checkpoints.shape.prompt_ids, 0)
        job = RunJob(prompts, AGREEMENT.tokens_out, AGREEMENT.length, AGREEMENT.bound_s)
        outputs = {}
        for name, engine in list(engines.items()):
            self._tell(f"{self.result.shape}: first tokens of {name}")
            try:
                with running(name, engine):
                    outputs[name] = engine.run(job)
            except EngineFailed as error:
                self.result.missing[name] = f"does not generate: {error}"
                self._tell(f"{name} {self.result.missing[name]}")
                del engines[name]
        if MULL not in outputs or outputs[MULL].over:
            return
        for name, reply in outputs.items():
            if not reply.over:
                self.result.agreement[name] = agreement(outputs[MULL].tokens, reply.tokens)

    def _run_cell(self, name: str, engine: EngineProcess, result: CellResult, round_number: int) -> None:
        """One run; the round before the first warms the engine up and does not count."""
        if name in result.failures or name in self.result.missing:
            return
        # The fastest peer is what counts; ours are always asked, as each turn is held against them.
        if round_number > 0 and name in PEERS and result.is_far_behind(name):
            return
        cell = result.cell
        asked = cell if round_number >= 0 else cell.warm_up
        prompts = asked.prompts(self._checkpoints.shape.prompt_ids, round_number)
        job = RunJob(prompts, asked.tokens_out, cell.length, cell.bound_s)
        try:
            with running(name, engine):
                reply = engine.run(job)
        except EngineFailed as error:
            # Its process may be in any state: it is not asked again.
            self.result.missing[name] = f"failed at {cell}: {error}"
            self._tell(f"{name} {self.result.missing[name]}")
            return
        if reply.over:
            result.failures[name] = f"over {cell.bound_s:g} s"
            self._tell(f"{self.result.shape}  {cell!s:16} {name:20} {result.failures[name]}")
            return
        if round_number < 0:
            return
        figures = Figures.of(reply)
        result.figures.setdefault(name, {})[self._num_groups, round_number] = figures
        tpot = "" if figures.tpot_s is None else f"{1e3 * figures.tpot_s:8.2f} ms a token"
        self._tell(
            f"{self.result.shape}  {cell!s:16} {name:20} {figures.tokens_per_s:8.1f} tokens/s  "
            f"first after {figures.ttft_s:7.3f} s {tpot}"
        )


@contextlib.contextmanager
def running(name: str, engine: EngineProcess) -> Iterator[None]:
    """It alone, for a while."""
    engine.resume()
    try:
        yield
    finally:
        if ENGINES[name].can_be_stopped:
            engine.pause()
