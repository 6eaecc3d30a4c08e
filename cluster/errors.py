"""Every error that mull raises on purpose, in one tree.

Knows neither gRPC nor HTTP: the gateway maps classes to status codes.

MullError
├── ConfigError              a flag or a config file is wrong: `mull serve` does not start
├── CheckpointError          a model directory that cannot be served: names the file and the remedy
├── GrammarError             a grammar that cannot be used: the gateway tells it as an InvalidRequest
├── LayoutError              a layout that cannot split this model: names the numbers and what can
├── RequestError             the client's fault; `field` names what to change
│   ├── InvalidRequest       a value out of range, an unknown role, a wrong token id
│   ├── PromptTooLong        prompt plus output does not fit the context: both numbers
│   └── UnknownModel         a model name that this server does not serve
├── Unauthenticated          no API key, or none that is known
├── Forbidden                the API key is for something else
├── Overloaded               a bounded queue is full: try again later
│   └── LimitReached         a tenant has used what it may: says when there is more
├── NotReady                 the engine is starting, draining or lost
├── DeadlinePassed           the request's own time limit came first
├── SlowReader               the client did not read its stream; its buffer's bound was passed
└── EngineError              a fault of ours
    └── RankLost             a rank died, hung or failed: names the rank
"""

from __future__ import annotations

from enum import Enum

from workers.errors import CheckpointError, GrammarError, KVMemoryError, LayoutError, MullError, PlanError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeadlinePassed",
    "EngineError",
    "Forbidden",
    "GrammarError",
    "InvalidRequest",
    "KVMemoryError",
    "LayoutError",
    "LimitReached",
    "MullError",
    "NotReady",
    "Overloaded",
    "PlanError",
    "PromptTooLong",
    "RankLost",
    "RequestError",
    "SlowReader",
    "Unauthenticated",
    "UnknownModel",
]


class ConfigError(MullError):
    """A flag or a config file is wrong."""


class RequestError(MullError):
    """The client must change the request. `field` is the path of the field in `GenerateRequest`."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class InvalidRequest(RequestError):
    """A value is out of range or malformed."""


class PromptTooLong(RequestError):
    """The prompt does not fit the context."""


class UnknownModel(RequestError):
    """No such model here."""


class Unauthenticated(MullError):
    """Nobody knows who asks."""


class Forbidden(MullError):
    """Who asks may not do that."""


class Overloaded(MullError):
    """A bounded queue is full."""


class LimitReached(Overloaded):
    """A tenant has used what it may. `limit` is which of its limits it was."""

    def __init__(self, message: str, *, limit: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after_s = retry_after_s


class NotReady(MullError):
    """The engine cannot take work now."""


class DeadlinePassed(MullError):
    """A request took longer than it may."""


class SlowReader(MullError):
    """A client fell too far behind its own stream."""


class EngineError(MullError):
    """A fault inside mull."""


class RankLossCause(Enum):
    """How a rank is lost."""

    EXITED = "exited"
    LATE = "late"
    SILENT = "silent"
    FAILED = "failed"


class RankLost(EngineError):
    """A rank died, hung or failed."""

    def __init__(
        self, message: str, *, rank: int, was_killed: bool = False, cause: RankLossCause = RankLossCause.FAILED
    ) -> None:
        """`was_killed`: from outside, as far as one can see, so that nothing it computed is to blame."""
        super().__init__(message)
        self.rank = rank
        self.was_killed = was_killed
        self.cause = cause
