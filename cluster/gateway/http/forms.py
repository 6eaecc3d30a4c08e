"""Form: how one route writes events, as one JSON document or as server-sent events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from cluster.gateway.http.collected import Collector
from cluster.gateway.http.parts import Json
from mull.v1 import generation_pb2 as pb

DONE = b"data: [DONE]\n\n"


class Form(Protocol):
    """One answer's writer; it is told everything in order and keeps what it needs."""

    def document(self, collected: Collector) -> Json:
        """The answer in one piece."""
        ...

    def begin(self) -> bytes:
        """The first bytes of a stream, before any event."""
        ...

    def write(self, events: Sequence[pb.GenerateEvent]) -> bytes:
        """These events; may be empty."""
        ...

    def end(self) -> bytes:
        """The last bytes of a stream that ended well."""
        ...

    def fail(self, error: Json) -> bytes:
        """The last bytes of a stream that an error ended; `error` is the document that a plain answer would be."""
        ...


def data(document: Json) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def named(kind: str, document: Json) -> bytes:
    """One server-sent event with a name."""
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(document) + b"\n\n"
