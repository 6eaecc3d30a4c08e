"""Who is given up when ranks are lost again and again."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.router.quarantine import TOKENS_TO_CLEAR, Quarantine, is_suspect
from cluster.router.sequence import Sequence
from tests.router.fake_copy import FakeCopy, request


def sequences(*keys: str) -> list[Sequence]:
    return [Sequence.start(request(key, [1, 2], max_tokens=100), max_output=100) for key in keys]


def keys(found: Iterable[Sequence]) -> list[object]:
    return [seq.request.key for seq in found]


def test_a_killed_process_makes_nobody_a_suspect() -> None:
    both = sequences("a", "b")

    assert Quarantine().blame(both, is_suspicious=False) == []
    assert not any(map(is_suspect, both))


def test_after_a_suspicious_loss_one_suspect_runs_at_a_time() -> None:
    quarantine = Quarantine()
    first, second, newcomer = sequences("first", "second", "newcomer")
    assert quarantine.blame([first, second], is_suspicious=True) == []

    first.slot = 0
    quarantine.runs(first)

    assert [quarantine.may_run(seq) for seq in (first, second, newcomer)] == [True, False, True]


def test_the_suspect_that_is_under_way_at_the_next_loss_is_given_up_and_nobody_else() -> None:
    quarantine = Quarantine()
    first, second, newcomer = sequences("first", "second", "newcomer")
    quarantine.blame([first, second], is_suspicious=True)

    assert keys(quarantine.blame([first, newcomer], is_suspicious=True)) == ["first"]
    assert (is_suspect(second), is_suspect(newcomer)) == (True, False)


def test_who_comes_some_tokens_further_is_no_suspect_any_more() -> None:
    quarantine = Quarantine()
    (seq,) = sequences("a")
    quarantine.blame([seq], is_suspicious=True)

    seq.output_ids += [7] * (TOKENS_TO_CLEAR - 1)
    still = is_suspect(seq)
    seq.output_ids.append(7)

    assert (still, is_suspect(seq)) == (True, False)
    assert quarantine.blame([seq], is_suspicious=True) == []


def test_a_suspect_that_gave_way_does_not_keep_the_others_from_running() -> None:
    quarantine = Quarantine()
    first, second = sequences("first", "second")
    quarantine.blame([first, second], is_suspicious=True)
    first.slot = 0
    quarantine.runs(first)

    first.slot = None

    assert quarantine.may_run(second)


def test_suspects_are_computed_one_after_another_and_all_get_their_tokens() -> None:
    copy = FakeCopy(max_num_seqs=4, max_num_batched_tokens=32, num_blocks=64)
    quarantine = Quarantine()
    copy.scheduler = type(copy.scheduler)(copy.config, copy.blocks, quarantine)
    for key in range(3):
        copy.add(request(key, [key, 1, 2], max_tokens=30))
    copy.send()
    suspects = copy.scheduler.in_flight.computed
    quarantine.blame(suspects, is_suspicious=True)

    copy.lose_ranks()
    copy.send()
    together = [seq for seq in suspects if seq.slot is not None]
    copy.run()

    assert len(suspects) == 3
    assert len(together) == 1
    for key in range(3):
        assert copy.token_ids[key] == copy.alone(key)[0]
