"""One run: a cluster of random shape, random requests, random faults; what must hold at every moment and at the end.

A seed decides all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from cluster.router.engine_core import Pool
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.speculation import Speculation
from cluster.router.wire import ModelInfo
from mull.v1 import router_pb2 as pb
from tests.simulation.client import SimClient
from tests.simulation.gateway import SimGateway
from tests.simulation.network import Connection
from tests.simulation.ranks import CopyShape
from tests.simulation.router import SimRouter
from tests.simulation.streams import BrokenPromise, Request
from tests.simulation.world import World

FAULTS_UNTIL_S = 0.20
NUM_FAULTS = (0, 1, 2, 3, 4, 5, 6, 8, 12)
LONGEST_RESTART_S = 0.060
MUST_END_S = 5.0
"""Far beyond any wait that is allowed: a stream that has not ended by then hangs."""
SETTLE_S = 1.0

SAMPLED = 8
"""Token ids that the model samples; one more is the poison."""
THINK_END, STOP = 1, 0
ROW_COST = 0.01
"""So small that a draft pays wherever one can be made."""


@dataclass
class Report:
    """What a run had in it."""

    seed: int
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """How often what happened."""
    end_s: float = 0.0
    num_events: int = 0
    trace: list[str] | None = None


class Failure(AssertionError):
    """A run in which something did not hold."""


def run(seed: int, *, keep_trace: bool = False) -> Report:
    """Raises Failure, which names the seed."""
    simulation = Simulation(seed, keep_trace=keep_trace)
    try:
        return simulation.run()
    except Exception as error:  # whatever it is, the seed must be told
        raise Failure(
            f"seed {seed} at {simulation.world.now_s * 1000:.3f} ms: {type(error).__name__}: {error}"
        ) from error


class Simulation:
    """A cluster, its clients, and what befalls them."""

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.world = World(seed, keep_trace=keep_trace)
        dice = self.world.random
        self.report = Report(seed, trace=self.world.trace)
        self.shape = _shape(dice)
        self.config = SchedulerConfig(
            max_model_len=dice.randint(12, 40),
            max_num_seqs=self.shape.max_num_seqs,
            max_num_batched_tokens=self.shape.max_num_batched_tokens,
            max_waiting=dice.choice([1, 20, 20]),
            max_in_flight=dice.randint(1, 2),
            speculation=Speculation(max_tokens=dice.choice([0, 1, 5]), row_cost=ROW_COST),
        )
        self.model = ModelInfo(
            name="sim",
            vocab_size=self.shape.vocab_size,
            max_model_len=self.config.max_model_len,
            think_end_id=THINK_END,
        )
        self.enable_prefix_cache = dice.random() < 0.7
        self.routers: dict[int, SimRouter] = {}
        self.gateways: dict[int, SimGateway] = {}
        self.past_routers: list[SimRouter] = []
        self.past_gateways: list[SimGateway] = []
        self.routers_come_back = True
        self._num_started = self._num_unfinished = 0
        for place in range(dice.randint(1, 2)):
            self._start_router(place)
        for place in range(dice.randint(1, 2)):
            self._start_gateway(place)
        self.clients = [self._client(number) for number in range(dice.randint(1, 5))]

    def run(self) -> Report:
        world, report = self.world, self.report
        for client in self.clients:
            world.after(world.between(0.0, 0.08), client.call)
        for _ in range(world.random.choice(NUM_FAULTS)):
            world.after(world.between(0.0, FAULTS_UNTIL_S), self._strike)
        if not world.run(until_s=MUST_END_S, is_over=lambda: self._num_unfinished == 0):
            waiting = [client.name for client in self.clients if not client.is_done]
            raise BrokenPromise(f"{', '.join(waiting)} did not end within {MUST_END_S:g} s")
        report.end_s = world.now_s
        if not world.run(until_s=world.now_s + SETTLE_S, is_over=self._is_settled):
            self._check_nothing_is_left()
        self._check_given_up()
        report.num_events = world.num_events
        report.counts.update(report.faults)
        for client in self.clients:
            report.counts.update({"streams": 1, "calls": client.num_calls, "resumed calls": client.num_resumed})
            report.counts["tokens"] += len(client.output_ids)
        for router in [*self.past_routers, *self.routers.values()]:
            report.counts.update(router.counts)
        for gateway in [*self.past_gateways, *self.gateways.values()]:
            report.counts["replays of gateways"] += gateway.num_replays
        return report

    def run_without_routers(self, lost_at_s: float, until_s: float) -> None:
        """All Routers are lost for good; what had begun waits for one, as long as it may."""
        world = self.world
        for client in self.clients:
            world.after(world.between(0.0, 0.08), client.call)
        world.run(until_s=lost_at_s, is_over=lambda: False)
        self.routers_come_back = False
        for router in self.routers.values():
            router.kill()
        world.run(until_s=until_s, is_over=lambda: self._num_unfinished == 0)

    # What must hold

    def _is_settled(self) -> bool:
        routers, gateways = self.routers.values(), self.gateways.values()
        return (
            self.world.now_s > FAULTS_UNTIL_S
            and all(gateway.is_idle for gateway in gateways)
            and all(router.is_idle and not router.num_leaked_blocks for router in routers)
        )

    def _check_nothing_is_left(self) -> None:
        for gateway in self.gateways.values():
            if not gateway.is_idle:
                raise BrokenPromise(f"{gateway.name} keeps a stream whose client is gone")
        for router in self.routers.values():
            if not router.is_idle:
                raise BrokenPromise(f"{router.name} keeps a sequence whose client is gone")
            if router.num_leaked_blocks:
                raise BrokenPromise(f"{router.name}: {router.num_leaked_blocks} blocks are in use though nothing runs")

    def _check_given_up(self) -> None:
        """INTERNAL is for poison, and for those who were there at two losses that a request may have caused."""
        most = max(router.num_suspicious_losses for router in [*self.past_routers, *self.routers.values()])
        for client in self.clients:
            if client.was_refused_for_good:
                self.report.counts["poison given up" if client.request.is_poison else "others given up"] += 1
                if most < 2:
                    raise BrokenPromise(f"{client.name} was given up though ranks were lost {most} times")
            elif client.request.is_poison and len(client.output_ids) > 0:
                raise BrokenPromise(f"{client.name} is poison and got {client.output_ids}")

    # Processes

    def _start_router(self, place: int) -> None:
        self._num_started += 1
        self.routers[place] = SimRouter(
            self.world,
            f"router {place}.{self._num_started}",
            self.shape,
            self.config,
            self.model,
            enable_prefix_cache=self.enable_prefix_cache,
            on_end=lambda router: self._router_ended(place, router),
        )

    def _router_ended(self, place: int, router: SimRouter) -> None:
        self.past_routers.append(router)
        if self.routers_come_back:
            self.world.after(self.world.between(0.0, LONGEST_RESTART_S), lambda: self._start_router(place))

    def _start_gateway(self, place: int) -> None:
        self._num_started += 1
        name = f"gateway {place}.{self._num_started}"

        def restart(gateway: SimGateway) -> None:
            self.past_gateways.append(gateway)
            self.world.after(self.world.between(0.0, LONGEST_RESTART_S), lambda: self._start_gateway(place))

        self.gateways[place] = SimGateway(self.world, name, self.routers, restart)

    def _living_gateways(self) -> list[SimGateway]:
        return [gateway for gateway in self.gateways.values() if gateway.is_alive]

    # Faults

    def _strike(self) -> None:
        dice = self.world.random
        router = dice.choice(list(self.routers.values()))
        gateway = dice.choice(list(self.gateways.values()))
        strikes: dict[str, Callable[[], object]] = {
            "kill rank": router.kill_rank,
            "hang rank": router.hang_rank,
            "kill router": router.kill,
            "drain router": lambda: router.drain(dice.random() * 0.05),
            "kill gateway": gateway.kill,
            "drain gateway": lambda: gateway.drain(dice.random() * 0.05),
            "cut link": lambda: self._on_a_line(gateway.links.values(), Connection.break_),
            "stall link": lambda: self._on_a_line(gateway.links.values(), Connection.stall),
            "cut client": lambda: self._on_a_line(self._client_lines(), Connection.break_),
            "stall client": lambda: self._on_a_line(self._client_lines(), Connection.stall),
        }
        name = dice.choice(list(strikes))
        self.report.faults.append(name)
        self.world.tell("fault: %s", name)
        strikes[name]()

    def _client_lines(self) -> list[Connection]:
        return [client.line for client in self.clients if client.line is not None]

    def _on_a_line(self, lines: Iterable[Connection], act: Callable[[Connection], object]) -> None:
        found = list(lines)
        if found:
            act(self.world.random.choice(found))

    # Requests

    def _client(self, number: int) -> SimClient:
        dice = self.world.random
        leaves_s = self.world.between(0.0, 0.3) if dice.random() < 0.15 else None
        self.report.counts["clients that leave"] += leaves_s is not None
        request = _request(dice, f"stream {number}", self.shape, self.config, self.model)
        self._num_unfinished += 1
        return SimClient(
            self.world,
            f"stream {number}",
            request,
            self._living_gateways,
            leaves_s=leaves_s,
            is_cut_behind=dice.randint(1, 12) if dice.random() < 0.3 else None,
            on_done=self._on_done,
        )

    def _on_done(self) -> None:
        self._num_unfinished -= 1


def _shape(dice: Random) -> CopyShape:
    max_num_seqs = dice.randint(1, 4)
    pool = Pool(num_groups=dice.choice([1, 1, 2]), num_blocks=dice.randint(4, 14), block_size=dice.randint(1, 4))
    return CopyShape(
        pool=pool,
        ranks_per_group=dice.randint(1, 2),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + dice.randint(0, 12),
        vocab_size=SAMPLED + 1,
        poison_id=SAMPLED,
        reach=dice.choice([None, 1]),
    )


def _request(dice: Random, name: str, shape: CopyShape, config: SchedulerConfig, model: ModelInfo) -> Request:
    pool = shape.pool
    context_limit = min(config.max_model_len, pool.num_blocks * pool.block_size)
    shared = [3, 1, 4, 1, 5, 2][: dice.randint(0, 6)]
    own = [dice.randrange(SAMPLED) for _ in range(dice.randint(0, 4))]
    prompt_ids = ([*shared, *own] or [0])[: context_limit - 1]
    is_poison = dice.random() < 0.04
    if is_poison:
        prompt_ids[dice.randrange(len(prompt_ids))] = shape.poison_id
    # Where ranks have more to remember than tokens, nothing is drafted.
    is_plain = dice.random() < 0.4
    message = pb.Submit(
        request_id=name,
        prompt_ids=prompt_ids,
        max_tokens=dice.randint(1, 20),
        stop_token_ids=dice.choice([[], [STOP]]),
        min_tokens=0 if is_plain else dice.choice([0, 0, 3]),
        priority=dice.choice([0, 0, 1, -1]),
        sampling=pb.RouterSampling(
            top_p=1.0,
            repetition_penalty=1.0,
            seed=dice.randrange(2**31),
            presence_penalty=0.0 if is_plain else dice.choice([0.0, 0.0, 1.0]),
            num_logprobs=None if is_plain else dice.choice([None, 1]),
        ),
    )
    if dice.random() < 0.4:
        message.starts_thinking = True
        message.close_thinking_ids.extend(dice.choice([[THINK_END], [6, 7, THINK_END, 5]]))
        if dice.random() < 0.7:
            message.thinking_budget = dice.randint(0, 8)
    if not is_plain and dice.random() < 0.3:
        message.bad_words.add().ids.extend(dice.randrange(SAMPLED) for _ in range(dice.randint(1, 2)))
    return Request(
        message=message,
        model=model,
        context_limit=context_limit,
        sampled_vocab_size=SAMPLED,
        reach=shape.reach,
        stop_text_ids=tuple(dice.randrange(SAMPLED) for _ in range(2)) if dice.random() < 0.2 else (),
        is_poison=is_poison,
    )
