"""One gateway's session: the keys that live in it, and what the gateway has not read yet.

Hop 4, the Router's side, without the calls of gRPC. Knows nothing of steps or ranks.

Bound: updates that the gateway has not read are merged per request, and never weigh more than MAX_UNREAD items (a
token, a logprob, or the update itself: at most 12 bytes each on the wire). Past it the session breaks, which cancels
its requests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from cluster.errors import SlowReader
from cluster.router.sequence import SequenceUpdate
from cluster.router.wire import merge_update, update_weight
from mull.v1 import router_pb2 as pb

MAX_UNREAD = 2**20
"""12 MiB per gateway: with 64 sequences and 50 steps a second, five minutes of silence."""
MAX_MESSAGE = 2**16
"""Items at which a message is closed: it stays well below gRPC's default limit of 4 MiB."""


@dataclass(slots=True, eq=False)
class _Entry:
    update: pb.SequenceUpdate
    weight: int


class Session:
    """The mailbox of one gateway. One reader; the step loop writes and never waits for it."""

    def __init__(self, session_id: int, *, max_unread: int = MAX_UNREAD, max_message: int = MAX_MESSAGE) -> None:
        self.id = session_id
        self.live: set[int] = set()
        """Keys of requests that have not ended."""
        self.num_unread = 0
        """Items that wait for the gateway."""
        self._max_unread = max_unread
        self._max_message = max_message
        self._unread: deque[_Entry] = deque()
        self._newest: dict[int, _Entry] = {}
        """The unread entry of each key which later updates of the key may still join."""
        self._arrived = asyncio.Event()
        self._broken = asyncio.Event()

    def push(self, key: int, update: SequenceUpdate) -> None:
        """What a step has for one request."""
        if entry := self._entry(key, update_weight(update)):
            merge_update(entry.update, update)
        if update.finish is not None:
            self._forget(key)
        elif update.num_forced:
            self._newest.pop(key, None)  # forced tokens are the last ones of their message

    def end(self, key: int, reason: pb.End.Reason, message: str) -> None:
        """End a request that cannot run, or cannot run on."""
        if entry := self._entry(key, 1):
            entry.update.end.reason = reason
            entry.update.end.message = message
        self._forget(key)

    async def next(self) -> pb.RouterMessage:
        """What waits, up to the bound of a message; waits while there is nothing. A cancelled call loses nothing."""
        while not self._unread:
            self._arrived.clear()
            await self._arrived.wait()
        taken: list[_Entry] = []
        weight = 0
        while self._unread and weight < self._max_message:
            entry = self._unread.popleft()
            if self._newest.get(entry.update.key) is entry:
                del self._newest[entry.update.key]
            taken.append(entry)
            weight += entry.weight
        self.num_unread -= weight
        return pb.RouterMessage(updates=[entry.update for entry in taken])

    async def wait_broken(self) -> SlowReader:
        """Until the gateway has left too much unread. The writer is stuck then, so someone else must wait here."""
        await self._broken.wait()
        return SlowReader(f"the gateway left more than {self._max_unread} items unread; it must read its session")

    def _forget(self, key: int) -> None:
        """The gateway may use the key again: nothing may join the update that ended it."""
        self.live.discard(key)
        self._newest.pop(key, None)

    def _entry(self, key: int, weight: int) -> _Entry | None:
        """Where an update of `key` goes; None once the session is broken: nothing is kept then."""
        if self._broken.is_set():
            return None
        if self.num_unread + weight > self._max_unread:
            self._broken.set()
            return None
        entry = self._newest.get(key)
        if entry is None or entry.weight + weight > self._max_message:
            entry = self._newest[key] = _Entry(pb.SequenceUpdate(key=key), 0)
            self._unread.append(entry)
        entry.weight += weight
        self.num_unread += weight
        self._arrived.set()
        return entry
