"""The GPU kernels and whole decode steps on one H200, as shares of what the machine can do; minutes.

    python -m bench.gpu [--out bench/results/gpu.json]            all of it, on the GPU of this machine
    TRITON_INTERPRET=1 python -m bench.gpu                        on a CPU: tiny sizes, to see that it works
    python -m bench.gpu --build                                   without a GPU: what the compiler makes for Hopper

First the machine's ceilings: a copy's bandwidth, bf16 and FP8 products. Then every kernel: error against its reference,
GB/s and TFLOP/s, and how much of the time a perfect kernel would take. Then rank slices: the whole decode step of one
rank of Qwen3-235B and of Qwen3-4B, in a CUDA graph. Then a rank of the whole 4B by itself, and the server from end to
end, with it and a model of the 30B-A3B's shape. What has not been measured on a GPU is not in `results`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu_machine import all_versions, gpu
from bench.gpu_serving import servings
from bench.gpu_targets import held_against
from bench.report import Spread, machine, versions, write

if TYPE_CHECKING:
    from bench.gpu_slice import RankSlice

WARM_UPS = 3
RUNS = 11
LAUNCHES_PER_GRAPH = 24
SLICE_LOADS = tuple((streams, keys) for keys in (4096, 32768, 131072) for streams in (1, 8, 32, 64, 128, 256))
"""Streams, and keys of each; what does not fit is told."""
PROMPT = 8192
PARTS = ("kernels", "slices", "servings")
KERNELS_SHARE, SLICES_SHARE = 0.3, 0.55
"""Of the time, at which each ends."""
COMMUNICATION = (0.0, 1.0, 2.0)
"""Times the published latency."""


def time_s(launches: list[Callable[[], Any]], device: torch.device, at_once: int = LAUNCHES_PER_GRAPH) -> Spread:
    """Of one launch. On a GPU of one in a graph of many; on a CPU of a single one, which says that it works."""
    if device.type != "cuda":
        start = time.perf_counter()
        launches[0]()
        return Spread.of([time.perf_counter() - start])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    repeats = max(1, at_once // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches * repeats:
            launch()
    return Spread.of([seconds / (repeats * len(launches)) for seconds in _replays(graph)])


def _replays(graph: torch.cuda.CUDAGraph) -> Iterator[float]:
    for run in range(WARM_UPS + RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if run >= WARM_UPS:
            yield start.elapsed_time(end) / 1e3


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy, read and written; FLOP/s of bf16 and FP8 products on random values; a wait's cycles."""
    on_gpu = device.type == "cuda"
    size, side = (2**31, 8192) if on_gpu else (2**22, 128)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_s([lambda: target.copy_(source)], device)
    found = {"copy_bytes_per_s": 2 * size / copy.median}
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    product = time_s([lambda: torch.mm(a, b)], device)
    found["bf16_flops"] = 2 * side**3 / product.median
    if on_gpu:
        a8, b8, one = (
            a.to(torch.float8_e4m3fn),
            b.t().contiguous().to(torch.float8_e4m3fn),
            torch.ones((), device=device),
        )
        fp8 = time_s([lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16)], device)
        found["fp8_flops"] = 2 * side**3 / fp8.median
        wait = time_s([lambda: torch.cuda._sleep(100_000)], device)
        found["wait_hz"] = 1e5 / wait.median
    return found


def kernels(device: torch.device, found: dict[str, float], until: float) -> Iterator[dict[str, Any]]:
    """Each case; what fails is told, and so is where the time was up."""
    from bench.gpu_cases import H200, TINY, Inputs, cases

    for case in cases(H200 if device.type == "cuda" else TINY, Inputs.on(device)):
        if time.monotonic() > until:
            yield {"case": case.name, "skipped": "the time was up"}
            return
        try:
            spread = time_s(case.launches, device)
            rivals = {name: _rival(launches, device) for name, launches in case.rivals.items()}
            error = None if case.error is None else case.error()
        except Exception as failure:  # one kernel that fails must not hide the others
            yield {"case": case.name, "failed": f"{type(failure).__name__}: {failure}"[:400]}
            continue
        if device.type != "cuda":
            yield {"case": case.name, "seconds": spread.median, "error": error}
            continue
        peak = found.get("fp8_flops", found["bf16_flops"]) if case.is_fp8 else found["bf16_flops"]
        floor_s = max(case.num_bytes / found["copy_bytes_per_s"], case.flops / peak)
        yield {
            "case": case.name,
            "seconds": spread,
            "gb_per_s": case.num_bytes / spread.median / 1e9,
            "tflops": case.flops / spread.median / 1e12,
            "share_of_ceiling": floor_s / spread.median,
            "error": error,
            "rivals_s": rivals,
        }


def _rival(launches: list[Callable[[], Any]], device: torch.device) -> float | str:
    try:
        return time_s(launches, device).median
    except (RuntimeError, AttributeError, TypeError) as failure:  # a version of torch, or a GPU, that lacks it
        return f"cannot run: {failure}"[:200]


def slices(device: torch.device, found: dict[str, float], until: float) -> Iterator[dict[str, Any]]:
    """Decode steps of one rank: the whole 4B, and the 235B on 8 and on 4 GPUs."""
    from bench.gpu_slice import RankSlice, model_of

    on_gpu = device.type == "cuda"
    tiny = {"hidden_size": 256, "vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    for shape, tp, waits in (("4b", 1, (0.0,)), ("235b", 8, COMMUNICATION), ("235b", 4, COMMUNICATION)):
        small = {} if on_gpu else tiny | {"intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 8}
        about = {"model": shape, "tp": tp}
        if time.monotonic() > until:
            yield about | {"skipped": "the time was up"}
            continue
        rank = RankSlice(model_of(shape, None if on_gpu else 1, **small), tp, device, 64 if on_gpu else 16)
        yield about | {"weight_gb": rank.weight_bytes / 1e9} | _prefill(rank, PROMPT if on_gpu else 20, device)
        for num_seqs, num_keys in SLICE_LOADS if on_gpu else ((2, 20),):
            row = about | {"streams": num_seqs, "keys": num_keys}
            yield from (row | found_row for found_row in _steps(rank, num_seqs, num_keys, waits, found, until))
        del rank
        torch.cuda.empty_cache()


def _steps(
    rank: RankSlice, num_seqs: int, num_keys: int, waits: tuple[float, ...], found: dict[str, float], until: float
) -> Iterator[dict[str, Any]]:
    """One load, once for each of the times that collectives take."""
    from bench.gpu_slice import ALL_REDUCE_S, Load

    load, on_gpu = Load(num_seqs=num_seqs, num_keys=num_keys), rank.device.type == "cuda"
    if time.monotonic() > until:
        yield {"skipped": "the time was up"}
        return
    if on_gpu and rank.kv_bytes(load) > 0.8 * torch.cuda.mem_get_info()[0]:
        yield {"skipped": f"{rank.kv_bytes(load) / 1e9:.0f} GB of KV do not fit"}
        return
    batch, kv = rank.step(load)
    floor_s = rank.floor_bytes(load) / found["copy_bytes_per_s"]
    for wait in waits:
        rank.group.wait_cycles = int(wait * ALL_REDUCE_S * found.get("wait_hz", 0))
        with torch.inference_mode():
            spread = time_s([lambda: rank.run(batch, kv)], rank.device, at_once=1)
        yield {
            "communication": wait,
            "step_s": spread,
            "tokens_per_s": num_seqs / spread.median,
            "share_of_floor": floor_s / spread.median,
        }
    kv.free()


def _prefill(rank: RankSlice, num_tokens: int, device: torch.device) -> dict[str, Any]:
    """A prompt in one step."""
    batch, kv = rank.prompt(num_tokens)
    with torch.inference_mode():
        spread = time_s([lambda: rank.run(batch, kv)], device, at_once=1)
    kv.free()
    return {"prompt": num_tokens, "step_s": spread, "tokens_per_s": num_tokens / spread.median}


def build() -> Iterator[dict[str, Any]]:
    """Every case's kernels, compiled for Hopper at the real shapes."""
    from bench.gpu_build import compiling
    from bench.gpu_cases import H200, Inputs, cases

    with compiling() as take:
        for case in cases(H200, Inputs.for_build()):
            take()  # what made the inputs
            case.launches[0]()
            yield from ({"case": case.name} | built.as_json() for built in take())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which what is left is skipped")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them (default: %(default)s)")
    parser.add_argument("--build", action="store_true", help="compile for Hopper, and run nothing")
    arguments = parser.parse_args()
    if arguments.build:
        rows = []
        for row in build():
            rows.append(row)
            print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        write(arguments.out, {"target": "sm_90", "versions": versions("torch", "triton"), "kernels": rows})
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("there is no GPU here; TRITON_INTERPRET=1 runs tiny sizes in Triton's interpreter")
        os.environ |= {"MULL_GPU_KERNELS": "interpret", "MULL_CPU_KERNELS": "torch"}
        print("no GPU: tiny sizes in Triton's interpreter; this shows that the bench works, its times mean nothing")
    parts = arguments.parts.split(",")
    print_and_write(device, arguments.out, time.monotonic() + 60 * arguments.minutes, parts)
    if arguments.out is not None:
        from bench.gpu_plot import draw

        draw(arguments.out)


def print_and_write(device: torch.device, out: Path | None, until: float, parts: list[str]) -> None:
    """Rows as they come; the file has all of them."""
    about = machine() | gpu(device)
    used = all_versions()
    found = ceilings(device)
    print(about, used, {name: f"{value:.4g}" for name, value in found.items()}, sep="\n")
    results: dict[str, Any] = {"machine": about, "versions": used, "ceilings": found}
    now = time.monotonic()
    left = until - now
    for name, rows in (
        ("kernels", kernels(device, found, now + KERNELS_SHARE * left)),
        ("slices", slices(device, found, now + SLICES_SHARE * left)),
        ("servings", servings(device, until)),
    ):
        if name not in parts:
            continue
        results[name] = []
        for row in rows:
            results[name].append(row)
            print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
            write(out, results)
    if device.type == "cuda":
        results["targets"] = list(held_against(results))
        for row in results["targets"]:
            print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        write(out, results)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(item)}" for name, item in value.items()) or "–"
    return str(value)


if __name__ == "__main__":
    main()
