"""The harness and an engine's process: what is asked and answered, and what becomes of an engine that fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.peers.engine_process import EngineProcess
from bench.peers.protocol import EngineFailed, LoadJob, RunJob

TIMEOUT_S = 60.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    process = EngineProcess(Path(sys.executable), "tests.bench.fake_engine", {}, tmp_path / "engine.log")
    yield process
    process.stop()


def load(engine: EngineProcess, model: str) -> None:
    engine.load(LoadJob(model_dir=model, threads=1, max_model_len=8, max_streams=2, kv_tokens=16), TIMEOUT_S)


def test_each_stream_gets_its_tokens_with_their_times(engine: EngineProcess) -> None:
    load(engine, "good")
    reply = engine.run(RunJob(prompts=[[1, 2], [3, 4]], tokens_out=3, room=5, bound_s=TIMEOUT_S))
    assert reply.tokens == [[3, 3, 3], [7, 7, 7]]
    assert all(times == sorted(times) and len(times) == 3 for times in reply.times_s)
    assert not reply.over


def test_a_run_past_its_bound_ends_with_what_it_has_and_the_engine_goes_on(engine: EngineProcess) -> None:
    load(engine, "slow")
    reply = engine.run(RunJob(prompts=[[1]], tokens_out=100, room=101, bound_s=0.05))
    assert reply.over
    assert 1 <= len(reply.tokens[0]) < 100
    assert not engine.run(RunJob(prompts=[[1]], tokens_out=1, room=2, bound_s=TIMEOUT_S)).over


def test_an_engine_that_does_not_load_says_why(engine: EngineProcess) -> None:
    with pytest.raises(EngineFailed, match="ValueError: no such weights"):
        load(engine, "broken")


def test_an_engine_whose_process_ends_is_named_with_its_exit_status(engine: EngineProcess) -> None:
    load(engine, "ends")
    with pytest.raises(EngineFailed, match="its process ended with 3"):
        engine.run(RunJob(prompts=[[1]], tokens_out=1, room=2, bound_s=TIMEOUT_S))


def test_its_memory_is_that_of_the_process_it_names_and_a_stopped_one_answers_later(engine: EngineProcess) -> None:
    load(engine, "good")
    engine.pause()
    memory = engine.memory()
    assert memory.num_processes == 1
    assert 1 < memory.total_mb == memory.largest_process_mb < 1e6 * os.sysconf("SC_PHYS_PAGES")
    engine.resume()
    assert not engine.run(RunJob(prompts=[[1]], tokens_out=1, room=2, bound_s=TIMEOUT_S)).over
