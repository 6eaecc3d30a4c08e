"""Stand-ins that execute the real contracts without a model. (skeleton: signatures are final, bodies follow)"""

from __future__ import annotations

from workers.step import StepPlan, StepResult


class FakeRanks:
    """Executes plans on a paged memory of tokens; the next token is a pure function of what the block table reaches."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, vocab_size: int = 50
    ) -> None: ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan; raises ContractBroken where the plan breaks the contract of workers.step."""
        raise NotImplementedError
