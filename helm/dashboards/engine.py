"""Where a step's time goes, what fills the KV pool, what the prefix cache saves, and how evenly experts are used."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from helm.dashboards import panels as p
from helm.dashboards.promql import mean, quantile, rate, ratio, series, total

_STEP = "mull_step_seconds"


def engine() -> Dashboard:
    return p.board(
        "mull-engine",
        "mull / Engine",
        "Steps, memory and experts.",
        _now(),
        _steps(),
        _requests(),
        _memory(),
        _experts(),
    )


def _now() -> p.Section:
    usage = f"max({series('mull_kv_usage_ratio')})"
    return p.Section(
        "Now",
        [
            p.number("Running", "Requests that hold a slot.", p.COUNT, total("mull_requests_running")),
            p.number("Waiting", "Requests that wait for a slot.", p.COUNT, total("mull_requests_waiting")),
            p.number("KV in use", "Of the fullest copy.", p.SHARE, usage, thresholds=p.bad_from(0.95)),
            p.number("Steps", "Steps a second, all copies.", p.PER_SECOND, rate("mull_engine_steps_total")),
            p.number(
                "Sequences of a step", "In the middle of the batches.", p.COUNT, quantile(0.5, "mull_step_sequences")
            ),
            p.number("Cache hits", "Of prompt tokens looked up.", p.SHARE, _hits()),
        ],
    )


def _hits() -> str:
    return ratio(rate("mull_prefix_hit_tokens_total"), rate("mull_prefix_query_tokens_total"))


def _steps() -> p.Section:
    return p.Section(
        "Steps",
        [
            p.stacked(
                "Where a step's time goes",
                "Mean seconds of a step, by part: planning, sending the plan, computing, gathering the results.",
                p.SECONDS,
                p.Line("{{part}}", mean(_STEP, "part")),
            ),
            p.graph(
                "Slow steps",
                "p99 of each part of a step.",
                p.SECONDS,
                p.Line("{{part}}", quantile(0.99, _STEP, "part")),
            ),
            p.quantiles("Sequences of a step", "The size of batches.", p.COUNT, "mull_step_sequences"),
            p.stacked(
                "Tokens computed",
                "Tokens a second: of prompts and replays, of decoding, and of drafts that decoding checks.",
                p.TOKENS_PER_S,
                p.Line("{{kind}}", rate("mull_step_tokens_total", "kind")),
            ),
            p.graph(
                "Steps by copy",
                "Steps a second.",
                p.PER_SECOND,
                p.Line("{{instance}}", rate("mull_engine_steps_total", "instance")),
            ),
            p.graph(
                "Tokens of a step",
                "How full steps are.",
                p.TOKENS,
                p.Line("tokens", ratio(rate("mull_step_tokens_total"), rate("mull_engine_steps_total"))),
            ),
            p.graph(
                "Drafts",
                "Speculative decoding: tokens a second that were guessed, and those of them that were sampled then.",
                p.TOKENS_PER_S,
                p.Line("drafted", rate("mull_draft_tokens_total")),
                p.Line("accepted", rate("mull_accepted_tokens_total")),
            ),
        ],
    )


def _requests() -> p.Section:
    return p.Section(
        "Requests in the engine",
        [
            p.quantiles("In the queue", "From acceptance to a slot.", p.SECONDS, "mull_request_queue_time_seconds"),
            p.quantiles(
                "In prefill",
                "From a slot to the first token: the prompt.",
                p.SECONDS,
                "mull_request_prefill_time_seconds",
            ),
            p.quantiles(
                "In decode", "From the first token to the last.", p.SECONDS, "mull_request_decode_time_seconds"
            ),
        ],
    )


def _memory() -> p.Section:
    held = f"{series('mull_kv_blocks')} - {series('mull_kv_free_blocks')}"
    return p.Section(
        "KV and prefix cache",
        [
            p.graph(
                "KV in use",
                "Share of blocks that running requests hold; cached blocks of nobody count as free.",
                p.SHARE,
                p.Line("{{instance}}", f"max by (instance) ({series('mull_kv_usage_ratio')})"),
            ),
            p.graph(
                "Tokens in KV",
                "What running requests hold, and what there is room for.",
                p.TOKENS,
                p.Line("held", f"sum(({held}) * {series('mull_kv_block_tokens')})"),
                p.Line("room", f"sum({series('mull_kv_blocks')} * {series('mull_kv_block_tokens')})"),
            ),
            p.graph(
                "Preemptions",
                "Requests a second that lost their slot for a while, as KV was full.",
                p.PER_SECOND,
                p.Line("preempted", rate("mull_preemptions_total")),
            ),
            p.graph("Prefix hits", "Share of prompt tokens that the cache had.", p.SHARE, p.Line("hits", _hits())),
        ],
    )


def _experts() -> p.Section:
    return p.Section(
        "Experts",
        [
            p.graph(
                "Imbalance",
                "Largest over mean load of the ranks' experts, by group of layers; 1 is even.",
                "none",
                p.Line("layers {{layers}}", f"max by (layers) ({series('mull_expert_imbalance_ratio')})"),
            ),
            p.graph(
                "Placed anew",
                "Times that experts moved to other ranks, a second.",
                p.PER_SECOND,
                p.Line("{{instance}}", rate("mull_expert_rebalances_total", "instance")),
            ),
            p.graph(
                "Sent between ranks",
                "Bytes a second that went to experts and back.",
                p.BYTES_PER_S,
                p.Line("sent", rate("mull_dispatch_bytes_total")),
            ),
            p.graph(
                "Time in exchanges",
                "Seconds of each second that ranks spent on sending and awaiting them.",
                p.SECONDS,
                p.Line("{{instance}}", rate("mull_dispatch_seconds_total", "instance")),
            ),
        ],
    )
