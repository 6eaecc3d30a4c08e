"""A short run of each fuzzing target; bench/fuzz.py runs them for as long as one likes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzzing.targets import TARGETS

NUM_EXAMPLES = 200


@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs_break_nothing(name: str) -> None:
    target = TARGETS[name]()

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(value=target.inputs)
    def shoot(value: object) -> None:
        target.check(value)

    shoot()
