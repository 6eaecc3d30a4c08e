"""mull's scheduler and one rank's ModelRunner in this process: no sockets, no gateway."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing

from bench.peers.protocol import LoadJob, serve
from bench.peers.recorder import Recorder
from cluster.offline import OfflineConfig, OfflineEngine
from workers.config import ModelConfig
from workers.step import SamplingParams


class MullInProcess:
    def load(self, job: LoadJob) -> int:
        self._engine = OfflineEngine(
            OfflineConfig(
                model_dir=job.model_dir,
                num_threads=job.threads,
                products="bf16" if is_bf16() else "fp32",
                kv_dtype="bf16" if is_bf16() else "auto",
                max_model_len=job.max_model_len,
                max_num_seqs=job.max_streams,
                kv_memory_bytes=kv_bytes(job),
            )
        )
        return os.getpid()

    def prepare(self, streams: int, room: int) -> None:
        """Nothing: sized at its start."""

    def run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        with closing(self._engine.updates(prompts, tokens_out, SamplingParams(temperature=0.0))) as updates:
            for update in updates:
                assert isinstance(update.key, int)
                recorder.add(update.key, update.token_ids)

    def close(self) -> None:
        pass


def is_bf16() -> bool:
    """Whether products and KV are bf16."""
    return os.environ.get("BENCH_MULL_DTYPE") == "bf16"


def kv_bytes(job: LoadJob) -> int:
    """Keys and values of `kv_tokens`."""
    config = ModelConfig.from_dir(job.model_dir)
    a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (2 if is_bf16() else 4)
    return a_token * job.kv_tokens


if __name__ == "__main__":
    serve(MullInProcess())
