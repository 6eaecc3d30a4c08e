"""mull plan: what fits, how fast it is, what to run. Flags in, tables or JSON out."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cluster.errors import ConfigError
from cluster.planner.devices import find_device, known_devices, published_kernels
from cluster.planner.layouts import Limits
from cluster.planner.models import find_model, known_models
from cluster.planner.quantities import parse_count
from cluster.planner.survey import survey


def add_plan_command(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(known_models())
    parser.add_argument("model", metavar="MODEL", help=f"checkpoint directory, config.json, or one of {known}")
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(known_devices())} (default h200)")
    parser.add_argument("--gpus", type=int, default=8, help="how many of them, in all (default 8)")
    parser.add_argument("--context", help="prompt plus output that must fit, as 32k or 256Ki; default: the model's")
    parser.add_argument(
        "--max-num-seqs", type=int, default=256, help="sequences of a group that run at once (default 256)"
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=4096, help="tokens of a group's step (default 4096)"
    )
    parser.add_argument(
        "--redundant-experts", type=int, default=0, help="replicas of hot experts in a layer, over all ranks"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_plan)


def _plan(args: argparse.Namespace) -> int:
    model = find_model(args.model)
    device = find_device(args.gpu)
    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: give 1 or more")
    rows = survey(
        model.config,
        device,
        published_kernels(),
        args.gpus,
        _limits(args, model.config.max_position_embeddings),
        args.redundant_experts,
    )
    if args.json:
        out: dict[str, Any] = {"model": model.name, "gpu": device.name, "gpus": args.gpus}
        print(json.dumps(out | {"layouts": [row.as_json() for row in rows]}, indent=2))
        return 0
    from rich.console import Console

    from cluster.planner.tables import problem_lines, survey_table

    console = Console()
    console.print(f"{model.name} on {args.gpus} × {device.title}\n")
    console.print(survey_table(rows))
    if problems := problem_lines(rows):
        console.print("\nDoes not fit:", *(f"  {line}" for line in problems), sep="\n", highlight=False)
    return 0


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
