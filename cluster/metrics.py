"""Every metric of a gateway: name, unit, help. Updated once per message, not per token.

Base units, the prefix mull_, bounded labels. Histograms reach three hours, because thoughts are long. A Router's own
figures come by its description. No globals: the registry is passed in.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from mull.v1.router_pb2 import DescribeResponse

_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 2400, 3600, 7200, 10800)
_TOKENS = (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


_ROUTER_GAUGES = (
    ("mull_requests_running", "Requests that hold a slot, as the Router says.", "num_running"),
    ("mull_requests_thinking", "Of the running requests, those in their thoughts.", "num_thinking"),
    ("mull_requests_answering", "Of the running requests, those in their answers.", "num_answering"),
    ("mull_requests_waiting", "Requests that wait for a slot, as the Router says.", "num_waiting"),
    ("mull_kv_blocks", "KV blocks of the Router.", "num_blocks"),
    ("mull_kv_free_blocks", "KV blocks that are free.", "num_free_blocks"),
    (
        "mull_expert_imbalance_ratio",
        "Largest over mean load of the ranks' experts, as last reported; 0 where there is nothing to balance.",
        "expert_imbalance",
    ),
)
_ROUTER_COUNTERS = (
    ("mull_engine_steps_total", "Steps of the Router's ranks.", "num_steps_total"),
    ("mull_engine_restarts_total", "Times the Router's ranks were started again.", "num_restarts_total"),
    ("mull_preemptions_total", "Requests that lost their slot for a while.", "num_preempted_total"),
    ("mull_expert_rebalances_total", "Times that experts were placed anew.", "num_rebalances_total"),
    ("mull_prefix_query_tokens_total", "Prompt tokens looked up in the prefix cache.", "prefix_query_tokens_total"),
    ("mull_prefix_hit_tokens_total", "Prompt tokens found in the prefix cache.", "prefix_hit_tokens_total"),
)
"""Name, help, field of DescribeResponse."""


class RouterFigures(Collector):
    """What each Router in reach said last, shown as it is: its totals start again with it, as counters may."""

    def __init__(self) -> None:
        self.descriptions: Mapping[str, DescribeResponse] = {}
        """By address."""

    def collect(self) -> Iterator[Metric]:
        for name, text, field in _ROUTER_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["copy"])
            for address, said in self.descriptions.items():
                gauge.add_metric([address], getattr(said, field))
            yield gauge
        for name, text, field in _ROUTER_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["copy"])
            for address, said in self.descriptions.items():
                counter.add_metric([address], getattr(said, field))
            yield counter


class TokenFigures(Collector):
    """What every message of every stream changes: plain numbers, which become metrics when somebody asks for them.

    The library's own cost several microseconds a token, more than anything else that a gateway does by itself.
    """

    def __init__(self) -> None:
        self.num_thinking = 0
        self.num_answer = 0
        self._intervals_s = 0.0
        self._num_intervals = [0] * (len(_SHORT_S) + 1)
        """By bucket: as long as its bound or shorter, and longer than the one before."""

    def on_interval(self, interval_s: float) -> None:
        """So long after the message before, for each token."""
        self._intervals_s += interval_s
        self._num_intervals[bisect_left(_SHORT_S, interval_s)] += 1

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("mull_generation_tokens", "Tokens generated, by phase.", labels=["phase"])
        tokens.add_metric(["thinking"], self.num_thinking)
        tokens.add_metric(["answer"], self.num_answer)
        yield tokens
        bounds = [*map(floatToGoString, _SHORT_S), "+Inf"]
        yield HistogramMetricFamily(
            "mull_inter_token_latency_seconds",
            "Time between messages over the tokens in the later one; one observation per message.",
            buckets=list(zip(bounds, accumulate(self._num_intervals), strict=True)),
            sum_value=self._intervals_s,
        )


class GatewayMetrics:
    """The metrics of one gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.streams_open = Gauge("mull_streams_open", "Generate streams that are open.", registry=registry)
        self.routers = RouterFigures()
        registry.register(self.routers)
        self.router_ready = Gauge("mull_router_ready", "1 when a Router can take requests, else 0.", registry=registry)
        self.pauses = _histogram(
            registry,
            "mull_request_pause_seconds",
            "How long a request that had lost its copy of the model stood still until its next token.",
            _LONG_S,
        )
        self.requests_finished = Counter(
            "mull_requests_finished_total",
            "Requests that ended well, by finish reason and the phase they were in.",
            ["finish_reason", "phase"],
            registry=registry,
        )
        self.requests_failed = Counter(
            "mull_requests_failed_total", "Requests that ended otherwise, by status code.", ["code"], registry=registry
        )
        self.calls_refused = Counter(
            "mull_calls_refused_total",
            "Calls kept out by their key or a limit of their tenant: unauthenticated, forbidden, requests, streams, "
            "prompt, output.",
            ["reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "mull_prompt_tokens_total", "Prompt tokens of admitted requests.", registry=registry
        )
        self.cached_prompt_tokens = Counter(
            "mull_cached_prompt_tokens_total", "Prompt tokens that the prefix cache had.", registry=registry
        )
        self.tokens = TokenFigures()
        registry.register(self.tokens)
        self.thinking_ended = Counter(
            "mull_thinking_ended_total", "Thoughts that ended, by reason.", ["reason"], registry=registry
        )
        self.time_to_first_token = _histogram(
            registry, "mull_time_to_first_token_seconds", "From the request to the first token.", _LONG_S
        )
        self.time_to_first_answer_token = _histogram(
            registry,
            "mull_time_to_first_answer_token_seconds",
            "From the request to the first token of the answer.",
            _LONG_S,
        )
        self.e2e_request_latency = _histogram(
            registry, "mull_e2e_request_latency_seconds", "From the request to its end.", _LONG_S
        )
        self.thinking_tokens = _histogram(
            registry, "mull_request_thinking_tokens", "Thinking tokens of a request.", _TOKENS
        )
        self.answer_tokens = _histogram(registry, "mull_request_answer_tokens", "Answer tokens of a request.", _TOKENS)

    def on_refused(self, reason: str) -> None:
        """A call was not let in."""
        self.calls_refused.labels(reason).inc()


def _histogram(registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, buckets=buckets, registry=registry)


class RequestTimer:
    """The times and counts of one request, told message by message."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._start_s = time.perf_counter()
        self._last_s: float | None = None
        self._num_thinking = 0
        self._num_answer = 0

    def sibling(self) -> RequestTimer:
        """For another generation of the same request."""
        timer = RequestTimer(self._metrics)
        timer._start_s = self._start_s
        return timer

    def on_resumed(self, num_thinking: int, num_answer: int) -> None:
        """So many tokens were generated in an earlier call."""
        self._last_s, self._num_thinking, self._num_answer = time.perf_counter(), num_thinking, num_answer

    def on_admitted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """The request took a slot."""
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.cached_prompt_tokens.inc(cached_tokens)

    def on_tokens(self, num_thinking: int, num_answer: int) -> None:
        """Totals of the request after a message with new tokens."""
        now_s = time.perf_counter()
        new_thinking, new_answer = num_thinking - self._num_thinking, num_answer - self._num_answer
        if new_thinking + new_answer == 0:
            return
        figures = self._metrics.tokens
        if self._last_s is None:
            self._metrics.time_to_first_token.observe(now_s - self._start_s)
        else:
            figures.on_interval((now_s - self._last_s) / (new_thinking + new_answer))
        figures.num_thinking += new_thinking
        figures.num_answer += new_answer
        if new_answer and self._num_answer == 0:
            self._metrics.time_to_first_answer_token.observe(now_s - self._start_s)
        self._last_s, self._num_thinking, self._num_answer = now_s, num_thinking, num_answer

    def on_finished(self, finish_reason: str, phase: str, thinking_ended: str | None) -> None:
        """The request ended well; `thinking_ended` says why its thoughts did, None where it had none."""
        self._metrics.requests_finished.labels(finish_reason, phase).inc()
        if thinking_ended is not None:
            self._metrics.thinking_ended.labels(thinking_ended).inc()
        self._metrics.e2e_request_latency.observe(time.perf_counter() - self._start_s)
        self._metrics.thinking_tokens.observe(self._num_thinking)
        self._metrics.answer_tokens.observe(self._num_answer)

    def on_failed(self, code: str) -> None:
        """The request ended with a status code other than OK."""
        self._metrics.requests_failed.labels(code).inc()
