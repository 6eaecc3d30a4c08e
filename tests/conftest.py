"""For all tests: which files come first, and no property test asserts how long an example takes."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("mull", deadline=None)
settings.load_profile("mull")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that may take long come first, so that the processes of a parallel run end together."""
    items.sort(key=_longest_s, reverse=True)


def _longest_s(item: pytest.Item) -> float:
    """The timeout that its whole file has; 0 where it has none of its own."""
    module = item.getparent(pytest.Module)
    marker = module.get_closest_marker("timeout") if module is not None else None
    return 0.0 if marker is None else float(marker.args[0])
