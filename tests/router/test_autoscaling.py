"""How many copies there should be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig, ModelSource, RouterConfig
from cluster.config_file import parse_config
from cluster.errors import ConfigError
from cluster.router.autoscaling import KV_USED, SLOTS_USED, scale_copies, wanted_copies
from cluster.router.deployment import autoscaling_options


@pytest.mark.parametrize(
    ("fullness", "num_copies", "wanted"),
    [
        pytest.param([0.3], 1, 1, id="room"),
        pytest.param([0.9], 1, 2, id="nearly full"),
        pytest.param([4.2], 1, 6, id="a long queue"),
        pytest.param([0.9], 2, 2, id="nearly full, another one loads"),
        pytest.param([0.5, 0.4], 2, 2, id="one would be too full"),
        pytest.param([0.2, 0.2], 2, 1, id="one is enough"),
        pytest.param([0.0, 0.0, 0.0], 3, 1, id="nothing to do"),
        pytest.param([], 2, 2, id="nobody has said anything: all load or recover"),
    ],
)
def test_copies_follow_how_full_they_are(fullness: list[float], num_copies: int, wanted: int) -> None:
    assert wanted_copies(fullness, num_copies) == wanted


@given(st.floats(0, 20), st.integers(1, 20))
def test_a_load_that_stays_the_same_is_decided_upon_once(load: float, num_copies: int) -> None:
    wanted = wanted_copies([load], num_copies)

    assert wanted_copies([load], wanted) == wanted


def test_the_fuller_of_sequences_and_kv_counts_for_each_copy() -> None:
    said = {SLOTS_USED: {"a": 0.1, "b": 0.9}, KV_USED: {"a": 0.95, "b": 0.2}}

    wanted, _ = scale_copies(SimpleNamespace(aggregated_metrics=said, target_num_replicas=2))

    assert wanted == 3


def config(**router: int) -> ClusterConfig:
    return ClusterConfig(model=ModelSource(path="/m", name="m"), router=RouterConfig(**router))


def test_the_number_of_copies_is_fixed_where_no_other_is_allowed() -> None:
    assert autoscaling_options(config(copies=2)) == {"num_replicas": 2}


def test_serve_scales_between_copies_and_max_copies_by_this_policy() -> None:
    scaling = autoscaling_options(config(copies=1, max_copies=4))["autoscaling_config"]

    assert (scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas) == (1, 4, 1)
    assert scaling.policy.policy_function == "cluster.router.autoscaling.scale_copies"
    assert scaling.downscale_delay_s > scaling.upscale_delay_s > 0


def test_fewer_copies_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_copies 1 is below copies 2"):
        parse_config({"model": {"path": "/m", "name": "m"}, "router": {"copies": 2, "max_copies": 1}})
