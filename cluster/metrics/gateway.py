"""What a gateway tells on its metrics port.

Told once per message or per request, by whoever knows: `RequestTimer` for what one request changes, the server for how
it is. Tenants are those of the keys file, so that the label is as bounded as the file; it is empty without keys. One
that is taken out of the file keeps its figures until the gateway ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from cluster.metrics.buckets import LONG_S, SHORT_S, TOKENS
from cluster.metrics.plain import Counter, Histogram, Labels, MetricSpec, Reading, counter, gauge, histogram
from cluster.metrics.process import BUILD_INFO, CERTIFICATES, register_process

_C = TypeVar("_C", bound=Collector)

_PHASES = ("thinking", "answer")
_LOSSES = ("router_lost", "router_draining")
_FINISHES = ("stop", "length", "tool_calls", "stop_text")
_CODES = (
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
)
_REFUSALS = ("unauthenticated", "forbidden", "requests", "streams", "prompt", "output")
_THOUGHTS_END = ("natural", "budget", "length", "stop")

READY = gauge("mull_gateway_ready", "1 when this gateway takes new work, else 0.")
COPIES = gauge("mull_copies", "Routers that this gateway knows, each with a copy of the model, by state.", ("state",))
STREAMS = gauge("mull_streams_open", "Requests whose stream is open.")
FINISHED = counter(
    "mull_requests_finished_total",
    "Generations that ended well, by finish reason and the phase they were in: cut in thought is length in thinking.",
    ("finish_reason", "phase", "tenant"),
    ("vllm:request_success_total",),
)
FAILED = counter("mull_requests_failed_total", "Requests that ended otherwise, by status code.", ("code", "tenant"))
REFUSED = counter(
    "mull_calls_refused_total",
    f"Calls kept out by their key or by a limit of their tenant: {', '.join(_REFUSALS)}.",
    ("reason",),
)
PROMPT_TOKENS = counter(
    "mull_prompt_tokens_total",
    "Prompt tokens of admitted generations.",
    ("tenant",),
    ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total"),
)
CACHED_TOKENS = counter(
    "mull_cached_prompt_tokens_total",
    "Prompt tokens that the prefix cache had.",
    ("tenant",),
    ("sglang:cached_tokens_total",),
)
GENERATION_TOKENS = counter(
    "mull_generation_tokens_total",
    "Tokens generated, by phase.",
    ("phase", "tenant"),
    ("vllm:generation_tokens_total", "sglang:generation_tokens_total"),
)
FIRST_TOKEN = histogram(
    "mull_time_to_first_token_seconds",
    "From the request to its first token, which mostly is a thought's.",
    LONG_S,
    known_as=("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
)
FIRST_ANSWER = histogram(
    "mull_time_to_first_answer_seconds", "From the request to the first token of its answer.", LONG_S
)
INTER_TOKEN = histogram(
    "mull_inter_token_latency_seconds",
    "Time between messages over the tokens in the later one; one observation per message.",
    SHORT_S,
    known_as=("vllm:inter_token_latency_seconds", "sglang:inter_token_latency_seconds"),
)
LATENCY = histogram(
    "mull_e2e_request_latency_seconds",
    "From the request to its end.",
    LONG_S,
    known_as=("vllm:e2e_request_latency_seconds", "sglang:e2e_request_latency_seconds"),
)
THINKING_TIME = histogram("mull_thinking_seconds", "From the first thinking token of a generation to its last.", LONG_S)
THINKING_TOKENS = histogram("mull_thinking_tokens", "Thinking tokens of a generation.", TOKENS)
ANSWER_TOKENS = histogram("mull_answer_tokens", "Answer tokens of a generation.", TOKENS)
REQUEST_PROMPT_TOKENS = histogram(
    "mull_request_prompt_tokens", "Prompt tokens of a generation.", TOKENS, known_as=("vllm:request_prompt_tokens",)
)
THINKING_ENDED = counter(
    "mull_thinking_ended_total",
    "Thoughts that ended: the model closed them (natural), their budget was used up, or the generation ended in them.",
    ("reason",),
)
FORCED_TOKENS = counter(
    "mull_budget_forced_tokens_total", "Tokens put in the model's mouth to close thoughts whose budget was used up."
)
PAUSES = histogram(
    "mull_recovery_pause_seconds",
    "How long a request that had lost its Router stood still until its next token. router_lost: it was out of reach; "
    "router_draining: it gave the request back.",
    LONG_S,
    ("cause",),
)
REPLAYED = counter(
    "mull_replayed_tokens_total",
    "Prompt and output tokens sent to a Router again, behind which a request went on, by what made it needed. Some may "
    "be in its prefix cache.",
    ("cause",),
)

SPECS: tuple[MetricSpec, ...] = (
    READY, COPIES, STREAMS, FINISHED, FAILED, REFUSED, PROMPT_TOKENS, CACHED_TOKENS, GENERATION_TOKENS,
    FIRST_TOKEN, FIRST_ANSWER, INTER_TOKEN, LATENCY, THINKING_TIME, THINKING_TOKENS, ANSWER_TOKENS,
    REQUEST_PROMPT_TOKENS, THINKING_ENDED, FORCED_TOKENS, PAUSES, REPLAYED, CERTIFICATES, BUILD_INFO,
)  # fmt: skip
"""All of the port's, but for those of the process."""


class GatewayMetrics:
    """The metrics of one gateway. The server says how it is by `show`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.requests_finished = self._add(Counter(FINISHED))
        self.requests_failed = self._add(Counter(FAILED))
        self.calls_refused = self._add(Counter(REFUSED, [(reason,) for reason in _REFUSALS]))
        self.prompt_tokens = self._add(Counter(PROMPT_TOKENS))
        self.cached_prompt_tokens = self._add(Counter(CACHED_TOKENS))
        self.generation_tokens = self._add(Counter(GENERATION_TOKENS))
        self.time_to_first_token = self._add(Histogram(FIRST_TOKEN))
        self.time_to_first_answer = self._add(Histogram(FIRST_ANSWER))
        self.inter_token_latency = self._add(Histogram(INTER_TOKEN))
        self.e2e_request_latency = self._add(Histogram(LATENCY))
        self.thinking_time = self._add(Histogram(THINKING_TIME))
        self.thinking_tokens = self._add(Histogram(THINKING_TOKENS))
        self.answer_tokens = self._add(Histogram(ANSWER_TOKENS))
        self.request_prompt_tokens = self._add(Histogram(REQUEST_PROMPT_TOKENS))
        self.thinking_ended = self._add(Counter(THINKING_ENDED, [(reason,) for reason in _THOUGHTS_END]))
        self.forced_tokens = self._add(Counter(FORCED_TOKENS))
        self.recovery_pauses = self._add(Histogram(PAUSES, [(cause,) for cause in _LOSSES]))

    def show(self, spec: MetricSpec, read: Callable[[], Mapping[Labels, float]]) -> None:
        """A gauge that is read, in the thread of whoever asks, when somebody asks for it."""
        self._registry.register(Reading(spec, read))

    def show_process(self, model: str) -> None:
        """What this process is and uses."""
        register_process(self._registry, model)

    def on_refused(self, reason: str) -> None:
        """A call was not let in."""
        self.calls_refused.inc(reason)

    def on_pause(self, cause: str, pause_s: float) -> None:
        """A request that had lost its Router goes on."""
        self.recovery_pauses.observe(pause_s, cause)

    def begin_tenants(self, tenants: Iterable[str]) -> None:
        """Show their figures before their first requests."""
        for tenant in tenants:
            for phase in _PHASES:
                self.generation_tokens.begin(phase, tenant)
                for finish in _FINISHES:
                    self.requests_finished.begin(finish, phase, tenant)
            for code in _CODES:
                self.requests_failed.begin(code, tenant)
            self.prompt_tokens.begin(tenant)
            self.cached_prompt_tokens.begin(tenant)

    def _add(self, collector: _C) -> _C:
        self._registry.register(collector)
        return collector
