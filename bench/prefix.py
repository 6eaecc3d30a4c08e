"""What the prefix cache is worth: time to the first token against the share of the prompt that is cached.

    python -m bench.prefix [--model DIR] [--runs 5] [--out bench/results/prefix.json] [--plot bench/results/prefix.png]

The engine in process. Two loads: prompts of 1,024 random tokens, of which some share is the beginning of an earlier
prompt; and chats with the built-in model behind one system prompt, turn by turn, with thoughts that the chat template
leaves out of the history, each against the same engine without the cache.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import Spread, arguments, machine, versions, write
from cluster.offline import OfflineConfig, OfflineEngine
from cluster.text.phases import THINK_END
from cluster.text.tokenizer import Tokenizer
from workers.step import SamplingParams

POCKET = Path(__file__).parents[1] / "deploy" / "models" / "pocket"
PROMPT = 1024
SHARES = (0.0, 0.5, 0.9, 0.99)
NUM_TURNS = 6
END = "<|im_end|>"
SYSTEM = "You work out sums. " + "Think first, step by step, and then give the result as a number. " * 20


@dataclass(frozen=True)
class FirstToken:
    """Of one prompt."""

    ttft_ms: float
    num_prompt_tokens: int
    hit_share: float
    """Of its tokens, those that were found in the cache."""


def engine(model_dir: Path, threads: int, *, with_cache: bool) -> OfflineEngine:
    """Steps of 512 tokens and blocks of 32, as `mull serve` has them."""
    return OfflineEngine(
        OfflineConfig(
            model_dir=str(model_dir),
            num_threads=threads,
            max_model_len=4096,
            max_num_batched_tokens=512,
            max_num_seqs=4,
            kv_memory_bytes=2**30,
            enable_prefix_cache=with_cache,
        )
    )


def first_token(made: OfflineEngine, prompt_ids: list[int]) -> FirstToken:
    """Generate one."""
    hits_before = made.stats.prefix_hit_tokens_total
    begun_s = time.perf_counter()
    made.generate([prompt_ids], 1, SamplingParams(temperature=0.0))
    ttft_s = time.perf_counter() - begun_s
    hits = made.stats.prefix_hit_tokens_total - hits_before
    return FirstToken(1e3 * ttft_s, len(prompt_ids), hits / len(prompt_ids))


def measure_shares(model_dir: Path, threads: int, runs: int) -> list[dict[str, Any]]:
    """Shares in turn, each behind a beginning of its own."""
    made = engine(model_dir, threads, with_cache=True)
    draw = random.Random(0)
    rows: dict[float, list[FirstToken]] = {share: [] for share in SHARES}
    for run in range(runs + 1):
        for share in SHARES:
            begin = [draw.randrange(900) for _ in range(int(share * PROMPT))]
            if begin:
                first_token(made, begin)
            first = first_token(made, begin + [draw.randrange(900) for _ in range(PROMPT - len(begin))])
            if run:  # the first one warms up
                rows[share].append(first)
    return [
        {
            "shared": share,
            "hit_share": firsts[0].hit_share,
            "ttft_ms": Spread.of([first.ttft_ms for first in firsts]),
        }
        for share, firsts in rows.items()
    ]


def chat(made: OfflineEngine, tokenizer: Tokenizer, seed: int) -> list[FirstToken]:
    """One chat, question by question; the history has the answers without their thoughts."""
    draw = random.Random(seed)
    stop, think_end = tokenizer.token_id(END), tokenizer.token_id(THINK_END)
    assert stop is not None, "the built-in model has it"
    assert think_end is not None, "the built-in model thinks"
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    firsts = []
    for _ in range(NUM_TURNS):
        messages.append({"role": "user", "content": f"What is {draw.randrange(100)} + {draw.randrange(100)}?"})
        prompt_ids = tokenizer.encode(tokenizer.render_chat(messages))
        firsts.append(first_token(made, prompt_ids))
        (output,) = made.generate([prompt_ids], 120, SamplingParams(seed=seed), frozenset({stop}))
        answer = output[output.index(think_end) + 1 :] if think_end in output else []
        messages.append({"role": "assistant", "content": tokenizer.decode(answer).strip()})
    return firsts


def measure_chats(threads: int, runs: int) -> list[dict[str, Any]]:
    """By turn, over so many chats behind the same system prompt."""
    tokenizer = Tokenizer.from_dir(POCKET)
    engines = {name: engine(POCKET, threads, with_cache=name == "cached") for name in ("cached", "uncached")}
    for made in engines.values():
        chat(made, tokenizer, seed=0)
    chats: dict[str, list[list[FirstToken]]] = {name: [] for name in engines}
    for run in range(1, runs + 1):
        for name, made in engines.items():
            chats[name].append(chat(made, tokenizer, seed=run))
    return [
        {
            "turn": turn + 1,
            "prompt_tokens": Spread.of([float(one[turn].num_prompt_tokens) for one in chats["cached"]]),
            "hit_share": Spread.of([one[turn].hit_share for one in chats["cached"]]),
            **{f"{name}_ttft_ms": Spread.of([one[turn].ttft_ms for one in of]) for name, of in chats.items()},
        }
        for turn in range(NUM_TURNS)
    ]


def plot(path: Path, shares: list[dict[str, Any]], turns: list[dict[str, Any]]) -> None:
    """Both loads side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    x = [100 * row["hit_share"] for row in shares]
    left.plot(x, [row["ttft_ms"].median for row in shares], marker="o")
    left.fill_between(x, [row["ttft_ms"].min for row in shares], [row["ttft_ms"].max for row in shares], alpha=0.2)
    left.set(xlabel="prompt found in the cache, %", ylabel="time to the first token, ms", ylim=(0, None))
    left.set_title(f"prompts of {PROMPT:,} tokens")
    x = [row["turn"] for row in turns]
    for name in ("uncached", "cached"):
        spreads = [row[f"{name}_ttft_ms"] for row in turns]
        right.plot(x, [spread.median for spread in spreads], marker="o", label=name)
        right.fill_between(x, [spread.min for spread in spreads], [spread.max for spread in spreads], alpha=0.2)
    right.set(xlabel="turn of the chat", ylabel="time to the first token, ms", ylim=(0, None))
    right.set_title("chats behind one system prompt")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = arguments(__doc__, streams="1")
    parser.add_argument("--model", type=Path, default=POCKET)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="a PNG; needs matplotlib")
    args = parser.parse_args()
    shares = measure_shares(args.model, args.threads, args.runs)
    for row in shares:
        print(f"{row['shared']:.0%} shared, {row['hit_share']:.1%} found: first token after {row['ttft_ms']} ms")
    turns = measure_chats(args.threads, args.runs)
    for row in turns:
        print(
            f"turn {row['turn']}: {row['prompt_tokens'].median:.0f} tokens, {row['hit_share'].median:.0%} found: "
            f"{row['cached_ttft_ms']} ms, without the cache {row['uncached_ttft_ms']} ms"
        )
    about = {**machine(), **versions("torch"), "threads": args.threads, "model": args.model.name}
    write(args.out, {"machine": about, "shares": shares, "turns": turns})
    if args.plot is not None:
        plot(args.plot, shares, turns)


if __name__ == "__main__":
    main()
