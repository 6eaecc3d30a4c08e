"""What a client has of a stream, so that it can ask for the rest. Pure."""

from __future__ import annotations

from mull.v1 import generation_pb2 as pb

SHORTEST_TIMEOUT_S = 0.001


class HeldStream:
    """The events of all generations of one request, as far as they came."""

    def __init__(self) -> None:
        self._choices: dict[int, pb.ResumedChoice] = {}
        self._request_id = ""
        self._seed: int | None = None

    @property
    def has_begun(self) -> bool:
        """Whether any event has come."""
        return bool(self._choices)

    def add(self, event: pb.GenerateEvent) -> None:
        """Take the next event."""
        held = self._choices.setdefault(event.choice, pb.ResumedChoice(choice=event.choice))
        held.next_sequence = event.sequence + 1
        name = event.WhichOneof("event")
        if name is None:
            return  # a kind of event that this client is too old for
        body = getattr(event, name)
        if name == "started":
            self._request_id, self._seed = body.request_id, body.seed - event.choice
            return
        held.token_ids.extend(body.token_ids)
        text = body.arguments_json if name == "tool_call_arguments_delta" else getattr(body, "text", "")
        held.text_bytes += len(text.encode())
        held.thinking_ended |= name == "thinking_ended"
        held.finished |= name == "finished"

    def rest_of(self, request: pb.GenerateRequest, elapsed_s: float) -> pb.GenerateRequest:
        """The request for what is missing, so long after the first one; the same where nothing has come."""
        if not self.has_begun:
            return request
        rest = pb.GenerateRequest()
        rest.CopyFrom(request)
        rest.request_id = self._request_id
        if self._seed is not None:
            rest.sampling.seed = self._seed
        if rest.HasField("timeout_seconds"):
            rest.timeout_seconds = max(SHORTEST_TIMEOUT_S, rest.timeout_seconds - elapsed_s)
        rest.resume.CopyFrom(pb.Resume(choices=self._choices.values()))
        return rest
