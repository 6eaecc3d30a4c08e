"""The figures of `bench.gpu` as a picture beside its JSON: shares of the ceilings, and what clients get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def draw(results: Path) -> Path:
    """Writes it as PNG, named as the file; parts that were not measured stay empty."""
    found: dict[str, Any] = json.loads(results.read_text())
    on_gpu = found["machine"]["gpu"] is not None
    figure, (shares, steps, tokens) = plt.subplots(1, 3, figsize=(18, 6))
    kernels = [row for row in found.get("kernels", []) if "share_of_ceiling" in row]
    _bars(
        shares, [row["case"] for row in kernels], [row["share_of_ceiling"] for row in kernels], "share of the ceiling"
    )
    slices = [row for row in found.get("slices", []) if "share_of_floor" in row]
    names = [
        f"{row['model']} tp{row['tp']} ×{row['communication']:g}: {row['streams']} at {row['keys']}" for row in slices
    ]
    _bars(steps, names, [row["share_of_floor"] for row in slices], "share of a decode step's floor")
    served = [row for row in found.get("servings", []) if "tokens_per_s" in row]
    names = [f"{row['engine']}, {row['model']}: {row['streams']} of {row['prompt']}" for row in served]
    _bars(tokens, names, [row["tokens_per_s"] for row in served], "tokens a second, end to end")
    where = found["machine"]["gpu"] if on_gpu else "no GPU: tiny sizes, which say nothing about speed"
    figure.suptitle(f"mull, {where}")
    figure.tight_layout()
    picture = results.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def _bars(axes: Any, names: list[str], values: list[float], title: str) -> None:
    axes.set_title(title)
    axes.barh(names, values)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
