from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GatewayMessage(_message.Message):
    __slots__ = ("submit", "cancel", "set_budget")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    SET_BUDGET_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    set_budget: SetBudget
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., set_budget: _Optional[_Union[SetBudget, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("key", "request_id", "prompt_ids", "sampling", "max_tokens", "stop_token_ids", "starts_thinking", "thinking_budget", "close_thinking_ids", "min_tokens", "priority", "grammar", "bad_words", "num_prompt_logprobs", "output_ids", "cache_salt", "trace_parent")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_THINKING_FIELD_NUMBER: _ClassVar[int]
    THINKING_BUDGET_FIELD_NUMBER: _ClassVar[int]
    CLOSE_THINKING_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TRACE_PARENT_FIELD_NUMBER: _ClassVar[int]
    key: int
    request_id: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: RouterSampling
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    starts_thinking: bool
    thinking_budget: int
    close_thinking_ids: _containers.RepeatedScalarFieldContainer[int]
    min_tokens: int
    priority: int
    grammar: Grammar
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    num_prompt_logprobs: int
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_salt: str
    trace_parent: str
    def __init__(self, key: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[RouterSampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., starts_thinking: _Optional[bool] = ..., thinking_budget: _Optional[int] = ..., close_thinking_ids: _Optional[_Iterable[int]] = ..., min_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., bad_words: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., num_prompt_logprobs: _Optional[int] = ..., output_ids: _Optional[_Iterable[int]] = ..., cache_salt: _Optional[str] = ..., trace_parent: _Optional[str] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "text", "after_thinking")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Grammar.Kind]
        KIND_JSON_SCHEMA: _ClassVar[Grammar.Kind]
        KIND_REGEX: _ClassVar[Grammar.Kind]
        KIND_EBNF: _ClassVar[Grammar.Kind]
        KIND_JSON_OBJECT: _ClassVar[Grammar.Kind]
    KIND_UNSPECIFIED: Grammar.Kind
    KIND_JSON_SCHEMA: Grammar.Kind
    KIND_REGEX: Grammar.Kind
    KIND_EBNF: Grammar.Kind
    KIND_JSON_OBJECT: Grammar.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    AFTER_THINKING_FIELD_NUMBER: _ClassVar[int]
    kind: Grammar.Kind
    text: str
    after_thinking: bool
    def __init__(self, kind: _Optional[_Union[Grammar.Kind, str]] = ..., text: _Optional[str] = ..., after_thinking: _Optional[bool] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SetBudget(_message.Message):
    __slots__ = ("key", "thinking_budget")
    KEY_FIELD_NUMBER: _ClassVar[int]
    THINKING_BUDGET_FIELD_NUMBER: _ClassVar[int]
    key: int
    thinking_budget: int
    def __init__(self, key: _Optional[int] = ..., thinking_budget: _Optional[int] = ...) -> None: ...

class RouterSampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "num_logprobs", "logit_bias")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    num_logprobs: int
    logit_bias: _containers.ScalarMap[int, float]
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., num_logprobs: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: int
    def __init__(self, key: _Optional[int] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[SequenceUpdate]
    def __init__(self, updates: _Optional[_Iterable[_Union[SequenceUpdate, _Mapping]]] = ...) -> None: ...

class SequenceUpdate(_message.Message):
    __slots__ = ("key", "admitted", "token_ids", "logprobs", "end", "num_forced", "prompt_logprobs")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NUM_FORCED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    key: int
    admitted: Admitted
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[RouterLogprobs]
    end: End
    num_forced: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[RouterLogprobs]
    def __init__(self, key: _Optional[int] = ..., admitted: _Optional[_Union[Admitted, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[RouterLogprobs, _Mapping]]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., num_forced: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[RouterLogprobs, _Mapping]]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("cached_tokens",)
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    def __init__(self, cached_tokens: _Optional[int] = ...) -> None: ...

class RouterLogprobs(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("reason", "message")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[End.Reason]
        REASON_STOP: _ClassVar[End.Reason]
        REASON_LENGTH: _ClassVar[End.Reason]
        REASON_CANCELLED: _ClassVar[End.Reason]
        REASON_OVERLOADED: _ClassVar[End.Reason]
        REASON_UNAVAILABLE: _ClassVar[End.Reason]
        REASON_INVALID: _ClassVar[End.Reason]
        REASON_ERROR: _ClassVar[End.Reason]
    REASON_UNSPECIFIED: End.Reason
    REASON_STOP: End.Reason
    REASON_LENGTH: End.Reason
    REASON_CANCELLED: End.Reason
    REASON_OVERLOADED: End.Reason
    REASON_UNAVAILABLE: End.Reason
    REASON_INVALID: End.Reason
    REASON_ERROR: End.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: End.Reason
    message: str
    def __init__(self, reason: _Optional[_Union[End.Reason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("model", "ready", "reason", "max_model_len", "tensor_parallel_size", "num_blocks", "num_free_blocks", "block_size", "num_running", "num_waiting", "ranks", "loaded_bytes", "total_bytes", "failed", "num_thinking", "num_answering", "num_steps_total", "num_restarts_total", "num_preempted_total", "prefix_query_tokens_total", "prefix_hit_tokens_total", "data_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size", "redundant_experts", "expert_imbalance", "num_rebalances_total", "heartbeat_age_seconds", "num_replayed_tokens_total", "num_quarantined_total", "metrics_address")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_THINKING_FIELD_NUMBER: _ClassVar[int]
    NUM_ANSWERING_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DATA_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    REDUNDANT_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    NUM_REBALANCES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLAYED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_QUARANTINED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    model: str
    ready: bool
    reason: str
    max_model_len: int
    tensor_parallel_size: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    num_running: int
    num_waiting: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankInfo]
    loaded_bytes: int
    total_bytes: int
    failed: bool
    num_thinking: int
    num_answering: int
    num_steps_total: int
    num_restarts_total: int
    num_preempted_total: int
    prefix_query_tokens_total: int
    prefix_hit_tokens_total: int
    data_parallel_size: int
    expert_parallel_size: int
    expert_tensor_parallel_size: int
    redundant_experts: int
    expert_imbalance: float
    num_rebalances_total: int
    heartbeat_age_seconds: float
    num_replayed_tokens_total: int
    num_quarantined_total: int
    metrics_address: str
    def __init__(self, model: _Optional[str] = ..., ready: _Optional[bool] = ..., reason: _Optional[str] = ..., max_model_len: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankInfo, _Mapping]]] = ..., loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., failed: _Optional[bool] = ..., num_thinking: _Optional[int] = ..., num_answering: _Optional[int] = ..., num_steps_total: _Optional[int] = ..., num_restarts_total: _Optional[int] = ..., num_preempted_total: _Optional[int] = ..., prefix_query_tokens_total: _Optional[int] = ..., prefix_hit_tokens_total: _Optional[int] = ..., data_parallel_size: _Optional[int] = ..., expert_parallel_size: _Optional[int] = ..., expert_tensor_parallel_size: _Optional[int] = ..., redundant_experts: _Optional[int] = ..., expert_imbalance: _Optional[float] = ..., num_rebalances_total: _Optional[int] = ..., heartbeat_age_seconds: _Optional[float] = ..., num_replayed_tokens_total: _Optional[int] = ..., num_quarantined_total: _Optional[int] = ..., metrics_address: _Optional[str] = ...) -> None: ...

class RankInfo(_message.Message):
    __slots__ = ("rank", "host", "pid", "device", "weight_bytes", "kv_bytes", "load_seconds", "group", "num_heads", "num_kv_heads", "num_experts", "kv_tokens")
    RANK_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    host: str
    pid: int
    device: str
    weight_bytes: int
    kv_bytes: int
    load_seconds: float
    group: int
    num_heads: int
    num_kv_heads: int
    num_experts: int
    kv_tokens: int
    def __init__(self, rank: _Optional[int] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., load_seconds: _Optional[float] = ..., group: _Optional[int] = ..., num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., num_experts: _Optional[int] = ..., kv_tokens: _Optional[int] = ...) -> None: ...
