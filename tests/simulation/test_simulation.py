"""The recovery of the whole path, from clients to ranks, under random faults in virtual time.

A run that fails names its seed: `python -m tests.simulation --seed N` replays it with a trace of all that happened.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from cluster.gateway.recovery import Flight, Recovery, Send
from cluster.router.blocks import BlockAllocator
from cluster.router.engine import Engine
from cluster.router.quarantine import Quarantine
from cluster.router.sequence import Sequence, SequenceUpdate
from tests.simulation.gateway import POLICY
from tests.simulation.simulation import Failure, Simulation, run
from workers.step import TokenLogprobs

pytestmark = pytest.mark.timeout(180)

NUM_BATCHES, BATCH_SIZE = 8, 1250
FIRST_SEED = 1_000_000
MUST_HAPPEN = (
    "kill rank", "hang rank", "kill router", "drain router", "kill gateway", "drain gateway", "cut link", "cut client",
    "resumed calls", "replays of gateways", "restarts of ranks", "tokens replayed", "tokens cached", "preemptions",
    "poison given up", "clients that leave", "drafts accepted", "drafts refused",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A simulated loss is no news."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run_batch(first_seed: int) -> Counter[str]:
    """What happened in them."""
    counts: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + BATCH_SIZE):
        counts += run(seed).counts
    return counts


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_no_fault_loses_repeats_or_changes_a_token_or_leaves_anything_behind(batch: int) -> None:
    counts = run_batch(FIRST_SEED + batch * BATCH_SIZE)

    assert all(counts[name] for name in MUST_HAPPEN), f"these runs show too little: {counts}"


def test_streams_of_a_cluster_that_is_gone_are_told_so_in_time() -> None:
    num_waiting = 0
    for seed in range(FIRST_SEED, FIRST_SEED + 50):
        simulation = Simulation(seed)
        simulation.run_without_routers(lost_at_s=0.1, until_s=0.2)
        waiting = [(client, client.num_refusals) for client in simulation.clients if not client.is_done]

        simulation.world.run(until_s=0.2 + POLICY.timeout_s + 0.2, is_over=lambda: False)

        assert all(client.is_done or client.num_refusals > before for client, before in waiting)
        num_waiting += sum(bool(client.output_ids) for client, _ in waiting)
    assert num_waiting > 0


def digest_of(seed: int) -> str:
    return hashlib.sha256("\n".join(run(seed, keep_trace=True).trace or []).encode()).hexdigest()


def test_a_seed_decides_all_that_happens() -> None:
    here = [digest_of(seed) for seed in range(5)]
    code = f"import logging; logging.disable(50); import {__name__} as t; print(*[t.digest_of(s) for s in range(5)])"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr

    assert done.stdout.split() == here


def send_without_output(recovery: Recovery, flight: Flight, name: str) -> Send:
    sent = SEND(recovery, flight, name)
    del sent.message.submit.output_ids[:]
    return sent


def take_first(sequence: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs]) -> SequenceUpdate:
    return TAKE_SAMPLED(sequence, token_ids[:1], logprobs)


SEND = Recovery._send
TAKE_SAMPLED = Sequence.take_sampled
BREACHES = {
    "a replay that lacks the output so far": (Recovery, "_send", send_without_output),
    "a flight that nobody takes over": (Recovery, "_suspend", lambda *_: None),
    "blocks that are not given back": (BlockAllocator, "release", lambda *_: None),
    "plans of ranks that are gone": (Sequence, "lose_ranks", lambda _: None),
    "sequences of a gateway that is gone": (Engine, "cancel", lambda *_: None),
    "forced tokens that are told as sampled ones": (Sequence, "take_forced", lambda _: None),
    "accepted drafts that are left out": (Sequence, "take_sampled", take_first),
    "poison that is sent around for ever": (Quarantine, "blame", lambda *_, **__: []),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_noticed(breach: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken = BREACHES[breach]
    monkeypatch.setattr(owner, name, broken)

    with pytest.raises(Failure, match=r"seed \d+ at "):
        run_batch(FIRST_SEED)
