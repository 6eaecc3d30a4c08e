"""Who asks, and what they may: the API key of a call → its tenant, scopes and what is left of the limits.

Hop 2, before a body is read. The file of keys is looked at with every call and read again when it has changed; one
that cannot be read leaves the keys from before, and is logged once. Without a file everybody may do everything.
Knows neither gRPC nor HTTP.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import ConfigError, Forbidden, Unauthenticated
from cluster.gateway.limits import Allowance
from cluster.gateway.requests import PreparedRequest
from cluster.gateway.served_model import ServedModel
from cluster.keys import KEY_PATTERN, KeyEntry, Scope, TenantLimits, key_hash, read_keys

logger = logging.getLogger(__name__)

NO_HASH = "0" * 64
"""Compared with where there is no such key: the answer takes as long."""


@dataclass(frozen=True)
class Caller:
    """Who a call is from."""

    tenant: str
    """Empty where no keys are asked for."""
    scopes: frozenset[Scope]
    allowance: Allowance

    def check_scope(self, scope: Scope) -> None:
        """Raises Forbidden."""
        if scope not in self.scopes:
            has = ", ".join(sorted(self.scopes))
            raise Forbidden(f"this key is for {has}, and this call needs {scope}; use a key with that scope")

    def apply(self, request: PreparedRequest, model: ServedModel) -> PreparedRequest:
        """The request as it runs for this tenant: within its limits, and apart from the caches of others."""
        limits = self.allowance.limits
        budget, priority = request.thinking_budget, request.priority
        close_ids = request.close_thinking_ids
        if limits.max_thinking_budget is not None and model.tags.close_id is not None:
            budget = limits.max_thinking_budget if budget is None else min(budget, limits.max_thinking_budget)
            close_ids = model.close_at_once_ids if budget == 0 else model.close_ids
        if limits.max_priority is not None:
            priority = min(priority, limits.max_priority) if request.has_priority else limits.max_priority
        return replace(
            request,
            tenant=self.tenant,
            cache_salt=self.tenant,
            thinking_budget=budget,
            close_thinking_ids=close_ids,
            priority=priority,
        )


class Access:
    """The keys of one gateway."""

    def __init__(
        self,
        keys_file: Path | None,
        clock: Callable[[], float] = time.monotonic,
        on_refused: Callable[[str], object] = lambda _reason: None,
        on_tenants: Callable[[Iterable[str]], object] = lambda _names: None,
    ) -> None:
        """`on_refused` is told why a call was not let in: unauthenticated, forbidden, or which limit it was.
        `on_tenants` gets the names of all who may ask, again when they change; without keys it is an empty one.

        Raises ConfigError for a file that cannot be read: a gateway must not start without its keys.
        """
        self._file = keys_file
        self._clock = clock
        self._on_refused = on_refused
        self._anyone = Caller("", frozenset(Scope), Allowance("", TenantLimits(), clock, on_refused))
        self._keys: dict[str, KeyEntry] = {}
        self._allowances: dict[str, Allowance] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._on_tenants = on_tenants
        if keys_file is None:
            on_tenants([""])
        else:
            self._stamp = _stamp(keys_file)
            self._read(keys_file)

    @property
    def asks_for_keys(self) -> bool:
        return self._file is not None

    def admit(self, authorization: str | None, scope: Scope | None) -> Caller:
        """Who asks, if they may; None: any key will do. Raises Unauthenticated or Forbidden."""
        try:
            caller = self.caller(authorization)
            if scope is not None:
                caller.check_scope(scope)
        except (Unauthenticated, Forbidden) as error:
            self._on_refused(type(error).__name__.lower())
            raise
        return caller

    def caller(self, authorization: str | None) -> Caller:
        """Whose key the value of an `authorization` header is. Raises Unauthenticated."""
        if self._file is None:
            return self._anyone
        self._look(self._file)
        if authorization is None:
            raise Unauthenticated("no API key; send it as `authorization: Bearer KEY`")
        kind, _, key = authorization.strip().partition(" ")
        found = KEY_PATTERN.fullmatch(key.strip()) if kind.lower() == "bearer" else None
        entry = None if found is None else self._keys.get(found[1])
        is_right = hmac.compare_digest(key_hash(key.strip()), NO_HASH if entry is None else entry.sha256)
        if entry is None or not is_right:
            raise Unauthenticated("the API key is unknown or was revoked; ask for a new one")
        return Caller(entry.tenant, entry.scopes, self._allowances[entry.tenant])

    def _look(self, file: Path) -> None:
        stamp = _stamp(file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._read(file)
        except ConfigError as error:
            logger.error("%s; the keys from before stay in use", error)

    def _read(self, file: Path) -> None:
        read = read_keys(file)
        for tenant, limits in read.tenants.items():
            if (known := self._allowances.get(tenant)) is None:
                self._allowances[tenant] = Allowance(tenant, limits, self._clock, self._on_refused)
            elif known.limits != limits:
                known.change_limits(limits)
        for tenant in self._allowances.keys() - read.tenants.keys():
            del self._allowances[tenant]
        self._keys = {key.id: key for key in read.keys}
        self._on_tenants(self._allowances)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
