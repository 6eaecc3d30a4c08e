"""Random HTTP requests made of the server's own OpenAPI document: right ones, and ones that are wrong in one place."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from cluster.gateway.http.openapi import openapi_document

SCHEMA = schemathesis.openapi.from_dict(openapi_document())
OPERATIONS = {result.ok().path: result.ok() for result in SCHEMA.get_all_operations() if result.ok().method == "post"}
POST_OPERATIONS = sorted(OPERATIONS)
TIMEOUT_S = 60.0


ODD_VALUES = (
    *(
        "null",
        "true",
        "-1",
        "0",
        "1.5",
        "1e999",
        "-1e300",
        "1" + "0" * 400,
        "18446744073709551616",
        '""',
        '"x"',
        "[]",
        "{}",
    ),
    *(
        r'"\ud800"',
        r'"\u0000"',
        '"' + "9" * 5000 + '"',
        "[null]",
        "[[]]",
        r'["\udfff"]',
        "[1e999]",
        "[-1]",
        "[4294967295]",
    ),
    *('{"type": 1}', '{"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}', '{"1": 1e999}', '{"a": {}}'),
    *('{"' + "9" * 5000 + '": 1}', "[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200, r'{"\ud800": "x"}', "NaN"),
    *('[{"type": "function", "function": {"name": "f", "parameters": {"type": "array", "minItems": 99999999}}}]',),
    *('{"regex": "((((a{999}){999}){999}){999})"}', '{"grammar": "start: start start"}', '{"choice": []}'),
)
"""JSON texts, some of which only JSON's grammar allows."""
BASES = {
    "/v1/chat/completions": '"messages": [{"role": "user", "content": "hi"}]',
    "/v1/completions": '"prompt": "hi"',
    "/v1/responses": '"input": "hi"',
}


def odd_bodies(path: str) -> list[bytes]:
    """The smallest right body with each of the fields that the document names set to each odd value."""
    name = (
        OPERATIONS[path].definition.raw["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    )
    fields = openapi_document()["components"]["schemas"][name]["properties"]
    return [f"{{{BASES[path]}, {json.dumps(field)}: {odd}}}".encode() for field in fields for odd in ODD_VALUES]


def http_calls(path: str) -> st.SearchStrategy[Any]:
    """Requests to one path."""
    operation = OPERATIONS[path]
    right, wrong = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)
    return st.one_of(right, wrong)


def fault_of(call: Any, url: str) -> str | None:
    """What was wrong with the answer, if anything was: a status of ours, or an error without words."""
    response = call.call(base_url=url, timeout=TIMEOUT_S)
    # A deadline that the request set itself.
    if response.status_code == 504:
        return None
    if response.status_code >= 500:
        return f"{response.status_code}: {response.text}"
    if response.status_code >= 400 and not response.json()["error"]["message"]:
        return f"{response.status_code} without a message"
    return None
