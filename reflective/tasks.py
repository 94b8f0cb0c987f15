"""Questions with checkable answers, for training and evaluating a head."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STRETCH = 20_000


@dataclass(frozen=True)
class Question:
    """Attributes: ``text``: as put into the prompt; ``answer``: the right one."""

    text: str
    answer: str


def sums(seed: int, *, terms: int = 3, low: int = 2, high: int = 14) -> Iterator[Question]:
    """Sums such as ``7 + 12 + 5``, endless and with repetitions; 2,197 different ones by default."""
    rng = random.Random(seed)
    while True:
        numbers = [rng.randint(low, high) for _ in range(terms)]
        yield Question(" + ".join(map(str, numbers)), str(sum(numbers)))


def chain_sum(seed: int, *, terms: int = 3, digits: int = 1) -> Iterator[Question]:
    """Sums and differences of reasoning-gym's ``chain_sum``, endless and with repetitions."""
    import reasoning_gym

    for index in range(10**9):
        data = reasoning_gym.create_dataset(
            "chain_sum", seed=seed + index, size=1,
            min_terms=terms, max_terms=terms, min_digits=digits, max_digits=digits,
        )  # fmt: skip
        yield Question(data[0]["metadata"]["expression"], data[0]["answer"])


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


def read_jsonl(path: str | Path) -> Iterator[Question]:
    """Questions from lines ``{"question": ..., "answer": ...}``.

    Raises:
        ValueError: a line that is no such object, by its number.
    """
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                yield Question(str(record["question"]), str(record["answer"]))
            except (json.JSONDecodeError, KeyError, TypeError) as e:
                raise ValueError(f"{path}, line {number}: expected an object with question and answer ({e})") from e
