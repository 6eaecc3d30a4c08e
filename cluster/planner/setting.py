"""What all candidates of a plan have in common: the model, the device, and how long steps take there."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import EngineConfig
from cluster.planner.cost import CostModel
from cluster.planner.devices import Device, Kernels
from cluster.planner.experts import expert_imbalance
from cluster.planner.fitted import Costs, FittedCost
from cluster.planner.fleet import Fleet
from cluster.planner.layouts import Fit
from cluster.planner.load import Load
from cluster.planner.roofline import FLOOR, Roofline
from cluster.planner.simulate import copy_maker
from workers.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`costs`: of a machine that was measured; None: what peaks and kernels of the device say."""

    model: ModelConfig
    device: Device
    kernels: Kernels
    costs: Costs | None = None
    redundant_experts: int = 0
    expert_skew: float = 0.0
    max_waiting: int = 256
    max_prefill_slowdown: float | None = EngineConfig().max_prefill_slowdown

    def cost(self, fit: Fit) -> CostModel:
        """Of a candidate that fits."""
        assert fit.work is not None, "it fits"
        layout = fit.candidate.layout
        if self.costs is not None:
            return FittedCost(self.model, layout, fit.work, self.costs)
        uneven = expert_imbalance(self.model, layout, redundant=self.redundant_experts, skew=self.expert_skew)
        return Roofline(self.model, layout, fit.work, self.device, self.kernels, imbalance=uneven)

    def floor(self, fit: Fit) -> CostModel | None:
        """What the hardware's peaks allow; None where they are not known."""
        if self.costs is not None or fit.work is None:
            return None
        return Roofline(self.model, fit.candidate.layout, fit.work, self.device, FLOOR)

    def fleet(self, fit: Fit, load: Load, *, copies: int | None = None) -> Fleet:
        """`copies`: another number of them than the candidate's."""
        maker = copy_maker(
            fit,
            self.cost(fit),
            max_waiting=self.max_waiting,
            shared_prompt_tokens=load.shared_prompt_tokens,
            max_prefill_slowdown=self.max_prefill_slowdown,
        )
        return Fleet(maker, fit.candidate.copies if copies is None else copies)
