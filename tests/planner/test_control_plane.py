"""What the control plane costs is what was measured, and more gateways are asked for as there is more to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.planner.control_plane import BUSY, CopyTraffic, gateway_cpu, gateways_for, router_cpu
from cluster.planner.operations import known_operations

MEASURED = Path(__file__).parents[2] / "bench" / "results" / "gateway.json"
OPERATIONS = known_operations()
COSTS = OPERATIONS.control_plane


def measured_us(load: str, streams: int, where: str) -> float:
    """CPU time of a token."""
    rows = json.loads(MEASURED.read_text())["rows"]
    (row,) = [one for one in rows if (one["load"], one["protocol"], one["streams"]) == (load, "grpc", streams)]
    return float(row[f"{where}_cpu_us_per_token"]["median"])


@pytest.mark.parametrize("streams", [16, 64])
def test_costs_are_those_that_were_measured(streams: int) -> None:
    traffic = CopyTraffic(steps=1e6, tokens=1e6 * streams)  # so many that a core is a µs of a step

    assert gateway_cpu([traffic], 1, COSTS) == pytest.approx(
        streams * measured_us("paced", streams, "gateway"), rel=0.01
    )
    assert router_cpu(traffic, 1, COSTS) == pytest.approx(streams * measured_us("paced", streams, "router"), rel=0.01)


def test_the_most_that_a_gateway_streams_is_what_was_measured_under_a_flood() -> None:
    assert COSTS.gateway_flooded_token_us == pytest.approx(measured_us("flooded", 64, "gateway"), rel=0.01)


def test_messages_of_a_step_are_at_most_one_for_each_stream_and_each_gateway() -> None:
    copy = CopyTraffic(steps=10, tokens=80)  # eight streams

    assert copy.messages(1) == pytest.approx(10)
    assert copy.messages(4) < 40
    assert 70 < copy.messages(10_000) < 80


def test_gateways_are_as_many_as_leave_none_of_them_too_busy() -> None:
    traffic = [CopyTraffic(steps=30, tokens=30 * 100)] * 16

    count = gateways_for(traffic, 1600, OPERATIONS)

    assert gateway_cpu(traffic, count, COSTS) <= BUSY
    assert gateway_cpu(traffic, count * 3 // 4, COSTS) > BUSY


def test_gateways_are_as_many_as_hold_the_streams() -> None:
    assert gateways_for([], 10_240, OPERATIONS) == 20
