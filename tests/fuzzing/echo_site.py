"""A whole gateway in a thread of its own, over a Router that answers everything at once: what fuzzers shoot at."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from cluster.config import GatewayConfig, ModelSource
from cluster.gateway.copies import static_addresses
from cluster.gateway.router_link import LinkTimes
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayPorts, GatewayServer
from mull.v1 import router_pb2 as pb
from tests.gateway.conftest import POCKET, until
from tests.gateway.scripted_router import WAIT_S, ScriptedRouter

_T = TypeVar("_T")
ECHO_TOKENS = 24
"""At most: the last ones of the prompt come back."""


@dataclass
class EchoSite:
    """A started gateway. All of it lives in another thread's event loop."""

    server: GatewayServer
    ports: GatewayPorts
    router: ScriptedRouter
    loop: asyncio.AbstractEventLoop

    def num_tasks(self) -> int:
        """As many as there are now."""
        return self._run(_num_tasks())

    def wait_for_streams(self) -> None:
        """Until all have ended. Raises AssertionError."""
        self._run(until(lambda: self.server.num_streams == 0, "the end of all streams"))

    def wait_for_tasks(self, at_most: int) -> None:
        """Until no more are left. Raises AssertionError.

        Calls that have ended leave theirs a moment later, and the Router is asked how it is now and then.
        """
        gc.collect()
        self._run(until(lambda: len(asyncio.all_tasks()) <= at_most, f"all tasks but {at_most} to end"))

    def _run(self, job: Coroutine[object, object, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(job, self.loop).result(2 * WAIT_S)


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())


@contextmanager
def echo_site() -> Iterator[EchoSite]:
    """Started; drained at the end."""
    ready, stop = threading.Event(), threading.Event()
    made: list[EchoSite] = []
    failed: list[BaseException] = []

    async def live() -> None:
        router = ScriptedRouter()
        await router.start()
        router.on_submit = lambda submit: router.send(echo(submit))
        model = await asyncio.to_thread(ServedModel.load, ModelSource(path=POCKET, name="pocket"))
        config = GatewayConfig(grpc_port=0, http_port=0, metrics_port=0, drain_s=1, body_timeout_s=5)
        times = LinkTimes(first_pause_s=0.02, longest_pause_s=0.1, poll_starting_s=0.02, poll_ready_s=0.5)
        server = GatewayServer(config, model, static_addresses(router.address), link_times=times)
        ports = await server.start()
        await until(lambda: server.copies.state.ready and router.has_session, "the link to the Router")
        made.append(EchoSite(server, ports, router, asyncio.get_running_loop()))
        ready.set()
        await asyncio.to_thread(stop.wait)
        await server.drain(0)
        await router.stop()

    def run() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run, name="echo site")
    thread.start()
    assert ready.wait(60), "the gateway did not start"
    try:
        if failed:
            raise failed[0]
        yield made[0]
    finally:
        stop.set()
        thread.join(60)
    assert not failed, failed


def echo(submit: pb.Submit) -> pb.SequenceUpdate:
    """The whole answer in one update: the end of the prompt again, with logprobs where they are asked for."""
    room = min(submit.max_tokens, ECHO_TOKENS)
    token_ids = [token for token in submit.prompt_ids[-ECHO_TOKENS:] if token not in submit.stop_token_ids][:room]
    update = pb.SequenceUpdate(key=submit.key, token_ids=token_ids, end=pb.End(reason=pb.End.REASON_LENGTH))
    update.admitted.cached_tokens = 0
    if submit.sampling.HasField("num_logprobs"):
        update.logprobs.extend(_logprobs(submit.sampling.num_logprobs) for _ in token_ids)
    if submit.HasField("num_prompt_logprobs"):
        update.prompt_logprobs.extend(_logprobs(submit.num_prompt_logprobs) for _ in submit.prompt_ids[1:])
    return update


def _logprobs(num_top: int) -> pb.RouterLogprobs:
    return pb.RouterLogprobs(logprob=-1.0, top_ids=range(num_top), top_logprobs=[-1.0] * num_top)
