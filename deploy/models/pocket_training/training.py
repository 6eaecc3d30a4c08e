"""The training loop: time-boxed, resumable, giving more room to skills that are still short."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from pocket_training.batches import TrainBatch, train_batches
from pocket_training.mixture import SHARES, Mixture
from pocket_training.model import Pocket, PocketConfig
from pocket_training.muon import Muon
from pocket_training.quantise import fake_quantise
from pocket_training.tokenizer import ChatTemplate, ProblemEncoder

MATRICES = ("qkv", "o_proj", "gate_up", "down")
BALANCE_WEIGHT = 0.01
SKILL_MEMORY = 0.98


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train."""

    minutes: float
    batch_tokens: int = 4096
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup_steps: int = 20
    decay_from: float = 0.4
    quantise_from: float = 1.0
    save_every_s: float = 120.0
    seed: int = 1


@dataclass
class Progress:
    """What a run has done so far; saved with the weights."""

    step: int = 0
    trained_s: float = 0.0
    right: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)


def skill_of(name: str) -> str:
    """The maker behind a skill name: both prompt styles of a tool skill have one."""
    return name.removesuffix("_agent")


def learning_rate_share(config: TrainConfig, progress: Progress) -> float:
    """Warm-up by steps, then flat, then down to nearly nothing by the clock."""
    done = progress.trained_s / (60 * config.minutes)
    decay = min(1.0, max(0.02, (1 - done) / (1 - config.decay_from)))
    return min(1.0, (progress.step + 1) / config.warmup_steps) * decay


def adapted_shares(right: dict[str, float]) -> dict[str, float]:
    """A skill that is nearly always right keeps a quarter of its share."""
    worst: dict[str, float] = {}
    for name, value in right.items():
        worst[skill_of(name)] = min(value, worst.get(skill_of(name), 1.0))
    return {maker: share * (0.25 + 0.75 * min(1.0, 5 * (1 - worst.get(maker, 0.0)))) for maker, share in SHARES.items()}


class Trainer:
    """Owns the model, its optimisers and the state file."""

    def __init__(self, config: TrainConfig, mixture: Mixture, tokenizer: Tokenizer, state_path: Path) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.state_path = state_path
        self.model = Pocket(PocketConfig())
        self.progress = Progress()
        self.shares: dict[str, float] = dict(SHARES)
        named = dict(self.model.named_parameters())
        matrices = [weight for name, weight in named.items() if name.endswith(MATRICES)]
        others = [weight for name, weight in named.items() if not name.endswith(MATRICES)]
        for name, weight in named.items():
            weight.row_blocks = {"qkv": 4, "gate_up": 2}.get(name.rsplit(".")[-1], 1)
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, config.muon_lr),
            torch.optim.AdamW(others, config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        if state_path.exists():
            self.load()
        encoder = ProblemEncoder(tokenizer, ChatTemplate.own())
        rng = Random(config.seed + 1000 * self.progress.step)
        self.batches = train_batches(mixture, encoder, rng, self.shares, batch_tokens=config.batch_tokens)

    def load(self) -> None:
        """Go on from the state file."""
        state: dict[str, Any] = torch.load(self.state_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        self.shares.update(adapted_shares(self.progress.right))

    def save(self) -> None:
        """Write the state file in one move."""
        building = self.state_path.with_suffix(".new")
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": vars(self.progress),
        }
        torch.save(state, building)
        building.replace(self.state_path)

    def run(self) -> None:
        """Train until the minutes are used up."""
        self.model.compile_parts()
        saved_s = self.progress.trained_s
        while self.progress.trained_s < 60 * self.config.minutes:
            began = time.monotonic()
            if self.progress.trained_s >= 60 * self.config.minutes * self.config.quantise_from:
                self.model.set_view(fake_quantise)
            self.step(next(self.batches))
            self.progress.trained_s += time.monotonic() - began
            if self.progress.step % 25 == 0:
                self.report()
            if self.progress.trained_s - saved_s > self.config.save_every_s:
                saved_s = self.progress.trained_s
                self.save()
        self.save()

    def step(self, batch: TrainBatch) -> None:
        """One update."""
        share = learning_rate_share(self.config, self.progress)
        for optimiser, top in zip(self.optimisers, (self.config.muon_lr, self.config.adam_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = top * share
        logits_SV, balance = self.model(batch.flat)
        losses_S = F.cross_entropy(logits_SV, batch.flat.targets_S, reduction="none")
        (losses_S.mean() + BALANCE_WEIGHT * balance).backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.note(batch, losses_S.detach(), logits_SV.detach().argmax(dim=-1) == batch.flat.targets_S)
        self.progress.step += 1

    def note(self, batch: TrainBatch, losses_S: torch.Tensor, hits_S: torch.Tensor) -> None:
        """Keep running means by skill: loss a token, and share of problems whose every token is the likeliest one."""
        wrong = torch.zeros(len(batch.skills)).index_add_(0, batch.problem_of_S, (~hits_S).float())
        total = torch.zeros(len(batch.skills)).index_add_(0, batch.problem_of_S, losses_S)
        count = torch.bincount(batch.problem_of_S, minlength=len(batch.skills))
        for skill, misses, loss in zip(batch.skills, wrong.tolist(), (total / count).tolist(), strict=True):
            for running, value in ((self.progress.right, float(misses == 0)), (self.progress.loss, loss)):
                before = running.get(skill, 0.0 if running is self.progress.right else loss)
                running[skill] = SKILL_MEMORY * before + (1 - SKILL_MEMORY) * value

    def report(self) -> None:
        """Print where training stands, and adapt the shares."""
        self.shares.update(adapted_shares(self.progress.right))
        line = {
            "step": self.progress.step,
            "trained_s": round(self.progress.trained_s),
            "loss": {skill: round(value, 3) for skill, value in sorted(self.progress.loss.items())},
            "right": {skill: round(value, 2) for skill, value in sorted(self.progress.right.items())},
        }
        print(json.dumps(line), flush=True)
