"""A Router does not listen in plain text where other machines can hear it, unless it was asked to."""

from __future__ import annotations

import pytest

from cluster.config import SecurityConfig
from cluster.errors import ConfigError
from cluster.router.deployment import link_credentials


@pytest.mark.parametrize(
    ("security", "host"), [(SecurityConfig(), "127.0.0.1"), (SecurityConfig(insecure=True), "10.0.0.7")]
)
def test_plain_text_is_for_this_machine_or_asked_for(security: SecurityConfig, host: str) -> None:
    assert link_credentials(security, host) is None


def test_plain_text_to_other_machines_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"10\.0\.0\.7 in plain text; give security\.link_cert"):
        link_credentials(SecurityConfig(), "10.0.0.7")
