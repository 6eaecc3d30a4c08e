"""What a Router tells on its metrics port, of itself and for its ranks: one copy of the model.

What happens in steps is counted where it happens, in plain numbers (`steps.py`, `request_times.py`); how things are is
read when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.registry import Collector

from cluster.errors import RankLossCause
from cluster.metrics.buckets import LONG_S, SEQUENCES, STEP_S
from cluster.metrics.plain import Labels, MetricSpec, counter, family, gauge, histogram
from cluster.metrics.process import BUILD_INFO, CERTIFICATES

if TYPE_CHECKING:
    from cluster.router.router import RouterStats
    from cluster.router.scheduler_stats import SchedulerStats
    from workers.step import RankReady

QUEUE_TIME = histogram(
    "mull_request_queue_time_seconds",
    "From a request's arrival to the step that computes its first tokens.",
    LONG_S,
    known_as=("vllm:request_queue_time_seconds", "sglang:queue_time_seconds"),
)
PREFILL_TIME = histogram(
    "mull_request_prefill_time_seconds",
    "From that step to a request's first token.",
    LONG_S,
    known_as=("vllm:request_prefill_time_seconds",),
)
DECODE_TIME = histogram(
    "mull_request_decode_time_seconds",
    "From a request's first token to its end.",
    LONG_S,
    known_as=("vllm:request_decode_time_seconds",),
)
PAUSES = histogram(
    "mull_recovery_pause_seconds",
    "How long a request that had lost its ranks stood still: from the last step before to its next token.",
    LONG_S,
    ("cause",),
)
STEP_SECONDS = histogram(
    "mull_step_seconds",
    "Time of a step by part: schedule decides what it computes, send brings it to the ranks, compute is the slowest "
    "rank's, collect takes the result and passes it to gateways. The next step is sent before a result is back.",
    STEP_S,
    ("part",),
)
STEP_TOKENS = counter(
    "mull_step_tokens_total",
    "Tokens put through the model. prefill: known ones, of prompts, replays and forced phrases; decode: sampled ones; "
    "draft: guessed ones.",
    ("kind",),
)
STEP_SEQUENCES = histogram("mull_step_sequences", "Sequences that a step computes tokens of.", SEQUENCES)
DISPATCH_BYTES = counter(
    "mull_dispatch_bytes_total", "Bytes that ranks sent each other to bring tokens to experts and results back."
)
DISPATCH_SECONDS = counter(
    "mull_dispatch_seconds_total",
    "Time of ranks in dispatch and combine, waits for each other included, summed over ranks. Work that a GPU has in "
    "its queue then is not in it.",
)

_Of = Callable[["RouterStats"], dict[Labels, float]]


def _one(read: Callable[[RouterStats], float]) -> _Of:
    return lambda stats: {(): read(stats)}


def _scheduler(read: Callable[[SchedulerStats], float]) -> _Of:
    """0 while there is no scheduler: before the first start, and at the end."""
    return lambda stats: {(): 0 if stats.scheduler is None else read(stats.scheduler)}


def _ranks(read: Callable[[RankReady], float]) -> _Of:
    return lambda stats: {(str(rank.rank),): read(rank) for rank in stats.ranks}


def _usage(stats: SchedulerStats) -> float:
    return 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


_READ: tuple[tuple[MetricSpec, _Of], ...] = (
    (gauge("mull_engine_ready", "1 when this Router takes work, else 0."), _one(lambda it: it.is_ready)),
    (
        gauge(
            "mull_engine_heartbeat_age_seconds",
            "Since the last step; with nothing to do, since the rank that is silent for longest gave a sign of life.",
        ),
        _one(lambda it: it.heartbeat_age_s),
    ),
    (gauge("mull_ranks", "Ranks that this copy of the model has by its configuration."), _one(lambda it: it.num_ranks)),
    (gauge("mull_ranks_ready", "Ranks that take plans; none while a group starts."), _one(lambda it: len(it.ranks))),
    (
        counter(
            "mull_ranks_lost_total",
            "Ranks that were lost: their process ended (exited), they did not answer a step or were not ready in time "
            "(late), gave no sign of life (silent), or told an error (failed).",
            ("cause",),
        ),
        lambda it: {(cause.value,): it.num_ranks_lost_total.get(cause, 0) for cause in RankLossCause},
    ),
    (
        counter("mull_engine_restarts_total", "Times that the ranks' group was started again."),
        _one(lambda it: it.num_restarts_total),
    ),
    (
        counter("mull_quarantined_requests_total", "Requests given up because ranks were lost with them repeatedly."),
        _one(lambda it: it.num_given_up_total),
    ),
    (
        gauge(
            "mull_requests_running",
            "Requests that hold a slot.",
            known_as=("vllm:num_requests_running", "sglang:num_running_reqs"),
        ),
        _scheduler(lambda it: it.num_running),
    ),
    (
        gauge(
            "mull_requests_waiting",
            "Requests that wait for a slot.",
            known_as=("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
        ),
        _scheduler(lambda it: it.num_waiting),
    ),
    (gauge("mull_requests_thinking", "Of the running ones, those in thought."), _scheduler(lambda it: it.num_thinking)),
    (
        gauge("mull_requests_answering", "Of the running ones, those in their answer."),
        _scheduler(lambda it: it.num_answering),
    ),
    (
        counter(
            "mull_preemptions_total",
            "Times that a request lost its slot because KV blocks ran out.",
            known_as=("vllm:num_preemptions_total",),
        ),
        _scheduler(lambda it: it.num_preempted_total),
    ),
    (gauge("mull_kv_blocks", "KV blocks, over all attention groups."), _scheduler(lambda it: it.num_blocks)),
    (
        gauge("mull_kv_free_blocks", "KV blocks that nobody uses; they may hold cached prefixes."),
        _scheduler(lambda it: it.num_free_blocks),
    ),
    (
        gauge(
            "mull_kv_usage_ratio",
            "Share of the KV blocks in use, 0 to 1.",
            known_as=("vllm:kv_cache_usage_perc", "sglang:token_usage"),
        ),
        _scheduler(_usage),
    ),
    (
        gauge("mull_host_kv_blocks", "KV blocks that fit the hosts' memory, over all attention groups."),
        _scheduler(lambda it: it.num_host_blocks),
    ),
    (gauge("mull_host_kv_used_blocks", "Of those, the ones in use."), _scheduler(lambda it: it.num_used_host_blocks)),
    (
        counter("mull_host_kv_offloaded_tokens_total", "Tokens whose KV was kept in the host's memory."),
        _scheduler(lambda it: it.offloaded_tokens_total),
    ),
    (
        counter(
            "mull_host_kv_fetched_tokens_total", "Tokens whose KV was brought back from there and not computed again."
        ),
        _scheduler(lambda it: it.fetched_tokens_total),
    ),
    (gauge("mull_kv_block_tokens", "Tokens that a KV block holds."), _one(lambda it: it.block_size)),
    (
        counter(
            "mull_prefix_query_tokens_total",
            "Prompt tokens looked up in the prefix cache, once per request.",
            known_as=("vllm:prefix_cache_queries_total",),
        ),
        _scheduler(lambda it: it.prefix_query_tokens_total),
    ),
    (
        counter(
            "mull_prefix_hit_tokens_total",
            "Prompt tokens found in the prefix cache.",
            known_as=("vllm:prefix_cache_hits_total", "sglang:cache_hit_rate"),
        ),
        _scheduler(lambda it: it.prefix_hit_tokens_total),
    ),
    (
        counter(
            "mull_draft_tokens_total",
            "Tokens that were guessed, and put through the model before they were sampled: speculative decoding.",
            known_as=("vllm:spec_decode_num_draft_tokens_total",),
        ),
        _scheduler(lambda it: it.draft_tokens_total),
    ),
    (
        counter(
            "mull_accepted_tokens_total",
            "Guessed tokens that were sampled then; over the guessed ones, the acceptance.",
            known_as=("vllm:spec_decode_num_accepted_tokens_total",),
        ),
        _scheduler(lambda it: it.accepted_tokens_total),
    ),
    (counter("mull_engine_steps_total", "Steps that all ranks have answered."), _one(lambda it: it.num_steps_total)),
    (
        counter(
            "mull_replayed_tokens_total",
            "Tokens put through the model again, by what made it needed.",
            ("cause",),
        ),
        lambda it: {("rank_lost",): it.num_replayed_tokens_total},
    ),
    (
        gauge(
            "mull_expert_imbalance_ratio",
            "Largest over mean load of the ranks' experts in these layers, as last reported; 1 is even. Missing where "
            "there is nothing to balance.",
            ("layers",),
        ),
        lambda it: {(layers,): ratio for layers, ratio in it.expert_imbalances.items()},
    ),
    (
        counter("mull_expert_rebalances_total", "Times that experts were placed anew."),
        _one(lambda it: it.num_rebalances_total),
    ),
    (gauge("mull_weight_bytes", "Memory of a rank's weights.", ("rank",)), _ranks(lambda it: it.weight_bytes)),
    (gauge("mull_kv_bytes", "Memory of a rank's KV pool.", ("rank",)), _ranks(lambda it: it.kv_bytes)),
    (
        gauge("mull_load_seconds", "How long a rank took to be ready; little where it had its weights.", ("rank",)),
        _ranks(lambda it: it.load_s),
    ),
)
"""What is read from a snapshot."""

SPECS: tuple[MetricSpec, ...] = (
    *(spec for spec, _ in _READ),
    QUEUE_TIME, PREFILL_TIME, DECODE_TIME, PAUSES, STEP_SECONDS, STEP_TOKENS, STEP_SEQUENCES, DISPATCH_BYTES,
    DISPATCH_SECONDS, CERTIFICATES, BUILD_INFO,
)  # fmt: skip
"""All of the port's, but for those of the process."""


class RouterFigures(Collector):
    """How a Router is, read when somebody asks for it."""

    def __init__(self, read: Callable[[], RouterStats]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        stats = self._read()
        for spec, of in _READ:
            yield family(spec, of(stats))
