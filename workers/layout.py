"""How a model is split over ranks: which heads, tiles, experts and vocabulary rows each rank holds.

Decided before any weight is read; the checkpoint reader and the layers ask here. Integers only; knows no tensors,
files or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from workers.errors import LayoutError

if TYPE_CHECKING:
    from workers.config import ModelConfig

MAX_SUGGESTED_TP = 64


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
    """The ranks of one copy. `tp` ranks split attention heads, dense tiles and the vocabulary; `dp` such groups have
    their own sequences and KV; experts are spread over all ranks, each split over `expert_tp` of them."""

    tp: int = 1
    dp: int = 1
    expert_tp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.dp

    @property
    def ep(self) -> int:
        """Parts that the experts are spread over."""
        return self.world_size // self.expert_tp

    def check(self, config: ModelConfig) -> None:
        """Raises LayoutError, with both numbers and the tp sizes that work, where the model cannot be split so."""
        problem = self._problem(config)
        if problem is None:
            return
        valid = ", ".join(str(tp) for tp in self.valid_tps(config))
        raise LayoutError(f"tp={self.tp} cannot split this {config.architecture} model: {problem}; use tp of {valid}")

    @staticmethod
    def valid_tps(config: ModelConfig) -> list[int]:
        """Every tp up to 64 that can split the model."""
        sizes = range(1, min(config.num_heads, MAX_SUGGESTED_TP) + 1)
        return [tp for tp in sizes if ParallelLayout(tp=tp)._problem(config) is None]

    def _problem(self, config: ModelConfig) -> str | None:
        tp = self.tp
        if tp < 1:
            return "tp must be at least 1"
        if config.num_heads % tp:
            return f"{config.num_heads} attention heads are not divisible by {tp}"
        if config.num_kv_heads % tp and tp % config.num_kv_heads:
            return f"{config.num_kv_heads} KV heads and {tp} ranks do not divide each other"
        if config.has_dense_layers and config.num_ffn_tiles < tp:
            return f"{config.num_ffn_tiles} feed-forward tiles of {config.tile_size} are fewer than {tp} ranks"
        if config.has_moe_layers and config.num_experts < tp:
            return f"{config.num_experts} experts are fewer than {tp} ranks"
        if config.vocab_size < tp:
            return f"a vocabulary of {config.vocab_size} is smaller than {tp} ranks"
        return None


@dataclass(frozen=True)
class ShardSpec:
    """One rank's part of every split dimension. The layout must have passed `ParallelLayout.check`."""

    layout: ParallelLayout
    rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.layout.world_size:
            raise LayoutError(f"rank {self.rank} is outside a layout of {self.layout.world_size} ranks")

    @property
    def tp_rank(self) -> int:
        return self.rank % self.layout.tp

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

    def experts(self, config: ModelConfig) -> Span:
        """Whole experts: uneven where they do not divide."""
        return split_evenly(config.num_experts, self.layout.world_size, self.rank)

    def vocab(self, config: ModelConfig) -> Span:
        """Rows of the embedding and of the head."""
        return split_evenly(config.vocab_size, self.layout.tp, self.tp_rank)
