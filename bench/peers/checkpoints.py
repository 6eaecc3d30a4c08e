"""One checkpoint a shape, and the forms of it that the peers read; each is made once and kept."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from bench.make_checkpoint import write_checkpoint
from bench.peers.protocol import EngineFailed
from bench.peers.weights import write_fp32
from bench.peers.work import Work
from workers.config import ModelConfig

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "deploy" / "models" / "pocket"
VOCAB_SIZE = 32768
"""Of the random checkpoints: what is measured is layers, not the embedding of a language or two."""
FIRST_FREE_ID = 1024
"""Pocket's tokens come before it, in the random checkpoints too."""
Q8_0_BYTES = 34 / 32
"""A scale of two bytes for 32 values."""


class Form(StrEnum):
    FP8 = "fp8"
    FP32 = "fp32"
    GGUF_F32 = "F32.gguf"
    GGUF_Q8_0 = "Q8_0.gguf"


@dataclass(frozen=True)
class Shape:
    """A model to measure; `random` names the dimensions in make_checkpoint, None is the built-in model."""

    name: str
    random: str | None
    vocab_size: int | None = VOCAB_SIZE

    @property
    def prompt_ids(self) -> range:
        """Ordinary tokens, which prompts are drawn from."""
        return range(990) if self.random is None else range(FIRST_FREE_ID, self.vocab_size or 151643)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("pocket", None),
        Shape("dense-0.6b", "0.6b"),
        Shape("moe-1.5b", "1.5b-moe"),
        Shape("moe-0.5b", "0.5b-moe"),
        Shape("dense-4b", "4b", vocab_size=None),
    )
}


class Checkpoints:
    """All forms of one shape, in a directory of its own."""

    def __init__(self, shape: Shape, root: Path, gguf_python: Path) -> None:
        self.shape = shape
        self._directory = root / shape.name
        self._gguf_python = gguf_python

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dir(self.path(Form.FP8))

    def path(self, form: Form) -> Path:
        """The form, made where it is not there. Raises EngineFailed where what makes it is missing."""
        if form is Form.FP8 and self.shape.random is None:
            return POCKET
        path = self._directory / form.value
        if not path.exists():
            makers = {Form.FP8: self._make_fp8, Form.FP32: self._make_fp32}
            _make(path, makers.get(form, self._make_gguf))
        return path

    @property
    def work(self) -> Work:
        return Work.of(self.path(Form.FP8))

    def size_bytes(self, form: Form) -> float:
        """Of the weights in that form, by their number: the form itself need not be there."""
        per_parameter = {Form.FP32: 4.0, Form.GGUF_F32: 4.0, Form.GGUF_Q8_0: Q8_0_BYTES}
        return self.work.num_parameters * per_parameter[form] if form in per_parameter else self.work.weight_bytes

    def _make_fp8(self, directory: Path) -> None:
        assert self.shape.random is not None
        write_checkpoint(directory, self.shape.random, vocab=self.shape.vocab_size)
        write_texts(directory, ModelConfig.from_dir(directory).vocab_size)

    def _make_fp32(self, directory: Path) -> None:
        write_fp32(self.path(Form.FP8), directory)

    def _make_gguf(self, file: Path) -> None:
        if not self._gguf_python.exists():
            raise EngineFailed(f"not installed: no {self._gguf_python}")
        kind = file.name.split(".")[0]
        command = [
            self._gguf_python,
            "-m",
            "bench.peers.gguf_file",
            self.path(Form.FP8).absolute(),
            file.absolute(),
            kind,
        ]
        ended = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
        if ended.returncode != 0:
            raise EngineFailed(f"its file cannot be written: {ended.stderr.strip().splitlines()[-1:]}")


def _make(path: Path, make: Callable[[Path], None]) -> None:
    """Under another name first: what bears the right one is whole."""
    unfinished = path.with_name(f"{path.name.split('.')[0]}.{os.getpid()}.unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    make(unfinished)
    unfinished.rename(path)


def write_texts(directory: Path, vocab_size: int) -> None:
    """What a server wants beside weights: pocket's own, with words made up until every id has a text."""
    tokenizer: dict[str, Any] = json.loads((POCKET / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"Ġw{token_id}": token_id for token_id in range(FIRST_FREE_ID, vocab_size)}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (directory / name).write_bytes((POCKET / name).read_bytes())
