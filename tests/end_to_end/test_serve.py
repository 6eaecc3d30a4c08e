"""The product as its users meet it: `mull serve` with two ranks under Ray, `mull chat`, `mull status`, signals."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mull.client import CallFailed, Client, RetryPolicy, Started
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.end_to_end.servers import (
    FREE_PORTS,
    STOP_TIMEOUT_S,
    Server,
    descendants,
    mull,
    named,
    serving,
    starting,
    told,
    wait_until,
)
from tests.scraping import scrape

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--tp", "2") as running:
        yield running


@pytest.fixture
def stub(server: Server) -> Iterator[GenerationServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield GenerationServiceStub(channel)


def question(text: str, **fields: object) -> pb.GenerateRequest:
    conversation = pb.Conversation(messages=[pb.Message(role="user", content=text)])
    fields.setdefault("sampling", pb.SamplingOptions(temperature=0))
    fields.setdefault("max_tokens", 300)
    return pb.GenerateRequest(conversation=conversation, **fields)


def test_a_question_streams_thoughts_and_then_the_right_answer(stub: GenerationServiceStub) -> None:
    events = list(stub.Generate(question("What is 347 + 285?")))

    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert kinds.index("thinking_delta") < kinds.index("thinking_ended") < kinds.index("answer_delta")
    assert [event.sequence for event in events] == list(range(len(events)))
    assert "632" in "".join(event.answer_delta.text for event in events)
    assert events[-1].finished.usage.thinking_tokens > events[-1].finished.usage.answer_tokens > 0


def test_many_streams_at_once_give_the_tokens_of_each_alone(stub: GenerationServiceStub) -> None:
    requests = [
        question(f"What is {n} + 285?", sampling=pb.SamplingOptions(temperature=0.8, seed=n), max_tokens=48)
        for n in range(300, 312)
    ]

    def tokens(request: pb.GenerateRequest) -> list[int]:
        events = list(stub.Generate(request))
        return [
            i
            for e in events
            for i in (*e.thinking_delta.token_ids, *e.thinking_ended.token_ids, *e.answer_delta.token_ids)
        ]

    alone = [tokens(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(tokens, requests))

    assert together == alone


def test_chat_prints_one_json_event_a_line(server: Server) -> None:
    said = told("chat", "What is 12 + 30?", "--address", server.address, "--json", "--temperature", "0", "--seed", "7")

    events = [json.loads(line) for line in said.splitlines()]
    assert [e["sequence"] for e in events] == list(range(len(events)))
    assert {"event", "sequence", "text", "token_ids"} <= events[1].keys()
    assert events[0]["event"] == "started"
    assert events[0]["seed"] == 7
    assert events[-1]["reason"] == "stop"


def test_chat_converses_over_several_turns(server: Server) -> None:
    flags = ("--address", server.address, "--temperature", "0", "--max-tokens", "200")

    done = mull("chat", *flags, stdin="hello\nWhat is 20 + 22?\n")

    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout.splitlines()[-2]


def test_output_cut_in_the_thoughts_says_so(server: Server) -> None:
    said = told("chat", "What is 347 + 285?", "--address", server.address, "--max-tokens", "5", "--json")

    last = json.loads(said.splitlines()[-1])
    assert (last["reason"], last["phase"], last["usage"]["answer_tokens"]) == ("length", "thinking", 0)


def test_status_names_each_rank_and_its_process(server: Server) -> None:
    state = json.loads(told("status", "--address", server.address, "--json"))

    assert state["ready"] is True
    assert [rank["rank"] for rank in state["ranks"]] == [0, 1]
    assert len({rank["pid"] for rank in state["ranks"]}) == 2
    assert all(psutil.pid_exists(rank["pid"]) for rank in state["ranks"])
    assert "ready" in told("status", "--address", server.address)


def test_no_process_of_ray_runs_that_nothing_asks(server: Server) -> None:
    assert named(server, "raylet/raylet ")
    for program in ("monitor.py", "log_monitor.py", "dashboard.py"):
        assert not named(server, f"/{program}")


def test_a_client_that_vanishes_frees_its_blocks(server: Server, stub: GenerationServiceStub) -> None:
    def router() -> tuple[int, int]:
        info = stub.GetServerInfo(pb.GetServerInfoRequest()).routers[0]
        return info.num_running + info.num_waiting, info.num_free_blocks

    wait_until(lambda: router()[0] == 0, "the end of what other tests have asked")
    _, free_before = router()
    endless = pb.GenerateRequest(raw_prompt="1 2 3 4 5 6 7 8", max_tokens=900, sampling=pb.SamplingOptions(seed=1))
    with grpc.insecure_channel(server.address) as channel:
        call = GenerationServiceStub(channel).Generate(endless)
        next(call)
        next(call)

    # The step that is under way holds its blocks for a moment more.
    wait_until(lambda: router() == (0, free_before), "the Router to drop the request of a client that is gone")


def test_health_and_metrics_answer(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    gateway, router = scrape(server.metrics_url), scrape(server.router_metrics_url)

    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert (gateway.one("mull_gateway_ready"), router.one("mull_engine_ready")) == (1, 1)
    assert set(gateway.all("mull_generation_tokens_total")) == {("thinking", ""), ("answer", "")}
    assert router.one("mull_engine_steps_total") == router.one("mull_step_seconds_count", part="compute")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (question("hi", max_tokens=0), "max_tokens"),
        (question("hi", sampling=pb.SamplingOptions(top_p=1.5)), "top_p"),
        (question("hi", model="gpt"), "model"),
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(raw_prompt="1 " * 5000), "context"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[4_000_000_000])), "token_ids"),
    ],
)
def test_a_bad_request_is_refused_with_the_field_that_is_wrong(
    stub: GenerationServiceStub, request_: pb.GenerateRequest, words: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Generate(request_))

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in refused.value.details()


def test_a_second_server_on_the_same_port_is_refused_with_one_line(server: Server) -> None:
    port = server.address.rpartition(":")[2]

    done = mull("serve", *FREE_PORTS, "--grpc-port", port)

    assert done.returncode == 2
    assert port in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "/nowhere"), "/nowhere"),
        (("--tp", "3"), "3"),
        (("--tp", "0"), "tp"),
        (("--dp", "0"), "dp"),
        (("--tp", "2", "--dp", "2", "--expert-tp", "3"), "expert_tp 3 does not divide tp 2 * dp 2 = 4 ranks"),
        (("--tp", "4", "--dp", "4"), "8 experts are fewer than 16 ranks"),
        (("--redundant-experts", "4"), "at most 0 replicas"),
        (("--tp", "2", "--redundant-experts", "9"), "at most 8 replicas"),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml: cannot be read"),
        (("--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"), "/nowhere.pem: cannot be read"),
        (("--keys-file", "/nowhere.yaml"), "/nowhere.yaml: cannot be read"),
        (("--host", "0.0.0.0"), "open to other machines in plain text"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_before_anything_starts(flags: tuple[str, ...], words: str) -> None:
    done = mull("serve", *flags)

    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there are GPUs here")
def test_more_ranks_than_gpus_are_refused_with_both_numbers() -> None:
    done = mull(
        "serve",
        "--device",
        "cuda",
        "--tp",
        "2",
        "--dp",
        "2",
        *FREE_PORTS,
    )

    assert done.returncode == 2
    assert "needs 4 GPUs for --tp 2 --dp 2, found 0" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def groups_server() -> Iterator[Server]:
    with serving("--tp", "2", "--dp", "2", "--redundant-experts", "4", "--threads-per-rank", "1") as running:
        yield running


def test_attention_groups_answer_side_by_side_and_status_shows_the_layout(groups_server: Server) -> None:
    server = groups_server
    with ThreadPoolExecutor(4) as threads:
        asked = [("What is 347 + 285?", "632"), ("What is 12 + 30?", "42"), ("What is 99 + 11?", "110")]
        flags = ("--address", server.address, "--temperature", "0")
        answers = threads.map(lambda pair: told("chat", pair[0], *flags), asked)
        assert all(right in answer for answer, (_, right) in zip(answers, asked, strict=True))
    state = json.loads(told("status", "--address", server.address, "--json"))
    shown = told("status", "--address", server.address)

    assert [rank["group"] for rank in state["ranks"]] == [0, 0, 1, 1]
    assert {rank["num_experts"] for rank in state["ranks"]} == {3}
    assert "tp 2 · dp 2 · 4 redundant experts" in shown
    assert "KV tokens" in shown
    assert any(line.startswith("ready") and "tp 2 · dp 2" in line for line in server.lines)
    assert server.router_metrics_url == f"http://{state['routers'][0]['metrics_address']}/metrics"
    said = scrape(server.router_metrics_url)
    assert said.one("mull_ranks_ready") == 4
    assert said.one("mull_dispatch_bytes_total") > 0
    assert said.one("mull_dispatch_seconds_total") > 0


def test_a_second_ctrl_c_cuts_streams_off_and_tells_their_clients_why(groups_server: Server) -> None:
    """The last test of this server."""
    state = json.loads(told("status", "--address", groups_server.address, "--json"))
    with Client(groups_server.address, retry=RetryPolicy(resumptions=0)) as client:
        # Nearly the context, and so hot that nothing of it can be drafted.
        reply = iter(
            client.chat("What is 347 + 285?", temperature=8, top_p=1, top_k=0, ignore_eos=True, max_tokens=3500)
        )
        assert isinstance(next(reply), Started)
        for rank in state["ranks"]:
            psutil.Process(rank["pid"]).suspend()  # the stream stays open for as long as this test needs

        groups_server.process.send_signal(signal.SIGINT)
        wait_until(
            lambda: any(line.startswith("draining") for line in groups_server.lines), "the first Ctrl-C to be taken"
        )
        groups_server.process.send_signal(signal.SIGINT)
        with pytest.raises(CallFailed, match="shutting down") as cut:
            list(reply)

    assert cut.value.code is grpc.StatusCode.UNAVAILABLE
    assert groups_server.wait() == 130


def test_chat_without_a_server_says_so_in_one_line() -> None:
    done = mull("chat", "hi", "--address", "127.0.0.1:1")

    assert done.returncode == 1
    assert "mull serve" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_stopped_while_it_starts_leaves_no_process(number: signal.Signals) -> None:
    with starting("--tp", "1") as process:
        wait_until(lambda: len(descendants(process)) > 4, "Ray's processes")
        seen = descendants(process)
        process.send_signal(number)
        # Until it takes the signal it may start more; of one that is dead nobody is a child any more.
        seen += descendants(process)
        assert process.wait(STOP_TIMEOUT_S) != 0

        wait_until(lambda: not any(p.is_running() for p in seen), "all processes of a half-started server to end")


def test_a_gateway_that_dies_comes_back_at_its_address_and_the_server_stays(server: Server) -> None:
    (gateway,) = named(server, "Gateway")
    gateway.kill()

    def answers() -> bool:
        return mull("status", "--address", server.address).returncode == 0

    wait_until(lambda: not gateway.is_running(), "the gateway to die")
    wait_until(answers, "the gateway to come back, and to have found its Router")
    assert told("chat", "hello", "--address", server.address, "--max-tokens", "60")


def test_kill_9_leaves_no_process(server: Server) -> None:
    """The last test of this server."""
    started = descendants(server.process)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(STOP_TIMEOUT_S)

    wait_until(lambda: not any(p.is_running() for p in started), "all processes of a killed server to end")


def test_a_checkpoint_that_is_cut_short_is_refused_naming_the_file(tmp_path: Path) -> None:
    source = Path("deploy/models/pocket")
    for file in source.iterdir():
        data = file.read_bytes()
        is_last_shard = file.name.startswith("model-00002")
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if is_last_shard else data)

    done = mull("serve", *FREE_PORTS, "--model", str(tmp_path))

    assert done.returncode == 1, done.stderr
    assert "model-00002" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_demo_command_is_the_same_program() -> None:
    assert "632" in told("demo", "--tp", "2")


def test_a_server_whose_ray_has_ended_says_so_and_ends() -> None:
    with serving("--threads-per-rank", "1") as server:
        (raylet,) = named(server, "raylet/raylet ")
        left = descendants(server.process)
        raylet.kill()

        assert server.wait() == 1
        assert server.lines[-1].startswith("mull: raylet of Ray has ended; see ")
        wait_until(lambda: not any(process.is_running() for process in left), "all its processes to end")
