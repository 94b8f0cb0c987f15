"""Thinking ends where more of it would not change the answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from . import ANSWER, KEEP, Live, Step
from .calibrated import Calibrated

if TYPE_CHECKING:
    from ..results import Generation


@dataclass
class Exit(Calibrated):
    """Each candidate is told to answer at its first step k with ``r_k > threshold``, k >= ``min_steps``; of several the best is the answer.

    ``r_k`` is its score up to there under ``aggregation``, by default the last step's: with a head that was trained for it, the readiness to
    answer, else how likely what stands there is to lead to a right answer.

    The risk. Of a calibration response let ``m = max r_k`` over the steps at which the answer, had it been asked for there, is another than that
    which the whole response gives; minus infinity where it never is. ``threshold`` is the ``ceil((M + 1) (1 - risk))``-th smallest of M such
    (split conformal prediction). A response that is ended too early has ``r_k > threshold`` at such a step, and so ``m > threshold``: where it is
    exchangeable with those of the calibration, ``P(its answer is changed by ending it) <= risk``, over both.

    Source: LYNX (Akgül et al., arXiv 2512.05325), which ends thinking at cue tokens by a probe that learnt from forced answers, and bounds premature
    ends by split conformal prediction. Deviations: the cues are step-tokens; what is bounded is the risk for a response, not for a step.

    Attributes:
        threshold: of readiness, above which a candidate answers.
        min_steps: none answers before.
        risk: stated when it was calibrated.
        questions: M; 0: the threshold was set by hand and nothing is known of the risk.
    """

    name: ClassVar[str] = "exit"
    file: ClassVar[str] = "exit.json"
    rule: ClassVar[tuple[str, ...]] = ("threshold", "aggregation", "min_steps", "risk", "questions")
    n: int = 1
    aggregation: str = "last"
    threshold: float | None = None
    min_steps: int = 1
    risk: float | None = None
    questions: int = 0
    _told: set[int] = field(default_factory=set, init=False, repr=False)  # numbers of those that were told to answer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_steps < 1:
            raise ValueError(f"min_steps={self.min_steps}; nothing is known of a candidate before its first step")

    @classmethod
    def calibrate(
        cls, generations: Sequence["Generation"], forced: Sequence[Sequence[Sequence[str | None]]], risk: float = 0.05,
        min_steps: int = 1, aggregation: str = "last",
    ) -> "Exit":  # fmt: skip
        """The rule with the stated risk.

        Args:
            generations: of questions that nothing else is measured on, whose candidates all ran to their ends. One candidate of each counts, the
                first: those of one question are not independent.
            forced: of each, of each candidate, the answers that it gives when thinking ends at each of its steps: what
                ``ReflectiveModel.forced_answers`` returns.

        Raises:
            ValueError: a risk outside (0, 1), fewer questions than it needs (``1 / risk - 1``), or no answers.
        """
        from .votes import same_answer

        if not 0 < risk < 1:
            raise ValueError(f"risk={risk}; expected a number between 0 and 1")
        if len(generations) != len(forced):
            raise ValueError(f"forced: of {len(forced)} questions, and there are {len(generations)}")
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
        rank = math.ceil((len(worst) + 1) * (1 - risk) - 1e-9)
        if rank > len(worst):
            raise ValueError(f"risk={risk} needs at least {math.ceil(1 / risk - 1 - 1e-9)} questions, not {len(worst)}")
        threshold = max(sorted(worst)[rank - 1], 0.0)  # below 0 no score is
        return cls(threshold=threshold, aggregation=aggregation, min_steps=min_steps, risk=risk, questions=len(worst))

    def observe(self, step: Step) -> Sequence[int] | None:
        actions = [KEEP] * len(step.candidates)
        for i, c in enumerate(step.candidates):
            if not c.finished and c.number not in self._told and self._is_ready(c):
                self._told.add(c.number)
                actions[i] = ANSWER
        return actions

    def _is_ready(self, c: Live) -> bool:
        return len(c.step_scores) >= self.min_steps and self._readiness(c.step_scores) > self.threshold

    def _readiness(self, step_scores: Sequence[float]) -> float:
        from ...scoring.scores import aggregate

        readiness = aggregate(step_scores, self.aggregation)
        return -math.inf if math.isnan(readiness) else readiness
