"""The score-weighted vote with a calibrated exponent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..selection import VoteRule, fit_vote_rule
from .calibrated import Calibrated
from .votes import Majority, answer_numbers, same_answer

if TYPE_CHECKING:
    from ..results import Candidate, Generation


@dataclass
class Select(Calibrated, Majority):
    """Answer: ``argmax_a sum_{i : answer_i = a} score_i ** e(n)``, ``e(n) = exponent * n ** growth``, n being those who vote.

    Majority (e = 0) takes no notice of scores, the weighted vote (1) too little, and best of n (infinity) is led astray by the one wrong answer
    whose score came out high, the more so the more there are: with n the exponent that is worth most stays finite. Of the candidates that give the
    answer the one with the highest score is returned. Where nobody's answer is known, as no two can be compared, it is best of n.

    The family is that of power means between voting and choosing; the rule, and how it is calibrated (``selection.fit_vote_rule``), are this
    package's.

    Attributes:
        exponent, growth: see above. With ``growth`` 0 the exponent is the same for every n.
        questions: that it was calibrated on; 0: it was set by hand.
    """

    name: ClassVar[str] = "select"
    about: ClassVar[str] = "All run to their end; a vote by scores to a calibrated power."
    file: ClassVar[str] = "select.json"
    rule: ClassVar[tuple[str, ...]] = ("exponent", "growth", "questions")
    _weighs: ClassVar[str] = "score"
    exponent: float | None = None
    growth: float = 0.0
    questions: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exponent >= 0:
            raise ValueError(f"exponent={self.exponent}; expected 0 (majority) or more")

    @classmethod
    def calibrate(cls, questions: Iterable["Generation"], right: Sequence[str], n: int = 8) -> "Select":
        """The rule by which most is right of what was answered to questions whose answers are known.

        Args:
            questions: of each, its ``Generation``, by a strategy that stops nobody; 32 candidates say how the exponent grows. Some
                hundred questions are needed, and none of them should be measured afterwards.
            right: the right answer of each.

        Raises:
            ValueError: other numbers of the two, stopped candidates, or nobody who answers.
        """
        score, outcome, answer, owner = judged(questions := list(questions), right)
        rule = fit_vote_rule(score, outcome, answer, owner)
        return cls(n=n, exponent=rule.exponent, growth=rule.growth, questions=len(questions))

    def weights(self, voters: "Sequence[Candidate]") -> list[float]:
        scores = [max(self.value(c), 0.0) for c in voters]
        highest, e = max(scores), float(VoteRule(self.exponent, self.growth).of(len(voters)))
        return [(s / highest) ** e if highest > 0 else 0.0 for s in scores]


def judged(questions: Sequence["Generation"], right: Sequence[str]) -> tuple[list[float], list[float], list[int], list[int]]:
    """``(score, outcome, answer, question)`` of all candidates, as ``selection.select`` takes them.

    Raises:
        ValueError: see ``Select.calibrate``.
    """
    if len(questions) != len(right):
        raise ValueError(f"right: {len(right)} answers to {len(questions)} questions")
    if any(c.status == "stopped" for q in questions for c in q.candidates):
        raise ValueError("questions: calibrate on candidates that all ran to their end; some of these were stopped")
    drawn = [(i, c) for i, q in enumerate(questions) for c in q.candidates]
    owner, answers = [i for i, _ in drawn], [c.answer for _, c in drawn]
    if all(answer is None for answer in answers):
        raise ValueError("questions: no candidate has an answer; the checkpoint's configuration says by which pattern one is found")
    own = Select(exponent=1.0)
    return (
        [max(own.value(c), 0.0) for _, c in drawn],
        [float(a is not None and same_answer(a, right[i])) for i, a in zip(owner, answers, strict=True)],
        answer_numbers(owner, answers), owner,
    )  # fmt: skip
