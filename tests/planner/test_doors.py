"""Simulated gateways choose as real ones do, from what real ones know."""

from __future__ import annotations

import random

import pytest

from cluster.gateway.affinity import CopyLoad
from cluster.gateway.recovery import CopyState, Flight, Recovery, ReplayPolicy, Send
from cluster.planner.doors import Door, said_by
from mull.v1 import router_pb2 as pb


def said(draw: random.Random) -> dict[str, CopyLoad]:
    return {f"copy-{one}": CopyLoad(num_running=draw.randint(0, 8), num_waiting=draw.randint(0, 2)) for one in range(4)}


@pytest.mark.parametrize("seed", range(20))
def test_a_door_sends_each_request_where_the_gateways_recovery_sends_it(seed: int) -> None:
    draw = random.Random(seed)
    door, recovery = Door(None, seed=seed), Recovery(ReplayPolicy(), seed=seed)
    loads = said(draw)
    door.hear(said_by(loads))
    for name, load in loads.items():
        recovery.connected(name, CopyState(ready=True, load=load), 0.0)
    open_flights: list[tuple[str, Flight]] = []
    for _ in range(200):
        match draw.choice(["open", "open", "end", "hear"]):
            case "open":
                flight, (send,) = recovery.open(pb.Submit(prompt_ids=[1] * 10), 0.0)
                assert isinstance(send, Send)
                assert door.choose(10, (), ()) == send.copy
                door.sent(send.copy, ())
                open_flights.append((send.copy, flight))
            case "end" if open_flights:
                name, flight = open_flights.pop(draw.randrange(len(open_flights)))
                recovery.release(flight)
                door.left(name)
            case "hear":
                loads = said(draw)
                door.hear(said_by(loads))
                for name, load in loads.items():
                    recovery.described(name, CopyState(ready=True, load=load), 0.0)


def test_a_prompt_goes_where_its_beginning_went_unless_that_copy_is_busy() -> None:
    door = Door(None)
    door.hear(said_by({"copy-1": CopyLoad(num_running=4), "copy-2": CopyLoad()}))
    door.sent("copy-1", (1, 2, 3, 4, 5, 6))

    assert door.choose(400, (1, 2, 3, 4, 5, 6), ()) == "copy-1"
    assert door.choose(400, (7, 8), ()) == "copy-2"
    door.hear(said_by({"copy-1": CopyLoad(num_running=20), "copy-2": CopyLoad()}))
    assert door.choose(400, (1, 2, 3, 4, 5, 6), ()) == "copy-2"


def test_a_copy_that_is_lost_is_not_chosen() -> None:
    door = Door(None)
    door.hear(said_by({"copy-1": CopyLoad()}))

    door.lost("copy-1")

    assert door.choose(10, (), ()) is None
