"""An engine for the harness's tests: what it does is in the name of the model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from bench.peers.protocol import LoadJob, serve
from bench.peers.recorder import Recorder


class FakeEngine:
    def load(self, job: LoadJob) -> int:
        print("a library that prints")
        if job.model_dir == "broken":
            raise ValueError("no such weights")
        self._ends = job.model_dir == "ends"
        self._pause_s = 0.02 if job.model_dir == "slow" else 0.0
        return os.getpid()

    def prepare(self, streams: int, room: int) -> None:
        self._streams, self._room = streams, room

    def run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        if self._ends:
            os._exit(3)
        assert len(prompts) == self._streams
        assert all(len(prompt) + tokens_out <= self._room for prompt in prompts)
        for _ in range(tokens_out):
            time.sleep(self._pause_s)
            for stream, prompt in enumerate(prompts):
                recorder.add(stream, [sum(prompt)])

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(FakeEngine())
