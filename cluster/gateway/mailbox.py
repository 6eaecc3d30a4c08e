"""What the Router has sent for one request and its stream has not taken yet: bounded, coalescing.

Between hops 4 and 11. One writer (the link's reader) and one reader (the request's handler), on one event loop. Tokens
that come while the reader is busy join one delivery, so a slow reader gets fewer, larger messages; past the bound the
request fails with SlowReader. Knows nothing of text or clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.errors import EngineError, InvalidRequest, MullError, NotReady, Overloaded, SlowReader
from mull.v1 import router_pb2 as pb

# Keeps a message with 20 logprobs a token below the 4 MiB that gRPC clients accept by default.
MAX_TOKENS_PER_DELIVERY = 1024


@dataclass(slots=True)
class Delivery:
    """What came since the last one."""

    cached_tokens: int | None
    """Present once: the request was admitted."""
    token_ids: list[int]
    logprobs: list[pb.RouterLogprobs]
    """One per token id, or empty."""
    finish: pb.End.Reason | None
    """STOP or LENGTH, in the last delivery; after STOP the last token id is the stop token."""
    forced: range = range(0)
    """Tokens of the output that were forced when the thinking budget was used up, counted from its first."""
    prompt_logprobs: list[pb.RouterLogprobs] = field(default_factory=list)
    """With the first delivery, where asked for."""


class Mailbox:
    """The unread updates of one request."""

    def __init__(self, key: int, max_unread_tokens: int, num_received: int = 0) -> None:
        """`num_received`: tokens of the output that came before, and not here."""
        self.key = key
        self.on_overflow: Callable[[MullError], object] | None = None
        """Called once when the bound is passed: the reader may be stuck in a write and must be woken."""
        self.num_unread_tokens_peak = 0
        self._max_unread_tokens = max_unread_tokens
        self._token_ids: list[int] = []
        self._logprobs: list[pb.RouterLogprobs] = []
        self._cached_tokens: int | None = None
        self._finish: pb.End.Reason | None = None
        self._error: MullError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._num_received = num_received
        self._forced = range(0)
        self._prompt_logprobs: list[pb.RouterLogprobs] = []

    @property
    def num_unread_tokens(self) -> int:
        """Tokens kept for the reader."""
        return len(self._token_ids)

    @property
    def error(self) -> MullError | None:
        """Why no more will come, where that is not a regular end."""
        return self._error

    @property
    def is_ended(self) -> bool:
        """Whether the Router is done with the request, or can no longer be told."""
        return self._finish is not None or self._error is not None

    def put(self, update: pb.SequenceUpdate) -> None:
        """Take an update from the Router."""
        if update.HasField("admitted"):
            self._cached_tokens = update.admitted.cached_tokens
        token_ids = update.token_ids
        self._token_ids.extend(token_ids)
        self._logprobs.extend(update.logprobs)
        self._num_received += len(token_ids)
        if update.num_forced:
            self._forced = range(self._num_received - update.num_forced, self._num_received)
        if update.prompt_logprobs:
            self._prompt_logprobs.extend(update.prompt_logprobs)
        if update.HasField("end"):
            self._on_end(update.end)
        num_unread = len(self._token_ids)
        if num_unread > self.num_unread_tokens_peak:
            self.num_unread_tokens_peak = num_unread
        if num_unread > self._max_unread_tokens:
            self._on_too_many(num_unread)
        self._wake()

    def fail(self, error: MullError) -> None:
        """No more will come; tokens that are here already are still delivered."""
        if not self.is_ended:
            self._error = error
            self._wake()

    @property
    def has_news(self) -> bool:
        """Whether `take` has something to give, or an error to raise."""
        return bool(self._token_ids) or self.is_ended or self._cached_tokens is not None

    def take(self) -> Delivery:
        """All that came since the last call, up to a bound. Raises the error that ended the request."""
        if self._error is not None and not self._token_ids:
            raise self._error
        cut = MAX_TOKENS_PER_DELIVERY
        is_all = len(self._token_ids) <= cut
        delivery = Delivery(
            self._cached_tokens,
            self._token_ids if is_all else self._token_ids[:cut],
            self._logprobs if is_all else self._logprobs[:cut],
            self._finish if is_all else None,
            self._forced,
            self._prompt_logprobs,
        )
        self._token_ids = [] if is_all else self._token_ids[cut:]
        self._logprobs = [] if is_all else self._logprobs[cut:]
        self._cached_tokens, self._prompt_logprobs = None, []
        return delivery

    def wake_with(self, waiter: asyncio.Future[None] | None) -> None:
        """Complete `waiter` when there is news."""
        self._waiter = waiter

    def _on_end(self, end: pb.End) -> None:
        if end.reason in (pb.End.REASON_STOP, pb.End.REASON_LENGTH):
            self._finish = end.reason
        else:
            self._error = _error_of(end)

    def _on_too_many(self, num_unread: int) -> None:
        self._error = SlowReader(
            f"{num_unread} tokens are unread, the limit is {self._max_unread_tokens}; read the stream faster"
        )
        # Nothing is delivered after it: the memory is what the bound is for.
        self._token_ids, self._logprobs, self._finish = [], [], None
        if self.on_overflow is not None:
            self.on_overflow(self._error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def wait_for_news(mailboxes: Sequence[Mailbox]) -> None:
    """Until one of them has news. One waiter per mailbox."""
    for mailbox in mailboxes:
        if mailbox.has_news:
            return
    waiter = asyncio.get_running_loop().create_future()
    for mailbox in mailboxes:
        mailbox.wake_with(waiter)
    try:
        await waiter
    finally:
        for mailbox in mailboxes:
            mailbox.wake_with(None)


def _error_of(end: pb.End) -> MullError:
    match end.reason:
        case pb.End.REASON_OVERLOADED:
            return Overloaded(end.message)
        case pb.End.REASON_UNAVAILABLE:
            return NotReady(end.message)
        case pb.End.REASON_CANCELLED:
            return NotReady("the Router cancelled the request; send it again")
        case pb.End.REASON_INVALID:
            return InvalidRequest(end.message, field="input")
        case _:
            return EngineError(end.message or "the Router failed without saying why")
