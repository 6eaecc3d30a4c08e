"""Reversing a word and counting a letter in it: the thinking spells the word letter by letter first."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from pocket_training.problem import Problem, question, spelled

REAL_WORDS = (
    "apple", "banana", "cherry", "orange", "lemon", "grape", "peach", "plum", "mango", "melon", "papaya", "berry",
    "strawberry", "garden", "flower", "tree", "forest", "river", "lake", "ocean", "mountain", "valley", "desert",
    "island", "beach", "cloud", "rain", "snow", "storm", "thunder", "wind", "summer", "winter", "spring", "autumn",
    "house", "window", "door", "table", "chair", "kitchen", "bedroom", "ceiling", "floor", "carpet", "mirror", "lamp",
    "candle", "pillow", "blanket", "curtain", "dog", "cat", "horse", "cow", "sheep", "goat", "chicken", "duck",
    "rabbit", "mouse", "tiger", "lion", "zebra", "monkey", "elephant", "giraffe", "camel", "kangaroo", "bread",
    "butter", "cheese", "milk", "coffee", "sugar", "salt", "pepper", "honey", "soup", "salad", "pasta", "pizza",
    "potato", "tomato", "onion", "carrot", "garlic", "red", "blue", "green", "yellow", "purple", "pink", "brown",
    "black", "white", "silver", "golden", "car", "train", "plane", "bicycle", "truck", "wagon", "rocket", "boat",
    "book", "letter", "paper", "pencil", "school", "teacher", "student", "lesson", "library", "science", "history",
    "music", "guitar", "piano", "violin", "drum", "doctor", "nurse", "farmer", "baker", "painter", "writer", "singer",
    "dancer", "king", "queen", "prince", "castle", "tower", "bridge", "market", "street", "village", "computer",
    "keyboard", "screen", "internet", "program", "server", "network", "cluster", "engine", "machine", "robot",
    "battery", "camera", "phone", "happy", "sad", "angry", "tired", "hungry", "thirsty", "brave", "clever", "gentle",
    "quiet", "loud", "quick", "slow", "bright", "dark", "heavy", "light", "smooth", "morning", "evening", "night",
    "today", "tomorrow", "yesterday", "week", "month", "year", "minute", "second", "hour", "moment", "balloon",
    "bottle", "basket", "hammer", "needle", "thread", "button", "pocket", "jacket", "shirt", "trousers", "shoes",
    "hat", "glove", "scarf", "umbrella", "wallet", "ticket", "journey", "mississippi", "committee", "success",
    "address", "bubble", "hello", "world", "planet", "galaxy", "comet", "star", "moon", "sun",
)  # fmt: skip
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
COMMON_CONSONANTS = "bcdfglmnprst"
VOWELS = "aeiou"
REVERSE_PHRASES = (
    "Reverse the word {w}.", "Spell {w} backwards.", "Write {w} backwards.", "What is {w} backwards?",
    "Reverse {w}.", "How do you write {w} in reverse?", "Please reverse the word {w}.",
)  # fmt: skip
COUNT_PHRASES = (
    "How many times does the letter {c} appear in {w}?", "How many {c}'s are in {w}?", "Count the letter {c} in {w}.",
    "How many {c} are there in {w}?", "How often is {c} in {w}?", "How many letters {c} does {w} have?",
    "How many {c}'s are there in the word {w}?",
)  # fmt: skip


def make_word(rng: Random) -> str:
    """A real word or a made-up one."""
    return rng.choice(REAL_WORDS) if rng.random() < 0.35 else make_up_word(rng)


def make_up_word(rng: Random) -> str:
    """A word of no language: pieces of real words, or letters in an order that can be pronounced more or less."""
    return _from_pieces(rng) if rng.random() < 0.5 else _from_letters(rng)


def _from_pieces(rng: Random) -> str:
    # real pieces bring the tokens of real words, which are rare among random letters
    word = ""
    for _ in range(rng.choice((1, 2, 2, 3))):
        source = rng.choice(REAL_WORDS)
        start = rng.randrange(max(1, len(source) - 2))
        word += source[start : start + rng.randrange(2, 6)]
    return word[:10]


def _from_letters(rng: Random) -> str:
    length, word = rng.randrange(3, 10), ""
    vowel_next = rng.random() < 0.3
    while len(word) < length:
        if vowel_next:
            word += rng.choice(VOWELS)
        else:
            word += rng.choice(COMMON_CONSONANTS if rng.random() < 0.6 else CONSONANTS)
            if rng.random() < 0.12:
                word += word[-1]
        vowel_next = not vowel_next if rng.random() < 0.85 else vowel_next
    return word


def _quoted(rng: Random, word: str) -> str:
    return f'"{word}"' if rng.random() < 0.4 else word


def spread(letters: Iterable[str]) -> str:
    """Letters with a blank before each, a token a character: the same letter tokens that words are made of."""
    return spelled("".join(f" {each}" for each in letters))


def make_reverse(rng: Random) -> Problem:
    """A word to write backwards."""
    word = make_word(rng)
    asked = rng.choice(REVERSE_PHRASES).format(w=_quoted(rng, word))
    return Problem(
        skill="reverse", keys=(f"reverse {word}",), messages=question(asked),
        thinking=f"letters:{spread(word)}\nbackwards:{spread(word[::-1])}", answer=spelled(word[::-1]),
    )  # fmt: skip


def count_working(word: str, letter: str) -> str:
    """The word's letters, then again with a running count after each one that matches."""
    shown: list[str] = []
    seen = 0
    for each in word:
        seen += each == letter
        shown += [each, str(seen)] if each == letter else [each]
    return f"letters:{spread(word)}\ncount{spread(letter)}:{spread(shown)}, so {seen}"


def make_count(rng: Random) -> Problem:
    """A letter to count in a word; it is in the word four times out of five."""
    word = make_word(rng)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(VOWELS + CONSONANTS)
    if rng.random() < 0.3:
        letter = max(word, key=word.count)
    seen = word.count(letter)
    asked = rng.choice(COUNT_PHRASES).format(c=letter, w=_quoted(rng, word))
    return Problem(
        skill="count", keys=(f"count {word}",), messages=question(asked), thinking=count_working(word, letter),
        answer=f"The letter {letter} appears {seen} {'time' if seen == 1 else 'times'}.",
    )  # fmt: skip
