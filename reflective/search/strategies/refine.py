"""Drafts, and one more answer that has seen the best of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...utils.arguments import whole
from . import Live, Step, Strategy, eligible

if TYPE_CHECKING:
    from ..results import Candidate

_BEFORE = "Here are attempts at an answer. Each may be wrong."
_BEHIND = "Use what is right in them and answer the question."


@dataclass
class Refine(Strategy):
    """When n drafts have ended, the best ``drafts`` of them are put behind the question, and ``answers`` further candidates answer that; of these
    the best is the answer.

    Drafts that give the same answer as a better one are passed over while others are there. Of a draft that thinks only what stands behind
    ``</think>`` is shown, where something does. The prompt that holds them is run as any prompt is; its tokens are not decoded ones. Where
    the model has no room for it, the best draft is the answer.

    Source: the rounds of PDR (Madaan et al., Rethinking Thinking Tokens: LLMs as Improvement Operators, arXiv 2510.01123), of which this is one: draft in
    parallel, distill (here by the head's score, where it takes summaries or the top k by the model's own judgement), refine; and FusioN
    (Khairi et al., Making, not Taking, the Best of N, arXiv 2510.00931), which has a judge write one answer from all.

    Attributes:
        drafts: shown, k.
        answers: that are drawn from them.
    """

    name: ClassVar[str] = "refine"
    about: ClassVar[str] = "Puts the best drafts behind the question, and asks once more."
    asks: ClassVar[bool] = True
    drafts: int = 4
    answers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("drafts", self.drafts, 1)
        whole("answers", self.answers, 1)

    def observe(self, step: Step) -> Sequence[int] | None:
        if all(c.finished and not c.asked for c in step.candidates):
            step.fresh, step.asked = self.answers, self._asked(step.candidates)
        return None

    def _asked(self, candidates: Sequence[Live]) -> str:
        standings = self.standings(candidates)
        ranked = sorted(range(len(candidates)), key=lambda i: (standings[i], -i), reverse=True)
        seen, first, others = set(), [], []
        for i in ranked:
            answer = candidates[i].answer
            (others if answer in seen else first).append(i)
            if answer is not None:
                seen.add(answer)
        shown = [_shown(candidates[i].text) for i in (first + others)[: self.drafts]]
        attempts = (f"Attempt {k}:\n{text}" for k, text in enumerate(shown, 1))
        return "\n\n".join(("", _BEFORE, *attempts, _BEHIND))

    def choose(self, candidates: "Sequence[Candidate]") -> int:
        refined = [i for i in eligible(candidates) if candidates[i].asked]
        there = refined or eligible(candidates)
        return there[super().choose([candidates[i] for i in there])]


def _shown(text: str) -> str:
    return text.rpartition("</think>")[2].strip() or text.strip()
