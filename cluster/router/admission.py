"""Which requests can run at all: what the context and the KV pool hold of a prompt and its output.

Hop 5, a part of the scheduler. Knows nothing of who runs now.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import InvalidRequest, PromptTooLong
from cluster.router.blocks import BlockAllocator
from cluster.router.sequence import Sequence, SequenceRequest


@dataclass(frozen=True, slots=True)
class Admission:
    """To one attention group."""

    max_model_len: int
    blocks: BlockAllocator

    @property
    def context_limit(self) -> int:
        """Longest prompt plus output that can run: `max_model_len`, or the whole KV pool where that is smaller."""
        return min(self.max_model_len, self.blocks.num_blocks * self.blocks.block_size)

    def check(self, request: SequenceRequest) -> None:
        """Raises InvalidRequest or PromptTooLong where the request can never run here."""
        if not request.prompt_ids:
            raise InvalidRequest("the prompt has 0 tokens; it needs at least 1", field="prompt")
        if request.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {request.max_tokens}; it must be at least 1", field="max_tokens")
        if len(request.prompt_ids) >= self.context_limit:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt_ids)} tokens, prompt plus output may have {self.context_limit} "
                f"(context {self.max_model_len}, KV pool {self.blocks.num_blocks} blocks of "
                f"{self.blocks.block_size}); shorten it",
                field="prompt",
            )
        if request.output_ids and self.start(request).finish is not None:
            raise InvalidRequest(
                f"{len(request.output_ids)} tokens of output were sent, with which the sequence has ended: a stop "
                f"token is among them, or max_tokens {request.max_tokens} or the context {self.context_limit} is "
                "reached; nothing can follow",
                field="resume",
            )

    def start(self, request: SequenceRequest, arrival: int = 0) -> Sequence:
        """A sequence that waits, and ends where the context does."""
        max_output = min(request.max_tokens, self.context_limit - len(request.prompt_ids))
        return Sequence.start(request, max_output=max_output, arrival=arrival)
