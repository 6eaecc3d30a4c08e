"""The text that the tokenizer's merges are learnt from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from pocket_training.mixture import SHARES, Mixture
from pocket_training.problem import plain
from pocket_training.tokenizer import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS, ChatTemplate, completion_text

ADDED_TOKEN = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS))))
NUM_TEXTS = 12_000


def tokenizer_corpus(mixture: Mixture, template: ChatTemplate, rng: Random) -> Iterator[str]:
    """Rendered problems, cut at added tokens, with the words of word problems left out so that they stay spellable."""
    for _ in range(NUM_TEXTS):
        problem = mixture.draw(rng, rng.choices(list(SHARES), weights=list(SHARES.values()))[0], held_out=False)
        text = template.render(problem.messages, problem.tools) + plain(completion_text(problem))
        if problem.skill in ("reverse", "count"):
            word = problem.keys[0].split()[-1]
            text = text.replace(problem.expected, "").replace(word, "")
        yield from ADDED_TOKEN.split(text)
    for letter in "abcdefghijklmnopqrstuvwxyz":
        yield from [f" {letter}"] * 100_000
