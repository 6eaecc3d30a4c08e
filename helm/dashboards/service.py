"""What users feel: whether they are served, how long they wait, how fast tokens come, and for which tenant."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from helm.dashboards import panels as p
from helm.dashboards.promql import growth, quantile, rate, ratio, series, total

_FINISHED, _FAILED = "mull_requests_finished_total", "mull_requests_failed_total"
_OF_OURS = 'code=~"INTERNAL|UNAVAILABLE"'
"""Failures that no client asked for; the objectives count the same ones."""

_FIRING = 'alertstate="firing", alertname=~"Mull.*"'


def service() -> Dashboard:
    return p.board(
        "mull-service", "mull / Service", "What users feel.", _now(), _waiting(), _traffic(), _failures(), _tenants()
    )


def _now() -> p.Section:
    failed, finished = growth(_FAILED, where=_OF_OURS), growth(_FINISHED)
    answers = quantile(0.95, "mull_time_to_first_answer_seconds")
    alerts = f"count({series('ALERTS', _FIRING)}) or vector(0)"
    return p.Section(
        "Now",
        [
            p.number(
                "Gateways ready",
                "Gateways that take new work.",
                p.COUNT,
                total("mull_gateway_ready"),
                thresholds=p.good_from(1),
            ),
            p.number("Open streams", "Streams that clients have open.", p.COUNT, total("mull_streams_open")),
            p.number("Requests", "Requests that ended well, a second.", p.REQUESTS_PER_S, rate(_FINISHED)),
            p.number(
                "Failed by us",
                "Share of requests in the time shown that ended with a fault of the server.",
                p.SHARE,
                ratio(f"({failed} or vector(0))", f"(({failed} or vector(0)) + {finished})"),
                thresholds=p.bad_from(0.001),
            ),
            p.number("First answer, p95", "All but one in twenty have an answer by then.", p.SECONDS, answers),
            p.number("Alerts", "Alerts that fire.", p.COUNT, alerts, thresholds=p.bad_from(1)),
        ],
    )


def _waiting() -> p.Section:
    return p.Section(
        "How long users wait",
        [
            p.quantiles(
                "To the first token",
                "From the request to its first token, mostly the first of its thoughts.",
                p.SECONDS,
                "mull_time_to_first_token_seconds",
            ),
            p.quantiles(
                "To the first token of the answer",
                "From the request to the first token that is not a thought: what a reader waits for.",
                p.SECONDS,
                "mull_time_to_first_answer_seconds",
            ),
            p.quantiles("To the end", "From the request to its end.", p.SECONDS, "mull_e2e_request_latency_seconds"),
            p.quantiles(
                "Between tokens",
                "Time between two tokens of a stream, once it has begun.",
                p.SECONDS,
                "mull_inter_token_latency_seconds",
            ),
            p.graph(
                "Error budget in use",
                "How many times faster than allowed each objective's budget is spent, over an hour; 1 is just enough.",
                "none",
                p.Line("failed", _burn("failed")),
                p.Line("first token late", _burn("first_token_late")),
                p.Line("first answer late", _burn("first_answer_late")),
            ),
            p.graph(
                "Waiting for a slot",
                "Requests that the engine has accepted and not begun.",
                p.COUNT,
                p.Line("waiting", total("mull_requests_waiting")),
            ),
        ],
    )


def _burn(objective: str) -> str:
    return f"max({series(f'installation:mull_{objective}:ratio_rate1h')}) / scalar(mull:objective_{objective}:ratio)"


def _traffic() -> p.Section:
    return p.Section(
        "Traffic",
        [
            p.stacked(
                "Tokens written",
                "Tokens a second, by phase.",
                p.TOKENS_PER_S,
                p.Line("{{phase}}", rate("mull_generation_tokens_total", "phase")),
            ),
            p.graph(
                "Tokens read",
                "Prompt tokens a second, and those of them that the prefix cache had.",
                p.TOKENS_PER_S,
                p.Line("prompts", rate("mull_prompt_tokens_total")),
                p.Line("cached", rate("mull_cached_prompt_tokens_total")),
            ),
            p.stacked(
                "Requests by end",
                "Requests that ended well, by finish reason.",
                p.REQUESTS_PER_S,
                p.Line("{{finish_reason}}", rate(_FINISHED, "finish_reason")),
            ),
        ],
    )


def _failures() -> p.Section:
    return p.Section(
        "Failures",
        [
            p.stacked(
                "Requests that failed",
                "By status code: INVALID_ARGUMENT and CANCELLED are the clients', UNAVAILABLE and INTERNAL ours.",
                p.REQUESTS_PER_S,
                p.Line("{{code}}", rate(_FAILED, "code")),
            ),
            p.stacked(
                "Calls kept out",
                "By reason: no known key, or a limit of the tenant.",
                p.REQUESTS_PER_S,
                p.Line("{{reason}}", rate("mull_calls_refused_total", "reason")),
            ),
            p.graph(
                "Streams that stood still",
                "How long streams that lost their copy of the model or a rank paused; p95 by cause.",
                p.SECONDS,
                p.Line("{{cause}}", quantile(0.95, "mull_recovery_pause_seconds", "cause")),
            ),
        ],
    )


def _tenants() -> p.Section:
    written = rate("mull_generation_tokens_total", "tenant")
    return p.Section(
        "Tenants",
        [
            p.stacked(
                "Requests by tenant",
                "Requests that ended well.",
                p.REQUESTS_PER_S,
                p.Line("{{tenant}}", f"topk(10, {rate(_FINISHED, 'tenant')})"),
            ),
            p.stacked(
                "Tokens by tenant",
                "Tokens written a second.",
                p.TOKENS_PER_S,
                p.Line("{{tenant}}", f"topk(10, {written})"),
            ),
            p.stacked(
                "Failures by tenant",
                "Requests that failed, for whatever reason.",
                p.REQUESTS_PER_S,
                p.Line("{{tenant}}", f"topk(10, {rate(_FAILED, 'tenant')})"),
            ),
        ],
    )
