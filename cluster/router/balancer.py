"""When experts are placed anew: asks the ranks for loads every so many steps, and decides whether moving pays.

Pure, like the algorithm in `placement.py`: results come in, requests and updates go out; `engine.py` drives it. A step
lasts as long as its most loaded rank works, in every layer: what an imbalance costs is the sum over layers of the
largest load, compared with that of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from msgspec.structs import replace

from cluster.errors import EngineError
from cluster.router.placement import ExpertGrid, logical_loads, place_layer, rank_loads
from workers.layout import ParallelLayout
from workers.placement_map import initial_placement, slots_per_rank
from workers.step import PlacementUpdate, StepPlan, StepResult

LAYER_PARTS = 4

Placement = list[list[int]]
"""For every MoE layer: physical slot -> logical expert."""


@dataclass(frozen=True, kw_only=True)
class ModelExperts:
    """The experts of a model, as far as placing them needs to know."""

    num_experts: int
    num_layers: int
    """Layers that have experts."""
    num_redundant: int = 0


@dataclass(frozen=True, kw_only=True)
class RebalancePolicy:
    """How often to look, and what makes a move worth its time."""

    interval_steps: int = 1000
    """Between two reports of loads; 0: none."""
    threshold: float = 1.2
    """Largest over mean load of ranks below which nothing is moved."""
    min_gain: float = 0.05
    """The share of the largest load that a new placement must save."""
    min_tokens_per_expert: int = 64
    """In every layer, on average, before loads say anything: until then reports are added up."""


@dataclass(frozen=True)
class LoadReport:
    """What the ranks said: enough to compute a placement elsewhere."""

    placement: Placement
    loads: list[list[float]]
    """For every layer, tokens of each logical expert."""


def make_balancer(
    experts: ModelExperts | None, layout: ParallelLayout, nodes: Sequence[str], policy: RebalancePolicy
) -> ExpertBalancer | None:
    """None where there is nothing to balance: no experts, all of them in one place, or nobody wants it."""
    if experts is None or layout.ep == 1 or not policy.interval_steps:
        return None
    return ExpertBalancer(experts, layout, nodes, policy)


class ExpertBalancer:
    """The placement of one copy's experts. `stamp` every step's plans, `take` every step's results."""

    def __init__(
        self, experts: ModelExperts, layout: ParallelLayout, nodes: Sequence[str], policy: RebalancePolicy
    ) -> None:
        """`nodes` names the node of every rank."""
        hosts = list(nodes[:: layout.expert_tp])
        self.grid = ExpertGrid(
            num_experts=experts.num_experts,
            slots_per_rank=slots_per_rank(experts.num_experts, experts.num_redundant, layout.ep),
            nodes=tuple(hosts.index(host) for host in hosts),
        )
        first = initial_placement(experts.num_experts, experts.num_redundant, layout.ep)
        self.placement: Placement = [first] * experts.num_layers
        self.imbalance = 1.0
        """Largest over mean load of ranks, over all layers, in the last report."""
        self.imbalances: dict[str, float] = {}
        """The same by groups of layers, named as "0-23"; none before the first report."""
        self.num_rebalances_total = 0
        self._layout = layout
        self._policy = policy
        self._loads = [[0.0] * experts.num_experts for _ in range(experts.num_layers)]
        self._due_step = policy.interval_steps
        self._is_asking = False
        self._is_planning = False
        self._drops_next = False

    def stamp(self, plans: list[StepPlan]) -> list[StepPlan]:
        """Ask for loads in the plans of a step where it is time."""
        if self._is_asking or self._is_planning or plans[0].step < self._due_step:
            return plans
        self._is_asking = True
        return [replace(plan, report_loads=True) for plan in plans]

    def take(self, results: Sequence[StepResult]) -> LoadReport | None:
        """A step's results, of all ranks. Gives a report where a new placement might pay: answer with `decide`.

        Raises EngineError where the ranks report loads of another shape.
        """
        if not self._is_asking or not results[0].expert_loads:
            return None
        self._is_asking = False
        self._due_step = results[0].step + self._policy.interval_steps
        layers = [self._slot_loads(results, layer) for layer in range(len(self.placement))]
        if self._drops_next:  # counted partly before the placement was changed
            self._drops_next = False
            return None
        for total, placement, loads in zip(self._loads, self.placement, layers, strict=True):
            for expert, load in enumerate(logical_loads(self.grid, placement, loads)):
                total[expert] += load
        return self._judge()

    def plan(self, report: LoadReport) -> Placement | None:
        """A placement that is worth its moves, or None. Changes nothing here: it may run in a thread.

        Up to a second for 94 layers of 128 experts on 32 ranks.
        """
        placement: Placement = []
        for current, loads in zip(report.placement, report.loads, strict=True):
            better = place_layer(self.grid, current, loads)
            placement.append(better if self._saves([current], [better], [loads]) else current)
        return placement if self._saves(report.placement, placement, report.loads) else None

    def decide(self, placement: Placement | None) -> PlacementUpdate | None:
        """Take what `plan` gave for the last report: what to send to every rank now, if anything."""
        self._is_planning = False
        if placement is None:
            return None
        self.placement = placement
        self.num_rebalances_total += 1
        self._drops_next, self._due_step = True, 0
        return PlacementUpdate(self.num_rebalances_total, placement)

    def _judge(self) -> LoadReport | None:
        """Whether the loads seen so far call for a new placement. What is older counts half from now on."""
        if min(map(sum, self._loads)) < self._policy.min_tokens_per_expert * self.grid.num_experts:
            return None
        loads, self._loads = self._loads, [[load / 2 for load in layer] for layer in self._loads]
        self.imbalance = copy_imbalance(self.grid, self.placement, loads)
        self.imbalances = self._imbalances(loads)
        if self.imbalance < self._policy.threshold:
            return None
        self._is_planning = True
        return LoadReport(self.placement, loads)

    def _imbalances(self, loads: list[list[float]]) -> dict[str, float]:
        found = {}
        for part in layer_parts(len(loads)):
            layers = slice(part.start, part.stop)
            found[f"{part[0]}-{part[-1]}"] = copy_imbalance(self.grid, self.placement[layers], loads[layers])
        return found

    def _saves(self, old: Placement, new: Placement, loads: list[list[float]]) -> bool:
        before, after = largest_loads(self.grid, old, loads), largest_loads(self.grid, new, loads)
        return after <= (1 - self._policy.min_gain) * before and after < before

    def _slot_loads(self, results: Sequence[StepResult], layer: int) -> list[int]:
        """Every physical slot's tokens in one layer. Ranks that share an expert say the same: the first is asked."""
        slots: list[int] = []
        for result in results[:: self._layout.expert_tp]:
            expected = (len(self.placement), self.grid.slots_per_rank)
            shape = (len(result.expert_loads), len(result.expert_loads[layer]) if result.expert_loads else 0)
            if shape != expected:
                raise EngineError(
                    f"rank {result.rank} reported loads of {shape[0]} layers and {shape[1]} experts, expected "
                    f"{expected[0]} and {expected[1]}; restart the group"
                )
            slots += result.expert_loads[layer]
        return slots


def layer_parts(num_layers: int) -> list[range]:
    """All layers in a few parts of about the same size: where in a model its experts are uneven."""
    bounds = [round(index * num_layers / LAYER_PARTS) for index in range(LAYER_PARTS + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds) if stop > start]


def largest_loads(grid: ExpertGrid, placement: Placement, loads: Sequence[Sequence[float]]) -> float:
    """The sum over layers of the most loaded rank's tokens: what a step's time goes with."""
    return sum(max(rank_loads(grid, *layer)) for layer in zip(placement, loads, strict=True))


def copy_imbalance(grid: ExpertGrid, placement: Placement, loads: Sequence[Sequence[float]]) -> float:
    """Largest over mean load of ranks, over all layers."""
    total = sum(map(sum, loads))
    return largest_loads(grid, placement, loads) * grid.num_ranks / total if total else 1.0
