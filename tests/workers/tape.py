"""A recorder for CPUs: keeps each torch operation that changes memory, and does them again on the same memory.

As with a CUDA graph, no Python runs in a replay: what the step looked up on the host, or made of another tensor's
value, stays as it was when it was recorded. Unlike one it computes while it records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.workers.engine import Order, runner_config
from tests.workers.ranks import TIMEOUT_S
from workers import candidates
from workers import runner as runner_module
from workers.candidates import Candidates
from workers.config import ParallelLayout, RunnerConfig
from workers.experts import layer as expert_layer
from workers.graphs import Action, interrupting
from workers.kernels.cpu.library import CHOICE_VARIABLE, native
from workers.kernels.linear import linear
from workers.kernels.swiglu import swiglu
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import PlacementUpdate

LOOKS = ("_local_scalar_dense", "nonzero", "unique", "masked_select")
"""Operations that need a value, or a shape that depends on one, on the host."""


class Tape(TorchDispatchMode):
    """A Recorder, and what its collectives interrupt."""

    num_bytes = 0

    def __init__(self) -> None:
        super().__init__()
        self.is_recording = False
        self.num_recordings = self.num_replays = 0
        self._actions: list[Action] = []

    def record(self, run: Action) -> Action:
        self._actions, self.is_recording = [], True
        self.num_recordings += 1
        with self:
            run()
        self.is_recording = False
        actions = self._actions
        return lambda: self._replay(actions)

    def interrupt(self, action: Action) -> None:
        self._actions.append(action)

    def _replay(self, actions: list[Action]) -> None:
        self.num_replays += 1
        for action in actions:
            action()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        is_look = any(look in op.name() for look in LOOKS) and "nonzero_static" not in op.name()
        assert not is_look, f"{op.name()} looks at a value"
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        self._actions.append(_again(op, args, kwargs, out))
        return out


def _again(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Action:
    """Results go where the first ones are; a view, or an operation in place, has put them there."""
    places: list[Tensor] = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]

    def again() -> None:
        results = [leaf for leaf in tree_leaves(op(*args, **kwargs)) if isinstance(leaf, Tensor)]
        for place, result in zip(places, results, strict=True):
            if result.data_ptr() != place.data_ptr():
                place.copy_(result)

    return again


@contextmanager
def taped() -> Iterator[list[Tape]]:
    """Steps are recorded on a tape, which knows torch's operations alone."""
    patch, tapes = pytest.MonkeyPatch(), list[Tape]()
    patch.setenv(CHOICE_VARIABLE, "torch")
    native.cache_clear()
    patch.setattr(candidates, "_likeliest", likeliest_without_a_look)
    patch.setattr(expert_layer, "apply_experts", experts_without_a_look)

    def recorder(config: RunnerConfig, parallel: ParallelState, _device: torch.device) -> tuple[Tape, ParallelState]:
        tapes.append(Tape())
        return tapes[-1], interrupting(parallel, tapes[-1]) if config.graphs == "piecewise" else parallel

    patch.setattr(runner_module, "recorder_of", recorder)
    try:
        yield tapes
    finally:
        patch.undo()
        native.cache_clear()


def likeliest_without_a_look(logits_Bv: Tensor, count: int) -> Candidates:
    ids_v = torch.arange(logits_Bv.shape[1], device=logits_Bv.device)
    return candidates._candidates(candidates._keys(logits_Bv, ids_v).topk(count, dim=-1).values)


def experts_without_a_look(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_eXH: Tensor,
    down_eHF: Tensor,
    first_expert: int,
    *_: object,
) -> Tensor:
    """`apply_experts` with every token at every expert, as torch has to look how many are whose."""
    out_TH = torch.zeros_like(x_TH)
    for local, (gate_up_XH, down_HF) in enumerate(zip(gate_up_eXH, down_eHF, strict=True)):
        weights_T1 = (weights_TK * (topk_ids_TK == first_expert + local)).sum(dim=1, keepdim=True)
        out_TH += linear(swiglu(linear(x_TH, gate_up_XH)), down_HF) * weights_T1
    return out_TH


def on_tape(
    parallel: ParallelState, directory: Path, orders: Sequence[Order], graphs: str, **changes: Any
) -> tuple[list[list[int]], int]:
    """What a rank answers when its steps are replayed, and how many were; none is recorded while it serves."""
    with taped() as tapes:
        config = runner_config(directory, layout=parallel.layout, rank=parallel.rank, graphs=graphs, **changes)
        runner = ModelRunner(config, parallel)
        (tape,) = tapes
        num_recordings = tape.num_recordings
        ran = [runner.place(o) if isinstance(o, PlacementUpdate) else runner.execute(o).token_ids for o in orders]
        assert tape.num_recordings == num_recordings, "a recording held up the steps behind it"
        return [token_ids for token_ids in ran if token_ids is not None], tape.num_replays


def on_tape_in_groups(
    parallel: ParallelState, directory: Path, layout: ParallelLayout, orders: Sequence[Sequence[Order]], redundant: int
) -> tuple[list[list[int]], int]:
    """The same with the orders of the rank's attention group, whose collectives are called between the pieces."""
    regrouped = parallel.regrouped(layout, TIMEOUT_S)
    return on_tape(regrouped, directory, orders[parallel.rank // layout.tp], "piecewise", redundant_experts=redundant)
