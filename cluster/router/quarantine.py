"""Finds the request that brings down the ranks that compute it, so that the others can go on.

A part of the schedulers, pure. After a loss that a plan may have caused, everyone it computed is a suspect. Suspects
are computed one at a time, beside those who are none, until each has come some tokens further. A suspect that is under
way at another loss has done it again: it is given up. A loss from outside (a killed process) makes nobody a suspect,
unless it came so soon after the ranks had started that they may have been killed for what they computed.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.router.sequence import Sequence

TOKENS_TO_CLEAR = 8
"""Output behind a loss that shows a suspect's innocence."""
MAX_STRIKES = 2


class Quarantine:
    """Who is a suspect, and which one of them is being computed; one for all attention groups of a copy."""

    def __init__(self) -> None:
        self._running: Sequence | None = None

    def blame(self, computed: Iterable[Sequence], *, is_suspicious: bool) -> list[Sequence]:
        """The ranks were lost while they computed these. Returns those who are to be given up."""
        self._running = None
        everyone = list(computed)
        suspects = [seq for seq in everyone if is_suspect(seq)] or (everyone if is_suspicious else [])
        for seq in suspects:
            seq.num_strikes += 1
            seq.num_known_at_loss = seq.num_known
        return [seq for seq in suspects if seq.num_strikes >= MAX_STRIKES]

    def may_run(self, seq: Sequence) -> bool:
        """False: a suspect while another one is under way."""
        running = self._running
        if running is not None and (running.slot is None or not is_suspect(running)):
            running = self._running = None
        return running is None or running is seq or not is_suspect(seq)

    def runs(self, seq: Sequence) -> None:
        """It gets a slot."""
        if is_suspect(seq):
            self._running = seq


def is_suspect(seq: Sequence) -> bool:
    """It may have caused a loss, and has not shown yet that it did not; who has shown it starts afresh."""
    if seq.num_strikes and seq.num_known >= seq.num_known_at_loss + TOKENS_TO_CLEAR:
        seq.num_strikes = 0
    return seq.num_strikes > 0
