"""The best candidates for a load, simulated beside each other, and which of them to take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from cluster.planner.layouts import Fit
from cluster.planner.load import DrawnLoad, Load, TraceLoad
from cluster.planner.outcome import Outcome
from cluster.planner.setting import Setting
from cluster.planner.shortlist import Settled, settle
from cluster.planner.simulate import Span, replay, simulate
from cluster.planner.workload import BURST_EVERY_S, Lengths

_WARM_UP, _MEASURED = 2.0, 1.0
"""In lifetimes of a request: what comes before it is measured, and how long that is."""
_MOST_COPIES = 8
"""That are simulated where nothing happens to them."""
_LEAST_REQUESTS, _MOST_REQUESTS = 400, 1500
"""To be measured, whatever the rate."""
_LEAST_STEPS = 100
_DAY_LIVES, _MOST_OF_DAY = 24, 6000
"""A day is simulated as if it had so many lifetimes of a request, or fewer with at most so many requests."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate under the load."""

    fit: Fit
    settled: Settled
    """What was guessed before."""
    outcome: Outcome
    """Of a load that goes by the day, over one."""
    busiest: Outcome | None = None
    """Of such a load, in its busiest hour."""

    @property
    def keeps_up(self) -> bool:
        """At any time of the day."""
        return self.outcome.keeps_up and (self.busiest is None or self.busiest.keeps_up)

    def most_streams(self, lengths: Lengths) -> int:
        """Of such a load that slots and KV hold at once."""
        return self.fit.most_streams(lengths.mean_held)

    def as_json(self) -> dict[str, Any]:
        candidate = self.fit.candidate
        layout = candidate.layout
        where: dict[str, Any] = {"layout": str(candidate), "copies": candidate.copies}
        where |= {"tp": layout.tp, "dp": layout.dp, "expert_tp": layout.expert_tp}
        busiest = {} if self.busiest is None else {"busiest_hour": self.busiest.as_json()}
        return where | self.outcome.as_json() | {"keeps_up": self.keeps_up} | busiest


def shortlist(setting: Setting, fits: Sequence[Fit], load: Load, most: int) -> list[tuple[Fit, Settled]]:
    """Those that a quick estimate finds to answer soonest; of those too slow for the load, last, those that give most.

    Of layouts that differ in `expert_tp` alone the fastest stands for all: they differ by little.
    """
    guesses = [(fit, settle(fit, setting.cost(fit), load.rate_per_s, load.lengths)) for fit in fits]
    guesses.sort(key=lambda guess: _promise(guess[1], load.lengths))
    best: dict[tuple[int, int, int], tuple[Fit, Settled]] = {}
    for fit, guess in guesses:
        candidate = fit.candidate
        best.setdefault((candidate.copies, candidate.layout.tp, candidate.layout.dp), (fit, guess))
    return list(best.values())[:most]


def _promise(guess: Settled, lengths: Lengths) -> tuple[bool, float]:
    """The least promises most, as `merit` has it."""
    return not guess.fits, guess.answer_s(lengths) if guess.fits else -guess.tokens_per_s


def try_out(setting: Setting, chosen: Sequence[tuple[Fit, Settled]], load: Load) -> list[Trial]:
    """All of them, on as many cores as there are; the best first."""
    settings, loads = [setting] * len(chosen), [load] * len(chosen)
    fits, guesses = [fit for fit, _ in chosen], [guess for _, guess in chosen]
    if len(chosen) == 1:
        trials = [_try(setting, fits[0], guesses[0], load)]
    else:
        with ProcessPoolExecutor(min(len(chosen), len(os.sched_getaffinity(0)))) as processes:
            trials = list(processes.map(_try, settings, fits, guesses, loads))
    return sorted(trials, key=merit)


def merit(trial: Trial) -> tuple[bool, float, float]:
    """The least is the best: it keeps up with the load; its answers begin soonest; it gives most."""
    outcome = trial.outcome if trial.busiest is None else trial.busiest
    answer = outcome.time_to_answer
    seconds = answer.p95 if trial.keeps_up and answer is not None else 0.0
    return not trial.keeps_up, seconds, -outcome.output_tokens_per_s


def _try(setting: Setting, fit: Fit, guess: Settled, load: Load) -> Trial:
    match load:
        case TraceLoad():
            return Trial(fit=fit, settled=guess, outcome=replay(setting.fleet(fit, load), load.trace, fit))
        case DrawnLoad(pattern="diurnal"):
            day, span = _day(load, guess)
            busiest = replace(load, pattern="steady", rate_per_s=load.most_per_s)
            return Trial(
                fit=fit,
                settled=guess,
                outcome=_drawn(setting, fit, day, span),
                busiest=_drawn(setting, fit, busiest, measured_span(busiest, guess)),
            )
        case DrawnLoad():
            span = measured_span(load, guess)
            begun = replace(load, begins_s=span.start_s)
            return Trial(fit=fit, settled=guess, outcome=_drawn(setting, fit, begun, span))


def _drawn(setting: Setting, fit: Fit, load: DrawnLoad, span: Span) -> Outcome:
    """Copies beside each other do not matter to each other: some, with their part of the load, stand for all."""
    copies = min(fit.candidate.copies, _MOST_COPIES)
    part = replace(load, rate_per_s=load.rate_per_s * copies / fit.candidate.copies)
    outcome = simulate(setting.fleet(fit, part, copies=copies), part.arrivals(fit.limits.context), span, fit)
    return outcome.of_more(fit.candidate.copies / copies)


def _day(load: DrawnLoad, guess: Settled) -> tuple[DrawnLoad, Span]:
    """A whole day, shortened to what has to be simulated of it: streams are short against it all the same."""
    life_s = guess.life_s(load.lengths)
    day_s = min(
        load.day_s, max(_LEAST_REQUESTS / load.rate_per_s, min(_DAY_LIVES * life_s, _MOST_OF_DAY / load.rate_per_s))
    )
    start_s = _WARM_UP * life_s
    return replace(load, day_s=day_s, begins_s=start_s), Span(start_s=start_s, end_s=start_s + day_s)


def measured_span(load: DrawnLoad, guess: Settled) -> Span:
    """Behind lifetimes in which the load settles; long enough to say something; whole bursts with their pauses."""
    life_s = guess.life_s(load.lengths)
    least_s = max(_LEAST_REQUESTS / load.rate_per_s, _LEAST_STEPS * guess.token_s)
    most_s = max(_MOST_REQUESTS / load.rate_per_s, least_s)
    seconds = min(max(_MEASURED * life_s, least_s), most_s)
    if load.pattern == "bursty":
        seconds = max(1, round(seconds / BURST_EVERY_S)) * BURST_EVERY_S
    start_s = _WARM_UP * life_s
    return Span(start_s=start_s, end_s=start_s + seconds)
