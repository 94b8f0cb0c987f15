"""Questions with checkable answers, for training and evaluating a head."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_STRETCH = 20_000
_BLOCK = 500


@dataclass(frozen=True)
class Question:
    """Attributes: ``text``: as put into the prompt; ``answer``: the right one; ``entry``: the record that it comes from, for
    verifiers that need more than the answer."""

    text: str
    answer: str
    entry: dict[str, Any] | None = field(default=None, repr=False, compare=False)


def sums(seed: int, *, terms: int = 3, low: int = 2, high: int = 14) -> Iterator[Question]:
    """Sums such as ``7 + 12 + 5``, endless and with repetitions; 2,197 different ones by default."""
    rng = random.Random(seed)
    while True:
        numbers = [rng.randint(low, high) for _ in range(terms)]
        yield Question(" + ".join(map(str, numbers)), str(sum(numbers)))


def chain_sum(seed: int, *, terms: int = 3, digits: int = 1) -> Iterator[Question]:
    """Sums and differences of reasoning-gym's ``chain_sum``, the bare expression, endless and with repetitions."""
    made = gym(seed, "chain_sum", min_terms=terms, max_terms=terms, min_digits=digits, max_digits=digits)
    return (Question(q.entry["metadata"]["expression"], q.answer, q.entry) for q in made)


def gym(seed: int, dataset: str, **options: Any) -> Iterator[Question]:
    """Questions of a reasoning-gym dataset, endless; ``options`` are those of its configuration.

    Raises:
        ValueError, TypeError: unknown dataset or options.
    """
    import reasoning_gym

    for begin in itertools.count(seed, _BLOCK):  # a dataset draws its question i from seed + i
        for entry in reasoning_gym.create_dataset(dataset, seed=begin, size=_BLOCK, **options):
            yield Question(entry["question"], str(entry["answer"]), entry)


TASKS = {"sums": sums, "chain_sum": chain_sum}


def split(questions: Iterator[Question], *sizes: int) -> list[list[Question]]:
    """Disjoint lists of distinct questions, one for each size, in the order in which they come."""
    seen: set[str] = set()
    parts: list[list[Question]] = []
    for size in sizes:
        part: list[Question] = []
        while len(part) < size:
            # The tasks repeat themselves for ever; a stretch of nothing new is their end.
            fresh = (q for q in itertools.islice(questions, _STRETCH) if q.text not in seen)
            question = next(fresh, None)
            if question is None:
                raise ValueError(f"not enough different questions: {sum(sizes)} asked for, {len(seen)} found")
            seen.add(question.text)
            part.append(question)
        parts.append(part)
    return parts
