"""Ranks of a lost group on their way into the next one: a device that does not come to rest keeps some from it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

from cluster.errors import EngineError
from cluster.router.gather import RankEnd
from cluster.router.launchers import RankHandle

log = logging.getLogger(__name__)

Launch = Callable[[], Awaitable[RankHandle]]


class Returning:
    """Those that have not been heard of in the new group. Whoever ends until then is started anew, and loads."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._ranks = set(ranks)
        self._is_stopping = False

    def heard(self, rank: int) -> None:
        """It has left its old group."""
        self._ranks.discard(rank)

    def stop(self) -> None:
        """Nobody is started anew from now on."""
        self._ranks.clear()
        self._is_stopping = True

    async def end_of(self, handle: RankHandle, launch: Launch, handles: dict[int, RankHandle]) -> RankEnd:
        """Of the rank, or of the one that takes its place, among `handles`, too."""
        end = await handle.wait()
        if handle.rank not in self._ranks:
            return end
        log.warning("rank %d could not leave its old group: it %s, and is started anew", handle.rank, end.how)
        self._ranks.discard(handle.rank)
        try:
            handle = await launch()
        except (EngineError, OSError) as error:
            return RankEnd(f"could not be started anew: {error}", was_killed=False)
        handles[handle.rank] = handle
        if self._is_stopping:  # while it was launched: those that are to end were told before
            handle.kill()
        return await handle.wait()
