"""When a lost group is started again, and when the engine gives up: pure."""

from __future__ import annotations

from cluster.router.supervision import EngineState, RestartPolicy, Supervisor

POLICY = RestartPolicy(max_restarts=3, first_backoff_s=0.5, backoff_factor=2)


def test_a_first_start_that_fails_is_final() -> None:
    supervisor = Supervisor(POLICY)

    assert supervisor.lost("no such file") is None
    assert (supervisor.state, supervisor.reason) == (EngineState.FAILED, "no such file")


def test_restarts_wait_longer_each_time_and_then_end() -> None:
    supervisor = Supervisor(POLICY)
    supervisor.started()

    assert [supervisor.lost("rank 1 died") for _ in range(4)] == [0, 0.5, 1, None]
    assert supervisor.state is EngineState.FAILED


def test_a_group_that_comes_back_but_never_steps_is_not_restarted_forever() -> None:
    supervisor = Supervisor(POLICY)
    supervisor.started()

    for _ in range(3):
        assert supervisor.lost("rank 1 died") is not None
        supervisor.started()

    assert supervisor.lost("rank 1 died") is None


def test_a_step_that_works_gives_all_tries_back() -> None:
    supervisor = Supervisor(POLICY)
    supervisor.started()

    for _ in range(10):
        assert supervisor.lost("rank 1 died") == 0
        assert "try 1 of 3" in supervisor.reason
        supervisor.started()
        supervisor.stepped()


def test_a_group_that_cannot_even_be_made_is_final() -> None:
    supervisor = Supervisor(POLICY)
    supervisor.started()

    supervisor.failed("a fault")

    assert (supervisor.state, supervisor.reason) == (EngineState.FAILED, "a fault")


def test_an_engine_that_was_stopped_does_not_fail_any_more() -> None:
    supervisor = Supervisor(POLICY)
    supervisor.stopped()

    supervisor.failed("a fault")

    assert supervisor.state is EngineState.STOPPED
