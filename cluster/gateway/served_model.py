"""What the gateway knows of the model it serves: its name, tokenizer, defaults and sizes. No weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import THINKING_CLOSE_PHRASE, ModelSource
from cluster.text.answer import ToolTags
from cluster.text.chat_template import TemplateError
from cluster.text.generation_defaults import GenerationDefaults
from cluster.text.phases import THINK_END, THINK_START, ThinkTags
from cluster.text.tokenizer import Tokenizer
from cluster.text.tools import TOOL_CALL_END, TOOL_CALL_START
from workers.config import ModelConfig
from workers.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model, as clients see it."""

    name: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    tags: ThinkTags
    tool_tags: ToolTags | None
    """None: the tokenizer has no tokens for them, and calls are text."""
    vocab_size: int
    max_model_len: int
    """Longest prompt plus output, in tokens."""
    path: Path
    """The checkpoint's directory."""
    close_ids: tuple[int, ...]
    """Tokens that close the thoughts when their budget is used up: phrase, tag, blank line. Empty: none at all."""
    close_at_once_ids: tuple[int, ...]
    """The same for a budget of 0, where there is nothing to say."""

    @classmethod
    def load(
        cls, source: ModelSource, max_model_len: int | None = None, close_phrase: str = THINKING_CLOSE_PHRASE
    ) -> ServedModel:
        """Read the small files of the checkpoint; None takes its own context length. Raises CheckpointError."""
        tokenizer = Tokenizer.from_dir(source.path)
        config = ModelConfig.from_dir(source.path)
        return cls(
            name=source.name,
            tokenizer=tokenizer,
            defaults=GenerationDefaults.from_dir(source.path, config.vocab_size),
            tags=_think_tags(tokenizer, source.path),
            tool_tags=_tool_tags(tokenizer),
            path=source.path,
            close_ids=_closing_ids(tokenizer, close_phrase),
            close_at_once_ids=_closing_ids(tokenizer, ""),
            vocab_size=config.vocab_size,
            max_model_len=max_model_len or config.max_position_embeddings,
        )

    def limited_to(self, context_limit: int) -> ServedModel:
        """The same, where there is room for no more than so many tokens of prompt plus output."""
        return self if context_limit >= self.max_model_len else replace(self, max_model_len=context_limit)

    def starts_thinking(self, prompt_ids: list[int]) -> bool:
        """Whether the prompt ends inside its thoughts: the template opened them, or a raw prompt did."""
        open_id = self.tags.open_id
        return open_id is not None and self.tokenizer.ends_with_open_tag(prompt_ids, open_id)


def _closing_ids(tokenizer: Tokenizer, phrase: str) -> tuple[int, ...]:
    if tokenizer.token_id(THINK_END) is None:
        return ()
    return tuple(tokenizer.encode(f"{phrase}\n{THINK_END}\n\n"))


def _tool_tags(tokenizer: Tokenizer) -> ToolTags | None:
    open_id, close_id = tokenizer.token_id(TOOL_CALL_START), tokenizer.token_id(TOOL_CALL_END)
    return None if open_id is None or close_id is None else ToolTags(open_id, close_id)


def _think_tags(tokenizer: Tokenizer, model_dir: Path) -> ThinkTags:
    """The tags' ids. Raises CheckpointError where thoughts would begin that nothing can end."""
    tags = ThinkTags(open_id=tokenizer.token_id(THINK_START), close_id=tokenizer.token_id(THINK_END))
    can_open = tags.open_id is not None or _template_opens_thoughts(tokenizer, model_dir)
    missing = [name for name, id_ in ((THINK_START, tags.open_id), (THINK_END, tags.close_id)) if id_ is None]
    if can_open and missing:
        raise CheckpointError(
            f"{model_dir / 'tokenizer.json'}: has no token {missing[-1]}, though prompts may open thoughts; "
            "copy tokenizer and chat template from the same checkpoint"
        )
    return tags


def _template_opens_thoughts(tokenizer: Tokenizer, model_dir: Path) -> bool:
    try:
        prompt = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    except TemplateError as error:
        raise CheckpointError(
            f"{model_dir}: the chat template refuses a single user turn ({error}); copy it again from the checkpoint"
        ) from error
    return prompt.rstrip("\n").endswith(THINK_START)
