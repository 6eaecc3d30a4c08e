"""mull plan: what fits, how fast it is, what to run. Flags in, tables or JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.planner import machine_code
from cluster.planner.calibration import fit_costs, read_measured
from cluster.planner.devices import Device, find_device, known_devices, measured_cpu, published_kernels
from cluster.planner.layouts import Limits
from cluster.planner.load import DrawnLoad, Load, TraceLoad
from cluster.planner.models import PlannedModel, find_model, known_models
from cluster.planner.operations import described_operations, known_operations
from cluster.planner.quantities import parse_count, parse_duration_s, parse_rate_per_s
from cluster.planner.recommendation import helm_values, serve_flags
from cluster.planner.scenario import Course, follow
from cluster.planner.scenario_flags import add_scenario_flags, check_fleet, day_s, scenario_of
from cluster.planner.setting import Setting
from cluster.planner.survey import SHOWN_CONTEXT, Row, survey, without_lesser
from cluster.planner.trial import Trial, shortlist, try_out
from cluster.planner.workload import Lengths, read_trace
from workers.config import ModelConfig

_DEFAULTS = {"prompt": "2k", "thinking": "8k", "answer": "1k"}


def add_plan_command(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(known_models())
    parser.add_argument("model", metavar="MODEL", help=f"checkpoint directory, config.json, or one of {known}")
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(known_devices())} (default h200)")
    parser.add_argument("--gpus", type=int, help="how many of them, in all (default 8)")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="plan for the CPU that `bench.plan_validation --live` measured"
    )
    parser.add_argument("--context", help="prompt plus output that must fit, as 32k or 256Ki; default: the model's")
    parser.add_argument("--all", action="store_true", help="show layouts that are no better than others, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report to this file, too")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-num-seqs", type=int, default=256, help="sequences of a group at once (default 256)")
    engine.add_argument("--max-num-batched-tokens", type=int, default=4096, help="of a group's step (default 4096)")
    engine.add_argument("--redundant-experts", type=int, default=0, help="replicas of hot experts in a layer")
    engine.add_argument(
        "--expert-skew", type=float, default=0.0, help="Zipf exponent of the experts' loads (default 0)"
    )
    load = parser.add_argument_group("load", "what the best layouts are simulated with")
    load.add_argument("--rate", help="requests that come, as 2/s or 90/min")
    load.add_argument("--load", type=Path, metavar="FILE", help="a trace instead: one JSON object a line")
    load.add_argument("--prompt", help="mean tokens of a prompt (default 2k)")
    load.add_argument("--thinking", help="of its thoughts (default 8k)")
    load.add_argument("--answer", help="of its answer (default 1k)")
    load.add_argument("--shared-prompt", help="tokens that all prompts begin with (default none)")
    load.add_argument("--pattern", choices=("steady", "diurnal", "bursty"), default="steady")
    load.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures (default 0)")
    load.add_argument("--best", type=int, default=4, help="how many layouts are simulated (default 4)")
    load.add_argument(
        "--compile",
        action="store_true",
        help="simulate with machine code, up to three times as fast: compiles for a minute, once",
    )
    add_scenario_flags(parser)
    parser.set_defaults(command=_plan)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that was found."""

    model: PlannedModel
    device: Device
    gpus: int
    limits: Limits
    setting: Setting
    rows: list[Row]
    load: Load | None
    trials: list[Trial]
    """The best first; empty without a load."""
    course: Course | None = None
    """Of the best, where something happens to it, or it is a fleet."""

    @property
    def flags(self) -> str | None:
        if not self.trials:
            return None
        fit = self.trials[0].fit
        return serve_flags(self.model, fit.candidate, fit.limits, self.device, self.setting.redundant_experts)

    @property
    def values(self) -> str | None:
        if not self.trials:
            return None
        fit = self.trials[0].fit
        return helm_values(self.model, fit.candidate, fit.limits, self.device, self.setting.redundant_experts)

    def as_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"model": self.model.name, "gpu": self.device.name, "gpus": self.gpus}
        out["limits"] = self.limits.as_json()
        out["device"] = self.device.as_json()
        costs = self.setting.costs
        out["kernels"] = self.setting.kernels.as_json() if costs is None else costs.as_json()
        out["shown_context"] = min(SHOWN_CONTEXT, self.limits.context)
        out["layouts"] = [row.as_json() for row in self.rows]
        if self.load is not None:
            out["load"] = self.load.as_json()
        if self.load is not None and self.trials:
            from cluster.planner.tables import verdict

            out["verdict"] = verdict(self.trials, self.load)
            out["simulated"] = [trial.as_json() for trial in self.trials]
            out["recommendation"] = {"flags": self.flags, "helm_values": self.values}
        if self.course is not None:
            out["operations"] = described_operations()
            out["what_if" if self.course.scenario.upsets else "fleet"] = self.course.as_json()
        return out


def make_plan(args: argparse.Namespace) -> Plan:
    """Raises ConfigError, CheckpointError."""
    model = find_model(args.model)
    setting = _setting(args, model.config)
    gpus = _gpus(args)
    limits = _limits(args, model.config.max_position_embeddings)
    load = _load(args, limits.context)
    scenario = scenario_of(args, load)
    rows = survey(setting, gpus, limits)
    if not args.all:
        rows = without_lesser(rows)
    if args.copies is not None:
        rows = [row for row in rows if row.fit.candidate.copies == args.copies]
        if not rows:
            raise ConfigError(f"--gpus {gpus} are not divisible by --copies {args.copies}; give a multiple of it")
    fits = [row.fit for row in rows if row.fit.problem is None]
    trials: list[Trial] = []
    if load is not None and fits:
        trials = try_out(setting, shortlist(setting, fits, load, args.best), load)
    course = None
    if scenario is not None and load is not None and trials:
        check_fleet(scenario, trials[0].fit.candidate)
        node_s = None if args.node_start is None else parse_duration_s(args.node_start)
        course = follow(setting, trials[0].fit, load, scenario, known_operations(node_s=node_s))
    return Plan(
        model=model,
        device=setting.device,
        gpus=gpus,
        limits=limits,
        setting=setting,
        rows=rows,
        load=load,
        trials=trials,
        course=course,
    )


def _plan(args: argparse.Namespace) -> int:
    if args.compile and not machine_code.is_in_use():
        machine_code.begin_again()
    plan = make_plan(args)
    if args.json:
        json.dump(plan.as_json(), sys.stdout, indent=2)
        print()
    else:
        from cluster.planner.tables import show

        show(plan)
    if args.html is not None:
        _write_report(plan, args.html)
    return 0


def _write_report(plan: Plan, file: Path) -> None:
    from cluster.planner.report.page import render

    try:
        file.write_text(render(plan.as_json()), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--html {file}: cannot be written ({error}); name a file in a directory that exists"
        ) from error


def _setting(args: argparse.Namespace, model: ModelConfig) -> Setting:
    if args.calibrate is None:
        device, costs = find_device(args.gpu), None
    else:
        measured = read_measured(args.calibrate)
        device, costs = measured_cpu(measured.memory_gib), fit_costs(model, measured.engine, measured.runs)
    return Setting(
        model=model,
        device=device,
        kernels=published_kernels(),
        costs=costs,
        redundant_experts=args.redundant_experts,
        expert_skew=args.expert_skew,
    )


def _gpus(args: argparse.Namespace) -> int:
    if args.calibrate is not None:
        if args.gpus not in (None, 1):
            raise ConfigError(f"--gpus {args.gpus}: what was measured is one rank; leave it out with --calibrate")
        return 1
    gpus: int = 8 if args.gpus is None else args.gpus
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: give 1 or more")
    return gpus


def _limits(args: argparse.Namespace, made_for: int) -> Limits:
    context = parse_count(args.context) if args.context else made_for
    if context > made_for:
        raise ConfigError(f"--context {context:,} is over the {made_for:,} tokens that the model was made for")
    if args.max_num_batched_tokens < args.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {args.max_num_batched_tokens} is below --max-num-seqs {args.max_num_seqs}; "
            "raise the one or lower the other"
        )
    return Limits(max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens, context=context)


def _load(args: argparse.Namespace, context: int) -> Load | None:
    shared = parse_count(args.shared_prompt) if args.shared_prompt else 0
    if args.load is not None:
        if args.rate is not None:
            raise ConfigError("--rate and --load: a trace has its own times; leave one of them out")
        trace = tuple(read_trace(args.load))
        if long := sum(one.prompt_tokens + one.output_tokens > context for one in trace):
            most = max(one.prompt_tokens + one.output_tokens for one in trace)
            raise ConfigError(
                f"{args.load}: {long:,} of {len(trace):,} requests are longer than the context of {context:,} tokens, "
                f"the longest has {most:,}; raise --context, or leave them out"
            )
        return TraceLoad(trace=trace, shared_prompt_tokens=shared)
    if args.rate is None:
        return None
    lengths = Lengths(**{name: _tokens(getattr(args, name) or default) for name, default in _DEFAULTS.items()})
    if lengths.total > context:
        raise ConfigError(
            f"prompt, thoughts and answer are {lengths.total:,} tokens together, the context is {context:,}; shorten "
            "them, or raise --context"
        )
    return DrawnLoad(
        rate_per_s=parse_rate_per_s(args.rate),
        lengths=lengths,
        pattern=args.pattern,
        tenants=args.tenants or 1,
        day_s=day_s(args),
        seed=args.seed,
        shared_prompt_tokens=shared,
    )


def _tokens(text: str) -> int:
    return 0 if text.strip() == "0" else parse_count(text)
