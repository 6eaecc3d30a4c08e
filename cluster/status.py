"""`mull status`: what a running server is and does, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.server_address import ServerAddress
from mull.client import RetryPolicy
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2

_TIMEOUT_S = 10.0


def status(server: ServerAddress, *, as_json: bool) -> int:
    """Print the server's state. Returns 0 when it is ready, 3 when it is up but cannot take work."""
    with server.client(retry=RetryPolicy(attempts=1), timeout_s=_TIMEOUT_S) as client:
        info = client.server_info()
    if as_json:
        print(json.dumps(_plain(info), indent=2))
    else:
        _print_tables(info, server.address)
    return 0 if info.ready else 3


def _plain(info: pb.GetServerInfoResponse) -> dict[str, Any]:
    return {
        "version": info.version,
        "ready": info.ready,
        "reason": info.reason,
        "uptime_s": round(info.uptime_seconds, 1),
        "num_streams": info.num_streams,
        "http_port": info.http_port or None,
        "ranks": [_plain_rank(rank, router) for router in info.routers for rank in router.ranks],
        "routers": [
            {
                "model": router.model,
                "ready": router.ready,
                "reason": router.reason,
                "tp": router.tensor_parallel_size,
                "dp": router.data_parallel_size,
                "expert_tp": router.expert_tensor_parallel_size,
                "redundant_experts": router.redundant_experts,
                "expert_imbalance": round(router.expert_imbalance, 3),
                "num_rebalances_total": router.num_rebalances_total,
                "max_model_len": router.max_model_len,
                "num_blocks": router.num_blocks,
                "num_free_blocks": router.num_free_blocks,
                "block_size": router.block_size,
                "num_running": router.num_running,
                "num_waiting": router.num_waiting,
                "metrics_address": router.metrics_address or None,
                "loaded_bytes": router.loaded_bytes,
                "total_bytes": router.total_bytes,
            }
            for router in info.routers
        ],
    }


def _plain_rank(rank: router_pb2.RankInfo, router: router_pb2.DescribeResponse) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "group": rank.group,
        "host": rank.host,
        "pid": rank.pid,
        "device": rank.device,
        "model": router.model,
        "weight_bytes": rank.weight_bytes,
        "num_heads": rank.num_heads,
        "num_kv_heads": rank.num_kv_heads,
        "num_experts": rank.num_experts,
        "kv_bytes": rank.kv_bytes,
        "kv_tokens": rank.kv_tokens,
        "load_s": round(rank.load_seconds, 2),
    }


def _print_tables(info: pb.GetServerInfoResponse, address: str) -> None:
    console = Console(highlight=False)
    state = "[green]ready[/]" if info.ready else f"[red]not ready[/]: {escape(info.reason)}"
    http = f" · http port {info.http_port}" if info.http_port else ""
    console.print(
        f"mull {info.version} at {address}{http}: {state} · up {info.uptime_seconds:.0f} s · "
        f"{info.num_streams} streams",
        soft_wrap=True,
    )
    for number, router in enumerate(info.routers, start=1):
        copy = f"copy {number} of {len(info.routers)} · " if len(info.routers) > 1 else ""
        if not router.ready:
            console.print(f"{copy}[red]not ready[/]: {escape(router.reason)}", soft_wrap=True)
        used = router.num_blocks - router.num_free_blocks
        console.print(
            f"{copy}[bold]{escape(router.model)}[/] · {layout_words(router)} · "
            f"context {router.max_model_len:,} tokens · running {router.num_running} · waiting {router.num_waiting} · "
            f"KV {used:,} of {router.num_blocks:,} blocks of {router.block_size} tokens in use",
            soft_wrap=True,
        )
        console.print(rank_table(router))


def layout_words(router: router_pb2.DescribeResponse) -> str:
    """The layout in a few words, without what is as in the simplest one."""
    words = [f"tp {router.tensor_parallel_size}"]
    if router.data_parallel_size > 1:
        words.append(f"dp {router.data_parallel_size}")
    if router.expert_tensor_parallel_size > 1:
        words.append(f"expert-tp {router.expert_tensor_parallel_size}")
    if router.redundant_experts:
        words.append(f"{router.redundant_experts} redundant experts")
    if router.num_rebalances_total:
        words.append(f"experts placed {router.num_rebalances_total}×, imbalance {router.expert_imbalance:.2f}")
    return " · ".join(words)


def rank_table(router: router_pb2.DescribeResponse) -> Table:
    """The layout, a line per rank. Heads are query and KV heads; experts those of each layer that has any."""
    names = "rank", "group", "host", "pid", "device", "heads", "experts", "weights", "KV", "KV tokens"
    table = Table(*names, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, column in zip(names, table.columns, strict=True):
        column.justify = "left" if name in ("host", "device") else "right"
    for rank in router.ranks:
        table.add_row(
            str(rank.rank),
            str(rank.group),
            rank.host,
            str(rank.pid),
            rank.device,
            f"{rank.num_heads}/{rank.num_kv_heads}",
            str(rank.num_experts),
            _size(rank.weight_bytes),
            _size(rank.kv_bytes),
            f"{rank.kv_tokens:,}",
        )
    return table


def _size(num_bytes: int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.1f} {name}"
