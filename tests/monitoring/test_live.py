"""A live server under load, watched by a real Prometheus: every panel shows something, and a lost rank is an alert."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from cluster.keys import Scope, add_key
from cluster.tls import LINK_NAME
from mull.client import CallFailed, Client, Options, tls_credentials
from tests.certificates import Authority
from tests.end_to_end.servers import serving
from tests.monitoring.live import PROGRAMS, ROOT, RULES, Watch, until, watching

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in PROGRAMS),
        reason="no Prometheus here: apt-get install prometheus prometheus-alertmanager",
    ),
]

DATA_S = 100.0
RECOVERY_S = 120.0
DASHBOARDS = sorted((ROOT / "helm" / "mull" / "dashboards").glob("*.json"))
# Longer than all of this takes: a loss that was counted is to be seen whenever it is looked for.
VARIABLES = {"$installation": ".*", "$__rate_interval": "30m", "$__range": "30m"}
MOVED_BY_LOAD = (
    'mull_generation_tokens_total{phase="thinking", tenant="acme"}',
    'mull_generation_tokens_total{phase="answer", tenant="acme"}',
    'mull_requests_finished_total{finish_reason="length", phase="thinking", tenant="acme"}',
    'mull_requests_failed_total{code="INVALID_ARGUMENT", tenant="acme"}',
    'mull_calls_refused_total{reason="unauthenticated"}',
    "mull_cached_prompt_tokens_total",
    "mull_budget_forced_tokens_total",
    "mull_thinking_seconds_count",
    "mull_prefix_hit_tokens_total",
    'mull_step_tokens_total{kind="prefill"}',
    'mull_step_seconds_sum{part="compute"}',
    "mull_request_decode_time_seconds_count",
    "mull_dispatch_bytes_total",
    "mull_dispatch_seconds_total",
    'mull_certificate_not_after_timestamp_seconds{certificate="ports"} - time()',
)
PAUSE = 'mull_recovery_pause_seconds_count{cause="rank_lost"}'
MOVED_BY_A_LOSS = (
    'mull_ranks_lost_total{cause="exited"}',
    "mull_engine_restarts_total",
    'mull_replayed_tokens_total{cause="rank_lost"}',
    PAUSE,
)
WAKES = 'ALERTS{alertstate="firing", severity="critical"}'
SERIES = re.compile(r"(?<![\w:])(?:mull|installation:mull|process)[\w:]+(?:\{[^}]*\})?")


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """Two groups that share experts, with certificates and keys, under load; it has lost a rank and got it back."""
    directory = tmp_path_factory.mktemp("watched")
    authority, keys_file = Authority(directory), directory / "keys.yaml"
    ports, link = authority.issue("ports"), authority.issue("link", LINK_NAME)
    key = add_key(keys_file, "acme", frozenset({Scope.GENERATE}), {})
    ca = str(authority.ca_file)
    security = ("--tls-cert", ports.cert, "--tls-key", ports.key, "--keys-file", keys_file)
    links = ("--link-cert", link.cert, "--link-key", link.key, "--link-ca", ca)
    flags = ("--dp", "2", "--rebalance-interval-steps", "10", *map(str, (*security, *links)))
    with serving(*flags) as server:
        targets = [url.split("/")[2] for url in (server.metrics_url, server.router_metrics_url)]
        asker = Asker(server.address, ca, key)
        with watching(targets, directory) as watch, asker.asking():
            until(lambda: watch.has_data("mull_generation_tokens_total > 0"), DATA_S, "no tokens in Prometheus")
            # A loss shows as growth: the Router must have been read before it, too.
            until(lambda: watch.has_data("mull_ranks_lost_total"), DATA_S, "no Router in Prometheus")
            with asker.silent():
                lose_a_rank(asker, watch)
            yield watch


def test_every_panel_shows_data(watch: Watch) -> None:
    have_data(watch, {line for file in DASHBOARDS for line in queries(file)})


def test_load_and_a_loss_move_what_tells_of_them(watch: Watch) -> None:
    have_data(watch, {f"{series} > 0" for series in (*MOVED_BY_LOAD, *MOVED_BY_A_LOSS)})


def test_every_recording_rule_records(watch: Watch) -> None:
    have_data(watch, {rule["record"] for rule in rules() if "record" in rule})


def test_every_series_that_a_rule_reads_is_there(watch: Watch) -> None:
    have_data(watch, {series for rule in rules() for series in SERIES.findall(rule["expr"])})


def test_a_lost_rank_is_an_alert_that_arrives(watch: Watch) -> None:
    until(lambda: bool(watch.alerts("MullRanksLost")), DATA_S, "Alertmanager has no MullRanksLost")

    (alert,) = watch.alerts("MullRanksLost")
    assert alert["labels"] == {
        "alertname": "MullRanksLost",
        "severity": "warning",
        "installation": "laptop",
        "cause": "exited",
    }
    assert alert["annotations"]["summary"] == "laptop lost ranks"
    assert alert["annotations"]["runbook"].endswith("#mullrankslost")


def test_a_server_that_is_well_again_wakes_nobody(watch: Watch) -> None:
    until(lambda: not watch.values(WAKES), DATA_S, "a critical alert still fires")

    assert watch.values('ALERTS{alertname="MullRanksLost"}') == [1]


def queries(file: Path) -> Iterator[str]:
    """As Grafana would send them."""
    for panel in json.loads(file.read_text())["panels"]:
        for target in panel.get("targets", []):
            expr: str = target["expr"]
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            yield expr


def rules() -> list[dict[str, str]]:
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def have_data(watch: Watch, expressions: Iterable[str]) -> None:
    missing = set(expressions)
    assert missing

    def all_found() -> bool:
        missing.difference_update([expr for expr in missing if watch.has_data(expr)])
        return not missing

    try:
        until(all_found, DATA_S, "")
    except AssertionError:
        raise AssertionError("no data for\n" + "\n".join(sorted(missing))) from None


@dataclass(frozen=True)
class Asker:
    """Clients of all kinds: who get an answer, run out of tokens or of budget, are wrong, or have no key."""

    address: str
    ca: str
    key: str
    turns: tuple[threading.Lock, ...] = field(default_factory=lambda: tuple(threading.Lock() for _ in ASKS))
    """Who asks has its own."""

    def client(self, key: str | None) -> Client:
        return Client(self.address, credentials=tls_credentials(self.ca), api_key=key, timeout_s=RECOVERY_S)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nobody asks: while ranks come back each attempt is a failure more, and too many are an alert."""
        with ExitStack() as stack:
            for turn in self.turns:
                stack.enter_context(turn)
            yield

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Some at a time, again and again. Raises at the end what one of them met."""
        stopped = threading.Event()
        with ThreadPoolExecutor(len(ASKS)) as threads:
            asks = zip(ASKS, self.turns, strict=True)
            asked = [threads.submit(self._ask_until, stopped, ask, turn) for ask, turn in asks]
            try:
                yield
            finally:
                stopped.set()
            for it in asked:
                it.result()

    def _ask_until(self, stopped: threading.Event, ask: Callable[[Client], object], turn: threading.Lock) -> None:
        with self.client(self.key) as client, self.client("unknown") as stranger:
            while not stopped.wait(0.1):
                with turn:
                    ask(client)
                    refused(lambda: client.chat("Hi", model="another").answer)
                    refused(lambda: stranger.chat("Hi").answer)


ASKS: tuple[Callable[[Client], object], ...] = (
    lambda client: client.chat("What is 347 + 285?", system="Be brief. " * 20, temperature=0).answer,
    lambda client: client.chat("What is 347 + 285?", temperature=0, thinking_budget=8).answer,
    lambda client: client.chat("What is 347 + 285?", temperature=0, max_tokens=8).thinking,
)


def refused(call: Callable[[], object]) -> None:
    try:
        call()
    except CallFailed:
        return
    raise AssertionError("it was let in")


def lose_a_rank(asker: Asker, watch: Watch) -> None:
    """In the middle of a long stream, which goes on when there is another one in its place."""
    # Nearly the context, and so hot that nothing of it can be drafted.
    long = Options(ignore_eos=True, max_tokens=3500, temperature=8, top_p=1, top_k=0)
    with asker.client(asker.key) as client:
        (router,) = client.server_info().routers
        with client.chat("Hi", **long) as reply:
            next(iter(reply))
            os.kill(router.ranks[1].pid, signal.SIGKILL)

            until(lambda: have_come_back(client), RECOVERY_S, "the ranks have not come back")
            # Who leaves before the next token comes has no pause to tell of. The server keeps what is not read.
            until(lambda: watch.has_data(f"{PAUSE} > 0"), DATA_S, "no pause of the stream in Prometheus")


def have_come_back(client: Client) -> bool:
    (router,) = client.server_info().routers
    return bool(router.ready and router.num_restarts_total)
