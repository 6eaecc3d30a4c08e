"""KV cells that no 32-bit number can count, in the GPU's kernels: the same bits as near the pool's beginning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from triton.runtime.interpreter import GridExecutor

from tests.kernels_triton.values import DEVICE, normal
from tests.workers.sparse import sparse_zeros
from workers.kernels.prefill_attention import Chunks
from workers.kernels.triton.decode_attention import decode_attention
from workers.kernels.triton.prefill_attention import prefill_attention
from workers.kernels.triton.qk_norm_rope import qk_norm_rope_store

NUM_NEAR, BLOCK_SIZE, HEAD_DIM = 8, 16, 128
NUM_FAR = 2**31 // (BLOCK_SIZE * HEAD_DIM) + NUM_NEAR
TABLES = torch.tensor([[5, 0, 7], [2, 6, 1]])


@pytest.fixture
def far_pool(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Its last blocks begin behind 2^31 elements of its first head."""
    # The interpreter copies arguments back even where they never moved: it would fill all of the pool.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    shape = (2, NUM_FAR, BLOCK_SIZE, HEAD_DIM)
    far = sparse_zeros(*shape) if DEVICE.type == "cpu" else torch.zeros(shape, device=DEVICE)
    far[:, -NUM_NEAR:] = near_pool()
    return far


def near_pool() -> Tensor:
    return normal(3, 2, NUM_NEAR, BLOCK_SIZE, HEAD_DIM)


def test_decodes_read_them(far_pool: Tensor) -> None:
    q, num_keys = normal(1, 2, 4, HEAD_DIM), torch.tensor([48, 17], device=DEVICE)
    near = decode_attention(q, near_pool(), TABLES.to(DEVICE), num_keys, 48)
    far = decode_attention(q, far_pool, (TABLES + NUM_FAR - NUM_NEAR).to(DEVICE), num_keys, 48)
    assert torch.equal(far, near)


def test_chunks_read_them(far_pool: Tensor) -> None:
    q, starts, sizes = normal(1, 12, 4, HEAD_DIM), np.array([40, 0]), [8, 4]

    def attend(pool: Tensor, tables: Tensor) -> Tensor:
        chunks = Chunks(tables_CM=tables.to(DEVICE), starts=starts, sizes=np.array(sizes))
        return prefill_attention(q, pool, chunks.tables_CM, chunks.bounds_3C, sizes)

    assert torch.equal(attend(far_pool, TABLES + NUM_FAR - NUM_NEAR), attend(near_pool(), TABLES))


def test_keys_are_written_to_them(far_pool: Tensor) -> None:
    near, cells = near_pool(), torch.tensor([3, 120, 40], device=DEVICE)
    norms, rotations = normal(4, 5, HEAD_DIM), normal(5, 3, 2, HEAD_DIM)
    for pool, at in ((near, cells), (far_pool, cells + (NUM_FAR - NUM_NEAR) * BLOCK_SIZE)):
        qk_norm_rope_store(normal(1, 3, 6, HEAD_DIM), norms, 1e-6, rotations, pool, at)
    assert torch.equal(far_pool[:, -NUM_NEAR:], near)
    assert not far_pool[:, :NUM_NEAR].any(), "something wrapped around to the pool's beginning"
