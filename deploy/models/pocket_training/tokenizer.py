"""The byte-level BPE of pocket, its special tokens, and how problems become token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pocket_training.problem import SPELLED, Message, Problem

VOCAB_SIZE = 1024
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """Learn merges from `corpus` and add the special tokens behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(PLAIN_ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_ADDED_TOKENS])
    return tokenizer


def _raise(message: str) -> None:
    raise ValueError(message)


class ChatTemplate:
    """Renders conversations exactly as `transformers` does."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(source)

    @classmethod
    def own(cls) -> ChatTemplate:
        """Pocket's template."""
        return cls(TEMPLATE_PATH.read_text())

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The prompt, up to where the model goes on."""
        return self._template.render(messages=messages, tools=tools or None, add_generation_prompt=True)


def completion_text(problem: Problem) -> str:
    """What the model shall write after the generation prompt."""
    return f"{problem.thinking}\n</think>\n\n{problem.answer}<|im_end|>"


@dataclass(frozen=True)
class EncodedProblem:
    """Token ids of a problem's prompt and of the wanted completion."""

    prompt_ids: list[int]
    completion_ids: list[int]


class ProblemEncoder:
    """Problems to token ids; `spelled` words are written letter by letter, whatever the merges say."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template

    def prompt_ids(self, problem: Problem) -> list[int]:
        """Ids of the rendered prompt."""
        return self._ids(self.template.render(problem.messages, problem.tools))

    def encode(self, problem: Problem) -> EncodedProblem:
        """Prompt and completion."""
        completion_ids: list[int] = []
        for index, part in enumerate(completion_text(problem).split(SPELLED)):
            pieces = part if index % 2 else [part]
            for piece in pieces:
                completion_ids.extend(self._ids(piece))
        return EncodedProblem(self.prompt_ids(problem), completion_ids)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
