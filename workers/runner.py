"""One rank's engine: loads its slice, sizes its KV, and turns plans into tokens, strictly in order.

Hop 7 to 9. Owns all slot state: block tables, positions, and the token each slot sampled last, which stays on the
device. Knows no socket, request or client.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from workers.allocator import keep_freed_memory
from workers.batch import BatchBuilder, ForwardBatch, PromptLayout
from workers.candidates import CandidateExchange
from workers.checkpoint import Checkpoint, Progress, no_progress
from workers.computed import Computed
from workers.config import ModelConfig, RunnerConfig, ShardSpec
from workers.decode_steps import DecodeSteps
from workers.device import (
    buckets_of,
    check_kernels,
    check_memory,
    device_of,
    free_bytes,
    halved_from,
    held_by_steps,
    recorder_of,
)
from workers.errors import KVMemoryError, LayoutError, PlanError
from workers.experts.choice import DispatcherChoice
from workers.experts.rebalance import PlacedExperts
from workers.grammar import Grammars
from workers.host_kv import measure, open_host_kv
from workers.kernels.invariance import invariance
from workers.kernels.linear import Weight
from workers.kv_memory import default_kv_bytes
from workers.kv_pool import KVPool, block_bytes, num_blocks_in
from workers.launched import BeforeWait, owe_nothing
from workers.logprobs import ComingLogprobs
from workers.model import Decoder
from workers.parallel import ParallelState
from workers.prompt_scores import score_prompts
from workers.sampling import Sampler
from workers.slots import SlotStates
from workers.step import PlacementUpdate, StepPlan, StepResult
from workers.threads import ThreadChooser
from workers.transfers import fetching_from, to_device
from workers.two_halves import HalvedBatch, forward_halves, travel_on
from workers.warm_up import warm_up, warm_up_draws

log = logging.getLogger(__name__)


class _Named(NamedTuple):
    """Its tokens, on the host."""

    token_ids: list[int]
    accepted_ids: list[list[int]]


class LaunchedStep:
    """A plan that the runner has taken on."""

    def __init__(
        self, runner: ModelRunner, plan: StepPlan, computed: Computed, started_s: float, before_wait: BeforeWait
    ) -> None:
        self._runner, self._plan, self._computed, self._started_s = runner, plan, computed, started_s
        self._dispatch_s, self._dispatch_bytes = runner.decoder.traffic.take()
        self._loads = runner.fetch(runner.experts.take_loads()) if plan.report_loads else None
        # What comes next depends on these tokens in more ways than the device knows of.
        rules = runner.sampler.rules
        is_next_bound = bool(plan.drafts) or bool(rules.active[computed.slots].any())
        # Later would be too late: the next plan may give a slot to another sequence, which has rules of its own.
        if is_next_bound:
            before_wait()
            rules.advance(computed.slots, computed.sampled.values())
        self._named = self._name() if is_next_bound else None

    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        return self._computed.sampled.is_here() and (self._loads is None or self._loads.is_here())

    def result(self) -> StepResult:
        """Waits for the step. Only tp_rank 0 of a group names its tokens."""
        named, runner = self._named or self._name(), self._runner
        is_telling = runner.parallel.tp.index == 0
        loads = [] if self._loads is None else self._loads.values()
        return StepResult(
            step=self._plan.step,
            rank=runner.parallel.rank,
            token_ids=named.token_ids if is_telling else [],
            accepted_ids=named.accepted_ids if is_telling else [],
            logprobs=self._computed.logprobs if is_telling else {},
            prompt_logprobs=self._computed.prompt_logprobs if is_telling else {},
            compute_s=runner.took_s(self._started_s),
            dispatch_s=self._dispatch_s,
            dispatch_bytes=self._dispatch_bytes,
            expert_loads=loads,
        )

    def _name(self) -> _Named:
        token_ids, plan, runner = self._computed.sampled.values(), self._plan, self._runner
        accepted = runner.keep_right_guesses(plan, token_ids) if plan.drafts else []
        return _Named(token_ids[: len(plan.sampling_slots)], accepted)


class ModelRunner:
    """Loads in the constructor; afterwards `execute` takes one plan after another."""

    def __init__(
        self,
        config: RunnerConfig,
        parallel: ParallelState,
        progress: Progress = no_progress,
        weights: dict[str, Weight] | None = None,
    ) -> None:
        """`weights`: what an earlier runner of the same rank and layout has loaded; None: load them."""
        if (parallel.rank, parallel.layout) != (config.rank, config.layout):
            raise LayoutError(
                f"rank {config.rank} of {config.layout} was given the place of rank {parallel.rank} of "
                f"{parallel.layout}; start every rank with its own config"
            )
        self.config, self.parallel = config, parallel
        self.device, dtype = device_of(config)
        check_kernels(config, self.device)
        kv_dtype = {"auto": dtype, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[config.kv_dtype]
        self.model = ModelConfig.from_dir(Path(config.model_dir))
        if weights is None:
            checkpoint = Checkpoint.open(config.model_dir)
            check_memory(checkpoint, config.spec, self.device)
            weights = checkpoint.read(config.spec, progress, device=self.device, dtype=dtype, products=config.products)
        self._weights = weights
        self.threads = ThreadChooser(self.model, weights, config.num_threads or torch.get_num_threads())
        if self.device.type == "cpu":
            keep_freed_memory()
        self.weight_bytes = sum(weight.nbytes for weight in weights.values())
        buckets = buckets_of(self.model, config, self.device)
        recorder, self._collectives = recorder_of(config, parallel, self.device)
        self._before_wait = owe_nothing
        looking = (config.dispatch_rows, buckets, lambda: self._before_wait())
        choice = DispatcherChoice(self.model, config.spec, self._collectives, dtype, *looking)
        self.decoder = Decoder(self.model, config.spec, weights, self._collectives, choice)
        held_bytes = held_by_steps(self.model, config, buckets, self.device)
        self.num_blocks = parallel.world.minimum(self._affordable_blocks(kv_dtype, held_bytes), self.device)
        num_spare = 0 if buckets is None else 1
        pool_blocks = self.num_blocks + num_spare
        self.kv = KVPool(self.model, config.spec, pool_blocks, config.block_size, self.device, kv_dtype)
        bytes_per_block = block_bytes(self.model, config.spec, config.block_size, kv_dtype)
        self.kv_bytes = pool_blocks * bytes_per_block
        self.host_kv = open_host_kv(config, self.kv, bytes_per_block, parallel.world)
        self.slots = SlotStates(config.max_num_seqs, config.max_model_len, config.block_size, self.num_blocks)
        prompts = PromptLayout.ROWS if config.deterministic else PromptLayout.CHUNKS
        self.batches = BatchBuilder(self.slots, self.model, self.device, dtype, pool_blocks, prompts)
        grammars = Grammars(Path(config.model_dir) / "tokenizer.json", self.model.vocab_size)
        exchange = _exchange(self.model, config, self._collectives)
        self.sampler = Sampler(config.max_num_seqs, exchange, self.device, grammars)
        self.experts = PlacedExperts(self.decoder.expert_layers, config.spec, parallel.world)
        self.last_tokens = torch.zeros(config.max_num_seqs + num_spare, dtype=torch.int64, device=self.device)
        self.fetch = fetching_from(self.device)
        self._halved_from, self._travel = halved_from(config, self.model, self.device), travel_on(self.device)
        self._finished_s = 0.0
        self._decode_steps: DecodeSteps | None = None
        warm_up(self.execute, config, self.num_blocks)
        with torch.inference_mode():
            warm_up_draws(self.sampler.exchange, self.device)
        if buckets is not None:
            shared = (self.decoder, self.sampler, self.batches, self.kv, self.last_tokens)
            self._decode_steps = DecodeSteps(*shared, buckets, recorder, config.layout.dp)
            self._prepare(self._decode_steps)
        host_kv, num_blocks = self.host_kv, self.num_blocks
        self.host_memory = None if host_kv is None else measure(host_kv, config, num_blocks, self.execute)

    @property
    def weights(self) -> dict[str, Weight] | None:
        """For another runner of this rank; None where experts have moved, and must be loaded again."""
        return None if self.experts.have_moved else self._weights

    @property
    def num_exchanges(self) -> int:
        """Of all ranks, so far."""
        return self.parallel.world.num_exchanges

    @property
    def num_group_exchanges(self) -> int:
        """Of its attention group alone, so far; 0 where that is all ranks."""
        return self.parallel.num_group_exchanges

    def abort(self) -> None:
        """From another thread: whoever waits for other ranks waits no longer. Only `leave` may follow."""
        self.parallel.abort()

    def forget(self) -> None:
        """Drop what is recorded: it holds memory, and the group's channels, which do not close before."""
        if self._decode_steps is not None:
            self._decode_steps.forget()

    def leave(self) -> None:
        """Leave the group and free the KV; only `weights` are of use afterwards."""
        self.forget()
        self.parallel.close()
        if self.host_kv is not None:
            self.host_kv.free()  # first, as it knows the pool's layers, too
        self.kv.free()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan; only tp_rank 0 of a group names its tokens.

        Raises PlanError where the plan breaks the contract; the rank's slots are then of no use.
        """
        return self.launch(plan).result()

    def launch(self, plan: StepPlan, before_wait: BeforeWait = owe_nothing) -> LaunchedStep:
        """Give one plan's work to the device; the next may be launched before this one's result is asked for.

        Raises PlanError as `execute` does.
        """
        started_s, self._before_wait = time.perf_counter(), before_wait
        self._check_groups(plan)
        self.threads.apply(max(plan.group_tokens, default=plan.num_tokens))
        with torch.inference_mode(), invariance(self.config.deterministic):
            self._apply_deltas(plan)
            computed = self._compute(plan)
            return LaunchedStep(self, plan, computed, started_s, before_wait)

    def took_s(self, started_s: float) -> float:
        """Of a step that has just ended: since it began, or since the step before it ended."""
        before_s, self._finished_s = self._finished_s, time.perf_counter()
        return self._finished_s - max(started_s, before_s)

    def place(self, update: PlacementUpdate) -> None:
        """Move experts between steps. All ranks do it together. Raises PlanError where the update cannot be."""
        with torch.inference_mode():
            self.experts.apply(update)

    def _check_groups(self, plan: StepPlan) -> None:
        """Ranks that disagree on the groups' sizes would wait for one another."""
        groups, num_groups, own = plan.group_tokens, self.config.layout.dp, self.config.spec.dp_rank
        if not groups and (num_groups == 1 or not plan.num_tokens):
            return
        if len(groups) != num_groups or groups[own] != plan.num_tokens:
            raise PlanError(
                f"step {plan.step} computes {plan.num_tokens} tokens in group {own} of {num_groups}, "
                f"its group_tokens are {groups}"
            )

    def _apply_deltas(self, plan: StepPlan) -> None:
        if self.host_kv is not None:
            self.host_kv.move(plan)
        elif plan.offload or plan.fetch:
            raise PlanError(f"step {plan.step} copies blocks, but the rank was started without host_kv_bytes")
        for slot in plan.close:
            self.slots.close(slot)
        for opened in plan.open:
            self.slots.open(opened)
            self.sampler.open(opened)
        for extended in plan.extend:
            self.slots.extend(extended.slot, extended.block_ids)
        if self._decode_steps is not None:
            self._decode_steps.tables.follow(plan)
        if plan.num_tokens > self.config.max_num_batched_tokens:
            limit = self.config.max_num_batched_tokens
            raise PlanError(f"step {plan.step} computes {plan.num_tokens} tokens, the rank was started for {limit}")

    def _compute(self, plan: StepPlan) -> Computed:
        if self._decode_steps is not None and not self._is_halved(plan):
            bucket = self._decode_steps.bucket_for(plan)
            if bucket is not None:
                self.sampler.check_drafts(plan.drafts)
                tokens_B, rows = self._decode_steps.run(plan, bucket)
                return Computed(sampled=self.fetch(tokens_B), slots=rows.slots)
        return self._forward(plan) if plan.num_tokens else self._assist(plan)

    def _assist(self, plan: StepPlan) -> Computed:
        """Other groups may have tokens for this rank's experts."""
        if self._is_halved(plan):
            self._forward_halves((None, None))
        elif any(plan.group_tokens):
            self.decoder.assist(plan.group_tokens)
        return self._nobody()

    def _nobody(self, prompt_logprobs: ComingLogprobs | None = None) -> Computed:
        """Was sampled."""
        slots = np.zeros(0, dtype=np.int64)
        return Computed(sampled=self.fetch(self.last_tokens[:0]), slots=slots, target_logprobs=prompt_logprobs)

    def _is_halved(self, plan: StepPlan) -> bool:
        """The same for all ranks."""
        return self._halved_from is not None and max(plan.group_tokens, default=0) >= self._halved_from

    def _forward_halves(self, halves: tuple[ForwardBatch | None, ForwardBatch | None]) -> torch.Tensor:
        return forward_halves(self.decoder, halves, self.kv, self._travel, self.decoder.uneven_dispatcher())

    def _forward(self, plan: StepPlan) -> Computed:
        self.sampler.check_drafts(plan.drafts)
        batch: ForwardBatch | HalvedBatch
        if self._is_halved(plan):
            batch = HalvedBatch.build(self.batches, plan, self.last_tokens)
            x_RH = self._forward_halves(batch.halves)
        else:
            batch = self.batches.build(plan, self.last_tokens)
            x_RH = self.decoder.forward(batch, self.kv)
        num_sampled = len(batch.sample_slots)
        scores: ComingLogprobs | None = None
        if batch.has_scores:
            scored = score_prompts(plan.prefills, x_RH[num_sampled:], self.decoder.logits, self.sampler.exchange)
            scores = scored.send(self.fetch)
        if not num_sampled:
            return self._nobody(scores)
        logits_Bv = self.decoder.logits(x_RH[:num_sampled])
        sampled = self.sampler.sample(logits_Bv, batch.sample_slots, batch.sample_positions)
        num_first = len(plan.sampling_slots)
        slots_B = to_device(batch.sample_slots[:num_first], self.device)
        self.last_tokens.index_copy_(0, slots_B, sampled.token_ids_B[:num_first])
        logprobs = [table.send(self.fetch) for table in sampled.logprobs]
        tokens = self.fetch(sampled.token_ids_B)
        return Computed(sampled=tokens, slots=batch.sample_slots, row_logprobs=logprobs, target_logprobs=scores)

    def keep_right_guesses(self, plan: StepPlan, sampled_ids: list[int]) -> list[list[int]]:
        """What each draft gives: the tokens sampled behind its right guesses. The rest of it is taken back."""
        kept, slots, tokens = [], [], []
        row = len(plan.sampling_slots)
        firsts = dict(zip(plan.sampling_slots, sampled_ids, strict=False))
        for draft in plan.drafts:
            slot, guesses = draft.slot, draft.token_ids
            rows = [firsts[slot], *sampled_ids[row : row + len(guesses)]]
            num_right = next(
                (i for i, (own, guess) in enumerate(zip(rows, guesses, strict=False)) if own != guess), len(guesses)
            )
            kept.append(rows[1 : num_right + 1])
            self.slots.take_back(slot, len(guesses) - num_right)
            slots.append(slot)
            tokens.append(rows[num_right])
            row += len(guesses)
        changes_2D = to_device(np.array([slots, tokens], dtype=np.int64), self.device)
        self.last_tokens.index_copy_(0, changes_2D[0], changes_2D[1])
        return kept

    def _prepare(self, decode_steps: DecodeSteps) -> None:
        with torch.inference_mode(), invariance(self.config.deterministic):
            prepared = decode_steps.prepare()
        self.experts.take_loads()
        self.decoder.traffic.take()
        gigabytes = prepared.num_bytes / 1e9
        log.info(
            "decode steps of %d sizes recorded in %.1f s, %.2f GB", prepared.num_graphs, prepared.seconds, gigabytes
        )

    def _affordable_blocks(self, dtype: torch.dtype, held_bytes: int) -> int:
        """Blocks that fit the KV memory beside what steps hold, and no more than all slots at full length can use."""
        config, num_free_bytes = self.config, free_bytes(self.device)
        bytes_per_block = block_bytes(self.model, config.spec, config.block_size, dtype)
        kv_bytes = config.kv_memory_bytes or default_kv_bytes(num_free_bytes, self.device.type, held_bytes)
        for_steps = f", and steps take {held_bytes / 1e9:.3g}" if held_bytes else ""
        if held_bytes and kv_bytes < bytes_per_block:
            raise KVMemoryError(
                f"rank {config.rank} has no room for KV: {num_free_bytes / 1e9:.3g} GB are free{for_steps}; lower "
                "max_num_batched_tokens, max_num_seqs or max_model_len"
            )
        affordable = num_blocks_in(kv_bytes, bytes_per_block)
        num_blocks = min(affordable, config.max_num_seqs * -(-config.max_model_len // config.block_size))
        if num_blocks * bytes_per_block > num_free_bytes - held_bytes:
            raise KVMemoryError(
                f"rank {config.rank} needs {num_blocks * bytes_per_block / 1e9:.3g} GB for {num_blocks} KV blocks, "
                f"{num_free_bytes / 1e9:.3g} are free{for_steps}; lower kv_memory_bytes"
            )
        return num_blocks


def _exchange(model: ModelConfig, config: RunnerConfig, parallel: ParallelState) -> CandidateExchange:
    parts = [ShardSpec(config.layout, tp_rank).vocab(model) for tp_rank in range(config.layout.tp)]
    return CandidateExchange(parallel.tp, parts)
