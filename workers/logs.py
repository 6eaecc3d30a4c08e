"""How a log line looks: one of text for people, or one of JSON for programs; the same for every process of a server.

Lines go to the stderr of the process that writes them. A line may carry fields beside its words
(`extra=log_fields(tokens=3)`): pairs in text, keys in JSON. No prompt and no output is ever put into either.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

_OURS = ("cluster", "workers", "mull")
"""Loggers whose INFO counts; of all others only warnings do."""
_RAYS = ("ray", "ray.serve")
"""They write to stderr by handlers of their own, and a line for each call."""
_PLAIN = re.compile(r"[^\s\"=\\]+")
_FIELDS = "mull_fields"


def log_fields(**fields: object) -> Mapping[str, object]:
    """What a log call takes as `extra`. A field that is None is left out of the line."""
    return {_FIELDS: {name: value for name, value in fields.items() if value is not None}}


def write_logs(form: LogFormat, process: str) -> None:
    """Write this process' lines to its stderr from now on; `process` says in each of them which one it is."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process) if form == "json" else TextLines(process))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in _RAYS:
        logger = logging.getLogger(name)
        logger.handlers = [other for other in logger.handlers if not _is_terminal(other)]
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def _is_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


class TextLines(logging.Formatter):
    """Time, level, process, logger, words, fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname, self._process, f"{record.name}:", record.getMessage()]
        line = " ".join([*words, *(f"{name}={_shown(value)}" for name, value in _fields(record).items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """The same as one JSON object."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC, with milliseconds."""
    written = datetime.fromtimestamp(record.created, UTC)
    return written.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, _FIELDS, {})
    return fields


def _shown(value: object) -> str:
    """One word on one line, whatever a client put into it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text)
