"""One contract for every dispatcher: dispatch, experts, combine give each token the sum over its experts.

Real processes over gloo. E experts of hidden H and ffn F; the reference walks tokens and experts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.real_models import QWEN3_235B
from tests.workers.ranks import TIMEOUT_S, RankProcesses
from tests.workers.tape import Tape
from workers.config import ModelConfig, ParallelLayout, ShardSpec
from workers.experts.choice import DispatcherChoice, RowFormat
from workers.experts.dispatch import AllToAllDispatcher, Dispatcher, GatherScatterDispatcher, LocalDispatcher
from workers.experts.rows import RoutedRows
from workers.experts.traffic import DispatchTraffic
from workers.kernels import reference
from workers.kernels.moe import apply_experts
from workers.parallel import ParallelState
from workers.rank_group import RankGroup

HIDDEN, FFN, NUM_EXPERTS, NUM_CHOSEN = 128, 256, 8, 3
MODEL: ModelConfig = replace(
    QWEN3_235B,
    hidden_size=HIDDEN,
    num_experts=NUM_EXPERTS,
    num_experts_per_token=NUM_CHOSEN,
    moe_intermediate_size=FFN,
)
TOLERANCE = 1e-5
"""On fp32 sums of about 1: the reference adds in another order."""
FP8_TOLERANCE = 0.08
"""e4m3 keeps three bits behind the first: 1/16 of each input at worst, mostly far less in the sum of 128."""


@dataclass(frozen=True)
class Traffic:
    """All tokens of a copy, and how many of them each attention group has."""

    x_TH: Tensor
    topk_ids_TK: Tensor
    weights_TK: Tensor
    group_tokens: list[int]

    def of(self, group: int) -> RoutedRows:
        start = sum(self.group_tokens[:group])
        rows = slice(start, start + self.group_tokens[group])
        return RoutedRows(self.x_TH[rows], self.topk_ids_TK[rows], self.weights_TK[rows])


class Mirror(RankGroup):
    """Of two ranks, of which the other does what this one does."""

    def __init__(self) -> None:
        super().__init__(0, 2, None)

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        mine = rows[: send_counts[0]]
        return torch.cat([mine, mine])[: sum(receive_counts)]


def test_uneven_counts_cost_one_look_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    layout, look = ParallelLayout(dp=2), Tensor.tolist
    state, spec = ParallelState(0, layout, Mirror(), RankGroup.alone()), ShardSpec(layout, 0)
    choice = DispatcherChoice(
        MODEL, spec, state, torch.float32, "exact", before_wait=lambda: happened.append("sent what is owed")
    )
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: [happened.append("looked"), look(tensor)][1])
    for tokens in (traffic([9, 9], EVEN).of(0), traffic([0, 9], EVEN).of(0)):
        happened.clear()
        with Tape():  # which allows no `nonzero`
            rows, journey = choice.all_to_all().dispatch(tokens)
        assert happened == ["sent what is owed", "looked"]
        assert len(rows.x_RH) == 2 * journey.send_counts[0]


def experts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    gate_up_EXH = torch.randn(NUM_EXPERTS, 2 * FFN, HIDDEN, generator=generator) / HIDDEN**0.5
    return gate_up_EXH, torch.randn(NUM_EXPERTS, HIDDEN, FFN, generator=generator) / FFN**0.5


def traffic(group_tokens: list[int], expert_bias: list[float]) -> Traffic:
    """Random tokens that choose experts with more bias more often."""
    generator = torch.Generator().manual_seed(sum(group_tokens))
    count = sum(group_tokens)
    logits_TE = torch.randn(count, NUM_EXPERTS, generator=generator) + torch.tensor(expert_bias)
    top_TK, topk_ids_TK = logits_TE.topk(NUM_CHOSEN)
    x_TH = torch.randn(count, HIDDEN, generator=generator)
    return Traffic(x_TH, topk_ids_TK, top_TK.softmax(-1), group_tokens)


EVEN, SKEWED, ONE_RANK = [0.0] * 8, [3.0, 2.0, 0, 0, 0, -1.0, -2.0, -3.0], [50.0, 50.0, 50.0, *[0.0] * 5]
"""With up to two places, the first holds experts 0 to 2, and then all tokens of ONE_RANK go there."""


def cases(num_groups: int) -> dict[str, Traffic]:
    last_only = [0] * (num_groups - 1) + [1]
    return {
        "random": traffic([5 + 3 * group for group in range(num_groups)], EVEN),
        "skewed": traffic([17 - 4 * group for group in range(num_groups)], SKEWED),
        "all to one rank": traffic([6] * num_groups, ONE_RANK),
        "groups without tokens": traffic([0 if group % 2 == 0 else 9 for group in range(num_groups)], EVEN),
        "one token": traffic(last_only, EVEN),
        "none": traffic([0] * num_groups, EVEN),
    }


def dispatchers(choice: DispatcherChoice, spec: ShardSpec, group_tokens: list[int]) -> Iterator[Dispatcher[object]]:
    """Those that can serve this layout, whatever the choice would be."""
    if spec.layout.dp == 1:
        yield LocalDispatcher(choice.parallel.world)
    capacity = -(-max(group_tokens) // spec.layout.tp)
    for inner in (choice.gather_scatter(capacity), choice.all_to_all()):
        yield choice.over_tp(inner)


def run_all(parallel: ParallelState, layout: ParallelLayout, rows: RowFormat, traffic: Traffic) -> dict[str, Tensor]:
    """What each dispatcher gives this rank's group."""
    parallel = parallel.regrouped(layout, TIMEOUT_S)
    spec = ShardSpec(layout, parallel.rank)
    slots, ffn = spec.expert_slots(MODEL), spec.expert_ffn(MODEL)
    gate_up, down = experts()
    local_gate_up = torch.cat(
        [half[slots.start : slots.stop, ffn.start : ffn.stop] for half in gate_up.split(FFN, 1)], 1
    )
    local_down = down[slots.start : slots.stop, :, ffn.start : ffn.stop].contiguous()
    choice = DispatcherChoice(MODEL, spec, parallel, torch.float32, rows)
    outs = {}
    for dispatcher in dispatchers(choice, spec, traffic.group_tokens):
        received, handle = dispatcher.dispatch(traffic.of(spec.dp_rank))
        partial = apply_experts(
            received.x_RH, received.slots_RK, received.weights_RK, local_gate_up, local_down, slots.start
        )
        outs[type(getattr(dispatcher, "inner", dispatcher)).__name__] = dispatcher.combine(partial, handle)
    return outs


def expected(traffic: Traffic) -> Tensor:
    return reference.apply_experts(traffic.x_TH, traffic.topk_ids_TK, traffic.weights_TK, *experts(), 0)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankProcesses]:
    ranks = RankProcesses(1)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def worlds(one_rank: RankProcesses, two_ranks: RankProcesses, four_ranks: RankProcesses) -> dict[int, RankProcesses]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tp=2),
    ParallelLayout(dp=2),
    ParallelLayout(tp=4),
    ParallelLayout(dp=4),
    ParallelLayout(tp=2, dp=2),
    ParallelLayout(tp=2, dp=2, expert_tp=2),
    ParallelLayout(dp=4, expert_tp=4),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", cases(1))
def test_every_dispatcher_gives_each_token_the_sum_over_its_experts(
    layout: ParallelLayout, name: str, worlds: dict[int, RankProcesses]
) -> None:
    sent = cases(layout.dp)[name]
    want = expected(sent).split(sent.group_tokens)
    for rank, outs in enumerate(worlds[layout.world_size].run(run_all, layout, "exact", sent)):
        for out in outs.values():
            torch.testing.assert_close(out, want[rank // layout.tp], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", cases(1))
def test_all_dispatchers_agree_in_every_bit(world_size: int, name: str, worlds: dict[int, RankProcesses]) -> None:
    """The local one sees all tokens in each rank; the others each group's own."""
    spread = cases(world_size)[name]
    together = replace(spread, group_tokens=[sum(spread.group_tokens)])
    ranks = worlds[world_size]
    (local, *_) = ranks.run(run_all, ParallelLayout(tp=world_size), "exact", together)
    want = local[LocalDispatcher.__name__].split(spread.group_tokens)
    for rank, outs in enumerate(ranks.run(run_all, ParallelLayout(dp=world_size), "exact", spread)):
        assert outs.keys() == {GatherScatterDispatcher.__name__, AllToAllDispatcher.__name__}
        for dispatcher, out in outs.items():
            assert torch.equal(out, want[rank]), dispatcher


def bytes_of_a_sum(parallel: ParallelState, num_tokens: int) -> list[tuple[float, int]]:
    """What the traffic of a local dispatcher's sum over ranks was, and what is left of it then."""
    traffic = DispatchTraffic(parallel)
    dispatcher = traffic.metered(LocalDispatcher(parallel.world))
    parallel.tp.all_gather(torch.zeros(100))  # somebody else's
    x_TH = torch.ones(num_tokens, HIDDEN)
    rows, handle = dispatcher.dispatch(RoutedRows(x_TH, torch.zeros(num_tokens, 1), torch.ones(num_tokens, 1)))
    dispatcher.combine(rows.x_RH, handle)
    return [traffic.take(), traffic.take()]


def bytes_of_a_dispatch(parallel: ParallelState, traffic: Traffic) -> tuple[int, int]:
    """Bytes that this rank sent with an uneven exchange, and of those the rows."""
    parallel = parallel.regrouped(ParallelLayout(dp=parallel.world_size), TIMEOUT_S)
    choice = DispatcherChoice(MODEL, ShardSpec(parallel.layout, parallel.rank), parallel, torch.float32, "exact")
    metered, counted = choice.all_to_all(), DispatchTraffic(parallel)
    rows, journey = counted.metered(metered).dispatch(traffic.of(parallel.rank))
    del rows
    num_leaving = sum(journey.send_counts) - journey.send_counts[parallel.rank]
    return counted.take()[1], num_leaving * metered.packer.pack(traffic.of(parallel.rank)).shape[1]


def test_what_dispatchers_send_is_counted_and_nothing_else(two_ranks: RankProcesses) -> None:
    for counted, rest in two_ranks.run(bytes_of_a_sum, 10):
        assert counted[1] == 10 * HIDDEN * 4
        assert counted[0] > 0
        assert rest == (0.0, 0)


@pytest.mark.parametrize("name", cases(1))
def test_only_rows_that_leave_a_rank_are_counted(name: str, four_ranks: RankProcesses) -> None:
    """Beside the counts: eight bytes to each other rank."""
    for num_bytes, row_bytes in four_ranks.run(bytes_of_a_dispatch, cases(4)[name]):
        assert num_bytes == row_bytes + 3 * 8


def test_rows_may_travel_as_fp8(four_ranks: RankProcesses) -> None:
    layout, sent = ParallelLayout(tp=2, dp=2), cases(2)["random"]
    want = expected(sent).split(sent.group_tokens)
    for rank, outs in enumerate(four_ranks.run(run_all, layout, "fp8", sent)):
        for out in outs.values():
            error = (out - want[rank // 2]).abs().max() / want[rank // 2].abs().max()
            assert 0 < error < FP8_TOLERANCE


def test_the_choice_is_local_without_groups_gathers_small_steps_and_sends_large_ones() -> None:
    def chosen(layout: ParallelLayout, group_tokens: list[int]) -> str:
        state = ParallelState(0, layout, RankGroup(0, layout.world_size, None), RankGroup(0, layout.tp, None))
        choice = DispatcherChoice(MODEL, ShardSpec(layout, 0), state, torch.float32, "exact")
        dispatcher = choice.for_step(group_tokens)
        return type(getattr(dispatcher, "inner", dispatcher)).__name__

    assert chosen(ParallelLayout(tp=4), [8192]) == LocalDispatcher.__name__
    assert chosen(ParallelLayout(dp=4), [9, 0, 1, 64]) == GatherScatterDispatcher.__name__
    assert chosen(ParallelLayout(dp=4), [1, 0, 1, 65]) == AllToAllDispatcher.__name__
    assert chosen(ParallelLayout(tp=2, dp=2), [1, 128]) == GatherScatterDispatcher.__name__
