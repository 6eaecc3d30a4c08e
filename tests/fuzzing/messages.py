"""Random messages of any type, built from its descriptor: every field may be absent, extreme or nested."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

MAX_DEPTH = 4
WORDS = (
    *("", "pocket", "user", "assistant", "system", "tool", "\x00", "\n\n", "x" * 300, "What is 2+2?", "<|im_end|>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "é\u0301 \U0001f469"),
    *("{}", '{"a": 1}', '{"type": "object", "properties": {"a": {"type": "integer"}}}', "[[[["),
    *("start: /a+/", "root ::= [a-z]", "(a|b)*c"),
)
TEXTS = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=40), st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
)
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Messages of one type."""
    made = GetMessageClass(descriptor)
    fields = {field.name: _values(field, depth) for field in descriptor.fields if _fits(field, depth)}
    oneofs = [[field.name for field in oneof.fields] for oneof in descriptor.oneofs]

    def build(values: dict[str, Any]) -> Message:
        for names in oneofs:
            for name in [name for name in names if name in values][1:]:
                del values[name]
        return made(**values)

    return st.fixed_dictionaries({}, optional=fields).map(build)


def _fits(field: FieldDescriptor, depth: int) -> bool:
    return field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE or depth < MAX_DEPTH


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        keys, values = (_single(message.fields_by_name[name], depth + 1) for name in ("key", "value"))
        return st.dictionaries(keys, values, max_size=4)
    single = _single(field, depth)
    return st.lists(single, max_size=4) if field.is_repeated else single


def _single(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in _INTEGERS:
        lowest, highest = _INTEGERS[kind]
        small = st.integers(max(lowest, -2), 30)
        return st.one_of(small, st.sampled_from([lowest, highest]), st.integers(lowest, highest))
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return st.integers(-1, max(value.number for value in field.enum_type.values) + 1)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_FLOAT:
        return st.one_of(st.floats(width=32), st.floats(0, 2, width=32))
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return st.one_of(st.floats(), st.floats(0.5, 5))
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type, depth + 1)
    assert kind == FieldDescriptor.CPPTYPE_STRING, f"no strategy for {field.full_name}"
    return TEXTS
