"""llama.cpp through its C interface, many sequences in a batch: the loop of its server, without HTTP.

Each step holds the next token of every stream that generates, and prompts up to the batch size; the likeliest token is
taken here. KV is fp16, its default, with a buffer for each stream.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from bench.peers.protocol import EngineFailed, LoadJob, serve
from bench.peers.recorder import Recorder

N_BATCH = 2048
"""llama.cpp's own default: tokens of a step."""


@dataclass
class Stream:
    prompt: list[int]
    num_computed: int = 0
    num_generated: int = 0
    last_token: int | None = None


class Batch:
    """llama_batch over arrays of ours: to fill it a token at a time through ctypes takes longer than pocket's step."""

    def __init__(self) -> None:
        self.tokens = np.zeros(N_BATCH, np.int32)
        self.positions = np.zeros(N_BATCH, np.int32)
        self.wants_logits = np.zeros(N_BATCH, np.int8)
        self._sequences = np.zeros(N_BATCH, np.int32)
        self._one = np.ones(N_BATCH, np.int32)
        addresses = self._sequences.ctypes.data + 4 * np.arange(N_BATCH)
        self._pointers = addresses.astype(np.uintp)
        self._size = 0

    def clear(self) -> None:
        self._size = 0

    @property
    def room(self) -> int:
        return N_BATCH - self._size

    def add(self, sequence: int, tokens: Sequence[int], position: int, *, wants_last: bool) -> None:
        """Tokens of a sequence from `position` on; logits of the last one where wanted."""
        part = slice(self._size, self._size + len(tokens))
        self.tokens[part] = tokens
        self.positions[part] = np.arange(position, position + len(tokens))
        self._sequences[part] = sequence
        self.wants_logits[part] = 0
        self.wants_logits[part.stop - 1] = wants_last
        self._size = part.stop

    def native(self) -> Any:
        def pointer(array: NDArray[Any], kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        batch = llama.llama_batch()
        batch.n_tokens = self._size
        batch.token = pointer(self.tokens, ctypes.c_int32)
        batch.pos = pointer(self.positions, ctypes.c_int32)
        batch.n_seq_id = pointer(self._one, ctypes.c_int32)
        batch.seq_id = pointer(self._pointers, ctypes.POINTER(ctypes.c_int32))
        batch.logits = pointer(self.wants_logits, ctypes.c_int8)
        return batch


class LlamaCpp:
    _context: Any = None
    _shape: tuple[int, int] | None = None

    def load(self, job: LoadJob) -> int:
        self._job = job
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(job.model_dir.encode(), llama.llama_model_default_params())
        if not self._model:
            raise EngineFailed(f"llama.cpp does not load {job.model_dir}")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = Batch()
        return os.getpid()

    def run(self, prompts: Sequence[list[int]], tokens_out: int, recorder: Recorder) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        streams = [Stream(prompt) for prompt in prompts]
        while any(stream.num_generated < tokens_out for stream in streams):
            asked = self._fill(streams, tokens_out)
            for number, token_id in zip(asked, self._decode(len(asked)), strict=True):
                streams[number].last_token = token_id
                streams[number].num_generated += 1
                recorder.add(number, [token_id])

    def prepare(self, streams: int, room: int) -> None:
        """A context for this many streams; made anew where the last run had others."""
        shape = (streams, -(-room // 256) * 256)
        if self._context is not None and self._shape == shape:
            return
        self.close()
        params = llama.llama_context_default_params()
        params.n_seq_max = streams
        params.n_ctx = shape[0] * shape[1]
        params.n_batch = N_BATCH
        params.n_threads = params.n_threads_batch = self._job.threads
        params.kv_unified = False
        self._context, self._shape = llama.llama_init_from_model(self._model, params), shape
        if not self._context:
            raise EngineFailed(f"llama.cpp makes no context of {streams} × {shape[1]} tokens")

    def _fill(self, streams: list[Stream], tokens_out: int) -> list[int]:
        """The next batch; returns the streams whose logits it asks for, in its order."""
        asked = []
        self._batch.clear()
        for number, stream in enumerate(streams):
            if stream.last_token is not None and stream.num_generated < tokens_out:
                position = len(stream.prompt) + stream.num_generated - 1
                self._batch.add(number, [stream.last_token], position, wants_last=True)
                asked.append(number)
        for number, stream in enumerate(streams):
            chunk = stream.prompt[stream.num_computed :][: self._batch.room]
            if not chunk:
                continue
            is_last = stream.num_computed + len(chunk) == len(stream.prompt)
            self._batch.add(number, chunk, stream.num_computed, wants_last=is_last)
            stream.num_computed += len(chunk)
            if is_last:
                asked.append(number)
        return asked

    def _decode(self, num_asked: int) -> list[int]:
        code = llama.llama_decode(self._context, self._batch.native())
        if code != 0:
            raise EngineFailed(f"llama_decode returned {code}")
        if num_asked == 0:
            return []
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self._context), (num_asked, self._vocab_size))
        token_ids: list[int] = logits.argmax(axis=1).tolist()
        return token_ids

    def close(self) -> None:
        if self._context is not None:
            llama.llama_free(self._context)
            self._context = None


if __name__ == "__main__":
    serve(LlamaCpp())
