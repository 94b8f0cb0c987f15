"""Best of N without those that cannot plausibly win."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Union

from ...scoring.scores import FLOOR, TrajectoryScores
from ..stopped import STOPPED
from . import KEEP, STOP, Step
from .calibrated import Calibrated

if TYPE_CHECKING:
    from ..results import Generation


@dataclass
class Prune(Calibrated):
    """Best of N in which candidate i is stopped at its k-th step if ``max_j S_j(k) - S_i(k) > threshold``.

    ``S_i(k) = mean_{s <= k} ln max(score_is, 1e-10)``, the running log-score. j are the candidates with at least k steps and
    the finished ones, which count with their final S. Judged are steps ``k >= min_steps`` of running candidates.

    The risk. For a calibration question, let ``lag = max_{k >= min_steps} max_j S_j(k) - S_w(k)``, w being the winner of best
    of N without pruning. ``threshold`` is the ``ceil((m + 1) (1 - risk))``-th smallest lag of m calibration questions (split
    conformal prediction). If the question at hand is exchangeable with those, that is: of the same kind and sampled in the
    same way with the same n, then ``P(best of N's pick is stopped) <= risk``, over both. Stopping others cannot break this:
    a candidate's tokens do not depend on who else is alive, so the winner's own S is what it would have been; and the
    candidates that it is compared with are some of those that it was compared with in ``lag``, so it lags no more. Comparing
    at equal numbers of steps makes this independent of how fast candidates decode.

    In the spirit of the online mode of Fu et al., Deep Think with Confidence, arXiv 2508.15260 (traces that fall below a
    threshold taken from warm-up traces are stopped), and of Xiong et al., ATTS, arXiv 2509.15148 (rejection by conformal
    prediction). The rule itself is this package's.

    Attributes:
        threshold: greatest lag that is borne, in nats.
        min_steps: a candidate with fewer is not judged. Part of what was calibrated.
        risk: stated when it was calibrated.
        questions: m; 0: the threshold was set by hand and nothing is known of the risk.
    """

    name: ClassVar[str] = "prune"
    about: ClassVar[str] = "Stops whoever lags too far behind the best; the highest score of the others is the answer."
    stops: ClassVar[str] = STOPPED["prune"]
    file: ClassVar[str] = "prune.json"
    rule: ClassVar[tuple[str, ...]] = ("threshold", "n", "min_steps", "risk", "questions")
    threshold: float | None = None
    min_steps: int = 1
    risk: float | None = None
    questions: int = 0
    _curves: dict[int, list[float]] = field(default_factory=dict, init=False, repr=False)  # k S(k) of every candidate
    _newest: dict[int, float] = field(default_factory=dict, init=False, repr=False)  # the score at the end of each

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation != "geometric_mean" or self.min_steps < 1:
            raise ValueError("prune judges running geometric means, after at least one step")

    @classmethod
    def calibrate(
        cls, questions: Iterable[Union["Generation", TrajectoryScores, Sequence[Sequence[float]]]],
        risk: float = 0.05, min_steps: int = 1,
    ) -> "Prune":  # fmt: skip
        """The rule with the stated risk, from finished candidates of best of N.

        Args:
            questions: of each, its ``Generation``, its ``TrajectoryScores`` or its candidates' step scores; all with the
                same number of candidates, none of them stopped.

        Raises:
            ValueError: a risk outside (0, 1), fewer questions than it needs (``1 / risk - 1``), or unlike ones.
        """
        scored = [_step_scores(question) for question in questions]
        lags = sorted(_winners_lag([extend([], c) for c in candidates], min_steps) for candidates in scored)
        if not 0 < risk < 1:
            raise ValueError(f"risk={risk}; expected a number between 0 and 1")
        if len({len(candidates) for candidates in scored}) > 1:
            raise ValueError("questions: they differ in their number of candidates")
        rank = math.ceil((len(lags) + 1) * (1 - risk) - 1e-9)
        if rank > len(lags):
            raise ValueError(f"risk={risk} needs at least {math.ceil(1 / risk - 1 - 1e-9)} questions, not {len(lags)}")
        return cls(n=len(scored[0]), threshold=lags[rank - 1], min_steps=min_steps, risk=risk, questions=len(lags))

    def observe(self, step: Step) -> Sequence[int] | None:
        finals = [c.finished is not None for c in step.candidates]
        curves = [self._curves.setdefault(c.number, []) for c in step.candidates]
        for c, curve in zip(step.candidates, curves, strict=True):
            k = len(curve)
            if k and (k > len(c.step_scores) or c.step_scores[k - 1] != self._newest[c.number]):
                curve.clear()  # thinking began behind them, and they do not count
            extend(curve, c.step_scores)
            if curve:
                self._newest[c.number] = c.step_scores[-1]
        judged = [not done and len(own) >= self.min_steps for own, done in zip(curves, finals, strict=True)]
        ahead = {k: leader(k, curves, finals) for k in {len(own) for own, yes in zip(curves, judged, strict=True) if yes}}
        return [
            STOP if yes and ahead[len(own)] - own[-1] / len(own) > self.threshold else KEEP
            for own, yes in zip(curves, judged, strict=True)
        ]


def extend(curve: list[float], step_scores: Sequence[float]) -> list[float]:
    """Append ``k S(k)`` for every step that is not in ``curve`` yet; -inf from a step without a score on."""
    for score in step_scores[len(curve) :]:
        log = -math.inf if math.isnan(score) else math.log(max(score, FLOOR))
        curve.append((curve[-1] if curve else 0.0) + log)
    return curve


def leader(k: int, curves: list[list[float]], finals: Sequence[bool]) -> float:
    """``max_j S_j(k)`` over those of ``curves`` with k steps, or fewer and final."""
    return max(
        curve[min(k, len(curve)) - 1] / min(k, len(curve))
        for curve, done in zip(curves, finals, strict=True)
        if curve and (done or len(curve) >= k)
    )


def _winners_lag(curves: list[list[float]], min_steps: int) -> float:
    curves = [curve for curve in curves if curve and curve[-1] > -math.inf]
    winner = max(curves, key=lambda curve: curve[-1] / len(curve), default=[])
    finals = [True] * len(curves)
    return max((leader(k, curves, finals) - winner[k - 1] / k for k in range(min_steps, len(winner) + 1)), default=0.0)


def _step_scores(question: Any) -> list[Sequence[float]]:
    if isinstance(question, TrajectoryScores):
        return [scores.tolist() for scores in question.step_scores]
    if not hasattr(question, "candidates"):
        return list(question)
    if any(c.status == "stopped" for c in question.candidates):
        raise ValueError("questions: calibrate on candidates that all ran to their end; some of these were stopped")
    return [c.step_scores for c in question.candidates]
