"""One rank's engine: loads its slice, sizes its KV, and turns plans into tokens, strictly in order.

Hop 7 to 9. Owns all slot state: block tables, positions, and the token each slot sampled last, which stays on the
device. Knows no socket, request or client.
"""

from __future__ import annotations

import time

import torch

from workers.allocator import keep_freed_memory
from workers.batch import BatchBuilder
from workers.candidates import CandidateExchange
from workers.checkpoint import Checkpoint, Progress, no_progress
from workers.config import ModelConfig, RunnerConfig, ShardSpec
from workers.errors import LayoutError, PlanError
from workers.kv_pool import KVPool, block_bytes, num_blocks_in
from workers.model import Decoder
from workers.parallel import ParallelState
from workers.sampling import Sampler
from workers.slots import SlotStates
from workers.step import OpenSlot, PlacementUpdate, Prefill, SamplingParams, StepPlan, StepResult, TokenLogprobs
from workers.threads import ThreadChooser

CPU_KV_BYTES = 256 * 2**20
GPU_MEMORY_SHARE = 0.88
"""Of the free memory after loading; the rest is for activations and the allocator."""


class ModelRunner:
    """Loads in the constructor; afterwards `execute` takes one plan after another."""

    def __init__(self, config: RunnerConfig, parallel: ParallelState, progress: Progress = no_progress) -> None:
        if (parallel.rank, parallel.world_size) != (config.rank, config.layout.world_size):
            raise LayoutError(
                f"rank {config.rank} of {config.layout.world_size} was given the place of rank {parallel.rank} of "
                f"{parallel.world_size}; start every rank with its own config"
            )
        self.config, self.parallel = config, parallel
        self.device, dtype = _device(config)
        checkpoint = Checkpoint.open(config.model_dir)
        self.model = checkpoint.config
        weights = checkpoint.read(config.spec, progress, device=self.device, dtype=dtype)
        self.threads = ThreadChooser(self.model, weights, config.num_threads or torch.get_num_threads())
        if self.device.type == "cpu":
            keep_freed_memory()
        self.weight_bytes = sum(weight.nbytes for weight in weights.values())
        self.decoder = Decoder(self.model, config.spec, weights, parallel)
        self.num_blocks = parallel.minimum(self._affordable_blocks(dtype), self.device)
        self.kv = KVPool(self.model, config.spec, self.num_blocks, config.block_size, self.device, dtype)
        self.kv_bytes = self.num_blocks * block_bytes(self.model, config.spec, config.block_size, dtype)
        self.slots = SlotStates(config.max_num_seqs, config.max_model_len, config.block_size, self.num_blocks)
        self.batches = BatchBuilder(self.slots, self.model, self.device, dtype)
        self.sampler = Sampler(config.max_num_seqs, _exchange(self.model, config, parallel), self.device)
        self.last_tokens = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=self.device)
        self._warm_up()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan; only rank 0 names the tokens.

        Raises PlanError where the plan breaks the contract; the rank's slots are then of no use.
        """
        start = time.perf_counter()
        self.threads.apply(plan.num_tokens)
        with torch.inference_mode():
            self._apply_deltas(plan)
            sampled = self._forward(plan) if plan.num_tokens else ([], {})
        token_ids, logprobs = sampled if self.parallel.rank == 0 else ([], {})
        return StepResult(
            step=plan.step,
            rank=self.parallel.rank,
            token_ids=token_ids,
            logprobs=logprobs,
            compute_s=time.perf_counter() - start,
        )

    def place(self, update: PlacementUpdate) -> None:
        """Move experts between steps."""
        raise PlanError(f"placement {update.version} came to a rank that cannot move experts")

    def _apply_deltas(self, plan: StepPlan) -> None:
        for slot in plan.close:
            self.slots.close(slot)
        for opened in plan.open:
            self.slots.open(opened)
            self.sampler.open(opened)
        for extended in plan.extend:
            self.slots.extend(extended.slot, extended.block_ids)
        if plan.num_tokens > self.config.max_num_batched_tokens:
            limit = self.config.max_num_batched_tokens
            raise PlanError(f"step {plan.step} computes {plan.num_tokens} tokens, the rank was started for {limit}")

    def _forward(self, plan: StepPlan) -> tuple[list[int], dict[int, TokenLogprobs]]:
        batch = self.batches.build(plan, self.last_tokens)
        x_BH = self.decoder.forward(batch, self.kv)
        if not len(batch.sample_slots):
            return [], {}
        logits_Bv = self.decoder.logits(x_BH)
        sampled = self.sampler.sample(logits_Bv, batch.sample_slots, batch.sample_positions)
        slots_B = torch.from_numpy(batch.sample_slots).to(self.device)
        self.last_tokens.index_copy_(0, slots_B, sampled.token_ids_B)
        return sampled.token_ids_B.tolist(), sampled.logprobs

    def _affordable_blocks(self, dtype: torch.dtype) -> int:
        """Blocks that fit the KV memory, and no more than all slots at full length can use."""
        config = self.config
        memory = config.kv_memory_bytes or _default_kv_bytes(self.device)
        affordable = num_blocks_in(memory, block_bytes(self.model, config.spec, config.block_size, dtype))
        return min(affordable, config.max_num_seqs * -(-config.max_model_len // config.block_size))

    def _warm_up(self) -> None:
        """Run a chunk and a decode on the first block, so that the first request pays for no lazy set-up."""
        count = min(self.config.block_size, self.config.max_model_len, self.config.max_num_batched_tokens + 1) - 1
        if count < 1:
            return
        opened = OpenSlot(slot=0, block_ids=[0], num_cached=0, sampling=SamplingParams())
        prefill = Prefill(slot=0, start=0, token_ids=[0] * count, sample=True)
        self.execute(StepPlan(step=0, open=[opened], prefills=[prefill]))
        self.execute(StepPlan(step=0, decodes=[0]))
        self.execute(StepPlan(step=0, close=[0]))


def _device(config: RunnerConfig) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of weights and KV there."""
    if config.device == "cuda":
        torch.cuda.set_device(config.rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    return torch.device("cpu"), torch.float32


def _exchange(model: ModelConfig, config: RunnerConfig, parallel: ParallelState) -> CandidateExchange:
    parts = [ShardSpec(config.layout, rank).vocab(model) for rank in range(config.layout.world_size)]
    return CandidateExchange(parallel, parts)


def _default_kv_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_KV_BYTES
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(free_bytes * GPU_MEMORY_SHARE)
