"""The numbers of `mull top`, from pages as Prometheus reads them."""

from __future__ import annotations

import io

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from cluster.metrics.gateway import GatewayMetrics
from cluster.top.figures import Figures, History, Snapshot
from cluster.top.samples import Samples, bucket_growth, growth, quantile
from cluster.top.screen import line, screen

GATEWAY = """
mull_gateway_ready 1
mull_streams_open 2
mull_generation_tokens_total{{phase="thinking",tenant="a"}} {thinking}
mull_generation_tokens_total{{phase="thinking",tenant="b"}} {thinking}
mull_generation_tokens_total{{phase="answer",tenant="a"}} 10
mull_requests_failed_total{{code="CANCELLED",tenant=""}} {failed}
mull_build_info{{version="1.2",model="pocket"}} 1
"""
ROUTER = """
mull_engine_ready 1
mull_ranks 2
mull_ranks_ready 2
mull_kv_usage_ratio {used}
mull_expert_imbalance_ratio{{layers="0-3"}} 1.5
mull_expert_imbalance_ratio{{layers="4-7"}} 1.1
mull_recovery_pause_seconds_bucket{{cause="rank_lost",le="5.0"}} 1
mull_recovery_pause_seconds_bucket{{cause="rank_lost",le="+Inf"}} 1
mull_recovery_pause_seconds_count{{cause="rank_lost"}} 1
"""


def gateway(thinking: float = 0, failed: float = 0) -> Samples:
    return Samples(GATEWAY.format(thinking=thinking, failed=failed))


def router(used: float = 0.25) -> Samples:
    return Samples(ROUTER.format(used=used))


def shown(history: History, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(screen(history, "12:00:00"))
    return out.getvalue()


def test_values_are_summed_over_the_series_with_the_labels_asked_for() -> None:
    page = gateway(thinking=7)

    assert page.value("mull_generation_tokens_total") == 24
    assert page.value("mull_generation_tokens_total", phase="thinking") == 14
    assert page.by("mull_generation_tokens_total", "phase") == {"thinking": 14, "answer": 10}
    assert page.value("mull_nothing") is None


def test_a_counter_that_began_again_has_grown_by_what_it_is() -> None:
    assert growth(12, 10) == 2
    assert growth(3, 10) == 3
    assert bucket_growth({1.0: 2, 2.0: 5}, {1.0: 1, 2.0: 9}) == {1.0: 2, 2.0: 5}


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.5, 1.0), (0.75, 1.5), (0.99, 2.0)],
)
def test_a_quantile_lies_in_its_bucket_in_proportion(share: float, expected: float) -> None:
    buckets = {1.0: 50.0, 2.0: 100.0} if share < 0.9 else {1.0: 50.0, 2.0: 90.0, float("inf"): 100.0}

    assert quantile(share, buckets) == expected
    assert quantile(share, dict.fromkeys(buckets, 0.0)) is None


def test_rates_are_of_the_last_seconds_and_unknown_after_one_look() -> None:
    looks = [(0.0, [gateway(0)]), (90.0, [gateway(900)]), (100.0, [gateway(1000)])]

    assert Figures(looks).rate("mull_generation_tokens_total", phase="thinking") == 20
    assert Figures(looks).grown("mull_generation_tokens_total") == 2000
    assert Figures(looks[-1:]).rate("mull_generation_tokens_total") is None
    assert Figures(looks).rates("mull_generation_tokens_total") == [20, 20]


def test_a_port_that_begins_again_does_not_hide_or_make_up_what_the_others_did() -> None:
    name = "mull_generation_tokens_total"
    figures = Figures([(0.0, [gateway(1000), gateway(500)]), (10.0, [gateway(1010), gateway(5)])])

    assert figures.grown(name, {"phase": "thinking"}) == 2 * (10 + 5)
    # Of answers both have what they had: nothing says that one of them began again.
    assert figures.rates(name) == [(2 * 10 + 2 * 5 + 10) / 10]


def test_quantiles_of_several_ports_outlive_the_restart_of_one() -> None:
    slow, quick = (
        Samples(f'd_bucket{{le="1"}} {low}\nd_bucket{{le="+Inf"}} {all_}') for low, all_ in ((0, 90), (4, 4))
    )
    restarted = Samples('d_bucket{le="1"} 0\nd_bucket{le="+Inf"} 0')

    figures = Figures([(0.0, [slow, slow]), (10.0, [slow, restarted]), (20.0, [slow, quick])])

    assert figures.quantile(0.5, "d") == 0.5


@pytest.mark.parametrize("interval_s", [1.0, 11.0, 130.0])
def test_rates_and_growth_are_known_however_far_apart_the_looks_are(interval_s: float) -> None:
    history = History()
    for number in range(4):
        history.add(Snapshot(number * interval_s, {"here": gateway(number * interval_s)}))

    assert history.gateways().rate("mull_generation_tokens_total") == pytest.approx(2)
    assert history.gateways().grown("mull_generation_tokens_total") > 0


def test_a_port_that_had_not_answered_does_not_seem_to_grow() -> None:
    history = History()
    history.add(Snapshot(0, {"router": router()}, {"gateway": "timed out"}))
    history.add(Snapshot(1, {"router": router(), "gateway": gateway(5000)}))
    history.add(Snapshot(2, {"router": router(), "gateway": gateway(5001)}))

    assert history.gateways().rate("mull_generation_tokens_total") == 2


def test_the_screen_has_a_line_for_each_copy_and_names_its_troubles() -> None:
    history = History()
    for time_s, failed in ((0.0, 1.0), (2.0, 3.0)):
        ports = {"here:9464": gateway(100 * time_s, failed), "one:9465": router(), "two:9465": router(0.99)}
        history.add(Snapshot(time_s, ports))
    text = shown(history)

    assert "mull 1.2 · pocket · ready · 1 of 1 gateways · 2 Routers" in text
    rows = {row.split()[0]: row.split() for row in text.splitlines() if ":9465" in row}
    assert rows["one:9465"][1:3] == ["ready", "2/2"]
    assert "99" in rows["two:9465"]
    assert "×1.50" in rows["one:9465"]
    assert "in the last 120 s: failed 2 (CANCELLED 2)" in text
    assert "since they started: failed 3 (CANCELLED 3)" in text
    assert "went on after rank_lost" in text


def test_a_port_that_does_not_answer_is_named_and_the_others_are_shown() -> None:
    history = History()
    history.add(Snapshot(0, {"here:9464": gateway()}, {"there:9465": "connection refused"}))

    text = shown(history)

    assert "there:9465: connection refused" in text
    assert "1 of 1 gateways · 0 Routers" in text


def test_the_screen_takes_a_real_page_of_a_gateway_without_requests() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    metrics.show_process("pocket")
    history = History()
    history.add(Snapshot(0, {"here:9464": Samples(generate_latest(registry).decode())}))

    assert "– / –" in shown(history)


def test_no_row_is_wider_than_the_terminal() -> None:
    history = History()
    history.add(Snapshot(0, {"10.20.30.40:9464": gateway(), "10.20.30.40:9465": router()}))

    for width in (80, 120, 200):
        assert max(len(row) for row in shown(history, width).splitlines()) <= width


def test_the_line_of_tokens_is_as_high_as_its_highest() -> None:
    assert line([0, 5, 10]).plain.strip() == "▁▅█"
