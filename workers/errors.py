"""Errors of the data plane; `cluster.errors` shows the whole tree."""

from __future__ import annotations


class MullError(Exception):
    """Base of every error that mull raises on purpose. Its text is one line: the numbers and the remedy."""


class CheckpointError(MullError):
    """A model directory that cannot be served; the message names the file and the remedy."""


class LayoutError(MullError):
    """A layout that cannot split this model; the message names both numbers and a layout that can."""


class PlanError(MullError):
    """A step plan that breaks the contract of `workers.step`; the message names the slot and what is wrong with it."""


class KVMemoryError(MullError):
    """The KV pool is too small for a single sequence; the message names both sizes."""


class PeerLate(MullError):
    """A rank of the same group was not heard of in time; the message names its place and the time."""


class GrammarError(MullError):
    """A grammar that cannot be used; the message says what is wrong with it."""


class KernelError(MullError):
    """The compiled kernels are not those of this version."""


class GraphError(MullError):
    """A step that cannot be recorded on this device; the message says how to start without."""
