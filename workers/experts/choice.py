"""Which dispatcher a step takes: the one place that decides."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from workers.buckets import MAX_GATHERED_ROWS, Buckets
from workers.config import ModelConfig, ShardSpec
from workers.experts.dispatch import (
    AllToAllDispatcher,
    Dispatcher,
    GatherScatterDispatcher,
    LocalDispatcher,
    SharedDispatcher,
    WithoutPadding,
)
from workers.experts.rows import ExactRows, Fp8Rows, RowPacker
from workers.launched import BeforeWait, owe_nothing
from workers.parallel import ParallelState

RowFormat = Literal["exact", "fp8"]


class DispatcherChoice:
    """Chooses by layout and size, from what every rank of the copy knows, so that all choose alike.

    dp = 1: every rank has all tokens: Local. Only sums travel: 2 (W-1)/W x T x H elements a rank, as in a ring.

    Else by C, the rows of the fullest rank. Phases are not agreed on between groups, and C tells them apart: a decode
    has at most a row per slot, and C is known from the plan. Bytes that a rank sends with K chosen experts, ep places
    of expert_tp ranks, P bytes a row there and Q bytes back:

    - GatherScatter (W-1) x C x (P+Q), in two collectives of fixed shape, without a look at the device: best where
      latency is all, in decode, and it can be captured in a graph.
    - AllToAll    D x T x (P+Q), D = (W-1)/W x expert_tp x ep x (1 - (1 - 1/ep)**K) for even routing, in three
      collectives and one look at the device for the counts: best where bytes are, in prefill, and where one group
      has many more tokens than the others, as nothing is padded.

    For 235B (K 8, hidden 4096; bf16 rows: P 8256, Q 8192) D is 4.6 of 7 at ep 8, 6.1 of 15 at ep 16, 7.0 of 31 at
    ep 32: gathering costs 1.5, 2.5 and 4.4 times the bytes. At 64 rows and ep 8 that is 7.4 MB against 4.8, which a
    node's links move in less time than the counts take to come back.
    """

    def __init__(
        self,
        config: ModelConfig,
        spec: ShardSpec,
        parallel: ParallelState,
        dtype: torch.dtype,
        rows: RowFormat,
        buckets: Buckets | None = None,
        before_wait: BeforeWait = owe_nothing,
    ) -> None:
        """`buckets`: of decode steps that are padded; a group in another kind of step meets them at their size."""
        self.parallel, self.buckets, self.before_wait = parallel, buckets, before_wait
        self.expert_tp, self.ep = spec.layout.expert_tp, spec.layout.ep
        self.slots_per_rank = spec.expert_slots(config).size
        format_of = ExactRows if rows == "exact" else Fp8Rows
        self.packer = RowPacker(format_of(config.hidden_size, dtype), config.num_experts_per_token)

    def for_step(self, group_tokens: list[int]) -> Dispatcher[Any]:
        """`group_tokens`: of every attention group in this step."""
        if self.parallel.layout.dp == 1:
            return LocalDispatcher(self.parallel.world)
        most = max(group_tokens)
        if self.buckets is not None:
            most = self.buckets.rows_for(most) or most
        capacity = -(-most // self.parallel.tp.size)
        return self.over_tp(self.gather_scatter(capacity) if capacity <= MAX_GATHERED_ROWS else self.all_to_all())

    def without(self, is_padding_T1: Tensor, inner: Dispatcher[Any]) -> Dispatcher[Any]:
        """The same, which leaves rows out that stand for no token."""
        return WithoutPadding(inner, is_padding_T1, self.ep * self.slots_per_rank)

    def over_tp(self, inner: Dispatcher[Any]) -> Dispatcher[Any]:
        """Each tp rank of a group takes its share."""
        return inner if self.parallel.tp.size == 1 else SharedDispatcher(inner, self.parallel.tp)

    def gather_scatter(self, capacity: int) -> GatherScatterDispatcher:
        num_slots = self.ep * self.slots_per_rank
        return GatherScatterDispatcher(self.parallel.world, self.packer, num_slots, capacity)

    def all_to_all(self) -> AllToAllDispatcher:
        return AllToAllDispatcher(
            self.parallel.world, self.packer, self.slots_per_rank, self.expert_tp, self.before_wait
        )
