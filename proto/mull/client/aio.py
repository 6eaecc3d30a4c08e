"""AsyncClient: every call of mull, for asyncio. proto/generate_sync_client.py makes sync.py of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message

from mull.client.channels import CHANNEL_OPTIONS, key_from_environment, with_key
from mull.client.completion import CompletionBuilder
from mull.client.events import Event, to_event
from mull.client.held import HeldStream
from mull.client.options import Messages, Options, Tool, chat_request, conversation, prompt_request
from mull.client.results import ReadsFirstChoice, Result, to_result
from mull.client.retries import Retries, RetryPolicy
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub

METHODS = tuple(method.name for method in pb.DESCRIPTOR.services_by_name["GenerationService"].methods)


class AsyncReply(ReadsFirstChoice):
    """One request under way: its events by iterating, and all of it in the end.

    A stream that is cut, because its server or the connection is gone, goes on where it was, on any server at the
    address. Nothing is sent before the first event is asked for. Leaving it (`async with`, or
    `aclose`) cancels what has not finished.
    """

    def __init__(self, call: Callable[..., Any], request: pb.GenerateRequest, retries: Retries) -> None:
        self._open = call
        self._request = request
        self._retries = retries
        self._builder = CompletionBuilder()
        self._held = HeldStream()
        self._events: Any = self._read()
        self._call: Any = None
        self._whole: Result | None = None

    def __aiter__(self) -> AsyncIterator[Event]:
        events: AsyncIterator[Event] = self._events
        return events

    # async only
    def __await__(self) -> Generator[Any, None, Result]:
        return self.result().__await__()

    # end
    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def result(self) -> Result:
        """All of it, once it has finished. Raises CallFailed."""
        async for _ in self._events:
            pass
        return self._finished()

    async def aclose(self) -> None:
        """Cancel what has not finished."""
        await self._events.aclose()

    def _result(self) -> Result:
        # sync: return self.result()
        # async only
        return self._finished()
        # end

    def _finished(self) -> Result:
        if self._whole is None:
            raise RuntimeError("the reply has not finished: it was closed, or its events were not read to the end")
        return self._whole

    async def _read(self) -> Any:
        """The events, from the first attempt that has one on."""
        try:
            async for message in self._messages():
                self._builder.add([message])
                event = to_event(message)
                if event is not None:
                    yield event
            self._whole = to_result(self._builder.response())
        finally:
            if self._call is not None:
                self._call.cancel()

    async def _messages(self) -> Any:
        """All messages, over as many calls as it takes: each goes on where the one before was cut."""
        while True:
            request = self._held.rest_of(self._request, self._retries.elapsed_s)
            self._call = self._open(request, timeout=self._retries.timeout_s)
            try:
                async for message in self._call:
                    self._held.add(message)
                    self._retries.progressed()
                    yield message
                return
            except grpc.RpcError as error:
                pause_s = self._retries.pause_after(error)
            await asyncio.sleep(pause_s)


class AsyncClient:
    """The calls of one server. Safe to use from several tasks; close it, or use it in `async with`.

    `timeout_s` bounds a call and its retries together, in seconds. Every call raises CallFailed.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
        retry: RetryPolicy | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """`credentials` (see `tls_credentials`) make it a TLS connection; `api_key` is by default MULL_API_KEY's value.

        `timeout_s` is what calls have that do not say.
        """
        if credentials is None:
            self._channel: Any = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        self._stub: Any = with_key(GenerationServiceStub(self._channel), METHODS, key_from_environment(api_key))
        self._policy = retry or RetryPolicy()
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._channel.close()

    def chat(
        self,
        messages: Messages,
        *,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncReply:
        """Ask a question, or go on with a conversation."""
        return self.stream(chat_request(messages, system, tools, options), timeout_s=timeout_s)

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Unpack[Options]
    ) -> AsyncReply:
        """Go on with a text or with token ids, without the chat template."""
        return self.stream(prompt_request(prompt, options), timeout_s=timeout_s)

    def stream(self, request: pb.GenerateRequest, *, timeout_s: float | None = None) -> AsyncReply:
        """A request as the protocol has it."""
        return AsyncReply(self._stub.Generate, request, self._retries(timeout_s))

    async def complete(
        self,
        messages: Messages,
        *,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """As `chat`, in one message when all is done."""
        request = chat_request(messages, system, tools, options)
        return to_result(await self._call(self._stub.Complete, request, timeout_s))

    async def tokenize(
        self, text: Messages, *, system: str | None = None, tools: Sequence[Tool] = (), templated: bool = False
    ) -> list[int]:
        """Token ids of a text as it is, or, `templated`, of a conversation as `chat` would send it."""
        request = pb.TokenizeRequest()
        if isinstance(text, str) and not templated:
            request.text = text
        else:
            request.conversation.CopyFrom(conversation(text, system, tools))
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        return str((await self._call(self._stub.Detokenize, request)).text)

    async def models(self) -> list[pb.Model]:
        """The models that the server has."""
        return list((await self._call(self._stub.ListModels, pb.ListModelsRequest())).models)

    async def server_info(self) -> pb.GetServerInfoResponse:
        """Version, readiness, layout and load."""
        info: pb.GetServerInfoResponse = await self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest())
        return info

    def _retries(self, timeout_s: float | None) -> Retries:
        return Retries(self._policy, self._timeout_s if timeout_s is None else timeout_s)

    async def _call(self, method: Callable[..., Any], request: Message, timeout_s: float | None = None) -> Any:
        retries = self._retries(timeout_s)
        while True:
            try:
                return await method(request, timeout=retries.timeout_s)
            except grpc.RpcError as error:
                pause_s = retries.pause_after(error)
            await asyncio.sleep(pause_s)
