"""mull keys add | list | revoke."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cluster.errors import ConfigError
from cluster.keys import KeyEntry, KeysFile, Scope, add_key, read_keys, revoke_key

_LIMITS: dict[str, tuple[type, str]] = {
    "max_requests_per_s": (float, "requests a second"),
    "max_streams": (int, "generations under way"),
    "max_prompt_tokens_per_min": (int, "prompt tokens a minute"),
    "max_output_tokens_per_min": (int, "generated tokens a minute"),
    "max_thinking_budget": (int, "thinking tokens of a request"),
    "max_priority": (int, "priority of a request"),
}


def add_keys_command(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    add = actions.add_parser("add", help="make a key and print it: it is shown this once")
    add.add_argument("tenant", help="whose it is: limits and caches are the tenant's, for all its keys")
    add.add_argument("--scopes", default="generate", help="generate, admin or both with a comma (default generate)")
    for name, (kind, text) in _LIMITS.items():
        add.add_argument("--" + name.replace("_", "-"), type=kind, help=f"of the tenant: {text}, at most")
    add.set_defaults(command=_add)
    listing = actions.add_parser("list", help="tenants and keys, without the keys themselves")
    listing.set_defaults(command=_list)
    revoke = actions.add_parser("revoke", help="take a key out: nothing starts with it any more")
    revoke.add_argument("id", help="the second part of the key, as the list shows it")
    revoke.set_defaults(command=_revoke)
    for action in (add, listing, revoke):
        action.add_argument("--file", type=Path, required=True, help="what `mull serve --keys-file` reads")


def _add(args: argparse.Namespace) -> int:
    names = [name.strip() for name in args.scopes.split(",")]
    if wrong := [name for name in names if name not in list(Scope)]:
        raise ConfigError(f"--scopes: {wrong[0]!r} is none; give {' or '.join(Scope)}, or both with a comma")
    limits = {name: getattr(args, name) for name in _LIMITS if getattr(args, name) is not None}
    key = add_key(args.file, args.tenant, frozenset(map(Scope, names)), limits)
    print("the key is in no file: keep it now", file=sys.stderr)
    print(key)
    return 0


def _list(args: argparse.Namespace) -> int:
    keys = read_keys(args.file)
    for tenant in keys.tenants:
        print(f"{tenant}: {_limit_words(keys, tenant)}")
        for key in keys.keys:
            if key.tenant == tenant:
                print(f"  {_key_words(key)}")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    key = revoke_key(args.file, args.id)
    print(f"revoked: {_key_words(key)} of {key.tenant}; gateways that read the file know at once", file=sys.stderr)
    return 0


def _limit_words(keys: KeysFile, tenant: str) -> str:
    limits = keys.tenants[tenant].model_dump(exclude_none=True)
    return " · ".join(f"{name.replace('_', '-')} {value:g}" for name, value in limits.items()) or "no limits"


def _key_words(key: KeyEntry) -> str:
    return f"{key.id} · {', '.join(sorted(key.scopes))} · made {key.created:%Y-%m-%d %H:%M}"
