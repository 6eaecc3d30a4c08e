"""Bringing tokens to the ranks that hold their experts, and the results back.

Hop 8: gate -> dispatch -> this rank's experts -> combine. `dispatch` returns the rows that this rank computes and a
handle; `combine` takes their partial sums and the handle, and returns for this rank's tokens the sum over all their
experts. Partial sums of ranks are added in rank order by all three, so that without FP8 rows they agree in every bit.
T tokens of this rank, R rows that it computes, H hidden, K slots per token, W ranks, C capacity: rows of the fullest
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.experts.rows import RoutedRows, RowPacker
from workers.kernels.ordered_sum import sum_in_order
from workers.launched import BeforeWait, owe_nothing
from workers.layout import split_evenly
from workers.rank_group import RankGroup

Handle = TypeVar("Handle")


class Dispatcher(Protocol[Handle]):
    """All ranks of a copy call `dispatch`, then `combine`, for each MoE layer, with rows or without."""

    def dispatch(self, tokens: RoutedRows) -> tuple[RoutedRows, Handle]:
        """The rows that have experts here; slots of other ranks, and beyond all ranks, may be among theirs."""

    def combine(self, partial_RH: Tensor, handle: Handle) -> Tensor:
        """[T, H]: sums over all ranks of what they computed for this rank's tokens."""


class LocalDispatcher:
    """Where every rank has all tokens: nothing travels but the sums. Moves (W-1) x T x H, two times at most."""

    def __init__(self, world: RankGroup) -> None:
        self.world = world

    def dispatch(self, tokens: RoutedRows) -> tuple[RoutedRows, None]:
        return tokens, None

    def combine(self, partial_RH: Tensor, handle: None) -> Tensor:  # noqa: ARG002 - there is nothing to know
        return self.world.all_reduce(partial_RH)


class WithoutPadding(Generic[Handle]):
    """Rows that are there for a fixed shape alone choose the slot after the last one, which is on no rank."""

    def __init__(self, inner: Dispatcher[Handle], is_padding_T1: Tensor, num_slots: int) -> None:
        self.inner, self.is_padding_T1, self.num_slots = inner, is_padding_T1, num_slots

    def dispatch(self, tokens: RoutedRows) -> tuple[RoutedRows, Handle]:
        slots_RK = tokens.slots_RK.masked_fill(self.is_padding_T1, self.num_slots)
        return self.inner.dispatch(RoutedRows(tokens.x_RH, slots_RK, tokens.weights_RK))

    def combine(self, partial_RH: Tensor, handle: Handle) -> Tensor:
        return self.inner.combine(partial_RH, handle)


class GatherScatterDispatcher:
    """Every token to every rank, padded to the same number of rows: fixed shapes, and nothing depends on the gate."""

    def __init__(self, world: RankGroup, packer: RowPacker, num_slots: int, capacity: int) -> None:
        """`num_slots`: of all ranks. `capacity`: rows of the fullest rank; the same on every rank."""
        self.world, self.packer, self.num_slots, self.capacity = world, packer, num_slots, capacity

    def dispatch(self, tokens: RoutedRows) -> tuple[RoutedRows, int]:
        num_tokens = len(tokens.x_RH)
        missing = (0, 0, 0, self.capacity - num_tokens)
        # Padding chooses the slot after the last one, which is on no rank.
        slots_CK = F.pad(tokens.slots_RK, missing, value=self.num_slots)
        padded = RoutedRows(F.pad(tokens.x_RH, missing), slots_CK, F.pad(tokens.weights_RK, missing))
        gathered = self.world.all_gather(self.packer.pack(padded)).flatten(0, 1)
        return self.packer.unpack(gathered), num_tokens

    def combine(self, partial_RH: Tensor, handle: int) -> Tensor:
        counts = [self.capacity] * self.world.size
        returned = self.world.all_to_all(partial_RH, counts, counts)
        return sum_in_order(returned.view(self.world.size, self.capacity, partial_RH.shape[1]))[:handle]


@dataclass(frozen=True)
class Journey:
    """Which of this rank's tokens went where, and how many rows came from each rank."""

    num_tokens: int
    token_S: Tensor
    """The token of each row sent: in rank order, and in order of tokens for each rank."""
    send_counts: list[int]
    receive_counts: list[int]


class AllToAllDispatcher:
    """Each token once to each rank that has experts of it, with uneven counts: they cost a look at the device."""

    def __init__(
        self,
        world: RankGroup,
        packer: RowPacker,
        slots_per_rank: int,
        expert_tp: int,
        before_wait: BeforeWait = owe_nothing,
    ) -> None:
        self.world, self.packer = world, packer
        self.slots_per_rank, self.expert_tp = slots_per_rank, expert_tp
        self.before_wait = before_wait

    def dispatch(self, tokens: RoutedRows) -> tuple[RoutedRows, Journey]:
        goes_WT = self._goes(tokens.slots_RK)
        packed_TP = self.packer.pack(tokens)  # before the look: the device has something to do meanwhile
        send_counts, receive_counts = self._counts(goes_WT)
        token_S = goes_WT.nonzero_static(size=sum(send_counts))[:, 1]  # `nonzero` would look, too
        journey = Journey(len(tokens.x_RH), token_S, send_counts, receive_counts)
        received = self.world.all_to_all(packed_TP.index_select(0, token_S), send_counts, receive_counts)
        return self.packer.unpack(received), journey

    def combine(self, partial_RH: Tensor, handle: Journey) -> Tensor:
        returned_SH = self.world.all_to_all(partial_RH, handle.receive_counts, handle.send_counts)
        out_TH = partial_RH.new_zeros(handle.num_tokens, partial_RH.shape[1])
        tokens, rows = (torch.split(x, handle.send_counts) for x in (handle.token_S, returned_SH))
        for token_S, rows_SH in zip(tokens, rows, strict=True):  # rank by rank: within one, no token comes twice
            out_TH.index_add_(0, token_S, rows_SH)
        return out_TH

    def _counts(self, goes_WT: Tensor) -> tuple[list[int], list[int]]:
        """Rows to each rank, and from each: the one look at the device."""
        send_W, ones = goes_WT.sum(dim=1), [1] * self.world.size
        counts_2W = torch.stack([send_W, self.world.all_to_all(send_W, ones, ones)])
        self.before_wait()
        send_counts, receive_counts = counts_2W.tolist()
        return send_counts, receive_counts

    def _goes(self, slots_TK: Tensor) -> Tensor:
        """[W, T]: whether a rank has experts of a token; the ranks that share an expert all get it."""
        num_places = self.world.size // self.expert_tp
        place_TK = slots_TK.div(self.slots_per_rank, rounding_mode="floor")
        goes = torch.zeros(len(slots_TK), num_places, dtype=torch.bool, device=slots_TK.device)
        goes.scatter_(1, place_TK, True)
        return goes.repeat_interleave(self.expert_tp, dim=1).t().contiguous()


@dataclass(frozen=True)
class Share(Generic[Handle]):
    """The handle of a rank's share, and how many tokens the whole group has."""

    handle: Handle
    num_tokens: int


class SharedDispatcher(Generic[Handle]):
    """Where the ranks of an attention group hold the same tokens: each dispatches its share of them.

    The results are gathered over the group. Shares follow one another in rank order, so that rows arrive at an expert
    in the order of the tokens, whatever tp is.
    """

    def __init__(self, inner: Dispatcher[Handle], tp: RankGroup) -> None:
        self.inner, self.tp = inner, tp

    def dispatch(self, tokens: RoutedRows) -> tuple[RoutedRows, Share[Handle]]:
        num_tokens = len(tokens.x_RH)
        share = slice(*split_evenly(num_tokens, self.tp.size, self.tp.index))
        cut = RoutedRows(tokens.x_RH[share], tokens.slots_RK[share], tokens.weights_RK[share])
        rows, handle = self.inner.dispatch(cut)
        return rows, Share(handle, num_tokens)

    def combine(self, partial_RH: Tensor, handle: Share[Handle]) -> Tensor:
        mine_SH = self.inner.combine(partial_RH, handle.handle)
        if not handle.num_tokens:
            return mine_SH
        capacity = -(-handle.num_tokens // self.tp.size)
        gathered = self.tp.all_gather(F.pad(mine_SH, (0, 0, 0, capacity - len(mine_SH))))
        sizes = [split_evenly(handle.num_tokens, self.tp.size, index).size for index in range(self.tp.size)]
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])
