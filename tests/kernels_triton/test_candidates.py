"""The likeliest tokens, found block by block."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from tests.kernels_triton.values import DEVICE, normal
from workers.candidates import _candidates, _keys
from workers.kernels.triton import candidates
from workers.kernels.triton.candidates import likeliest_keys


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
