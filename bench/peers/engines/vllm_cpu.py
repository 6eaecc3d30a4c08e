"""vLLM's CPU build: its engine in this process, stepped here, so that no message between processes costs it time."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from bench.peers.protocol import LoadJob, serve
from bench.peers.recorder import OverTime, Recorder

GIB = 2**30


def dtype() -> str:
    """Set by the harness: an adapter for fp32, and one for bf16, which vLLM takes of itself."""
    return os.environ["BENCH_VLLM_DTYPE"]


class VllmCpu:
    def load(self, job: LoadJob) -> int:
        # Read at import. Its default for the threads leaves out a core.
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: job.threads])),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        from vllm import EngineArgs, LLMEngine

        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=job.model_dir,
                dtype=dtype(),
                skip_tokenizer_init=True,
                max_model_len=job.max_model_len,
                max_num_seqs=job.max_streams,
                enable_prefix_caching=False,
                kv_cache_memory_bytes=self._kv_bytes(job),
                disable_log_stats=True,
            )
        )
        self._next_id = 0
        return os.getpid()

    def _kv_bytes(self, job: LoadJob) -> int:
        config = json.loads((Path(job.model_dir) / "config.json").read_text())
        size = 2 if dtype() == "bfloat16" else 4
        a_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * size
        return a_token * (job.kv_tokens + 256 * job.max_streams)

    def prepare(self, streams: int, room: int) -> None:
        """Nothing: sized at its start."""

    def run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens_out,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        streams = {}
        for stream, prompt in enumerate(prompts):
            self._next_id += 1
            streams[str(self._next_id)] = stream
            self._engine.add_request(str(self._next_id), {"prompt_token_ids": prompt}, params)
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    recorder.add(streams[output.request_id], output.outputs[0].token_ids)
        except OverTime:
            self._engine.abort_request(list(streams))
            raise

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(VllmCpu())
