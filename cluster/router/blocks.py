"""Paged KV bookkeeping: integers only, no tensors.

Hop 5: the scheduler asks here for blocks; the ranks' KV pool owns the bytes. Knows nothing of sequences or clients.

A block is free (nobody's, content worthless), used (by one sequence, or by several that read the same prefix) or idle
(nobody's, but the prefix cache knows its content). Free ones are allocated first, then idle ones, oldest first. What
idle ones hold may be kept in the host's memory then, where there is such.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from cluster.router.host_tier import HostTier


def root_hash(salt: str) -> bytes:
    """Where the chain of every prefix with this salt starts."""
    return blake2b(salt.encode(), digest_size=32).digest()


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of one full block: its tokens and, through `parent`, everything before them.

    A cryptographic hash, because a collision would show one tenant's text to another.
    """
    return blake2b(array("Q", token_ids).tobytes(), digest_size=32, key=parent).digest()


def chain_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The names of the full blocks of these tokens, which follow the block named `parent`."""
    hashes = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = chain_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes


class BlockAllocator:
    """The blocks of one attention group: who uses how many, and which prefix each holds."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_cache: bool = True, host: HostTier | None = None
    ) -> None:
        """`host`: where the content of evicted blocks goes; it needs the prefix cache, whose names it uses."""
        self.num_blocks = num_blocks
        self.host = host if enable_prefix_cache else None
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._num_users = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))
        # OrderedDict and not dict: popping the oldest entry of a dict walks over all holes left by earlier pops.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.num_cache_growths = 0
        """Changes whenever a prefix may have become cheaper: more of it is cached, or is used by another already."""

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that the prefix cache can give, used or idle."""
        return len(self._block_of)

    def num_users(self, block_id: int) -> int:
        """How many block tables hold this block."""
        return self._num_users[block_id]

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Blocks for one new user each; the caller has checked `num_free`. Idle ones lose their content."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} are free"
        free, num_users = self._free, self._num_users
        if count <= len(free):
            block_ids = free[: -count - 1 : -1]
            del free[len(free) - count :]
        else:
            block_ids = [free.pop() if free else self._evict() for _ in range(count)]
        for block_id in block_ids:
            num_users[block_id] = 1
        if self.host is not None:
            self.host.given(block_ids)
        return block_ids

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix of this chain. Takes none of them: `share` does."""
        found = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_idle(self, block_ids: Sequence[int]) -> int:
        """How many of these would leave `num_free` when shared."""
        return sum(self._num_users[block_id] == 0 for block_id in block_ids)

    def share(self, block_ids: Sequence[int]) -> None:
        """One more user for each of these cached blocks."""
        for block_id in block_ids:
            if self._num_users[block_id] == 0:
                del self._idle[block_id]
            self._num_users[block_id] += 1
        self.num_cache_growths += 1

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """From now on `match` finds this used block, unless another with the same content is known: that one stays."""
        assert self._num_users[block_id] > 0, f"block {block_id} is published without a user"
        if block_hash not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            self.num_cache_growths += 1

    def forget(self, hashes: Sequence[bytes]) -> None:
        """Take blocks out of the cache that nobody will ask for again; idle ones are the next to be reused."""
        if self.host is not None:
            self.host.forget(hashes)
        for block_hash in hashes:
            block_id = self._block_of.pop(block_hash, None)
            if block_id is None:
                continue
            del self._hash_of[block_id]
            if self._num_users[block_id] == 0:
                del self._idle[block_id]
                self._free.append(block_id)

    def release(self, block_ids: Sequence[int]) -> None:
        """One user less for each block of a table, from its end: so a prefix is evicted from its end, too."""
        num_users, hash_of, free = self._num_users, self._hash_of, self._free
        if self.host is not None:
            self.host.was_used(block_ids)
        for block_id in reversed(block_ids):
            num_left = num_users[block_id] - 1
            assert num_left >= 0, f"block {block_id} was released more often than taken"
            num_users[block_id] = num_left
            if num_left:
                continue
            if block_id in hash_of:
                self._idle[block_id] = None
            else:
                free.append(block_id)

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        block_hash = self._hash_of.pop(block_id)
        del self._block_of[block_hash]
        if self.host is not None:
            self.host.keep(block_id, block_hash)
        return block_id
