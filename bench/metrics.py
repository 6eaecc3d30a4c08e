"""What metrics cost: CPU of a message at the gateway and of a step at the Router, against all that they do for it.

    python -m bench.metrics [--streams 1,16,64] [--runs 5] [--out bench/results/metrics.json]

The gateway's and the Router's whole CPU per token are measured in the same run by `bench.gateway`, with an engine that
costs nothing and a message for each token. A scrape is the whole text of a port.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from bench.gateway import loads, measure
from bench.report import Spread, arguments, machine, versions, write
from cluster.metrics.gateway import GatewayMetrics
from cluster.metrics.request_timer import RequestTimer
from cluster.metrics.request_times import RequestTimes
from cluster.metrics.steps import StepMetrics
from cluster.router.sequence import SequenceUpdate
from workers.step import StepPlan, StepResult

CALLS = 20_000
SCRAPES = 200
SCRAPE_INTERVAL_S = 15.0


def cpu_us(call: Callable[[int], object], calls: int, runs: int) -> Spread:
    """Of one call."""

    def run() -> float:
        began_s = time.process_time()
        for number in range(calls):
            call(number)
        return 1e6 * (time.process_time() - began_s) / calls

    run()
    return Spread.of([run() for _ in range(runs)])


def message_us(runs: int) -> Spread:
    """A message with one thinking token."""
    metrics = GatewayMetrics(CollectorRegistry())
    timer, told = RequestTimer(metrics, "tenant"), iter(range(1, CALLS * (runs + 1) + 1))
    return cpu_us(lambda _: timer.on_tokens(next(told), 0), CALLS, runs)


def step_us(streams: int, runs: int) -> Spread:
    """A step that decodes a token of each stream."""
    steps, times = StepMetrics(), RequestTimes()
    plans = [StepPlan(0, decodes=list(range(streams)))]
    results = [StepResult(0, 0, [1] * streams, compute_s=0.01)]
    updates = [SequenceUpdate(key, token_ids=[1]) for key in range(streams)]

    def step(_: int) -> None:
        steps.on_sent(plans, schedule_s=0.0001, send_s=0.0001)
        times.on_updates(updates, 0.0, 0.1)
        steps.on_results(results, collect_s=0.0001)

    return cpu_us(step, CALLS // 10, runs)


def scrape_us(tenants: int, runs: int) -> Spread:
    """A gateway's whole page."""
    registry = CollectorRegistry()
    GatewayMetrics(registry).begin_tenants(f"tenant-{number}" for number in range(tenants))
    return cpu_us(lambda _: generate_latest(registry), SCRAPES, runs)


def measure_all(stream_counts: list[int], runs: int) -> list[dict[str, Any]]:
    rows = []
    for streams in stream_counts:
        whole = measure(loads(streams)[0], "grpc", runs)
        message, step = message_us(runs), step_us(streams, runs)
        gateway, router = whole["gateway_cpu_us_per_token"], whole["router_cpu_us_per_token"]
        row = {
            "streams": streams,
            "gateway_us_per_message": message,
            "gateway_whole_us_per_message": gateway,
            "gateway_share": message.median / gateway.median,
            "router_us_per_step": step,
            "router_whole_us_per_token": router,
            "router_share": step.median / (router.median * streams),
        }
        rows.append(row)
        print(
            f"{streams:3} streams: {message} of {gateway} CPU-µs a message at the gateway, {row['gateway_share']:.2%}; "
            f"{step} of {router.median * streams:.4g} a step at the Router, {row['router_share']:.2%}",
            flush=True,
        )
    return rows


def main() -> None:
    args = arguments(__doc__, streams="1,16,64").parse_args()
    about = {**machine(), **versions("prometheus_client", "grpcio", "uvloop")}
    print(json.dumps(about))
    rows = measure_all([int(count) for count in args.streams.split(",")], args.runs)
    scrapes = {tenants: scrape_us(tenants, args.runs) for tenants in (1, 100)}
    for tenants, scrape in scrapes.items():
        share = scrape.median / 1e6 / SCRAPE_INTERVAL_S
        print(f"scrape of {tenants} tenants: {scrape} CPU-µs, {share:.3%} of a core every {SCRAPE_INTERVAL_S:g} s")
    write(args.out, {"machine": about, "rows": rows, "scrape_us_by_tenants": scrapes})


if __name__ == "__main__":
    main()
