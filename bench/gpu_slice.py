"""One rank's whole decode step of a model that needs several GPUs, on one: its slice of every layer, random weights.

The collectives are replaced by a wait of the published latency, captured in the same graph: 0, 1 and 2 times of it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.gpu_cases import Inputs
from bench.make_checkpoint import COMMON, SHAPES
from workers.batch import Decodes, ForwardBatch, Prefills, SequenceEnds
from workers.config import ModelConfig, ShardSpec
from workers.experts.choice import DispatcherChoice
from workers.kernels.decode_attention import PagedKeys
from workers.kernels.linear import Weight
from workers.kernels.prefill_attention import Chunks
from workers.kv_pool import KVPool, block_bytes
from workers.layout import ParallelLayout
from workers.model import Decoder
from workers.parallel import ParallelState
from workers.rank_group import RankGroup
from workers.weights import param_shapes, rank_slices

ALL_REDUCE_S = 8e-6
"""Of a small tensor over eight GPUs of a node: published figures are 6 to 11 µs."""


class WaitingGroup(RankGroup):
    """Ranks that are not there: a sum takes as long as theirs would, and adds nothing."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size, None)
        self.wait_cycles = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.wait_cycles and x.is_cuda:
            torch.cuda._sleep(self.wait_cycles)  # torch has no public one
        return x


@dataclass(frozen=True, kw_only=True)
class Load:
    """A decode step."""

    num_seqs: int
    num_keys: int


class RankSlice:
    """The decoder of rank 0 of a layout."""

    def __init__(self, model: ModelConfig, tp: int, device: torch.device, block_size: int = 64) -> None:
        layout = ParallelLayout(tp=tp)
        self.model, self.spec, self.device, self.block_size = model, ShardSpec(layout, 0), device, block_size
        self.inputs = Inputs.on(device)
        self.group = WaitingGroup(tp)
        """Alone where it is of one; what it waits for may be changed from one recording to the next."""
        group = self.group if tp > 1 else RankGroup.alone()
        parallel = ParallelState(0, layout, group, group)
        choice = DispatcherChoice(model, self.spec, parallel, self.inputs.dtype, "exact")
        self.weights = random_weights(model, self.spec, self.inputs)
        self.decoder = Decoder(model, self.spec, self.weights, parallel, choice)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    def kv_bytes(self, load: Load) -> int:
        """Of all sequences."""
        per_block = block_bytes(self.model, self.spec, self.block_size, self.inputs.dtype)
        return load.num_seqs * -(-load.num_keys // self.block_size) * per_block

    def floor_bytes(self, load: Load) -> float:
        """What a step must read: experts that somebody chose, all other weights but the embedding, and the KV."""
        model, here = self.model, self.kv_bytes(load)
        for name, weight in self.weights.items():
            if ".experts." in name:
                missed = (1 - model.num_experts_per_token / model.num_experts) ** load.num_seqs
                here += int(weight.nbytes * (1 - missed))
            elif name != "embed" or model.tie_word_embeddings:
                here += weight.nbytes
        return here

    def step(self, load: Load) -> tuple[ForwardBatch, KVPool]:
        """The inputs of a step: every sequence has its own blocks, in no order."""
        blocks = -(-load.num_keys // self.block_size)
        total = load.num_seqs * blocks
        kv = KVPool(self.model, self.spec, total, self.block_size, self.device, self.inputs.dtype)
        tables = torch.randperm(total, device=self.device).view(load.num_seqs, blocks)
        lengths = torch.full((load.num_seqs,), load.num_keys, device=self.device)
        keys = PagedKeys(tables, lengths, load.num_keys)
        last = load.num_keys - 1
        return (
            ForwardBatch(
                token_ids_T=self._tokens(load.num_seqs),
                rotations_T2D=self.inputs.normal(load.num_seqs, 2, self.model.head_dim),
                cells_T=tables[:, last // self.block_size] * self.block_size + last % self.block_size,
                parts=[Decodes(rows=slice(0, load.num_seqs), keys=keys)],
                step_rows=None,
                scored_rows_S=None,
                ends=None,
                sample_slots=np.arange(load.num_seqs),
                sample_positions=np.full(load.num_seqs, load.num_keys),
                group_tokens=[load.num_seqs],
            ),
            kv,
        )

    def prompt(self, num_tokens: int) -> tuple[ForwardBatch, KVPool]:
        """The inputs of a step that prefills one prompt."""
        blocks = -(-num_tokens // self.block_size)
        kv = KVPool(self.model, self.spec, blocks, self.block_size, self.device, self.inputs.dtype)
        tables = torch.randperm(blocks, device=self.device).view(1, blocks)
        position_T = torch.arange(num_tokens, device=self.device)
        block_T = tables[0].index_select(0, position_T // self.block_size)
        chunks = Chunks(tables_CM=tables, starts=np.array([0]), sizes=np.array([num_tokens]))
        rotations_T2D = self.inputs.normal(num_tokens, 2, self.model.head_dim)
        last = torch.tensor([num_tokens - 1], device=self.device)
        ends = SequenceEnds(
            rows_B=last,
            rotations_B2D=rotations_T2D[-1:].clone(),
            keys=PagedKeys(tables, last + 1, num_tokens),
        )
        return (
            ForwardBatch(
                token_ids_T=self._tokens(num_tokens),
                rotations_T2D=rotations_T2D,
                cells_T=block_T * self.block_size + position_T % self.block_size,
                parts=[Prefills(rows=slice(0, num_tokens), chunks=chunks)],
                step_rows=None,
                scored_rows_S=None,
                ends=ends,
                sample_slots=np.arange(1),
                sample_positions=np.array([num_tokens]),
                group_tokens=[num_tokens],
            ),
            kv,
        )

    def _tokens(self, count: int) -> Tensor:
        """That are in this rank's part of the vocabulary."""
        return self.inputs.integers(self.decoder.embedding.vocab.size, count)

    def run(self, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """Logits of this rank's part of the vocabulary."""
        return self.decoder.logits(self.decoder.forward(batch, kv))


def random_weights(model: ModelConfig, spec: ShardSpec, inputs: Inputs) -> dict[str, Weight]:
    """As large as keeps activations' size."""
    slices = list(rank_slices(model, spec))
    linear = {part.param for part in slices if part.is_linear}
    weights: dict[str, Weight] = {}
    for name, shape in param_shapes(slices).items():
        if name in linear:
            weights[name] = inputs.tiles(*shape)
        else:
            weights[name] = (
                inputs.normal(*shape) if len(shape) > 1 else torch.ones(shape, device=inputs.device).to(inputs.dtype)
            )
    return weights


def model_of(shape: str, layers: int | None = None, **changes: object) -> ModelConfig:
    """The dimensions of a real model, all its layers or the first of them."""
    config = COMMON | SHAPES[shape] | {"eos_token_id": 0} | changes
    if layers is not None:
        config["num_hidden_layers"] = layers
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        return ModelConfig.from_dir(directory)
