"""A Python client of mull: `Client`, and `AsyncClient` with the same calls.

    from mull.client import Client
    reply = Client("127.0.0.1:50051").chat("What is 347 + 285?")
    print(reply.thinking, reply.answer)

Needs grpcio and protobuf, nothing else of mull. docs/client.md describes it.
"""

from __future__ import annotations

from mull.client.aio import AsyncClient, AsyncReply
from mull.client.channels import tls_credentials
from mull.client.errors import CallFailed
from mull.client.events import (
    AnswerDelta,
    Event,
    Finished,
    Logprobs,
    Started,
    ThinkingDelta,
    ThinkingEnded,
    ToolCallArgumentsDelta,
    ToolCallStart,
    Usage,
)
from mull.client.options import Message, Options, Tool
from mull.client.results import Choice, Result, ToolCall
from mull.client.retries import RetryPolicy
from mull.client.sync import Client, Reply

__all__ = [
    "AnswerDelta",
    "AsyncClient",
    "AsyncReply",
    "CallFailed",
    "Choice",
    "Client",
    "Event",
    "Finished",
    "Logprobs",
    "Message",
    "Options",
    "Reply",
    "Result",
    "RetryPolicy",
    "Started",
    "ThinkingDelta",
    "ThinkingEnded",
    "Tool",
    "ToolCall",
    "ToolCallArgumentsDelta",
    "ToolCallStart",
    "Usage",
    "tls_credentials",
]
