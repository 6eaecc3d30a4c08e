"""A conversation → the prompt's text, by the Jinja template that comes with the checkpoint.

Hop 2. The environment is the one chat templates are written for (`transformers` sets it up the same way): sandboxed,
blocks trimmed, loop controls, `raise_exception`, `strftime_now`, and a `tojson` that leaves text as it is.

A template is a program: it runs in Jinja's sandbox, and every turn of a loop and every call looks at the clock.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence, Sized
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.text.model_files import read_json, read_text
from workers.errors import CheckpointError, MullError

RENDER_TIME_S = 10.0
"""A conversation of a million tokens takes about a second."""
MAX_REPEATED_CHARS = 2**24
"""Of one `text * count` in a template."""


class TemplateError(MullError):
    """The template refused the conversation, or could not make a prompt of it."""


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on time and on what one operator may make."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Templates are rendered in several threads at once.
        self._deadline = threading.local()

    def limit_time(self, time_s: float) -> None:
        """For what this thread renders next."""
        self._deadline.end_s = time.monotonic() + time_s
        self._deadline.time_s = time_s

    def look_at_the_clock(self) -> None:
        """Raises jinja2.TemplateError once the time is over."""
        if time.monotonic() > self._deadline.end_s:
            raise jinja2.TemplateError(f"it takes more than {self._deadline.time_s:g} s; send a shorter conversation")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """With a look at the clock at the head of every loop and macro. No name of a template's can hide it."""
        template = super()._parse(source, name, filename)
        for node in template.find_all((nodes.For, nodes.Macro)):
            assert isinstance(node, (nodes.For, nodes.Macro))
            look = nodes.Call(nodes.EnvironmentAttribute("look_at_the_clock"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(look, lineno=node.lineno))
        return template

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateError("** is not served")
        for text, count in ((left, right), (right, left)):
            if isinstance(text, Sized) and isinstance(count, int) and len(text) * count > MAX_REPEATED_CHARS:
                raise jinja2.TemplateError(f"{len(text)} characters, {count} times, are too many")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled template. Safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], render_time_s: float = RENDER_TIME_S) -> None:
        """`special_tokens`: names such as bos_token, which templates may use. Raises jinja2.TemplateSyntaxError."""
        self._render_time_s = render_time_s
        environment = self._environment = _BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, **special_tokens)
        self._template = environment.from_string(source)

    @classmethod
    def from_dir(cls, model_dir: Path) -> ChatTemplate:
        """The template in chat_template.jinja, else the one in tokenizer_config.json. Raises CheckpointError."""
        settings = read_json(model_dir / "tokenizer_config.json")
        if settings.get("auto_map"):
            raise CheckpointError(
                f"{model_dir / 'tokenizer_config.json'}: auto_map asks for code of the checkpoint's own; "
                "no such code is run: use another one"
            )
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
        known = {
            **(variables or {}),
            "messages": messages,
            "tools": list(tools) or None,
            "add_generation_prompt": True,
        }
        self._environment.limit_time(self._render_time_s)
        try:
            return self._template.render(known)
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
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
