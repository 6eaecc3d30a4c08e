"""Grammars on tokens: what may come when, alone and in an engine with budgets, preemption, chunks and two ranks."""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.flags import builtin_model
from cluster.router.blocks import BlockAllocator
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import FinishReason, SequenceRequest
from cluster.text.tokenizer import Tokenizer
from tests.workers.engine import load, run, runner_config
from tests.workers.ranks import RankProcesses
from workers.errors import GrammarError
from workers.grammar import MAX_CACHED, MAX_TEXT_BYTES, Grammars, GrammarState
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import Grammar, GrammarKind, SamplingParams, StepPlan

POCKET = builtin_model()
VOCAB_SIZE: int = json.loads((POCKET / "config.json").read_text())["vocab_size"]
EXAMPLES: list[dict[str, Any]] = json.loads((POCKET / "examples.json").read_text())
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
CHOICE = 'root ::= "yes" | "no" | "per" "haps"{1,2}'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(POCKET)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(POCKET / "tokenizer.json", VOCAB_SIZE)


def token(name: str, tokenizer: Tokenizer) -> int:
    token_id = tokenizer.token_id(name)
    assert token_id is not None
    return token_id


def state(grammars: Grammars, stop_ids: list[int], kind: GrammarKind, text: str, **more: Any) -> GrammarState:
    output_ids = more.pop("output_ids", [])
    return GrammarState(Grammar(kind, text, **more), stop_ids, grammars, output_ids)


def allowed(matching: GrammarState) -> set[int]:
    mask = matching.allowed()
    assert mask is not None
    return set(np.flatnonzero(mask).tolist())


def test_only_what_matches_may_come_and_the_stop_token_only_at_the_end(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    stop = token("<|im_end|>", tokenizer)
    matching = state(grammars, [stop], "regex", "[0-9]{2}")
    digits = {tokenizer.encode(str(digit))[0] for digit in range(10)}

    for _ in range(2):
        assert allowed(matching) >= digits
        assert stop not in allowed(matching)
        matching.advance(min(digits))

    assert (allowed(matching), matching.is_complete) == ({stop}, True)
    matching.advance(stop)
    assert allowed(matching) == {stop}, "it may be asked once more, one plan ahead"


def test_without_stop_tokens_the_checkpoints_own_end_it(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matching = state(grammars, [], "regex", "a?")

    assert token("<|endoftext|>", tokenizer) in allowed(matching)


@pytest.mark.parametrize("blank", ["", "\n\n"])
def test_it_waits_for_the_end_of_the_thoughts_and_lets_a_blank_line_pass(
    blank: str, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    end = token("</think>", tokenizer)
    matching = state(grammars, [0], "json_object", "", start_id=end)
    for token_id in tokenizer.encode("Let me think: <think> {"):
        assert matching.allowed() is None
        matching.advance(token_id)

    matching.advance(end)
    for token_id in tokenizer.encode(blank):
        assert token_id in allowed(matching)
        matching.advance(token_id)

    starts = {tokenizer.token_bytes[token_id][:1] for token_id in allowed(matching)}
    assert starts == ({b"{"} if blank else {b"{", b"\n"})


def test_a_state_made_of_the_output_so_far_is_the_state_that_saw_each_token(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    end = token("</think>", tokenizer)
    output_ids = [*tokenizer.encode("hm"), end, *tokenizer.encode('\n\n{"name": "Ada", "age": 1')]
    living = state(grammars, [0], "json_schema", SCHEMA, start_id=end)

    for count, token_id in enumerate(output_ids, start=1):
        living.advance(token_id)
        again = state(grammars, [0], "json_schema", SCHEMA, start_id=end, output_ids=output_ids[:count])
        assert np.array_equal(again.allowed(), living.allowed())


def test_a_token_that_does_not_match_leaves_only_the_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matching = state(grammars, [7], "regex", "[0-9]+")

    matching.advance(tokenizer.encode("x")[0])

    assert (allowed(matching), matching.is_complete) == ({7}, True)


def test_the_closing_tag_is_never_a_part_of_the_answer(grammars: Grammars, tokenizer: Tokenizer) -> None:
    end = token("</think>", tokenizer)
    matching = state(grammars, [0], "regex", "(?s:.*)", start_id=end, output_ids=[end])

    assert end not in allowed(matching)


BROKEN: dict[str, tuple[GrammarKind, str]] = {
    "regex": ("regex", "(["),
    "schema that is no JSON": ("json_schema", "{"),
    "schema of an unknown type": ("json_schema", '{"type": 3}'),
    "grammar with an unknown rule": ("ebnf", 'root ::= "a" nope'),
    "too long": ("regex", "a" * (MAX_TEXT_BYTES + 1)),
    "too complex": ("regex", ".*" * 1000),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_grammar_that_cannot_be_used_says_why(name: str, grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match=r"\w+"):
        grammars.matcher(*BROKEN[name])


def test_a_broken_grammar_on_a_rank_ends_its_own_sequence_alone(grammars: Grammars) -> None:
    assert allowed(state(grammars, [7], "regex", "([")) == {7}


def test_compiled_grammars_are_kept_up_to_a_bound(grammars: Grammars) -> None:
    for number in range(MAX_CACHED + 5):
        grammars.matcher("regex", f"a{{{number + 1}}}")

    assert len(grammars._compiled) == MAX_CACHED


def test_a_tokenizer_that_is_missing_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match=r"tokenizer\.json"):
        Grammars(tmp_path / "tokenizer.json", VOCAB_SIZE).matcher("regex", "a")


# In the engine


@dataclass
class Drive:
    """What a run of the real scheduler over a real rank gave."""

    plans: list[StepPlan] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    outputs: dict[Any, list[int]] = field(default_factory=dict)
    finish: dict[Any, FinishReason] = field(default_factory=dict)
    num_preempted: int = 0


def drive(runner: ModelRunner, requests: list[SequenceRequest], *, num_blocks: int, chunk: int) -> Drive:
    """One plan ahead, as in the product."""
    config = SchedulerConfig(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=chunk)
    scheduler = Scheduler(config, BlockAllocator(num_blocks, 16))
    done, in_flight = Drive(outputs={request.key: [] for request in requests}), deque[StepPlan]()
    for request in requests:
        scheduler.add(request)
    while True:
        while (plan := scheduler.schedule()) is not None:
            in_flight.append(plan)
        if not in_flight:
            runner.execute(StepPlan(step=0, close=sorted(_open(done.plans))))
            done.num_preempted = scheduler.num_preempted_total
            return done
        done.plans.append(in_flight.popleft())
        result = runner.execute(done.plans[-1])
        done.tokens.append(result.token_ids)
        for update in scheduler.apply(result):
            done.outputs[update.key] += update.token_ids
            if update.finish is not None:
                done.finish[update.key] = update.finish


def _open(plans: list[StepPlan]) -> set[int]:
    slots: set[int] = set()
    for plan in plans:
        slots = (slots - set(plan.close)) | {opened.slot for opened in plan.open}
    return slots


GRAMMARS: list[tuple[GrammarKind, str]] = [
    ("json_schema", SCHEMA),
    ("regex", r"[A-Z][a-z]{3,9}, [0-9]{4}"),
    ("ebnf", CHOICE),
    ("json_object", ""),
]


def asked(key: int, tokenizer: Tokenizer) -> SequenceRequest:
    """Half of them greedy, half of them wild; some think without end until their budget closes them."""
    kind, text = GRAMMARS[key % len(GRAMMARS)]
    end = token("</think>", tokenizer)
    wild = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, seed=key, presence_penalty=0.1 * (key % 3))
    return SequenceRequest(
        key=key,
        prompt_ids=list(EXAMPLES[key]["prompt_ids"]),
        sampling=wild if key % 2 else SamplingParams(temperature=0.0),
        max_tokens=60,
        stop_token_ids=frozenset({token("<|im_end|>", tokenizer)}),
        starts_thinking=True,
        think_end_id=end,
        thinking_budget=key % 5,
        close_thinking_ids=[*tokenizer.encode("\nTime is up.\n"), end, *tokenizer.encode("\n\n")],
        grammar=Grammar(kind, text, end),
    )


def assert_matches(request: SequenceRequest, output_ids: list[int], finish: FinishReason, tokenizer: Tokenizer) -> None:
    assert request.grammar is not None
    assert request.think_end_id in output_ids
    answer = tokenizer.decode(output_ids[output_ids.index(request.think_end_id) + 1 :]).lstrip("\n")
    if finish is not FinishReason.STOP:
        return
    match request.grammar.kind:
        case "json_schema":
            assert set(json.loads(answer)) == {"name", "age"}
        case "json_object":
            assert isinstance(json.loads(answer), dict)
        case "regex":
            assert re.fullmatch(request.grammar.text, answer)
        case "ebnf":
            assert answer in ("yes", "no", "perhaps", "perhapshaps")


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return load(POCKET)


def test_answers_match_their_grammars_whatever_happens_on_the_way(runner: ModelRunner, tokenizer: Tokenizer) -> None:
    requests = [asked(key, tokenizer) for key in range(16)]

    alone = [drive(runner, [request], num_blocks=64, chunk=64) for request in requests]
    tight = drive(runner, requests, num_blocks=12, chunk=11)

    assert tight.num_preempted > 0
    for request, one in zip(requests, alone, strict=True):
        assert_matches(request, one.outputs[request.key], one.finish[request.key], tokenizer)
        assert tight.outputs[request.key] == one.outputs[request.key]
    for request in requests:
        assert_matches(request, tight.outputs[request.key], tight.finish[request.key], tokenizer)
    assert sum(finish is FinishReason.STOP for finish in tight.finish.values()) >= len(requests) // 2


def test_after_a_forced_close_the_answer_goes_on_as_after_a_prompt_with_it(
    runner: ModelRunner, tokenizer: Tokenizer
) -> None:
    request = replace(asked(4, tokenizer), grammar=None, thinking_budget=7)
    output_ids = drive(runner, [request], num_blocks=64, chunk=9).outputs[4]

    num_forced = len(request.close_thinking_ids)
    assert output_ids[7 : 7 + num_forced] == request.close_thinking_ids
    known = request.prompt_ids + output_ids[: 7 + num_forced]
    plain = replace(request, prompt_ids=known, max_tokens=60 - 7 - num_forced, starts_thinking=False)
    assert drive(runner, [plain], num_blocks=64, chunk=64).outputs[4] == output_ids[7 + num_forced :]


def plans_on_rank(parallel: ParallelState, plans: list[StepPlan]) -> list[list[int]]:
    config = runner_config(POCKET, tp=parallel.world_size, rank=parallel.rank)
    return run(ModelRunner(config, parallel), plans).tokens


def test_two_ranks_follow_the_same_grammars(
    runner: ModelRunner, tokenizer: Tokenizer, two_ranks: RankProcesses
) -> None:
    done = drive(runner, [asked(key, tokenizer) for key in range(8)], num_blocks=26, chunk=11)

    first, second = two_ranks.run(plans_on_rank, done.plans)

    assert first == done.tokens
    assert second == [[] for _ in done.plans]
