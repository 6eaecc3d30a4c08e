"""One token of each row's candidates: what the cuts leave, and noise that depends on (seed, position, token) alone.

Hop 9. Nothing here looks at a value: a draw can be part of a captured step. B rows, C candidates (likeliest first).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.candidates import Candidates
from workers.kernels.triton.choice import has_triton
from workers.noise import gumbel

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MOST_AT_ONCE = 256
"""Candidates of a row that a GPU's kernel takes."""


@dataclass(frozen=True)
class DrawRules:
    """How each row is drawn, on the device."""

    top_ks_B1: Tensor
    temperatures_B1: Tensor
    top_ps_B1: Tensor
    """Infinity where all may stay: rounding must not cut the tail."""
    min_ps_B1: Tensor
    keys_B: Tensor


@dataclass(frozen=True)
class RowRules:
    """The same on the host."""

    top_ks: Ints
    temperatures: Floats
    top_ps: Floats
    min_ps: Floats
    keys: Ints

    @property
    def cut_more_than_top_k(self) -> bool:
        """Whether a row has a top_p or a min_p."""
        return bool(np.isfinite(self.top_ps).any() or (self.min_ps > 0).any())

    def as_ints(self) -> Ints:
        """[B, 5]: the bits of all, so that they travel together."""
        floats = (values.view(np.int64) for values in (self.temperatures, self.top_ps, self.min_ps))
        return np.stack([self.top_ks, *floats, self.keys], axis=1)


def rules_of(ints_BF: Tensor) -> DrawRules:
    """What `RowRules.as_ints` made, on the device."""
    top_ks_B, temperatures_B, top_ps_B, min_ps_B, keys_B = ints_BF.t().contiguous().unbind()
    temperatures_B1, top_ps_B1, min_ps_B1 = (
        bits_B.view(torch.float64).unsqueeze(1) for bits_B in (temperatures_B, top_ps_B, min_ps_B)
    )
    return DrawRules(top_ks_B.unsqueeze(1), temperatures_B1, top_ps_B1, min_ps_B1, keys_B)


class Drawn(NamedTuple):
    """One candidate of each row."""

    chosen_B1: Tensor
    """Its index."""
    token_ids_B: Tensor


def drawn_from(
    candidates: Candidates, ints_BF: Tensor, choose: Callable[[Candidates, DrawRules], Tensor] | None = None
) -> Drawn:
    """By the rules that `RowRules.as_ints` made, on the device. `choose`: a shorter way of torch's that suffices."""
    token_ids_BC = candidates.token_ids_BC
    if has_triton(ints_BF.device.type) and token_ids_BC.shape[1] <= MOST_AT_ONCE:
        from workers.kernels.triton.draw import draw as draw_at_once

        return Drawn(*draw_at_once(token_ids_BC, candidates.logits_BC, ints_BF))
    chosen_B1 = (choose or draw)(candidates, rules_of(ints_BF))
    return Drawn(chosen_B1, token_ids_BC.gather(1, chosen_B1).squeeze(1))


def draw(candidates: Candidates, rules: DrawRules) -> Tensor:
    """Index of the drawn candidate of each row, [B, 1], under all cuts."""
    scaled_BC = _scaled(candidates, rules)
    kept_BC = _first(scaled_BC, rules)
    probs_BC = scaled_BC.masked_fill(~kept_BC, -torch.inf).softmax(dim=-1)
    before_BC = probs_BC.cumsum(dim=-1) - probs_BC
    kept_BC &= before_BC < rules.top_ps_B1
    kept_BC &= probs_BC >= probs_BC[:, :1] * rules.min_ps_B1
    kept_BC[:, 0] = True  # the likeliest always stays
    return _noisiest(scaled_BC, kept_BC, candidates, rules)


def draw_of_top_k(candidates: Candidates, rules: DrawRules) -> Tensor:
    """The same where no row has a top_p or a min_p: without their sums."""
    scaled_BC = _scaled(candidates, rules)
    return _noisiest(scaled_BC, _first(scaled_BC, rules), candidates, rules)


def _scaled(candidates: Candidates, rules: DrawRules) -> Tensor:
    return candidates.logits_BC.double() / rules.temperatures_B1


def _first(scaled_BC: Tensor, rules: DrawRules) -> Tensor:
    ranks_C = torch.arange(scaled_BC.shape[1], device=scaled_BC.device)
    return ranks_C < rules.top_ks_B1


def _noisiest(scaled_BC: Tensor, kept_BC: Tensor, candidates: Candidates, rules: DrawRules) -> Tensor:
    noisy_BC = scaled_BC + gumbel(rules.keys_B, candidates.token_ids_BC)
    return noisy_BC.masked_fill_(~kept_BC, -torch.inf).argmax(dim=-1, keepdim=True)
