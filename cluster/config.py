"""ClusterConfig and its parts: frozen, validated once, the same for flags, YAML and Helm."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from workers.layout import ParallelLayout
from workers.logs import LogFormat

OTLP_ENDPOINT = r"^https?://[^/\s@]+:\d+$"
THINKING_CLOSE_PHRASE = "\n\nMy time to think is up, so I answer now with what I have found."


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSource(_Part):
    """Where the checkpoint lies and the name that clients ask for."""

    path: Path
    name: str


class EngineConfig(_Part):
    """One copy of the model: its ranks and what a step may hold."""

    tp: int = Field(1, ge=1)
    """Ranks of an attention group: they split heads, dense layers and the vocabulary."""
    dp: int = Field(1, ge=1)
    """Attention groups, each with its own sequences and KV."""
    expert_tp: int = Field(1, ge=1)
    """Ranks that split each expert; the experts are spread over tp * dp / expert_tp places."""
    redundant_experts: int = Field(0, ge=0)
    """Room in every layer for replicas of hot experts, over all ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    products: Literal["fp32", "bf16"] = "fp32"
    """What a CPU multiplies: fp32, or rows rounded to bf16, which takes half the time where it has avx512_bf16."""
    threads_per_rank: int | None = Field(None, ge=1)
    """CPU threads of a rank; None shares the machine's cores among its ranks."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt plus output, in tokens; None takes the checkpoint's."""
    max_num_seqs: int = Field(64, ge=1)
    """Slots of an attention group: sequences that run at once."""
    max_num_batched_tokens: int = Field(512, ge=1)
    """The token budget of one step of an attention group; at least `max_num_seqs`."""
    max_prefill_slowdown: float | None = Field(2.5, gt=1)
    """How many times longer prompts may make a step for those who stream; None: as long as the token budget allows."""
    block_size: int = Field(32, ge=1)
    """Tokens per KV block."""
    num_speculative_tokens: int = Field(5, ge=0)
    """Drafted of a sequence in one step at most, where that pays; 0: no speculative decoding."""
    kv_memory_bytes: int | None = Field(None, ge=1)
    """KV pool of one rank; None sizes it from free memory on a GPU and takes 256 MiB on a CPU."""
    enable_prefix_cache: bool = True
    halved_from: int | None = Field(None, ge=0)
    """Tokens of an attention group from which on, with dp above 1, a step is computed as two halves: one computes while
    the other's tokens travel to their experts. 0: none is; None: from 1,024 on a GPU, and none on a CPU."""
    symmetric_memory: bool = True
    """GPUs of one host may do small sums by reading each other's memory; false: through NCCL alone."""
    kv_dtype: Literal["auto", "bf16", "fp8"] = "auto"
    """How keys and values are kept: as computed, which is fp32 on a CPU and bf16 on a GPU, or rounded to half of those
    bytes: to bf16 on a CPU, to e4m3 (fp8) on a GPU."""
    graphs: Literal["auto", "whole", "piecewise", "off"] = "auto"
    """Decode steps recorded as CUDA graphs: collectives in them, between them, or none; auto chooses by the layout."""
    deterministic: bool = False
    """The same request gives the same bits at any load; slower. Experts then stay where they are."""
    host_kv_bytes: int = Field(0, ge=0)
    """Host memory of one rank for KV whose blocks are needed for others, of preempted sequences and of cached
    prompts; it is brought back where that is quicker than to compute it again. 0: none."""

    @property
    def layout(self) -> ParallelLayout:
        """The ranks of a copy."""
        return ParallelLayout(tp=self.tp, dp=self.dp, expert_tp=self.expert_tp)

    @model_validator(mode="after")
    def _experts_are_split_by_whole_groups(self) -> Self:
        world = self.tp * self.dp
        if world % self.expert_tp:
            fits = [size for size in range(1, world + 1) if world % size == 0]
            raise ValueError(
                f"expert_tp {self.expert_tp} does not divide tp {self.tp} * dp {self.dp} = {world} ranks; "
                f"use one of {', '.join(map(str, fits))}"
            )
        return self

    @model_validator(mode="after")
    def _device_has_the_kernels(self) -> Self:
        if self.kv_dtype == "fp8" and self.device == "cpu":
            raise ValueError("kv_dtype fp8 needs a GPU, and device is cpu; leave kv_dtype out")
        if self.products == "bf16" and self.device == "cuda":
            raise ValueError("products are a CPU's, and device is cuda; leave products out")
        if self.graphs == "whole" and self.dp > 1 and self.device != "cpu":
            raise ValueError(
                f"graphs whole needs dp 1, and dp is {self.dp}: attention groups do not all record at once; "
                "use piecewise or auto"
            )
        return self

    @model_validator(mode="after")
    def _experts_of_a_deterministic_copy_have_one_place(self) -> Self:
        if self.deterministic and self.redundant_experts:
            raise ValueError(
                f"deterministic allows no redundant_experts, and there are {self.redundant_experts}: which replica "
                "computes a token depends on the others; use 0"
            )
        return self

    @model_validator(mode="after")
    def _host_keeps_what_is_cached(self) -> Self:
        if self.host_kv_bytes and not self.enable_prefix_cache:
            raise ValueError(
                "host_kv_bytes needs enable_prefix_cache, which names what is kept; set it or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _all_can_decode_at_once(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}; "
                "raise the one or lower the other"
            )
        return self


class RouterConfig(_Part):
    """The Router's bounds on queues and waits."""

    max_waiting: int = Field(256, ge=0)
    """Requests of a copy beyond its slots; one more is refused with RESOURCE_EXHAUSTED."""
    start_timeout_s: float = Field(600.0, gt=0)
    step_timeout_s: float = Field(60.0, gt=0)
    """A step that takes longer names the late rank, which then counts as lost."""
    copies: int = Field(1, ge=1)
    """Routers, each with a whole model on ranks of its own; where `max_copies` allows more, at least so many."""
    max_copies: int | None = Field(None, ge=1)
    """Copies at most: more are started while those that run are full, and stopped again; None: just `copies`."""
    upscale_delay_s: float = Field(30.0, gt=0)
    """How long copies must be too full before another one is started."""
    downscale_delay_s: float = Field(600.0, gt=0)
    """How long they must have room before one is stopped."""
    metrics_port: int = Field(9465, ge=0, le=65535)
    """Of the first Router on a node; each further one takes the next that is free, of as many as there are copies."""
    drain_s: float = Field(30.0, ge=0)
    """How long running requests may go on at a Router that must go; they then move to another copy."""
    ray_address: str | None = None
    """host:port of a Ray cluster to run in, on all its nodes; None starts one on this machine alone."""
    rebalance_interval_steps: int = Field(1000, ge=0)
    """Steps between two looks at the experts' loads; 0: experts stay where they are."""
    rebalance_threshold: float = Field(1.2, ge=1)
    """Largest over mean load of ranks from which on experts are moved."""

    @property
    def most_copies(self) -> int:
        """As many as there may be at once."""
        return self.max_copies or self.copies

    @property
    def metrics_ports(self) -> range:
        """Where a Router may serve its metrics."""
        return range(self.metrics_port, self.metrics_port + (self.most_copies if self.metrics_port else 1))

    @model_validator(mode="after")
    def _can_grow(self) -> Self:
        if self.max_copies is not None and self.max_copies < self.copies:
            raise ValueError(f"max_copies {self.max_copies} is below copies {self.copies}; raise it or leave it out")
        return self

    @model_validator(mode="after")
    def _metrics_ports_exist(self) -> Self:
        if self.metrics_ports[-1] > 65535:
            raise ValueError(
                f"metrics_port {self.metrics_port} leaves no port for each of {self.most_copies} copies; choose a "
                "lower one"
            )
        return self


class EffortBudgets(_Part):
    """Thinking tokens that each `reasoning_effort` of OpenAI's clients stands for; None: no limit."""

    none: int | None = Field(0, ge=0)
    minimal: int | None = Field(512, ge=0)
    low: int | None = Field(2048, ge=0)
    medium: int | None = Field(8192, ge=0)
    high: int | None = Field(None, ge=0)
    xhigh: int | None = Field(None, ge=0)


class GatewayConfig(_Part):
    """What clients connect to."""

    replicas: int = Field(1, ge=1)
    """Gateways, each on a node of its own."""
    node_resource: str | None = None
    """Ray resource of the nodes that gateways run on; None: the node that the app was started from."""
    host: str = "127.0.0.1"
    grpc_port: int = Field(50051, ge=0, le=65535)
    http_port: int = Field(8000, ge=0, le=65535)
    metrics_port: int = Field(9464, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"
    """Of the metrics ports, the Routers' too: they are plain text without keys, and tell the names of tenants."""
    max_message_bytes: int = Field(8 * 2**20, ge=1024)
    max_streams: int = Field(1024, ge=1)
    """Open Generate streams of one gateway; one more is refused with RESOURCE_EXHAUSTED."""
    max_unread_tokens: int = Field(4096, ge=1)
    """Tokens kept for a client that does not read; past it the stream ends with RESOURCE_EXHAUSTED."""
    stream_retention_s: float = Field(60.0, gt=0)
    """How long an HTTP stream that may be resumed goes on without its client."""
    max_kept_streams: int = Field(128, ge=1)
    """HTTP streams that may be resumed."""
    max_kept_stream_bytes: int = Field(2**20, ge=1024)
    """Kept of each of them, the newest events."""
    replay_timeout_s: float = Field(600.0, gt=0)
    """How long a request that has lost its copy of the model waits for one; its own deadline may come first."""
    head_timeout_s: float = Field(10.0, gt=0)
    """How long a client may take for the head of an HTTP request."""
    body_timeout_s: float = Field(60.0, gt=0)
    """How long it may take for the body of one, or for the message of a gRPC call."""
    idle_timeout_s: float = Field(300.0, gt=0)
    """How long a connection without a request stays open."""
    drain_s: float = Field(30.0, ge=0)
    """How long running streams may go on after a shutdown was asked for."""
    effort_budgets: EffortBudgets = EffortBudgets()

    thinking_close_phrase: str = THINKING_CLOSE_PHRASE
    """Put in the model's mouth when its thinking budget is used up; the closing tag and a blank line follow."""

    @model_validator(mode="after")
    def _phrase_is_one_thought(self) -> Self:
        if "</think>" in self.thinking_close_phrase:
            raise ValueError("thinking_close_phrase contains </think>; leave it out, it is added")
        return self

    @model_validator(mode="after")
    def _replicas_have_nodes(self) -> Self:
        if self.replicas > 1 and self.node_resource is None:
            raise ValueError(
                f"replicas {self.replicas} need a node each; name the Ray resource of those nodes in node_resource"
            )
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        names = ("grpc_port", "http_port", "metrics_port")
        for one, other in combinations(names, 2):
            if getattr(self, one) == getattr(self, other) != 0:
                raise ValueError(f"{one} and {other} are both {getattr(self, one)}; choose two")
        return self


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of one end of a connection."""

    cert: Path
    """The chain, leaf first."""
    key: Path
    ca: Path | None = None
    """Signs the other end. For a server without it, clients need no certificate."""


class SecurityConfig(_Part):
    """Who may connect, and how they show who they are. Certificates and keys are PEM files."""

    tls_cert: Path | None = None
    """Certificate chain of the gRPC and HTTP ports; None: plain text."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Clients need a certificate that it signed; None: they need none."""
    link_cert: Path | None = None
    """Of Routers, and of gateways towards them, for the name `mull-router`; None: plain text between them."""
    link_key: Path | None = None
    link_ca: Path | None = None
    """Signs the certificates of both ends."""
    keys_file: Path | None = None
    """API keys, as `mull keys` writes them; None: everybody may do everything, and AdminService is for this machine."""
    insecure: bool = False
    """Plain text may leave this machine."""

    @property
    def tls(self) -> TlsFiles | None:
        """Of the ports for clients."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_client_ca)

    @property
    def link_tls(self) -> TlsFiles | None:
        """Of both ends between gateways and Routers."""
        if self.link_cert is None or self.link_key is None:
            return None
        return TlsFiles(cert=self.link_cert, key=self.link_key, ca=self.link_ca)

    @model_validator(mode="after")
    def _files_are_complete(self) -> Self:
        for names in (("tls_cert", "tls_key"), ("link_cert", "link_key", "link_ca")):
            missing = [name for name in names if getattr(self, name) is None]
            if 0 < len(missing) < len(names):
                raise ValueError(f"{missing[0]} is missing; give {', '.join(names)} together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key beside it")
        return self


class LogsConfig(_Part):
    """The log lines of all processes."""

    format: LogFormat | None = None
    """How they look, and that `mull serve` shows them all on its stderr; None: text, in Ray's files alone."""


class TracingConfig(_Part):
    """Spans of requests, for an OpenTelemetry collector."""

    otlp_endpoint: str | None = Field(None, pattern=OTLP_ENDPOINT)
    """http:// or https://host:port of its OTLP receiver over gRPC; None: nothing is traced."""
    sample_ratio: float = Field(1.0, ge=0, le=1)
    """Of the requests that come without a trace; for those that come with one, their client has decided."""

    @field_validator("otlp_endpoint", mode="before")
    @classmethod
    def _names_scheme_and_port(cls, value: object) -> object:
        """Where the pattern would be all that is said."""
        if isinstance(value, str) and not re.match(OTLP_ENDPOINT, value):
            raise ValueError("give http:// or https://, a host and a port, as in http://127.0.0.1:4317")
        return value


class ClusterConfig(_Part):
    """Everything `mull serve` needs."""

    model: ModelSource
    engine: EngineConfig = EngineConfig()
    router: RouterConfig = RouterConfig()
    gateway: GatewayConfig = GatewayConfig()
    security: SecurityConfig = SecurityConfig()
    logs: LogsConfig = LogsConfig()
    tracing: TracingConfig = TracingConfig()

    @model_validator(mode="after")
    def _metrics_ports_are_the_routers_own(self) -> Self:
        ports = self.router.metrics_ports
        for name in ("grpc_port", "http_port", "metrics_port"):
            if (port := getattr(self.gateway, name)) != 0 and port in ports:
                raise ValueError(
                    f"gateway.{name} {port} is one of the Routers' metrics ports {ports[0]} to {ports[-1]}; choose "
                    "another for the one or the other"
                )
        return self

    @model_validator(mode="after")
    def _plain_text_stays_on_this_machine(self) -> Self:
        security, address, collector = self.security, self.router.ray_address, self.tracing.otlp_endpoint
        if security.insecure:
            return self
        if security.tls is None and not is_loopback_host(self.gateway.host):
            raise ValueError(
                f"gateway.host {self.gateway.host} is open to other machines in plain text; give security.tls_cert and "
                "tls_key (--tls-cert, --tls-key), or --insecure where the network is private"
            )
        if address is not None and security.link_tls is None and not is_loopback_host(address.rpartition(":")[0]):
            raise ValueError(
                f"router.ray_address {address}: prompts would go to Routers on other machines in plain text; give "
                "security.link_cert, link_key and link_ca, or --insecure where the network is private"
            )
        if collector is not None and collector.startswith("http://"):
            host = collector.removeprefix("http://").rpartition(":")[0]
            if not is_loopback_host(host):
                raise ValueError(
                    f"tracing.otlp_endpoint {collector}: spans would go to another machine in plain text; give an "
                    "https:// one, or --insecure where the network is private"
                )
        return self


def is_loopback_host(host: str) -> bool:
    """Whether nothing but this machine can reach it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
