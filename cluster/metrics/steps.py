"""What every step of a copy changes: tokens, sequences, and the time of its parts. Sums, whatever a batch holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.registry import Collector

from cluster.metrics.plain import Counter, Histogram
from cluster.metrics.router import DISPATCH_BYTES, DISPATCH_SECONDS, STEP_SECONDS, STEP_SEQUENCES, STEP_TOKENS
from workers.step import StepPlan, StepResult


class StepMetrics(Collector):
    """Told by the step loop, which has the clock."""

    def __init__(self) -> None:
        self._seconds = Histogram(STEP_SECONDS, [("schedule",), ("send",), ("compute",), ("collect",)])
        self._tokens = Counter(STEP_TOKENS, [("prefill",), ("decode",)])
        self._sequences = Histogram(STEP_SEQUENCES)
        self._dispatch_bytes = Counter(DISPATCH_BYTES)
        self._dispatch_seconds = Counter(DISPATCH_SECONDS)

    def on_sent(self, plans: Sequence[StepPlan], *, schedule_s: float, send_s: float) -> None:
        """The plans of a step, one for each attention group, have gone out."""
        num_decodes = sum(len(plan.decodes) for plan in plans)
        self._seconds.observe(schedule_s, "schedule")
        self._seconds.observe(send_s, "send")
        self._tokens.inc("prefill", by=sum(plan.num_tokens for plan in plans) - num_decodes)
        self._tokens.inc("decode", by=num_decodes)
        self._sequences.observe(num_decodes + sum(len(plan.prefills) for plan in plans))

    def on_results(self, results: Sequence[StepResult], *, collect_s: float) -> None:
        """All ranks have answered a step, and what it brought was passed on."""
        self._seconds.observe(max(result.compute_s for result in results), "compute")
        self._seconds.observe(collect_s, "collect")
        self._dispatch_bytes.inc(by=sum(result.dispatch_bytes for result in results))
        self._dispatch_seconds.inc(by=sum(result.dispatch_s for result in results))

    def collect(self) -> Iterator[Metric]:
        for metric in (
            self._seconds,
            self._tokens,
            self._sequences,
            self._dispatch_bytes,
            self._dispatch_seconds,
        ):
            yield from metric.collect()
