"""A server with TLS, client certificates and keys, as its users and its operator meet it."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.config import is_loopback_host
from cluster.keys import Scope, add_key
from cluster.ray_cluster import is_open_to_all
from cluster.tls import LINK_NAME
from tests.certificates import Authority
from tests.end_to_end.servers import Server, descendants, mull, named, serving, told

pytestmark = pytest.mark.timeout(300)

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"


@dataclass
class Secured:
    """The server, and what opens it."""

    server: Server
    key: str
    other_key: str
    """Of another tenant."""
    files: tuple[str, ...]
    """Flags of a client with a certificate."""
    context: ssl.SSLContext
    """The same for HTTP."""
    model: Path
    """Its checkpoint, which is its own."""


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory: Path = tmp_path_factory.mktemp("security")
    authority, keys_file = Authority(directory), directory / "keys.yaml"
    server_files, link = authority.issue("server", checks_clients=True), authority.issue("link", LINK_NAME)
    client, ca = authority.issue("client", "client"), str(authority.ca_file)
    key = add_key(keys_file, "acme", frozenset({Scope.GENERATE}), {"max_streams": 4})
    other_key = add_key(keys_file, "other", frozenset({Scope.GENERATE}), {})
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(client.cert, client.key)
    tls = ("--tls-cert", str(server_files.cert), "--tls-key", str(server_files.key), "--tls-client-ca", ca)
    link_flags = ("--link-cert", str(link.cert), "--link-key", str(link.key), "--link-ca", ca)
    model = shutil.copytree(POCKET, directory / "pocket")
    flags = (*tls, *link_flags, "--keys-file", str(keys_file), "--threads-per-rank", "1", "--model", str(model))
    with serving(*flags) as server:
        files = ("--tls-ca", ca, "--tls-cert", str(client.cert), "--tls-key", str(client.key))
        yield Secured(server, key, other_key, files, context, model)


def test_a_question_is_answered_with_certificate_and_key(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULL_API_KEY", secured.key)

    said = told("chat", "What is 347 + 285?", "--address", secured.server.address, "--temperature", "0", *secured.files)

    assert "632" in said
    assert secured.server.http_url.startswith("https://")


@pytest.mark.parametrize(("has_files", "has_key", "words"), [
    (True, False, "UNAUTHENTICATED"),
    (False, True, "mull: no server answers"),
])  # fmt: skip
def test_without_one_of_them_the_command_says_what_is_missing(
    secured: Secured, has_files: bool, has_key: bool, words: str
) -> None:
    files = secured.files if has_files else ()
    key = ("--api-key", secured.key) if has_key else ()

    refused = mull("status", "--address", secured.server.address, *files, *key)

    assert refused.returncode == 1
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_openai_clients_get_in_by_https(secured: Secured) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
    with httpx.Client(base_url=secured.server.http_url, verify=secured.context, timeout=60) as client:
        denied = client.post("/v1/chat/completions", json=body)
        answer = client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {secured.key}"})

    assert denied.status_code == 401
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 8)


def test_a_tenant_finds_its_own_prefixes_in_the_cache_and_nobody_elses(secured: Secured) -> None:
    body = {"prompt": "one two three four five " * 20, "max_tokens": 1}

    def cached_tokens(key: str) -> int:
        answer = client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    with httpx.Client(base_url=secured.server.http_url, verify=secured.context, timeout=60) as client:
        assert cached_tokens(secured.key) == 0
        assert cached_tokens(secured.other_key) == 0
        assert cached_tokens(secured.key) > 0


def test_every_port_of_ours_and_of_rays_is_for_this_machine_alone(secured: Secured) -> None:
    processes = [psutil.Process(secured.server.process.pid), *descendants(secured.server.process)]

    listening: list[str] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # some of Ray's end at any time
            connections = process.net_connections(kind="inet")
            listening += [it.laddr.ip for it in connections if it.status == psutil.CONN_LISTEN]

    assert len(listening) > 5
    assert [ip for ip in listening if not is_loopback_host(ip.removeprefix("::ffff:"))] == []


def test_rays_processes_ask_each_other_for_a_token(secured: Secured) -> None:
    (raylet,) = named(secured.server, "raylet/raylet ")

    assert raylet.environ().get("RAY_AUTH_MODE") == "token"
    assert not is_open_to_all(flag_of(raylet, "--gcs-address"))


def flag_of(process: psutil.Process, name: str) -> str:
    (value,) = (word.partition("=")[2] for word in process.cmdline() if word.startswith(f"{name}="))
    return value


def test_neither_keys_nor_texts_are_in_what_the_server_wrote(secured: Secured) -> None:
    marker = "a quite unlikely marker of a prompt"
    assert told(
        "chat", marker, "--max-tokens", "4", "--address", secured.server.address, *secured.files,
        "--api-key", secured.key,
    )  # fmt: skip

    # Not the latest session on this machine: other tests have servers, too.
    (raylet,) = named(secured.server, "raylet/raylet ")
    session = Path(flag_of(raylet, "--session_dir"))
    written = "\n".join(secured.server.lines) + "\n".join(
        file.read_text(errors="replace") for file in session.rglob("*") if file.is_file()
    )

    assert len(written) > 1000
    assert marker not in written
    assert secured.key not in written
    assert secured.key.split("-", 2)[2] not in written


def test_ranks_that_cannot_come_back_end_the_server_which_names_what_they_lack(secured: Secured) -> None:
    """The last test of this server."""
    *_, lost = sorted(secured.model.glob("*.safetensors"))
    (rank,) = named(secured.server, "ShardActor")
    lost.unlink()
    rank.kill()

    assert secured.server.wait() == 1
    last = secured.server.lines[-1]
    assert last.startswith("mull: ")
    assert str(lost) in last
