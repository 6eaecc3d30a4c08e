"""What a rank does before it is ready, so that no request waits for a library to set itself up or a kernel to compile.

On a GPU kernels are compiled when rows of a number like it first come, for some seconds each: chunks of all such sizes
are run, and draws of every number of candidates. All ranks of a copy do it together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from workers.candidates import CandidateExchange
from workers.config import RunnerConfig
from workers.drawing import RowRules, drawn_from
from workers.sampling import WIDTHS
from workers.step import OpenSlot, Prefill, SamplingParams, StepPlan
from workers.transfers import to_device

FIRST_SIZE = 16
"""Rows of the smallest chunk on a GPU: fewer are a block of as many."""


def warm_up(execute: Callable[[StepPlan], object], config: RunnerConfig, num_blocks: int) -> None:
    """Chunks and decodes in slot 0."""
    is_gpu = config.device == "cuda"
    room = num_blocks * config.block_size if is_gpu else config.block_size
    longest = min(room, config.max_model_len, config.max_num_batched_tokens + 1) - 1
    groups = config.layout.dp
    for count in warm_up_sizes(longest) if is_gpu else [longest] if longest > 0 else []:
        blocks = list(range(count // config.block_size + 1))
        opened = OpenSlot(slot=0, block_ids=blocks, num_cached=0, sampling=SamplingParams())
        prefill = Prefill(slot=0, start=0, token_ids=[0] * count, sample=True)
        execute(StepPlan(step=0, open=[opened], prefills=[prefill], group_tokens=[count] * groups))
        execute(StepPlan(step=0, decodes=[0], group_tokens=[1] * groups))
        execute(StepPlan(step=0, close=[0], report_loads=True))


def warm_up_sizes(longest: int) -> list[int]:
    """Of chunks: powers of two, from which on kernels take larger blocks, and the longest; none where none fits."""
    sizes = [FIRST_SIZE]
    while sizes[-1] < longest:
        sizes.append(2 * sizes[-1])
    return [size for size in [*sizes[:-1], longest] if size > 0]


def warm_up_draws(exchange: CandidateExchange, device: torch.device) -> None:
    """From every number of candidates: which of them a request wants is seen only when it comes."""
    if device.type == "cuda":
        logits_1v = torch.zeros(1, exchange.vocab.size, device=device)
        rules = RowRules(*(np.ones(1, dtype=kind) for kind in (np.int64, float, float, float, np.int64)))
        for width in (1, *WIDTHS):
            drawn_from(exchange.likeliest(logits_1v, width), to_device(rules.as_ints(), device))
