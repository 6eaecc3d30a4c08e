"""The file of API keys: tenants with their limits, and keys of which only hashes are kept.

`mull keys` writes it, gateways read it. A key is 256 random bits, so that a plain SHA-256 of it tells nothing; the
file still belongs to its owner alone. Knows nothing of requests.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cluster.errors import ConfigError

KEY_PATTERN = re.compile(r"mull-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Scope(StrEnum):
    """What a key opens."""

    GENERATE = "generate"
    ADMIN = "admin"
    """AdminService, for the requests of all tenants."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TenantLimits(_Entry):
    """What the requests of a tenant may use of one gateway, all its keys together; None: no limit."""

    max_requests_per_s: float | None = Field(None, gt=0)
    max_streams: int | None = Field(None, ge=1)
    """Generations under way: a request for n counts n."""
    max_prompt_tokens_per_min: int | None = Field(None, ge=1)
    max_output_tokens_per_min: int | None = Field(None, ge=1)
    max_thinking_budget: int | None = Field(None, ge=0)
    """Requests that ask for more, or for none, get this one."""
    max_priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    """Requests that ask for more, or for none, get this one."""


class KeyEntry(_Entry):
    """One key, without the key."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    """Its second part: names it in lists and finds it among the others. No secret."""
    tenant: TenantName
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    created: datetime


class KeysFile(_Entry):
    """All of it."""

    tenants: Mapping[TenantName, TenantLimits] = {}
    keys: tuple[KeyEntry, ...] = ()

    @model_validator(mode="after")
    def _keys_are_of_tenants(self) -> Self:
        ids = [key.id for key in self.keys]
        for key in self.keys:
            if ids.count(key.id) > 1:
                raise ValueError(f"key {key.id} is there {ids.count(key.id)} times; leave one")
            if key.tenant not in self.tenants:
                raise ValueError(f"key {key.id} is of tenant {key.tenant}, which is not among the tenants; add it")
        return self


def key_hash(key: str) -> str:
    """What the file keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(file: Path) -> KeysFile:
    """Raises ConfigError with one line that names the first wrong entry."""
    try:
        values = yaml.safe_load(file.read_text())
        return KeysFile.model_validate({} if values is None else values)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({error})".replace("\n", " ")) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        words = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{file}: {where}: {words}; `mull keys` writes this file".replace(": : ", ": ")) from error


def add_key(file: Path, tenant: str, scopes: frozenset[Scope], limits: Mapping[str, float | int | None]) -> str:
    """Make a key for a tenant and return it: it is in no file. `limits` change those of the tenant that they name.

    Raises ConfigError.
    """
    key = f"mull-{secrets.token_hex(6)}-{secrets.token_urlsafe(32)}"
    entry = {"id": key.split("-")[1], "tenant": tenant, "sha256": key_hash(key), "scopes": scopes}

    def add(old: KeysFile) -> KeysFile:
        before = old.tenants.get(tenant, TenantLimits()).model_dump()
        values = {
            "tenants": {**old.tenants, tenant: {**before, **limits}},
            "keys": [*old.keys, {**entry, "created": datetime.now(UTC).replace(microsecond=0)}],
        }
        try:
            return KeysFile.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "string_pattern_mismatch":
                raise ConfigError(
                    f"tenant {tenant!r}: use a letter or digit, then letters, digits, '.', '_' and '-', at most 64"
                ) from error
            raise ConfigError(f"{first['loc'][-1]}: {first['msg']} (got {first['input']!r})") from error

    _change(file, add)
    return key


def revoke_key(file: Path, key_id: str) -> KeyEntry:
    """Take a key out, and its tenant where it was the last one of it. Raises ConfigError for one that is not there."""
    revoked: list[KeyEntry] = []

    def remove(old: KeysFile) -> KeysFile:
        revoked.extend(key for key in old.keys if key.id == key_id)
        if not revoked:
            raise ConfigError(f"{file}: no key {key_id}; `mull keys list` shows them")
        keys = tuple(key for key in old.keys if key.id != key_id)
        left = {key.tenant for key in keys}
        tenants = {name: limits for name, limits in old.tenants.items() if name in left}
        return KeysFile(tenants=tenants, keys=keys)

    _change(file, remove)
    return revoked[0]


def _change(file: Path, change: Callable[[KeysFile], KeysFile]) -> None:
    """One at a time, and whole or not at all: readers never see half a file."""
    try:
        with _locked(file):
            new = change(read_keys(file) if file.exists() else KeysFile())
            _replace(file, yaml.safe_dump(_plain(new), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); check its directory") from error


def _plain(keys: KeysFile) -> dict[str, object]:
    """Limits that are not set are left out."""
    tenants = {name: limits.model_dump(exclude_none=True) for name, limits in keys.tenants.items()}
    entries = [key.model_dump(mode="json") | {"scopes": sorted(key.scopes)} for key in keys.keys]
    return {"tenants": tenants, "keys": [entry | {"scopes": [str(s) for s in entry["scopes"]]} for entry in entries]}


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """The lock lies beside the file, which is replaced as a whole."""
    lock = os.open(file.with_name(f".{file.name}.lock"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _replace(file: Path, text: str) -> None:
    # mkstemp makes a file that its owner alone may read.
    made, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(made, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
