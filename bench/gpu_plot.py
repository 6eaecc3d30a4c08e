"""The figures of `bench.gpu` as a picture beside its JSON: shares of the ceilings, and what clients get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

INCHES_PER_BAR = 0.16


def draw(results: Path) -> Path:
    """Writes it as PNG, named as the file; parts that were not measured say so."""
    found: dict[str, Any] = json.loads(results.read_text())
    panels = [_kernels(found), _steps(found), _alone(found), _served(found)]
    most = max(len(bars) for _, bars in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(26, max(6.0, INCHES_PER_BAR * most)), layout="constrained")
    for place, (title, bars) in zip(axes, panels, strict=True):
        _bars(place, title, bars, most)
    where = found["machine"]["gpu"] or "no GPU: tiny sizes, which say nothing about speed"
    used = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    figure.suptitle(f"mull, {where}; {found['machine']['date']}; {used}")
    picture = results.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


Bars = list[tuple[str, float]]


def _kernels(found: dict[str, Any]) -> tuple[str, Bars]:
    rows = [row for row in found.get("kernels", []) if "share_of_ceiling" in row]
    return "share of the ceiling", [(row["case"], row["share_of_ceiling"]) for row in rows]


def _steps(found: dict[str, Any]) -> tuple[str, Bars]:
    rows = [row for row in found.get("slices", []) if "share_of_floor" in row]
    name = "{model} tp{tp} ×{communication:g}: {streams} at {keys}"
    return "share of a decode step's floor", [(name.format(**row), row["share_of_floor"]) for row in rows]


def _alone(found: dict[str, Any]) -> tuple[str, Bars]:
    """Of the rank by itself: steps in each mode, and reading prompts as steps of a thousand tokens."""
    rows = [row for row in found.get("servings", []) if "mode" in row and "step_s" in row]
    bars = []
    for row in rows:
        what = f"{row['streams']} at {row['keys']}" if "streams" in row else f"a prompt of {row['prompt']}"
        idle = f", idle {row['idle_share']:.0%}" if "idle_share" in row else ""
        bars.append((f"{row['model']} {row['mode']}: {what}{idle}", row["step_s"]["median"] * 1e3))
    return "milliseconds of a step of a rank by itself", bars


def _served(found: dict[str, Any]) -> tuple[str, Bars]:
    rows = [row for row in found.get("servings", []) if "tokens_per_s" in row and "mode" not in row]
    name = "{engine}, {model}: {streams} of {prompt}"
    return "tokens a second, end to end", [(name.format(**row), row["tokens_per_s"]) for row in rows]


def _bars(axes: Any, title: str, bars: Bars, most: int) -> None:
    """In room for the most that a panel has, so that all are equally thick."""
    axes.set_title(title)
    if not bars:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    drawn = axes.barh([name for name, _ in bars], [value for _, value in bars])
    axes.bar_label(drawn, fmt="%.3g", fontsize=6, padding=2)
    axes.margins(x=0.12)
    axes.set_ylim(most - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize=7)
