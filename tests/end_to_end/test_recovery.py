"""Routers, gateways and connections that die under load: every stream is, token for token, the undisturbed one."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psutil
import pytest

from mull.client import CallFailed, Choice, Client, Result, RetryPolicy, Started
from mull.v1 import generation_pb2 as pb
from tests.end_to_end.servers import MULL, Server, named, serving, told
from tests.scraping import scrape

pytestmark = pytest.mark.timeout(400)

WAIT_S = 120.0
NUM_TOKENS = 500
DRAIN_S = 0.5
NUMBERS = '{"type": "array", "items": {"type": "integer"}, "minItems": 200}'
STOP = ": 3"
"""What the model says again and again after the prompt that it stops."""
RETRY = RetryPolicy(attempts=100, resumptions=300, first_pause_s=0.1, longest_pause_s=0.5)
# So hot that it does not come to an end by itself.
HOT = ("--temperature", "8", "--top-p", "1", "--top-k", "0", "--seed", "3")
LONG = pb.GenerateRequest(
    raw_prompt="1 2 3 4",
    sampling=pb.SamplingOptions(temperature=8, top_p=1, top_k=0, seed=9),  # nothing of it can be drafted
    max_tokens=7 * NUM_TOKENS,
    ignore_eos=True,
)
"""Nearly the context: it is under way for as long as a test needs it."""
NUM_MORE = 50
CHAT = ("chat", "Count slowly.", "--json", *HOT, "--max-tokens", str(3 * NUM_TOKENS))


def requests() -> list[pb.GenerateRequest]:
    """Sampled, greedy and penalised ones, two generations at once, thoughts that are cut short, a schema, a stop."""
    sampling = pb.SamplingOptions
    plain = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    numbers = pb.ResponseFormat(json_schema=NUMBERS)
    question = pb.Conversation(messages=[pb.Message(role="user", content="What is 347 + 285?")])
    return [
        pb.GenerateRequest(raw_prompt="1 2 3 4", sampling=sampling(seed=1), **plain),
        pb.GenerateRequest(raw_prompt="Once upon a time", sampling=sampling(temperature=0), **plain),
        pb.GenerateRequest(
            raw_prompt="5 6 7", sampling=sampling(seed=2, presence_penalty=0.5, repetition_penalty=1.1), **plain
        ),
        pb.GenerateRequest(raw_prompt="ten: ", n=2, sampling=sampling(seed=3, temperature=1), **plain),
        pb.GenerateRequest(conversation=question, thinking_budget=300, sampling=sampling(seed=4), **plain),
        pb.GenerateRequest(conversation=question, sampling=sampling(seed=5, logprobs=1), min_tokens=300, **plain),
        pb.GenerateRequest(
            raw_prompt="Once upon a time", sampling=sampling(seed=6), response_format=numbers, max_tokens=NUM_TOKENS
        ),
        pb.GenerateRequest(
            raw_prompt="1 2 3 4", sampling=sampling(seed=8, temperature=1), stop=[STOP], min_tokens=300, **plain
        ),
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--copies", "2", "--threads-per-rank", "1", "--drain-s", str(DRAIN_S)) as running:
        yield running


class LongStream:
    """A client of `LONG`, which leaves it when the other streams have ended and some more of it has come."""

    def __init__(self, client: Client) -> None:
        self.token_ids: list[int] = []
        self._client = client
        self._has_enough = threading.Event()

    def read(self) -> None:
        with self._client.stream(LONG) as reply:
            for event in reply:
                self.token_ids += getattr(event, "token_ids", ())
                if self._has_enough.is_set():
                    return
        raise AssertionError("it came to its end, and cannot have been cut anywhere")

    def leave(self) -> None:
        wanted = len(self.token_ids) + NUM_MORE
        until(lambda: len(self.token_ids) >= wanted, "more of the long stream")
        self._has_enough.set()


class Streams:
    """Clients that read one request each, in threads."""

    def __init__(self, address: str) -> None:
        self.num_tokens = [0] * len(requests())
        self._client = Client(address, retry=RETRY, timeout_s=WAIT_S)
        self._threads = ThreadPoolExecutor(len(requests()) + 1)
        self.long = LongStream(self._client)
        self._long_read = self._threads.submit(self.long.read)
        self._results: list[Future[Result]] = [
            self._threads.submit(self._read, index, request) for index, request in enumerate(requests())
        ]

    def _read(self, index: int, request: pb.GenerateRequest) -> Result:
        reply = self._client.stream(request)
        numbers: dict[int, list[int]] = {}
        for event in reply:
            self.num_tokens[index] += len(getattr(event, "token_ids", ()))
            numbers.setdefault(event.choice, []).append(event.sequence)
        assert all(found == list(range(len(found))) for found in numbers.values())
        return reply.result()

    def wait_for_tokens(self, count: int) -> None:
        """Until each has so many more than now, or is over."""
        wanted = [number + count for number in self.num_tokens]

        wanted_of_long = len(self.long.token_ids) + count

        def have_come() -> bool:
            states = zip(self.num_tokens, wanted, self._results, strict=True)
            is_long_there = len(self.long.token_ids) >= wanted_of_long
            return is_long_there and all(number >= limit or result.done() for number, limit, result in states)

        until(have_come, f"{count} tokens of each stream")

    def results(self) -> list[Result]:
        try:
            found = [result.result(timeout=WAIT_S) for result in self._results]
            self.long.leave()
            self._long_read.result(timeout=WAIT_S)
            return found
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._client.close()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[Result]:
    until(lambda: num_ready_copies(server) == 2, "both copies")
    results = Streams(server.address).results()
    assert [result.choices[0].stop for result in results].count(STOP) == 1
    return results


class LongUndisturbed:
    """The tokens of `LONG` where nothing happens, as many as are asked for."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._token_ids: list[int] = []

    def first(self, count: int) -> list[int]:
        if count > len(self._token_ids):
            request = pb.GenerateRequest()
            request.CopyFrom(LONG)
            request.max_tokens = count
            with Client(self._server.address, retry=RETRY, timeout_s=WAIT_S) as client:
                self._token_ids = list(client.stream(request).result().choices[0].token_ids)
        return self._token_ids[:count]


@pytest.fixture(scope="module")
def long_undisturbed(server: Server) -> LongUndisturbed:
    return LongUndisturbed(server)


@pytest.fixture(scope="module")
def undisturbed_chat(server: Server) -> str:
    # Unlike the streams, a chat does not try again where no copy is ready, as after another test.
    until(lambda: num_ready_copies(server) == 2, "both copies")
    return text_of(told(*CHAT, "--address", server.address).splitlines())


def text_of(lines: Iterable[str]) -> str:
    """What `mull chat --json` printed, without how it was cut."""
    events = [json.loads(line) for line in lines]
    assert [event["sequence"] for event in events] == list(range(len(events)))
    assert events[-1]["reason"] == "length"
    return "".join(event.get("text", "") for event in events)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for {what}"
        time.sleep(0.02)


def replicas(server: Server, name: str) -> list[psutil.Process]:
    return named(server, "ServeReplica", name)


def num_ready_copies(server: Server) -> int:
    with Client(server.address, retry=RETRY, timeout_s=WAIT_S) as client:
        try:
            return sum(router.ready for router in client.server_info().routers)
        except CallFailed:
            return 0


def num_pauses(server: Server) -> float:
    return scrape(server.metrics_url).one("mull_recovery_pause_seconds_count", cause="router_lost")


def assert_same(results: list[Result], undisturbed: list[Result]) -> None:
    for number, (result, whole) in enumerate(zip(results, undisturbed, strict=True)):
        for choice, wanted in zip(result.choices, whole.choices, strict=True):
            assert choice.token_ids == wanted.token_ids, f"request {number}"
            assert (choice.thinking, choice.answer) == (wanted.thinking, wanted.answer), f"request {number}"
            assert (choice.finish_reason, choice.thinking_ended) == (wanted.finish_reason, wanted.thinking_ended)
            assert choice.stop == wanted.stop, f"request {number}"
            # Other streams are in the batch after a loss than before it.
            assert logprobs_of(choice) == pytest.approx(logprobs_of(wanted), abs=1e-3), f"request {number}"


def logprobs_of(choice: Choice) -> list[float]:
    return [entry.logprob for entry in choice.logprobs]


def test_streams_outlive_their_routers(
    server: Server, undisturbed: list[Result], long_undisturbed: LongUndisturbed
) -> None:
    until(lambda: num_ready_copies(server) == 2, "both copies")
    routers = replicas(server, "Router")
    assert len(routers) == 2
    before = num_pauses(server)
    # when: one goes away, so that the other takes over; and then that one, so that there is none for a while
    streams = Streams(server.address)
    streams.wait_for_tokens(20)
    routers[0].kill()
    streams.wait_for_tokens(20)
    routers[1].kill()
    # then
    assert_same(streams.results(), undisturbed)
    assert_long_is_same(streams, long_undisturbed)
    assert num_pauses(server) > before
    assert scrape(server.metrics_url).one("mull_replayed_tokens_total", cause="router_lost") > 20


def assert_long_is_same(streams: Streams, undisturbed: LongUndisturbed) -> None:
    """It was under way all the time, so that it was cut each time."""
    token_ids = streams.long.token_ids
    assert token_ids == undisturbed.first(len(token_ids))


def test_streams_and_a_chat_outlive_their_gateway(
    server: Server, undisturbed: list[Result], long_undisturbed: LongUndisturbed, undisturbed_chat: str
) -> None:
    until(lambda: num_ready_copies(server) == 2, "both copies")
    (gateway,) = replicas(server, "Gateway")
    with subprocess.Popen([*MULL, *CHAT, "--address", server.address], stdout=subprocess.PIPE, text=True) as chat:
        assert chat.stdout is not None
        lines = [chat.stdout.readline() for _ in range(5)]
        streams = Streams(server.address)
        streams.wait_for_tokens(20)
        # It prints more than a pipe takes, of which the rest is read below.
        assert chat.poll() is None
        gateway.kill()
        assert_same(streams.results(), undisturbed)
        lines += chat.stdout.readlines()
    assert chat.returncode == 0
    assert_long_is_same(streams, long_undisturbed)
    assert text_of(lines) == undisturbed_chat


def test_streams_outlive_their_connection(
    server: Server, undisturbed: list[Result], long_undisturbed: LongUndisturbed
) -> None:
    until(lambda: num_ready_copies(server) == 2, "both copies")
    with proxy(server.address) as (address, cut):
        streams = Streams(address)
        for _ in range(3):
            streams.wait_for_tokens(20)
            assert cut() > 0
        assert_same(streams.results(), undisturbed)
    assert_long_is_same(streams, long_undisturbed)


def test_streams_longer_than_the_drain_are_cut_off_and_the_exit_code_tells(server: Server) -> None:
    """The last test of this server."""
    until(lambda: num_ready_copies(server) == 2, "both copies")
    with Client(server.address, retry=RetryPolicy(resumptions=0)) as client:
        replies = [iter(client.stream(LONG)) for _ in range(2)]
        assert all(isinstance(next(reply), Started) for reply in replies)
        server.process.send_signal(signal.SIGTERM)
        for reply in replies:
            with pytest.raises(CallFailed, match="shutting down"):
                list(reply)

    assert server.wait() == 1
    assert server.lines[-1] == f"mull: 2 streams were still running after {DRAIN_S:g} s and cut off"


@contextmanager
def proxy(target: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """A port that leads to the target, and what cuts all its connections and says how many ends they had."""
    host, _, port = target.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = []
    lock = threading.Lock()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        # Cut, by the test or by an end.
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        sink.close()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            upstream = socket.create_connection((host, int(port)))
            with lock:
                sockets.extend((client, upstream))
            for pair in ((client, upstream), (upstream, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def cut() -> int:
        with lock:
            taken, sockets[:] = sockets[:], []
        for one in taken:
            # Its other end may have been first.
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        return len(taken)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", cut
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        cut()
