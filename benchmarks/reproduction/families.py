"""Three kinds of questions at which SmolLM2-135M-Instruct is right about one time in five, and how it is asked.

Each family is an endless generator of questions and a prompt of worked examples; the examples' numbers come from the
generator too, drawn once and kept here as text.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reflective.model import Config
from reflective.tasks import Question, sums

_NAMES = ("Tom", "Ann", "Sue", "Ben", "Lea", "Max", "Eva", "Jim")
_THINGS = ("apples", "pens", "books", "cards", "coins", "eggs")


def harder_sums(seed: int) -> Iterator[Question]:
    """``7 + 12 + 5``, numbers from 3 to 20; 5,832 different ones."""
    return sums(seed, low=3, high=20)


def products(seed: int) -> Iterator[Question]:
    """``9 * 7 + 23``: factors from 2 to 12, the rest to 50; 5,929 different ones."""
    rng = random.Random(seed)
    while True:
        a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 50)
        yield Question(f"{a} * {b} + {c}", str(a * b + c))


def boxes(seed: int) -> Iterator[Question]:
    """``Tom has 3 boxes of 7 pens and 4 more. How many pens are there?``, numbers from 2 to 8; 16,464 different ones."""
    rng = random.Random(seed)
    while True:
        name, things = rng.choice(_NAMES), rng.choice(_THINGS)
        a, b, c = (rng.randint(2, 8) for _ in range(3))
        yield Question(
            f"{name} has {a} boxes of {b} {things} and {c} more. How many {things} are there?", str(a * b + c)
        )


@dataclass(frozen=True)
class Family:
    """Attributes: ``questions(seed)``: endless; ``examples``: ``(question, steps, answer)`` shown before each question."""

    name: str
    questions: Callable[[int], Iterator[Question]]
    examples: tuple[tuple[str, tuple[str, ...], str], ...]

    @property
    def config(self) -> Config:
        """How the model is used on this family: prompt, end of a response, answer."""
        shown = "".join(
            f"Question: {question}\n{''.join(step + '.' + chr(10) * 2 for step in steps)}The answer is {answer}.\n\n"
            for question, steps, answer in self.examples
        )
        return Config(
            rule="text", prompt=shown + "Question: {question}\n", stop=r"answer is [^\n]*\n\n|Question",
            answer=r"answer is (-?\d+)", think_end="\n\nThe answer is",
        )  # fmt: skip


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sums",
            harder_sums,
            (
                ("4 + 7 + 3", ("4 + 7 = 11", "11 + 3 = 14"), "14"),
                ("9 + 2 + 8", ("9 + 2 = 11", "11 + 8 = 19"), "19"),
                ("6 + 12 + 9", ("6 + 12 = 18", "18 + 9 = 27"), "27"),
                ("13 + 3 + 7", ("13 + 3 = 16", "16 + 7 = 23"), "23"),
            ),
        ),
        Family(
            "products",
            products,
            (
                ("8 * 7 + 12", ("8 * 7 = 56", "56 + 12 = 68"), "68"),
                ("4 * 11 + 29", ("4 * 11 = 44", "44 + 29 = 73"), "73"),
                ("9 * 3 + 45", ("9 * 3 = 27", "27 + 45 = 72"), "72"),
            ),
        ),
        Family(
            "boxes",
            boxes,
            (
                (
                    "Sue has 6 boxes of 4 pens and 3 more. How many pens are there?",
                    ("6 * 4 = 24", "24 + 3 = 27"),
                    "27",
                ),
                (
                    "Max has 2 boxes of 7 coins and 8 more. How many coins are there?",
                    ("2 * 7 = 14", "14 + 8 = 22"),
                    "22",
                ),
                (
                    "Ann has 5 boxes of 5 books and 2 more. How many books are there?",
                    ("5 * 5 = 25", "25 + 2 = 27"),
                    "27",
                ),
            ),
        ),
    )
}
