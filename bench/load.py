"""How a rank loads: bytes read and peak memory against its slice, seconds against `dd` reading as many bytes.

    python -m bench.load [--model DIR | --random 0.6b] [--tp 2] [--runs 3] [--out bench/results/load.json]

`--random` makes a random FP8 checkpoint of a real shape in a temporary directory. Every run is a fresh process. Files
are in the page cache (an uncounted run puts them there), so `dd` is bare copying, and the ratio is what slicing and
laying weights out in panels add.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.make_checkpoint import SHAPES, write_checkpoint
from bench.report import Spread, machine, versions, write
from workers.checkpoint import Checkpoint
from workers.config import ParallelLayout, ShardSpec

POCKET = Path(__file__).parents[1] / "deploy" / "models" / "pocket"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=POCKET)
    parser.add_argument("--random", choices=SHAPES, help="make a random FP8 checkpoint of this shape instead")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--one-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_rank is not None:
        print(json.dumps(load_one_rank(options.model, options.tp, options.one_rank)))
        return
    with tempfile.TemporaryDirectory(prefix="mull-load-") as scratch:
        model = options.model
        if options.random is not None:
            model = write_checkpoint(Path(scratch), options.random)
        report = measure(model, options.random or model.name, options.tp, options.runs)
    print_report(report)
    write(options.out, report)


def measure(model: Path, name: str, tp: int, runs: int) -> dict[str, Any]:
    """Medians of `runs` fresh processes per rank."""
    ranks = [measure_rank(model, tp, rank, runs) for rank in range(tp)]
    return {"model": name, "tp": tp, "machine": machine(), "versions": versions("torch", "safetensors"), "ranks": ranks}


def measure_rank(model: Path, tp: int, rank: int, runs: int) -> dict[str, Any]:
    samples = [load_in_a_fresh_process(model, tp, rank) for _ in range(runs + 1)][1:]
    sizes = {name: samples[0][name] for name in ("slice_bytes", "read_bytes", "final_bytes", "largest_tensor_bytes")}
    load_s = Spread.of([sample["load_s"] for sample in samples])
    dd_s = Spread.of([seconds_of_dd(model, sizes["slice_bytes"]) for _ in range(runs)])
    peak_bytes = max(sample["peak_bytes"] for sample in samples)
    return sizes | {
        "rank": rank,
        "load_s": load_s,
        "dd_s": dd_s,
        "load_to_dd": load_s.median / dd_s.median,
        "peak_bytes": peak_bytes,
        "read_to_slice": sizes["read_bytes"] / sizes["slice_bytes"],
        "peak_to_bound": peak_bytes / (sizes["final_bytes"] + sizes["largest_tensor_bytes"]),
    }


def load_in_a_fresh_process(model: Path, tp: int, rank: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.load", "--model", str(model), "--tp", str(tp), "--one-rank", str(rank)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sample: dict[str, Any] = json.loads(output)
    return sample


def load_one_rank(model: Path, tp: int, rank: int) -> dict[str, Any]:
    """Runs in the fresh process: a first read for the time, a second for the bytes and the memory.

    What the first leaves behind (about 10 MB: code pages, threads' stacks and arenas, torch's lazy tables) is the
    process's, whatever it reads.
    """
    spec = ShardSpec(ParallelLayout(tp=tp), rank)
    start = time.perf_counter()
    params = Checkpoint.open(model).read(spec)
    load_s = time.perf_counter() - start
    params.clear()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present size
    before, read_before = status_bytes("VmRSS"), read_call_bytes()
    checkpoint = Checkpoint.open(model)
    params = checkpoint.read(spec)
    return {
        "load_s": load_s,
        "read_bytes": read_call_bytes() - read_before,
        "peak_bytes": status_bytes("VmHWM") - before,
        "slice_bytes": checkpoint.slice_bytes(spec),
        "final_bytes": sum(param.nbytes for param in params.values()),
        "largest_tensor_bytes": max(param.nbytes for param in params.values()),
    }


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def read_call_bytes() -> int:
    """What this process's read calls have returned, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def seconds_of_dd(model: Path, num_bytes: int) -> float:
    """`dd` over the checkpoint's files until it has read as many bytes."""
    start = time.perf_counter()
    for file in sorted(model.glob("*.safetensors")):
        count = min(num_bytes, file.stat().st_size)
        arguments = ["bs=4M", "iflag=count_bytes", f"count={count}", "status=none"]
        subprocess.run(["dd", f"if={file}", "of=/dev/null", *arguments], check=True)
        num_bytes -= count
    return time.perf_counter() - start


def print_report(report: dict[str, Any]) -> None:
    host = report["machine"]
    print(
        f"{report['model']}, tp={report['tp']}; {host['cpu']}, {host['cores']} cores, load {host['load_average']:.1f}"
    )
    print(", ".join(f"{package} {version}" for package, version in report["versions"].items()))
    for rank in report["ranks"]:
        print(
            f"rank {rank['rank']}: slice {rank['slice_bytes'] / 1e6:.1f} MB, read {rank['read_to_slice']:.4f} of it; "
            f"final {rank['final_bytes'] / 1e6:.1f} MB, peak {rank['peak_bytes'] / 1e6:.1f} MB, "
            f"{rank['peak_to_bound']:.3f} of final plus one tensor; "
            f"{rank['load_s']} s, dd {rank['dd_s']} s, ratio {rank['load_to_dd']:.1f}"
        )


if __name__ == "__main__":
    main()
