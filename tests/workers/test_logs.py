"""How log lines look, in text and in JSON."""

from __future__ import annotations

import json
import logging
import sys

from workers.logs import JsonLines, TextLines, log_fields


def record(words: str, *args: object, **fields: object) -> logging.LogRecord:
    logger = logging.getLogger("cluster.gateway.somewhere")
    made = logger.makeRecord(logger.name, logging.INFO, "f", 1, words, args, None, extra=log_fields(**fields))
    made.created = 1_700_000_000.25
    return made


def test_a_line_of_json_has_its_words_and_its_fields_as_keys() -> None:
    line = JsonLines("gateway").format(record("%d copies", 2, request_id="mine", tokens=3, tenant=None))

    told = json.loads(line)
    assert told.pop("pid") > 0
    assert told == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "INFO",
        "process": "gateway",
        "logger": "cluster.gateway.somewhere",
        "message": "2 copies",
        "request_id": "mine",
        "tokens": 3,
    }


def test_a_line_of_text_has_its_fields_as_pairs() -> None:
    line = TextLines("rank-1").format(record("ready", tokens=3, note="two words", metadata={"job": "7"}))

    assert line == (
        "2023-11-14T22:13:20.250Z INFO rank-1 cluster.gateway.somewhere: ready "
        'tokens=3 note="two words" metadata="{\\"job\\": \\"7\\"}"'
    )


def test_no_field_can_begin_a_line_of_its_own_or_another_field() -> None:
    faked = "x\n2023-11-14T22:13:20.250Z INFO a: b\x1b[31m y=1"

    for lines in (TextLines("gateway"), JsonLines("gateway")):
        line = lines.format(record("ended", request_id=faked))
        assert "\n" not in line
        assert "\x1b" not in line
    assert json.loads(JsonLines("gateway").format(record("ended", request_id=faked)))["request_id"] == faked


def test_an_exception_goes_with_its_line() -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        made = record("failed")
        made.exc_info = sys.exc_info()

    assert "KeyError: 'lost'" in json.loads(JsonLines("router").format(made))["exception"]
    assert TextLines("router").format(made).splitlines()[-1] == "KeyError: 'lost'"
