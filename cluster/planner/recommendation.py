"""What to run: the flags and the Helm values of a candidate."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from cluster.planner.devices import Device
from cluster.planner.layouts import Candidate, Limits
from cluster.planner.models import PlannedModel


def serve_flags(model: PlannedModel, candidate: Candidate, limits: Limits, device: Device, redundant: int) -> str:
    """The command for one machine."""
    layout = candidate.layout
    flags: dict[str, Any] = {"model": model.path, "device": device.kind, "tp": layout.tp}
    flags |= {name: size for name, size in (("dp", layout.dp), ("expert-tp", layout.expert_tp)) if size > 1}
    if redundant:
        flags["redundant-experts"] = redundant
    if candidate.copies > 1:
        flags["copies"] = candidate.copies
    flags |= {
        "max-model-len": limits.context,
        "max-num-seqs": limits.max_num_seqs,
        "max-num-batched-tokens": limits.max_num_batched_tokens,
    }
    return "mull serve " + " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())


def helm_values(model: PlannedModel, candidate: Candidate, limits: Limits, device: Device, redundant: int) -> str:
    """Values for the chart, as YAML; the whole layout, so that nothing of a preset below it stays."""
    layout = candidate.layout
    ranks = min(layout.world_size, device.ranks_per_node)
    parts = {
        "device": device.kind,
        "tp": layout.tp,
        "dp": layout.dp,
        "expertTp": layout.expert_tp,
        "redundantExperts": redundant,
        "copies": candidate.copies,
        "ranksPerNode": ranks,
        "gpus": candidate.copies * layout.world_size,
    }
    engine = {
        "max_model_len": limits.context,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
    }
    values = {"layout": parts, "model": {"name": model.name}, "config": {"engine": engine}}
    return str(yaml.safe_dump(values, sort_keys=False, default_flow_style=False))
