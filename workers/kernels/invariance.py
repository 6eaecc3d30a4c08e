"""Whether a row's bits may depend on the rows beside it; a rank in deterministic mode says that they may not.

Kernels ask where a choice by the number of rows would change bits. Like torch's inference mode, it holds for what this
thread does inside of a `with`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_INVARIANT: ContextVar[bool] = ContextVar("is_invariant", default=False)


def is_invariant() -> bool:
    """Each row is computed as if it were alone."""
    return _IS_INVARIANT.get()


@contextmanager
def invariance(is_wanted: bool) -> Iterator[None]:
    """For all that is computed inside."""
    token = _IS_INVARIANT.set(is_wanted)
    try:
        yield
    finally:
        _IS_INVARIANT.reset(token)
