"""The flags of the `mull` command, and what they become: a ClusterConfig, or the options of a question."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.config_file import parse_config, read_config
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.chat import ChatOptions
    from cluster.server_address import ServerAddress

_DEFAULT_ADDRESS = "127.0.0.1:50051"

_SAMPLING_FLAGS: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the likeliest tokens of this total probability, in (0, 1]"),
    "top_k": (int, "keep this many of the likeliest tokens; 0: all"),
    "min_p": (float, "drop tokens less likely than this share of the likeliest one, in [0, 1]"),
    "presence_penalty": (float, "in [-2, 2]"),
    "frequency_penalty": (float, "in [-2, 2]"),
    "repetition_penalty": (float, "above 0; 1: none"),
    "seed": (int, "the same seed gives the same tokens"),
    "logprobs": (int, "logprobs of this many of the likeliest tokens (with --json)"),
}

_CONFIG_FLAGS: dict[str, dict[str, tuple[type, str]]] = {
    "engine": {
        "tp": (int, "ranks of an attention group: they split heads and dense layers"),
        "dp": (int, "attention groups, each with its own sequences and KV"),
        "expert_tp": (int, "ranks that split each expert; it divides tp * dp"),
        "redundant_experts": (int, "room in every layer for replicas of hot experts"),
        "device": (str, "auto, cpu or cuda"),
        "products": (str, "what a CPU multiplies: fp32, or bf16 at half the time where it has avx512_bf16"),
        "threads_per_rank": (int, "CPU threads of a rank; default: the cores, shared"),
        "max_model_len": (int, "longest prompt plus output in tokens; default: the checkpoint's"),
        "max_num_seqs": (int, "sequences of an attention group that run at once"),
        "max_num_batched_tokens": (int, "token budget of one step of an attention group"),
        "max_prefill_slowdown": (float, "how many times longer prompts may make a step for those who stream"),
        "num_speculative_tokens": (int, "tokens drafted in a step at most, where that pays; 0: no drafts"),
        "block_size": (int, "tokens per KV block"),
        "kv_memory_bytes": (int, "KV pool of one rank"),
        "kv_dtype": (str, "auto, or rounded to half of the bytes: bf16 on a CPU, fp8 on a GPU"),
        "graphs": (str, "CUDA graphs of decode steps: auto, whole, piecewise or off"),
        "host_kv_bytes": (int, "host memory of one rank for KV whose blocks are needed for others; 0: none"),
    },
    "router": {
        "copies": (int, "whole models, each on ranks of its own; a request goes on at another when one is lost"),
        "max_copies": (int, "copies at most, where more are to be started while those that run are full"),
        "max_waiting": (int, "requests that may wait; one more is refused"),
        "start_timeout_s": (float, "seconds to load and warm up"),
        "step_timeout_s": (float, "seconds after which a rank counts as lost"),
        "metrics_port": (int, "Prometheus, at the first Router; further ones take the next ports; 0 picks free ones"),
        "ray_address": (str, "Ray cluster to run in, as host:port; default: one of its own on this machine"),
        "rebalance_interval_steps": (int, "steps between two looks at the experts' loads; 0: never"),
    },
    "gateway": {
        "host": (str, "address to listen on"),
        "grpc_port": (int, "0 picks a free one"),
        "http_port": (int, "OpenAI's API and the chat page; 0 picks a free one"),
        "metrics_port": (int, "Prometheus; 0 picks a free one"),
        "metrics_host": (str, "where Prometheus finds Gateways and Routers, in plain text (default 127.0.0.1)"),
        "max_streams": (int, "open streams; one more is refused"),
        "drain_s": (float, "seconds for running streams to end after Ctrl-C"),
    },
    "security": {
        "tls_cert": (Path, "certificate chain of the gRPC and HTTP ports, PEM; read again when it changes"),
        "tls_key": (Path, "its key"),
        "tls_client_ca": (Path, "clients need a certificate that it signed"),
        "link_cert": (Path, "certificate between gateways and Routers, for the name mull-router"),
        "link_key": (Path, "its key"),
        "link_ca": (Path, "signs the certificates of both ends"),
        "keys_file": (Path, "API keys, as `mull keys` writes them; default: none are asked for"),
    },
    "tracing": {
        "otlp_endpoint": (str, "http://host:port of an OpenTelemetry collector (OTLP over gRPC); default: no spans"),
    },
}
_LOG_FORMAT = "show the log lines of all processes on stderr, as text or as json; default: they are in Ray's files"


_ARGUMENTS = {("router", "metrics_port"): "router_metrics_port"}
"""Names of flags where two parts have a setting of the same name."""


def _argument(part: str, name: str) -> str:
    return _ARGUMENTS.get((part, name), name)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_serve_flags(parser: argparse.ArgumentParser, *, fallbacks: Mapping[str, int]) -> None:
    parser.add_argument(
        "--config", type=Path, help="YAML file with the parts of a configuration: model, engine, …; flags win"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint directory; default: the built-in one")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="the name clients ask for; default: the directory's"
    )
    for part, flags in _CONFIG_FLAGS.items():
        group = parser.add_argument_group(part)
        for name, (kind, text) in flags.items():
            argument = _argument(part, name)
            shown = f"{text} (default {fallbacks[argument]})" if argument in fallbacks else text
            group.add_argument(_flag(argument), type=kind, help=shown)
    parser.add_argument("--log-format", choices=("text", "json"), help=_LOG_FORMAT)
    parser.add_argument("--deterministic", action="store_true", help="the same bits at any load, for a slower copy")
    parser.add_argument("--insecure", action="store_true", help="plain text may leave this machine")
    parser.set_defaults(fallbacks=fallbacks)


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=_DEFAULT_ADDRESS, help=f"default {_DEFAULT_ADDRESS}")
    parser.add_argument("--tls", action="store_true", help="TLS, by the public authorities; implied by --tls-ca")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="signed the server's certificate, PEM")
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="a certificate of your own, where it is asked for"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its key")
    parser.add_argument("--api-key", metavar="KEY", help="default: what MULL_API_KEY holds, which others cannot see")


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-name", default="", metavar="NAME", help="default: the only model the server has")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, help="tokens to generate at most, thoughts included")
    parser.add_argument("--thinking-budget", type=int, help="thinking tokens at most; 0 answers at once")
    for name, (kind, text) in _SAMPLING_FLAGS.items():
        parser.add_argument(_flag(name), type=kind, help=text)


def add_top_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "metrics",
        nargs="*",
        metavar="ADDRESS",
        help="metrics ports of gateways and Routers, as `mull serve` prints them (default 127.0.0.1:9464 and :9465)",
    )
    parser.add_argument("--interval-s", type=float, default=1.0, help="seconds between two looks (default 1)")
    parser.add_argument("--once", action="store_true", help="look twice, print the screen and end")


def config_from_flags(args: argparse.Namespace) -> ClusterConfig:
    """Flags win over the file, the file over the command's own fallbacks. Raises ConfigError."""
    values: dict[str, dict[str, Any]] = read_config(args.config) if args.config else {}
    for part, flags in _CONFIG_FLAGS.items():
        for name in flags:
            argument = _argument(part, name)
            if getattr(args, argument) is not None:
                values.setdefault(part, {})[name] = getattr(args, argument)
            elif argument in args.fallbacks:
                values.setdefault(part, {}).setdefault(name, args.fallbacks[argument])
    if args.log_format is not None:
        values.setdefault("logs", {})["format"] = args.log_format
    if args.deterministic:
        values.setdefault("engine", {})["deterministic"] = True
    if args.insecure:
        values.setdefault("security", {})["insecure"] = True
    model = values.setdefault("model", {})
    if args.model is not None:
        model["path"] = str(args.model)
    if args.served_model_name is not None:
        model["name"] = args.served_model_name
    return config_from_values(values)


def config_from_values(values: dict[str, dict[str, Any]]) -> ClusterConfig:
    """Nested values as they are; a model that they do not name is the built-in one. Raises ConfigError."""
    model = values.get("model", {})
    path = str(model.get("path") or builtin_model())
    name = model.get("name") or Path(path).resolve().name
    return parse_config({**values, "model": {**model, "path": path, "name": name}})


def builtin_model() -> Path:
    """The checkpoint that comes with mull: beside the code in a clone, inside the package in an installed wheel."""
    clone = Path(__file__).resolve().parent.parent / "deploy" / "models" / "pocket"
    if clone.is_dir():
        return clone
    package = importlib.util.find_spec("mull")
    assert package is not None
    for place in package.submodule_search_locations or []:
        if (Path(place) / "pocket").is_dir():
            return Path(place) / "pocket"
    raise ConfigError("the built-in model is missing from this installation; give --model DIR")


def server_from_flags(args: argparse.Namespace) -> ServerAddress:
    """Where the server is and how to get in. Raises ConfigError."""
    from cluster.server_address import ServerAddress
    from mull.client import tls_credentials

    if (args.tls_cert is None) != (args.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together; give both or none")
    if not (args.tls or args.tls_ca or args.tls_cert):
        return ServerAddress(args.address, api_key=args.api_key)
    try:
        credentials = tls_credentials(args.tls_ca, args.tls_cert, args.tls_key)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}); give PEM files") from error
    return ServerAddress(args.address, credentials=credentials, api_key=args.api_key)


def chat_options(args: argparse.Namespace) -> ChatOptions:
    from cluster.chat import ChatOptions
    from mull.client.options import chat_request

    names = ("max_tokens", "thinking_budget", *_SAMPLING_FLAGS)
    options: Any = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.model_name:
        options["model"] = args.model_name
    try:
        chat_request("", None, (), options)
    except ValueError as error:
        raise ConfigError(f"a sampling flag is out of range: {error}") from error
    return ChatOptions(options=options, system=args.system)
