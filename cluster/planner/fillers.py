"""Requests without a text: as long as the real ones, and as hard to schedule."""

from __future__ import annotations

from cluster.planner.flights import Flight
from cluster.router.sequence import SequenceRequest
from workers.step import SamplingParams

FILLER_ID, THINK_END_ID = 0, 1
"""All that simulated ranks ever say."""

_GREEDY = SamplingParams(temperature=0.0)


def filler_request(flight: Flight, output_ids: list[int], shared_prompt_tokens: int) -> SequenceRequest:
    """As a gateway would send it, maybe behind output from elsewhere; of all prompts, so many tokens are the same."""
    arrival = flight.arrival
    prompt_ids = [FILLER_ID] * arrival.prompt_tokens
    if shared_prompt_tokens:
        # The first token of its own makes every later block one that no other prompt has.
        prompt_ids[min(shared_prompt_tokens, arrival.prompt_tokens - 1)] = flight.key + 2
    return SequenceRequest(
        key=flight.key,
        prompt_ids=prompt_ids,
        sampling=_GREEDY,
        max_tokens=arrival.output_tokens,
        starts_thinking=arrival.thinking_tokens > 0,
        think_end_id=THINK_END_ID,
        output_ids=output_ids,
        cache_salt=arrival.tenant,
    )
