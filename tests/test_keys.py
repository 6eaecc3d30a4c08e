"""The file of API keys: what `mull keys` writes, and files that are refused."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.keys import KEY_PATTERN, Scope, add_key, key_hash, read_keys, revoke_key
from tests.end_to_end.servers import mull

GENERATE = frozenset({Scope.GENERATE})


def test_an_added_key_is_found_by_its_hash_and_is_in_no_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    key = add_key(file, "acme", GENERATE, {"max_streams": 4})

    read = read_keys(file)
    assert KEY_PATTERN.fullmatch(key)
    assert read.keys[0].sha256 == key_hash(key)
    assert (read.keys[0].tenant, read.tenants["acme"].max_streams) == ("acme", 4)
    assert key not in file.read_text()
    assert key.split("-", 2)[2] not in file.read_text()


def test_the_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.yaml", "acme", GENERATE, {})

    assert stat.S_IMODE((tmp_path / "keys.yaml").stat().st_mode) == 0o600


def test_a_second_key_changes_only_the_limits_that_it_names(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add_key(file, "acme", GENERATE, {"max_streams": 4, "max_requests_per_s": 2.5})

    add_key(file, "acme", frozenset(Scope), {"max_streams": 8})

    read = read_keys(file)
    assert (read.tenants["acme"].max_streams, read.tenants["acme"].max_requests_per_s) == (8, 2.5)
    assert [key.scopes for key in read.keys] == [GENERATE, frozenset(Scope)]


def test_keys_that_are_added_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(lambda n: add_key(file, f"tenant-{n}", GENERATE, {}), range(16)))

    assert {entry.sha256 for entry in read_keys(file).keys} == {key_hash(key) for key in keys}


def test_a_revoked_key_is_gone_and_so_is_its_tenant_with_the_last_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    for _ in range(2):
        add_key(file, "acme", GENERATE, {})
    first, second = (entry.id for entry in read_keys(file).keys)

    revoke_key(file, first)
    assert [entry.id for entry in read_keys(file).keys] == [second]
    revoke_key(file, second)
    assert (read_keys(file).keys, dict(read_keys(file).tenants)) == ((), {})


STRAY_KEY = f"{{id: {'b' * 12}, tenant: x, sha256: {'a' * 64}, scopes: [admin], created: 2026-01-01}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "keys.yaml"),
        ("tenants: {acme: {max_streams: 0}}", "tenants.acme.max_streams"),
        ("tenants: {acme: {typo: 1}}", "tenants.acme.typo"),
        ("tenants: {'a b': {}}", "tenants.a b"),
        (f"keys: [{STRAY_KEY}]", "tenant x"),
        ("keys: [", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError) as refused:
        read_keys(file)

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_that_no_tenant_can_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tenant 'a tenant': use a letter"):
        add_key(tmp_path / "keys.yaml", "a tenant", frozenset({Scope.GENERATE}), {})


def test_keys_are_added_listed_and_revoked_from_the_command_line(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")

    added = mull("keys", "add", "acme", "--file", file, "--scopes", "generate,admin", "--max-streams", "4")
    key = added.stdout.strip()
    listed = mull("keys", "list", "--file", file)
    revoked = mull("keys", "revoke", key.split("-")[1], "--file", file)
    gone = mull("keys", "revoke", key.split("-")[1], "--file", file)

    assert KEY_PATTERN.fullmatch(key), added
    assert all(word in listed.stdout for word in ("acme", key.split("-")[1], "admin", "generate", "max-streams 4"))
    assert key.split("-", 2)[2] not in listed.stdout + listed.stderr + added.stderr
    assert (revoked.returncode, gone.returncode) == (0, 2)
    assert "no key" in gone.stderr
