"""KV that a rank keeps in its host's memory, and the copies there and back.

Hop 7's first half: a plan says which blocks move, before anything of it is computed. On a GPU copies run beside the
computing, on a stream of their own and from pinned memory; on a CPU they are made at once, by the same code.
L layers, X the 2G local heads of K, then of V, D head_dim, n blocks of one batch of copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.config import RunnerConfig
from workers.errors import KVMemoryError, PlanError
from workers.host import share_of_host_memory
from workers.kv_pool import KVPool
from workers.rank_group import RankGroup
from workers.step import HostMemory, OpenSlot, Prefill, SamplingParams, StepPlan

BATCH_BLOCKS = 32
"""Copied at once: a staging buffer on the device holds so many."""
NUM_COPIES = 8
"""There and back, to see what one takes."""
NUM_TOKENS = 128
"""Of a chunk, to see what a known token takes."""


class CopyStream(Protocol):
    """Where copies run, in order among themselves."""

    def after_compute(self) -> AbstractContextManager[object]:
        """What is queued inside runs when all is done that computing has queued so far."""

    def hold_compute(self) -> None:
        """What computing queues from now on runs when all copies so far are done."""


class NoStream:
    """On a CPU: everything is done when its call returns."""

    def after_compute(self) -> AbstractContextManager[object]:
        return nullcontext()

    def hold_compute(self) -> None:
        pass


class CudaStream:
    """Beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it

    def after_compute(self) -> AbstractContextManager[object]:
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._copies)

    def hold_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._copies)


class HostKV:
    """Blocks of a KV pool in the host's memory: [num_blocks, L, X, block_size, D], a block in one piece."""

    def __init__(self, kv: KVPool, num_blocks: int, stream: CopyStream | None = None) -> None:
        # Not every device gathers e4m3.
        self._caches = [layer.view(torch.uint8) if layer.itemsize == 1 else layer for layer in kv.layers]
        first = self._caches[0]
        shape = (len(self._caches), first.shape[0], *first.shape[2:])
        self.num_blocks = num_blocks
        self._device = first.device
        self._stream = stream or (CudaStream(first.device) if first.is_cuda else NoStream())
        self._blocks = torch.zeros(num_blocks, *shape, dtype=first.dtype)
        if first.is_cuda:
            _pin(self._blocks)
        self._outgoing = torch.empty(BATCH_BLOCKS, *shape, dtype=first.dtype, device=first.device)
        self._incoming = torch.empty_like(self._outgoing)
        self._is_unread = False
        """Blocks are on their way in that computing has not waited for."""

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes

    def move(self, plan: StepPlan) -> None:
        """Queue the copies of a plan. Afterwards it may be computed. Raises PlanError where a block does not exist.

        Blocks that come in are waited for by the next plan, and by this one only where it opens a slot with one.
        """
        self._check(plan)
        if self._is_unread:
            self._stream.hold_compute()
            self._is_unread = False
        for pairs in _batches(plan.offload):
            self._offload(pairs)
        for pairs in _batches(plan.fetch):
            self._fetch(pairs)
        if plan.fetch:
            incoming = {block_id for _, block_id in plan.fetch}
            self._is_unread = all(incoming.isdisjoint(opened.block_ids) for opened in plan.open)
            if not self._is_unread:
                self._stream.hold_compute()

    def free(self) -> None:
        """Give the memory back, when nothing is on its way any more."""
        self._stream.hold_compute()
        if self._device.type == "cuda" and self.num_blocks:
            torch.cuda.synchronize(self._device)
            _unpin(self._blocks)
        self._blocks = self._outgoing = self._incoming = torch.empty(0)
        self._caches = []

    def _offload(self, pairs: list[tuple[int, int]]) -> None:
        """The pool's blocks may be written over as soon as they are gathered, which computing does itself."""
        self._stream.hold_compute()  # the staging buffer may be on its way still
        ids_n = self._ids([block_id for block_id, _ in pairs])
        staged = self._outgoing[: len(pairs)]
        for layer, cache in enumerate(self._caches):
            staged[:, layer] = cache.index_select(1, ids_n).transpose(0, 1)
        with self._stream.after_compute():
            for place, (_, host_id) in enumerate(pairs):
                self._blocks[host_id].copy_(staged[place], non_blocking=True)

    def _fetch(self, pairs: list[tuple[int, int]]) -> None:
        """Nobody who computes reads or writes the pool's blocks meanwhile: they are given to those who wait."""
        with self._stream.after_compute():
            ids_n = self._ids([block_id for _, block_id in pairs])
            staged = self._incoming[: len(pairs)]
            for place, (host_id, _) in enumerate(pairs):
                staged[place].copy_(self._blocks[host_id], non_blocking=True)
            for layer, cache in enumerate(self._caches):
                cache.index_copy_(1, ids_n, staged[:, layer].transpose(0, 1))

    def _ids(self, ids: list[int]) -> Tensor:
        """On the device, without a wait for it."""
        on_host = torch.tensor(ids, dtype=torch.int64)
        if self._device.type == "cpu":
            return on_host
        return on_host.pin_memory().to(self._device, non_blocking=True)

    def _check(self, plan: StepPlan) -> None:
        num_device = self._caches[0].shape[1]
        pairs = [*plan.offload, *((block_id, host_id) for host_id, block_id in plan.fetch)]
        for block_id, host_id in pairs:
            if not (0 <= block_id < num_device and 0 <= host_id < self.num_blocks):
                raise PlanError(
                    f"step {plan.step} copies between block {block_id} of {num_device} and host block {host_id} of "
                    f"{self.num_blocks}"
                )


def _pin(blocks: Tensor) -> None:
    """As it is: torch's own pinned memory comes in powers of two, and is never given back. Raises KVMemoryError."""
    error = _runtime().cudaHostRegister(blocks.data_ptr(), blocks.nbytes, 0)
    if int(error):
        raise KVMemoryError(
            f"{blocks.nbytes / 1e9:.3g} GB of host memory for KV cannot be pinned ({error}); lower engine.host_kv_bytes"
        )


def _unpin(blocks: Tensor) -> None:
    torch.cuda.check_error(int(_runtime().cudaHostUnregister(blocks.data_ptr())))


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types for it


def open_host_kv(config: RunnerConfig, kv: KVPool, bytes_per_block: int, world: RankGroup) -> HostKV | None:
    """As many blocks as every rank has room for; None: it is not asked for. Raises KVMemoryError where it cannot be."""
    if not config.host_kv_bytes:
        return None
    device = kv.layers[0].device
    share = share_of_host_memory(world, device)
    if not bytes_per_block <= config.host_kv_bytes <= share.bytes_per_rank:
        raise KVMemoryError(
            f"rank {config.rank} is to keep {config.host_kv_bytes / 1e9:.3g} GB of KV in its host's memory, where "
            f"{share.free_bytes / 1e9:.3g} are free, {share.bytes_per_rank / 1e9:.3g} for each of its "
            f"{share.num_ranks} ranks; a block takes {bytes_per_block / 1e9:.3g}: change engine.host_kv_bytes"
        )
    return HostKV(kv, world.minimum(config.host_kv_bytes // bytes_per_block, device))


def measure(host: HostKV, config: RunnerConfig, num_blocks: int, execute: Callable[[StepPlan], object]) -> HostMemory:
    """Whether copies pay, on this machine with this model: all ranks of the copy measure together, with slot 0."""
    num_kv_tokens = num_blocks * config.block_size
    num_tokens = min(NUM_TOKENS, config.max_num_batched_tokens, config.max_model_len - 1, num_kv_tokens - 1)
    blocks = list(range(-(-(num_tokens + 1) // config.block_size)))
    groups = config.layout.dp
    prefill = Prefill(slot=0, start=0, token_ids=[0] * num_tokens, sample=True)
    opened = OpenSlot(slot=0, block_ids=blocks, num_cached=0, sampling=SamplingParams())

    def time_s(plan: StepPlan) -> float:
        start = time.perf_counter()
        execute(plan)
        if config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    chunk = StepPlan(0, open=[opened], prefills=[prefill], group_tokens=[num_tokens] * groups)
    close = StepPlan(0, close=[0], report_loads=True)
    there_and_back = StepPlan(0, offload=[(0, 0)], fetch=[(0, 0)])
    for first in (chunk, there_and_back, close):  # which may have to be compiled
        execute(first)
    chunk_s = time_s(chunk)
    step_s = time_s(StepPlan(0, decodes=[0], group_tokens=[1] * groups))
    copies_s = sum(time_s(there_and_back) for _ in range(NUM_COPIES))
    execute(close)
    return HostMemory(
        num_blocks=host.num_blocks,
        copy_s=copies_s / (2 * NUM_COPIES),
        token_s=max(0.0, chunk_s - step_s) / num_tokens,
        step_s=step_s,
    )


def _batches(pairs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(pairs), BATCH_BLOCKS):
        yield pairs[start : start + BATCH_BLOCKS]
