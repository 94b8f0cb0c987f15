"""Votes: the answer that most candidates, or most score, stand behind."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from . import Strategy, eligible

if TYPE_CHECKING:
    from ..model import Candidate

_NUMBER = re.compile(r"[-+]?\d{1,40}(?:\.\d{1,40}|/0{0,40}[1-9]\d{0,39})?")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")  # and not 1,2
_LETTER = re.compile("[A-Za-z]")
WORDS = re.compile(r"[^\W\d_]{2,}(?:\s+[^\W\d_]+)*")


@dataclass
class Majority(Strategy):
    """Answer: ``argmax_a #{i : answer_i = a}``; of equally frequent ones that with the higher sum of scores.

    Of the candidates that give it the one with the highest score is returned. Those without an answer do not vote; where
    none has one the highest score wins.

    Source: Wang et al., Self-Consistency Improves Chain of Thought Reasoning, arXiv 2203.11171.
    """

    name: ClassVar[str] = "majority"

    def choose(self, candidates: "Sequence[Candidate]") -> int:
        voters = [candidates[i] for i in eligible(candidates) if candidates[i].answer is not None]
        if not voters:
            return super().choose(candidates)
        weights, values = self.weights(voters), [self.value(c) for c in voters]

        def standing(group: list[int]) -> tuple[float, float, int]:
            return math.fsum(weights[v] for v in group), math.fsum(values[v] for v in group), -group[0]

        winner = max(classes([c.answer for c in voters]), key=standing)
        best = max(winner, key=lambda v: (values[v], -v))
        return next(i for i, c in enumerate(candidates) if c is voters[best])

    def weights(self, voters: "Sequence[Candidate]") -> list[float]:
        """Weight of each one's vote."""
        return [1.0] * len(voters)


@dataclass
class WeightedVote(Majority):
    """Answer: ``argmax_a sum_{i : answer_i = a} score_i``; the rest as for ``Majority``.

    Source: Li et al., Making Language Models Better Reasoners with Step-Aware Verifier, arXiv 2206.02336 (the weighted
    vote of a verifier's scores), with the trajectory score in the verifier's place.
    """

    name: ClassVar[str] = "weighted_vote"

    def weights(self, voters: "Sequence[Candidate]") -> list[float]:
        return [max(self.value(c), 0.0) for c in voters]


def classes(answers: Sequence[str]) -> list[list[int]]:
    """Indices of equal answers together, each class in order and the classes by their first member.

    An answer is compared with the first of each class.
    """
    found: list[list[int]] = []
    for i, answer in enumerate(answers):
        same = next((group for group in found if same_answer(answer, answers[group[0]])), None)
        found.append([i]) if same is None else same.append(i)
    return found


def same_answer(given: str, right: str) -> bool:
    """Whether two answers mean the same: equal text, equal numbers, or else equal in math-verify's judgement.

    Words are compared as text, since as mathematics ``no`` would equal ``on``. So is everything that math-verify cannot
    parse, and where it is not installed. Its timeouts need the main thread; elsewhere it is not asked: a vote is to end.
    A verdict that training learns from is to be right instead, see ``reflective.train.verifier``.
    """
    told = same_text(given, right)
    if told is not None:
        return told
    try:
        from math_verify import parse, verify

        return bool(verify(parse(f"${bare(right)}$"), parse(f"${bare(given)}$")))
    except (ImportError, ValueError):  # not installed, not in the main thread
        return False


def same_text(given: str, right: str) -> bool | None:
    """``same_answer`` of texts, words, letters and numbers; None where mathematics has to tell."""
    given, right = bare(given), bare(right)
    if given == right:
        return True
    if WORDS.fullmatch(given) or WORDS.fullmatch(right):
        return given.casefold() == right.casefold()
    if _LETTER.fullmatch(given) and _LETTER.fullmatch(right) and given.casefold() != right.casefold():
        return False
    numbers = [text.replace(",", "") if _GROUPED.fullmatch(text) else text for text in (given, right)]
    if all(map(_NUMBER.fullmatch, numbers)):
        return Fraction(numbers[0]) == Fraction(numbers[1])
    return None


def bare(answer: str) -> str:
    """Without blanks and dollar signs around it."""
    return answer.strip().strip("$").strip()
