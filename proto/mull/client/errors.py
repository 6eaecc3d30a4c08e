"""What a failed call raises."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc


class CallFailed(Exception):
    """The server refused a call or ended it, or no server answers.

    `code` is gRPC's status: INVALID_ARGUMENT (change the request, the message names the field), RESOURCE_EXHAUSTED and
    UNAVAILABLE (try again later), DEADLINE_EXCEEDED, INTERNAL (report it with `request_id`).
    """

    def __init__(self, code: grpc.StatusCode, message: str, request_id: str | None = None) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.request_id = request_id

    @classmethod
    def of(cls, error: grpc.RpcError) -> CallFailed:
        """The same as an error of gRPC, sync or asyncio."""
        metadata: Iterable[Any] = error.trailing_metadata() or ()
        ids = [str(value) for key, value in metadata if key == "mull-request-id"]
        return cls(error.code(), error.details() or "", ids[0] if ids else None)
