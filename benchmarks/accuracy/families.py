"""Two kinds of questions that take 8 to 10 steps to answer, with worked answers to learn the form from."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reflective.model import Config
from reflective.tasks import Question

_NAMES = ("Tom", "Ann", "Sue", "Ben", "Lea", "Max", "Eva", "Jim")
_THINGS = ("apples", "pens", "books", "cards", "coins", "eggs")


@dataclass(frozen=True)
class Worked(Question):
    """Attributes: ``steps``: of the right answer, without what ends them."""

    steps: tuple[str, ...] = ()

    @property
    def response(self) -> str:
        return "".join(f"{step}.\n\n" for step in self.steps) + f"The answer is {self.answer}.\n\n"


def chains(seed: int) -> Iterator[Worked]:
    """``7+12+5+...``: 9 to 11 numbers from 3 to 20, added one after another in 8 to 10 steps."""
    rng = random.Random(seed)
    while True:
        first, *others = (rng.randint(3, 20) for _ in range(rng.randint(9, 11)))
        total, steps = first, []
        for x in others:
            steps.append(f"{total}+{x}={total + x}")
            total += x
        yield Worked("+".join(map(str, (first, *others))), str(total), steps=tuple(steps))


def crates(seed: int) -> Iterator[Worked]:
    """``Tom has 3 boxes of 7 pens, 11 boxes of 6 pens and 25 more. How many pens are there?``, found in four steps and checked in another four,
    in the other order: the answer is there after half."""
    rng = random.Random(seed)
    while True:
        name, things = rng.choice(_NAMES), rng.choice(_THINGS)
        boxes = [(rng.randint(3, 12), rng.randint(3, 12)) for _ in range(2)]
        rest = rng.randint(11, 40)
        listed = ", ".join(f"{a} boxes of {b} {things}" for a, b in boxes)
        found, total = _added([(a, b) for a, b in boxes], rest)
        checked, _ = _added([(b, a) for a, b in reversed(boxes)], rest)
        checked[0] = f"Check: {checked[0]}"
        yield Worked(
            f"{name} has {listed} and {rest} more. How many {things} are there?", str(total), steps=(*found, *checked)
        )


def _added(products: list[tuple[int, int]], rest: int) -> tuple[list[str], int]:
    steps = [f"{a}*{b}={a * b}" for a, b in products]
    total, *others = (a * b for a, b in products)
    for x in (*others, rest):
        steps.append(f"{total}+{x}={total + x}")
        total += x
    return steps, total


FAMILIES: dict[str, Callable[[int], Iterator[Worked]]] = {"chains": chains, "crates": crates}
CONFIG = Config(
    rule="text", prompt="Question: {question}\n", stop=r"answer is [^\n]*\n\n|Question", answer=r"answer is (-?\d+)", think_end="The answer is",
)  # fmt: skip
