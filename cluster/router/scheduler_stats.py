"""What a scheduler tells of itself: how things are, and what has come together since it began."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerStats:
    """A snapshot for metrics. Those named _total only grow."""

    num_running: int
    num_thinking: int
    """Of the running ones, those in their thoughts."""
    num_answering: int
    """Of the running ones, the others."""
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_host_blocks: int
    """Room in the memory of the ranks' hosts."""
    num_used_host_blocks: int
    offloaded_tokens_total: int
    """Whose KV was kept there when its blocks were needed for others."""
    fetched_tokens_total: int
    """Whose KV was brought back from there."""
    num_preempted_total: int
    prefix_query_tokens_total: int
    """Prompt tokens looked up in the prefix cache, once per request."""
    prefix_hit_tokens_total: int
    draft_tokens_total: int
    """Put through the model before they were sampled."""
    accepted_tokens_total: int
    """Of those, the ones that were sampled then."""


@dataclass(kw_only=True, slots=True)
class Totals:
    """Counts that outlive the ranks and their blocks."""

    preempted: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    offloaded_blocks: int = 0
    fetched_blocks: int = 0
