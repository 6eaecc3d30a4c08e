"""A conversation → the prompt's text, by the Jinja template that comes with the checkpoint.

Hop 2. The environment is the one chat templates are written for (`transformers` sets it up the same way): sandboxed,
blocks trimmed, loop controls, `raise_exception`, `strftime_now`, and a `tojson` that leaves text as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.text.model_files import read_json, read_text
from workers.errors import CheckpointError, MullError


class TemplateError(MullError):
    """The template refused the conversation, or could not make a prompt of it."""


class ChatTemplate:
    """A compiled template. Safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: names such as bos_token, which templates may use. Raises jinja2.TemplateSyntaxError."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, **special_tokens)
        self._template = environment.from_string(source)

    @classmethod
    def from_dir(cls, model_dir: Path) -> ChatTemplate:
        """The template in chat_template.jinja, else the one in tokenizer_config.json. Raises CheckpointError."""
        settings = read_json(model_dir / "tokenizer_config.json")
        file = model_dir / "chat_template.jinja"
        source = read_text(file) if file.exists() else settings.get("chat_template")
        if not isinstance(source, str):
            raise CheckpointError(
                f"{file}: missing, and tokenizer_config.json has no chat_template; copy the file from the checkpoint"
            )
        try:
            return cls(source, _special_tokens(settings))
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"{file}: line {error.lineno}: {error.message}; copy it again from the checkpoint"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, up to where the model goes on; `variables` are the template's own.

        Raises TemplateError with the template's own words.
        """
        known = {**(variables or {}), "messages": messages, "tools": list(tools) or None, "add_generation_prompt": True}
        try:
            return self._template.render(known)
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # A template is a program on the client's data: whatever it trips over, it is the input that must change.
            raise TemplateError(f"{type(error).__name__}: {error}") from error


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like; older configs hold each as an object with `content`."""
    found = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
