"""Time and bytes of a MoE layer's traffic: each dispatcher against a plain all_gather of the same tokens.

    python -m bench.dispatch [--ranks 2,4] [--tokens 1,4,...,8192] [--out bench/results/dispatch.json] [--plot FILE]

Rows of 2,048 fp32, 8 of 128 experts per token, chosen evenly; experts compute nothing. Tokens are those of the whole
copy: split evenly over its groups, or all in one of them while the others decode nothing. The local dispatcher has one
group. A layer's time is that of its slowest rank; methods take turns within a round, after a barrier. Bytes are those
that leave a rank, of the rank that sends most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.processes import on_ranks
from bench.report import Spread, machine, versions, write
from workers.config import ModelConfig, ParallelLayout, Quantization, ShardSpec
from workers.experts.choice import DispatcherChoice
from workers.experts.dispatch import Dispatcher, LocalDispatcher
from workers.experts.rows import RoutedRows
from workers.layout import split_evenly
from workers.parallel import ParallelState
from workers.rank_group import RankGroup

HIDDEN, NUM_EXPERTS, NUM_CHOSEN = 2048, 128, 8
MODEL = ModelConfig(
    architecture="qwen3_moe",
    vocab_size=1024,
    hidden_size=HIDDEN,
    intermediate_size=6144,
    num_layers=1,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    eos_token_ids=(0,),
    quantization=Quantization(block_rows=128, block_cols=128),
    num_experts=NUM_EXPERTS,
    num_experts_per_token=NUM_CHOSEN,
    moe_intermediate_size=768,
)
TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 8192]
BASELINE = "all_gather"
METHODS = ["local", "gather-scatter", "all-to-all", "gather-scatter fp8", "all-to-all fp8"]
TRAFFICS = ["even", "one group"]
SMALL_ROUNDS, LARGE_ROUNDS, LARGE_TOKENS = 15, 5, 2048


class CountingGroup(RankGroup):
    """Counts the bytes that leave this rank; over the network's library also where ranks could share memory."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__(group.index, group.size, group.process_group)
        self.sent_bytes = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 2:  # one call of the library, which sends half, then half of the sums
            self.sent_bytes += x.nbytes
        return super().all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        self.sent_bytes += (self.size - 1) * x.nbytes
        return super().all_gather(x)

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        row_bytes = rows[0].nbytes if len(rows) else 0
        self.sent_bytes += (sum(send_counts) - send_counts[self.index]) * row_bytes
        return super().all_to_all(rows, send_counts, receive_counts)


def group_tokens(traffic: str, num_tokens: int, num_groups: int) -> list[int]:
    if traffic == "one group":
        return [num_tokens] + [0] * (num_groups - 1)
    return [split_evenly(num_tokens, num_groups, group).size for group in range(num_groups)]


def random_rows(count: int, seed: int) -> RoutedRows:
    generator = torch.Generator().manual_seed(seed)
    weights_TK, slots_TK = torch.rand(count, NUM_EXPERTS, generator=generator).topk(NUM_CHOSEN)
    return RoutedRows(torch.randn(count, HIDDEN, generator=generator), slots_TK, weights_TK)


def methods(parallel: ParallelState, sizes: list[int]) -> dict[str, Callable[[], object]]:
    """What a rank of dp = world runs in turn. Tokens of the local dispatcher are those of all groups."""
    spec, capacity = ShardSpec(parallel.layout, parallel.rank), max(sizes)
    own, everything = random_rows(sizes[parallel.rank], parallel.rank), random_rows(sum(sizes), 99)
    padded_CH = torch.zeros(capacity, HIDDEN)

    def through(dispatcher: Dispatcher[Any], tokens: RoutedRows) -> Callable[[], object]:
        def run() -> Tensor:
            rows, handle = dispatcher.dispatch(tokens)
            return dispatcher.combine(rows.x_RH, handle)

        return run

    exact = DispatcherChoice(MODEL, spec, parallel, torch.float32, "exact")
    fp8 = DispatcherChoice(MODEL, spec, parallel, torch.float32, "fp8")
    return {
        BASELINE: lambda: parallel.world.all_gather(padded_CH),
        "local": through(LocalDispatcher(parallel.world), everything),
        "gather-scatter": through(exact.gather_scatter(capacity), own),
        "all-to-all": through(exact.all_to_all(), own),
        "gather-scatter fp8": through(fp8.gather_scatter(capacity), own),
        "all-to-all fp8": through(fp8.all_to_all(), own),
    }


def measure_on_rank(parallel: ParallelState, cases: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """For each case and method: bytes sent, and seconds of each round."""
    parallel = ParallelState(parallel.rank, parallel.layout, CountingGroup(parallel.world), parallel.tp)
    return [_measure_case(parallel, *case) for case in cases]


def _measure_case(parallel: ParallelState, traffic: str, num_tokens: int) -> dict[str, Any]:
    runs = methods(parallel, group_tokens(traffic, num_tokens, parallel.world_size))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sent: dict[str, int] = {}
    world = parallel.world
    assert isinstance(world, CountingGroup)
    for round_number in range(1 + (LARGE_ROUNDS if num_tokens >= LARGE_TOKENS else SMALL_ROUNDS)):
        for name, run in runs.items():
            world.minimum(0, torch.device("cpu"))  # a barrier
            world.sent_bytes, start = 0, time.perf_counter()
            run()
            elapsed_s, sent[name] = time.perf_counter() - start, world.sent_bytes
            if round_number > 0:
                seconds[name].append(elapsed_s)
    return {"seconds": seconds, "sent_bytes": sent}


def measure(num_ranks: int, cases: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """One row per case and method."""
    layout = ParallelLayout(dp=num_ranks)
    ranks = on_ranks(layout, measure_on_rank, [(cases,)] * num_ranks)
    return [row for index, case in enumerate(cases) for row in _rows(num_ranks, case, [rank[index] for rank in ranks])]


def _rows(num_ranks: int, case: tuple[str, int], ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def time_of(name: str) -> Spread:
        return Spread.of([max(rounds) for rounds in zip(*(rank["seconds"][name] for rank in ranks), strict=True)])

    def bytes_of(name: str) -> int:
        return max(rank["sent_bytes"][name] for rank in ranks)

    traffic, tokens = case
    base_s, base_bytes = time_of(BASELINE).median, bytes_of(BASELINE)
    return [
        {"ranks": num_ranks, "traffic": traffic, "tokens": tokens, "method": name}
        | {"time_s": time_of(name), "sent_bytes": bytes_of(name)}
        | {"time_ratio": time_of(name).median / base_s, "bytes_ratio": bytes_of(name) / base_bytes}
        for name in (BASELINE, *METHODS)
    ]


def print_report(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['ranks']} ranks  {row['traffic']:10s} {row['tokens']:5d} tokens  {row['method']:20s} "
            f"{row['sent_bytes'] / 1e3:10.1f} kB = {row['bytes_ratio']:5.2f}×   "
            f"{1e3 * row['time_s'].median:8.2f} ms = {row['time_ratio']:5.2f}×"
        )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Ratios to all_gather over the tokens of a layer: bytes above, time below; a column per ranks and traffic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(dict.fromkeys((row["ranks"], row["traffic"]) for row in rows))
    figure, axes = pyplot.subplots(2, len(columns), figsize=(4 * len(columns), 7), sharex=True, squeeze=False)
    for column, (ranks, traffic) in enumerate(columns):
        here = [row for row in rows if (row["ranks"], row["traffic"]) == (ranks, traffic)]
        for line, ratio in enumerate(("bytes_ratio", "time_ratio")):
            axis = axes[line][column]
            for name in METHODS:
                points = [(row["tokens"], row[ratio]) for row in here if row["method"] == name]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            axis.axhline(1, color="gray", linewidth=0.8)
            axis.set_xscale("log", base=4)
            axis.set_yscale("log", base=2)
            for numbers in (axis.xaxis, axis.yaxis):
                numbers.set_major_formatter(lambda value, _position: f"{value:g}")
            axis.set_ylabel(f"{ratio.split('_')[0]} / all_gather's")
        axes[0][column].set_title(f"{ranks} ranks, {traffic}")
        axes[1][column].set_xlabel("tokens of the copy")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG; needs matplotlib")
    args = parser.parse_args()
    cases = [(traffic, tokens) for traffic in TRAFFICS for tokens in map(int, args.tokens.split(","))]
    rows = [row for ranks in map(int, args.ranks.split(",")) for row in measure(ranks, cases)]
    host = machine()
    print(host, versions("torch"), sep="\n")
    print_report(rows)
    if args.plot is not None:
        draw(rows, args.plot)
    write(args.out, {"machine": host, "versions": versions("torch"), "hidden_size": HIDDEN, "rows": rows})


if __name__ == "__main__":
    main()
