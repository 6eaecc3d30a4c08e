"""The flags of `mull plan` for what may happen, and for fleets."""

from __future__ import annotations

import argparse

from cluster.errors import ConfigError
from cluster.planner.cell import Scenario
from cluster.planner.layouts import Candidate
from cluster.planner.load import Load, TraceLoad
from cluster.planner.quantities import parse_duration_s
from cluster.planner.upsets import Kind, Upset

_KINDS: tuple[Kind, ...] = ("lose-rank", "silent-rank", "lose-router", "double-load", "rolling-update")
_FLEET = ("copies", "max_copies", "gateways", "cells", "tenants")
_DAY_S = 86400.0
_BEHIND = 1800.0
"""Seconds that are looked at behind the last thing that happens."""
_BURSTS_S = 1200.0
"""Four of them."""


def add_scenario_flags(parser: argparse.ArgumentParser) -> None:
    upsets = parser.add_argument_group("what if", "happens to the best layout under the load; times as 10m; repeatable")
    words: dict[str, str] = {
        "lose-rank": "the process of a rank ends then",
        "silent-rank": "it stands still, and is noticed after router.step_timeout_s (60 s)",
        "lose-router": "the process of a Router ends",
        "double-load": "twice as many requests come from then on",
        "rolling-update": "all copies are replaced in place, a few at a time",
    }
    for kind in _KINDS:
        upsets.add_argument(f"--{kind}", action="append", default=[], metavar="TIME", help=words[kind])
    upsets.add_argument(
        "--for",
        dest="duration",
        metavar="TIME",
        help="how long to look; default half an hour behind the last of those, or a day, or four bursts",
    )
    fleet = parser.add_argument_group(
        "fleet", "many copies over time, behind gateways; --for, --max-copies or --gateways asks for it, with a load"
    )
    fleet.add_argument("--copies", type=int, help="so many copies share the --gpus")
    fleet.add_argument("--max-copies", type=int, help="autoscaling from --copies up to so many, on more GPUs")
    fleet.add_argument(
        "--node-start", metavar="TIME", help="until a node for another copy is up (default 5m; 0s: nodes stand ready)"
    )
    fleet.add_argument("--gateways", type=int, help="default: as many as the load needs")
    fleet.add_argument(
        "--cells", type=int, help="installations of their own that share copies, gateways and load (default 1)"
    )
    fleet.add_argument("--tenants", type=int, help="that share the load unevenly (Zipf), each with its own prefix")
    fleet.add_argument("--day", help="of --pattern diurnal: how long a day is (default 1d); shorter is quicker")


def scenario_of(args: argparse.Namespace, load: Load | None) -> Scenario | None:
    """None where nothing happens. Raises ConfigError."""
    upsets = [
        Upset(time_s=parse_duration_s(text), kind=kind)
        for kind in _KINDS
        for text in getattr(args, kind.replace("-", "_"))
    ]
    if not upsets and all(getattr(args, name) is None for name in ("duration", "max_copies", "gateways", "cells")):
        return None
    _check(args, load, upsets)
    duration_s = parse_duration_s(args.duration) if args.duration else _default_s(args, load, upsets)
    late = [upset for upset in upsets if upset.time_s >= duration_s]
    if late:
        raise ConfigError(f"--{late[0].kind} {late[0].time_s:g}s is not within --for {duration_s:g}s; look longer")
    return Scenario(
        duration_s=duration_s,
        upsets=sorted(upsets, key=lambda upset: upset.time_s),
        max_copies=args.max_copies,
        num_gateways=args.gateways,
        num_cells=args.cells or 1,
    )


def _check(args: argparse.Namespace, load: Load | None, upsets: list[Upset]) -> None:
    asked = f"--{upsets[0].kind}" if upsets else "a fleet"
    if load is None:
        raise ConfigError(f"{asked} needs a load; give --rate, or --load FILE")
    for name in _FLEET:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if args.node_start is not None and args.max_copies is None:
        raise ConfigError("--node-start is of copies that autoscaling adds; give --max-copies, or leave it out")
    if args.max_copies is not None and args.copies is not None and args.max_copies < args.copies:
        raise ConfigError(f"--max-copies {args.max_copies} is below --copies {args.copies}; raise it")
    for name, count in (("copies", args.copies), ("max_copies", args.max_copies), ("gateways", args.gateways)):
        if args.cells is not None and count is not None and count % args.cells:
            raise ConfigError(
                f"--{name.replace('_', '-')} {count} is not divisible by --cells {args.cells}; change one"
            )
    if args.cells is not None and isinstance(load, TraceLoad) and args.cells > len(load.trace):
        raise ConfigError(f"--cells {args.cells}: the trace has {len(load.trace)} requests; take fewer cells")
    doubled = sum(upset.kind == "double-load" for upset in upsets)
    if doubled > 1 or (doubled and isinstance(load, TraceLoad)):
        raise ConfigError("--double-load: once, and of a load that is drawn (--rate), not of a trace")


def check_fleet(scenario: Scenario, best: Candidate) -> None:
    """Whether it suits the copies of the layout that was found to be the best. Raises ConfigError."""
    if scenario.max_copies is not None and scenario.max_copies < best.copies:
        raise ConfigError(
            f"--max-copies {scenario.max_copies} is below the {best.copies} copies of {best}, the best layout; raise "
            "it, or give --copies"
        )
    if best.copies % scenario.num_cells:
        raise ConfigError(
            f"the {best.copies} copies of {best}, the best layout, are not divisible by --cells {scenario.num_cells}; "
            "change it, or give --copies"
        )


def _default_s(args: argparse.Namespace, load: Load | None, upsets: list[Upset]) -> float:
    last_s = max((upset.time_s for upset in upsets), default=0.0)
    match load:
        case TraceLoad():
            return max(load.trace[-1].time_s, last_s) + _BEHIND
        case _ if args.pattern == "diurnal":
            return max(day_s(args), last_s + _BEHIND)
        case _ if args.pattern == "bursty":
            return max(_BURSTS_S, last_s + _BEHIND) if upsets else _BURSTS_S
        case _:
            return last_s + _BEHIND


def day_s(args: argparse.Namespace) -> float:
    return parse_duration_s(args.day) if args.day else _DAY_S
