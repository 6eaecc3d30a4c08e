"""Events → one message: what Complete returns, and what a client has once a stream has ended.

Pure. A tool call that was passed on as text in the end is in the answer alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from google.protobuf.message import Message

from mull.v1 import generation_pb2 as pb


class CompletionBuilder:
    """Gathers the events of all generations of one request."""

    def __init__(self) -> None:
        self._response = pb.CompleteResponse()
        self._completions: dict[int, pb.Completion] = {}

    def add(self, events: Iterable[pb.GenerateEvent]) -> None:
        """Take events, each generation's in order."""
        for event in events:
            completion = self._completions.setdefault(event.choice, pb.Completion(choice=event.choice))
            name = event.WhichOneof("event")
            if name is None:
                continue  # a kind of event that this client is too old for
            body = getattr(event, name)
            if not isinstance(body, pb.Started):
                completion.token_ids.extend(body.token_ids)
                completion.logprobs.extend(body.logprobs)
            self._add(completion, body)

    def response(self) -> pb.CompleteResponse:
        """The whole, once every generation has finished."""
        for _, completion in sorted(self._completions.items()):
            whole = [call for call in completion.tool_calls if is_whole(call.arguments_json)]
            del completion.tool_calls[:]
            completion.tool_calls.extend(whole)
            self._response.completions.append(completion)
        return self._response

    def _add(self, completion: pb.Completion, body: Message) -> None:
        match body:
            case pb.Started():
                self._response.request_id, self._response.model = body.request_id, body.model
                completion.seed = body.seed
            case pb.ThinkingDelta():
                completion.thinking += body.text
            case pb.ThinkingEnded():
                completion.thinking_ended = body.reason
            case pb.AnswerDelta():
                completion.answer += body.text
            case pb.ToolCallStart():
                completion.tool_calls.add(id=body.id, name=body.name)
            case pb.ToolCallArgumentsDelta():
                completion.tool_calls[body.index].arguments_json += body.arguments_json
            case pb.Finished():
                completion.finished.CopyFrom(body)


def is_whole(arguments_json: str) -> bool:
    """Whether a call's arguments are a JSON object; they are not where the call was passed on as text."""
    try:
        return isinstance(json.loads(arguments_json), dict)
    except (ValueError, RecursionError):
        return False
