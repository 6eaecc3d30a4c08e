"""mull's own engine for evaluation: what the accuracy in the model card is measured with."""

from __future__ import annotations

from pathlib import Path

from cluster.offline import OfflineConfig, OfflineEngine
from pocket_training.reference_engine import Sampling
from workers.step import SamplingParams


class MullEngine:
    """A checkpoint directory in mull's engine, in this process."""

    def __init__(self, model_dir: Path, *, stop_ids: frozenset[int], num_threads: int) -> None:
        self._engine = OfflineEngine(OfflineConfig(model_dir=str(model_dir), num_threads=num_threads))
        self._stop_ids = stop_ids

    def generate(self, prompts: list[list[int]], max_tokens: int, sampling: Sampling) -> list[list[int]]:
        """Tokens after each prompt, the stop token included."""
        params = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, seed=sampling.seed
        )
        return self._engine.generate(prompts, max_tokens, params, self._stop_ids)
