"""Many decode steps at once, where the production scheduler would decide the same in each of them.

While everyone who runs decodes, nobody can be admitted, nobody ends and blocks last, each next plan is the last one
again: every sequence gets a token, and a block where its last one is full. So the state behind k such steps is known
without making k plans: what this module writes is what `schedule` and `apply` would have written. As soon as anything
else may happen, the scheduler itself decides again. `tests/planner/test_fast_forward.py` holds both ways equal.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.scheduler import Scheduler
from cluster.router.sequence import Phase
from cluster.router.sequence import Sequence as Running

FILLER_ID, THINK_END_ID = 0, 1
"""All that simulated ranks ever say."""

_FILLER = [FILLER_ID] * 65536


def steps_ahead(scheduler: CopyScheduler) -> int:
    """Results of how many steps are foreseen from here; 0: the scheduler must be asked."""
    depth = scheduler.num_in_flight
    if not depth:
        return 0
    return min((_group_steps_ahead(group, depth) for group in scheduler.groups), default=0)


def skip(
    scheduler: CopyScheduler, num_steps: int, thinking_tokens: Callable[[Hashable], int]
) -> list[tuple[Hashable, int]]:
    """The state behind so many results, each with the plan that follows it. At most `steps_ahead`.

    `thinking_tokens`: of a request's key, how many tokens its thoughts have. Returns whose first answer token is among
    the results, and which of them it is, from 1.
    """
    answers: list[tuple[Hashable, int]] = []
    for group in scheduler.groups:
        blocks = group.blocks
        for seq in group.running:
            num_before = len(seq.output_ids)
            _extend(seq, num_steps)
            seq.num_computed += num_steps
            num_missing = blocks.num_blocks_for(seq.num_computed) - len(seq.block_ids)
            if num_missing > 0:
                seq.block_ids += blocks.allocate(num_missing)
            num_thinking = thinking_tokens(seq.request.key)
            if seq.phase is Phase.THINKING:
                _think(seq, num_before, num_steps, num_thinking)
            if num_before <= num_thinking < num_before + num_steps:
                answers.append((seq.request.key, num_thinking - num_before + 1))
    return answers


def _extend(seq: Running, num_steps: int) -> None:
    while num_steps > 0:
        seq.output_ids += _FILLER[:num_steps]
        num_steps -= len(_FILLER)


def _think(seq: Running, num_before: int, num_steps: int, num_thinking: int) -> None:
    """Its thoughts go on, or end with the closing tag."""
    if num_before + num_steps < num_thinking:
        seq.num_thinking += num_steps
        return
    seq.output_ids[num_thinking - 1] = THINK_END_ID
    seq.num_thinking += num_thinking - num_before
    seq.phase = Phase.ANSWER


def _group_steps_ahead(group: Scheduler, depth: int) -> int:
    num_running = group.num_running
    for plan in group.in_flight:
        # Who is sampled of all plans, and nothing else computed: plans of decodes alone.
        if len(plan.computed) != num_running or len(plan.sampled) != num_running or plan.drafted or plan.admitted:
            return 0
    most = 1 << 30
    for seq in group.running:
        if seq.num_pending != depth or seq.is_prefilling or seq.must_reopen or seq.num_stale or seq.thinking_budget:
            return 0
        most = min(most, seq.max_output - len(seq.output_ids) - depth)
    if any(seq.num_pending or seq.num_stale or seq.num_strikes for seq in group.waiting):
        return 0  # back as soon as its last token is known, or another suspect is cleared
    return _with_blocks(group, most)


def _with_blocks(group: Scheduler, most: int) -> int:
    """As many of these steps as the free blocks last for."""
    blocks, running = group.blocks, list(group.running)
    if not running or most <= 0:
        return most
    while most > 0:
        wanted = sum(max(0, blocks.num_blocks_for(seq.num_computed + most) - len(seq.block_ids)) for seq in running)
        if wanted <= blocks.num_free:
            return most
        # Each step needs at most a block of everyone; what is free lasts at least for these.
        most = min(most // 2, max(most * blocks.num_free // wanted, 0))
    return 0
