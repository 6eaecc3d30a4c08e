"""OfflineEngine: Scheduler and ModelRunner in this process, in lockstep; no Ray, no sockets, one rank.

For measuring a checkpoint or the engine itself. The same scheduler and the same rank code as in the cluster.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.router.blocks import BlockAllocator
from cluster.router.host_tier import HostTier, plan_host
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.scheduler_stats import SchedulerStats
from cluster.router.sequence import SequenceRequest, SequenceUpdate
from cluster.router.speculation import Speculation
from workers.config import ParallelLayout, RunnerConfig
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import SamplingParams


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """What one rank may use."""

    model_dir: str
    num_threads: int
    products: Literal["fp32", "bf16"] = "fp32"
    kv_dtype: Literal["auto", "bf16"] = "auto"
    max_model_len: int = 1024
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 32
    kv_memory_bytes: int = 256 * 2**20
    host_kv_bytes: int = 0
    """For KV whose blocks are needed for others; used where it pays."""
    enable_prefix_cache: bool = True
    speculation: Speculation = field(default_factory=Speculation)


class OfflineEngine:
    """Loads in the constructor."""

    def __init__(self, config: OfflineConfig) -> None:
        runner = RunnerConfig(
            model_dir=config.model_dir,
            rank=0,
            layout=ParallelLayout(tp=1),
            device="cpu",
            num_threads=config.num_threads,
            products=config.products,
            kv_dtype=config.kv_dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            block_size=config.block_size,
            kv_memory_bytes=config.kv_memory_bytes,
            host_kv_bytes=config.host_kv_bytes,
        )
        self._runner = ModelRunner(runner, ParallelState.single())
        self._max_running = config.max_num_seqs
        host = plan_host([self._runner.host_memory], config.block_size)
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_waiting=config.max_num_seqs,
                speculation=config.speculation,
            ),
            BlockAllocator(
                self._runner.num_blocks,
                config.block_size,
                config.enable_prefix_cache,
                None if host is None else HostTier(host),
            ),
        )

    @property
    def stats(self) -> SchedulerStats:
        """Of all that was generated so far."""
        return self._scheduler.stats

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        sampling: SamplingParams,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> list[list[int]]:
        """The tokens after each prompt, a stop token included. Raises what Scheduler.add raises."""
        outputs: list[list[int]] = [[] for _ in prompts]
        for update in self.updates(prompts, max_tokens, sampling, stop_token_ids):
            assert isinstance(update.key, int)
            outputs[update.key] += update.token_ids
        return outputs

    def updates(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        sampling: SamplingParams,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> Generator[SequenceUpdate]:
        """The same as it comes, keyed by the prompt's place; closing the iterator cancels what has not finished."""
        waiting = list(enumerate(prompts))
        waiting.reverse()
        try:
            while waiting or self._scheduler.has_unfinished:
                while waiting and self._scheduler.num_running + self._scheduler.num_waiting < self._max_running:
                    key, prompt_ids = waiting.pop()
                    self._scheduler.add(
                        SequenceRequest(
                            key=key,
                            prompt_ids=prompt_ids,
                            sampling=sampling,
                            max_tokens=max_tokens,
                            stop_token_ids=stop_token_ids,
                        )
                    )
                plan = self._scheduler.schedule()
                assert plan is not None, "nothing is in flight, so there is always something to schedule"
                yield from self._scheduler.apply(self._runner.execute(plan))
        finally:
            for key in range(len(prompts)):
                self._scheduler.cancel(key)
