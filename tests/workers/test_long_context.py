"""Contexts of 262,144 tokens, and KV pools whose cells no 32-bit number can count.

A model of one layer computes no attention but that of sampled rows, so that a whole context takes seconds. Its tokens'
K and V depend on nothing but the token and its place, which makes an oracle of a few lines possible.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.router.blocks import BlockAllocator
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import FinishReason, SequenceRequest
from tests.checkpoints import DENSE, MOE, read_tensors, write_checkpoint
from tests.workers.engine import GREEDY, Ran, blocks_of, in_step, load, open_slot, run, runner_config
from tests.workers.ranks import TIMEOUT_S, RankProcesses
from tests.workers.sparse import sparse_zeros
from workers.config import ParallelLayout
from workers.errors import PlanError
from workers.kernels.decode_attention import PagedKeys, decode_attention
from workers.kernels.prefill_attention import Chunks, prefill_attention
from workers.kernels.qk_norm_rope import qk_norm_rope_store
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.slots import SlotStates
from workers.step import OpenSlot, Prefill, StepPlan

CONTEXT = 262_144
TINY: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "eos_token_id": 63,
    "max_position_embeddings": CONTEXT,
}
LIMITS = {"max_model_len": CONTEXT, "max_num_seqs": 2, "max_num_batched_tokens": 8192, "block_size": 32}
BLOCK_SIZE, HEAD_DIM = 16, 128
FAR_BLOCKS = 2**31 // (BLOCK_SIZE * HEAD_DIM) + 64
"""Within one head alone, the last of them begin behind 2^31 elements and 2^33 bytes."""


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), DENSE, fp8=False, **TINY)


def prompt_of(length: int) -> list[int]:
    return torch.randint(0, 63, (length,), generator=torch.Generator().manual_seed(5)).tolist()


def oracle_logits(directory: Path, token_ids: list[int], num_last: int) -> Tensor:
    """Of the last rows, in double precision; angles are products in fp32, as in transformers. [num_last, V]"""
    weights = {name.removeprefix("model."): tensor.double() for name, tensor in read_tensors(directory).items()}
    of = {name.removeprefix("layers.0."): tensor for name, tensor in weights.items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + DENSE["rms_norm_eps"]) * weight

    def rotate(x: Tensor) -> Tensor:
        exponents = torch.arange(0, TINY["head_dim"], 2).float() / TINY["head_dim"]
        angles = torch.arange(len(x)).float()[:, None] * (1.0 / DENSE["rope_theta"] ** exponents)
        cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = of["embed_tokens.weight"][token_ids]
    normed = norm(x, of["input_layernorm.weight"])
    heads = {c: (normed @ of[f"self_attn.{c}_proj.weight"].T).view(len(x), 2, -1) for c in "qkv"}
    q = rotate(norm(heads["q"], of["self_attn.q_norm.weight"]))[-num_last:]
    k = rotate(norm(heads["k"], of["self_attn.k_norm.weight"]))
    scores = torch.einsum("qhd,khd->hqk", q, k) / TINY["head_dim"] ** 0.5
    is_later = torch.ones(num_last, len(x), dtype=torch.bool).triu(len(x) - num_last + 1)
    weights_hqk = scores.masked_fill(is_later, -torch.inf).softmax(-1)
    attended = torch.einsum("hqk,khd->qhd", weights_hqk, heads["v"]).flatten(1)
    x = x[-num_last:] + attended @ of["self_attn.o_proj.weight"].T
    normed = norm(x, of["post_attention_layernorm.weight"])
    gate, up = (normed @ of[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    x = x + (F.silu(gate) * up) @ of["mlp.down_proj.weight"].T
    return norm(x, of["norm.weight"]) @ of["embed_tokens.weight"].T


def test_a_context_is_filled_to_its_last_position(tiny_dir: Path) -> None:
    # given: a prompt that leaves room for four tokens of 262,144, in steps of 8,192
    runner = load(tiny_dir, **LIMITS, kv_memory_bytes=2**26)
    config = SchedulerConfig(max_model_len=CONTEXT, max_num_seqs=2, max_num_batched_tokens=8192)
    scheduler = Scheduler(config, BlockAllocator(runner.num_blocks, 32))
    assert scheduler.context_limit == CONTEXT
    prompt, told, finish = prompt_of(CONTEXT - 4), list[int](), None
    logits: list[Tensor] = []

    # when
    scheduler.add(SequenceRequest(key=0, prompt_ids=prompt, sampling=GREEDY, max_tokens=10))
    while finish is None:
        plan = scheduler.schedule()
        assert plan is not None
        ran = run(runner, [plan])
        logits += ran.logits
        for update in scheduler.apply(ran.results[0]):
            told += update.token_ids
            finish = update.finish

    # then: the token behind the last position is not computed
    assert (len(told), finish) == (4, FinishReason.LENGTH)
    expected = oracle_logits(tiny_dir, prompt + told[:3], num_last=4)
    torch.testing.assert_close(torch.cat(logits).double(), expected, rtol=1e-4, atol=1e-4)
    assert runner.slots.num_computed[0] == CONTEXT - 1


def test_no_position_behind_the_context_is_computed(tiny_dir: Path) -> None:
    runner = load(tiny_dir, **LIMITS, kv_memory_bytes=2**26)
    opened = OpenSlot(0, list(range(CONTEXT // 32)), CONTEXT - 2, GREEDY)
    run(runner, [StepPlan(1, open=[opened], prefills=[Prefill(0, CONTEXT - 2, [1], True)])])

    run(runner, [StepPlan(2, decodes=[0])])

    with pytest.raises(PlanError, match=f"needs {CONTEXT + 1} positions, blocks hold {CONTEXT}"):
        run(runner, [StepPlan(3, decodes=[0])])


class Pools:
    """The same KV in a small pool, and in one whose blocks lie far behind what 32 bits can count."""

    def __init__(self, num_heads: int = 1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.near = torch.randn(2 * num_heads, 64, BLOCK_SIZE, HEAD_DIM, generator=generator)
        self.far = sparse_zeros(2 * num_heads, FAR_BLOCKS, BLOCK_SIZE, HEAD_DIM)
        self.far[:, -64:] = self.near
        assert (self.far.shape[1] - 64) * BLOCK_SIZE * HEAD_DIM >= 2**31
        self.tables = torch.randperm(64, generator=generator).view(2, 32)
        self.far_tables = self.tables + FAR_BLOCKS - 64


@pytest.fixture(scope="module")
def pools() -> Pools:
    return Pools()


def test_decodes_read_cells_behind_32_bits(pools: Pools) -> None:
    q_BND, num_keys = torch.randn(2, 4, HEAD_DIM), torch.tensor([37, 512])

    near = decode_attention(q_BND, pools.near, PagedKeys(pools.tables, num_keys, 512))
    far = decode_attention(q_BND, pools.far, PagedKeys(pools.far_tables, num_keys, 512))

    assert torch.equal(far, near)


def test_chunks_read_cells_behind_32_bits(pools: Pools) -> None:
    q_TND, kv_TXD = torch.randn(43, 4, HEAD_DIM), torch.randn(43, 2, HEAD_DIM)
    starts, sizes = np.array([100, 469]), np.array([20, 23])

    def attend(pool: Tensor, tables: Tensor) -> Tensor:
        return prefill_attention(q_TND, kv_TXD, pool, Chunks(tables_CM=tables, starts=starts, sizes=sizes))

    assert torch.equal(attend(pools.far, pools.far_tables), attend(pools.near, pools.tables))


def test_keys_are_written_to_cells_behind_32_bits() -> None:
    pools, heads_TXD = Pools(), torch.randn(3, 6, HEAD_DIM)
    norms, rotations = torch.rand(5, HEAD_DIM), torch.randn(3, 2, HEAD_DIM)
    cells, offset = torch.tensor([5, 700, 1023]), (FAR_BLOCKS - 64) * BLOCK_SIZE

    for pool, at in ((pools.near, cells), (pools.far, cells + offset)):
        qk_norm_rope_store(heads_TXD.clone(), norms, 1e-6, rotations, pool, at)

    assert torch.equal(pools.far[:, -64:], pools.near)
    assert not pools.far[:, :64].any(), "something wrapped around to the pool's beginning"


def test_a_whole_step_reads_and_writes_cells_behind_32_bits(dense_fp8: Path) -> None:
    # given: a rank whose pool is larger than the machine, and blocks at its end
    def tokens(runner: ModelRunner, offset: int) -> list[list[int]]:
        blocks = [block + offset for block in blocks_of(0)]
        prompt = list(range(40))
        plans = [
            StepPlan(1, open=[open_slot(0, block_ids=blocks)], prefills=[Prefill(0, 0, prompt[:30], False)]),
            StepPlan(2, prefills=[Prefill(0, 30, prompt[30:], True)]),
            *(StepPlan(step, decodes=[0]) for step in range(3, 12)),
        ]
        return run(runner, plans).tokens

    near = load(dense_fp8)
    expected = tokens(near, 0)
    far = load(dense_fp8)
    far.kv.layers = [sparse_zeros(layer.shape[0], FAR_BLOCKS, *layer.shape[2:]) for layer in far.kv.layers]
    far.slots = far.batches.slots = SlotStates(40, 128, BLOCK_SIZE, FAR_BLOCKS)
    far.batches.pool_blocks = FAR_BLOCKS

    assert tokens(far, FAR_BLOCKS - 64) == expected
    for ours, theirs in zip(far.kv.layers, near.kv.layers, strict=True):
        assert torch.equal(ours[:, -60:-56], theirs[:, 4:8])


def test_a_chunk_far_behind_sees_every_token_before_it() -> None:
    """A value that is its token's place, and weights that are all alike: the mean of the places is what comes out."""
    num_keys, size = CONTEXT, 5
    pool = sparse_zeros(2, num_keys // 32, 32, 16)
    pool[1] = torch.arange(num_keys).view(-1, 32, 1).expand(-1, -1, 16)
    tables, starts = torch.arange(num_keys // 32)[None], np.array([num_keys - size])
    chunks = Chunks(tables_CM=tables, starts=starts, sizes=np.array([size]))
    means = (torch.arange(num_keys - size, num_keys).double() / 2).float()

    out_TND = prefill_attention(torch.zeros(size, 1, 16), torch.zeros(size, 2, 16), pool, chunks)
    last_BND = decode_attention(torch.zeros(1, 1, 16), pool, PagedKeys(tables, torch.tensor([num_keys]), num_keys))

    # Sums of 262,144 numbers in fp32.
    torch.testing.assert_close(out_TND[:, 0, 0], means, rtol=1e-4, atol=0)
    torch.testing.assert_close(last_BND[0, 0, :1], means[-1:], rtol=1e-4, atol=0)


FAR_LIMITS = {"kv_memory_bytes": 2**28} | LIMITS
LAYOUTS = {"tp=2": ParallelLayout(tp=2), "dp=2": ParallelLayout(dp=2)}
NUM_CACHED = CONTEXT - 1024


def fill_pool(runner: ModelRunner, layout: ParallelLayout) -> None:
    """KV of a whole context as if it had been computed: a rank has its heads of it."""
    for index, layer in enumerate(runner.kv.layers):
        whole = torch.randn(4, *layer.shape[1:], generator=torch.Generator().manual_seed(index))
        tp_rank = runner.config.rank % layout.tp
        layer.copy_(whole[tp_rank :: layout.tp] if layout.tp > 1 else whole)


def run_at_the_end(parallel: ParallelState, directory: Path, layout: ParallelLayout, groups: list[Any]) -> Ran:
    config = runner_config(directory, rank=parallel.rank, layout=layout, **FAR_LIMITS)
    runner = ModelRunner(config, parallel.regrouped(layout, TIMEOUT_S))
    fill_pool(runner, layout)
    return run(runner, groups[config.spec.dp_rank])


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_end_a_context_as_one_does(layout: str, tmp_path: Path, two_ranks: RankProcesses) -> None:
    # given: a model of two layers, and two chunks and decodes behind 261,120 tokens
    changes = TINY | {"num_hidden_layers": 2, "moe_intermediate_size": 32, "mlp_only_layers": []}
    directory = write_checkpoint(tmp_path, MOE, fp8=False, **changes)
    prompt = prompt_of(CONTEXT - 4)
    opened = OpenSlot(0, list(range(CONTEXT // 32)), NUM_CACHED, GREEDY)
    chunks = [(NUM_CACHED, NUM_CACHED + 600), (NUM_CACHED + 600, CONTEXT - 4)]
    prefills = [Prefill(0, start, prompt[start:end], end == CONTEXT - 4) for start, end in chunks]
    plans = [
        StepPlan(1, open=[opened], prefills=prefills[:1]),
        StepPlan(2, prefills=prefills[1:]),
        *(StepPlan(step, decodes=[0]) for step in range(3, 7)),
    ]
    alone = load(directory, **FAR_LIMITS)
    fill_pool(alone, ParallelLayout())
    expected = run(alone, plans)

    groups = in_step([plans, []] if layout == "dp=2" else [plans])
    ran = two_ranks.run(run_at_the_end, directory, LAYOUTS[layout], groups)[: LAYOUTS[layout].tp]

    logits = torch.cat([torch.cat(rank.logits) for rank in ran], dim=1)
    torch.testing.assert_close(logits, torch.cat(expected.logits), rtol=1e-3, atol=1e-3)
    assert ran[0].tokens == expected.tokens
