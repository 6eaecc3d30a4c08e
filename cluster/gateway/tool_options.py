"""What the model is shown of tools and must do with them: tools, tool_choice, parallel_tool_calls, raw_tool_calls.

Hop 2, pure. Raises InvalidRequest, also for fields that contradict each other. Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from mull.v1 import generation_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What a request wants of its tools."""

    shown: tuple[pb.Tool, ...]
    """Tools that the model is told of."""
    required: tuple[pb.Tool, ...]
    """It must call one of these; empty: it may answer without."""
    max_calls: int | None
    """None: as many as it likes."""
    is_parsed: bool
    """Calls become events; else their markup is text."""


def read_tool_use(request: pb.GenerateRequest) -> ToolUse:
    """The request's tools and what they are for."""
    tools = tuple(request.conversation.tools)
    _check_names(tools)
    _check_contradictions(request, tools)
    is_single = request.HasField("parallel_tool_calls") and not request.parallel_tool_calls
    required = _required(request, tools)
    shown = () if _is_none(request) else tools
    return ToolUse(
        shown=shown,
        required=required,
        max_calls=1 if is_single else None,
        is_parsed=bool(shown) and not request.raw_tool_calls,
    )


def _is_none(request: pb.GenerateRequest) -> bool:
    choice = request.tool_choice
    return choice.WhichOneof("choice") == "mode" and choice.mode == pb.ToolChoice.MODE_NONE


def _required(request: pb.GenerateRequest, tools: tuple[pb.Tool, ...]) -> tuple[pb.Tool, ...]:
    if not request.HasField("tool_choice"):
        return ()
    choice = request.tool_choice
    match choice.WhichOneof("choice"):
        case "tool_name":
            named = tuple(tool for tool in tools if tool.name == choice.tool_name)
            if not named:
                offered = ", ".join(tool.name for tool in tools)
                raise InvalidRequest(
                    f"tool_choice.tool_name: {choice.tool_name!r} is not among the tools; send one of {offered}",
                    field="tool_choice.tool_name",
                )
            return named
        case "mode" if choice.mode in (pb.ToolChoice.MODE_AUTO, pb.ToolChoice.MODE_NONE):
            return ()
        case "mode" if choice.mode == pb.ToolChoice.MODE_REQUIRED:
            return tools
        case "mode":
            raise InvalidRequest(
                f"tool_choice.mode: {choice.mode} is unknown; send AUTO, NONE or REQUIRED", field="tool_choice.mode"
            )
        case _:
            raise InvalidRequest("tool_choice: empty; send a mode or a tool_name", field="tool_choice")


def _check_names(tools: Sequence[pb.Tool]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        field = f"conversation.tools[{index}].name"
        if not tool.name:
            raise InvalidRequest(f"{field}: empty; name the tool", field=field)
        if tool.name in seen:
            raise InvalidRequest(f"{field}: {tool.name!r} is there twice; give each tool its own name", field=field)
        seen.add(tool.name)


def _check_contradictions(request: pb.GenerateRequest, tools: Sequence[pb.Tool]) -> None:
    for field in ("tool_choice", "parallel_tool_calls"):
        if request.HasField(field) and not tools:
            raise InvalidRequest(f"{field}: there are no tools; send conversation.tools, or leave it out", field=field)
    is_single = request.HasField("parallel_tool_calls") and not request.parallel_tool_calls
    if is_single and request.raw_tool_calls:
        raise InvalidRequest(
            "parallel_tool_calls: with raw_tool_calls calls are not told apart; leave one of them out",
            field="parallel_tool_calls",
        )
