"""Recovery, without clocks or sockets: where flights go, and that none is lost, doubled or kept for ever."""

from __future__ import annotations

import pytest

from cluster.errors import NotReady, Overloaded
from cluster.gateway.affinity import CopyLoad
from cluster.gateway.recovery import (
    Action,
    CopyState,
    Deliver,
    Fail,
    Loss,
    Recovery,
    ReplayPolicy,
    Resumed,
    Send,
)
from mull.v1 import router_pb2 as pb
from tests.gateway.scripted_router import update

READY = CopyState(ready=True)
AWAY = CopyState(ready=False)
UNAVAILABLE = pb.End.REASON_UNAVAILABLE
OVERLOADED = pb.End.REASON_OVERLOADED
NOTHING_REPLAYED = dict.fromkeys(Loss, 0)
POLICY = ReplayPolicy(timeout_s=100, first_pause_s=1, longest_pause_s=8)


@pytest.fixture
def recovery() -> Recovery:
    return Recovery(POLICY)


def ask(**fields: object) -> pb.Submit:
    return pb.Submit(prompt_ids=range(200), max_tokens=50, **fields)  # type: ignore[arg-type]  # protobuf's own types


def sent(actions: list[Action]) -> list[tuple[str, pb.Submit]]:
    return [(a.copy, a.message.submit) for a in actions if isinstance(a, Send) and a.message.HasField("submit")]


def delivered(actions: list[Action]) -> list[int]:
    return [token for a in actions if isinstance(a, Deliver) for token in a.update.token_ids]


def failures(actions: list[Action]) -> list[Exception]:
    return [a.error for a in actions if isinstance(a, Fail)]


def test_a_new_sequence_is_refused_where_no_copy_is_ready(recovery: Recovery) -> None:
    recovery.connected("a", AWAY, 0)
    with pytest.raises(NotReady, match="no copy"):
        recovery.open(ask(), 0)
    assert recovery.num_waiting == 0


def test_what_was_lost_goes_on_at_another_copy_behind_its_output(recovery: Recovery) -> None:
    # given
    recovery.connected("a", READY, 0)
    _, actions = recovery.open(ask(num_prompt_logprobs=1), 0)
    ((_, first),) = sent(actions)
    recovery.updated("a", update(first.key, [7, 8], admitted=3), 1)
    recovery.connected("b", READY, 2)
    # when
    actions = recovery.lost("a", "it died", 3)
    # then
    ((copy, second),) = sent(actions)
    assert (copy, list(second.output_ids)) == ("b", [7, 8])
    assert second.key != first.key
    assert not second.HasField("num_prompt_logprobs")
    actions = recovery.updated("b", update(second.key, [9], admitted=0), 5)
    assert delivered(actions) == [9]
    assert not any(a.update.HasField("admitted") for a in actions if isinstance(a, Deliver))
    assert [(a.loss, a.pause_s) for a in actions if isinstance(a, Resumed)] == [(Loss.ROUTER_LOST, 2)]
    assert recovery.num_replayed_tokens_total[Loss.ROUTER_LOST] == 200 + 2


def test_without_another_copy_it_waits_for_one_and_then_fails(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    recovery.open(ask(), 0)
    assert recovery.lost("a", "it died", 10) == []
    assert recovery.next_s == 110
    assert recovery.tick(109) == []
    (error,) = failures(recovery.tick(110))
    assert isinstance(error, NotReady)
    assert "it died" in str(error)
    assert recovery.next_s is None


def test_a_restarted_copy_gets_all_that_wait_the_oldest_first(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    for name in ("first", "second"):
        recovery.open(ask(request_id=name), 0)
    recovery.lost("a", "it died", 1)
    assert recovery.connected("b", AWAY, 2) == []
    assert [submit.request_id for _, submit in sent(recovery.described("b", READY, 3))] == ["first", "second"]


def test_what_an_earlier_copy_or_key_still_had_on_the_way_is_dropped(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    _, actions = recovery.open(ask(), 0)
    ((_, first),) = sent(actions)
    recovery.lost("a", "cut", 1)
    ((_, second),) = sent(recovery.connected("a", READY, 2))
    assert recovery.updated("a", update(first.key, [5]), 3) == []
    assert recovery.updated("b", update(second.key, [5]), 3) == []
    assert delivered(recovery.updated("a", update(second.key, [6]), 3)) == [6]


def test_a_copy_that_gives_work_back_is_asked_again_after_growing_pauses(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    _, actions = recovery.open(ask(), 0)
    now_s, pauses = 0.0, []
    for _ in range(5):
        ((_, submit),) = sent(actions)
        assert recovery.updated("a", update(submit.key, end=UNAVAILABLE, message="it must go"), now_s) == []
        assert recovery.next_s is not None
        pauses.append(recovery.next_s - now_s)
        now_s = recovery.next_s
        actions = recovery.tick(now_s)
    assert pauses == [1, 2, 4, 8, 8]


def test_a_full_queue_fails_what_has_not_begun_once_every_copy_has_refused(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    recovery.connected("b", READY, 0)
    _, actions = recovery.open(ask(), 0)
    ((one, submit),) = sent(actions)
    ((other, again),) = sent(recovery.updated(one, update(submit.key, end=OVERLOADED, message="full"), 0))
    assert {one, other} == {"a", "b"}
    (error,) = failures(recovery.updated(other, update(again.key, end=OVERLOADED, message="full"), 0))
    assert isinstance(error, Overloaded)


def test_a_full_queue_does_not_fail_what_has_begun(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    _, actions = recovery.resume(ask(), 0, [4])
    ((_, submit),) = sent(actions)
    assert recovery.updated("a", update(submit.key, end=OVERLOADED, message="full"), 0) == []
    ((_, again),) = sent(recovery.tick(1))
    assert list(again.output_ids) == [4]


def test_what_a_client_resumes_is_computed_again_and_no_pause_of_ours(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    _, actions = recovery.resume(ask(), 0, [4])
    ((_, submit),) = sent(actions)

    actions = recovery.updated("a", update(submit.key, [5], admitted=0), 3)

    assert not any(isinstance(action, Resumed) for action in actions)
    assert recovery.num_replayed_tokens_total == {**NOTHING_REPLAYED, Loss.CLIENT_RESUMED: 200 + 1}


def test_what_had_not_begun_has_lost_nothing(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    recovery.open(ask(), 0)
    recovery.lost("a", "it died", 1)
    ((_, submit),) = sent(recovery.connected("b", READY, 2))

    actions = recovery.updated("b", update(submit.key, [5], admitted=0), 3)

    assert not any(isinstance(action, Resumed) for action in actions)
    assert recovery.num_replayed_tokens_total == NOTHING_REPLAYED


def test_a_fault_is_never_replayed(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    _, actions = recovery.open(ask(), 0)
    ((_, submit),) = sent(actions)
    poisoned = update(submit.key, [5], end=pb.End.REASON_ERROR, message="killed its ranks twice")
    (action,) = recovery.updated("a", poisoned, 0)
    assert isinstance(action, Deliver)
    assert action.update.end.reason == pb.End.REASON_ERROR
    assert recovery.lost("a", "it died", 1) == []


def test_a_reader_that_leaves_cancels_what_runs_and_drops_what_waits(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    running, actions = recovery.open(ask(), 0)
    ((_, submit),) = sent(actions)
    (cancel,) = recovery.release(running)
    assert isinstance(cancel, Send)
    assert cancel.message.cancel.key == submit.key
    waiting, _ = recovery.open(ask(), 0)
    recovery.lost("a", "it died", 1)
    assert recovery.release(waiting) == []
    assert recovery.connected("a", READY, 2) == []


def test_a_lowered_budget_goes_along(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    flight, _ = recovery.open(ask(), 0)
    (told,) = recovery.set_budget(flight, 12)
    assert isinstance(told, Send)
    assert told.message.set_budget.thinking_budget == 12
    recovery.lost("a", "it died", 1)
    assert recovery.set_budget(flight, 9) == []
    ((_, submit),) = sent(recovery.connected("a", READY, 2))
    assert submit.thinking_budget == 9


def test_work_goes_to_the_idle_copy_and_a_known_prompt_to_the_copy_that_knows_it(recovery: Recovery) -> None:
    recovery.connected("a", CopyState(ready=True, load=CopyLoad(num_running=3)), 0)
    recovery.connected("b", READY, 0)
    _, actions = recovery.open(ask(), 0)
    ((first, _),) = sent(actions)
    other = pb.Submit(prompt_ids=range(1000, 1200), max_tokens=5)
    _, actions = recovery.open(other, 0)
    ((second, _),) = sent(actions)
    _, actions = recovery.open(ask(cache_salt="of someone else"), 0)
    ((third, _),) = sent(actions)
    _, actions = recovery.open(ask(), 0)
    ((fourth, _),) = sent(actions)
    assert (first, second, third, fourth) == ("b", "b", "b", "b")


def test_many_sequences_spread_over_the_copies(recovery: Recovery) -> None:
    recovery.connected("a", READY, 0)
    recovery.connected("b", READY, 0)
    names = [
        sent(recovery.open(pb.Submit(prompt_ids=range(n * 1000, n * 1000 + 100), max_tokens=5), 0)[1])[0][0]
        for n in range(10)
    ]
    assert names.count("a") == names.count("b") == 5
