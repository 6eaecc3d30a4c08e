"""Tool problems: choose and call a tool, call two at once, answer from results, or leave the tools alone."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from pocket_training import tool_lists as lists
from pocket_training.names import Names
from pocket_training.problem import Message, Problem, question
from pocket_training.tools import TOOLS, Arguments, Tool

CITY_TOOLS = ("get_weather", "get_time")
PAIR_PHRASES = (
    "What is {w} in {a} and {b}?", "Tell me {w} in {a} and in {b}.", "What is {w} in {a} and in {b}?",
    "I want to know {w} in {a} and {b}.",
)  # fmt: skip
AGENT_PROMPT_FILE = "llm/fncall_prompts/nous_fncall_prompt.py"


def read_agent_template() -> str:
    """The system prompt that the installed `qwen-agent` package writes, with `{tool_descs}` for the tools.

    Read from the package's source, so that none of its own dependencies is needed.
    """
    spec = importlib.util.find_spec("qwen_agent")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("training needs the prompt of qwen-agent: pip install --no-deps qwen-agent")
    source = (Path(spec.submodule_search_locations[0]) / AGENT_PROMPT_FILE).read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FN_CALL_TEMPLATE":
            return str(ast.literal_eval(node.value))
    raise LookupError(f"qwen-agent's {AGENT_PROMPT_FILE} has no FN_CALL_TEMPLATE; use qwen-agent 0.0.34")


def call_text(name: str, arguments: Arguments) -> str:
    """A tool call as the model writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def arguments_key(name: str, arguments: Arguments) -> str:
    """Tool and arguments without phrasing, for the split."""
    return f"{name}({json.dumps(arguments, ensure_ascii=False)})"


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The tools on offer in one conversation, and the style of the prompt that lists them."""

    tools: list[Tool]
    schemas: list[dict[str, Any]]
    system: str | None
    agent_style: bool


class ToolUse:
    """Makes tool problems in both prompt styles: the template's own, and that of an agent library."""

    def __init__(self, agent_template: str, *, made_up: float) -> None:
        self.agent_template = agent_template
        self.made_up = made_up

    def draw_offer(self, rng: Random, *, system_prompts: tuple[str, ...] = (), among: tuple[str, ...] = ()) -> Offer:
        """One to three tools; the first one drawn is one of `among`, if given."""
        first = rng.choice([tool for tool in TOOLS if not among or tool.name in among])
        others = [tool for tool in TOOLS if tool is not first]
        tools = [first, *rng.sample(others, rng.choice((0, 0, 1, 1, 2)))]
        rng.shuffle(tools)
        system = rng.choice(system_prompts) if system_prompts and rng.random() < 0.4 else None
        return Offer(
            tools=tools, schemas=[tool.schema(rng) for tool in tools], system=system, agent_style=rng.random() < 0.5
        )

    def offered(self, offer: Offer, problem: Problem) -> Problem:
        """The same problem with the tools of `offer` in its prompt."""
        messages = problem.messages
        if not offer.agent_style:
            if offer.system is not None:
                messages = [{"role": "system", "content": offer.system}, *messages]
            return replace(problem, messages=messages, tools=offer.schemas)
        descriptions = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in offer.schemas)
        system = self.agent_template.format(tool_descs=descriptions)
        if offer.system is not None:
            system = f"{offer.system}\n\n{system}"
        return replace(problem, messages=[{"role": "system", "content": system}, *messages])

    def make_call(self, rng: Random, offer: Offer) -> Problem:
        """A question that one of the offered tools fits."""
        tool = rng.choice(offer.tools)
        arguments = tool.draw(Names(rng, self.made_up))
        problem = Problem(
            skill=styled("tool_call", offer), keys=(arguments_key(tool.name, arguments),),
            messages=question(tool.ask(rng, arguments)), thinking=call_thinking(tool, arguments),
            answer=call_text(tool.name, arguments),
        )  # fmt: skip
        return self.offered(offer, problem)

    def make_result(self, rng: Random, offer: Offer) -> Problem:
        """A tool has answered: tell the user what it said."""
        tool = rng.choice(offer.tools)
        arguments = tool.draw(Names(rng, self.made_up))
        result = tool.result(rng, arguments)
        steps = [(tool, arguments, result)]
        turns = call_turns(rng, steps, agent_style=offer.agent_style)
        problem = Problem(
            skill=styled("tool_result", offer), keys=(arguments_key(tool.name, arguments),),
            messages=[*question(tool.ask(rng, arguments)), *turns], thinking=result_thinking(steps),
            answer=tool.tell(arguments, result),
        )  # fmt: skip
        return self.offered(offer, problem)

    def make_pair(self, rng: Random, offer: Offer) -> Problem:
        """A question about two cities: two calls in one turn, or the answer from their two results."""
        tool = rng.choice([tool for tool in offer.tools if tool.name in CITY_TOOLS])
        first, second = ({"city": city} for city in Names(rng, self.made_up).two(lists.CITIES))
        asked = rng.choice(PAIR_PHRASES).format(w=tool.wish, a=first["city"], b=second["city"])
        steps = [(tool, each, tool.result(rng, each)) for each in (first, second)]
        messages = question(asked)
        if rng.random() < 0.6:
            thinking = f"The user wants {tool.wish} twice: {first['city']} and {second['city']}. {tool.name} fits."
            answer = f"{call_text(tool.name, first)}\n{call_text(tool.name, second)}"
        else:
            messages = [*messages, *call_turns(rng, steps, agent_style=offer.agent_style)]
            thinking = result_thinking(steps)
            answer = " ".join(each.tell(arguments, result) for each, arguments, result in steps)
        problem = Problem(
            skill=styled("tool_pair", offer), messages=messages, thinking=thinking, answer=answer,
            keys=(arguments_key(tool.name, first), arguments_key(tool.name, second)),
        )  # fmt: skip
        return self.offered(offer, problem)


def styled(skill: str, offer: Offer) -> str:
    """Skills are measured by prompt style."""
    return f"{skill}_agent" if offer.agent_style else skill


def call_thinking(tool: Tool, arguments: Arguments) -> str:
    """Which tool and which arguments, said before the call."""
    values = ", ".join(map(str, arguments.values()))
    return f"The user wants {tool.wish}: {values}. {tool.name} fits."


def result_thinking(steps: list[tuple[Tool, Arguments, dict[str, Any]]]) -> str:
    """What the results say."""
    said = "; ".join(", ".join(map(str, result.values())) for _, _, result in steps)
    return f"The result says {said}."


def call_turns(rng: Random, steps: list[tuple[Tool, Arguments, dict[str, Any]]], *, agent_style: bool) -> list[Message]:
    """The assistant's calls and the tools' results, as the client of either style sends them back."""
    thinking = call_thinking(*steps[0][:2]) if len(steps) == 1 else ""
    thought = {"reasoning_content": thinking} if thinking and rng.random() < 0.6 else {}
    results = [json.dumps(result, ensure_ascii=False) for _, _, result in steps]
    if not agent_style:
        calls = [
            {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
            for tool, arguments, _ in steps
        ]
        called = {"role": "assistant", "content": "", "tool_calls": calls, **thought}
        return [called, *({"role": "tool", "content": result} for result in results)]
    calls_text = "\n".join(call_text(tool.name, arguments) for tool, arguments, _ in steps)
    wrapped = "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    return [{"role": "assistant", "content": calls_text, **thought}, {"role": "user", "content": wrapped}]
