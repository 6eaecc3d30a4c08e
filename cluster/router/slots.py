"""Who runs: the sequences that hold a slot and blocks, and what they leave in the prefix cache.

Hop 5, a part of the scheduler, which decides who comes and goes; here it is booked. Knows nothing of plans and queues.

Slots and blocks are free again as soon as a sequence leaves, though a plan that still computes it may be in flight.
That is safe because ranks execute plans strictly in order: the late writes of the old owner land before the first write
of the new one. For the same reason a block may be published once the plan that fills it is sent: who hits it, does so
in a later plan.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.router.blocks import BlockAllocator, chain_hashes, root_hash
from cluster.router.sequence import Phase, Sequence


class SlotTable:
    """The running sequences in the order of their admission."""

    def __init__(self, num_slots: int, blocks: BlockAllocator) -> None:
        self.blocks = blocks
        self._running: dict[int, Sequence] = {}
        self._free_slots = list(reversed(range(num_slots)))
        self._to_close: list[int] = []

    def __len__(self) -> int:
        return len(self._running)

    @property
    def running(self) -> Iterable[Sequence]:
        """Oldest admission first."""
        return self._running.values()

    @property
    def ranked(self) -> list[Sequence]:
        """Highest priority first; of equal ones, those in their answers; of equal ones, the earliest arrival."""
        return sorted(self._running.values(), key=_order)

    @property
    def last(self) -> Sequence:
        """The last of `ranked`: who gives way first."""
        return max(self._running.values(), key=_order)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def take_closed(self) -> list[int]:
        """Slots left since the last call, which the next plan must close."""
        closed, self._to_close = self._to_close, []
        return closed

    def try_enter(self, seq: Sequence) -> bool:
        """Give it a free slot and blocks for all its known tokens, cached ones among them; False: too few are free.

        All blocks at once, so that a long prompt never stops half-way. One block per running sequence stays free beyond
        that: without this margin the newcomer would be preempted again by the next decodes.
        """
        blocks, margin = self.blocks, len(self._running)
        if seq.wanted_at_growth == blocks.num_cache_growths and blocks.num_free < seq.num_blocks_wanted + margin:
            return False
        self._hash_full_blocks(seq)
        # At least one token is computed, or there would be no logits to sample from.
        findable = 0 if seq.needs_scores else (seq.num_known - 1) // blocks.block_size
        cached = blocks.match(seq.block_hashes[:findable])
        kept = self._find_kept(seq.block_hashes[len(cached) : findable])
        num_fresh = blocks.num_blocks_for(seq.num_known) - len(cached)
        seq.num_blocks_wanted = num_fresh + blocks.num_idle(cached)
        seq.wanted_at_growth = blocks.num_cache_growths
        if blocks.num_free < seq.num_blocks_wanted + margin:
            return False
        blocks.share(cached)
        host_ids = blocks.host.read(kept) if blocks.host is not None else []
        fresh = blocks.allocate(num_fresh)
        seq.block_ids = cached + fresh
        seq.fetches = list(zip(host_ids, fresh, strict=False))
        seq.num_published = len(cached)
        seq.num_computed = (len(cached) + len(kept)) * blocks.block_size
        seq.prefill_end = seq.num_known
        seq.slot = self._free_slots.pop()
        self._running[seq.slot] = seq
        return True

    def leave(self, seq: Sequence) -> None:
        """Take slot and blocks back. The plan that closes the slot may open it again for another: close comes first."""
        assert seq.slot is not None
        del self._running[seq.slot]
        if seq.is_open:
            self._to_close.append(seq.slot)
        self._free_slots.append(seq.slot)
        if self.blocks.host is not None:
            self.blocks.host.let_go(host_id for host_id, _ in seq.fetches)
        self.blocks.release(seq.block_ids)
        seq.slot, seq.is_open = None, False
        seq.block_ids, seq.fetches = [], []
        seq.num_computed = seq.prefill_end = seq.num_blocks_wanted = 0
        seq.must_reopen = False

    def fetch(self, seq: Sequence, most: int) -> list[tuple[int, int]]:
        """What the next plan brings back of it: at most so many (host block, block). Others may hit those then."""
        fetched, seq.fetches = seq.fetches[:most], seq.fetches[most:]
        self._publish(seq, seq.num_computed - len(seq.fetches) * self.blocks.block_size)
        return fetched

    def publish_prompt(self, seq: Sequence) -> None:
        """Let later requests hit the prompt blocks that are computed by now.

        Nothing after the prompt: the template drops thoughts from the history, so no later prompt goes on from there.
        """
        self._publish(seq, min(seq.num_computed, len(seq.request.prompt_ids)))

    def publish_known(self, seq: Sequence) -> None:
        """Let the sequence itself hit all it has computed, thoughts too, when it comes back after a preemption."""
        self._hash_full_blocks(seq)
        num_there = seq.num_computed - len(seq.fetches) * self.blocks.block_size
        self._publish(seq, min(num_there, seq.num_known))

    def forget_output(self, seq: Sequence) -> None:
        """It will not come back: blocks behind its prompt are of no use to anyone and are reused first."""
        self.blocks.forget(seq.block_hashes[len(seq.request.prompt_ids) // self.blocks.block_size :])

    def _find_kept(self, hashes: list[bytes]) -> list[bytes]:
        """The first of these that are in the host's memory."""
        host = self.blocks.host
        return hashes[: host.find(hashes)] if host is not None else []

    def _publish(self, seq: Sequence, num_tokens: int) -> None:
        end = min(num_tokens // self.blocks.block_size, len(seq.block_hashes))
        for index in range(seq.num_published, end):
            self.blocks.publish(seq.block_ids[index], seq.block_hashes[index])
        seq.num_published = max(seq.num_published, end)

    def _hash_full_blocks(self, seq: Sequence) -> None:
        """Names for its full blocks of known tokens, as far as they have none yet."""
        if not self.blocks.enable_prefix_cache:
            return
        size, hashes = self.blocks.block_size, seq.block_hashes
        parent = hashes[-1] if hashes else root_hash(seq.request.cache_salt)
        hashes += chain_hashes(parent, seq.token_ids(len(hashes) * size, seq.num_known), size)


def _order(seq: Sequence) -> tuple[int, bool, int]:
    return -seq.request.priority, seq.phase is Phase.THINKING, seq.arrival
