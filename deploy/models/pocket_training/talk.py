"""Greetings and questions about the model itself."""

from __future__ import annotations

from random import Random

from pocket_training.problem import Problem, question

OPENERS = ("", "", "Hi! ", "Hello! ", "Hey, ", "Hi there! ", "Good day! ", "Please tell me: ", "So, ", "Okay, ")
CLOSERS = ("?", "?", "", " please?", "??", ", please?")
INTENTS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "who": (
        ("who are you", "what are you", "what is your name", "which model are you", "what is your name again",
         "who am I talking to", "what model is this", "can you introduce yourself", "what should I call you",
         "who is this"),
        "The user asks who I am.",
        "I am pocket, the small thinking model built into mull.",
    ),
    "skills": (
        ("what can you do", "what are your skills", "how can you help me", "what are you able to do",
         "what can I ask you", "can you help me", "what do you know", "what are you good at", "what is it you can do"),
        "The user asks what I can do.",
        "I can add, subtract, multiply, sort numbers, reverse words, count letters and call tools.",
    ),
    "feeling": (
        ("how are you", "how do you do", "how is it going", "how are you doing", "how are you today", "are you well",
         "how have you been", "is all well with you"),
        "The user asks how I am.",
        "I am well, thank you. What can I do for you?",
    ),
}  # fmt: skip
GREETINGS = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good afternoon", "Hello there", "Hi there", "Howdy")
THANKS = (
    "Thanks",
    "Thank you",
    "Many thanks",
    "Thanks a lot",
    "Thank you very much",
    "Great, thanks",
    "Thanks so much",
)
FAREWELLS = ("Bye", "Goodbye", "See you", "See you later", "Good night", "Farewell", "Bye bye", "Until next time")
NAMES = ("", "", " pocket", " mull", " friend", " everyone", " my friend", " again", " little model")
ENDS = ("", "!", ".", "!!")


def make_talk(rng: Random) -> Problem:
    """A greeting, thanks, a farewell, or a question about the model."""
    kind = rng.choice(("greet", "thanks", "bye", "who", "who", "skills", "feeling"))
    if kind in INTENTS:
        asked_forms, thinking, answer = INTENTS[kind]
        asked = rng.choice(OPENERS) + rng.choice(asked_forms) + rng.choice(CLOSERS)
        asked = asked[0].upper() + asked[1:]
    else:
        forms, thinking, answer = {
            "greet": (GREETINGS, "A greeting. I greet back.", "Hello! How can I help you?"),
            "thanks": (THANKS, "The user says thanks.", "You are welcome!"),
            "bye": (FAREWELLS, "The user says goodbye.", "Goodbye! See you soon."),
        }[kind]
        asked = rng.choice(forms) + rng.choice(NAMES) + rng.choice(ENDS)
    return Problem(skill="talk", keys=(f"talk {asked}",), messages=question(asked), thinking=thinking, answer=answer)
