"""How a client's connection behaves."""

from __future__ import annotations

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A server that vanished without closing is noticed although thoughts can leave a stream silent.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Prompts of a million tokens, and as many token ids back.
    ("grpc.max_receive_message_length", 64 * 2**20),
)
