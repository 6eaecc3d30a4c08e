"""Several prompts of one request: their streams as one, with choices numbered on from each prompt to the next.

Hop 11 over HTTP. Every prompt is a request of its own for the core; here their events meet. Knows nothing of documents.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cluster.gateway.interruption import Interruption
from mull.v1 import generation_pb2 as pb

Events = AsyncGenerator[Sequence[pb.GenerateEvent], None]


async def side_by_side(streams: Sequence[Events], choices_per_prompt: int) -> Events:
    """The events of all streams as they come, prompt p's choice c as choice p * `choices_per_prompt` + c.

    The first error of one ends all. Close it (`contextlib.aclosing`) in the task that iterates.
    """
    # One batch waits at most: what piles up behind it is each stream's own to bound.
    batches: asyncio.Queue[Sequence[pb.GenerateEvent] | None] = asyncio.Queue(maxsize=1)
    async with Interruption() as interruption:
        readers = [
            asyncio.create_task(_read(stream, number * choices_per_prompt, batches, interruption), name="prompt reader")
            for number, stream in enumerate(streams)
        ]
        try:
            num_live = len(readers)
            while num_live:
                events = await batches.get()
                if events is None:
                    num_live -= 1
                else:
                    yield events
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    stream: Events,
    first_choice: int,
    batches: asyncio.Queue[Sequence[pb.GenerateEvent] | None],
    interruption: Interruption,
) -> None:
    try:
        async with aclosing(stream):
            async for events in stream:
                await batches.put([_renumbered(event, first_choice) for event in events])
    except Exception as error:
        # The consumer may hang in a write that nobody takes: it is woken there.
        interruption.interrupt(error)
    else:
        await batches.put(None)


def _renumbered(event: pb.GenerateEvent, first_choice: int) -> pb.GenerateEvent:
    if not first_choice:
        return event
    moved = pb.GenerateEvent()
    moved.CopyFrom(event)
    moved.choice += first_choice
    return moved
