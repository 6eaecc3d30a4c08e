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
from tests.end_to_end.servers import MULL, Server, serving
from tests.scraping import scrape

pytestmark = pytest.mark.timeout(240)

WAIT_S = 60.0
NUM_TOKENS = 500
DRAIN_S = 0.5
NUMBERS = '{"type": "array", "items": {"type": "integer"}, "minItems": 200}'
STOP = ": 3"
"""What the model says again and again after the prompt that it stops."""
RETRY = RetryPolicy(attempts=30, resumptions=60, first_pause_s=0.1, longest_pause_s=0.5)
# So hot that it does not come to an end by itself.
HOT = ("--temperature", "8", "--top-p", "1", "--top-k", "0", "--seed", "3")
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


class Streams:
    """Clients that read one request each, in threads."""

    def __init__(self, address: str) -> None:
        self.num_tokens = [0] * len(requests())
        self._client = Client(address, retry=RETRY, timeout_s=WAIT_S)
        self._threads = ThreadPoolExecutor(len(requests()))
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

    @property
    def num_running(self) -> int:
        return sum(not result.done() for result in self._results)

    def wait_for_tokens(self, count: int) -> None:
        """Until each has so many more than now, or is over."""
        wanted = [number + count for number in self.num_tokens]

        def have_come() -> bool:
            states = zip(self.num_tokens, wanted, self._results, strict=True)
            return all(number >= limit or result.done() for number, limit, result in states)

        until(have_come, f"{count} tokens of each stream")

    def results(self) -> list[Result]:
        try:
            return [result.result(timeout=WAIT_S) for result in self._results]
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._client.close()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[Result]:
    results = Streams(server.address).results()
    assert [result.choices[0].stop for result in results].count(STOP) == 1
    return results


@pytest.fixture(scope="module")
def undisturbed_chat(server: Server) -> str:
    # Unlike the streams, a chat does not try again where no copy is ready, as after another test.
    until(lambda: num_ready_copies(server) == 2, "both copies")
    done = subprocess.run([*MULL, *CHAT, "--address", server.address], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return text_of(done.stdout.splitlines())


def text_of(lines: Iterable[bytes]) -> str:
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
    return [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "ServeReplica" in process.name() + "".join(process.cmdline()) and name in "".join(process.cmdline())
    ]


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


def test_streams_outlive_their_routers(server: Server, undisturbed: list[Result]) -> None:
    until(lambda: num_ready_copies(server) == 2, "both copies")
    routers = replicas(server, "Router")
    assert len(routers) == 2
    before = num_pauses(server)
    # when: one goes away, so that the other takes over; and then that one, so that there is none for a while
    streams = Streams(server.address)
    streams.wait_for_tokens(20)
    routers[0].kill()
    streams.wait_for_tokens(20)
    num_cut = streams.num_running
    routers[1].kill()
    # then
    assert_same(streams.results(), undisturbed)
    assert num_cut > 0
    assert num_pauses(server) > before
    assert scrape(server.metrics_url).one("mull_replayed_tokens_total", cause="router_lost") > 20


def test_streams_and_a_chat_outlive_their_gateway(
    server: Server, undisturbed: list[Result], undisturbed_chat: str
) -> None:
    until(lambda: num_ready_copies(server) == 2, "both copies")
    (gateway,) = replicas(server, "Gateway")
    chat = subprocess.Popen([*MULL, *CHAT, "--address", server.address], stdout=subprocess.PIPE)
    assert chat.stdout is not None
    lines = [chat.stdout.readline() for _ in range(5)]
    streams = Streams(server.address)
    streams.wait_for_tokens(20)
    num_cut, is_chatting = streams.num_running, chat.poll() is None
    gateway.kill()
    assert_same(streams.results(), undisturbed)
    lines += chat.stdout.readlines()
    assert chat.wait(WAIT_S) == 0
    assert text_of(lines) == undisturbed_chat
    assert num_cut > 0
    assert is_chatting


def test_streams_outlive_their_connection(server: Server, undisturbed: list[Result]) -> None:
    with proxy(server.address) as (address, cut):
        streams = Streams(address)
        for _ in range(3):
            streams.wait_for_tokens(20)
            num_cut = streams.num_running
            cut()
        assert_same(streams.results(), undisturbed)
        assert num_cut > 0


def test_streams_longer_than_the_drain_are_cut_off_and_the_exit_code_tells(server: Server) -> None:
    """The last test of this server."""
    hot = pb.SamplingOptions(temperature=8, top_p=1, top_k=0)  # nothing of it can be drafted
    # Nearly the context.
    long = [
        pb.GenerateRequest(raw_prompt=prompt, sampling=hot, max_tokens=7 * NUM_TOKENS, ignore_eos=True)
        for prompt in ("1 2 3 4", "Once upon a time")
    ]
    with Client(server.address, retry=RetryPolicy(resumptions=0)) as client:
        replies = [iter(client.stream(request)) for request in long]
        assert all(isinstance(next(reply), Started) for reply in replies)
        server.process.send_signal(signal.SIGTERM)
        for reply in replies:
            with pytest.raises(CallFailed, match="shutting down"):
                list(reply)

    assert server.wait() == 1
    assert server.lines[-1] == f"mull: 2 streams were still running after {DRAIN_S:g} s and cut off"


@contextmanager
def proxy(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A port that leads to the target, and what cuts all its connections."""
    host, _, port = target.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = []

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
            sockets.extend((client, upstream))
            for pair in ((client, upstream), (upstream, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def cut() -> None:
        taken, sockets[:] = sockets[:], []
        for one in taken:
            # Its other end may have been first.
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", cut
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        cut()
