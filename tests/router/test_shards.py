"""RankGroup with real processes and sockets, and a runner without a model: start, steps, losses, stop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from torch.distributed import TCPStore

from cluster.errors import RankLossCause, RankLost
from cluster.router.gather import RankEnd
from cluster.router.in_process import InProcessGroup
from cluster.router.launchers import ProcessLauncher
from cluster.router.rank_socket import RankSocket
from cluster.router.rendezvous import Rendezvous
from cluster.router.shards import GroupBounds, GroupInfo, RankGroup, Survivors
from tests.end_to_end.servers import command_of
from workers.config import RunnerConfig
from workers.launched import BeforeWait, Done, Launched
from workers.layout import ParallelLayout
from workers.shard import Progress, Runner, ShardConfig
from workers.step import FromRank, PlacementUpdate, RankLoading, RankReady, StepPlan, StepResult, encode

FAKE_SHARD = str(Path(__file__).with_name("fake_shard.py"))
WAIT_S = 60.0
BOUNDS = GroupBounds(start_timeout_s=WAIT_S, step_timeout_s=WAIT_S, wake_timeout_s=WAIT_S, stop_timeout_s=5)
PATIENT = replace(BOUNDS, stop_timeout_s=1)
"""For steps that hang: a test says when their time is up, once all that should be has come about."""


def runners(scenario: str, tp: int, dp: int = 1) -> list[RunnerConfig]:
    layout = ParallelLayout(tp=tp, dp=dp)
    return [RunnerConfig(model_dir=scenario, rank=rank, layout=layout) for rank in range(layout.world_size)]


class Started:
    """A group under test, what it told, and whether anything of it is left."""

    def __init__(
        self, scenario: str, tp: int, bounds: GroupBounds, dp: int = 1, survivors: Survivors | None = None
    ) -> None:
        self.progress: list[RankLoading] = []
        launcher = ProcessLauncher([sys.executable, FAKE_SHARD])
        self.group = RankGroup(launcher, runners(scenario, tp, dp), bounds, self.progress.append, survivors)
        self.info: GroupInfo | None = None

    async def start(self) -> GroupInfo:
        self.info = await asyncio.wait_for(self.group.start(), WAIT_S)
        return self.info

    async def step(self, step: int = 0) -> StepResult:
        self.group.send([StepPlan(step, decodes=[1, 2])])
        return (await asyncio.wait_for(self.group.receive(), WAIT_S))[0]

    async def late_step(self, timeout_s: float, is_time_up: Callable[[RankGroup], bool], num_groups: int = 1) -> None:
        """A step whose time is `timeout_s`, which begins when the ranks are as they should be then. Raises RankLost."""
        self.group.send([StepPlan(0, decodes=[1, 2])] * num_groups)
        receiving = asyncio.create_task(self.group.receive())
        await until(lambda: is_time_up(self.group), "ranks that hang, and ranks that have answered")
        self.group._bounds = replace(self.group._bounds, step_timeout_s=timeout_s)
        self.group._set_deadline()
        await asyncio.wait_for(receiving, WAIT_S)


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"waited {WAIT_S:g} s for {what}") from None


def only_late(*ranks: int) -> Callable[[RankGroup], bool]:
    """All others have answered."""
    return lambda group: group._gather.late_ranks == list(ranks)


def only_suspected(rank: int) -> Callable[[RankGroup], bool]:
    """By what their pulses tell."""
    return lambda group: group._pulses.suspects(group._gather.late_ranks, asyncio.get_running_loop().time()) == [rank]


Make = Callable[..., Awaitable[Started]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Started] = []

    async def start(
        scenario: str = "good",
        *,
        tp: int = 2,
        dp: int = 1,
        bounds: GroupBounds = BOUNDS,
        survivors: Survivors | None = None,
    ) -> Started:
        made.append(Started(scenario, tp, bounds, dp, survivors))
        await made[-1].start()
        return made[-1]

    yield start
    for started in made:
        await started.group.stop()
    assert ranks_alive() == []
    assert socket_directories(os.getpid()) == []


def socket_directories(router_pid: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"mull-{router_pid}-*"))


def ranks_alive() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True) if FAKE_SHARD in command_of(child)]


async def test_a_group_tells_its_ranks_the_blocks_that_all_have_and_its_progress(make: Make) -> None:
    started = await make()

    assert started.info is not None
    assert [rank.rank for rank in started.info.ranks] == [0, 1]
    assert len({rank.pid for rank in started.info.ranks} - {os.getpid()}) == 2
    assert started.info.num_blocks == 100
    assert {(p.rank, p.read_bytes) for p in started.progress} >= {(0, 1000), (1, 1000)}


async def test_results_come_in_order_while_plans_are_sent_ahead(make: Make) -> None:
    started = await make()

    started.group.send([StepPlan(0, decodes=[5, 6])])
    for step in range(1, 200):
        started.group.send([StepPlan(step, decodes=[5, 6])])
        results = await asyncio.wait_for(started.group.receive(), WAIT_S)

        assert [(result.step, result.rank) for result in results] == [(step - 1, 0), (step - 1, 1)]
        assert [result.token_ids for result in results] == [[7, 7], []]


async def test_each_attention_group_gets_its_own_plan_and_names_its_own_tokens(make: Make) -> None:
    started = await make(tp=2, dp=2)

    started.group.send([StepPlan(0, decodes=[1], group_tokens=[1, 3]), StepPlan(0, decodes=[1, 2, 3])])
    results = await asyncio.wait_for(started.group.receive(), WAIT_S)

    assert [result.rank for result in results] == [0, 1, 2, 3]
    assert [result.token_ids for result in results] == [[7], [], [7, 7, 7], []]


async def test_a_placement_reaches_every_rank_before_the_plan_that_follows_it(make: Make) -> None:
    started = await make("tells-placements", tp=1, dp=2)

    started.group.place(PlacementUpdate(5, [[1, 0]]))
    started.group.send([StepPlan(0, report_loads=True), StepPlan(0, report_loads=True)])
    results = await asyncio.wait_for(started.group.receive(), WAIT_S)

    assert [result.expert_loads for result in results] == [[[5]], [[5]]]


async def test_a_late_rank_of_another_group_is_named(make: Make) -> None:
    started = await make("hangs:3", tp=2, dp=2, bounds=PATIENT)

    with pytest.raises(RankLost, match=r"rank 3 was late: no result within 0\.1 s"):
        await started.late_step(0.1, only_late(3), num_groups=2)


async def test_receive_may_be_cancelled_and_called_again(make: Make) -> None:
    started = await make()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(started.group.receive(), 0.01)

    assert (await started.step()).step == 0


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("dies:1", "rank 1 was killed by SIGKILL"),
        ("dies:0", "rank 0 was killed by SIGKILL"),
        ("fails:1", "rank 1 failed: ValueError: matrix of no rank"),
        ("skips:0", "rank 0 answered step 1, expected step 0"),
    ],
)
async def test_a_rank_lost_in_a_step_is_named(make: Make, scenario: str, words: str) -> None:
    started = await make(scenario)

    with pytest.raises(RankLost, match=words) as lost:
        await started.step()

    assert lost.value.rank == int(scenario[-1])


async def test_a_rank_that_dies_while_idle_is_named(make: Make) -> None:
    started = await make()
    assert started.info is not None

    os.kill(started.info.ranks[1].pid, signal.SIGKILL)

    with pytest.raises(RankLost, match="rank 1 was killed by SIGKILL"):
        await asyncio.wait_for(started.group.receive(), WAIT_S)


async def test_a_rank_that_hangs_is_late_and_then_killed(make: Make) -> None:
    started = await make("hangs:1", bounds=PATIENT)

    with pytest.raises(RankLost, match=r"rank 1 was late: no result within 0\.1 s"):
        await started.late_step(0.1, only_late(1))
    await started.group.stop()

    assert ranks_alive() == []


async def test_a_stopped_process_is_killed_too(make: Make) -> None:
    started = await make(bounds=GroupBounds(stop_timeout_s=0.2))
    assert started.info is not None
    os.kill(started.info.ranks[0].pid, signal.SIGSTOP)

    await started.group.stop()

    assert ranks_alive() == []


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("bad-checkpoint:1", "rank 1 failed: /models/x/model.safetensors: truncated at byte 7; download it again"),
        ("dies-loading:0", "rank 0 exited with status 9"),
    ],
)
async def test_a_rank_that_cannot_load_is_named_and_nothing_is_left(make: Make, scenario: str, words: str) -> None:
    with pytest.raises(RankLost, match=words):
        await make(scenario)

    assert ranks_alive() == []


async def test_a_rank_that_loads_too_long_is_named_and_nothing_is_left(make: Make) -> None:
    with pytest.raises(RankLost, match=r"ranks? .*1 .*not ready within 3 s; raise router\.start_timeout_s") as lost:
        await make("loads-forever:1", bounds=GroupBounds(start_timeout_s=3))

    assert lost.value.cause is RankLossCause.LATE
    assert ranks_alive() == []


async def test_who_survives_a_loss_joins_the_next_group_with_its_weights(make: Make) -> None:
    # given: a rank that waits for the one that is lost, and one that does not
    started = await make("waits-for-others:0", tp=3)
    assert started.info is not None
    before = {rank.rank: rank.pid for rank in started.info.ranks}
    started.group.send([StepPlan(0, decodes=[1])])
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(RankLost, match="rank 1 was killed by SIGKILL") as lost:
        await asyncio.wait_for(started.group.receive(), WAIT_S)
    # when
    survivors = await asyncio.wait_for(started.group.dissolve(), WAIT_S)
    again = await make("good", tp=3, survivors=survivors)
    # then
    assert again.info is not None
    assert lost.value.was_killed
    assert {rank.rank for rank in again.info.ranks if rank.pid == before[rank.rank]} == {0, 2}
    assert {progress.rank for progress in again.progress} == {1}, "only the lost one loads"
    assert (await again.step(7)).token_ids == [7, 7]


async def test_a_survivor_whose_device_never_comes_to_rest_ends(make: Make) -> None:
    started = await make("cannot-leave:0")
    assert started.info is not None
    os.kill(started.info.ranks[1].pid, signal.SIGKILL)
    with pytest.raises(RankLost, match="rank 1 was killed"):
        await asyncio.wait_for(started.group.receive(), WAIT_S)

    survivors = await asyncio.wait_for(started.group.dissolve(), WAIT_S)

    end = await asyncio.wait_for(survivors[0].wait(), WAIT_S)
    assert end.how == "exited with status 5"


async def test_a_survivor_that_cannot_leave_is_started_anew_and_nobody_else_with_it(make: Make) -> None:
    started = await make("cannot-leave:0", tp=3)
    assert started.info is not None
    before = {rank.rank: rank.pid for rank in started.info.ranks}
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(RankLost, match="rank 1 was killed"):
        await asyncio.wait_for(started.group.receive(), WAIT_S)
    survivors = await asyncio.wait_for(started.group.dissolve(), WAIT_S)
    assert set(survivors) == {0, 2}

    again = await make("good", tp=3, survivors=survivors)

    assert again.info is not None
    assert [rank.rank for rank in again.info.ranks if rank.pid == before[rank.rank]] == [2]
    assert (await again.step(7)).token_ids == [7, 7]


async def test_a_stopped_rank_is_noticed_while_idle(make: Make) -> None:
    started = await make(bounds=replace(PATIENT, pulse_timeout_s=4))
    assert started.info is not None

    os.kill(started.info.ranks[1].pid, signal.SIGSTOP)

    with pytest.raises(RankLost, match=r"rank 1 was not heard of for 4 s") as lost:
        await asyncio.wait_for(started.group.receive(), WAIT_S)
    assert lost.value.cause is RankLossCause.SILENT


async def test_a_stopped_rank_is_blamed_and_not_the_one_that_waits_for_it(make: Make) -> None:
    started = await make("waits-for-others:0", bounds=PATIENT)
    assert started.info is not None
    os.kill(started.info.ranks[1].pid, signal.SIGSTOP)

    with pytest.raises(RankLost, match=r"rank 1 was late.* \(rank 0 was waiting for it\)") as lost:
        await started.late_step(0.1, only_suspected(1))
    assert (lost.value.rank, lost.value.cause) == (1, RankLossCause.LATE)


async def test_a_rank_whose_device_hangs_is_told_from_those_that_wait_for_it_and_they_go_on(make: Make) -> None:
    # given: hosts that are all as far, and wait for their devices
    started = await make("device-hangs:1", tp=3, bounds=PATIENT)
    assert started.info is not None
    before = {rank.rank: rank.pid for rank in started.info.ranks}
    # when: they are woken, and those who can have answered
    stepping = asyncio.create_task(started.late_step(0.1, only_late(0, 1, 2)))
    await until(lambda: started.group._roll_call is not None and started.group._roll_call.hanging == [1], "the others")
    assert started.group._roll_call is not None
    started.group._end_roll_call(started.group._roll_call, [0, 1, 2])
    with pytest.raises(RankLost, match=r"rank 1 was late: .* \(ranks 0, 2 were waiting for it\)") as lost:
        await stepping
    survivors = await asyncio.wait_for(started.group.dissolve(), WAIT_S)
    again = await make("good", tp=3, survivors=survivors)
    # then
    assert again.info is not None
    assert (lost.value.rank, lost.value.cause) == (1, RankLossCause.LATE)
    assert {rank.rank for rank in again.info.ranks if rank.pid == before[rank.rank]} == {0, 2}
    assert (await again.step(7)).token_ids == [7, 7]


class RankInTest:
    """A rank of one, which a test speaks for; it launches itself."""

    host = None
    settle_s = WAIT_S
    rank = 0

    def __init__(self) -> None:
        self._has_ended = asyncio.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"0")

    async def launch(self, config: ShardConfig) -> RankInTest:
        self._socket.connect(config.endpoint)
        self.say(RankReady(0, 1, "here", "cpu", 10, 4, weight_bytes=1, kv_bytes=1, load_s=0))
        return self

    def say(self, message: FromRank) -> None:
        self._socket.send(encode(message))

    async def restart(self, _config: ShardConfig) -> None:
        raise AssertionError("it survives nothing")

    async def wait(self) -> RankEnd:
        await self._has_ended.wait()
        self._context.destroy(linger=0)
        return RankEnd("ended", was_killed=False)

    def terminate(self) -> None:
        self._has_ended.set()

    kill = terminate


async def test_an_answer_that_is_read_a_moment_too_late_counts_for_the_router_may_have_been_stopped_itself() -> None:
    rank = RankInTest()
    group = RankGroup(rank, runners("", 1), replace(PATIENT, step_timeout_s=0.1), lambda _: None)
    await group.start()
    try:
        group.send([StepPlan(0)])
        await asyncio.sleep(0.3)
        rank.say(StepResult(0, 0))

        assert (await asyncio.wait_for(group.receive(), WAIT_S))[0].step == 0
    finally:
        rank.terminate()
        await group.stop()


async def test_ctrl_c_in_the_terminal_does_not_reach_the_ranks(make: Make) -> None:
    started = await make(tp=1)
    assert started.info is not None
    pid = started.info.ranks[0].pid

    os.kill(pid, signal.SIGINT)

    assert (await started.step()).step == 0
    assert os.getpgid(pid) != os.getpgid(0)


ROUTER_PROCESS = """
import asyncio, sys
sys.path[:0] = sys.argv[1:]
from tests.router.test_shards import Started, BOUNDS
async def main():
    groups = [Started(scenario, 1, BOUNDS) for scenario in sys.argv[2:]]
    infos = [await started.start() for started in groups]
    steps = [asyncio.create_task(started.step()) for started in groups]
    print(*(info.ranks[0].pid for info in infos), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_ranks_end_when_their_router_is_killed_even_in_a_step_that_hangs() -> None:
    command = [sys.executable, "-c", ROUTER_PROCESS, str(Path(__file__).parents[2]), "good", "hangs:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as router:
        assert router.stdout is not None
        ranks = [psutil.Process(int(pid)) for pid in router.stdout.readline().split()]

        router.kill()

        assert len(ranks) == 2
        for rank in ranks:
            rank.wait(timeout=WAIT_S)
        assert socket_directories(router.pid) == []


class EchoRunner:
    """One rank in a thread."""

    num_blocks = 10
    weight_bytes = 1
    kv_bytes = 2
    host_memory = None

    num_exchanges = num_group_exchanges = 0

    def __init__(self, config: ShardConfig, progress: Progress, previous: Runner | None) -> None:
        del config, previous
        progress(1, 1)

    def place(self, update: PlacementUpdate) -> None:
        raise AssertionError(f"placement {update.version} came to a rank that is alone")

    def abort(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def launch(self, plan: StepPlan, before_wait: BeforeWait) -> Launched:
        del before_wait
        return Done(self.execute(plan))

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.prefills:
            raise ValueError("no prefill here")
        return StepResult(plan.step, 0, [7] * len(plan.decodes))


async def test_one_rank_in_process_steps_in_order() -> None:
    progress: list[RankLoading] = []
    group = InProcessGroup(runners("", 1)[0], BOUNDS, progress.append, EchoRunner)

    info = await group.start()
    for step in range(3):
        group.send([StepPlan(step, decodes=[1])])
    results = [(await group.receive())[0] for _ in range(3)]
    await group.stop()

    assert info.num_blocks == 10
    assert [result.step for result in results] == [0, 1, 2]
    assert progress == [RankLoading(0, 1, 1)]


async def test_a_long_temporary_directory_does_not_keep_ranks_from_their_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    socket = RankSocket(None, lambda _message: None)

    assert socket.endpoint.startswith("ipc:///tmp/mull-")
    socket.close()
    assert not Path(socket.endpoint.removeprefix("ipc://")).parent.exists()


async def test_a_rendezvous_that_is_cancelled_while_it_opens_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given: a store that is under way when its opening is cancelled
    begun, go_on = threading.Event(), threading.Event()

    def slow_store(*args: Any, **options: Any) -> TCPStore:
        store = TCPStore(*args, **options)
        begun.set()
        assert go_on.wait(WAIT_S)
        return store

    monkeypatch.setattr("torch.distributed.TCPStore", slow_store)
    rendezvous = Rendezvous("127.0.0.1")
    opening = asyncio.create_task(rendezvous.open())
    assert await asyncio.to_thread(begun.wait, WAIT_S)
    opening.cancel()
    # when
    rendezvous.close()
    go_on.set()
    # then
    await asyncio.get_running_loop().shutdown_default_executor()  # the thread that nobody can cancel has ended
    ours = psutil.Process().net_connections(kind="inet")
    assert rendezvous.port not in {it.laddr.port for it in ours if it.status == psutil.CONN_LISTEN}
