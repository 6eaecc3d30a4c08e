"""A stream that is cut after any event and resumed is the undisturbed one: tokens, texts, events, logprobs, end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ModelSource
from cluster.errors import InvalidRequest
from cluster.gateway.generation import Generation
from cluster.gateway.mailbox import Mailbox
from cluster.gateway.requests import PreparedRequest, prepare
from cluster.gateway.resumption import MissingEvents, rebuild
from cluster.gateway.served_model import ServedModel
from mull.client.completion import CompletionBuilder
from mull.client.held import HeldStream
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from tests.gateway.conftest import POCKET, ask, kinds

MODEL = ServedModel.load(ModelSource(path=POCKET, name="pocket"))
ENDS = {"stop": router_pb2.End.REASON_STOP, "length": router_pb2.End.REASON_LENGTH}
TOOL = pb.Tool(name="f", parameters_json='{"type": "object"}')
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Zürich 🙂", "n": [1, 2]}}\n</tool_call>'
PIECES = st.sampled_from(
    ["a", "Zürich ", "🙂", "👩‍👩‍👧", "\n", "\n\n", "\ufffd", "</think>", "<think>", "END", "EN", "D", " ", "1234",
     CALL, "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', "{}", "}", "<tool_call>{oops}</tool_call>"]
)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """What a Router says to one request: all tokens, which of them are forced, and how it ends."""

    request: pb.GenerateRequest
    ids: list[int]
    end: router_pb2.End.Reason
    forced: range = range(0)

    @property
    def prepared(self) -> PreparedRequest:
        return prepare(self.request, MODEL)


def updates(script: Script, start: int, sizes: Sequence[int]) -> list[router_pb2.SequenceUpdate]:
    """The Router's updates from a token on, cut into sizes; forced tokens are the last ones of theirs."""
    cuts = [start]
    for size in sizes:
        cuts.append(min(cuts[-1] + size, len(script.ids)))
    if start < script.forced.stop:
        cuts = [cut for cut in cuts if cut not in script.forced or cut == start] + [script.forced.stop]
    cuts = sorted({*cuts, len(script.ids)})
    made = [router_pb2.SequenceUpdate(admitted=router_pb2.Admitted(cached_tokens=0))]
    for begin, stop in pairwise(cuts):
        update = router_pb2.SequenceUpdate(token_ids=script.ids[begin:stop])
        if script.request.sampling.HasField("logprobs"):
            update.logprobs.extend([router_pb2.RouterLogprobs(logprob=-index) for index in range(begin, stop)])
        if stop == script.forced.stop > begin:
            update.num_forced = stop - max(begin, script.forced.start)
        made.append(update)
    made[-1].end.reason = script.end
    return made


def events_of(
    generation: Generation, mailbox: Mailbox, told: Sequence[router_pb2.SequenceUpdate]
) -> list[pb.GenerateEvent]:
    events = []
    for update in told:
        mailbox.put(update)
        events += generation.accept(mailbox.take())
        if generation.finished is not None:
            break
    return events


def undisturbed(script: Script, sizes: Sequence[int]) -> list[pb.GenerateEvent]:
    generation = Generation(script.prepared, MODEL)
    return events_of(generation, Mailbox(1, 10**6), updates(script, 0, sizes))


def resumed(script: Script, got: Sequence[pb.GenerateEvent], sizes: Sequence[int]) -> list[pb.GenerateEvent]:
    """What another gateway sends to a client that has these events."""
    client = HeldStream()
    for event in got:
        client.add(event)
    prepared = prepare(client.rest_of(script.request, 0), MODEL)
    held = prepared.held[0]
    if held.finished:
        return []
    generation, missing = Generation(prepared, MODEL), MissingEvents(held)
    events = missing.of(rebuild(generation, held, prepared, 0))
    if generation.finished is None:
        num_held = len(held.token_ids)
        told = updates(script, num_held, sizes)
        events += missing.of(events_of(generation, Mailbox(1, 10**6, num_received=num_held), told))
    return events


def content(events: Sequence[pb.GenerateEvent]) -> tuple[object, ...]:
    """All that a client has in the end, and the order of kinds; not how deltas are cut."""
    builder = CompletionBuilder()
    builder.add(events)
    (completion,) = builder.response().completions
    names: list[str] = []
    for name in kinds(events):
        if not (name.endswith("_delta") and names[-1:] == [name]):
            names.append(name)
    return completion, names, [event.sequence for event in events] == list(range(len(events)))


def check_every_cut(script: Script, sizes: Sequence[int], later_sizes: Sequence[int]) -> None:
    whole = undisturbed(script, sizes)
    wanted = content(whole)
    for cut in range(1, len(whole) + 1):
        got = whole[:cut]
        both = [*got, *resumed(script, got, later_sizes)]
        assert content(both) == wanted, f"cut after event {cut - 1}"


def script_of(text: str, end: str = "stop", **fields: object) -> Script:
    request = ask(sampling=fields.pop("sampling", None) or pb.SamplingOptions(seed=3), **fields)
    request.conversation.tools.append(TOOL)
    request.request_id = "mine"
    stop_ids = sorted(MODEL.defaults.stop_token_ids)
    ids = [id_ for id_ in MODEL.tokenizer.encode(text) if id_ not in stop_ids] or [40]
    if end == "stop":
        return Script(request, [*ids, stop_ids[0]], ENDS["stop"])
    request.max_tokens = len(ids)
    return Script(request, ids, ENDS["length"])


@pytest.mark.parametrize("end", ["stop", "length"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "text",
    [
        "Easy: 4.\n</think>\n\n4",
        "\n\nhm 🙂\n\n",
        f"hm</think>\n\nSure. {CALL}\n{CALL} done\n",
        "hm</think><tool_call>{oops}</tool_call>\n",
        f"hm</think>{CALL[:30]}",
        f"hm</think>{CALL[: -len('</tool_call>')]}",
        "hm</think>one EN EN",
        "hm</think>one END two",
        "hm</think>",
    ],
)
def test_a_stream_cut_after_any_event_goes_on_exactly(text: str, size: int, end: str) -> None:
    script = script_of(text, end, stop=["END"])
    check_every_cut(script, [size] * 100, [2] * 100)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_characters_of_several_tokens_are_cut_without_loss(size: int) -> None:
    """Thoughts end, a call begins and a stream ends in the middle of a character."""
    crab = MODEL.tokenizer.encode("🦀")
    assert len(crab) > 1
    close, start = MODEL.tags.close_id, MODEL.tool_tags
    assert close is not None
    assert start is not None
    ids = [40, *crab[:-1], close, *crab, *crab[:-1], start.open_id, *crab[:-1]]
    request = script_of("x").request
    request.max_tokens = len(ids)
    check_every_cut(Script(request, ids, ENDS["length"]), [size] * 50, [1] * 50)


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("budget", [0, 4])
def test_a_cut_in_the_forced_end_of_the_thoughts_goes_on_in_it(size: int, budget: int) -> None:
    closing = MODEL.close_at_once_ids if budget == 0 else MODEL.close_ids
    ids = [40, 41, 42, 43][:budget] + list(closing) + MODEL.tokenizer.encode("4<|im_end|>")
    request = script_of("x", thinking_budget=budget).request
    script = Script(request, ids, ENDS["stop"], range(budget, budget + len(closing)))
    check_every_cut(script, [size] * 50, [1] * 50)
    (ended,) = [e.thinking_ended for e in undisturbed(script, [1] * 90) if e.HasField("thinking_ended")]
    assert ended.reason == pb.ThinkingEnded.REASON_BUDGET


def test_logprobs_of_each_token_come_once() -> None:
    script = script_of(f"hm</think>Sure. {CALL}", sampling=pb.SamplingOptions(seed=3, logprobs=1))
    check_every_cut(script, [2] * 100, [3] * 100)
    builder = CompletionBuilder()
    builder.add(undisturbed(script, [1] * 100))
    logprobs = builder.response().completions[0].logprobs
    assert [entry.logprob for entry in logprobs] == [-i for i in range(len(script.ids))]


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=12),
    sizes=st.lists(st.integers(1, 9), min_size=40, max_size=40),
    later_sizes=st.lists(st.integers(1, 9), min_size=40, max_size=40),
    end=st.sampled_from(["stop", "length"]),
    stop=st.sampled_from([(), ("END",), ("a", "\n\n")]),
    min_tokens=st.integers(0, 6),
    parallel=st.booleans(),
)
def test_any_output_cut_after_any_event_goes_on_exactly(
    pieces: list[str],
    sizes: list[int],
    later_sizes: list[int],
    end: str,
    stop: tuple[str, ...],
    min_tokens: int,
    parallel: bool,
) -> None:
    script = script_of("".join(pieces), end, stop=stop, parallel_tool_calls=parallel)
    request = pb.GenerateRequest()
    request.CopyFrom(script.request)
    request.min_tokens = min(min_tokens, len(script.ids) - 1)
    check_every_cut(replace(script, request=request), sizes, later_sizes)


def refusal(choice: pb.ResumedChoice, **fields: object) -> str:
    """The field that is named."""
    request = ask(resume=pb.Resume(choices=[choice]), **fields)
    with pytest.raises(InvalidRequest) as caught:
        rebuilt(prepare(request, MODEL))
    return caught.value.field


def rebuilt(prepared: PreparedRequest) -> list[pb.GenerateEvent]:
    return rebuild(Generation(prepared, MODEL), prepared.held[0], prepared, 0)


def test_what_contradicts_itself_is_refused_naming_the_field() -> None:
    seeded = pb.SamplingOptions(seed=1)
    stop = min(MODEL.defaults.stop_token_ids)
    some = pb.ResumedChoice(token_ids=[40, 41], next_sequence=3)
    assert refusal(some) == "sampling.seed"
    assert refusal(pb.ResumedChoice(choice=1, next_sequence=1), sampling=seeded) == "resume.choices[0].choice"
    assert refusal(pb.ResumedChoice(token_ids=[40]), sampling=seeded) == "resume.choices[0].next_sequence"
    assert refusal(some, sampling=seeded, max_tokens=1) == "resume.choices[0].token_ids"
    unknown = pb.ResumedChoice(token_ids=[40, 4_000_000], next_sequence=2)
    assert refusal(unknown, sampling=seeded) == "resume.choices[0].token_ids[1]"
    past_end = pb.ResumedChoice(token_ids=[40, stop, 41], next_sequence=4)
    assert refusal(past_end, sampling=seeded) == "resume.choices[0].token_ids"
    over = MODEL.tokenizer.encode("hm</think>one END two")
    held = pb.ResumedChoice(token_ids=over, next_sequence=4)
    assert refusal(held, sampling=seeded, stop=["END"]) == "resume.choices[0].token_ids"
