"""Decode steps taken together where the production scheduler would decide the same in each, and results booked in bulk.

While everyone who runs has a token in the newest plan, nobody waits who could be admitted and blocks last, each next
plan is known: every sequence gets a token, and a block where its last one is full. So the state behind k such steps is
known without making k plans: what this module writes is what `schedule` and `apply` would have written. As soon as
anything else may happen the scheduler itself decides again. `tests/planner/test_fast_forward.py` holds both ways equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import NamedTuple

from cluster.planner.ahead import Ahead, Sent
from cluster.planner.fillers import FILLER_ID, THINK_END_ID
from cluster.planner.step_shape import ENDLESS, GroupShape
from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.scheduler import Scheduler
from cluster.router.sequence import Phase, Sequence
from workers.step import StepResult

_FILLER = [FILLER_ID] * 65536
_THINKING = Phase.THINKING


class Foreseen(NamedTuple):
    """What is certain to come."""

    num_steps: int
    """Results, each with the plan that follows it."""
    next_shape: list[GroupShape]
    """Of the plan behind those under way."""


class Told(NamedTuple):
    """What results bring a sequence, beyond another token. Results count from 1."""

    key: Hashable
    token: int | None
    """The first with a token of it, of a sequence that had none or is watched; None: of another sequence."""
    answer: int | None
    """The one with the first token of its answer; None: none of them."""


class Skipped(NamedTuple):
    """What was written, and what is left to do."""

    told: list[Told]
    lacking: list[tuple[Scheduler, Sequence]]
    """Who may lack a block for the newest plan, which is made when those have left who end before it."""


class Ends(NamedTuple):
    """What has become of those who have all of their output, or nearly."""

    keys: list[Hashable]
    """Who has ended."""
    has_changed: bool
    """Plans under way have lost someone."""


def foresee(scheduler: CopyScheduler) -> Foreseen | None:
    """Results that come without a decision; None: ask the scheduler at the next."""
    depth = scheduler.num_in_flight
    if not depth:
        return None
    groups = scheduler.groups
    most, shape, num_running = ENDLESS, [], 0
    for group in groups:
        steady = _steady(group, depth)
        if steady is None:
            return None
        most = min(most, steady.num_steps)
        shape.append(steady.next_shape)
        num_running += group.num_running
    if scheduler.num_unfinished > num_running:
        most -= depth  # somebody waits, whom an end lets in: the plans around it are the scheduler's
    most = min(_with_blocks(group, most) for group in groups)
    return Foreseen(most, shape) if most > 0 and num_running else None


def skip(
    scheduler: CopyScheduler,
    num_steps: int,
    thinking_tokens: Mapping[Hashable, int],
    watched: Collection[Hashable] = (),
) -> Skipped:
    """The state behind so many results, each with the plan that follows it. At most what `foresee` said.

    `thinking_tokens`: of a request's key, how many tokens its thoughts have; `watched`: of whom to tell the first of
    these tokens, though they have had others. Follow with `end_those_who_are_full`, then `give_blocks`.
    """
    told: list[Told] = []
    lacking: list[tuple[Scheduler, Sequence]] = []
    depth = scheduler.num_in_flight
    filler = _FILLER if num_steps < len(_FILLER) else [FILLER_ID] * num_steps
    for group in scheduler.groups:
        blocks, block_size = group.blocks, group.blocks.block_size
        for seq in group.running:
            num_tokens = num_steps
            if seq.num_pending != depth:
                num_tokens -= depth - seq.num_pending  # results before the first with a token of it
                seq.num_pending = min(depth, seq.num_pending + num_steps)
            seq.num_computed = num_computed = seq.num_computed + num_steps
            block_ids = seq.block_ids
            num_missing = -(-num_computed // block_size) - len(block_ids)
            if num_missing > 0:
                # Of its last token nothing is computed, nor planned: see `end_those_who_are_full`.
                num_held = min(num_computed, len(seq.request.prompt_ids) + seq.max_output - 1)
                if num_held == num_computed and num_held % block_size == 1:
                    lacking.append((group, seq))
                    num_held -= 1
                block_ids += blocks.allocate(-(-num_held // block_size) - len(block_ids))
            if num_tokens <= 0:
                continue
            output_ids = seq.output_ids
            num_before = len(output_ids)
            output_ids += filler[:num_tokens]
            if num_before and not watched:
                if seq.phase is _THINKING:
                    if num_before + num_tokens < thinking_tokens[seq.request.key]:
                        seq.num_thinking += num_tokens
                        continue
                elif output_ids[num_before - 1] != THINK_END_ID:
                    continue
            one = _tell(seq, num_steps - num_tokens, num_before, num_tokens, thinking_tokens[seq.request.key])
            if one.answer is not None or not num_before or one.key in watched:
                told.append(one)
        group.passed(num_steps)
    return Skipped(told, lacking)


def give_blocks(lacking: Collection[tuple[Scheduler, Sequence]]) -> None:
    """To those who go on."""
    for group, seq in lacking:
        blocks = group.blocks
        if seq.slot is not None and seq.num_computed > len(seq.block_ids) * blocks.block_size:
            seq.block_ids += blocks.allocate(1)


def pass_time(scheduler: CopyScheduler, ahead: Ahead, sent: Collection[Sent], num_steps: int) -> None:
    """What the pace of prompts learns from so many foreseen steps; `sent`: those that were under way before them."""
    pace = scheduler.pace
    if not pace.is_limiting:
        return
    num_running = sum(group.num_running for group in scheduler.groups)
    is_asked = scheduler.num_unfinished > num_running
    load = ahead.decode.load
    for one, _ in zip(sent, range(num_steps), strict=False):
        pace.took(one.total_s)
        if is_asked:
            scheduler.most_prompt_tokens()
        pace.sent(load)
    if num_steps > len(sent):
        pace.took_alike(ahead.decode.total_s, ahead.growth_s, num_steps - len(sent))


def end_those_who_are_full(scheduler: CopyScheduler) -> Ends:
    """Who has all of its output ends; who has it with plans under way is in no later ones."""
    groups = scheduler.groups
    ended = []
    has_changed = False
    for group in groups:
        for seq in group.running:
            num_left = seq.max_output - len(seq.output_ids)
            if num_left < seq.num_pending:
                _leave_plans(group, seq, num_left)
                has_changed = True
                if not num_left:
                    ended.append(seq.request.key)
    # A plan that has nobody left would never have been made.
    while has_changed and scheduler.num_in_flight and not any(group.in_flight.newest.computed for group in groups):
        for group in groups:
            group.in_flight.drop_newest()
    for key in ended:
        scheduler.cancel(key)
    return Ends(ended, has_changed)


def _leave_plans(group: Scheduler, seq: Sequence, num_left: int) -> None:
    """Only the oldest of its plans under way bring it tokens."""
    num_too_many = seq.num_pending - num_left
    for plan in list(group.in_flight)[-num_too_many:]:
        plan.sampled.remove(seq)
        plan.computed.remove(seq)
    seq.num_pending -= num_too_many
    seq.num_computed -= num_too_many


def is_plain(group: Scheduler) -> bool:
    """The oldest result brings everyone in it a token, and nothing else."""
    done = group.in_flight.oldest
    if done.scored or done.drafted:
        return False
    for seq in done.sampled:
        if seq.has_ended or seq.slot is None or seq.num_stale or seq.num_undelivered:
            return False
        if seq.thinking_budget is not None or len(seq.output_ids) + 1 >= seq.max_output:
            return False
    return True


def apply_plain(group: Scheduler, result: StepResult) -> None:
    """What `Scheduler.apply` does with such a result."""
    for seq, token_id in zip(group.in_flight.take(result).sampled, result.token_ids, strict=True):
        seq.output_ids.append(token_id)
        seq.num_pending -= 1
        if seq.phase is _THINKING:
            seq.num_thinking += 1
            if token_id == THINK_END_ID:
                seq.phase = Phase.ANSWER


def contexts(group: Scheduler) -> list[GroupShape]:
    """For each plan under way, oldest first, what it is if it has decodes alone."""
    # `num_computed` is where a sequence stands in the newest plan that has it; it has a token less in each before.
    num_later: Counter[Sequence] = Counter()
    shapes = []
    for plan in reversed(list(group.in_flight)):
        shapes.append(GroupShape(len(plan.sampled), sum(seq.num_computed - num_later[seq] for seq in plan.sampled)))
        num_later.update(plan.sampled)
    return shapes[::-1]


def _tell(seq: Sequence, num_late: int, num_before: int, num_tokens: int, num_thinking: int) -> Told:
    """Its thoughts go on, or end with the closing tag."""
    answer = None
    if num_before <= num_thinking < num_before + num_tokens:
        answer = num_late + num_thinking - num_before + 1
    if seq.phase is Phase.THINKING:
        if num_before + num_tokens < num_thinking:
            seq.num_thinking += num_tokens
        else:
            seq.output_ids[num_thinking - 1] = THINK_END_ID
            seq.num_thinking += num_thinking - num_before
            seq.phase = Phase.ANSWER
    return Told(seq.request.key, num_late + 1, answer)


class _Steady(NamedTuple):
    num_steps: int
    next_shape: GroupShape


def _steady(group: Scheduler, depth: int) -> _Steady | None:
    """All that run have a token in the newest plan, and in each behind the first that has one; nobody else is about to.

    Says in how many results the first of them has all of its output.
    """
    plans, num_running = group.in_flight, group.num_running
    newest = plans.newest
    if len(newest.computed) != num_running:
        return None
    num_sampled = 0
    for place, plan in enumerate(plans):
        size = len(plan.sampled)
        if plan.drafted or plan.scored or (size != num_running and (place or depth == 1)):
            return None
        num_sampled += size
    # Back as soon as its last token is known, or when another suspect is cleared.
    if group.num_waiting and any(seq.num_pending or seq.num_stale or seq.num_strikes for seq in group.waiting):
        return None
    most, context = ENDLESS, 0
    for seq in group.running:
        num_pending, num_computed = seq.num_pending, seq.num_computed
        if not num_pending or num_computed < seq.prefill_end or seq.must_reopen or seq.num_stale:
            return None
        num_sampled -= num_pending
        context += num_computed
        num_left = seq.max_output - len(seq.output_ids) - num_pending
        if num_left < most:
            most = num_left
    if num_sampled:
        return None  # some plan has a token of one who runs no longer
    return _Steady(depth + most, GroupShape(num_running, context + num_running))


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
