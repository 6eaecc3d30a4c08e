"""The tokenizer and chat template against transformers on the same directory; broken directories."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.text.chat_template import ChatTemplate, TemplateError
from cluster.text.generation_defaults import GenerationDefaults
from cluster.text.tokenizer import Tokenizer
from workers.errors import CheckpointError

VOCAB_SIZE = 1024
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather — “now”",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    ([{"role": "user", "content": "What is 12 + 30?"}], []),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  héllo\n\n<b>&'\" "}], []),
    ([{"role": "user", "content": "Weather in Zürich?"}], [TOOL]),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "Weather?"}], [TOOL, TOOL]),
    (
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello", "reasoning_content": "greet them"},
            {"role": "user", "content": "bye"},
        ],
        [],
    ),
    (
        [
            {"role": "user", "content": "Weather in Zürich?"},
            {"role": "assistant", "content": "", "reasoning_content": "call", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "rain"},
            {"role": "tool", "content": "sun"},
        ],
        [TOOL],
    ),
]


@pytest.fixture(scope="session")
def reference(pocket_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(pocket_dir))


@pytest.fixture
def broken_dir(pocket_dir: Path, tmp_path: Path) -> Path:
    """A copy of the small files, to be broken by the test."""
    for file in (*pocket_dir.glob("*.jinja"), *pocket_dir.glob("*.json")):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize(("messages", "tools"), CONVERSATIONS)
def test_prompts_are_those_of_transformers(
    pocket: Tokenizer, reference: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> None:
    text = reference.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True, tokenize=False)
    assert pocket.render_chat(messages, tools) == text
    assert pocket.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["", "Straße 42 \n\n x", "日本語🙂", "<|im_start|>user\n<think>", "e\u0301"])
def test_encoding_and_decoding_agree_with_transformers(pocket: Tokenizer, reference: Any, text: str) -> None:
    ids = pocket.encode(text)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]
    assert pocket.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_a_prompt_ends_inside_an_open_think_tag(pocket: Tokenizer) -> None:
    ids = pocket.encode(pocket.render_chat([{"role": "user", "content": "hi"}]))
    tag = pocket.token_id("<think>")
    assert tag is not None
    assert pocket.ends_with_open_tag(ids, tag)
    assert not pocket.ends_with_open_tag(ids[:-2], tag)


def test_a_template_in_the_tokenizer_config_serves_as_well(broken_dir: Path, pocket: Tokenizer) -> None:
    config = json.loads((broken_dir / "tokenizer_config.json").read_text())
    config["chat_template"] = (broken_dir / "chat_template.jinja").read_text()
    (broken_dir / "tokenizer_config.json").write_text(json.dumps(config))
    (broken_dir / "chat_template.jinja").unlink()
    messages = CONVERSATIONS[0][0]
    assert Tokenizer.from_dir(broken_dir).render_chat(messages) == pocket.render_chat(messages)


def test_a_template_may_loop_with_break_and_cannot_reach_into_python() -> None:
    assert (
        ChatTemplate("{% for m in messages %}{{ m }}{% break %}{% endfor %}", {}).render([{"a": 1}, {}]) == "{'a': 1}"
    )
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).render([])


LOOPS = "{% set r = range(90000) %}{% for a in r %}{% for b in r %}{% for c in r %}" + "{% endfor %}" * 3
ENDLESS = {
    "loops": LOOPS,
    "loops that hide the clock": "{% set look_at_the_clock = 1 %}{% set environment = 1 %}" + LOOPS,
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "repetition": "{{ 'x' * 10000000000 }}",
    "powers": "{{ 9 ** 9 ** 9 ** 9 }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_would_go_on_without_end_is_stopped(source: str) -> None:
    template = ChatTemplate(source, {}, render_time_s=0.05)

    with pytest.raises(TemplateError, match=r"0\.05 s|too many|not served"):
        template.render([])


@pytest.mark.parametrize("source", ["{{ raise_exception('no, not so') }}", "{{ messages[0].content + 1 }}"])
def test_a_template_that_fails_raises_its_own_words(source: str) -> None:
    with pytest.raises(TemplateError, match=r"no, not so|TypeError"):
        ChatTemplate(source, {}).render([{"content": "x"}])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "ByteLevel"),
        ("tokenizer_config.json", None, "missing"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "x.Y"}}', "code of the checkpoint's own"),
        ("chat_template.jinja", "{% if %}", "line 1"),
    ],
)
def test_a_broken_text_file_is_named_with_its_remedy(
    broken_dir: Path, name: str, content: str | None, words: str
) -> None:
    write(broken_dir / name, content)
    with pytest.raises(CheckpointError, match=words) as caught:
        Tokenizer.from_dir(broken_dir)
    assert name in str(caught.value)
    assert ";" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "missing"),
        ("{", "not JSON"),
        ('{"eos_token_id": "x"}', "eos_token_id"),
        ('{"eos_token_id": 1, "temperature": "hot"}', "temperature"),
        ('{"eos_token_id": 1, "temperature": -1}', "temperature"),
        ('{"eos_token_id": 1, "temperature": NaN}', "temperature"),
        ('{"eos_token_id": 1, "temperature": 1e300}', "temperature"),
        ('{"eos_token_id": 1, "temperature": 1' + "0" * 400 + "}", "temperature"),
        ('{"eos_token_id": 1, "top_p": 5}', "top_p"),
        ('{"eos_token_id": 1, "top_k": -7}', "top_k"),
        ('{"eos_token_id": 1, "top_k": 1.5}', "top_k"),
        ('{"eos_token_id": 1, "top_k": 1e12}', "top_k"),
        ('{"eos_token_id": 1, "min_p": 2}', "min_p"),
        ('{"eos_token_id": 1, "repetition_penalty": 0}', "repetition_penalty"),
        ('{"eos_token_id": true}', "eos_token_id"),
        ('{"eos_token_id": [1, 1024]}', "below 1024"),
    ],
)
def test_a_broken_generation_config_is_named_with_its_remedy(broken_dir: Path, content: str | None, words: str) -> None:
    write(broken_dir / "generation_config.json", content)
    with pytest.raises(CheckpointError, match=words) as caught:
        GenerationDefaults.from_dir(broken_dir, VOCAB_SIZE)
    assert "generation_config.json" in str(caught.value)


@pytest.mark.parametrize(("eos", "ids"), [(7, {7}), ([7, 8], {7, 8})])
def test_one_stop_id_or_several(broken_dir: Path, eos: Any, ids: set[int]) -> None:
    write(broken_dir / "generation_config.json", json.dumps({"eos_token_id": eos, "top_k": 5}))
    defaults = GenerationDefaults.from_dir(broken_dir, VOCAB_SIZE)
    assert defaults.stop_token_ids == ids
    assert defaults.top_k == 5
    assert defaults.temperature == 1.0


def test_a_config_that_does_not_sample_is_greedy(broken_dir: Path) -> None:
    write(broken_dir / "generation_config.json", '{"eos_token_id": 1, "do_sample": false, "temperature": 0.6}')
    assert GenerationDefaults.from_dir(broken_dir, VOCAB_SIZE).temperature == 0


def test_stop_ids_come_from_the_model_config_where_the_generation_config_has_none(broken_dir: Path) -> None:
    write(broken_dir / "generation_config.json", "{}")
    eos = json.loads((broken_dir / "config.json").read_text())["eos_token_id"]
    assert GenerationDefaults.from_dir(broken_dir, VOCAB_SIZE).stop_token_ids == {eos}


def test_text_needs_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'grpc'}"
    code = f"import sys, cluster.text.tokenizer, cluster.text.phases; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def write(file: Path, content: str | None) -> None:
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
