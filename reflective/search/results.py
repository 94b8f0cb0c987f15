"""What comes of a question: the answer that was chosen, and every candidate for it."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.base import Chance

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

    def record(self) -> dict[str, Any]:
        """As files hold it: every field but ``logprobs``, which is the server's alone, ``further``, and ``asked`` of a candidate that was asked
        the question as it is."""
        fields = asdict(self)
        del fields["logprobs"], fields["further"]
        if not self.asked:
            del fields["asked"]
        return fields


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
