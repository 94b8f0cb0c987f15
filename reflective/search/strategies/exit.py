"""Thinking ends where more of it would not change the answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from . import ANSWER, KEEP, Live, Step
from .calibrated import Calibrated

if TYPE_CHECKING:
    from ..results import Candidate, Generation


@dataclass
class Exit(Calibrated):
    """Each candidate is told to answer at its first step k with ``r_k > threshold``, k >= ``min_steps``; of several the best is the answer.

    ``r_k`` is its score up to there under ``aggregation``, by default the last step's: with a head that was trained for it, the readiness to
    answer, else how likely what stands there is to lead to a right answer.

    The risk. Of a calibration response let ``m = max r_k`` over the steps at which the answer, had it been asked for there, is another than that
    which the whole response gives; minus infinity where it never is. ``threshold`` is the ``ceil((M + 1) (1 - risk))``-th smallest of M such
    (split conformal prediction). A response that is ended too early has ``r_k > threshold`` at such a step, and so ``m > threshold``: where it is
    exchangeable with those of the calibration, ``P(its answer is changed by ending it) <= risk``, over both.

    Abstention. With the right answers of the calibration questions let ``w = max r_k`` over all steps of a response that is wrong as a whole, and minus
    infinity of one that is right; ``abstain`` is the ``ceil((M + 1) (1 - wrong))``-th smallest. Whoever is told to answer is above it, so that ``P(what is answered is wrong
    as a whole response) <= wrong``; of a response that never gets above it ``chosen_by`` is ``"abstained"``: the answer is there, and nothing is promised of it.

    Source: LYNX (Akgül et al., arXiv 2512.05325), which ends thinking at cue tokens by a probe that learnt from forced answers, and bounds premature
    ends by split conformal prediction. Deviations: the cues are step-tokens; what is bounded is the risk for a response, not for a step.

    Attributes:
        threshold: of readiness, above which a candidate answers.
        min_steps: none answers before.
        risk: stated when it was calibrated.
        questions: M; 0: the threshold was set by hand and nothing is known of the risk.
        abstain: of readiness, at or below which nothing is promised; None: there is no such.
        wrong: stated when it was calibrated.
    """

    name: ClassVar[str] = "exit"
    about: ClassVar[str] = "Ends a candidate's thinking as soon as more of it would not change the answer."
    file: ClassVar[str] = "exit.json"
    rule: ClassVar[tuple[str, ...]] = ("threshold", "aggregation", "min_steps", "risk", "questions", "abstain", "wrong")
    n: int = 1
    aggregation: str = "last"
    threshold: float | None = None
    min_steps: int = 1
    risk: float | None = None
    questions: int = 0
    abstain: float | None = None
    wrong: float | None = None
    _told: set[int] = field(default_factory=set, init=False, repr=False)  # numbers of those that were told to answer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_steps < 1:
            raise ValueError(f"min_steps={self.min_steps}; nothing is known of a candidate before its first step")

    @classmethod
    def calibrate(
        cls, generations: Sequence["Generation"], forced: Sequence[Sequence[Sequence[str | None]]], risk: float = 0.05,
        min_steps: int = 1, aggregation: str = "last", right: Sequence[str] | None = None, wrong: float = 0.1,
    ) -> "Exit":  # fmt: skip
        """The rule with the stated risk.

        Args:
            generations: of questions that nothing else is measured on, whose candidates all ran to their ends. One candidate of each counts, the
                first: those of one question are not independent.
            forced: of each, of each candidate, the answers that it gives when thinking ends at each of its steps: what
                ``ReflectiveModel.forced_answers`` returns.
            right: the right answer of each question, for abstention; wrong: its risk.

        Raises:
            ValueError: a risk outside (0, 1), fewer questions than it needs (``1 / risk - 1``), or no answers.
        """
        from .votes import same_answer

        if len(generations) != len(forced):
            raise ValueError(f"forced: of {len(forced)} questions, and there are {len(generations)}")
        if right is not None and len(right) != len(generations):
            raise ValueError(f"right: {len(right)} answers to {len(generations)} questions")
        own, worst = cls(threshold=math.inf, aggregation=aggregation, min_steps=min_steps), []
        for generation, answers in zip(generations, forced, strict=True):
            whole, early = generation.candidates[0], answers[0]
            if whole.status == "stopped":
                raise ValueError("generations: calibrate on candidates that all ran to their end; some of these were stopped")
            if len(early) != len(whole.step_scores):
                raise ValueError(f"forced: {len(early)} answers for {len(whole.step_scores)} steps")
            changed = [
                own._readiness(whole.step_scores[: k + 1])
                for k, answer in enumerate(early)
                if k + 1 >= min_steps and (whole.answer is None or answer is None or not same_answer(answer, whole.answer))
            ]
            worst.append(max(changed, default=-math.inf))
        threshold = max(_quantile("risk", risk, worst), 0.0)  # below 0 no score is
        rule = cls(threshold=threshold, aggregation=aggregation, min_steps=min_steps, risk=risk, questions=len(worst))
        if right is not None:
            liked = [
                -math.inf if c.answer is not None and same_answer(c.answer, answer) else own._readiest(c.step_scores)
                for c, answer in zip((g.candidates[0] for g in generations), right, strict=True)
            ]
            rule.abstain, rule.wrong = max(_quantile("wrong", wrong, liked), 0.0), wrong
            rule.threshold = max(rule.threshold, rule.abstain)
        return rule

    def observe(self, step: Step) -> Sequence[int] | None:
        actions = [KEEP] * len(step.candidates)
        for i, c in enumerate(step.candidates):
            if not c.finished and c.number not in self._told and self._is_ready(c):
                self._told.add(c.number)
                actions[i] = ANSWER
        return actions

    def choose(self, candidates: "Sequence[Candidate]") -> int:
        chosen = super().choose(candidates)
        if self.abstain is not None and self._readiest(candidates[chosen].step_scores) <= self.abstain:
            self.chosen_by = "abstained"
        return chosen

    def _is_ready(self, c: Live) -> bool:
        return len(c.step_scores) >= self.min_steps and self._readiness(c.step_scores) > self.threshold

    def _readiest(self, step_scores: Sequence[float]) -> float:
        """Its readiness where that is highest."""
        steps = range(self.min_steps, len(step_scores) + 1)
        return max((self._readiness(step_scores[:k]) for k in steps), default=-math.inf)

    def _readiness(self, step_scores: Sequence[float]) -> float:
        from ...scoring.scores import aggregate

        readiness = aggregate(step_scores, self.aggregation)
        return -math.inf if math.isnan(readiness) else readiness


def _quantile(name: str, risk: float, values: Sequence[float]) -> float:
    """What another value exceeds with probability ``risk`` at the most (split conformal prediction)."""
    if not 0 < risk < 1:
        raise ValueError(f"{name}={risk}; expected a number between 0 and 1")
    rank = math.ceil((len(values) + 1) * (1 - risk) - 1e-9)
    if rank > len(values):
        raise ValueError(f"{name}={risk} needs at least {math.ceil(1 / risk - 1 - 1e-9)} questions, not {len(values)}")
    return sorted(values)[rank - 1]
