"""Votes: the answer that most candidates, or most score, stand behind."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..answers import same_answer
from . import Strategy, eligible, likelihood

if TYPE_CHECKING:
    from ..results import Candidate


@dataclass
class Majority(Strategy):
    """Answer: ``argmax_a #{i : answer_i = a}``; of equally frequent ones that with the higher sum of scores.

    Of the candidates that give it the one with the highest score is returned. Those without an answer do not vote; where
    none has one the highest score wins. Where nobody has a score the likeliest response decides in its place.

    Source: Wang et al., Self-Consistency Improves Chain of Thought Reasoning, arXiv 2203.11171.
    """

    name: ClassVar[str] = "majority"
    about: ClassVar[str] = "All run to their end; the answer that most of them give."
    _weighs: ClassVar[str] = "majority"  # what ``weights`` decides by

    def choose(self, candidates: "Sequence[Candidate]") -> int:
        there = [i for i in eligible(candidates) if candidates[i].answer is not None]
        if not there:
            return super().choose(candidates)
        voters = [candidates[i] for i in there]
        weights, scores = self.weights(voters), [max(self.value(c), 0.0) for c in voters]
        winner, self.chosen_by = _elected(
            classes([c.answer for c in voters]),
            [
                (self._weighs, lambda group: math.fsum(weights[v] for v in group)),
                ("score", lambda group: math.fsum(scores[v] for v in group)),
                ("majority", len),
                ("likelihood", lambda group: max(likelihood(voters[v]) for v in group)),
            ],
        )
        return there[max(winner, key=self.standings(voters).__getitem__)]

    def weights(self, voters: "Sequence[Candidate]") -> list[float]:
        """Weight of each one's vote."""
        return [1.0] * len(voters)


@dataclass
class WeightedVote(Majority):
    """Answer: ``argmax_a sum_{i : answer_i = a} score_i``; the rest as for ``Majority``. Where nobody has a score, it is that.

    Source: Li et al., Making Language Models Better Reasoners with Step-Aware Verifier, arXiv 2206.02336 (the weighted
    vote of a verifier's scores), with the trajectory score in the verifier's place.
    """

    name: ClassVar[str] = "weighted_vote"
    about: ClassVar[str] = "All run to their end; the answer with the largest sum of scores."
    _weighs: ClassVar[str] = "score"

    def weights(self, voters: "Sequence[Candidate]") -> list[float]:
        return [max(self.value(c), 0.0) for c in voters]


def likeliest_of_most(candidates: "Sequence[Candidate]", p: Sequence[float]) -> tuple[int, str]:
    """The choice among candidates without scores, of likelihoods ``p``: index of the likeliest response that gives the most frequent answer, of
    equally frequent ones and of equals the first, and whether ``"majority"`` or ``"likelihood"`` told it from the others.

    Where nobody has an answer, a response's text behind its ``</think>`` is its answer. An empty one does not vote.
    """
    answers = [c.answer for c in candidates]
    if any(answer is not None for answer in answers):
        voters = [i for i, answer in enumerate(answers) if answer is not None]
        groups = [[voters[v] for v in group] for group in classes([answers[i] for i in voters])]
    else:
        same: dict[str, list[int]] = {}  # mathematics is not to be looked for in whole texts
        for i, c in enumerate(candidates):
            if text := c.text.rpartition("</think>")[2].strip():
                same.setdefault(text, []).append(i)
        groups = list(same.values()) or [[i] for i in range(len(candidates))]
    winner, by = _elected(groups, [("majority", len), ("likelihood", lambda group: max(p[i] for i in group))])
    return max(winner, key=p.__getitem__), by


def _elected(
    groups: list[list[int]], levels: Sequence[tuple[str, Callable[[list[int]], float]]]
) -> tuple[list[int], str]:
    """The group that stands highest at the first of ``levels`` at which one does alone, and that level's name; of equals the
    first. A level at which all have 0 decides nothing."""
    for by, level in levels:
        heights = [level(group) for group in groups]
        top = max(heights)
        groups = [group for group, height in zip(groups, heights, strict=True) if height == top]
        if top and len(groups) == 1:
            break
    return groups[0], by


def classes(answers: Sequence[str]) -> list[list[int]]:
    """Indices of equal answers together, each class in order and the classes by their first member.

    An answer is compared with the first of each class.
    """
    found: list[list[int]] = []
    for i, answer in enumerate(answers):
        same = next((group for group in found if same_answer(answer, answers[group[0]])), None)
        found.append([i]) if same is None else same.append(i)
    return found


def answer_numbers(questions: Sequence[Hashable], answers: Sequence[str | None]) -> list[int]:
    """Numbers for N answers: equal ones for answers to one question that mean the same, -1 for None."""
    given: dict[Hashable, dict[str, int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        if answer is not None:
            given.setdefault(question, {})[answer] = -1
    for numbers in given.values():
        texts = list(numbers)
        for number, group in enumerate(classes(texts)):
            numbers.update((texts[i], number) for i in group)
    return [-1 if a is None else given[q][a] for q, a in zip(questions, answers, strict=True)]
