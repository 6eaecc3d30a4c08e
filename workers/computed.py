"""What one forward pass has for the Router, which may still be under way from the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from workers.logprobs import ComingLogprobs
from workers.slots import Ints
from workers.step import TokenLogprobs
from workers.transfers import Arrival


@dataclass(frozen=True, kw_only=True)
class Computed:
    """Nothing in it waits for the device before it is asked for."""

    sampled: Arrival
    """Tokens of the plan's slots, then of its guesses. Sent behind everything else, and where nobody is sampled: it
    tells when the device is done. A rank that answered sooner would be given one chunk of a long prompt after another,
    and whoever comes meanwhile would wait behind them all."""
    slots: Ints
    """Whose they are."""
    row_logprobs: list[ComingLogprobs] = field(default_factory=list)
    """Owned by rows of `sampled`."""
    target_logprobs: ComingLogprobs | None = None
    """Owned by the plan's prefills."""

    @property
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """As `StepResult` has them; waits until they are here."""
        return dict(chain.from_iterable(coming.each() for coming in self.row_logprobs))

    @property
    def prompt_logprobs(self) -> dict[int, list[TokenLogprobs]]:
        """As `StepResult` has them; waits until they are here."""
        by_prefill: dict[int, list[TokenLogprobs]] = {}
        if self.target_logprobs is not None:
            for prefill, scored in self.target_logprobs.each():
                by_prefill.setdefault(prefill, []).append(scored)
        return by_prefill
