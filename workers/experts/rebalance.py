"""Where experts lie, changed between steps: the weights that change move, layer by layer, and routing follows.

All ranks get the same update between the same plans, so they agree on every move without a word. Memory beside the
weights: what one layer's moves bring and take, at most two experts' for each of this rank's slots.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from workers.config import ShardSpec
from workers.errors import PlanError
from workers.experts.layer import ExpertLayer
from workers.kernels.linear import parts_of
from workers.layout import Span
from workers.placement_map import Move, moves_between, placement_problem
from workers.rank_group import RankGroup
from workers.step import PlacementUpdate


class PlacedExperts:
    """The expert layers of this rank and the version of their placement."""

    def __init__(self, layers: list[ExpertLayer], spec: ShardSpec, world: RankGroup) -> None:
        self.layers, self.spec, self.world = layers, spec, world
        self.version = 0
        self.have_moved = False
        """The weights are not those that loading gives."""

    def take_loads(self) -> Tensor:
        """For each layer, tokens of this rank's slots since the last call; still on the device."""
        counts = [layer.loads.counts_e for layer in self.layers]
        if not counts:
            return torch.zeros(0, 0, dtype=torch.int64)
        taken = torch.stack(counts)
        for counts_e in counts:
            counts_e.zero_()
        return taken

    def apply(self, update: PlacementUpdate) -> None:
        """Raises PlanError before anything moves."""
        self._check(update)
        self.have_moved = True
        for layer, placement in zip(self.layers, update.layers, strict=True):
            moves = moves_between(layer.placement, placement, layer.local_slots.size)
            if moves:
                exchange = WeightMoves(moves, layer.local_slots, self.spec, self.world)
                for stack in (*parts_of(layer.gate_up_eXH), *parts_of(layer.down_eHF)):
                    exchange.move(stack)
            layer.place(placement)
        self.version = update.version

    def _check(self, update: PlacementUpdate) -> None:
        if update.version <= self.version:
            raise PlanError(f"placement {update.version} comes after placement {self.version}; send newer ones only")
        if len(update.layers) != len(self.layers):
            raise PlanError(f"placement {update.version} has {len(update.layers)} layers, not {len(self.layers)}")
        for index, (layer, placement) in enumerate(zip(self.layers, update.layers, strict=True)):
            num_slots = self.spec.layout.ep * layer.local_slots.size
            problem = placement_problem(placement, layer.num_experts, num_slots)
            if problem is not None:
                raise PlanError(f"placement {update.version}, MoE layer {index}: {problem}")
        if any(layer.is_alone for layer in self.layers):
            raise PlanError(f"placement {update.version} came to a copy that has all experts at one place")


class WeightMoves:
    """One layer's moves as this rank sees them; ranks with the same part of every expert talk to each other."""

    def __init__(self, moves: list[Move], local: Span, spec: ShardSpec, world: RankGroup) -> None:
        self.world = world
        outgoing: list[list[int]] = [[] for _ in range(world.size)]
        incoming: list[list[int]] = [[] for _ in range(world.size)]
        for move in moves:
            source_rank, target_rank = (_rank_of(slot, local.size, spec) for slot in move)
            if source_rank == spec.rank:
                outgoing[target_rank].append(move.source - local.start)
            if target_rank == spec.rank:
                incoming[source_rank].append(move.target - local.start)
        self.send_counts, self.receive_counts = [len(s) for s in outgoing], [len(s) for s in incoming]
        self.sources, self.targets = list(chain(*outgoing)), list(chain(*incoming))

    def move(self, stack: Tensor) -> None:
        """Send and receive in place; what is sent is copied first, as its slot may get another expert."""
        shape, dtype = stack.shape[1:], stack.dtype
        sent = torch.empty(len(self.sources), *shape, dtype=dtype, device=stack.device)
        for row, slot in zip(sent, self.sources, strict=True):  # not by index: FP8 tensors cannot be indexed
            row.copy_(stack[slot])
        as_bytes = sent.flatten(1).view(torch.uint8)
        received = self.world.all_to_all(as_bytes, self.send_counts, self.receive_counts)
        for row_bytes, slot in zip(received, self.targets, strict=True):
            stack[slot].copy_(row_bytes.view(dtype).view(shape))


def _rank_of(slot: int, slots_per_rank: int, spec: ShardSpec) -> int:
    return slot // slots_per_rank * spec.layout.expert_tp + spec.expert_tp_rank
