"""Addition, subtraction, short multiplication and longer sums, each with its working written out."""

from __future__ import annotations

from random import Random

from pocket_training.problem import Problem, question

PLACES = ("ones", "tens", "hundreds", "thousands")

ADD_PHRASES = (
    "What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "Add {a} and {b}.", "What is {a} plus {b}?",
    "Please add {a} and {b}.", "How much is {a} + {b}?", "What is the sum of {a} and {b}?", "Calculate {a} + {b}.",
    "Can you compute {a} plus {b}?", "What's {a} + {b}?", "Compute {a} + {b}.",
)  # fmt: skip
SUBTRACT_PHRASES = (
    "What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?", "What is {a} minus {b}?", "How much is {a} - {b}?",
    "Take {b} away from {a}.", "Subtract {b} from {a}.", "Calculate {a} - {b}.", "Can you compute {a} minus {b}?",
    "What's {a} - {b}?", "Compute {a} - {b}.",
)  # fmt: skip
MULTIPLY_PHRASES = (
    "What is {a} × {b}?", "{a} × {b}", "{a} * {b} = ?", "What is {a} * {b}?", "What is {a} times {b}?",
    "Multiply {a} by {b}.", "How much is {a} x {b}?", "Calculate {a} * {b}.", "Can you compute {a} times {b}?",
    "What's {a} × {b}?", "Compute {a} × {b}.",
)  # fmt: skip
SUM_PHRASES = (
    "What is {plus}?", "Add up {commas}.", "What is the sum of {commas}?", "{plus} = ?", "Please sum {commas}.",
    "How much is {plus}?", "What is the total of {commas}?", "Calculate {plus}.",
)  # fmt: skip


def number(rng: Random, max_digits: int) -> int:
    """A number of 1 to `max_digits` digits; longer ones are likelier."""
    digits = rng.choices(range(1, max_digits + 1), weights=[4**d for d in range(max_digits)])[0]
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _digit(value: int, place: int) -> int:
    return int(value // 10**place % 10)


def add_working(a: int, b: int) -> list[str]:
    """Column addition, a line a column from the right."""
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        terms = [_digit(a, place), _digit(b, place)] + [carry] * (carry > 0)
        total = sum(terms)
        carry = total // 10
        shown = " + ".join(map(str, terms))
        lines.append(f"{PLACES[place]}: {shown} = {total}, write {total % 10}, carry {carry}")
    if carry:
        lines.append(f"{PLACES[place + 1]}: write {carry}")
    return [*lines, f"{a} + {b} = {a + b}"]


def subtract_working(a: int, b: int) -> list[str]:
    """Which number is larger, then column subtraction with borrows: larger minus smaller."""
    lines = [f"largest: {a} or {b}: {max(a, b)}"]
    a, b = max(a, b), min(a, b)
    lines.append(f"{a} - {b}")
    borrow = 0
    for place in range(len(str(a))):
        top, terms = _digit(a, place), [_digit(b, place)] + [borrow] * (borrow > 0)
        borrow = int(top < sum(terms))
        shown = "".join(f" - {term}" for term in terms)
        # the sign is written after both digits, so that it can be read off them
        step = f"{top}{shown} < 0, 1{top}{shown}" if borrow else f"{top}{shown}"
        left = top + 10 * borrow - sum(terms)
        lines.append(f"{PLACES[place]}: {step} = {left}, write {left}, borrow {borrow}")
    return [*lines, f"{a} - {b} = {a - b}"]


def make_add(rng: Random) -> Problem:
    """Two numbers of up to three digits."""
    a, b = number(rng, 3), number(rng, 3)
    asked = rng.choice(ADD_PHRASES).format(a=a, b=b)
    return Problem(
        skill="add", keys=(f"add {a}+{b}",), messages=question(asked),
        thinking="\n".join(add_working(a, b)), answer=f"{a} + {b} = {a + b}",
    )  # fmt: skip


def make_subtract(rng: Random) -> Problem:
    """Two numbers of up to three digits; one in eight has a negative difference."""
    a, b = sorted((number(rng, 3), number(rng, 3)), reverse=True)
    if rng.random() < 0.125:
        a, b = b, a
    asked = rng.choice(SUBTRACT_PHRASES).format(a=a, b=b)
    return Problem(
        skill="subtract", keys=(f"subtract {a}-{b}",), messages=question(asked),
        thinking="\n".join(subtract_working(a, b)), answer=f"{a} - {b} = {a - b}",
    )  # fmt: skip


def make_multiply(rng: Random) -> Problem:
    """One or two digits times one digit, through partial products."""
    a, b = number(rng, 2), rng.randrange(0, 10)
    asked = rng.choice(MULTIPLY_PHRASES).format(a=a, b=b)
    if a < 10:
        working = [f"{a} × {b} = {a * b}"]
    else:
        tens, ones = a // 10 * 10, a % 10
        working = [f"{tens} × {b} = {tens * b}", f"{ones} × {b} = {ones * b}", *add_working(tens * b, ones * b)]
    return Problem(
        skill="multiply", keys=(f"multiply {a}*{b}",), messages=question(asked),
        thinking="\n".join(working), answer=f"{a} × {b} = {a * b}",
    )  # fmt: skip


def make_sum(rng: Random) -> Problem:
    """Three or four numbers of up to two digits, added one after another."""
    terms = [number(rng, 2) for _ in range(rng.choice((3, 3, 4)))]
    commas = ", ".join(map(str, terms[:-1])) + f" and {terms[-1]}"
    plus = " + ".join(map(str, terms))
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.extend(add_working(total, term))
        total += term
    return Problem(
        skill="sum", keys=(f"sum {plus}",), messages=question(rng.choice(SUM_PHRASES).format(commas=commas, plus=plus)),
        thinking="\n".join(lines), answer=f"{plus} = {total}",
    )  # fmt: skip
