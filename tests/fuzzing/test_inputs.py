"""A short run of each fuzzing target; bench/fuzz.py runs them for as long as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from cluster.config import EffortBudgets
from cluster.errors import RequestError
from cluster.gateway.http.chat import read_chat
from cluster.gateway.http.completions import read_completions
from cluster.gateway.http.fields import Fields
from cluster.gateway.http.responses import read_response
from cluster.gateway.requests import prepare
from mull.v1 import generation_pb2 as pb
from tests.fuzzing.http_calls import odd_bodies
from tests.fuzzing.targets import TARGETS, model

NUM_EXAMPLES = 200
READERS: dict[str, Callable[[Fields, EffortBudgets], Iterable[pb.GenerateRequest]]] = {
    "/v1/chat/completions": lambda body, budgets: [read_chat(body, budgets)],
    "/v1/completions": read_completions,
    "/v1/responses": lambda body, budgets: [read_response(body, budgets)],
}


@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs_break_nothing(name: str) -> None:
    target = TARGETS[name]()

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(value=target.inputs)
    def shoot(value: object) -> None:
        target.check(value)

    shoot()


@pytest.mark.parametrize("path", READERS)
def test_a_body_with_an_odd_value_in_any_field_is_read_or_refused_by_name(path: str) -> None:
    num_read = 0
    for text in odd_bodies(path):
        with suppress(msgspec.DecodeError):
            body = Fields(msgspec.json.decode(text))
            with suppress(RequestError):
                for request in READERS[path](body, EffortBudgets()):
                    prepare(request, model())
                    num_read += 1

    assert num_read > 100
