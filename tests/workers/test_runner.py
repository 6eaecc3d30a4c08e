"""The runner as the Router sees it: plans in, results out; and plans that break the contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.workers.engine import (
    BLOCKS_PER_SLOT,
    GREEDY,
    decode_steps,
    load,
    open_slot,
    random_prompts,
    run,
    run_on_rank,
    whole_prompts,
)
from tests.workers.ranks import RankProcesses
from workers.checkpoint import Checkpoint
from workers.config import ModelConfig, ParallelLayout, RunnerConfig
from workers.errors import KernelError, KVMemoryError, LayoutError, PlanError
from workers.parallel import ParallelState
from workers.rank_group import RankGroup
from workers.runner import ModelRunner
from workers.step import ExtendSlot, OpenSlot, Prefill, SamplingParams, StepPlan
from workers.threads import ThreadChooser

SEEDED = [SamplingParams(temperature=0.9, top_k=(0, 20)[slot % 2], top_p=0.95, seed=slot) for slot in range(12)]
PROMPTS = random_prompts([3 + 5 * slot for slot in range(12)], 301, seed=8)


def tokens_by_slot(ran_tokens: list[list[int]], count: int) -> list[list[int]]:
    return [[tokens[slot] for tokens in ran_tokens] for slot in range(count)]


def sampled_together(directory: Path) -> list[list[int]]:
    plans = [whole_prompts(PROMPTS, SEEDED), *decode_steps(list(range(12)), 9)]
    return tokens_by_slot(run(load(directory), plans).tokens, 12)


def test_a_seeded_request_samples_the_same_tokens_alone_as_in_a_batch(moe_fp8: Path) -> None:
    together = sampled_together(moe_fp8)
    runner = load(moe_fp8)
    for slot in range(12):
        # In another slot, in chunks, and after other requests have used the blocks.
        opened = open_slot(1, SEEDED[slot])
        prompt, cut = PROMPTS[slot], len(PROMPTS[slot]) // 2
        plans = [
            StepPlan(step=1, open=[opened], prefills=[Prefill(1, 0, prompt[:cut], False)]),
            StepPlan(step=2, prefills=[Prefill(1, cut, prompt[cut:], True)]),
            *decode_steps([1], 9),
            StepPlan(step=3, close=[1]),
        ]
        ran = run(runner, plans)
        assert [tokens[0] for tokens in ran.tokens if tokens] == together[slot]


def test_prompts_of_equal_length_beside_a_chunk_and_a_decode_sample_as_they_do_alone(moe_fp8: Path) -> None:
    prompts = random_prompts([9, 9, 30, 9, 9, 12], 301, seed=4)
    prefills = [Prefill(slot, 0, prompt, True) for slot, prompt in enumerate(prompts)]
    prefills[2] = Prefill(2, 21, prompts[2][21:], True)
    plans = [
        StepPlan(step=1, open=[open_slot(2)], prefills=[Prefill(2, 0, prompts[2][:21], False)]),
        StepPlan(step=2, open=[open_slot(5)], prefills=prefills[5:]),
        StepPlan(step=3, open=[open_slot(slot) for slot in (0, 1, 3, 4)], prefills=prefills[:5], decodes=[5]),
    ]
    _, (first,), together = run(load(moe_fp8), plans).tokens

    alone = [run(load(moe_fp8), [whole_prompts([prompt]), *decode_steps([0], 1)]).tokens for prompt in prompts]

    assert together == [*(tokens[0][0] for tokens in alone[:5]), alone[5][1][0]]
    assert first == alone[5][0][0]


def test_a_seeded_request_samples_the_same_tokens_on_two_ranks(moe_fp8: Path, two_ranks: RankProcesses) -> None:
    plans = [whole_prompts(PROMPTS, SEEDED), *decode_steps(list(range(12)), 9)]
    ranks = two_ranks.run(run_on_rank, moe_fp8, plans)
    assert tokens_by_slot(ranks[0].tokens, 12) == sampled_together(moe_fp8)


def test_a_replay_after_a_preemption_continues_as_before(moe_fp8: Path) -> None:
    params = SamplingParams(temperature=0.9, frequency_penalty=0.4, seed=3)
    prompt = PROMPTS[5]
    runner = load(moe_fp8)
    opened = open_slot(0, params, prompt_ids=prompt)
    first = StepPlan(step=1, open=[opened], prefills=[Prefill(0, 0, prompt, True)])
    undisturbed = [tokens[0] for tokens in run(runner, [first, *decode_steps([0], 9)]).tokens]

    kept = undisturbed[:4]
    again = open_slot(2, params, prompt_ids=prompt, output_ids=kept)
    replay = StepPlan(step=20, close=[0], open=[again], prefills=[Prefill(2, 0, prompt + kept, True)])
    ran = run(runner, [replay, *decode_steps([2], 5)])

    assert kept + [tokens[0] for tokens in ran.tokens] == undisturbed


def test_blocks_may_come_one_by_one_while_a_sequence_grows(moe_fp8: Path) -> None:
    prompt, num_tokens = PROMPTS[3], 40
    whole = run(load(moe_fp8), [whole_prompts([prompt]), *decode_steps([0], num_tokens)]).tokens
    opened = open_slot(0, block_ids=[5, 9])
    plans = [StepPlan(step=1, open=[opened], prefills=[Prefill(0, 0, prompt, True)])]
    for step, plan in enumerate(decode_steps([0], num_tokens)):
        position = len(prompt) + step
        extend = [ExtendSlot(0, [30 + step])] if position % 16 == 0 else []
        plans.append(StepPlan(step=plan.step, extend=extend, decodes=[0]))
    assert run(load(moe_fp8), plans).tokens == whole


def test_results_name_the_step_and_only_rank_zero_names_tokens(moe_fp8: Path, two_ranks: RankProcesses) -> None:
    ranks = two_ranks.run(run_on_rank, moe_fp8, [whole_prompts(PROMPTS[:2])])
    assert [(ran.results[0].step, ran.results[0].rank, len(ran.results[0].token_ids)) for ran in ranks] == [
        (1, 0, 2),
        (1, 1, 0),
    ]


@pytest.mark.parametrize("call", ["all layers", "half a layer"])
@pytest.mark.parametrize("checkpoint", ["dense_fp8", "moe_fp8"])
def test_many_kernels_in_one_call_give_the_bits_of_one_by_one(
    call: str, checkpoint: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(checkpoint)
    cut = StepPlan(step=2, open=[open_slot(12)], prefills=[Prefill(12, 0, PROMPTS[4], False)], decodes=list(range(12)))
    last = StepPlan(step=3, prefills=[Prefill(12, len(PROMPTS[4]), PROMPTS[5], True)], decodes=list(range(12)))
    plans = [whole_prompts(PROMPTS), cut, last, *decode_steps(list(range(13)), 3)]
    runner, one_by_one = load(directory), load(directory)
    if runner.decoder.stack is None:
        pytest.skip("no compiled kernels on this machine")
    for decoder in (runner.decoder, one_by_one.decoder) if call == "half a layer" else (one_by_one.decoder,):
        decoder.stack = None
    for layer in one_by_one.decoder.layers:
        layer.attention_half, layer.feed_forward_half = None, None

    want, got = run(one_by_one, plans), run(runner, plans)

    assert len(got.logits) == len(want.logits) == len(plans)
    assert all(torch.equal(one, other) for one, other in zip(got.logits, want.logits, strict=True))


def test_a_small_step_runs_on_one_thread_and_a_large_one_on_all(moe_fp8: Path) -> None:
    weights = Checkpoint.open(moe_fp8).read(RunnerConfig(model_dir=str(moe_fp8)).spec)
    threads = ThreadChooser(ModelConfig.from_dir(moe_fp8), weights, num_threads=6)
    assert threads.choose(1) == 1
    assert threads.choose(4096) == 6


def test_a_plan_without_tokens_answers_at_once(moe_runner: ModelRunner) -> None:
    result = moe_runner.execute(StepPlan(step=77))
    assert (result.step, result.token_ids) == (77, [])


BREACHES: dict[str, tuple[list[StepPlan], str]] = {
    "decode of a closed slot": ([StepPlan(step=1, decodes=[3])], "slot 3 is not open"),
    "slot out of range": ([StepPlan(step=1, open=[open_slot(0), OpenSlot(40, [0], 0, GREEDY)])], "slot 40 is outside"),
    "slot opened twice": ([StepPlan(step=1, open=[open_slot(0), open_slot(0)])], "slot 0 is already open"),
    "close of a closed slot": ([StepPlan(step=1, close=[2])], "close: slot 2 is not open"),
    "decode without a sampled token": (
        [StepPlan(step=1, open=[open_slot(0)], prefills=[Prefill(0, 0, [1], False)]), StepPlan(step=2, decodes=[0])],
        "slot 0 has no sampled token",
    ),
    "prefill with a gap": (
        [StepPlan(step=1, open=[open_slot(0)], prefills=[Prefill(0, 4, [1], True)])],
        "slot 0 starts 1 tokens at 4, its next position is 0",
    ),
    "empty prefill": (
        [StepPlan(step=1, open=[open_slot(0)], prefills=[Prefill(0, 0, [], True), Prefill(0, 0, [1], True)])],
        "computes a slot twice",
    ),
    "too few blocks": (
        [StepPlan(step=1, open=[open_slot(0, block_ids=[1])], prefills=[Prefill(0, 0, [1] * 17, True)])],
        "slot 0 needs 17 positions, blocks hold 16",
    ),
    "too many blocks": (
        [StepPlan(step=1, open=[open_slot(0, block_ids=list(range(BLOCKS_PER_SLOT + 1)))])],
        f"slot 0 would have {BLOCKS_PER_SLOT + 1} blocks",
    ),
    "unknown block": ([StepPlan(step=1, open=[open_slot(0, block_ids=[10**6])])], "slot 0 gets a block outside"),
    "more cached than held": (
        [StepPlan(step=1, open=[open_slot(0, block_ids=[1], num_cached=17)])],
        "claims 17 cached tokens, its blocks hold 16",
    ),
    "unknown token": (
        [StepPlan(step=1, open=[open_slot(0)], prefills=[Prefill(0, 0, [301], True)])],
        r"token ids in \[301, 301\], the vocabulary has 301",
    ),
    "slot decoded twice": (
        [whole_prompts([[1, 2]]), StepPlan(step=2, decodes=[0, 0])],
        "step 2 computes a slot twice",
    ),
    "other tokens than its group has": (
        [StepPlan(step=1, group_tokens=[2])],
        r"step 1 computes 0 tokens in group 0 of 1, its group_tokens are \[2\]",
    ),
    "groups that are not there": (
        [StepPlan(step=1, group_tokens=[0, 2])],
        r"step 1 computes 0 tokens in group 0 of 1, its group_tokens are \[0, 2\]",
    ),
    "over the token budget": (
        [StepPlan(step=1, prefills=[Prefill(0, 0, [1] * 3000, True)])],
        "3000 tokens, the rank was started for 2048",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_plan_that_breaks_the_contract_is_refused_by_name(name: str, dense_fp8: Path) -> None:
    plans, message = BREACHES[name]
    runner = load(dense_fp8)
    for plan in plans[:-1]:
        runner.execute(plan)
    with pytest.raises(PlanError, match=message):
        runner.execute(plans[-1])


def test_a_kv_pool_too_small_for_one_block_is_refused_with_both_sizes(dense_fp8: Path) -> None:
    with pytest.raises(KVMemoryError, match="1000 bytes of KV memory hold no block of 65536"):
        load(dense_fp8, kv_memory_bytes=1000)


def test_a_kv_pool_beyond_memory_is_refused_with_what_it_needs_and_what_is_free(dense_fp8: Path) -> None:
    needs = rf"rank 0 needs 1.13e\+06 GB for {2**34} KV blocks, \d\S* are free; lower kv_memory_bytes"
    with pytest.raises(KVMemoryError, match=needs):
        load(dense_fp8, kv_memory_bytes=2**50, max_num_seqs=2**20, max_model_len=2**20)


def test_a_kv_pool_leaves_to_steps_what_they_hold(dense_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes, a_block = 10 * 2**20, 65536
    monkeypatch.setattr("workers.runner.free_bytes", lambda _device: free_bytes)
    monkeypatch.setattr("workers.runner.held_by_steps", lambda *_: free_bytes - 5 * a_block)
    assert load(dense_fp8, kv_memory_bytes=None).num_blocks == 5
    load(dense_fp8, kv_memory_bytes=5 * a_block)
    with pytest.raises(KVMemoryError, match=r"6 KV blocks, 0.0105 are free, and steps take 0.0102; lower kv_memory"):
        load(dense_fp8, kv_memory_bytes=6 * a_block)
    monkeypatch.setattr("workers.runner.held_by_steps", lambda *_: free_bytes)
    with pytest.raises(
        KVMemoryError, match=r"no room for KV: 0.0105 GB are free, and steps take 0.0105; lower max_num"
    ):
        load(dense_fp8, kv_memory_bytes=None)


def test_the_pool_is_no_larger_than_all_slots_can_use(dense_fp8: Path) -> None:
    runner = load(dense_fp8, max_num_seqs=3, kv_memory_bytes=2**30)
    assert runner.num_blocks == 3 * BLOCKS_PER_SLOT
    assert runner.kv_bytes == sum(pool.nbytes for pool in runner.kv.layers)


def test_products_that_the_cpu_does_not_have_are_refused(dense_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.checkpoint.multiplies_bf16", lambda: False)
    with pytest.raises(KernelError, match=r"need a CPU with avx512_bf16.*; take --products fp32"):
        load(dense_fp8, products="bf16")


def test_a_layout_that_cannot_split_is_refused_before_loading(dense_fp8: Path) -> None:
    config = RunnerConfig(model_dir=str(dense_fp8), layout=ParallelLayout(tp=3))
    problem = "4 attention heads are not divisible by 3; the nearest that work: tp=1·dp=3, tp=2, tp=1·dp=2, tp=2·dp=2"
    with pytest.raises(LayoutError, match=problem):
        ModelRunner(config, ParallelState(0, config.layout, RankGroup(0, 3, None), RankGroup(0, 3, None)))


def test_weights_beyond_memory_are_refused_with_what_redundant_experts_take(
    moe_fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.device.free_bytes", lambda _device: 10**6)
    needs = (
        r"rank 0 of tp=1 needs 0.00\d+ GB for its weights \(0.00\d+ of them for 9 redundant experts\), 0.001 are free"
    )
    with pytest.raises(LayoutError, match=needs):
        load(moe_fp8, redundant_experts=9)
