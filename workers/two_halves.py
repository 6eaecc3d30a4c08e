"""A large step as two halves of its rows, layer by layer in turn: one computes while the other's travel to experts.

Hops 7 and 8, where attention groups are several. The second half's tokens may stand behind the first's in a sequence:
in each layer it attends after the first has stored its K and V. Every rank halves the same steps and meets the others
in the same order, with rows or without. H hidden, R rows that a rank computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from workers.batch import BatchBuilder, ForwardBatch
from workers.experts.dispatch import Dispatcher
from workers.experts.layer import ExpertLayer
from workers.experts.rows import RoutedRows
from workers.kernels.sums import Sums
from workers.kv_pool import KVPool
from workers.model import Decoder, DecoderLayer
from workers.slots import Ints
from workers.step import Prefill, Score, StepPlan

Result = TypeVar("Result")
Coming = TypeVar("Coming", covariant=True)


class Arriving(Protocol[Coming]):
    """What is on its way."""

    def get(self) -> Coming:
        """What computing queues from now on may read it."""


class Travel(Protocol):
    """Runs exchanges, in the order in which they are started."""

    def mark(self) -> Callable[[], AbstractContextManager[object]]:
        """Of what computing has queued so far: an exchange inside the context begins when that is done."""

    def start(
        self, after: Callable[[], AbstractContextManager[object]], exchange: Callable[[], Result]
    ) -> Arriving[Result]:
        """Begin it."""


@dataclass(frozen=True)
class Arrived(Generic[Result]):
    """It is here."""

    result: Result

    def get(self) -> Result:
        return self.result


class TravelAtOnce:
    """On a CPU: an exchange is over when its call returns."""

    def mark(self) -> Callable[[], AbstractContextManager[object]]:
        return nullcontext

    def start(
        self, after: Callable[[], AbstractContextManager[object]], exchange: Callable[[], Result]
    ) -> Arriving[Result]:
        with after():
            return Arrived(exchange())


class TravelBeside:
    """On a GPU: on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it

    def mark(self) -> Callable[[], AbstractContextManager[object]]:
        done = torch.cuda.current_stream(self._device).record_event()

        def after() -> AbstractContextManager[object]:
            self._stream.wait_event(done)
            return torch.cuda.stream(self._stream)

        return after

    def start(
        self, after: Callable[[], AbstractContextManager[object]], exchange: Callable[[], Result]
    ) -> Arriving[Result]:
        with after():
            result = exchange()
        return _OnStream(result, self._stream.record_event(), self._device)


@dataclass(frozen=True)
class _OnStream(Generic[Result]):
    """The two streams hold each other's tensors only by events, so that these must live until both have read them."""

    result: Result
    done: torch.cuda.Event
    device: torch.device

    def get(self) -> Result:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        for tensor in _tensors(self.result):
            tensor.record_stream(stream)
        return self.result


def travel_on(device: torch.device) -> Travel:
    return TravelBeside(device) if device.type == "cuda" else TravelAtOnce()


def halve(plan: StepPlan) -> tuple[StepPlan, StepPlan]:
    """The first half of its rows, as far as they are prompts; and the rest, with all decodes and guesses."""
    room = -(-plan.num_tokens // 2)
    first: list[Prefill] = []
    second: list[Prefill] = []
    for prefill in plan.prefills:
        count = min(room, len(prefill.token_ids))
        room -= count
        if count == len(prefill.token_ids):
            first.append(prefill)
        elif count == 0:
            second.append(prefill)
        else:
            parts = _cut(prefill, count)
            first.append(parts[0])
            second.append(parts[1])
    return (
        StepPlan(plan.step, prefills=first, group_tokens=plan.group_tokens),
        replace(plan, close=[], open=[], extend=[], offload=[], fetch=[], prefills=second),
    )


def _cut(prefill: Prefill, count: int) -> tuple[Prefill, Prefill]:
    scores = [_score(prefill.score, slice(count)), _score(prefill.score, slice(count, None))]
    return (
        Prefill(prefill.slot, prefill.start, prefill.token_ids[:count], False, scores[0]),
        Prefill(prefill.slot, prefill.start + count, prefill.token_ids[count:], prefill.sample, scores[1]),
    )


def _score(score: Score | None, part: slice) -> Score | None:
    if score is None or not score.target_ids[part]:
        return None
    return Score(score.target_ids[part], score.num_logprobs)


@dataclass(frozen=True)
class HalvedBatch:
    """What `ForwardBatch` is to a whole step. None: this group has no rows in that half."""

    halves: tuple[ForwardBatch | None, ForwardBatch | None]

    @classmethod
    def build(cls, builder: BatchBuilder, plan: StepPlan, last_tokens: Tensor) -> HalvedBatch:
        """Raises PlanError where the plan breaks the contract."""
        first, second = (builder.build(half, last_tokens) if half.num_tokens else None for half in halve(plan))
        return cls((first, second))

    @property
    def there(self) -> list[ForwardBatch]:
        return [half for half in self.halves if half is not None]

    @property
    def sample_slots(self) -> Ints:
        return np.concatenate([half.sample_slots for half in self.there])

    @property
    def sample_positions(self) -> Ints:
        return np.concatenate([half.sample_positions for half in self.there])

    @property
    def has_scores(self) -> bool:
        return any(half.scored_rows_S is not None for half in self.there)


class _Half:
    """Rows on their way through the layers."""

    def __init__(self, decoder: Decoder, batch: ForwardBatch | None, dispatcher: Dispatcher[Any]) -> None:
        self.batch, self.dispatcher = batch, dispatcher
        self.x_TH = decoder.no_rows if batch is None else decoder.embedding(batch.token_ids_T)
        self.delta: Arriving[Sums] | None = None

    def take_delta(self) -> Sums | None:
        """What the layer before is still to add."""
        delta, self.delta = self.delta, None
        return None if delta is None else delta.get()

    def route(self, layer: DecoderLayer, experts: ExpertLayer, kv: KVPool) -> RoutedRows:
        """Attention, and the choice of experts."""
        delta_TH = self.take_delta()
        if self.batch is None:
            return experts.route(self.x_TH)
        return experts.route(layer.to_experts(self.x_TH, delta_TH, self.batch, kv))


def forward_halves(
    decoder: Decoder, batches: Sequence[ForwardBatch | None], kv: KVPool, travel: Travel, dispatcher: Dispatcher[Any]
) -> Tensor:
    """As `Decoder.forward` of the whole step, to the same numbers: the sampled rows, and then the scored."""
    first, second = (_Half(decoder, batch, dispatcher) for batch in batches)
    *others, last = decoder.layers
    for layer in others:
        if isinstance(layer.feed_forward, ExpertLayer):
            _in_turn(layer, layer.feed_forward, first, second, kv, travel)
            continue
        for half in (first, second):
            if half.batch is not None:
                half.delta = Arrived(layer(half.x_TH, half.take_delta(), half.batch, kv, dispatcher))
    rows = []
    for half in (first, second):
        delta_TH = half.take_delta()
        if half.batch is None:
            last.assist(half.x_TH, dispatcher)
        else:
            rows.append((last.last(half.x_TH, delta_TH, half.batch, kv, dispatcher), len(half.batch.sample_slots)))
    sampled, scored = [x_RH[:count] for x_RH, count in rows], [x_RH[count:] for x_RH, count in rows]
    return torch.cat([*sampled, *scored]) if rows else decoder.no_rows


def _in_turn(
    layer: DecoderLayer, experts: ExpertLayer, first: _Half, second: _Half, kv: KVPool, travel: Travel
) -> None:
    """The second half attends while the first's rows travel; the first's experts compute while the second's do; and so
    on into the next layer, where the first attends while the second's results come back.

    A half's rows are sent when the other's computing is in the queue: the host waits for the counts of what comes back,
    and the device would have nothing to do meanwhile.
    """
    routed = first.route(layer, experts, kv)
    is_first_routed = travel.mark()
    later = second.route(layer, experts, kv)
    is_routed = travel.mark()
    dispatched = _dispatch(travel, is_first_routed, first, routed)
    rows, handle = dispatched.get()
    partial_RH = experts.apply(rows)
    is_computed = travel.mark()
    dispatched = _dispatch(travel, is_routed, second, later)
    first.delta = _combine(travel, is_computed, first, partial_RH, handle)
    rows, handle = dispatched.get()
    partial_RH = experts.apply(rows)
    second.delta = _combine(travel, travel.mark(), second, partial_RH, handle)


def _dispatch(
    travel: Travel, after: Callable[[], AbstractContextManager[object]], half: _Half, routed: RoutedRows
) -> Arriving[tuple[RoutedRows, Any]]:
    def exchange() -> tuple[RoutedRows, Any]:
        _keep(routed.x_RH, routed.slots_RK, routed.weights_RK)
        return half.dispatcher.dispatch(routed)

    return travel.start(after, exchange)


def _combine(
    travel: Travel,
    after: Callable[[], AbstractContextManager[object]],
    half: _Half,
    partial_RH: Tensor,
    handle: Any,
) -> Arriving[Tensor]:
    def exchange() -> Tensor:
        _keep(partial_RH)
        return half.dispatcher.combine(partial_RH, handle)

    return travel.start(after, exchange)


def _keep(*tensors: Tensor) -> None:
    """Their memory is not given to others before the stream of the exchange has read them."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _tensors(result: object) -> list[Tensor]:
    match result:
        case Tensor():
            return [result]
        case RoutedRows():
            return [result.x_RH, result.slots_RK, result.weights_RK]
        case tuple():
            return [tensor for part in result for tensor in _tensors(part)]
        case _:
            return []
