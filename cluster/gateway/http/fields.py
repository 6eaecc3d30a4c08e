"""A JSON object of a request, read field by field.

Unknown fields are never looked at, as OpenAI's own servers do; null is the same as absent. A wrong type is an
InvalidRequest that names the field. Knows nothing of what the fields mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.errors import InvalidRequest

MAX_UINT32 = 2**32 - 1
MAX_INT64 = 2**63 - 1


class Fields:
    """One object, and where in the request it lies."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self._where = where

    def path(self, name: str) -> str:
        """The name of a field as error messages have it, such as `messages[0].role`."""
        return f"{self._where}.{name}" if self._where else name

    def has(self, name: str) -> bool:
        """Whether the field is there and is not null."""
        return self.values.get(name) is not None

    def wrong(self, name: str, expected: str) -> InvalidRequest:
        """The error of a field whose value is not what it should be."""
        path = self.path(name)
        return InvalidRequest(f"{path}: is {_kind(self.values.get(name))}; send {expected}", field=path)

    def refused(self, name: str, reason: str) -> InvalidRequest:
        """The error of a field whose value cannot be served."""
        path = self.path(name)
        return InvalidRequest(f"{path}: {reason}", field=path)

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if not value:
            raise self.wrong(name, "a string that is not empty")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not _is_number(value):
            raise self.wrong(name, "a number")
        try:
            return float(value)
        except OverflowError as error:
            raise self.refused(name, "is a number without end; send a smaller one") from error

    def integer(self, name: str, lowest: int = -(2**31), highest: int = 2**31 - 1) -> int | None:
        value = self.values.get(name)
        return None if value is None else self._integer(name, value, lowest, highest)

    def count(self, name: str) -> int | None:
        """An integer from 0 to 2**32 - 1."""
        return self.integer(name, 0, MAX_UINT32)

    def integers(self, name: str) -> list[int]:
        """A list of integers from 0 to 2**32 - 1; empty where it is absent."""
        return [self._integer(f"{name}[{i}]", value, 0, MAX_UINT32) for i, value in enumerate(self.list(name))]

    def texts(self, name: str) -> list[str]:
        """A list of strings, or a single one; empty where it is absent."""
        value = self.values.get(name)
        if isinstance(value, str):
            return [value]
        texts = self.list(name)
        if not all(isinstance(text, str) for text in texts):
            raise self.wrong(name, "a string or a list of strings")
        return texts

    def list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value or []

    def object(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, self.path(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of a list; none where it is absent."""
        for index, value in enumerate(self.list(name)):
            path = self.path(f"{name}[{index}]")
            if not isinstance(value, dict):
                raise InvalidRequest(f"{path}: is {_kind(value)}; send an object", field=path)
            yield Fields(value, path)

    def _integer(self, name: str, value: Any, lowest: int, highest: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        path = self.path(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{path}: is {_kind(value)}; send an integer", field=path)
        if not lowest <= value <= highest:
            raise InvalidRequest(f"{path}: {value} is outside of [{lowest}, {highest}]", field=path)
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "absent"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")
