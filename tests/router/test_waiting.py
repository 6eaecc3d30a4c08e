"""The queue of those who wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.router.waiting import WaitingQueue


def queue(*priorities: int) -> WaitingQueue[str]:
    waiting: WaitingQueue[str] = WaitingQueue()
    for arrival, priority in enumerate(priorities):
        waiting.add(arrival, f"item {arrival}", place=(-priority, arrival))
    return waiting


def test_higher_priorities_go_first_and_equals_in_the_order_of_arrival() -> None:
    assert list(queue(0, 5, 0, 5, -1)) == ["item 1", "item 3", "item 0", "item 2", "item 4"]


def test_who_comes_back_takes_its_old_place() -> None:
    waiting = queue(0, 0, 0)
    key, item = waiting.pop()
    waiting.add(key, item, place=(0, 0))

    assert waiting.first(lambda _item: True) == "item 0"


def test_an_item_can_be_replaced_where_it_waits() -> None:
    waiting = queue(0, 0)
    waiting.replace(0, "another")

    assert (list(waiting), waiting.get(0), waiting.get(7)) == (["another", "item 1"], "another", None)


@given(st.lists(st.integers(-2, 2), max_size=20), st.lists(st.integers(0, 25)))
def test_removing_any_of_them_keeps_the_order_of_the_others(priorities: list[int], removed: list[int]) -> None:
    waiting = queue(*priorities)
    left = set(range(len(priorities)))
    for key in removed:
        assert (waiting.remove(key) is None) == (key not in left)
        left.discard(key)

    order = [waiting.pop()[0] for _ in range(len(waiting))]

    assert order == sorted(left, key=lambda key: (-priorities[key], key))
