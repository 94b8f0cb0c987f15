"""What comes of a question: the answer that was chosen, and every candidate for it."""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import view
from ..engines.base import Chance
from .answers import same_answer
from .stopped import STOPPED

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Candidate:
    """One response.

    Attributes:
        text: the response.
        score: geometric mean of the step scores, or what else the head makes of them; 0 without a step, NaN with an error.
        step_scores: score of every step, in order.
        step_spans: ``(begin, end)`` of every step in ``text``, delimiter included; the text between the last step's end
            and the end of ``text`` belongs to no step.
        token_ids: the response's tokens, without end-of-sequence token.
        answer: what the checkpoint's answer pattern finds, or None.
        error: why there is no score, or None.
        status: how it ended: ``"stop"`` by itself, ``"length"`` at ``max_new_tokens``, ``"stopped"`` by the strategy,
            ``"interrupted"``.
        log_prob: sum of the model's log-probabilities of its tokens, end-of-sequence included, at temperature 1; NaN
            for a text that was only scored.
        logprobs: the chances of each of these tokens, where the server was asked for them.
        number: among its question's candidates, in order of creation; parent: of the one that it was forked from.
        asked: what stood behind the question in its prompt, where the strategy asked anew, as ``"refine"`` does.
        tokens: decoded for it; those that a fork has from its parent were decoded for the parent.
        further: the same text by other heads, by their names, see ``ReflectiveModel.add_head``.
        aggregation: of the steps so far, as its head has it; higher_is_better: False for scores of risk.
    """

    text: str
    score: float
    step_scores: list[float]
    step_spans: list[tuple[int, int]]
    token_ids: list[int]
    answer: str | None = None
    error: str | None = None
    status: str = "stop"
    log_prob: float = math.nan
    number: int = 0
    parent: int | None = None
    tokens: int = 0
    asked: str = field(default="", repr=False)
    logprobs: list[Chance] | None = field(default=None, repr=False)
    further: "dict[str, Candidate]" = field(default_factory=dict, repr=False)
    aggregation: str = field(default="geometric_mean", repr=False)
    higher_is_better: bool = field(default=True, repr=False)

    def record(self) -> dict[str, Any]:
        """As files hold it: every field but ``logprobs``, which is the server's alone, ``further``, what the head says of all its scores, and
        ``asked`` of a candidate that was asked the question as it is."""
        fields = asdict(self)
        del fields["logprobs"], fields["further"], fields["aggregation"], fields["higher_is_better"]
        if not self.asked:
            del fields["asked"]
        return fields

    def html(self, path: str | Path | None = None, *, right: str | None = None) -> str | None:
        """The text with each step tinted by its score, blue for good and vermilion for poor, above it the score so far as a line.

        Args:
            path: file for a whole page, which needs neither network nor script; None: the HTML is returned, to be put into a page.
            right: the right answer, by which the candidate's is called right or wrong.

        Raises:
            OSError: the file cannot be written.
        """
        return view.written("A scored response", self._fragment(right), path)

    def _repr_html_(self) -> str:
        return self._fragment(limit=view.NOTEBOOK)

    def _fragment(self, right: str | None = None, limit: int | None = None) -> str:
        return view.one(_trajectory(self, "Response", right), aggregation=self.aggregation, limit=limit)


@dataclass
class Generation:
    """What came of one question.

    Attributes:
        prompt: the text given to the model.
        candidates: all that there were, in order of creation.
        best: the one that the strategy chose.
        chosen_by: what told it from the others: ``"score"``; ``"majority"``, it gives the answer that most give;
            ``"likelihood"``, its tokens are the likeliest, on average; ``"strategy"``, a rule of the strategy's own;
            ``"only"``, there are no others; ``"abstained"``, nothing is promised of it, see ``strategies.Exit``. Where no candidate has a step, all scores are 0, and it is the majority or, of
            equally frequent answers, the likelihood that decides.
        strategy: its name.
        seed: with which the run can be repeated.
        tokens: decoded, by all candidates.
        alive: ``(seconds since the run began, candidates neither finished nor stopped)``, after every forward.
        seconds: from the beginning of the run, in which other questions may have had a part, to the end of this one.
        scoring_seconds: host time within the scorer, shared between the questions of a run by their tokens.
        interrupted: by Ctrl-C; what was decoded by then is here.
        prompt_logprobs: the chances of the prompt's tokens, where the server was asked for them.
        engine: what decoded it: ``"batch"``, transformers' forwards one by one; ``"seats"``, a step of fixed shape; ``"captured"``, the
            same as a CUDA graph; ``"compiled"``, its forward compiled besides; ``"vllm"``.
        aggregation: of the steps that a candidate has so far, as its head has it.
    """

    prompt: str
    candidates: list[Candidate]
    best: Candidate
    strategy: str = "best_of_n"
    seed: int = 0
    tokens: int = 0
    alive: list[tuple[float, int]] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    scoring_seconds: float = 0.0
    interrupted: bool = False
    chosen_by: str = "score"
    prompt_logprobs: list[Chance] | None = field(default=None, repr=False)
    engine: str = ""
    aggregation: str = "geometric_mean"

    @property
    def text(self) -> str:
        return self.best.text

    @property
    def score(self) -> float:
        return self.best.score

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the candidates' running scores and how many were alive when: a figure, also into an image file if a path is
        given. Needs matplotlib."""
        from ..plot import plot_generation

        return plot_generation(self, path)

    def html(self, path: str | Path | None = None, *, right: str | None = None) -> str | None:
        """The candidates side by side, the chosen one first: their texts with each step tinted by its score, their scores so far as lines, how they ended,
        and where some are forks of others the tree of them. A notebook shows a ``Generation`` like this by itself.

        Args:
            path: file for a whole page, which needs neither network nor script; None: the HTML is returned, to be put into a page.
            right: the right answer, by which the candidates' are called right or wrong.

        Raises:
            OSError: the file cannot be written.
        """
        return view.written(f"{self.strategy}: {self.text.strip()[:80]}", self._fragment(right), path)

    def _repr_html_(self) -> str:
        return self._fragment(limit=view.NOTEBOOK)

    def _fragment(self, right: str | None = None, limit: int | None = None) -> str:
        strategy, cut = self.strategy, sum(c.status == "stopped" for c in self.candidates)
        forked = any(c.parent is not None for c in self.candidates)
        items = []
        for c in self.candidates:
            chosen = chosen_by(self.chosen_by, strategy) if c.number == self.best.number else ""
            told = replace(c, aggregation=self.aggregation)
            items.append(_trajectory(told, f"Candidate {c.number}", right, strategy, chosen, forked))
        parts = [f"{len(items)} candidates", f"{cut} stopped" if cut else "", f"{self.tokens:,} tokens"]
        note = ", ".join(filter(None, parts)) + (", interrupted" if self.interrupted else "")
        return view.many(items, title=strategy, note=note, asked=self.prompt, aggregation=self.aggregation, limit=limit)


def chosen_by(how: str, strategy: str) -> str:
    """``Generation.chosen_by``, for people."""
    return {
        "score": f"by score ({strategy})", "majority": "by majority: most give its answer",
        "likelihood": "by likelihood: its tokens are the likeliest", "strategy": f"by the rule of {strategy}", "only": "as the only one",
        "abstained": f"abstained: {strategy} promises nothing of it",
    }.get(how, f"by {how}")  # fmt: skip


def ended(status: str, strategy: str | None = None) -> str:
    """``Candidate.status``, for people: how it ended, and why where a strategy ended it."""
    why = f": {STOPPED[strategy]}" if strategy in STOPPED else ""
    return {
        "stop": "finished", "length": "cut at its token limit", "interrupted": "interrupted",
        "stopped": f"stopped by {strategy}{why}" if strategy else "stopped by the strategy",
    }.get(status, status)  # fmt: skip


def _trajectory(
    c: Candidate, name: str, right: str | None = None, strategy: str | None = None, chosen: str = "", forked: bool = False
) -> view.Trajectory:
    return view.Trajectory(
        name, c.text, c.score, c.step_scores, c.step_spans, view.running(c.step_scores, c.aggregation),
        answer=c.answer, right=_is_right(c.answer, right), ended=ended(c.status, strategy), cut=c.status in ("stopped", "interrupted"),
        chosen=chosen, error=c.error, tokens=len(c.token_ids) or None, number=c.number if forked else None,
        parent=c.parent if forked else None, higher_is_better=c.higher_is_better,
        further=[_trajectory(other, head) for head, other in c.further.items()],
    )  # fmt: skip


def _is_right(answer: str | None, right: str | None) -> bool | None:
    if right is None:
        return None
    return answer is not None and bool(same_answer(answer, right))
