"""How a client's connection behaves, and what it shows of itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import grpc

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A server that vanished without closing is noticed although thoughts can leave a stream silent.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Prompts of a million tokens, and as many token ids back.
    ("grpc.max_receive_message_length", 64 * 2**20),
)


def tls_credentials(
    ca: str | os.PathLike[str] | None = None,
    cert: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
) -> grpc.ChannelCredentials:
    """For `credentials`, from PEM files: who signed the server's certificate (None: the public authorities).

    `cert` and `key` are the client's own, for a server that asks for them. Raises OSError.
    """
    read = [None if file is None else Path(file).read_bytes() for file in (ca, key, cert)]
    return grpc.ssl_channel_credentials(*read)


def with_key(stub: Any, methods: Iterable[str], api_key: str | None) -> Any:
    """The stub, its methods sending the key with every call."""
    if api_key is not None:
        metadata = (("authorization", f"Bearer {api_key}"),)
        for name in methods:
            setattr(stub, name, partial(getattr(stub, name), metadata=metadata))
    return stub


def key_from_environment(api_key: str | None) -> str | None:
    """The key, or MULL_API_KEY's value where there is none."""
    return api_key or os.environ.get("MULL_API_KEY") or None
