"""The Router: one copy of the model behind RouterService, the gRPC service that gateways talk to.

Hops 4 and 10. Brings sessions of gateways and the engine together: a Submit becomes a request of the scheduler, a
step's updates become one message per session. Knows tokens only: no text, no clients, no ranks beyond their names.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc

from cluster.config import TlsFiles
from cluster.errors import EngineError, NotReady, Overloaded, RankLossCause, RequestError
from cluster.metrics.router import RouterFigures
from cluster.router.balancer import ExpertBalancer, RebalancePolicy, make_balancer
from cluster.router.engine import Engine, GroupFactory
from cluster.router.layout_table import RankRole, table_lines
from cluster.router.metrics_port import MetricsPort
from cluster.router.request_watch import RequestWatch
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.scheduler_stats import SchedulerStats
from cluster.router.sequence import SequenceUpdate
from cluster.router.servicer import RouterServicer
from cluster.router.session import MAX_UNREAD, Session
from cluster.router.shard_group import GroupInfo
from cluster.router.supervision import EngineState, RestartPolicy
from cluster.router.wire import ModelInfo, RequestKey, to_request
from mull.v1 import router_pb2 as pb
from mull.v1 import router_pb2_grpc
from workers.layout import ParallelLayout
from workers.step import RankLoading, RankReady

log = logging.getLogger(__name__)

LAST_WRITE_S = 0.2
"""Sessions stay open as long as their gateways live; this is for the last messages of drained requests to leave."""
STOPPING = "the Router is stopping"
SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),  # two Routers must not share a port silently
    ("grpc.max_receive_message_length", -1),  # the context bounds a prompt, and gateways bound their clients' messages
    # Gateways ping a quiet session to find out that a Router's machine has vanished; by default that is an offence.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]


@dataclass(frozen=True)
class RouterStats:
    """A snapshot for metrics; *_total only grow while the Router lives."""

    state: EngineState
    is_ready: bool
    """It takes work."""
    reason: str
    loading: list[RankLoading]
    layout: ParallelLayout | None
    """None before the first start."""
    block_size: int
    ranks: list[RankReady]
    scheduler: SchedulerStats | None
    """None before the first start, and at the end."""
    num_sessions: int
    num_unread: int
    """Items that gateways have not read yet."""
    num_steps_total: int
    num_restarts_total: int
    num_replayed_tokens_total: int
    """Put through the model again, after losses of ranks."""
    num_given_up_total: int
    """Requests that brought down the ranks more than once."""
    num_ranks: int
    """By its configuration."""
    num_ranks_lost_total: Mapping[RankLossCause, int]
    heartbeat_age_s: float
    """Since a step, or an idle sign of life of every rank, came."""
    expert_imbalance: float | None
    """Largest over mean load of ranks; None: nothing to balance."""
    expert_imbalances: Mapping[str, float]
    """The same by groups of layers, named as "0-23"."""
    num_rebalances_total: int


class Router:
    """`start`, `address`, then `wait_settled`; ends with `stop`."""

    def __init__(
        self,
        model: ModelInfo,
        config: SchedulerConfig,
        make_group: GroupFactory,
        *,
        enable_prefix_cache: bool = True,
        restarts: RestartPolicy | None = None,
        max_unread: int = MAX_UNREAD,
        roles: Sequence[RankRole] = (),
        rebalance: RebalancePolicy | None = None,
        live_within_s: float = 120.0,
        watches: Sequence[RequestWatch] = (),
    ) -> None:
        """`roles`: what each rank does, for those who ask. `live_within_s`: bound of `why_not_live`.

        `watches` are told how requests fare.
        """
        self._live_within_s = live_within_s
        self._model = model
        self._roles = roles
        self._rebalance = rebalance or RebalancePolicy()
        self._max_unread = max_unread
        self._engine = Engine(
            config,
            make_group,
            on_updates=self._deliver,
            on_ended=self._end_all,
            enable_prefix_cache=enable_prefix_cache,
            restarts=restarts,
            make_balancer=self._make_balancer,
            watches=watches,
        )
        self._sessions: dict[int, Session] = {}
        self._session_ids = itertools.count()
        self._draining = False
        self._ended = asyncio.Event()
        """Set whenever a request may have ended."""
        self._server: grpc.aio.Server | None = None
        self._address: str | None = None
        self._metrics: MetricsPort | None = None

    # Life

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, credentials: grpc.ServerCredentials | None = None
    ) -> None:
        """Listen (port 0: a free one), and begin to load the ranks. Raises EngineError where the port is taken.

        `credentials` make it a TLS port.
        """
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        router_pb2_grpc.add_RouterServiceServicer_to_server(RouterServicer(self), self._server)
        try:
            if credentials is None:
                bound_port = self._server.add_insecure_port(f"{host}:{port}")
            else:
                bound_port = self._server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as error:
            raise EngineError(f"the Router cannot listen on {host}:{port}; is the port taken?") from error
        await self._server.start()
        self._address = f"{host}:{bound_port}"
        self._engine.start()

    def open_metrics(self, host: str, ports: Sequence[int], link: TlsFiles | None = None) -> None:
        """Tell Prometheus what there is, on the first of `ports` that is free. Raises EngineError."""
        collectors = (RouterFigures(self.stats), self._engine.steps, self._engine.times)
        self._metrics = MetricsPort(collectors, self._why_not_ready, self._model.name)
        if link is not None:
            self._metrics.show_certificate(link)
        self._metrics.open(host, ports, here=self.address.rpartition(":")[0])

    @property
    def address(self) -> str:
        """host:port, for gateways."""
        if self._address is None:
            raise EngineError("the Router has no address before its start")
        return self._address

    @property
    def is_ready(self) -> bool:
        return self._engine.core.state is EngineState.READY and self.why_not_live is None

    @property
    def why_not_live(self) -> str | None:
        """It has given up, or neither a step nor an idle sign of life came in time: only a new Router helps."""
        if self.has_failed:
            return self._engine.core.reason
        age_s = self._engine.heartbeat_age_s
        if self._engine.core.state is EngineState.READY and age_s > self._live_within_s:
            return f"no step and no sign of life came for {age_s:.0f} s, at most {self._live_within_s:g} are allowed"
        return None

    @property
    def has_failed(self) -> bool:
        """It has given up: only a new Router helps."""
        return self._engine.core.state is EngineState.FAILED

    async def wait_ready(self) -> None:
        """Until the ranks can take plans. Raises EngineError with the rank's own words where the first start failed."""
        await self._engine.wait_settled()
        if not self.is_ready:
            raise EngineError(self._engine.core.reason)

    async def wait_failed(self) -> str:
        """Until the engine has given up, or was stopped; returns why."""
        await self._engine.wait_ended()
        return self._engine.core.reason

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new requests, let the live ones run for at most `grace_s`, then give them back, and stop the ranks."""
        try:
            await self._drain(grace_s)
            self._give_back()
            if self._server is not None:
                await self._server.stop(LAST_WRITE_S)
        finally:
            await self._engine.stop()
            if self._metrics is not None:
                await self._metrics.close()

    async def _drain(self, grace_s: float) -> None:
        self._draining = True
        try:
            async with asyncio.timeout(grace_s):
                while any(session.live for session in self._sessions.values()):
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            num_live = sum(len(session.live) for session in self._sessions.values())
            log.warning("%d requests still ran after %g s; their gateways take them elsewhere", num_live, grace_s)

    def _give_back(self) -> None:
        """What still runs goes on at another copy, or later: its gateway has all of its output."""
        for session in self._sessions.values():
            for key in sorted(session.live):
                self._engine.cancel(RequestKey(session.id, key))
                session.end(key, pb.End.REASON_UNAVAILABLE, STOPPING)

    # Sessions

    def open_session(self) -> Session:
        session = Session(next(self._session_ids), max_unread=self._max_unread)
        self._sessions[session.id] = session
        return session

    def close_session(self, session: Session) -> None:
        """The gateway is gone: so are its requests, and their blocks are free on return."""
        del self._sessions[session.id]
        for key in session.live:
            self._engine.cancel(RequestKey(session.id, key))
        self._ended.set()

    def take(self, session: Session, message: pb.GatewayMessage) -> None:
        """One message of a gateway. Raises EngineError where it breaks the protocol."""
        match message.WhichOneof("message"):
            case "submit":
                self._submit(session, message.submit)
            case "cancel":
                self._cancel(session, message.cancel.key)
            case "set_budget":
                # Of a request that has ended meanwhile, it is not an error: the two messages crossed.
                key = RequestKey(session.id, message.set_budget.key)
                self._engine.set_budget(key, message.set_budget.thinking_budget)
            case kind:
                raise EngineError(f"a gateway sent {kind or 'nothing'}; gateways and Routers must be of one release")

    def _submit(self, session: Session, submit: pb.Submit) -> None:
        if submit.key in session.live:
            raise EngineError(f"a gateway used key {submit.key} again while it was live")
        try:
            if self._draining:
                raise NotReady(STOPPING)
            self._engine.add(to_request(submit, session.id, self._model))
            session.live.add(submit.key)
        except NotReady as error:
            session.end(submit.key, pb.End.REASON_UNAVAILABLE, str(error))
        except Overloaded as error:
            session.end(submit.key, pb.End.REASON_OVERLOADED, str(error))
        except RequestError as error:
            session.end(submit.key, pb.End.REASON_INVALID, str(error))

    def _cancel(self, session: Session, key: int) -> None:
        """A request that has ended meanwhile is not an error: the two messages crossed."""
        if (update := self._engine.cancel(RequestKey(session.id, key))) is not None:
            session.push(key, update)
            self._ended.set()

    # What the engine has to say

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            assert isinstance(update.key, RequestKey)
            session = self._sessions.get(update.key.session)
            if session is not None:
                session.push(update.key.key, update)
        self._ended.set()

    def _end_all(self, reason: str) -> None:
        for session in self._sessions.values():
            for key in sorted(session.live):
                session.end(key, pb.End.REASON_UNAVAILABLE, reason)
        self._ended.set()

    def _make_balancer(self, info: GroupInfo) -> ExpertBalancer | None:
        for line in table_lines(self._roles, info.ranks) if self._roles else ():
            log.info("%s", line)
        hosts = [rank.host for rank in info.ranks]
        return make_balancer(self._model.experts, info.layout, hosts, self._rebalance)

    # What it looks like

    def stats(self) -> RouterStats:
        engine, core = self._engine, self._engine.core
        return RouterStats(
            state=core.state,
            is_ready=self.is_ready and not self._draining,
            reason=core.reason,
            loading=[engine.loading[rank] for rank in sorted(engine.loading)],
            layout=engine.layout,
            block_size=core.pool.block_size if core.pool else 0,
            ranks=engine.info.ranks if engine.info else [],
            scheduler=core.stats,
            num_sessions=len(self._sessions),
            num_unread=sum(session.num_unread for session in self._sessions.values()),
            num_steps_total=core.num_steps_total,
            num_restarts_total=core.num_restarts_total,
            num_replayed_tokens_total=core.num_replayed_tokens_total,
            num_given_up_total=core.num_given_up_total,
            num_ranks=engine.layout.world_size if engine.layout else len(self._roles),
            num_ranks_lost_total=core.num_ranks_lost_total,
            heartbeat_age_s=engine.heartbeat_age_s,
            expert_imbalance=engine.balancer.imbalance if engine.balancer else None,
            expert_imbalances=engine.balancer.imbalances if engine.balancer else {},
            num_rebalances_total=engine.balancer.num_rebalances_total if engine.balancer else 0,
        )

    def _why_not_ready(self) -> str | None:
        return STOPPING if self._draining else self._engine.core.reason or self.why_not_live

    def describe(self) -> pb.DescribeResponse:
        stats = self.stats()
        response = pb.DescribeResponse(
            model=self._model.name,
            ready=stats.is_ready,
            reason=self._why_not_ready() or "",
            max_model_len=self._engine.core.context_limit or self._model.max_model_len,
            block_size=stats.block_size,
            loaded_bytes=sum(rank.read_bytes for rank in stats.loading),
            total_bytes=sum(rank.total_bytes for rank in stats.loading),
            failed=self.has_failed,
            num_steps_total=stats.num_steps_total,
            num_restarts_total=stats.num_restarts_total,
            num_rebalances_total=stats.num_rebalances_total,
            heartbeat_age_seconds=stats.heartbeat_age_s,
            num_replayed_tokens_total=stats.num_replayed_tokens_total,
            num_quarantined_total=stats.num_given_up_total,
            expert_imbalance=stats.expert_imbalance or 0.0,
            ranks=self._rank_infos(stats),
            metrics_address=self._metrics.address if self._metrics else "",
        )
        if stats.layout is not None:
            response.tensor_parallel_size = stats.layout.tp
            response.data_parallel_size = stats.layout.dp
            response.expert_parallel_size = stats.layout.ep
            response.expert_tensor_parallel_size = stats.layout.expert_tp
            response.redundant_experts = self._model.experts.num_redundant if self._model.experts else 0
        if stats.scheduler is not None:
            response.num_blocks = stats.scheduler.num_blocks
            response.num_free_blocks = stats.scheduler.num_free_blocks
            response.num_running = stats.scheduler.num_running
            response.num_thinking = stats.scheduler.num_thinking
            response.num_answering = stats.scheduler.num_answering
            response.num_waiting = stats.scheduler.num_waiting
            response.num_preempted_total = stats.scheduler.num_preempted_total
            response.prefix_query_tokens_total = stats.scheduler.prefix_query_tokens_total
            response.prefix_hit_tokens_total = stats.scheduler.prefix_hit_tokens_total
        return response

    def _rank_infos(self, stats: RouterStats) -> list[pb.RankInfo]:
        """What the ranks said of themselves, and what they are there for."""
        infos = [_rank_info(rank) for rank in stats.ranks]
        for info, role in zip(infos, self._roles, strict=False):
            info.group, info.num_heads, info.num_kv_heads = role.group, role.num_heads, role.num_kv_heads
            info.num_experts = role.num_experts
        return infos


def _rank_info(rank: RankReady) -> pb.RankInfo:
    return pb.RankInfo(
        rank=rank.rank,
        host=rank.host,
        pid=rank.pid,
        device=rank.device,
        weight_bytes=rank.weight_bytes,
        kv_bytes=rank.kv_bytes,
        load_seconds=rank.load_s,
        kv_tokens=rank.num_blocks * rank.block_size,
    )
