"""`mull top`: asks the metrics ports again and again, and shows what they say until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from urllib.request import urlopen

from rich.console import Console
from rich.live import Live

from cluster.errors import ConfigError, NotReady
from cluster.top.figures import History, Snapshot
from cluster.top.samples import Samples
from cluster.top.screen import screen

TIMEOUT_S = 3.0
DEFAULT_ADDRESSES = ("127.0.0.1:9464", "127.0.0.1:9465")


@dataclass(frozen=True, kw_only=True)
class TopOptions:
    """What `mull top` looks at, and how often."""

    addresses: Sequence[str]
    """Of metrics ports, of gateways and Routers alike: host:port, or URLs."""
    interval_s: float = 1.0

    def __post_init__(self) -> None:
        if self.interval_s <= 0:
            raise ConfigError(f"--interval-s {self.interval_s:g} is not above 0; give at least 0.1")


def top(options: TopOptions) -> int:
    """Show the screen until Ctrl-C."""
    history = History()
    console = Console()
    with ThreadPoolExecutor(len(options.addresses)) as threads:
        history.add(_look(options.addresses, threads))
        _check_answers(history.now)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    live.update(screen(history, time.strftime("%H:%M:%S")), refresh=True)
                    time.sleep(options.interval_s)
                    history.add(_look(options.addresses, threads))
            except KeyboardInterrupt:
                return 0


def top_once(options: TopOptions, console: Console | None = None) -> int:
    """Look twice, an interval apart, since rates need two looks; print the screen."""
    history = History()
    with ThreadPoolExecutor(len(options.addresses)) as threads:
        history.add(_look(options.addresses, threads))
        _check_answers(history.now)
        time.sleep(options.interval_s)
        history.add(_look(options.addresses, threads))
    (console or Console()).print(screen(history, time.strftime("%H:%M:%S")))
    return 0


def _look(addresses: Sequence[str], threads: ThreadPoolExecutor) -> Snapshot:
    """Ask all ports at once."""
    asked = {_short(address): threads.submit(_ask, address) for address in addresses}
    ports, errors = {}, {}
    for address, answer in asked.items():
        try:
            ports[address] = answer.result()
        except (OSError, HTTPException, ValueError) as error:
            errors[address] = " ".join(str(error).split()) or type(error).__name__
    return Snapshot(time.monotonic(), ports, errors)


def _ask(address: str) -> Samples:
    url = address if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://")):
        raise ValueError("is no http address")
    if not url.rstrip("/").endswith("/metrics"):
        url = url.rstrip("/") + "/metrics"
    with urlopen(url, timeout=TIMEOUT_S) as answer:
        return Samples(answer.read().decode())


def _short(address: str) -> str:
    """As it is shown."""
    return address.removeprefix("http://").rstrip("/").removesuffix("/metrics")


def _check_answers(snapshot: Snapshot) -> None:
    """Raises NotReady where there is nothing to show at all."""
    if not snapshot.ports:
        told = "; ".join(f"{address}: {why}" for address, why in snapshot.errors.items())
        raise NotReady(f"no metrics port answers ({told}); give the addresses that `mull serve` has printed")
