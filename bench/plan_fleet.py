"""What happens to fleets, by `mull plan`'s simulation, and how many requests a minute it simulates.

    python -m bench.plan_fleet [--copies 1024] [--out bench/results/plan_fleet.json]

Each row is a fleet of the 235B on H200, four of them a copy, with production schedulers and gateways' routing; only
ranks are replaced by the cost model. Nodes for more copies stand ready. Nothing here was measured on an accelerator.
"""

from __future__ import annotations

from typing import Any

from bench import report
from cluster.planner.cell import Scenario
from cluster.planner.devices import find_device, published_kernels
from cluster.planner.doors import Doors
from cluster.planner.fleet import Fleet
from cluster.planner.layouts import Candidate, Limits, fit
from cluster.planner.load import DrawnLoad
from cluster.planner.models import find_model
from cluster.planner.operations import known_operations
from cluster.planner.scenario import Course, follow
from cluster.planner.setting import Setting
from cluster.planner.simulate import copy_maker
from cluster.planner.upsets import Operator, Upset
from cluster.planner.workload import Lengths
from workers.layout import ParallelLayout

CHAT = Lengths(prompt=500, thinking=600, answer=200)
THINKING = Lengths(prompt=2000, thinking=8000, answer=1000)
LOST_S = 600.0
LIMITS = Limits(max_num_seqs=256, max_num_batched_tokens=4096, context=32768)


def course(copies: int, load: DrawnLoad, scenario: Scenario) -> Course:
    """Of so many copies."""
    model, device = find_model("qwen3-235b").config, find_device("h200")
    setting = Setting(model=model, device=device, kernels=published_kernels())
    fitted = fit(model, Candidate(layout=ParallelLayout(tp=4), copies=copies), device, LIMITS)
    return follow(setting, fitted, load, scenario, known_operations(node_s=0.0))


def cases(most_copies: int) -> dict[str, tuple[int, DrawnLoad, Scenario]]:
    """By name: copies, what comes, what happens."""
    thinking = DrawnLoad(rate_per_s=0.4, lengths=THINKING)
    lost = [Upset(time_s=300.0, kind="lose-rank"), Upset(time_s=900.0, kind="lose-router")]
    day = DrawnLoad(rate_per_s=8.0, lengths=CHAT, pattern="diurnal", day_s=1800.0)
    tenants = DrawnLoad(rate_per_s=0.25 * most_copies, lengths=CHAT, pattern="bursty", tenants=100)
    return {
        "2 copies lose a rank, then a Router": (2, thinking, Scenario(duration_s=1800.0, upsets=lost)),
        "10 copies are updated in place": (
            10,
            DrawnLoad(rate_per_s=10.0, lengths=CHAT),
            Scenario(duration_s=600.0, upsets=[Upset(time_s=120.0, kind="rolling-update")]),
        ),
        "a day in half an hour, 1 to 8 copies": (1, day, Scenario(duration_s=1800.0, max_copies=8)),
        f"{most_copies} copies, bursts of 100 tenants": (most_copies, tenants, Scenario(duration_s=60.0)),
    }


def levelling() -> dict[str, Any]:
    """Eight copies of which one loses its Router: how evenly streams lie, until new requests have levelled them.

    What was moved away is not moved back: each move would put a prompt and its thoughts through the model again.
    """
    model, device, operations = find_model("qwen3-235b").config, find_device("h200"), known_operations(node_s=0.0)
    setting = Setting(model=model, device=device, kernels=published_kernels())
    fitted = fit(model, Candidate(layout=ParallelLayout(tp=4), copies=8), device, LIMITS)
    load = DrawnLoad(rate_per_s=1.6, lengths=THINKING)
    fleet = Fleet(copy_maker(fitted, setting.cost(fitted)), 8, doors=Doors(2), poll_s=2.0)
    operator = Operator(fleet, fitted, device, operations)
    operator.arrange(Upset(time_s=LOST_S, kind="lose-router"))
    rows: list[dict[str, Any]] = []

    def look() -> None:
        running = sorted(copy.num_running for copy in fleet.copies.values() if copy.is_open)
        mean = sum(running) / len(running)
        rows.append({"after_s": fleet.now_s - LOST_S, "least": running[0], "mean": mean, "most": running[-1]})

    for after_s in (-10, 10, 60, 120, 180, 240, 300, 420, 600):
        fleet.at(LOST_S + after_s, look)
    fleet.run(load.arrivals(LIMITS.context), until_s=LOST_S + 601)
    tpot = [one.tpot_s for one in fleet.flights if one.num_moves and one.tpot_s is not None]
    return {
        "case": "8 copies, one loses its Router: streams of a copy",
        "moved": fleet.num_moved_total,
        "looks": rows,
    } | {"tpot_of_moved_s": sum(tpot) / len(tpot) if tpot else None}


def row(name: str, result: Course) -> dict[str, Any]:
    """The figures, without the columns over time."""
    values = result.as_json()
    series = values.pop("series")
    worst = max((one for one in series["ttft_p95_s"] if one is not None), default=None)
    values["peak"] = {
        "running": max(series["running"]),
        "waiting": max(series["waiting"]),
        "longest_queue": max(series["longest_queue"]),
        "tokens_per_s": max(series["output_tokens_per_s"]),
        "ttft_p95_s": worst,
        "refused": sum(series["refused"]),
        "copies": max(series["copies"]),
    }
    return {"case": name} | values


def main() -> None:
    parser = report.arguments(__doc__, streams="")
    parser.add_argument("--copies", type=int, default=1024)
    args = parser.parse_args()
    rows = []
    for name, (copies, load, scenario) in cases(args.copies).items():
        rows.append(row(name, course(copies, load, scenario)))
        effort = rows[-1]["simulation"]
        print(
            f"{name}: {effort['requests']:,} requests, {effort['steps']:,} steps ({effort['decided_steps']:,} decided) "
            f"in {effort['cpu_s']:.0f} s of CPU: {60 * effort['requests'] / effort['cpu_s']:,.0f} requests a minute"
        )
        for event in rows[-1]["events"]:
            pauses = f"pauses {event['pause_p50_s']} s, at most {event['pause_max_s']}"
            print(f"  {event['time_s']:.0f} s: {event['words']}; {pauses}")
        print(f"  peak: {rows[-1]['peak']}")
        for part in rows[-1]["control_plane"]:
            mark = "!" if part["is_over"] else " "
            print(f"  {mark} {part['part']}: {part['used']:,.4g} of {part['limit']} {part['unit']}")
    levelled = levelling()
    print(f"{levelled['case']}; {levelled['moved']} were moved")
    for one in levelled["looks"]:
        print(f"  {one['after_s']:+5.0f} s: {one['least']} … {one['mean']:.1f} … {one['most']}")
    rows.append(levelled)
    report.write(args.out, {"machine": report.machine(), "rows": rows})


if __name__ == "__main__":
    main()
