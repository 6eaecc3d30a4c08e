"""What is fuzzed: inputs from outside, and what must hold for each. The suite takes a few of each, bench/fuzz.py many.

A target's check raises where something does not hold; every other way out of the code is a fault.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
from hypothesis import strategies as st

from cluster.config import ModelSource
from cluster.errors import RequestError
from cluster.gateway.requests import PreparedRequest, prepare
from cluster.gateway.served_model import ServedModel
from cluster.text.answer import AnswerRules
from cluster.text.phases import PhaseSplitter
from cluster.text.pieces import Delta, Piece, ThoughtsClosed, ToolCallArguments, ToolCallStarted
from mull.v1 import admin_pb2, generation_pb2
from tests.fuzzing.messages import TEXTS, messages
from tests.gateway.conftest import POCKET
from workers.errors import CheckpointError
from workers.safetensors_header import read_header

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
METHODS = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)
CALL_TIMEOUT_S = 60.0
VOCABULARY = 1024
CALL_PARTS = (
    *(
        '{"name": "f", "arguments": {}}',
        '{"name": "f"',
        ', "arguments": {"a": [1, "b"]}}',
        '"',
        "\\",
        "{",
        "}",
        "[",
        "\n",
    ),
    *('{"arguments": {"x": "</tool_call>"}, "name": "g"}', '{"name": 1}', "null", " ", '"\\ud83d', "1e999"),
)


@dataclass(frozen=True)
class Target:
    """Random inputs, and what must hold for each."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]


@cache
def model() -> ServedModel:
    return ServedModel.load(ModelSource(path=POCKET, name="pocket"))


# Streams of tokens: phases, tool calls, text


def token_streams() -> st.SearchStrategy[list[int]]:
    """Tags, parts of tool calls, and anything."""
    tokenizer = model().tokenizer
    texts = st.one_of(st.sampled_from(CALL_PARTS), TEXTS).map(tokenizer.encode)
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>")
    tag = st.sampled_from([[tokenizer.token_id(name)] for name in tags if tokenizer.token_id(name) is not None])
    anything = st.lists(st.integers(0, VOCABULARY + 50), max_size=8)
    return st.lists(st.one_of(tag, texts, anything), max_size=12).map(lambda parts: [i for part in parts for i in part])


def split_inputs() -> st.SearchStrategy[tuple[list[int], list[int], bool, AnswerRules]]:
    """Tokens, where they are cut, whether they start in thoughts, and the rules."""
    rules = st.builds(
        AnswerRules,
        stops=st.lists(st.text(min_size=1, max_size=4), max_size=3).map(tuple),
        min_tokens=st.integers(0, 6),
        tool_tags=st.sampled_from([None, model().tool_tags]),
        max_tool_calls=st.sampled_from([None, 1, 2]),
    )
    cuts = st.lists(st.integers(0, 60), max_size=8)
    return st.tuples(token_streams(), cuts, st.booleans(), rules)


def check_split(given: tuple[list[int], list[int], bool, AnswerRules]) -> None:
    """However the tokens come, all texts and calls are the same, and every token is in one piece until the end."""
    ids, cuts, starts_thinking, rules = given
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    chunks = [ids[start:end] for start, end in pairwise(edges)]
    one_by_one, in_chunks = (_split(parts, starts_thinking, rules) for parts in ([[i] for i in ids], chunks))
    assert one_by_one == in_chunks
    for arguments in in_chunks.arguments.values():
        assert len(arguments) < 10 * (len(ids) + 1) * 64


@dataclass
class _Split:
    texts: dict[str, str]
    calls: dict[int, str]
    arguments: dict[int, str]
    is_over: bool


def _split(chunks: Iterable[Sequence[int]], starts_thinking: bool, rules: AnswerRules) -> _Split:
    splitter = PhaseSplitter(
        model().tags, model().tokenizer.detokenizer(), starts_thinking=starts_thinking, rules=rules
    )
    split = _Split({}, {}, {}, False)
    num_sent = num_pieces = 0
    for chunk in chunks:
        if splitter.answer.is_over:
            break
        num_sent += len(chunk)
        num_pieces += _take(split, splitter.push(chunk))
    if splitter.answer.is_over:
        split.is_over = True
        assert num_pieces <= num_sent
        _take(split, [piece for piece in splitter.finish() if isinstance(piece, Delta)])
    else:
        num_pieces += _take(split, splitter.finish())
        assert num_pieces == num_sent
    return split


def _take(split: _Split, pieces: Iterable[Piece]) -> int:
    num_tokens = 0
    for piece in pieces:
        num_tokens += piece.num_tokens
        match piece:
            case Delta(phase, text):
                split.texts[phase.value] = split.texts.get(phase.value, "") + text
            case ToolCallStarted(index, name):
                assert index not in split.calls
                split.calls[index] = name
            case ToolCallArguments(index, text):
                split.arguments[index] = split.arguments.get(index, "") + text
            case ThoughtsClosed():
                pass
    return num_tokens


def check_detokenizer(given: tuple[list[int], list[int]]) -> None:
    """The pieces together are the text of decoding everything at once."""
    ids, cuts = given
    tokenizer = model().tokenizer
    detokenizer = tokenizer.detokenizer()
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    text = "".join(detokenizer.push(ids[start:end]) for start, end in pairwise(edges))
    text += detokenizer.flush()
    whole = b"".join(tokenizer.token_bytes[i] for i in ids).decode("utf-8", "replace")
    assert text == whole == tokenizer.decode(ids)


# Files of a checkpoint


def headers() -> st.SearchStrategy[bytes]:
    """safetensors files: any bytes, and headers that are nearly right."""
    numbers = st.one_of(st.integers(-2, 70), st.integers(-(2**70), 2**70), st.floats(), st.none(), st.text(max_size=2))
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "", 7, None]),
            "shape": st.one_of(st.lists(numbers, max_size=3), numbers),
            "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
        },
    )
    entries = st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", "../x"]), st.one_of(entry, numbers), max_size=3
    )
    headers = st.one_of(entries.map(lambda value: json.dumps(value).encode()), st.binary(max_size=80))
    length = st.one_of(st.none(), st.integers(0, 2**64 - 1))
    return st.tuples(headers, length, st.binary(max_size=64)).map(_file)


def _file(parts: tuple[bytes, int | None, bytes]) -> bytes:
    header, length, data = parts
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def check_header(data: bytes) -> None:
    """It is refused in one line, or what it names lies inside of the file."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        try:
            tensors = read_header(Path(file.name))
        except CheckpointError as error:
            check_words(error)
            return
    for tensor in tensors.values():
        size = tensor.item_bytes
        for dimension in tensor.shape:
            size *= dimension
        assert 0 <= tensor.offset <= tensor.offset + size <= len(data)


def check_words(error: Exception) -> None:
    """An error is one line, and names the field where it is of a request."""
    assert "\n" not in str(error)
    assert not isinstance(error, RequestError) or error.field


# Requests


def check_request(request: generation_pb2.GenerateRequest) -> None:
    """It is refused with the name of a field, or runs within the model's limits."""
    try:
        prepared = prepare(request, model())
    except RequestError as error:
        check_words(error)
        return
    assert isinstance(prepared, PreparedRequest)
    assert 1 <= prepared.max_tokens <= model().max_model_len - len(prepared.prompt_ids)
    assert all(0 <= token < VOCABULARY for token in prepared.prompt_ids)


TARGETS: dict[str, Callable[[], Target]] = {
    "phases-and-tools": lambda: Target(split_inputs(), check_split),
    "detokenizer": lambda: Target(
        st.tuples(token_streams(), st.lists(st.integers(0, 60), max_size=8)), check_detokenizer
    ),
    "checkpoint-headers": lambda: Target(headers(), check_header),
    "requests": lambda: Target(messages(generation_pb2.GenerateRequest.DESCRIPTOR), check_request),
}
"""By name. Made when they are needed: some read the model first."""


# The gRPC port


def grpc_calls() -> st.SearchStrategy[tuple[str, bytes]]:
    """A method, and a message of its own type or bytes that are none."""

    def to_bytes(path: str) -> st.SearchStrategy[tuple[str, bytes]]:
        good = messages(METHODS[path].input_type).map(lambda message: message.SerializeToString())
        return st.tuples(st.just(path), st.one_of(good, good, good, st.binary(max_size=60)))

    # Those that generate have the most to trip over.
    generating = [path for path in METHODS if path.endswith(("/Generate", "/Complete"))]
    return st.one_of(st.sampled_from(sorted(METHODS)), st.sampled_from(generating)).flatmap(to_bytes)


def end_of(channel: grpc.Channel, path: str, message: bytes) -> grpc.StatusCode:
    """How the call ends, all of it read."""
    call: Any = channel.unary_stream(path, None, None)(message, timeout=CALL_TIMEOUT_S)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
