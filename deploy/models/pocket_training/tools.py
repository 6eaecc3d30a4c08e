"""Tools: what they look like, how users ask for them, what they return and how the result is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from pocket_training import tool_lists as lists
from pocket_training.names import Names
from pocket_training.words import make_up_word

Arguments = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool: its schema's parts, phrasings, and functions that draw arguments, results and answers."""

    name: str
    descriptions: tuple[str, ...]
    parameters: dict[str, tuple[str, str]]
    wish: str
    phrases: tuple[str, ...]
    draw: Callable[[Names], Arguments]
    result: Callable[[Random, Arguments], dict[str, Any]]
    told: str

    def schema(self, rng: Random) -> dict[str, Any]:
        """The tool in OpenAI form, with one of its descriptions, with or without notes on its parameters."""
        noted = rng.random() < 0.4
        properties = {
            name: {"type": kind, "description": note} if noted else {"type": kind}
            for name, (kind, note) in self.parameters.items()
        }
        function = {
            "name": self.name,
            "description": rng.choice(self.descriptions),
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        }
        return {"type": "function", "function": function}

    def ask(self, rng: Random, arguments: Arguments) -> str:
        """A user's question for these arguments."""
        shown = {name: str(value) for name, value in arguments.items()}
        if "from_currency" in shown and rng.random() < 0.4:
            shown = {name: lists.CURRENCIES.get(value, value) for name, value in shown.items()}
        return rng.choice(self.phrases).format(**shown)

    def tell(self, arguments: Arguments, result: dict[str, Any]) -> str:
        """The answer that follows from a result."""
        return self.told.format(**{**arguments, **result})


def _draw_currency(names: Names) -> Arguments:
    rng = names.rng
    source, target = rng.sample(tuple(lists.CURRENCIES), 2)
    amount = rng.randrange(1, 1000) if rng.random() < 0.5 else rng.randrange(1, 100) * 5
    return {"amount": amount, "from_currency": source, "to_currency": target}


def _draw_trains(names: Names) -> Arguments:
    origin, destination = names.two(lists.CITIES)
    return {"origin": origin, "destination": destination}


def _draw_translation(names: Names) -> Arguments:
    language = names.rng.choice(tuple(lists.TRANSLATIONS))
    return {"word": names.pick(lists.WORDS), "language": language}


def _meaning(rng: Random, arguments: Arguments) -> dict[str, Any]:
    known = lists.DEFINITIONS.get(arguments["word"])
    # a tool may say anything: the answer has to come from the result, not from memory
    if known is None or rng.random() < 0.5:
        known = rng.choice(tuple(lists.DEFINITIONS.values()))
    return {"meaning": known}


def _translation(rng: Random, arguments: Arguments) -> dict[str, Any]:
    language = lists.TRANSLATIONS[arguments["language"]]
    if arguments["word"] in language and rng.random() < 0.5:
        return {"translation": language[arguments["word"]]}
    return {"translation": rng.choice(tuple(language.values())) if rng.random() < 0.5 else make_up_word(rng)}


def _clock(rng: Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"


def _weather(rng: Random, _: Arguments) -> dict[str, Any]:
    return {"temperature": rng.randrange(0, 40), "condition": rng.choice(lists.CONDITIONS)}


def _restaurants(rng: Random, _: Arguments) -> dict[str, Any]:
    return {"name": rng.choice(lists.RESTAURANTS), "rating": rng.randrange(1, 6)}


TOOLS: tuple[Tool, ...] = (
    Tool(
        name="get_weather",
        descriptions=("Get the current weather in a city.", "Current weather for a city.", "Weather of a city."),
        parameters={"city": ("string", "Name of the city")},
        wish="the weather",
        phrases=("What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}?",
                 "Is it cold in {city} today?", "What's the weather like in {city}?", "Tell me the weather in {city}.",
                 "What is the weather like in {city} right now?", "Do I need a coat in {city}?"),
        draw=lambda names: {"city": names.pick(lists.CITIES)},
        result=_weather,
        told="It is {temperature} degrees and {condition} in {city}.",
    ),
    Tool(
        name="get_time",
        descriptions=("Get the current time in a city.", "Local time of a city.", "Tell the time in a city."),
        parameters={"city": ("string", "Name of the city")},
        wish="the time",
        phrases=("What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}.",
                 "Time in {city}?", "What's the time in {city} now?", "How late is it in {city}?"),
        draw=lambda names: {"city": names.pick(lists.CITIES)},
        result=lambda rng, _: {"time": _clock(rng)},
        told="It is {time} in {city}.",
    ),
    Tool(
        name="convert_currency",
        descriptions=("Convert an amount of money to another currency.", "Convert money between two currencies."),
        parameters={"amount": ("number", "How much money"), "from_currency": ("string", "Currency code"),
                    "to_currency": ("string", "Currency code")},
        wish="a conversion",
        phrases=("Convert {amount} {from_currency} to {to_currency}.",
                 "How much is {amount} {from_currency} in {to_currency}?",
                 "What are {amount} {from_currency} in {to_currency}?",
                 "Change {amount} {from_currency} into {to_currency}.",
                 "I have {amount} {from_currency}, how many {to_currency} is that?"),
        draw=_draw_currency,
        result=lambda rng, _: {"result": rng.randrange(1, 2000)},
        told="{amount} {from_currency} is {result} {to_currency}.",
    ),
    Tool(
        name="lookup_word",
        descriptions=("Look up a word in the dictionary.", "Find the meaning of a word."),
        parameters={"word": ("string", "The word")},
        wish="the meaning of a word",
        phrases=("What does {word} mean?", "Look up the word {word}.", "What is the meaning of {word}?",
                 "Define {word}.", "Please look up {word}.", "What is the definition of {word}?"),
        draw=lambda names: {"word": names.pick(lists.WORDS)},
        result=_meaning,
        told="{word}: {meaning}.",
    ),
    Tool(
        name="translate_word",
        descriptions=("Translate a word to another language.", "Translate an English word."),
        parameters={"word": ("string", "The word"), "language": ("string", "Target language")},
        wish="a translation",
        phrases=("Translate {word} to {language}.", "What is {word} in {language}?",
                 "How do you say {word} in {language}?",
                 "What is the {language} word for {word}?", "Please translate {word} into {language}."),
        draw=_draw_translation,
        result=_translation,
        told="{word} is {translation} in {language}.",
    ),
    Tool(
        name="get_stock_price",
        descriptions=("Get the stock price of a company.", "Current share price of a company."),
        parameters={"company": ("string", "Name of the company")},
        wish="a stock price",
        phrases=("What is the stock price of {company}?", "How is the {company} stock doing?",
                 "Stock price of {company}?",
                 "How much is a share of {company}?", "Tell me the price of {company} stock."),
        draw=lambda names: {"company": names.pick(lists.COMPANIES)},
        result=lambda rng, _: {"price": rng.randrange(10, 1000)},
        told="{company} stands at {price} dollars.",
    ),
    Tool(
        name="find_restaurant",
        descriptions=("Find a restaurant in a city.", "Search for a restaurant by city and cuisine."),
        parameters={"city": ("string", "Name of the city"), "cuisine": ("string", "Kind of food")},
        wish="a restaurant",
        phrases=("Find {cuisine} food in {city}.", "Where can I eat {cuisine} food in {city}?",
                 "Find a {cuisine} restaurant in {city}.", "I want {cuisine} food in {city}.",
                 "Is there a good {cuisine} restaurant in {city}?"),
        draw=lambda names: {"city": names.pick(lists.CITIES), "cuisine": names.rng.choice(lists.CUISINES)},
        result=_restaurants,
        told="Try {name} in {city}, rated {rating} of 5.",
    ),
    Tool(
        name="find_train",
        descriptions=("Find the next train between two cities.", "Next train from one city to another."),
        parameters={"origin": ("string", "City to leave from"), "destination": ("string", "City to go to")},
        wish="a train",
        phrases=("When is the next train from {origin} to {destination}?",
                 "Find a train from {origin} to {destination}.",
                 "I need to go from {origin} to {destination} by train.", "Next train from {origin} to {destination}?",
                 "How do I get from {origin} to {destination} by train?"),
        draw=_draw_trains,
        result=lambda rng, _: {"departure": _clock(rng)},
        told="The next train from {origin} to {destination} leaves at {departure}.",
    ),
    Tool(
        name="set_timer",
        descriptions=("Set a timer.", "Start a timer for some minutes."),
        parameters={"minutes": ("integer", "How many minutes")},
        wish="a timer",
        phrases=("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.",
                 "Wake me in {minutes} minutes.",
                 "Please set a {minutes} minute timer.", "Timer for {minutes} minutes, please."),
        draw=lambda names: {"minutes": names.rng.randrange(2, 100)},
        result=lambda rng, _: {"ends_at": _clock(rng)},
        told="The timer is set for {minutes} minutes and ends at {ends_at}.",
    ),
    Tool(
        name="play_music",
        descriptions=("Play music of a genre.", "Start some music."),
        parameters={"genre": ("string", "Kind of music")},
        wish="music",
        phrases=("Play some {genre}.", "Play {genre} music.", "I want to hear {genre}.", "Put on some {genre} music.",
                 "Please play {genre}."),
        draw=lambda names: {"genre": names.pick(lists.GENRES)},
        result=lambda rng, _: {"songs": rng.randrange(2, 100)},
        told="Playing {songs} songs of {genre} now.",
    ),
    Tool(
        name="add_reminder",
        descriptions=("Add a reminder.", "Remind the user of a task at an hour."),
        parameters={"task": ("string", "What to do"), "hour": ("integer", "Hour of the day")},
        wish="a reminder",
        phrases=("Remind me to {task} at {hour}.", "Add a reminder to {task} at {hour}.",
                 "At {hour} I have to {task}, remind me.",
                 "Set a reminder at {hour} to {task}."),
        draw=lambda names: {"task": names.rng.choice(lists.TASKS), "hour": names.rng.randrange(1, 24)},
        result=lambda rng, _: {"reminder_id": rng.randrange(1, 100)},
        told="I will remind you to {task} at {hour}.",
    ),
)  # fmt: skip
