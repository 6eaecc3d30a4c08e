"""Blocks and the prefix cache: who uses what, what is found again, what is reused first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.router.blocks import BlockAllocator, chain_hash, root_hash

FIRST = chain_hash(root_hash(""), [1, 2])
SECOND = chain_hash(FIRST, [3, 4])


def cached_pair(blocks: BlockAllocator) -> list[int]:
    """Two idle blocks that hold the tokens 1 2 3 4."""
    table = blocks.allocate(2)
    blocks.publish(table[0], FIRST)
    blocks.publish(table[1], SECOND)
    blocks.release(table)
    return table


def test_allocated_blocks_are_distinct_and_no_longer_free() -> None:
    blocks = BlockAllocator(num_blocks=4, block_size=2)

    taken = blocks.allocate(3)

    assert len(set(taken)) == 3
    assert blocks.num_free == 1


def test_more_blocks_than_are_free_is_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 are free"):
        BlockAllocator(num_blocks=2, block_size=2).allocate(3)


def test_releasing_twice_is_our_own_fault() -> None:
    blocks = BlockAllocator(num_blocks=2, block_size=2)
    table = blocks.allocate(1)
    blocks.release(table)

    with pytest.raises(AssertionError, match="released more often than taken"):
        blocks.release(table)


def test_published_blocks_are_found_as_far_as_the_chain_agrees() -> None:
    blocks = BlockAllocator(num_blocks=4, block_size=2)
    table = cached_pair(blocks)

    assert blocks.match([FIRST, SECOND]) == table
    assert blocks.match([FIRST, chain_hash(FIRST, [3, 5])]) == table[:1]
    assert blocks.match([chain_hash(root_hash("other tenant"), [1, 2])]) == []


def test_the_same_tokens_after_another_beginning_are_another_block() -> None:
    assert chain_hash(FIRST, [1, 2]) != FIRST
    assert chain_hash(root_hash(""), [1, 2]) != chain_hash(root_hash("salt"), [1, 2])
    assert chain_hash(root_hash(""), [1, 2]) != chain_hash(root_hash(""), [2, 1])


def test_a_shared_block_is_free_when_its_last_user_goes() -> None:
    blocks = BlockAllocator(num_blocks=2, block_size=2)
    table = cached_pair(blocks)
    blocks.share(table)
    blocks.share(table)

    blocks.release(table)
    assert blocks.num_free == 0
    blocks.release(table)
    assert blocks.num_free == 2


def test_blocks_without_content_are_reused_before_cached_ones() -> None:
    blocks = BlockAllocator(num_blocks=4, block_size=2)
    table = cached_pair(blocks)

    assert not set(blocks.allocate(2)) & set(table)
    assert blocks.match([FIRST, SECOND]) == table


def test_a_prefix_is_evicted_from_its_end() -> None:
    blocks = BlockAllocator(num_blocks=2, block_size=2)
    table = cached_pair(blocks)

    assert blocks.allocate(1) == table[1:]
    assert blocks.match([FIRST, SECOND]) == table[:1]


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    blocks = BlockAllocator(num_blocks=2, block_size=2)
    old, recent = cached_pair(blocks)
    blocks.share([old])
    blocks.release([old])

    assert blocks.allocate(1) == [recent]


def test_forgotten_blocks_are_not_found_and_reused_first() -> None:
    blocks = BlockAllocator(num_blocks=2, block_size=2)
    table = cached_pair(blocks)

    blocks.forget([FIRST])

    assert blocks.match([FIRST]) == []
    assert blocks.allocate(1) == table[:1]


def test_of_two_blocks_with_the_same_content_the_first_is_kept() -> None:
    blocks = BlockAllocator(num_blocks=2, block_size=2)
    first, second = blocks.allocate(2)
    blocks.publish(first, FIRST)
    blocks.publish(second, FIRST)

    blocks.release([second])
    assert blocks.match([FIRST]) == [first]
    assert blocks.allocate(1) == [second]


@given(num_tokens=st.integers(0, 100), block_size=st.integers(1, 9))
def test_blocks_for_tokens_are_enough_and_not_one_too_many(num_tokens: int, block_size: int) -> None:
    num_blocks = BlockAllocator(1, block_size).num_blocks_for(num_tokens)

    assert num_blocks * block_size >= num_tokens > (num_blocks - 1) * block_size


class Books(RuleBasedStateMachine):
    """Tables come and go, share prefixes and are forgotten, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockAllocator(num_blocks=8, block_size=1)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        """What each block held when it was last allocated and published."""

    @rule(salt=st.sampled_from("ab"), length=st.integers(1, 4))
    def take(self, salt: str, length: int) -> None:
        hashes = [root_hash(salt)]
        while len(hashes) < length:
            hashes.append(chain_hash(hashes[-1], [0]))
        cached = self.blocks.match(hashes)
        if length - len(cached) + self.blocks.num_idle(cached) > self.blocks.num_free:
            return
        assert [self.content[block_id] for block_id in cached] == hashes[: len(cached)]
        self.blocks.share(cached)
        table = cached + self.blocks.allocate(length - len(cached))
        for block_id, block_hash in zip(table, hashes, strict=True):
            self.content[block_id] = block_hash
            self.blocks.publish(block_id, block_hash)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.blocks.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.blocks.forget([self.content[table[-1]]])

    @invariant()
    def every_block_has_as_many_users_as_tables_hold_it(self) -> None:
        holders = Counter(block_id for table in self.tables for block_id in table)
        assert all(self.blocks.num_users(block_id) == holders[block_id] for block_id in range(8))
        assert self.blocks.num_free == 8 - len(holders)

    def teardown(self) -> None:
        for table in self.tables:
            self.blocks.release(table)
        assert sorted(self.blocks.allocate(8)) == list(range(8))
        assert self.blocks.num_cached == 0


TestBooks = Books.TestCase
