"""transformers' `generate` on one batch, all prompts of the same length, so that nothing is padded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.peers.protocol import LoadJob, serve
from bench.peers.recorder import Recorder


def load_model(job: LoadJob) -> Any:
    """The checkpoint in fp32, as it is stored for the peers."""
    torch.set_num_threads(job.threads)
    return AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.float32)


class Recording(BaseStreamer):
    """Gets the prompts first, then a token of every row after each step."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._has_prompts = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompts:
            for stream, token_id in enumerate(value.tolist()):
                self._recorder.add(stream, [token_id])
        self._has_prompts = True

    def end(self) -> None:
        pass


class TransformersGenerate:
    def load(self, job: LoadJob) -> int:
        self._model = load_model(job)
        # Nothing ends a stream before its length is reached.
        self._model.generation_config.eos_token_id = None
        return os.getpid()

    def prepare(self, streams: int, room: int) -> None:
        """Nothing: sized at its start."""

    def run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        ids_BT = torch.tensor(prompts)
        self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=tokens_out,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
            streamer=Recording(recorder),
        )

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(TransformersGenerate())
