"""What the gateway knows of the model it serves: its name, tokenizer, defaults and sizes. No weights."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import ModelSource
from cluster.text.generation_defaults import GenerationDefaults
from cluster.text.phases import ThinkTags
from cluster.text.tokenizer import Tokenizer
from workers.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model, as clients see it."""

    name: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    tags: ThinkTags
    vocab_size: int
    max_model_len: int
    """Longest prompt plus output, in tokens."""

    @classmethod
    def load(cls, source: ModelSource, max_model_len: int | None = None) -> ServedModel:
        """Read the small files of the checkpoint; None takes its own context length. Raises CheckpointError."""
        tokenizer = Tokenizer.from_dir(source.path)
        config = ModelConfig.from_dir(source.path)
        return cls(
            name=source.name,
            tokenizer=tokenizer,
            defaults=GenerationDefaults.from_dir(source.path),
            tags=ThinkTags(open_id=tokenizer.token_id("<think>"), close_id=tokenizer.token_id("</think>")),
            vocab_size=config.vocab_size,
            max_model_len=max_model_len or config.max_position_embeddings,
        )

    def starts_thinking(self, prompt_ids: list[int]) -> bool:
        """Whether the prompt ends inside its thoughts: the template opened them, or a raw prompt did."""
        open_id = self.tags.open_id
        return open_id is not None and self.tokenizer.ends_with_open_tag(prompt_ids, open_id)
