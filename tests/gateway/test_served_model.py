"""What a gateway refuses to serve: a directory whose text files do not fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.config import ModelSource
from cluster.errors import CheckpointError
from cluster.gateway.served_model import ServedModel
from tests.gateway.conftest import POCKET


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A copy of the small files, to be broken by the test."""
    for file in (*POCKET.glob("*.jinja"), *POCKET.glob("*.json")):
        shutil.copy(file, tmp_path)
    return tmp_path


def rename_tokens(model_dir: Path, *tags: str) -> None:
    file = model_dir / "tokenizer.json"
    text = file.read_text()
    for tag in tags:
        text = text.replace(json.dumps(tag), json.dumps(f"<|no longer {tag[1:-1]}|>"))
    file.write_text(text)


@pytest.mark.parametrize("tags", [("</think>",), ("<think>",), ("<think>", "</think>")])
def test_a_template_that_opens_thoughts_needs_the_tokens_of_both_tags(model_dir: Path, tags: tuple[str, ...]) -> None:
    rename_tokens(model_dir, *tags)

    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: has no token {tags[-1]}.*; copy"):
        ServedModel.load(ModelSource(path=model_dir, name="x"))


def test_a_model_that_never_thinks_needs_no_tags(model_dir: Path) -> None:
    rename_tokens(model_dir, "<think>", "</think>")
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].content }}")

    model = ServedModel.load(ModelSource(path=model_dir, name="x"))

    assert (model.tags.open_id, model.tags.close_id) == (None, None)


def test_a_template_that_takes_no_question_is_refused_in_its_own_words(model_dir: Path) -> None:
    rename_tokens(model_dir, "<think>", "</think>")
    (model_dir / "chat_template.jinja").write_text("{{ raise_exception('no turns at all') }}")

    with pytest.raises(CheckpointError, match="no turns at all"):
        ServedModel.load(ModelSource(path=model_dir, name="x"))
