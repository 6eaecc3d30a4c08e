"""Recording what a step does on a device, to do it again without saying it again: CUDA graphs.

A step of 94 layers is some two thousand launches, and each costs the host microseconds, as it does the device. What is
recorded reads and writes the same memory each time, and looks at no value. On a CPU nothing is recorded: the same step
is computed each time, from the same buffers, so that tests see all but the replay itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from workers.errors import GraphError
from workers.parallel import ParallelState
from workers.rank_group import RankGroup

Action = Callable[[], None]


class Recorder(Protocol):
    """Makes a repeatable action of what is done on buffers that stay where they are."""

    def record(self, run: Action) -> Action:
        """What does the same as `run`, each time it is called. Recording changes no buffer for good."""

    @property
    def num_bytes(self) -> int:
        """Of memory that all recordings hold."""


class CallAgain:
    """Nothing is recorded: the action is what was given."""

    num_bytes = 0

    def record(self, run: Action) -> Action:
        return run


class Interruptible(Protocol):
    """A recording of several pieces, between which something else is done."""

    @property
    def is_recording(self) -> bool: ...

    def interrupt(self, action: Action) -> None:
        """Leave `action` out of the recording and do it at this place of each replay; it is not done now."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they are replayed one after the other, never side by side."""

    def __init__(self, parallel: ParallelState) -> None:
        self._parallel = parallel
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own has no annotations
        self._pieces: list[Action] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        """That is being recorded. None afterwards: a graph that is kept keeps its memory and the group's channels."""
        self.num_bytes = 0

    @property
    def is_recording(self) -> bool:
        return self._pieces is not None

    def record(self, run: Action) -> Action:
        """Raises GraphError with the way round."""
        torch.cuda.synchronize()
        gc.collect()  # or it might free a tensor of the device in the middle, which cannot be recorded
        free_bytes, before = torch.cuda.mem_get_info()[0], _counts(self._parallel)
        pieces: list[Action] = []
        self._pieces = pieces
        try:
            with torch.cuda.stream(self._stream):
                self._begin()
                run()
                self._end()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise GraphError(f"a decode step cannot be recorded ({reason}); start with graphs off") from error
        finally:
            self._pieces = None
        self.num_bytes += max(0, free_bytes - torch.cuda.mem_get_info()[0])
        return _Replay(pieces, self._parallel, before)

    def interrupt(self, action: Action) -> None:
        assert self._pieces is not None, "only a recording can be interrupted"
        self._end()
        self._pieces.append(action)
        self._begin()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may look at events meanwhile, as the one that watches over collectives does.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        graph, self._graph = self._graph, None
        assert self._pieces is not None, "a recording has begun"
        assert graph is not None, "a recording has begun"
        graph.capture_end()
        self._pieces.append(graph.replay)


class _Replay:
    """Pieces in order; what ranks say to each other inside of them is counted as if it were said anew."""

    def __init__(self, pieces: list[Action], parallel: ParallelState, before: list[_Counts]) -> None:
        """`before`: the counts when the recording began, which is over."""
        self._pieces = pieces
        recorded = zip(parallel.groups, before, _counts(parallel), strict=True)
        self._said = [(group, new[0] - old[0], new[1] - old[1]) for group, old, new in recorded]

    def __call__(self) -> None:
        for piece in self._pieces:
            piece()
        for group, num_exchanges, num_sent_bytes in self._said:
            group.num_exchanges += num_exchanges
            group.num_sent_bytes += num_sent_bytes


_Counts = tuple[int, int]
"""Of a group: exchanges, and bytes sent."""


def _counts(parallel: ParallelState) -> list[_Counts]:
    return [(group.num_exchanges, group.num_sent_bytes) for group in parallel.groups]


class InterruptingGroup(RankGroup):
    """A group whose collectives are no part of a recording: they are called anew in each replay.

    NCCL wants a collective to be recorded by all its ranks or by none, and groups of a copy do not agree on that. What
    is summed or gathered stays where it is for as long as the recording lives. What comes out, and the rows that are
    sent, many for each token, are read before the next of their kind are there: all layers of all recordings have one
    place for them, or they would hold gigabytes.
    """

    def __init__(self, inner: RankGroup, recorder: Interruptible) -> None:
        super().__init__(inner.index, inner.size, inner.process_group)
        self._inner, self._recorder = inner, recorder
        self._places: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 1 or not self._recorder.is_recording:
            return self._counted(self._inner.all_reduce(x))
        assert x.is_contiguous(), "summed where it lies"
        self._recorder.interrupt(lambda: self._again(x, self._inner.all_reduce(x)))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        if self.size == 1 or not self._recorder.is_recording:
            return self._counted(self._inner.all_gather(x))
        x = x.contiguous()
        gathered = self._place("gathered", x, torch.Size((self.size, *x.shape)))
        self._recorder.interrupt(lambda: self._again(gathered, self._inner.all_gather(x)))
        return gathered

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        if self.size == 1 or not self._recorder.is_recording:
            return self._counted(self._inner.all_to_all(rows, send_counts, receive_counts))
        rows = self._place("sent", rows, rows.shape).copy_(rows)
        received = self._place("received", rows, torch.Size((sum(receive_counts), *rows.shape[1:])))
        self._recorder.interrupt(
            lambda: self._again(received, self._inner.all_to_all(rows, send_counts, receive_counts))
        )
        return received

    def abort(self) -> None:
        self._inner.abort()

    def minimum(self, value: int, device: torch.device) -> int:
        return self._inner.minimum(value, device)

    def _place(self, kind: str, like: Tensor, shape: torch.Size) -> Tensor:
        key = kind, shape, like.dtype
        if key not in self._places:
            self._places[key] = like.new_empty(shape)
        return self._places[key]

    def _again(self, place: Tensor, result: Tensor) -> None:
        if result.data_ptr() != place.data_ptr():
            place.copy_(result)
        self._counted(result)

    def _counted(self, result: Tensor) -> Tensor:
        self.num_exchanges, self.num_sent_bytes = self._inner.num_exchanges, self._inner.num_sent_bytes
        return result


def interrupting(parallel: ParallelState, recorder: Interruptible) -> ParallelState:
    """The same place among the ranks, with collectives that stay out of recordings."""
    world = InterruptingGroup(parallel.world, recorder)
    tp = world if parallel.tp is parallel.world else InterruptingGroup(parallel.tp, recorder)
    return ParallelState(parallel.rank, parallel.layout, world, tp)
