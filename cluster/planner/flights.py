"""What became of each simulated request, and what the copies did meanwhile: numbers that figures are made of."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from cluster.planner.roofline import StepTime
from cluster.planner.workload import Arrival

_BUCKETS_PER_DECADE = 40


@dataclass(eq=False, slots=True)
class Flight:
    """One request under way, or at its end. Times are seconds of the virtual clock."""

    key: int
    arrival: Arrival
    first_token_s: float | None = None
    first_answer_s: float | None = None
    end_s: float | None = None
    """None: it has not ended (yet)."""
    was_refused: bool = False
    copy: str = ""
    num_moves: int = 0
    """To another copy, behind its output."""
    paused_s: float | None = None
    """Since when it stands still because ranks or a Router were lost; None: it does not."""
    pauses: tuple[tuple[float, float], ...] = ()
    """(since when, until when)."""

    def pause(self, now_s: float) -> None:
        """What it runs on was lost; nothing stands still that had not begun."""
        if self.first_token_s is not None and self.paused_s is None:
            self.paused_s = now_s

    def go_on(self, now_s: float) -> None:
        """Its next token has come."""
        if self.paused_s is not None:
            self.pauses = (*self.pauses, (self.paused_s, now_s))
            self.paused_s = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival.time_s

    @property
    def time_to_answer_s(self) -> float | None:
        return None if self.first_answer_s is None else self.first_answer_s - self.arrival.time_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token behind the first; None where there is no second one."""
        if self.end_s is None or self.first_token_s is None or self.arrival.output_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.arrival.output_tokens - 1)


@dataclass(slots=True)
class Gaps:
    """Times between two tokens of a stream, counted in buckets of 6 %."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, gap_s: float, count: int) -> None:
        if gap_s > 0 and count:
            self.counts[math.floor(math.log10(gap_s) * _BUCKETS_PER_DECADE)] += count

    def quantile_s(self, share: float) -> float | None:
        """The upper edge of the bucket that holds it; None without gaps."""
        left = share * sum(self.counts.values())
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return float(10 ** ((bucket + 1) / _BUCKETS_PER_DECADE))
        return None


@dataclass(slots=True)
class Work:
    """What a copy's ranks did."""

    busy_s: float = 0.0
    num_steps: int = 0
    num_decided_steps: int = 0
    """Of those, the ones that the scheduler planned by itself; the others were foreseen from them."""
    decode_tokens: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    """Of the sequences that went on after a loss, or came from another copy: their prompts and outputs."""
    kv_share_s: float = 0.0
    """Share of KV blocks in use, integrated over the busy time."""
    gaps: Gaps = field(default_factory=Gaps)
    parts: StepTime = field(default_factory=StepTime)
    """Where step times went."""

    def take(self, time: StepTime, total_s: float, num_steps: int, kv_share: float) -> None:
        """So many steps that lasted `total_s` together, about like `time` each."""
        self.busy_s += total_s
        self.num_steps += num_steps
        self.kv_share_s += kv_share * total_s
        self.parts = self.parts.plus(time, total_s / time.total_s if num_steps > 1 and total_s else 1.0)
