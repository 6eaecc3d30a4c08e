"""How many requests a minute `mull plan` simulates: short, middling and long answers, on one core and on two, as it is
and with `--compile`.

    python -m bench.plan_speed [--out bench/results/plan_speed.json]

A fleet of the 235B on H200, four of them a copy, behind gateways, in cells that are simulated beside each other: the
production scheduler, blocks, pace and choice of copies decide, ranks are the cost model. Wall time, with all that
`mull plan` makes of the figures; CPU time beside it, since the machine may be busy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import report
from cluster.planner import machine_code
from cluster.planner.cell import Scenario
from cluster.planner.devices import find_device, published_kernels
from cluster.planner.layouts import Candidate, Limits, fit
from cluster.planner.load import DrawnLoad
from cluster.planner.models import find_model
from cluster.planner.operations import known_operations
from cluster.planner.scenario import follow
from cluster.planner.setting import Setting
from cluster.planner.workload import Lengths
from workers.layout import ParallelLayout

COPIES, CELLS = 64, 8
LIMITS = Limits(max_num_seqs=256, max_num_batched_tokens=4096, context=32768)
LOADS = {
    # name: lengths, requests a second of the fleet, seconds
    "10 tokens out, prompts of 50": (Lengths(prompt=50, thinking=5, answer=5), 640.0, 60.0),
    "10 tokens out, busy": (Lengths(prompt=50, thinking=5, answer=5), 5120.0, 40.0),
    "100 tokens out": (Lengths(prompt=500, thinking=50, answer=50), 64.0, 240.0),
    "100 tokens out, prompts of 50": (Lengths(prompt=50, thinking=50, answer=50), 64.0, 480.0),
    "800 tokens out": (Lengths(prompt=500, thinking=600, answer=200), 32.0, 360.0),
    "800 tokens out, busier": (Lengths(prompt=500, thinking=600, answer=200), 128.0, 60.0),
    "9,000 tokens out": (Lengths(prompt=2000, thinking=8000, answer=1000), 3.2, 1200.0),
}


def row(name: str, num_processes: int) -> dict[str, Any]:
    lengths, rate, duration_s = LOADS[name]
    model, device = find_model("qwen3-235b").config, find_device("h200")
    setting = Setting(model=model, device=device, kernels=published_kernels())
    fitted = fit(model, Candidate(layout=ParallelLayout(tp=4), copies=COPIES), device, LIMITS)
    load = DrawnLoad(rate_per_s=rate, lengths=lengths)
    scenario = Scenario(duration_s=duration_s, num_cells=CELLS)
    course = follow(setting, fitted, load, scenario, known_operations(), num_processes=num_processes)
    effort = course.effort
    running = course.series["running"]
    return {
        "load": name,
        "processes": num_processes,
        "streams_of_a_copy": sum(running) / len(running) / COPIES,
        "requests": effort.requests,
        "steps": effort.steps,
        "decided_steps": effort.decided_steps,
        "wall_s": effort.wall_s,
        "cpu_s": effort.cpu_s,
        "requests_per_minute": effort.requests_per_minute,
        "requests_per_cpu_minute": 60 * effort.requests / effort.cpu_s,
    }


def rows_here() -> list[dict[str, Any]]:
    rows = []
    print("machine code" if machine_code.is_in_use() else "as it is")
    for name in LOADS:
        for num_processes in (1, 2):
            one = row(name, num_processes)
            rows.append(one)
            print(
                f"{name:30s} {num_processes} processes: {one['requests']:7,} requests, {one['streams_of_a_copy']:4.1f} "
                f"streams of a copy, {one['steps']:9,} steps ({one['decided_steps']:7,} decided), "
                f"{one['wall_s']:5.1f} s: {one['requests_per_minute']:9,.0f} a minute; "
                f"{one['requests_per_cpu_minute']:9,.0f} a minute of CPU",
                flush=True,
            )
    return rows


def rows_of_machine_code() -> list[dict[str, Any]]:
    """In a process of its own."""
    environment = machine_code.environment()
    environment["PYTHONPATH"] += os.pathsep + os.getcwd()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-P", "-m", "bench.plan_speed", "--out", file.name]
        subprocess.run(command, env=environment, check=True)
        rows: list[dict[str, Any]] = json.loads(Path(file.name).read_text())["machine_code"]
    return rows


def main() -> None:
    parser = report.arguments(__doc__, streams="")
    args = parser.parse_args()
    if machine_code.is_in_use():
        rows = {"machine_code": rows_here()}
    else:
        rows = {"rows": rows_here(), "machine_code": rows_of_machine_code()}
    report.write(args.out, {"machine": report.machine(), **rows})


if __name__ == "__main__":
    main()
