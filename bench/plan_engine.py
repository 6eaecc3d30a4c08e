"""The engine in process, with the time of every token: what the planner is calibrated by."""

from __future__ import annotations

import time
from pathlib import Path

from cluster.planner.calibration import Engine, Run
from cluster.router.blocks import BlockAllocator
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest
from workers.config import RunnerConfig
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import SamplingParams

BLOCK_SIZE = 32
MAX_BATCHED_TOKENS = 512
"""The product's default."""


class TimedEngine:
    """Scheduler and ModelRunner in lockstep; loads in the constructor."""

    def __init__(self, model_dir: Path, threads: int, *, max_streams: int, max_tokens: int) -> None:
        """With one thread its CPU time is measured, so that others on the machine are not."""
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        blocks = -(-max_tokens // BLOCK_SIZE) * max_streams + 1
        runner = RunnerConfig(
            model_dir=str(model_dir),
            num_threads=threads,
            max_model_len=max_tokens,
            max_num_seqs=max_streams,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            block_size=BLOCK_SIZE,
            kv_memory_bytes=2**33,
        )
        self._runner = ModelRunner(runner, ParallelState.single())
        self.vocab_size = self._runner.model.vocab_size
        self.setting = Engine(
            max_num_seqs=max_streams,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            block_size=BLOCK_SIZE,
            num_blocks=min(blocks, self._runner.num_blocks),
        )
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_model_len=max_tokens,
                max_num_seqs=max_streams,
                max_num_batched_tokens=MAX_BATCHED_TOKENS,
                max_waiting=max_streams,
            ),
            BlockAllocator(self.setting.num_blocks, BLOCK_SIZE, enable_prefix_cache=False),
        )

    def run(self, prompts: list[list[int]], output: int) -> Run:
        """All streams begin together."""
        start_s = self._clock()
        times_s: dict[int, list[float]] = {key: [] for key in range(len(prompts))}
        for key, prompt_ids in enumerate(prompts):
            self._scheduler.add(
                SequenceRequest(
                    key=key, prompt_ids=prompt_ids, sampling=SamplingParams(temperature=0.0), max_tokens=output
                )
            )
        while (plan := self._scheduler.schedule()) is not None:
            updates = self._scheduler.apply(self._runner.execute(plan))
            now_s = self._clock() - start_s
            for update in updates:
                assert isinstance(update.key, int)
                times_s[update.key] += [now_s] * len(update.token_ids)
        assert all(len(times) == output for times in times_s.values()), "a stream ended early"
        return Run(
            streams=len(prompts),
            prompt=len(prompts[0]),
            output=output,
            seconds=max(times[-1] for times in times_s.values()),
            ttft_s=sum(times[0] for times in times_s.values()) / len(prompts),
            tpot_s=sum((times[-1] - times[0]) / (output - 1) for times in times_s.values()) / len(prompts),
        )
