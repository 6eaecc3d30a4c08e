"""How a model is split over ranks: which heads, tiles, experts and vocabulary rows each rank holds.

Decided before any weight is read; the checkpoint reader and the layers ask here. Integers only; knows no tensors,
files or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from workers.errors import LayoutError
from workers.placement_map import EMPTY_SLOT, initial_placement, slots_per_rank

if TYPE_CHECKING:
    from workers.config import ModelConfig

MAX_SUGGESTED_RANKS = 64
NUM_SUGGESTED = 4


class Span(NamedTuple):
    """Half-open interval [start, stop) of rows, columns, heads or experts."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        """The same interval in units `factor` times smaller: heads to rows, tiles to columns."""
        return Span(self.start * factor, self.stop * factor)


def split_evenly(total: int, parts: int, index: int) -> Span:
    """Part `index` of [0, total) cut into `parts` consecutive parts whose sizes differ by at most one."""
    return Span(total * index // parts, total * (index + 1) // parts)


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The ranks of one copy: `dp` groups of `tp` neighbours, and experts over all of them.

    The `tp` ranks of a group split attention heads, dense tiles and the vocabulary; every group holds them all.
    Experts lie on world_size / expert_tp places, each of them `expert_tp` neighbours that share every expert's tiles.
    """

    tp: int = 1
    dp: int = 1
    expert_tp: int = 1

    def __str__(self) -> str:
        parts = {"tp": self.tp, "dp": self.dp, "expert_tp": self.expert_tp}
        return "·".join(f"{name}={size}" for name, size in parts.items() if name == "tp" or size != 1)

    @property
    def world_size(self) -> int:
        return self.tp * self.dp

    @property
    def ep(self) -> int:
        """Places that hold different experts."""
        return self.world_size // self.expert_tp

    def check(self, config: ModelConfig) -> None:
        """Raises LayoutError, with the numbers and layouts that work, where the model cannot be split so."""
        problem = self._problem(config)
        if problem is None:
            return
        nearest = ", ".join(str(layout) for layout in self.nearest(config))
        raise LayoutError(
            f"{self} cannot split this {config.architecture} model: {problem}; the nearest that work: {nearest}"
        )

    def nearest(self, config: ModelConfig) -> list[ParallelLayout]:
        """Layouts of up to 64 ranks that work, most like this one first: in ranks, then in dp, then in expert_tp."""
        return sorted(_working_layouts(config), key=self._distance)[:NUM_SUGGESTED]

    def works_for(self, config: ModelConfig) -> bool:
        return self._problem(config) is None

    def _distance(self, other: ParallelLayout) -> tuple[int, ...]:
        ranks = abs(other.world_size - self.world_size)
        return ranks, abs(other.dp - self.dp), abs(other.expert_tp - self.expert_tp)

    def _problem(self, config: ModelConfig) -> str | None:
        for name, size in (("tp", self.tp), ("dp", self.dp), ("expert_tp", self.expert_tp)):
            if size < 1:
                return f"{name} must be at least 1"
        return self._dense_problem(config) or self._expert_problem(config)

    def _dense_problem(self, config: ModelConfig) -> str | None:
        tp = self.tp
        if config.num_heads % tp:
            return f"{config.num_heads} attention heads are not divisible by {tp}"
        if config.num_kv_heads % tp and tp % config.num_kv_heads:
            return f"{config.num_kv_heads} KV heads and {tp} ranks do not divide each other"
        if config.has_dense_layers and config.num_ffn_tiles < tp:
            return f"{config.num_ffn_tiles} feed-forward tiles of {config.tile_size} are fewer than {tp} ranks"
        if config.vocab_size < tp:
            return f"a vocabulary of {config.vocab_size} is smaller than {tp} ranks"
        return None

    def _expert_problem(self, config: ModelConfig) -> str | None:
        if self.world_size % self.expert_tp:
            return f"{self.world_size} ranks are not divisible by expert_tp {self.expert_tp}"
        if not config.has_moe_layers:
            return "it has no experts for expert_tp to split" if self.expert_tp > 1 else None
        if config.num_experts < self.ep:
            places = f"{self.ep} ranks" if self.expert_tp == 1 else f"{self.ep} groups of {self.expert_tp} ranks"
            return f"{config.num_experts} experts are fewer than {places}"
        if config.num_expert_tiles < self.expert_tp:
            tiles, size = config.num_expert_tiles, config.expert_tile_size
            return f"an expert's {tiles} tiles of {size} are fewer than expert_tp {self.expert_tp}"
        return None


def _working_layouts(config: ModelConfig) -> list[ParallelLayout]:
    ranks = range(1, MAX_SUGGESTED_RANKS + 1)
    tps = [tp for tp in ranks if ParallelLayout(tp=tp)._dense_problem(config) is None]
    shapes = [(tp, dp) for tp in tps for dp in range(1, MAX_SUGGESTED_RANKS // tp + 1)]
    layouts = [ParallelLayout(tp=tp, dp=dp, expert_tp=size) for tp, dp in shapes for size in ranks[: tp * dp]]
    return [layout for layout in layouts if layout._expert_problem(config) is None]


@dataclass(frozen=True)
class ShardSpec:
    """One rank's part of every split dimension. The layout must have passed `ParallelLayout.check`."""

    layout: ParallelLayout
    rank: int
    redundant_experts: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.layout.world_size:
            raise LayoutError(f"rank {self.rank} is outside a layout of {self.layout.world_size} ranks")

    @property
    def tp_rank(self) -> int:
        return self.rank % self.layout.tp

    @property
    def dp_rank(self) -> int:
        """The attention group."""
        return self.rank // self.layout.tp

    @property
    def ep_rank(self) -> int:
        return self.rank // self.layout.expert_tp

    @property
    def expert_tp_rank(self) -> int:
        return self.rank % self.layout.expert_tp

    def heads(self, config: ModelConfig) -> Span:
        """Query heads; the same number on every rank."""
        return split_evenly(config.num_heads, self.layout.tp, self.tp_rank)

    def kv_heads(self, config: ModelConfig) -> Span:
        """KV heads; where tp exceeds their number, neighbouring ranks hold the same one."""
        if self.layout.tp <= config.num_kv_heads:
            return split_evenly(config.num_kv_heads, self.layout.tp, self.tp_rank)
        head = self.tp_rank * config.num_kv_heads // self.layout.tp
        return Span(head, head + 1)

    def ffn(self, config: ModelConfig) -> Span:
        """Columns of a dense feed-forward layer, in whole tiles: uneven where tiles do not divide."""
        tiles = split_evenly(config.num_ffn_tiles, self.layout.tp, self.tp_rank).scaled(config.tile_size)
        return Span(tiles.start, min(tiles.stop, config.intermediate_size))

    def expert_slots(self, config: ModelConfig) -> Span:
        """Physical slots of this rank in each layer; see `workers.placement_map`."""
        size = slots_per_rank(config.num_experts, self.redundant_experts, self.layout.ep)
        return Span(self.ep_rank, self.ep_rank + 1).scaled(size)

    def experts(self, config: ModelConfig) -> list[int]:
        """Logical experts that this rank loads, in the order of its slots."""
        placement = initial_placement(config.num_experts, self.redundant_experts, self.layout.ep)
        slots = self.expert_slots(config)
        return [expert for expert in placement[slots.start : slots.stop] if expert != EMPTY_SLOT]

    def expert_ffn(self, config: ModelConfig) -> Span:
        """Columns of each of its experts, in whole tiles."""
        tiles = split_evenly(config.num_expert_tiles, self.layout.expert_tp, self.expert_tp_rank)
        columns = tiles.scaled(config.expert_tile_size)
        return Span(columns.start, min(columns.stop, config.moe_intermediate_size))

    def vocab(self, config: ModelConfig) -> Span:
        """Rows of the embedding and of the head."""
        return split_evenly(config.vocab_size, self.layout.tp, self.tp_rank)
