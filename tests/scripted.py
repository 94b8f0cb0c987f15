"""An engine without a model: what its sequences draw, and what their steps score, stands in a table.

A token is a character. A digit ends a step and is its score in tenths; ``$`` ends the sequence.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from reflective.engines.base import Appended, Chance, Ended, Event, Opened, Prompt, Sampling, Score, Stepped
from reflective.search.text import Reader

END = "$"


class Letters:
    """A tokenizer of one character a token."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    def decode(self, ids: Sequence[int], **how: bool) -> str:
        return "".join(map(chr, ids))


def reader(**settings: Any) -> Reader:
    return Reader(Letters(), think_start=ord("<"), think_end=ord(">"), **settings)


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]


@dataclass(eq=False)
class _Sequence:
    prefix: int
    sampling: Sampling
    text: str = ""
    forced: str = ""
    owes_step: bool = False
    resting: bool = False

    def score(self) -> Score:
        places = [i for i, c in enumerate(self.text) if c.isdigit()]
        steps = [int(self.text[i]) / 10 for i in places]
        mean = math.exp(sum(map(math.log, steps)) / len(steps)) if steps else 0.0
        return Score(mean, steps, places)


class ScriptedEngine:
    """
    Args:
        script: what a sequence of this seed would draw, from its first token on; a fork goes on with its own from where it is.
        late: whether a step is told when the next token is there, as by who decodes a token at a time; else with its own.
        places: sequences that decode at once; the others wait.

    Attributes:
        calls: every call but ``advance``, in order; entered: whether it is.
    """

    def __init__(self, script: Callable[[tuple[int, ...]], str], *, late: bool = True, places: int = 64) -> None:
        self.script, self.late, self.places = script, late, places
        self.calls: list[tuple[str, Any]] = []
        self.entered, self.scoring_seconds, self.advances = False, 0.0, 0
        self.prefixes: dict[int, Prompt] = {}
        self.sequences: dict[int, _Sequence] = {}
        self._unopened: list[int] = []
        self._number = 0

    def __enter__(self) -> Self:
        self.entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self.entered = False

    @property
    def room(self) -> int:
        return self.places - sum(not s.resting for s in self.sequences.values())

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        new = [self._new() for _ in prompts]
        self.prefixes |= dict(zip(new, prompts, strict=True))
        self._unopened += new
        return new

    def start(self, prefix: int, samplings: Sequence[Sampling]) -> list[int]:
        return self._add(_Sequence(prefix, sampling) for sampling in samplings)

    def advance(self, **how: Any) -> list[Event] | None:
        assert self.entered
        self.advances += 1
        if self._unopened:
            opened, self._unopened = self._unopened, []
            return [Opened(prefix, []) for prefix in opened]
        going = [number for number, s in self.sequences.items() if not s.resting][: self.places]
        return [event for number in going for event in self._tell(number)] if going else None

    def _tell(self, number: int) -> Iterator[Event]:
        s = self.sequences[number]
        steps = self.prefixes[s.prefix].steps
        if s.owes_step:
            s.owes_step = False
            yield Stepped(number, list(s.score().step_scores), ended=True)
            if steps == "awaited":
                return
        token, s.forced = (s.forced[0], s.forced[1:]) if s.forced else (self._drawn(s), s.forced)
        chance = Chance(ord(token), -1.0, [])
        if token == END:
            del self.sequences[number]
            yield Ended(number, "stop", chance, s.score())
            return
        s.text += token
        yield Appended(number, chance)
        if len(s.text) >= s.sampling.max_tokens:
            del self.sequences[number]
            yield Ended(number, "length", None, s.score())
        elif token.isdigit() and steps != "untold":
            s.owes_step = self.late
            if not self.late:
                yield Stepped(number, list(s.score().step_scores), ended=True)

    def _drawn(self, s: _Sequence) -> str:
        return self.script(s.sampling.seed)[len(s.text) :][:1] or END

    def fork(self, sequence: int, samplings: Sequence[Sampling]) -> list[int]:
        s = self.sequences[sequence]
        new = self._add(_Sequence(s.prefix, sampling, s.text, s.forced) for sampling in samplings)
        self.calls.append(("fork", (s.text, len(new))))
        return new

    def stop(self, sequences: Sequence[int]) -> list[Score]:
        ended = [self.sequences.pop(number) for number in sequences]
        self.calls.append(("stop", [s.text for s in ended]))
        return [s.score() for s in ended]

    def rest(self, sequences: Sequence[int]) -> None:
        self._rest("rest", sequences, True)

    def resume(self, sequences: Sequence[int]) -> None:
        self._rest("resume", sequences, False)

    def _rest(self, verb: str, sequences: Sequence[int], resting: bool) -> None:
        for number in sequences:
            assert self.sequences[number].resting is not resting, "said twice"
            self.sequences[number].resting = resting
        self.calls.append((verb, [self.sequences[number].text for number in sequences]))

    def force(self, sequence: int, tokens: Sequence[int]) -> None:
        self.sequences[sequence].forced = "".join(map(chr, tokens))
        self.calls.append(("force", self.sequences[sequence].text))

    def close(self, prefixes: Sequence[int]) -> None:
        for prefix in prefixes:
            del self.prefixes[prefix]
            self._unopened = [other for other in self._unopened if other != prefix]
            self.sequences = {number: s for number, s in self.sequences.items() if s.prefix != prefix}
        self.calls.append(("close", len(prefixes)))

    def _new(self) -> int:
        self._number += 1
        return self._number

    def _add(self, new: Iterator[_Sequence]) -> list[int]:
        numbers = []
        for s in new:
            numbers.append(self._new())
            self.sequences[numbers[-1]] = s
        return numbers
