"""mull serve | chat | status | demo.

Flags become a ClusterConfig; an error is one line with a remedy, never a traceback.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig, parse_config, read_config
from cluster.errors import ConfigError, MullError

if TYPE_CHECKING:
    from cluster.chat import ChatOptions
    from cluster.local import LocalCluster

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_DEMO_QUESTION = "What is 347 + 285?"
_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the `mull` command. Returns the exit code."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except ConfigError as error:
        print(f"mull: {error}", file=sys.stderr)
        return _USAGE
    except MullError as error:
        print(f"mull: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED


def _serve(args: argparse.Namespace) -> int:
    config = _config_from_flags(args)
    _check_model(config)
    from cluster.local import LocalCluster

    interrupts = _Interrupts()
    with LocalCluster(config) as cluster:
        addresses = cluster.start()
        interrupts.install()
        _load(cluster)
        print(
            f"ready · grpc {addresses.grpc} · metrics {addresses.metrics} · "
            f"model {config.model.name} · tp {config.engine.tp} · Ctrl-C drains",
            flush=True,
        )
        interrupts.wait(every_s=1.0, check=cluster.check)
        print(f"draining, at most {config.gateway.drain_s:g} s; Ctrl-C again stops at once", file=sys.stderr)
        cut = cluster.drain()
    if cut:
        raise MullError(f"{cut} streams were still running after {config.gateway.drain_s:g} s and were cut off")
    return 0


def _demo(args: argparse.Namespace) -> int:
    config = _config_from_flags(args)
    _check_model(config)
    from cluster.chat import chat
    from cluster.local import LocalCluster

    print(f"starting Ray, a Gateway, a Router and {config.engine.tp} shard workers", flush=True)
    interrupts = _Interrupts()
    with LocalCluster(config) as cluster:
        addresses = cluster.start()
        interrupts.install()
        _load(cluster)
        print(f"\n{args.question}\n", flush=True)
        code = chat(addresses.grpc, args.question, _chat_options(args), as_json=False)
        print("\nstopping", flush=True)
    return code


def _chat(args: argparse.Namespace) -> int:
    from cluster.chat import chat

    return _call(lambda: chat(args.address, args.question, _chat_options(args), as_json=args.json))


def _status(args: argparse.Namespace) -> int:
    from cluster.status import status

    return _call(lambda: status(args.address, as_json=args.json))


def _call(request: Callable[[], int]) -> int:
    import grpc

    from cluster.chat import describe_rpc_error

    try:
        return request()
    except grpc.RpcError as error:
        print(describe_rpc_error(error), file=sys.stderr)
        return _FAILED


class _Interrupts:
    """SIGINT and SIGTERM raise KeyboardInterrupt, but the first one during `wait` only ends the wait."""

    def __init__(self) -> None:
        self._waiting = False
        self._tick = threading.Event()
        self.install()

    def install(self) -> None:
        """Take the signals; again after anything that takes them for itself, as ray.init does with SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self._waiting:
            raise KeyboardInterrupt
        self._waiting = False
        self._tick.set()

    def wait(self, *, every_s: float, check: Callable[[], None]) -> None:
        """Return at the first signal; until then call `check` every so often, which may raise."""
        self._waiting = True
        while not self._tick.wait(every_s):
            check()


def _load(cluster: LocalCluster) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task("loading", total=None)
        cluster.wait_until_ready(lambda loaded, total: bar.update(task, completed=loaded, total=total or None))


def _config_from_flags(args: argparse.Namespace) -> ClusterConfig:
    values: dict[str, Any] = read_config(args.config) if args.config else {}
    model = values.setdefault("model", {})
    model["path"] = args.model or model.get("path") or builtin_model()
    model["name"] = args.served_model_name or model.get("name") or Path(model["path"]).resolve().name
    for part, flags in _CONFIG_FLAGS.items():
        for name in flags:
            if getattr(args, name) is not None:
                values.setdefault(part, {})[name] = getattr(args, name)
    return parse_config(values)


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


def _check_model(config: ClusterConfig) -> None:
    """Refuse a directory that cannot be served, or a tp that cannot split it, before any process is started."""
    from workers.config import ModelConfig
    from workers.layout import ParallelLayout
    from workers.safetensors_header import check_checkpoint

    model = ModelConfig.from_dir(config.model.path)
    ParallelLayout(tp=config.engine.tp).check(model)
    check_checkpoint(config.model.path, model)


def _chat_options(args: argparse.Namespace) -> ChatOptions:
    from cluster.chat import ChatOptions
    from mull.v1 import generation_pb2 as pb

    given = {name: value for name in _SAMPLING_FLAGS if (value := getattr(args, name)) is not None}
    return ChatOptions(
        sampling=pb.SamplingOptions(**given), max_tokens=args.max_tokens, model=args.model_name, system=args.system
    )


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
        "tp": (int, "ranks that split the model"),
        "device": (str, "auto, cpu or cuda"),
        "threads_per_rank": (int, "CPU threads of a rank; default: the cores, shared"),
        "max_model_len": (int, "longest prompt plus output in tokens; default: the checkpoint's"),
        "max_num_seqs": (int, "sequences that run at once"),
        "max_num_batched_tokens": (int, "token budget of one step"),
        "block_size": (int, "tokens per KV block"),
        "kv_memory_bytes": (int, "KV pool of one rank"),
    },
    "router": {
        "max_waiting": (int, "requests that may wait; one more is refused"),
        "start_timeout_s": (float, "seconds to load and warm up"),
        "step_timeout_s": (float, "seconds after which a rank counts as lost"),
    },
    "gateway": {
        "host": (str, "address to listen on"),
        "grpc_port": (int, "0 picks a free one"),
        "metrics_port": (int, "Prometheus; 0 picks a free one"),
        "max_streams": (int, "open streams; one more is refused"),
        "drain_s": (float, "seconds for running streams to end after Ctrl-C"),
    },
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_serve_flags(parser: argparse.ArgumentParser, *, defaults: Mapping[str, int]) -> None:
    parser.add_argument(
        "--config", type=Path, help="YAML file with model, engine, router and gateway; flags win over it"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint directory; default: the built-in one")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="the name clients ask for; default: the directory's"
    )
    for part, flags in _CONFIG_FLAGS.items():
        group = parser.add_argument_group(part)
        for name, (kind, text) in flags.items():
            shown = f"{text} (default {defaults[name]})" if name in defaults else text
            group.add_argument(_flag(name), type=kind, default=defaults.get(name), help=shown)


def _add_chat_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-name", default="", metavar="NAME", help="default: the only model the server has")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, help="tokens to generate at most, thoughts included")
    for name, (kind, text) in _SAMPLING_FLAGS.items():
        parser.add_argument(_flag(name), type=kind, help=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mull", description="Serve Qwen3 thinking models, and talk to them.")
    parser.add_argument("--version", action="version", version=f"mull {importlib.metadata.version('mull')}")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser("serve", help="serve a model until Ctrl-C")
    _add_serve_flags(serve, defaults={})
    serve.set_defaults(command=_serve)

    demo = commands.add_parser("demo", help="serve the built-in model, ask it one question, stop")
    demo.add_argument("question", nargs="?", default=_DEMO_QUESTION)
    _add_serve_flags(demo, defaults={"tp": 2, "grpc_port": 0, "metrics_port": 0})
    _add_chat_flags(demo)
    demo.set_defaults(command=_demo)

    chat = commands.add_parser("chat", help="ask one question, or converse")
    chat.add_argument("question", nargs="?", help="without it: a conversation, one question a line")
    chat.add_argument("--address", default=_DEFAULT_ADDRESS, help=f"default {_DEFAULT_ADDRESS}")
    chat.add_argument("--json", action="store_true", help="print one event a line")
    _add_chat_flags(chat)
    chat.set_defaults(command=_chat)

    status = commands.add_parser("status", help="what a running server is and does")
    status.add_argument("--address", default=_DEFAULT_ADDRESS, help=f"default {_DEFAULT_ADDRESS}")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(command=_status)
    return parser


if __name__ == "__main__":
    sys.exit(main())
