"""What KV in the host's memory is worth where blocks run out: the same loads with and without it.

    python -m bench.host_kv [--model DIR] [--streams 16] [--runs 3] [--out bench/results/host_kv.json]

The engine in process, with a KV pool for a third of what is asked of it. Two loads: answers that grow until most of
their sequences must give way, again and again; and conversations, of which each goes on when the others have taken its
blocks. Greedy; random prompts; engines in turn.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from bench.report import Spread, arguments, machine, versions, write
from cluster.offline import OfflineConfig, OfflineEngine
from workers.config import ModelConfig, ShardSpec
from workers.kv_memory import kv_token_bytes
from workers.layout import ParallelLayout
from workers.step import SamplingParams

POCKET = Path(__file__).parents[1] / "deploy" / "models" / "pocket"
PROMPT, OUTPUT = 128, 640
HISTORY = 1536
GREEDY = SamplingParams(temperature=0.0)


def engine(model_dir: Path, threads: int, streams: int, *, host_share: float) -> OfflineEngine:
    """With room for a third of all sequences; `host_share`: of all of them, in the host's memory."""
    token_bytes = kv_token_bytes(ModelConfig.from_dir(model_dir), ShardSpec(ParallelLayout(), 0), itemsize=4)
    wanted = streams * (PROMPT + OUTPUT) * token_bytes
    return OfflineEngine(
        OfflineConfig(
            model_dir=str(model_dir),
            num_threads=threads,
            max_model_len=HISTORY + 256,
            max_num_batched_tokens=512,
            max_num_seqs=streams,
            kv_memory_bytes=wanted // 3,
            host_kv_bytes=int(host_share * wanted * 2),
        )
    )


def grow(made: OfflineEngine, streams: int, seed: int) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the tokens."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(900) for _ in range(PROMPT)] for _ in range(streams)]
    begun_s = time.perf_counter()
    outputs = made.generate(prompts, OUTPUT, GREEDY)
    return streams * OUTPUT / (time.perf_counter() - begun_s), outputs


def converse(made: OfflineEngine, streams: int, seed: int) -> float:
    """Milliseconds to the first token of a second turn, on average."""
    draw = random.Random(seed)
    histories = [[draw.randrange(900) for _ in range(HISTORY)] for _ in range(streams)]
    for history in histories:
        made.generate([history], 1, GREEDY)
    begun_s = time.perf_counter()
    for history in histories:
        made.generate([[*history, *(draw.randrange(900) for _ in range(32))]], 1, GREEDY)
    return 1e3 * (time.perf_counter() - begun_s) / streams


def main() -> None:
    parser = arguments(__doc__, streams="16")
    parser.add_argument("--model", type=Path, default=POCKET)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    streams = int(args.streams)
    shares = {"without": 0.0, "with": 1.0}
    engines = {name: engine(args.model, args.threads, streams, host_share=share) for name, share in shares.items()}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    turns: dict[str, list[float]] = {name: [] for name in engines}
    num_same = 0
    for seed in range(args.runs + 1):
        told = []
        for name, made in engines.items():
            rate, outputs = grow(made, streams, seed)
            told.append(outputs)
            turn_ms = converse(made, streams, seed)
            if seed:  # the first one warms up
                rates[name].append(rate)
                turns[name].append(turn_ms)
        num_same += sum(one == other for one, other in zip(*told, strict=True))
    rows: list[dict[str, Any]] = []
    for name, made in engines.items():
        stats = made.stats
        rows.append(
            {
                "host_memory": name,
                "tokens_per_s": Spread.of(rates[name]),
                "second_turn_ms": Spread.of(turns[name]),
                "preemptions": stats.num_preempted_total,
                "offloaded_tokens": stats.offloaded_tokens_total,
                "fetched_tokens": stats.fetched_tokens_total,
                "host_blocks": stats.num_host_blocks,
            }
        )
        print(
            f"{name} host memory: {rows[-1]['tokens_per_s']} tokens/s, second turn after {rows[-1]['second_turn_ms']} "
            f"ms; {stats.num_preempted_total} preemptions, {stats.fetched_tokens_total:,} tokens brought back"
        )
    same = num_same / (streams * (args.runs + 1))
    print(f"the same tokens in {same:.0%} of the answers")
    about = {**machine(), **versions("torch"), "threads": args.threads, "model": args.model.name, "streams": streams}
    write(args.out, {"machine": about, "same_answers": same, "loads": rows})


if __name__ == "__main__":
    main()
