"""The engine in process against transformers on the same checkpoint, threads and prompts, interleaved in one run.

    python -m bench.engine [--model DIR] [--streams 1,8,32] [--out bench/results/engine.json]

Greedy, prompts of 64 random tokens, 32 tokens out (no stop token); tokens/s counts outputs and includes the prefill.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.report import Spread, arguments, machine, versions, write
from cluster.offline import OfflineConfig, OfflineEngine
from workers.step import SamplingParams

Prompts = Sequence[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]
"""(prompts, tokens out) -> the tokens of each."""


def mull_engine(model_dir: Path, threads: int) -> Generate:
    """Scheduler and ModelRunner in this process: what one rank does for one Router.

    Without the prefix cache: the same prompts come back in every run, and the peers compute them each time.
    """
    engine = OfflineEngine(OfflineConfig(model_dir=str(model_dir), num_threads=threads, enable_prefix_cache=False))
    return lambda prompts, tokens_out: engine.generate(prompts, tokens_out, SamplingParams(temperature=0.0))


def transformers_generate(model: Any) -> Generate:
    """`generate` on one padded batch; all prompts have the same length, so nothing is padded."""

    def generate(prompts: Prompts, tokens_out: int) -> list[list[int]]:
        ids_BT = torch.tensor(prompts)
        mask_BT = torch.ones_like(ids_BT)
        out_BT = model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=tokens_out,
            min_new_tokens=tokens_out,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        rows: list[list[int]] = out_BT[:, ids_BT.shape[1] :].tolist()
        return rows

    return generate


def transformers_continuous(model: Any) -> Generate:
    """transformers' continuous batching, its manager kept between runs so that set-up is not counted.

    A manager is sized for the first requests it gets, so each number of streams has its own.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model.destroy_cached_continuous_batching_manager()
    batching = ContinuousBatchingConfig(page_size=256, num_blocks=64, max_batch_tokens=2048)

    def generate(prompts: Prompts, tokens_out: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=tokens_out, do_sample=False, eos_token_id=-1)
        outputs = model.generate_batch(
            [list(p) for p in prompts],
            generation_config=config,
            continuous_batching_config=batching,
            persistent_manager=True,
            progress_bar=False,
        )
        return [output.generated_tokens for output in outputs.values()]

    return generate


def load_transformers(model_dir: Path) -> Any:
    """The same directory in transformers, dequantised, in fp32 as our CPU path computes."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    quantization = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=quantization).float()


def measure(engines: dict[str, Generate], prompts: Prompts, tokens_out: int, runs: int) -> dict[str, Spread]:
    """Tokens/s of each engine: one warm-up, then `runs` rounds in which the engines take turns."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_number in range(runs + 1):
        for name, generate in engines.items():
            start_s = time.perf_counter()
            outputs = generate(prompts, tokens_out)
            elapsed_s = time.perf_counter() - start_s
            assert all(len(output) == tokens_out for output in outputs), f"{name} stopped early"
            if round_number > 0:
                rates[name].append(len(prompts) * tokens_out / elapsed_s)
    return {name: Spread.of(values) for name, values in rates.items()}


def main() -> None:
    parser = arguments(__doc__, streams="1,8,32")
    parser.add_argument("--model", type=Path, default=Path("deploy/models/pocket"))
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = load_transformers(args.model)
    mull = mull_engine(args.model, args.threads)
    draw = random.Random(0)
    vocab_size = min(model.config.vocab_size, 300)
    results: dict[str, Any] = {"machine": machine(), "versions": versions("torch", "transformers"), "streams": {}}
    print(results["machine"], results["versions"], f"threads {args.threads}", sep="\n")
    for streams in map(int, args.streams.split(",")):
        prompts = [[draw.randrange(vocab_size) for _ in range(args.prompt)] for _ in range(streams)]
        engines = {
            "mull": mull,
            "transformers generate": transformers_generate(model),
            "transformers continuous": transformers_continuous(model),
        }
        rates = measure(engines, prompts, args.tokens, args.runs)
        results["streams"][streams] = rates
        for name, rate in rates.items():
            ratio = rates["mull"].median / rate.median
            print(f"{streams:4d} streams  {name:24s} {rate!s:32s} tokens/s   mull is {ratio:.2f}×")
    write(args.out, results)


if __name__ == "__main__":
    main()
