"""The likeliest tokens, found block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from tests.kernels_triton.values import DEVICE, normal
from workers.candidates import Candidates, _candidates, _keys
from workers.drawing import RowRules, draw, rules_of
from workers.kernels.triton import candidates
from workers.kernels.triton.candidates import likeliest, likeliest_keys
from workers.kernels.triton.draw import draw as draw_at_once


@pytest.mark.parametrize(("width", "count"), [(1, 1), (2500, 1), (100, 20), (150, 3)])
def test_the_likeliest_are_those_of_a_full_sort(width: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "BLOCK", 32)  # so that blocks of blocks are needed
    logits = normal(0, 3, width)
    logits[0, width // 2 :] = logits[0, : width - width // 2].clone()  # equals, near and far
    logits[1, width // 3 :] = -torch.inf
    logits[2, ::2] = -0.0
    ids = torch.arange(width, device=DEVICE)
    want = _candidates(_keys(logits, ids).sort(dim=-1, descending=True).values[:, :count])
    got = _candidates(likeliest_keys(logits, count))
    assert torch.equal(got.token_ids_BC, want.token_ids_BC)
    assert torch.equal(got.logits_BC, want.logits_BC)
    token_ids, values = likeliest(logits, count)
    assert torch.equal(token_ids, want.token_ids_BC)
    assert torch.equal(values, want.logits_BC)


def test_the_likeliest_of_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "BLOCK", 32)
    logits = normal(0, 3, 300)
    logits[:, 150:] = logits[:, :150].clone()
    keys = [
        likeliest_keys(part, 20, first_id) for part, first_id in zip(logits.split(100, 1), (0, 100, 200), strict=True)
    ]
    got, want = likeliest(torch.cat(keys, dim=1), 20), likeliest(logits, 20)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("width", [1, 20, 32, 256])
def test_a_draw_in_one_launch_is_that_of_torch(width: int) -> None:
    num_rows = 40
    token_ids, logits = likeliest(normal(width, num_rows, 700) * 3, width)
    rng = np.random.default_rng(width)
    rules = RowRules(
        top_ks=rng.integers(1, 40, num_rows),
        temperatures=rng.uniform(0.1, 3, num_rows),
        top_ps=np.where(rng.random(num_rows) < 0.5, rng.random(num_rows), np.inf),
        min_ps=np.where(rng.random(num_rows) < 0.5, rng.random(num_rows) / 4, 0.0),
        keys=rng.integers(-(2**63), 2**63 - 1, num_rows),
    )
    ints = torch.from_numpy(rules.as_ints()).to(DEVICE)
    chosen, drawn = draw_at_once(token_ids, logits, ints)
    assert torch.equal(chosen, draw(Candidates(token_ids, logits), rules_of(ints)))
    assert torch.equal(drawn, token_ids.gather(1, chosen).squeeze(1))
    if width > 1:
        assert len(chosen.unique()) > 3, "more than the likeliest is drawn"
