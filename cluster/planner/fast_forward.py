"""Decode steps taken together where the production scheduler would decide the same in each, and results booked in bulk.

While everyone who runs decodes, nobody waits who could be admitted and blocks last, each next plan is the last one
again: every sequence gets a token, and a block where its last one is full. So the state behind k such steps is known
without making k plans: what this module writes is what `schedule` and `apply` would have written. As soon as anything
else may happen the scheduler itself decides again. `tests/planner/test_fast_forward.py` holds both ways equal.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.pace import StepLoad
from cluster.router.scheduler import Scheduler
from cluster.router.sequence import Phase, Sequence
from workers.step import StepResult

FILLER_ID, THINK_END_ID = 0, 1
"""All that simulated ranks ever say."""

_FILLER = [FILLER_ID] * 65536
_PACE_REMEMBERS = 128
"""Steps: what it learnt before them has no weight left that a float could show."""
_ENDLESS = 1 << 30


def foresee(scheduler: CopyScheduler) -> int:
    """Results that come without a decision, with plans of decodes alone under way; 0: ask the scheduler at the next."""
    depth = scheduler.num_in_flight
    groups = scheduler.groups
    if not depth or not all(_is_steady(group, depth) for group in groups):
        return 0
    running = [seq for group in groups for seq in group.running]
    most = min((seq.max_output - len(seq.output_ids) for seq in running), default=_ENDLESS)
    if scheduler.num_unfinished > len(running):
        most -= depth  # somebody waits, whom an end lets in: the plans around it are the scheduler's
    return min((_with_blocks(group, most) for group in groups), default=0)


def skip(
    scheduler: CopyScheduler, num_steps: int, thinking_tokens: Callable[[Hashable], int]
) -> list[tuple[Hashable, int]]:
    """The state behind so many results, each with the plan that follows it. At most what `foresee` said.

    `thinking_tokens`: of a request's key, how many tokens its thoughts have. Returns whose first answer token is among
    the results, and which of them it is, from 1. Follow with `end_those_who_are_full`.
    """
    answers: list[tuple[Hashable, int]] = []
    for group in scheduler.groups:
        blocks, block_size = group.blocks, group.blocks.block_size
        for seq in group.running:
            output_ids = seq.output_ids
            num_before = len(output_ids)
            if num_steps < len(_FILLER):
                output_ids += _FILLER[:num_steps]
            else:
                output_ids += [FILLER_ID] * num_steps
            seq.num_computed += num_steps
            num_missing = -(-seq.num_computed // block_size) - len(seq.block_ids)
            if num_missing > 0:
                seq.block_ids += blocks.allocate(num_missing)
            if seq.phase is Phase.THINKING or num_before == 0:
                key = seq.request.key
                num_thinking = thinking_tokens(key)
                _think(seq, num_before, num_steps, num_thinking)
                if num_before <= num_thinking < num_before + num_steps:
                    answers.append((key, num_thinking - num_before + 1))
            elif output_ids[num_before - 1] == THINK_END_ID:
                answers.append((seq.request.key, 1))
    return answers


def pass_time(scheduler: CopyScheduler, num_steps: int, seconds: Callable[[int], float]) -> None:
    """What the pace of prompts learns from so many foreseen steps, of which each lasts so long."""
    pace = scheduler.pace
    if not pace.is_limiting:
        return
    load = StepLoad(sum(group.num_running for group in scheduler.groups), 0)
    is_asked = scheduler.num_unfinished > sum(group.num_running for group in scheduler.groups)
    for step in range(max(0, num_steps - _PACE_REMEMBERS), num_steps):
        pace.took(seconds(step))
        if is_asked:
            scheduler.most_prompt_tokens()
        pace.sent(load)


def end_those_who_are_full(scheduler: CopyScheduler) -> list[Hashable]:
    """Who has all of its output ends; who has it with plans under way is in no later ones. Returns who has ended."""
    depth = scheduler.num_in_flight
    ended = []
    for group in scheduler.groups:
        for seq in list(group.running):
            num_left = seq.max_output - len(seq.output_ids)
            if num_left < depth:
                _leave_plans(group, seq, num_left)
            if num_left == 0:
                ended.append(seq.request.key)
    # A plan that has nobody left would never have been made.
    while scheduler.num_in_flight and not any(group.in_flight.newest.computed for group in scheduler.groups):
        for group in scheduler.groups:
            group.in_flight.drop_newest()
    for key in ended:
        scheduler.cancel(key)
    plans = zip(*(group.in_flight for group in scheduler.groups), strict=True)
    scheduler.pace.are_under_way(StepLoad(sum(len(plan.sampled) for plan in step), 0) for step in plans)
    return ended


def _leave_plans(group: Scheduler, seq: Sequence, num_left: int) -> None:
    """Only the oldest plans under way bring it tokens."""
    for place, plan in enumerate(group.in_flight):
        if place >= num_left:
            plan.sampled.remove(seq)
            plan.computed.remove(seq)
            seq.num_pending -= 1
            seq.num_computed -= 1


def is_plain(group: Scheduler) -> bool:
    """The oldest result brings everyone in it a token, and nothing else."""
    done = group.in_flight.oldest
    return not done.scored and not done.drafted and all(map(_takes_a_token, done.sampled))


def apply_plain(group: Scheduler, result: StepResult) -> None:
    """What `Scheduler.apply` does with such a result."""
    for seq, token_id in zip(group.in_flight.take(result).sampled, result.token_ids, strict=True):
        seq.output_ids.append(token_id)
        seq.num_pending -= 1
        if seq.phase is Phase.THINKING:
            seq.num_thinking += 1
            if token_id == THINK_END_ID:
                seq.phase = Phase.ANSWER


def contexts(group: Scheduler) -> list[tuple[int, int]]:
    """For each plan of decodes under way, oldest first: how many sequences it has, and what they read together."""
    # `num_computed` is where a sequence stands in the last plan that has it, and it has one token less in each before.
    return [
        (len(plan.sampled), sum(seq.num_computed - (seq.num_pending - 1 - place) for seq in plan.sampled))
        for place, plan in enumerate(group.in_flight)
    ]


def _takes_a_token(seq: Sequence) -> bool:
    is_whole = seq.finish is None and seq.slot is not None and not seq.num_stale and not seq.num_undelivered
    return is_whole and seq.thinking_budget is None and len(seq.output_ids) + 1 < seq.max_output


def _think(seq: Sequence, num_before: int, num_steps: int, num_thinking: int) -> None:
    """Its thoughts go on, or end with the closing tag."""
    if seq.phase is not Phase.THINKING:
        return
    if num_before + num_steps < num_thinking:
        seq.num_thinking += num_steps
        return
    seq.output_ids[num_thinking - 1] = THINK_END_ID
    seq.num_thinking += num_thinking - num_before
    seq.phase = Phase.ANSWER


def _is_steady(group: Scheduler, depth: int) -> bool:
    """All that run decode in each plan under way, and nobody else is about to."""
    num_running = group.num_running
    for plan in group.in_flight:
        if len(plan.computed) != num_running or len(plan.sampled) != num_running or plan.drafted or plan.admitted:
            return False
    for seq in group.running:
        if seq.num_pending != depth or seq.num_computed < seq.prefill_end or seq.must_reopen or seq.num_stale:
            return False
    # Back as soon as its last token is known, or when another suspect is cleared.
    return not any(seq.num_pending or seq.num_stale or seq.num_strikes for seq in group.waiting)


def _with_blocks(group: Scheduler, most: int) -> int:
    """As many of these steps as the free blocks last for."""
    blocks, running = group.blocks, list(group.running)
    if not running:
        return most
    # Nobody needs more than this: usually it is there.
    if blocks.num_free >= len(running) * (blocks.num_blocks_for(max(most, 0)) + 1):
        return most
    while most > 0:
        wanted = sum(max(0, blocks.num_blocks_for(seq.num_computed + most) - len(seq.block_ids)) for seq in running)
        if wanted <= blocks.num_free:
            return most
        most = min(most // 2, most * blocks.num_free // wanted)
    return 0
