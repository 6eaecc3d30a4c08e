"""transformers' continuous batching: paged KV, prompts in chunks, its own thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig

from bench.peers.engines.transformers_generate import load_model
from bench.peers.protocol import EngineFailed, LoadJob, serve
from bench.peers.recorder import OverTime, Recorder

PAGE_SIZE = 256
"""Pages of 16 tokens, its default, are gathered five times as slowly on a CPU."""
MAX_BATCH_TOKENS = 2048
POLL_S = 1.0


class TransformersContinuous:
    _manager: ContinuousBatchingManager | None = None
    _streams: int | None = None

    def load(self, job: LoadJob) -> int:
        self._job = job
        self._model = load_model(job)
        return os.getpid()

    def prepare(self, streams: int, room: int) -> None:  # noqa: ARG002 - pages are there for all
        """A manager sizes its buffers for the requests of its start, so each number of streams has its own."""
        if self._manager is None or self._streams != streams:
            self.close()
            self._manager, self._streams = self._start(streams), streams

    def _start(self, streams: int) -> Any:
        pages = -(-self._job.kv_tokens // PAGE_SIZE) + self._job.max_streams + 1
        batching = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=pages,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_requests_per_batch=max(streams, 2),
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        manager = self._model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        manager.start()
        return manager

    def run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        assert self._manager is not None, "prepare comes first"
        ids = {
            self._manager.add_request(list(prompt), max_new_tokens=tokens_out, streaming=True): stream
            for stream, prompt in enumerate(prompts)
        }
        try:
            self._read(ids, tokens_out, recorder)
        except OverTime:
            self.close()
            raise

    def _read(self, ids: dict[str | None, int], tokens_out: int, recorder: Recorder) -> None:
        assert self._manager is not None
        while any(len(recorder.tokens[stream]) < tokens_out for stream in ids.values()):
            output = self._manager.get_result(timeout=POLL_S)
            if output is None:
                self._check(recorder)
                continue
            if output.error is not None:
                raise EngineFailed(output.error)
            stream = ids[output.request_id]
            recorder.add(stream, output.generated_tokens[len(recorder.tokens[stream]) :])

    def _check(self, recorder: Recorder) -> None:
        assert self._manager is not None
        if not self._manager.is_running():
            raise EngineFailed(f"its thread ended: {self._manager.background_thread_status.fatal_error}")
        if recorder.left_s < 0:
            raise OverTime

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=30, hard_stop=True)
            self._manager = None


if __name__ == "__main__":
    serve(TransformersContinuous())
