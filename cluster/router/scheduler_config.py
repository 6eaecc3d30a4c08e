"""What a scheduler is told before it begins.

Hop 5. Plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import ConfigError
from cluster.router.speculation import Speculation


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Bounds of one attention group's steps, and of its copy's queue."""

    max_model_len: int
    """Longest prompt plus output, in tokens."""
    max_num_seqs: int
    """Slots."""
    max_num_batched_tokens: int
    """The token budget of one step; at least `max_num_seqs`, so that all can decode in one step."""
    max_waiting: int = 256
    """Requests beyond all slots that may be unfinished."""
    max_in_flight: int = 2
    """Plans whose results are not back."""
    speculation: Speculation = field(default_factory=Speculation)
    max_prefill_slowdown: float | None = None
    """How many times longer prompts may make a step for those who decode; None: as much as its budget."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs {self.max_num_seqs}; "
                "raise the one or lower the other"
            )
