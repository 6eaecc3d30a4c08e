"""Where a server is, and how the commands of `mull` get in."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from mull.client import Client, RetryPolicy


@dataclass(frozen=True)
class ServerAddress:
    """A gateway's gRPC port."""

    address: str
    credentials: grpc.ChannelCredentials | None = None
    api_key: str | None = None

    def client(self, *, retry: RetryPolicy, timeout_s: float | None = None) -> Client:
        return Client(
            self.address, credentials=self.credentials, api_key=self.api_key, retry=retry, timeout_s=timeout_s
        )
