"""A Router's process in virtual time: the product's sessions, engine core and scheduler over simulated ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from cluster.errors import RankLost
from cluster.gateway.affinity import CopyLoad
from cluster.gateway.recovery import CopyState
from cluster.router.router import Router
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.session import Session
from cluster.router.supervision import EngineState, RestartPolicy
from cluster.router.wire import ModelInfo
from mull.v1 import router_pb2 as pb
from tests.simulation.network import End
from tests.simulation.ranks import CopyShape, SimRanks
from tests.simulation.streams import BrokenPromise
from tests.simulation.world import World
from workers.step import StepResult

LONGEST_COALESCING_S = 0.003
LAST_WRITE_S = 0.005
RESTARTS = RestartPolicy(max_restarts=3, first_backoff_s=0.010)


def _no_group(*_: object) -> NoReturn:
    raise AssertionError("the simulation steps the engine's core itself")


class SimRouter:
    """One process: from its start until it is killed, or gives up."""

    def __init__(
        self,
        world: World,
        name: str,
        shape: CopyShape,
        config: SchedulerConfig,
        model: ModelInfo,
        *,
        enable_prefix_cache: bool,
        on_end: Callable[[SimRouter], object],
    ) -> None:
        self.name = name
        self.is_alive = True
        self.num_suspicious_losses = 0
        """After which a request may be given up."""
        self._world, self._shape, self._on_end = world, shape, on_end
        # Its engine is never started: what its task does in the product, the methods below do.
        self._router = Router(model, config, _no_group, enable_prefix_cache=enable_prefix_cache, restarts=RESTARTS)
        self._engine = self._router._engine
        self._core = self._engine.core
        self._ends: dict[int, tuple[Session, End]] = {}
        self._flush_is_due = False
        self._ranks: SimRanks | None = None
        self._start_ranks()

    @property
    def is_idle(self) -> bool:
        """No sequence is live, and no plan is under way."""
        stats = self._core.stats
        return stats is None or (stats.num_running + stats.num_waiting == 0 and self._core.num_in_flight == 0)

    @property
    def num_leaked_blocks(self) -> int:
        """Blocks in use though nothing runs."""
        stats = self._core.stats
        return 0 if stats is None else stats.num_blocks - stats.num_free_blocks

    @property
    def counts(self) -> Counter[str]:
        """What it went through."""
        core, stats = self._core, self._core.stats
        found = {"restarts of ranks": core.num_restarts_total, "tokens replayed": core.num_replayed_tokens_total}
        if stats is not None:
            found |= {
                "preemptions": stats.num_preempted_total,
                "tokens cached": stats.prefix_hit_tokens_total,
                "drafts accepted": stats.accepted_tokens_total,
                "drafts refused": stats.draft_tokens_total - stats.accepted_tokens_total,
            }
        return Counter(found)

    def describe(self) -> CopyState:
        """What a gateway that asks is told."""
        stats = self._core.stats
        load = CopyLoad() if stats is None else CopyLoad(num_running=stats.num_running, num_waiting=stats.num_waiting)
        return CopyState(ready=self._core.state is EngineState.READY and not self._router._draining, load=load)

    def accept(self, end: End) -> None:
        """A gateway opens its session."""
        session = self._router.open_session()
        self._ends[session.id] = session, end
        end.on_message = lambda message: self._take(session, message)
        end.on_broken = lambda: self._close(session)

    def kill(self) -> None:
        """SIGKILL."""
        if self.is_alive:
            self.is_alive = False
            self._world.tell("%s dies", self.name)
            if self._ranks is not None:
                self._ranks.abandon()
            for _, end in self._ends.values():
                end.close()
            self._on_end(self)

    def drain(self, grace_s: float) -> None:
        """SIGTERM: nothing new; after a time what still runs is given back, and the process ends."""
        if self.is_alive and not self._router._draining:
            self._world.tell("%s drains", self.name)
            self._router._draining = True
            self._world.after(grace_s, self._leave)

    def kill_rank(self) -> None:
        if self.is_alive and self._ranks is not None:
            self._world.tell("%s: a rank dies", self.name)
            self._ranks.kill_one()

    def hang_rank(self) -> None:
        if self.is_alive and self._ranks is not None:
            self._world.tell("%s: a rank hangs", self.name)
            self._ranks.hang_one()

    # What the engine's task does in the product

    def _start_ranks(self) -> None:
        if self.is_alive:
            self._ranks = SimRanks(
                self._world,
                self.name,
                self._shape,
                on_ready=self._on_ready,
                on_results=self._on_results,
                on_lost=self._on_lost,
            )

    def _on_ready(self) -> None:
        self._world.tell("%s: ranks are ready", self.name)
        self._core.on_started(self._shape.pool)
        self._step()

    def _on_results(self, results: list[StepResult]) -> None:
        self._router._deliver(self._core.on_results(results))
        self._step()

    def _on_lost(self, error: RankLost) -> None:
        if self._core.state is EngineState.READY:
            self.num_suspicious_losses += 1
        self._ranks = None
        wait_s = self._engine._lose(error)
        self._world.tell("%s lost its ranks (%s)", self.name, error)
        self._flush()
        if wait_s is None:
            self._world.after(LAST_WRITE_S, self.kill)
        else:
            self._world.after(wait_s, self._start_ranks)

    def _step(self) -> None:
        if self._ranks is not None and self._core.state is EngineState.READY:
            while (plans := self._core.next_plans()) is not None:
                self._ranks.send(plans)
        self._flush_soon()

    def _leave(self) -> None:
        if self.is_alive:
            self._world.tell("%s gives back what still runs", self.name)
            self._router._give_back()
            self._flush()
            self._world.after(LAST_WRITE_S, self.kill)

    # Sessions

    def _take(self, session: Session, message: pb.GatewayMessage) -> None:
        if self.is_alive:
            self._router.take(session, message)
            self._step()

    def _close(self, session: Session) -> None:
        if self.is_alive:
            del self._ends[session.id]
            self._router.close_session(session)
            self._check_live()
            self._step()

    def _check_live(self) -> None:
        """What is live in the scheduler is live in a session, and the reverse."""
        stats = self._core.stats
        num_live = sum(len(session.live) for session, _ in self._ends.values())
        if stats is not None and stats.num_running + stats.num_waiting != num_live:
            raise BrokenPromise(f"{stats} has not the {num_live} sequences of {self.name}'s sessions")

    def _flush_soon(self) -> None:
        """Updates of several steps may meet in one message, as where a gateway is slow to read."""
        if not self._flush_is_due and any(session.num_unread for session, _ in self._ends.values()):
            self._flush_is_due = True
            self._world.after(self._world.random.random() * LONGEST_COALESCING_S, self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self.is_alive:
            for session, end in self._ends.values():
                while session.num_unread:
                    end.send(_next_message(session))


def _next_message(session: Session) -> pb.RouterMessage:
    """What `session.next()` gives at once where something waits."""
    try:
        session.next().send(None)
    except StopIteration as done:
        message: pb.RouterMessage = done.value
        return message
    raise AssertionError("it waits although there is something to read")
