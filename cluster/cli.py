"""mull serve | chat | status | top | demo | plan | keys | check | drain.

Flags become a ClusterConfig; an error is one line with a remedy, never a traceback.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.config_file import read_config
from cluster.errors import ConfigError, MullError
from cluster.flags import (
    add_chat_flags,
    add_client_flags,
    add_serve_flags,
    add_top_flags,
    chat_options,
    config_from_flags,
    config_from_values,
    server_from_flags,
)
from cluster.interrupts import Interrupts
from cluster.keys_command import add_keys_command
from workers.logs import write_logs

if TYPE_CHECKING:
    from cluster.local import LocalCluster

logger = logging.getLogger("cluster.cli")  # its own name also where it is run as a module

_DEMO_QUESTION = "What is 347 + 285?"
_WAIT_POLL_S = 1.0
_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the `mull` command. Returns the exit code."""
    # gRPC writes lines of its own to stderr where a server goes away in order; it reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except MullError as error:
        print(f"mull: {error}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED


def _exit_code(error: MullError) -> int:
    return _USAGE if isinstance(error, ConfigError) else _FAILED


def _serve(args: argparse.Namespace) -> int:
    config = config_from_flags(args)
    if config.logs.format is None:
        return _serve_to_end(config)
    write_logs(config.logs.format, "serve")
    try:
        return _serve_to_end(config)
    except MullError as error:
        logger.error("%s", error)
        return _exit_code(error)


def _serve_to_end(config: ClusterConfig) -> int:
    is_logging = config.logs.format is not None
    _check_model(config)
    _check_security(config)
    from cluster.local import LocalCluster

    interrupts = Interrupts()
    with LocalCluster(config, interrupts) as cluster:
        addresses = cluster.start()
        if is_logging:
            cluster.wait_until_ready(lambda _loaded, _total: None)
        else:
            _load(cluster)
            _print_ranks(cluster)
        metrics = " ".join([addresses.metrics, *cluster.router_metrics()])
        print(
            f"ready · grpc {addresses.grpc} · http {addresses.http} · metrics {metrics} · "
            f"model {config.model.name} · {_layout_words(config)} · Ctrl-C drains",
            flush=True,
        )
        interrupts.wait(every_s=1.0, check=cluster.check)
        cut = cluster.drain(logger.info if is_logging else _print_to_stderr)
    if cut:
        streams = "1 stream was" if cut == 1 else f"{cut} streams were"
        raise MullError(f"{streams} still running after {config.gateway.drain_s:g} s and cut off")
    return 0


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _demo(args: argparse.Namespace) -> int:
    config = config_from_flags(args)
    options = chat_options(args)
    if config.security.tls is not None or config.security.keys_file is not None:
        raise ConfigError(
            "security: the demo asks its own server without TLS or keys; leave them out, or use mull serve"
        )
    _check_model(config)
    from cluster.chat import chat
    from cluster.local import LocalCluster
    from cluster.server_address import ServerAddress

    print(f"starting Ray, a Gateway, a Router and {config.engine.layout.world_size} shard workers", flush=True)
    interrupts = Interrupts()
    with LocalCluster(config, interrupts) as cluster:
        addresses = cluster.start()
        _load(cluster)
        print(f"\n{args.question}\n", flush=True)
        with interrupts.at_once():
            server = ServerAddress(addresses.grpc)
            code = _call(lambda: chat(server, args.question, options, as_json=False))
        print("\nstopping", flush=True)
    return code


def _chat(args: argparse.Namespace) -> int:
    from cluster.chat import chat

    options = chat_options(args)
    server = server_from_flags(args)
    return _call(lambda: chat(server, args.question, options, as_json=args.json))


def _status(args: argparse.Namespace) -> int:
    from cluster.status import status

    server = server_from_flags(args)
    return _call(lambda: status(server, as_json=args.json))


def _top(args: argparse.Namespace) -> int:
    from cluster.top.live import DEFAULT_ADDRESSES, TopOptions, top, top_once

    options = TopOptions(addresses=args.metrics or DEFAULT_ADDRESSES, interval_s=args.interval_s)
    return top_once(options) if args.once else top(options)


def _check(args: argparse.Namespace) -> int:
    """What `mull serve` would refuse, without a process being started."""
    config = config_from_values(read_config(args.config))
    _wait_for(config.model.path, args.wait_s)
    _check_model(config)
    if not args.only_model:
        _check_security(config)
    print(f"{config.model.name} in {config.model.path} can be served with {_layout_words(config)}")
    return 0


def _wait_for(path: Path, wait_s: float) -> None:
    """Wait for a directory that is being downloaded: it appears when it is complete."""
    deadline_s = time.monotonic() + wait_s
    while not path.is_dir() and time.monotonic() < deadline_s:
        time.sleep(min(_WAIT_POLL_S, wait_s))
    if wait_s and not path.is_dir():
        raise ConfigError(f"{path} has not appeared within {wait_s:g} s; look at the job that downloads it")


def _drain(args: argparse.Namespace) -> int:
    from cluster.drain import drain

    print(drain(args.metrics_port, delay_s=args.delay_s, wait_s=args.wait_s))
    return 0


def _layout_words(config: ClusterConfig) -> str:
    engine = config.engine
    more = {"dp": engine.dp, "expert-tp": engine.expert_tp, "copies": config.router.copies}
    return f"tp {engine.tp}" + "".join(f" · {name} {size}" for name, size in more.items() if size > 1)


def _call(request: Callable[[], int]) -> int:
    from cluster.chat import describe_failure
    from mull.client import CallFailed

    try:
        return request()
    except CallFailed as error:
        print(describe_failure(error), file=sys.stderr)
        return _FAILED


def _load(cluster: LocalCluster) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task("loading", total=None)
        cluster.wait_until_ready(lambda loaded, total: bar.update(task, completed=loaded, total=total or None))


def _print_ranks(cluster: LocalCluster) -> None:
    from rich.console import Console

    from cluster.status import rank_table

    for router in cluster.info().routers:
        Console(stderr=True).print(rank_table(router))


def _check_model(config: ClusterConfig) -> None:
    """Refuse a directory that cannot be served, or a layout that cannot split it, before any process is started."""
    from cluster.capacity import check_context, check_redundant_experts
    from cluster.gateway.served_model import ServedModel
    from workers.config import ModelConfig
    from workers.safetensors_header import check_checkpoint

    model = ModelConfig.from_dir(config.model.path)
    config.engine.layout.check(model)
    check_redundant_experts(config, model)
    check_checkpoint(config.model.path, model)
    device = config.engine.device
    check_context(config, model, None if device == "auto" else device)
    ServedModel.load(config.model, config.engine.max_model_len)


def _check_security(config: ClusterConfig) -> None:
    """Refuse certificates and keys that cannot be used, before any process is started."""
    from cluster.gateway.access import Access
    from cluster.tls import ServerCertificates, link_server_credentials

    Access(config.security.keys_file)
    if (files := config.security.tls) is not None:
        ServerCertificates(files)
    if (link := config.security.link_tls) is not None:
        link_server_credentials(link)


class _CommandParser(argparse.ArgumentParser):
    """Of one command, whose flags may be added only when it is the one that is given."""

    def __init__(self, *args: Any, later: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._later = later

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._later is not None:
            self._later(self)
            self._later = None
        return super().parse_known_args(args, namespace)


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    # Half of what this program would import, and nothing that others read.
    from cluster.planner.command import add_plan_command

    add_plan_command(parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mull", description="Serve Qwen3 thinking models, and talk to them.")
    parser.add_argument("--version", action="version", version=f"mull {importlib.metadata.version('mull')}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_CommandParser)

    serve = commands.add_parser("serve", help="serve a model until Ctrl-C")
    add_serve_flags(serve, fallbacks={})
    serve.set_defaults(command=_serve)

    demo = commands.add_parser("demo", help="serve the built-in model, ask it one question, stop")
    demo.add_argument("question", nargs="?", default=_DEMO_QUESTION)
    add_serve_flags(
        demo, fallbacks={"tp": 2, "grpc_port": 0, "http_port": 0, "metrics_port": 0, "router_metrics_port": 0}
    )
    add_chat_flags(demo)
    demo.set_defaults(command=_demo)

    chat = commands.add_parser("chat", help="ask one question, or converse")
    chat.add_argument("question", nargs="?", help="without it: a conversation, one question a line")
    add_client_flags(chat)
    chat.add_argument("--json", action="store_true", help="print one event a line")
    add_chat_flags(chat)
    chat.set_defaults(command=_chat)

    status = commands.add_parser("status", help="what a running server is and does")
    add_client_flags(status)
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(command=_status)

    top = commands.add_parser("top", help="what a running server does, live")
    add_top_flags(top)
    top.set_defaults(command=_top)

    commands.add_parser("plan", help="what fits on which GPUs, how fast it is, and what to run", later=_add_plan_flags)

    keys = commands.add_parser("keys", help="API keys: add, list, revoke")
    add_keys_command(keys)

    check = commands.add_parser("check", help="whether a configuration could be served: checkpoint, layout, keys")
    check.add_argument("--config", type=Path, required=True, help="the file that `mull serve --config` reads")
    check.add_argument("--wait-s", type=float, default=0.0, help="seconds for the checkpoint to appear (default 0)")
    check.add_argument("--only-model", action="store_true", help="not the certificates and keys")
    check.set_defaults(command=_check)

    drain = commands.add_parser("drain", help="let the streams of this machine's gateway end, and wait for that")
    drain.add_argument("--metrics-port", type=int, default=9464, help="default 9464")
    drain.add_argument("--delay-s", type=float, default=0.0, help="before it: for others to stop sending work here")
    drain.add_argument("--wait-s", type=float, default=86400.0, help="at most (default a day)")
    drain.set_defaults(command=_drain)
    return parser


if __name__ == "__main__":
    sys.exit(main())
