"""Random HTTP requests made of the server's own OpenAPI document: right ones, and ones that are wrong in one place."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from cluster.gateway.http.openapi import openapi_document

SCHEMA = schemathesis.openapi.from_dict(openapi_document())
OPERATIONS = {result.ok().path: result.ok() for result in SCHEMA.get_all_operations() if result.ok().method == "post"}
POST_OPERATIONS = sorted(OPERATIONS)
TIMEOUT_S = 20.0


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
