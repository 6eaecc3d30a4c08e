"""What a step costs the Router's scheduler: plan, encode, apply; of 1 to 1,024 sequences that decode, without ranks.

    python -m bench.scheduler [--streams 1,4,16,64,256,1024] [--out bench/results/scheduler.json]

The scheduler of a whole copy, as the engine drives it, with prefix cache, drafts and thinking budgets as `mull serve`
has them. Beside it, in the same run, the time of a step of 256 sequences of the built-in model: what the scheduler's
share is of. CPU time, since the machine may be busy.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

from bench.report import Spread, arguments, machine, versions, write
from cluster.offline import OfflineConfig, OfflineEngine
from cluster.router.blocks import BlockAllocator
from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest
from cluster.router.speculation import Speculation
from cluster.router.wire import RequestKey
from workers.step import SamplingParams, StepPlan, StepResult, decode_from_rank, encode

MODEL_DIR = Path(__file__).parents[1] / "deploy" / "models" / "pocket"
PROMPT = 64
BLOCK_SIZE = 32
NUM_STEPS = 200
VOCAB_SIZE = 1000
SHARED = 256
"""Sequences of the step that the scheduler's share is told of."""
PARTS = ("plan", "encode", "apply")


class Copy:
    """A scheduler with so many sequences in the middle of their thoughts, and ranks that draw tokens."""

    def __init__(self, num_seqs: int) -> None:
        self._draw = random.Random(num_seqs)
        config = SchedulerConfig(
            max_model_len=16384,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(512, num_seqs),
            speculation=Speculation(max_tokens=5),
            max_prefill_slowdown=2.5,
        )
        self.scheduler = CopyScheduler(config, [BlockAllocator(num_seqs * 512, BLOCK_SIZE)])
        for key in range(num_seqs):
            self.scheduler.add(
                SequenceRequest(
                    key=RequestKey(session=1, key=key),
                    prompt_ids=self._tokens(PROMPT),
                    sampling=SamplingParams(seed=key),
                    max_tokens=16000,
                    stop_token_ids=frozenset({VOCAB_SIZE + 1}),
                    starts_thinking=True,
                    think_end_id=VOCAB_SIZE,
                    thinking_budget=15000,
                    close_thinking_ids=[VOCAB_SIZE],
                )
            )
        while self.scheduler.stats.num_running < num_seqs:
            self.step({})

    def step(self, spent_ns: dict[str, list[int]]) -> None:
        """One step, its parts' CPU time added to the lists."""
        begun_ns = time.process_time_ns()
        plans = self.scheduler.schedule()
        planned_ns = time.process_time_ns()
        assert plans is not None
        encode(plans[0])
        sent_ns = time.process_time_ns()
        answer = encode(self._execute(plans[0]))
        answered_ns = time.process_time_ns()
        result = decode_from_rank(answer)
        assert isinstance(result, StepResult)
        self.scheduler.apply([result])
        applied_ns = time.process_time_ns()
        for part, part_ns in zip(
            PARTS, (planned_ns - begun_ns, sent_ns - planned_ns, applied_ns - answered_ns), strict=True
        ):
            spent_ns.setdefault(part, []).append(part_ns)

    def _execute(self, plan: StepPlan) -> StepResult:
        tokens = self._tokens(len(plan.sampling_slots))
        return StepResult(plan.step, rank=0, token_ids=tokens, accepted_ids=[[] for _ in plan.drafts])

    def _tokens(self, count: int) -> list[int]:
        return self._draw.choices(range(VOCAB_SIZE), k=count)


def scheduler_us(num_seqs: int, runs: int) -> dict[str, Spread]:
    """CPU-µs a step of each part and of all; of each run the mean over its steps."""
    copy = Copy(num_seqs)
    rows: dict[str, list[float]] = {part: [] for part in (*PARTS, "step")}
    for run in range(runs + 1):
        spent_ns: dict[str, list[int]] = {}
        for _ in range(NUM_STEPS):
            copy.step(spent_ns)
        if run:  # the first one warms up
            means_us = {part: statistics.mean(values) / 1e3 for part, values in spent_ns.items()}
            for part, mean_us in (means_us | {"step": sum(means_us.values())}).items():
                rows[part].append(mean_us)
    return {part: Spread.of(values) for part, values in rows.items()}


def model_step_us(num_seqs: int, threads: int, runs: int) -> Spread:
    """Wall-µs of a decode of so many sequences through the built-in model."""
    config = OfflineConfig(model_dir=str(MODEL_DIR), num_threads=threads, max_num_seqs=num_seqs)
    engine = OfflineEngine(config)
    draw = random.Random(0)
    prompts = [[draw.randrange(300) for _ in range(PROMPT)] for _ in range(num_seqs)]
    spent_us = []
    for _ in range(runs + 1):
        begun_s = time.perf_counter()
        engine.generate(prompts, 2, SamplingParams(temperature=0.0))
        short_s = time.perf_counter()
        engine.generate(prompts, 34, SamplingParams(temperature=0.0))
        spent_us.append(1e6 * (time.perf_counter() - short_s - (short_s - begun_s)) / 32)
    return Spread.of(spent_us[1:])


def main() -> None:
    parser = arguments(__doc__, streams="1,4,16,64,256,1024")
    parser.add_argument("--threads", type=int, default=2, help="of the built-in model")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": {**machine(), **versions("torch")}, "scheduler_us": {}}
    print("sequences     plan   encode    apply     step   a sequence (CPU-µs)")
    for num_seqs in map(int, args.streams.split(",")):
        spent = scheduler_us(num_seqs, args.runs)
        results["scheduler_us"][num_seqs] = spent
        parts = " ".join(f"{spent[part].median:8.1f}" for part in (*PARTS, "step"))
        print(f"{num_seqs:9d} {parts} {spent['step'].median / num_seqs:12.2f}", flush=True)
    step_us, own_us = model_step_us(SHARED, args.threads, args.runs), scheduler_us(SHARED, args.runs)["step"]
    share = own_us.median / step_us.median
    results["pocket_step_us"] = {
        "sequences": SHARED,
        "threads": args.threads,
        "step": step_us,
        "scheduler": own_us,
        "share": share,
    }
    print(f"of a step of {SHARED} sequences of the built-in model, {step_us} µs, that is {share:.1%}")
    write(args.out, results)


if __name__ == "__main__":
    main()
