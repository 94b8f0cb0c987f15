"""From a question that has ended to its result."""

import dataclasses
from numbers import Integral

from ..engines.base import Score
from .candidates import Live, Question
from .loop import ask, name_of
from .results import Candidate, Generation
from .text import Reader


def outcome(prompt: str, question: Question, scoring_seconds: float = 0.0) -> Generation:
    """What a search has made of a question, and the candidate that its strategy chooses.

    Raises:
        RuntimeError: the strategy failed, or chose no candidate.
    """
    candidates = [_ended(c) for c in question.candidates]
    chooser = question.strategy.chooser or question.strategy
    chosen = ask(chooser, "choose", candidates)
    if not isinstance(chosen, Integral) or not 0 <= chosen < len(candidates):
        name = name_of(chooser)
        raise RuntimeError(f"strategy {name}: choose gave {chosen!r}, no index of its {len(candidates)} candidates")
    return Generation(
        prompt, candidates, candidates[chosen],
        strategy=question.strategy.name, seed=question.ask.seed, tokens=question.tokens, alive=question.alive,
        seconds=question.seconds, scoring_seconds=scoring_seconds,
        interrupted=any(c.status == "interrupted" for c in candidates),
        chosen_by=chooser.chosen_by if len(candidates) > 1 or chooser.chosen_by == "abstained" else "only",
        prompt_logprobs=None if question.ask.prompt_logprobs is None else question.prompt_chances,
    )  # fmt: skip


def _ended(live: Live) -> Candidate:
    return dataclasses.replace(
        candidate(live.question.reader, live.token_ids, live.scored or Score()),
        status=live.status, log_prob=live.log_prob, number=live.number, parent=live.parent, tokens=live.new_tokens,
        asked=live.asked,
        logprobs=None if live.question.ask.logprobs is None else live.chances,
    )  # fmt: skip


def candidate(reader: Reader, tokens: list[int], scored: Score) -> Candidate:
    """A response of ``tokens``, and what was read of it."""
    text, ends = reader.decode(tokens), reader.ends(tokens, scored.positions)
    return Candidate(
        text=text,
        score=scored.score,
        step_scores=list(scored.step_scores),
        step_spans=list(zip([0, *ends], ends, strict=False)),
        token_ids=tokens,
        answer=reader.answer(text),
        error=scored.error,
    )
