"""A Router and what it stands on, from a config: with any launcher, so that it needs no Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cluster.config import ClusterConfig
from cluster.router.balancer import ModelExperts, RebalancePolicy
from cluster.router.engine import GroupFactory
from cluster.router.launchers import Launcher
from cluster.router.layout_table import rank_roles
from cluster.router.request_watch import RequestWatch
from cluster.router.router import Router
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.shard_group import GroupBounds
from cluster.router.shards import RankGroup
from cluster.router.speculation import Speculation
from cluster.router.wire import ModelInfo
from cluster.text.phases import THINK_END
from cluster.text.tokenizer import read_encoder
from workers.config import Device, ModelConfig, RunnerConfig

LIVE_MARGIN_S = 30.0
"""Over the bound of a step, within which the group itself must have found the rank that is lost."""


def model_info(config: ClusterConfig) -> ModelInfo:
    """Read what the Router needs from the checkpoint's small files. Raises CheckpointError."""
    path = config.model.path
    model = ModelConfig.from_dir(path)
    return ModelInfo(
        name=config.model.name,
        vocab_size=model.vocab_size,
        max_model_len=config.engine.max_model_len or model.max_position_embeddings,
        think_end_id=read_encoder(path / "tokenizer.json").token_to_id(THINK_END),
        experts=_experts(model, config.engine.redundant_experts),
    )


def _experts(model: ModelConfig, num_redundant: int) -> ModelExperts | None:
    num_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    if not num_layers:
        return None
    return ModelExperts(num_experts=model.num_experts, num_layers=num_layers, num_redundant=num_redundant)


def runner_configs(config: ClusterConfig, max_model_len: int, device: Device) -> list[RunnerConfig]:
    """One per rank."""
    engine, world = config.engine, config.engine.layout.world_size
    num_here = world * config.router.most_copies
    return [
        RunnerConfig(
            model_dir=str(config.model.path),
            rank=rank,
            layout=engine.layout,
            redundant_experts=engine.redundant_experts,
            device=device,
            products=engine.products,
            num_threads=engine.threads_per_rank or max(1, (os.cpu_count() or 1) // num_here),
            max_model_len=max_model_len,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            block_size=engine.block_size,
            kv_memory_bytes=engine.kv_memory_bytes,
            kv_dtype=engine.kv_dtype,
            graphs=engine.graphs,
            deterministic=engine.deterministic,
            host_kv_bytes=engine.host_kv_bytes,
            symmetric_memory=engine.symmetric_memory,
            halved_from=engine.halved_from,
        )
        for rank in range(world)
    ]


def group_factory(config: ClusterConfig, max_model_len: int, device: Device, launcher: Launcher) -> GroupFactory:
    """Makes the copy's group of ranks, once per start."""
    bounds = GroupBounds(start_timeout_s=config.router.start_timeout_s, step_timeout_s=config.router.step_timeout_s)
    runners = runner_configs(config, max_model_len, device)
    return lambda on_progress, survivors: RankGroup(launcher, runners, bounds, on_progress, survivors)


def make_router(
    config: ClusterConfig, device: Device, launcher: Launcher, watches: Sequence[RequestWatch] = ()
) -> Router:
    """A Router over ranks that `launcher` starts. Raises CheckpointError where the model's small files are wrong."""
    model = model_info(config)
    scheduler = SchedulerConfig(
        max_model_len=model.max_model_len,
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_waiting=config.router.max_waiting,
        max_prefill_slowdown=config.engine.max_prefill_slowdown,
        speculation=Speculation(
            max_tokens=config.engine.num_speculative_tokens,
            row_cost=row_cost(ModelConfig.from_dir(config.model.path), device),
        ),
    )
    make_group = group_factory(config, model.max_model_len, device, launcher)
    engine, router = config.engine, config.router
    return Router(
        model,
        scheduler,
        make_group,
        enable_prefix_cache=engine.enable_prefix_cache,
        live_within_s=router.step_timeout_s + LIVE_MARGIN_S,
        roles=rank_roles(ModelConfig.from_dir(config.model.path), engine.layout, engine.redundant_experts),
        # In another place, an expert's part of a sum comes at another point of it.
        rebalance=RebalancePolicy(
            interval_steps=0 if engine.deterministic else router.rebalance_interval_steps,
            threshold=router.rebalance_threshold,
        ),
        watches=watches,
    )


def row_cost(model: ModelConfig, device: Device) -> float:
    """Of `Speculation`. On the CPU as measured with the built-in model; a GPU's is estimated, not measured.

    A GPU reads most weights once for all rows of a small step, but every row reads experts of its own.
    """
    if device == "cpu":
        return 0.6
    heads = model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    shared, own = model.vocab_size, 0
    for layer in range(model.num_layers):
        shared += heads
        if model.is_moe_layer(layer):
            own += 3 * model.moe_intermediate_size * model.num_experts_per_token
        else:
            shared += 3 * model.intermediate_size
    return max(0.05, own / (own + shared))
