"""The thinking budgets of requests that are under way, so that an operator can lower them.

Knows nothing of events or of who asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.gateway.copies import Copies
from cluster.gateway.mailbox import Mailbox
from cluster.gateway.requests import PreparedRequest


@dataclass(eq=False)
class _Running:
    request_id: str
    tenant: str
    budget: int | None
    """None: no limit."""
    mailboxes: Sequence[Mailbox]


class RunningBudgets:
    """Which requests run, and how long each may think."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._running: set[_Running] = set()

    @contextmanager
    def running(self, request: PreparedRequest, mailboxes: Sequence[Mailbox]) -> Iterator[None]:
        """Inside, the request's budget can be lowered."""
        entry = _Running(request.request_id, request.tenant, request.thinking_budget, mailboxes)
        self._running.add(entry)
        try:
            yield
        finally:
            self._running.discard(entry)

    def lower(self, budget: int, *, request_id: str | None = None, tenant: str | None = None) -> int:
        """Let requests of that id, of that tenant, or all, think for so many tokens at most. Returns how many had more.

        Raises Overloaded.
        """
        lowered = 0
        for entry in self._running:
            is_meant = request_id in (None, entry.request_id) and tenant in (None, entry.tenant)
            if is_meant and (entry.budget is None or entry.budget > budget):
                entry.budget = budget
                lowered += 1
                for mailbox in entry.mailboxes:
                    self._copies.set_budget(mailbox, budget)
        return lowered
