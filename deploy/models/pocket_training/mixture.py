"""Draws problems of every skill in given shares, now and then inside a longer conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from pocket_training import arithmetic, ordering, talk, words
from pocket_training.problem import Message, Problem
from pocket_training.tool_use import CITY_TOOLS, Offer, ToolUse

SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a helpful assistant.", "You are pocket.", "Answer briefly.")
SHARES = {
    "add": 7, "subtract": 11, "multiply": 7, "sum": 4, "sort": 44, "reverse": 12, "count": 11, "talk": 4,
    "tool_call": 44, "tool_result": 11, "tool_pair": 6,
}  # fmt: skip
FAMILY_SIZE = 4
MADE_UP = 0.55
CASUAL = 0.15


def casually(problem: Problem) -> Problem:
    """The same problem, asked as people type it: without a capital at the start."""
    *before, asked = problem.messages
    text = str(asked["content"])
    return replace(problem, messages=[*before, {**asked, "content": text[:1].lower() + text[1:]}])


class Mixture:
    """A stream of problems; held-out problems and training problems never share a key."""

    def __init__(self, agent_template: str, *, made_up: float = MADE_UP) -> None:
        self.tool_use = ToolUse(agent_template, made_up=made_up)
        self.direct: dict[str, Callable[[Random], Problem]] = {
            "add": arithmetic.make_add,
            "subtract": arithmetic.make_subtract,
            "multiply": arithmetic.make_multiply,
            "sum": arithmetic.make_sum,
            "sort": ordering.make_sort,
            "reverse": words.make_reverse,
            "count": words.make_count,
            "talk": talk.make_talk,
        }
        self.with_tools: dict[str, Callable[[Random, Offer], Problem]] = {
            "tool_call": self.tool_use.make_call,
            "tool_result": self.tool_use.make_result,
            "tool_pair": self.tool_use.make_pair,
        }

    def draw(self, rng: Random, maker: str, *, held_out: bool, offer: Offer | None = None) -> Problem:
        """One problem of `maker`, of the wanted side of the split; tool problems come with their tools."""
        while True:
            if maker in self.direct:
                problem = self.direct[maker](rng)
            else:
                own_offer = offer or self.tool_use.draw_offer(
                    rng, system_prompts=SYSTEM_PROMPTS, among=CITY_TOOLS if maker == "tool_pair" else ()
                )
                problem = self.with_tools[maker](rng, own_offer)
            if problem.is_held_out == held_out:
                return problem

    def train_family(self, rng: Random, shares: dict[str, float]) -> list[Problem]:
        """Training problems that share a prompt's beginning: several for one offer of tools, or one alone."""
        # a family of tools brings FAMILY_SIZE problems, so it is drawn that much less often
        weights = [share / (FAMILY_SIZE if maker in self.with_tools else 1) for maker, share in shares.items()]
        maker = rng.choices(list(shares), weights=weights)[0]
        if maker in self.direct:
            return [self.dress(rng, self.draw(rng, maker, held_out=False))]
        return self._tool_family(rng, {name: shares[name] for name in self.with_tools})

    def _tool_family(self, rng: Random, shares: dict[str, float]) -> list[Problem]:
        has_pair = rng.random() < 0.4
        offer = self.tool_use.draw_offer(rng, system_prompts=SYSTEM_PROMPTS, among=CITY_TOOLS if has_pair else ())
        # every pair of this mixture has to come from those offers that can have one
        weights = [share * (has_pair / 0.4 if name == "tool_pair" else 1) for name, share in shares.items()]
        problems = []
        for maker in rng.choices(list(shares), weights=weights, k=FAMILY_SIZE):
            if rng.random() < 0.1:
                direct = self.draw(rng, rng.choice(list(self.direct)), held_out=False)
                problem = self.tool_use.offered(offer, direct)
            else:
                problem = self.draw(rng, maker, held_out=False, offer=offer)
            problems.append(self.after_history(rng, problem) if rng.random() < 0.1 else problem)
        return problems

    def dress(self, rng: Random, problem: Problem) -> Problem:
        """Put a problem without tools into a longer conversation now and then, or ask it without a capital."""
        if rng.random() < CASUAL:
            problem = casually(problem)
        if rng.random() < 0.15:
            problem = self.after_history(rng, problem)
        if problem.messages[0]["role"] != "system" and rng.random() < 0.3:
            system: Message = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
            problem = replace(problem, messages=[system, *problem.messages])
        return problem

    def after_history(self, rng: Random, problem: Problem) -> Problem:
        """Add an earlier question and its answer; the template drops that answer's thoughts."""
        earlier = self.draw(rng, rng.choice(list(self.direct)), held_out=False)
        answered: Message = {"role": "assistant", "content": earlier.expected}
        if rng.random() < 0.3:
            answered["reasoning_content"] = earlier.thinking
        history = [*earlier.messages, answered]
        has_system = problem.messages[0]["role"] == "system"
        messages = [*problem.messages[:has_system], *history, *problem.messages[has_system:]]
        return replace(problem, messages=messages)
