"""A process of its own: compiles for Hopper what steps of all sizes launch, and tells what warming up left out."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.gpu_build import _Absent
from bench.gpu_cases import Inputs
from workers.kernels.prefill_attention import Chunks
from workers.kernels.sums import PartialSums
from workers.kernels.triton import (
    decode_attention,
    experts,
    gate,
    gemm,
    norm,
    ordered_sum,
    prefill_attention,
    qk_norm_rope,
    quantize,
    route,
    spread,
    swiglu,
)
from workers.kernels.triton.spread import Layout
from workers.warm_up import warm_up_sizes

LONGEST = 8192
SERVED = (1, 5, 17, 33, 64, 100, 777, 2049, 4100, 8191)
INPUTS = Inputs.for_build()
WEIGHT, GATE_UP, DOWN = INPUTS.tiles(2560, 4096), INPUTS.tiles(8, 256, 256), INPUTS.tiles(8, 256, 128)
REPLICAS = INPUTS.integers(72, 64, 9), INPUTS.integers(9, 64)
POOL = INPUTS.normal(2, 600, 64, 128)


def launch(num_rows: int) -> None:
    """The kernels whose arguments change with the number of rows."""
    x, wide = INPUTS.normal(num_rows, 4096), INPUTS.normal(num_rows, 256)
    parts = gemm.partial_linear(quantize.quantize(x), WEIGHT)
    product = parts[0] if len(parts) == 1 else PartialSums(parts, x.dtype)
    norm.add_rms_norm_quantize(INPUTS.normal(num_rows, 2560), product, INPUTS.normal(2560), 1e-6)
    gemm.linear(quantize.quantize(x), WEIGHT)
    rotations, cells = INPUTS.normal(num_rows, 2, 128), INPUTS.integers(600 * 64, num_rows)
    rotating = INPUTS.normal(19, 128), 1e-6, rotations, POOL, cells
    if len(parts) == 1:
        qk_norm_rope.qk_norm_rope_store(parts[0].view(num_rows, -1, 128), *rotating)
    else:
        qk_norm_rope.sum_norm_rope_store(parts, x.dtype, *rotating)
    norm.add_rms_norm_quantize(x, x.clone(), INPUTS.normal(4096), 1e-6)
    norm.add_rms_norm_both(x, x.clone(), INPUTS.normal(4096), 1e-6)
    swiglu.swiglu_quantize(INPUTS.normal(1, num_rows, 512), torch.bfloat16)
    experts.apply_experts(wide, INPUTS.integers(64, num_rows, 8), INPUTS.normal(num_rows, 8), GATE_UP, DOWN, 0)
    blocks = -(-num_rows // 64)
    tables, q = torch.arange(blocks).view(1, -1), INPUTS.normal(num_rows, 8, 128)
    chunks = Chunks(tables_CM=tables, starts=np.array([0]), sizes=np.array([num_rows]))
    prefill_attention.prefill_attention(q, POOL, tables, chunks.bounds_3C, [num_rows])
    decode_attention.decode_attention(q[:1], POOL, tables, torch.tensor([num_rows]), num_rows)
    decode_attention.decode_attention_quantize(q[:1], POOL, tables, torch.tensor([num_rows]), num_rows)
    # Experts with replicas; rows where a library's products want them; sums of ranks' parts; prompts of many requests.
    slots, _ = gate.choose_slots(INPUTS.normal(num_rows, 64), 8, *REPLICAS, is_normalized=True)
    routes = route.route(slots, 0, 8)
    for layout in (Layout(routes.starts_e[:-1], num_rows * 8, num_rows * 8), Layout(routes.starts_e[:-1], 8192, 128)):
        spread.spread(quantize.quantize(wide), slots, 0, routes, layout)
    ordered_sum.sum_in_order(INPUTS.normal(8, num_rows * 256), INPUTS.normal(num_rows * 256))
    ones, blocks_CM = np.ones(num_rows, np.int64), torch.zeros(num_rows, 1, dtype=torch.int64)
    prompts = Chunks(tables_CM=blocks_CM, starts=0 * ones, sizes=ones)
    prefill_attention.prefill_attention(q, POOL, blocks_CM, prompts.bounds_3C, ones.tolist())


def main() -> int:
    run, compiled = JITFunction.run, dict[int, Any]()

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **(options | {"warmup": True}))
        compiled[id(kernel)] = kernel
        return kernel

    patch.object(JITFunction, "run", compile_only).start()  # until this process ends
    driver.set_active(_Absent())
    for size in (1, *warm_up_sizes(LONGEST)):  # behind each chunk it decodes
        launch(size)
    known = set(compiled)
    late = []
    for size in SERVED:
        launch(size)
        late += [f"{compiled[key].metadata.name} at {size} rows" for key in compiled.keys() - known]
        known = set(compiled)
    print(f"{len(known)} kernels; compiled while serving: {late or 'none'}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
