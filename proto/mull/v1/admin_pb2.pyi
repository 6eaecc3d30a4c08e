from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SetThinkingBudgetRequest(_message.Message):
    __slots__ = ("request_id", "all", "tenant", "thinking_budget")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    THINKING_BUDGET_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    all: AllRequests
    tenant: str
    thinking_budget: int
    def __init__(self, request_id: _Optional[str] = ..., all: _Optional[_Union[AllRequests, _Mapping]] = ..., tenant: _Optional[str] = ..., thinking_budget: _Optional[int] = ...) -> None: ...

class AllRequests(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetThinkingBudgetResponse(_message.Message):
    __slots__ = ("num_lowered",)
    NUM_LOWERED_FIELD_NUMBER: _ClassVar[int]
    num_lowered: int
    def __init__(self, num_lowered: _Optional[int] = ...) -> None: ...
