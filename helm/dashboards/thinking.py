"""What the model does before it answers: how much it thinks, why it stops, and whom that leaves without an answer."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from helm.dashboards import panels as p
from helm.dashboards.promql import growth, mean, rate, ratio, total

_FINISHED, _WRITTEN = "mull_requests_finished_total", "mull_generation_tokens_total"
_CUT = 'finish_reason="length", phase="thinking"'


def thinking() -> Dashboard:
    return p.board(
        "mull-thinking", "mull / Thinking", "What the model does before it answers.", _now(), _lengths(), _ends()
    )


def _now() -> p.Section:
    share = ratio(rate(_WRITTEN, where='phase="thinking"'), rate(_WRITTEN))
    cut = ratio(f"({growth(_FINISHED, where=_CUT)} or vector(0))", growth(_FINISHED))
    return p.Section(
        "Now",
        [
            p.number("Thinking", "Running requests in their thoughts.", p.COUNT, total("mull_requests_thinking")),
            p.number("Answering", "Running requests in their answers.", p.COUNT, total("mull_requests_answering")),
            p.number("Share of thoughts", "Of all tokens written, those that are thoughts.", p.SHARE, share),
            p.number(
                "Mean thought",
                "Thinking tokens of a request that ended lately.",
                p.TOKENS,
                mean("mull_thinking_tokens"),
            ),
            p.number(
                "Cut in thought",
                "Share of requests in the time shown that reached max_tokens before an answer began.",
                p.SHARE,
                cut,
                thresholds=p.bad_from(0.05),
            ),
            p.number(
                "Forced",
                "Tokens a second that closed thoughts whose budget was used up.",
                p.TOKENS_PER_S,
                rate("mull_budget_forced_tokens_total"),
            ),
        ],
    )


def _lengths() -> p.Section:
    return p.Section(
        "How long",
        [
            p.quantiles(
                "Time in thought", "From a request's first thought to its last.", p.SECONDS, "mull_thinking_seconds"
            ),
            p.quantiles("Thinking tokens", "Of each request.", p.TOKENS, "mull_thinking_tokens"),
            p.spread(
                "Spread of thinking tokens",
                "Requests a second by the length of their thoughts: two bands are two kinds of questions.",
                p.TOKENS,
                rate("mull_thinking_tokens_bucket", "le"),
            ),
            p.quantiles("Answer tokens", "Of each request.", p.TOKENS, "mull_answer_tokens"),
            p.quantiles("Prompt tokens", "Of each request.", p.TOKENS, "mull_request_prompt_tokens"),
            p.graph(
                "Thinking tokens for an answer token",
                "How much thought the answers cost.",
                "none",
                p.Line(
                    "ratio", ratio(rate(_WRITTEN, where='phase="thinking"'), rate(_WRITTEN, where='phase="answer"'))
                ),
            ),
        ],
    )


def _ends() -> p.Section:
    return p.Section(
        "How it ends",
        [
            p.stacked(
                "Why thoughts ended",
                "By reason: the model closed them, a budget did, or they were cut.",
                p.PER_SECOND,
                p.Line("{{reason}}", rate("mull_thinking_ended_total", "reason")),
            ),
            p.stacked(
                "Where requests ended",
                "By phase and finish reason: thinking with length is cut in thought.",
                p.REQUESTS_PER_S,
                p.Line("{{phase}}: {{finish_reason}}", rate(_FINISHED, "phase, finish_reason")),
            ),
            p.stacked(
                "Running by phase",
                "Requests that hold a slot.",
                p.COUNT,
                p.Line("thinking", total("mull_requests_thinking")),
                p.Line("answering", total("mull_requests_answering")),
            ),
            p.stacked(
                "Tokens by phase",
                "Tokens written a second.",
                p.TOKENS_PER_S,
                p.Line("{{phase}}", rate(_WRITTEN, "phase")),
            ),
            p.graph(
                "Forced tokens",
                "Tokens a second that closed thoughts whose budget was used up.",
                p.TOKENS_PER_S,
                p.Line("forced", rate("mull_budget_forced_tokens_total")),
            ),
            p.graph(
                "Cut in thought",
                "Requests a second that reached max_tokens before an answer began.",
                p.REQUESTS_PER_S,
                p.Line("cut", rate(_FINISHED, where=_CUT)),
            ),
        ],
    )
