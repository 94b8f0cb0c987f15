"""What becomes of every candidate of a request, told while it happens: the events of ``"reflective": {"watch": true}``.

The engine's thread notes the newest state of each candidate, and the server's tells what is new in it since it last did. In between lies one
record a candidate, however long the client takes to read: who reads slowly gets longer pieces of text, and holds up nobody.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..engines.base import Score
from ..model import Generation, ReflectiveModel
from ..scoring.scores import aggregate
from ..search.candidates import Live
from ..search.outcome import candidate
from ..search.strategies import Strategy
from ..search.strategies.votes import Majority
from ..utils.outputs import finite
from .text import Incoming, before

CHUNK = 1 << 14  # characters after which events are sent, so that one chunk does not hold all that a slow client has missed
ENDS = {
    "stop": "it has ended its answer",
    "length": "it has as many tokens as it may have",
    "interrupted": "the request was cancelled",
}
CHOSEN = {
    "score": "its score is the highest",
    "majority": "most candidates give its answer",
    "likelihood": "its tokens are the likeliest, on average",
    "strategy": "by a rule of the strategy's own",
    "only": "there is no other",
    "abstained": "it is the best there is, and nothing is promised of it",
}
CHOSEN_BY_STEPS = {  # where a strategy judges by another aggregation than the head's
    "geometric_mean": "the geometric mean of its step scores is the highest",
    "mean": "the mean of its step scores is the highest",
    "product": "the product of its step scores is the highest",
    "min": "its worst step scores higher than that of any other",
    "last": "its last step scores highest",
    "max": "its best step scores highest",
}
CHOSEN_BY_VOTE = "those who give its answer weigh most, by their scores"

Event = dict[str, Any]


class _State(NamedTuple):
    """A candidate after a forward. Nothing is copied: tokens are only ever appended, and lists of steps are replaced."""

    live: Live
    tokens: int
    scores: list[float]
    ends: list[int]
    status: str
    held: bool
    scored: Score | None


@dataclass
class _Told:
    """What the client knows of a candidate. Attributes: ``tokens``: whose text was fed; ``steps``: their scores; ``status``, ``held``: as told."""

    text: Incoming
    tokens: int = 0
    steps: list[float | None] = field(default_factory=list)
    status: str = "running"
    held: bool = False

    def forked(self, fork: _State) -> "_Told":
        """What it knows of a fork that begins here: of the parent's steps those that end before, as far as both have been told of them."""
        steps = sum(end <= fork.live.inherited for end in fork.ends)
        return _Told(self.text.copy(), self.tokens, self.steps[:steps])


class Watch:
    """
    Args:
        model: whose candidates they are.
        stops: the request's stop texts.
    """

    def __init__(self, model: ReflectiveModel, stops: Sequence[str] = ()) -> None:
        self._model, self._stops = model, stops
        self._lock = threading.Lock()
        self._new: dict[tuple[int, int], _State] = {}  # by prompt and number; not told yet
        self._noted: dict[tuple[int, int], tuple[int, int, str, bool]] = {}
        self._woken = False
        self._told: dict[tuple[int, int], _Told] = {}
        self._strategies: dict[int, Strategy] = {}  # of each prompt
        self._forked: dict[tuple[int, int], _Told] = {}  # the same of forks that are yet to be told of

    def note(self, prompt: int, candidates: Sequence[Live]) -> bool:
        """In the engine's thread, after a forward: keep what is new. Whether ``events`` is to be called, which it was not told before."""
        new = {}
        for c in candidates:
            key, mark = (prompt, c.number), (len(c.token_ids), len(c.step_scores), c.status, c.held)
            if self._noted.get(key) != mark:
                self._noted[key] = mark
                new[key] = _State(c, len(c.token_ids), c.step_scores, c.step_ends, c.status, c.held, c.scored)
        with self._lock:
            self._new.update(new)
            wake = bool(self._new) and not self._woken
            self._woken = self._woken or wake
        return wake

    def events(self) -> Iterator[list[Event]]:
        """What is new, in order: of a candidate as it happened, of several by their numbers, so that parents come before their forks."""
        with self._lock:
            states, self._new, self._woken = self._new, {}, False
        found: list[Event] = []
        size = 0
        forks: dict[tuple[int, int], list[_State]] = {}
        for (prompt, number), state in states.items():
            self._strategies[prompt] = state.live.question.strategy
            if state.live.parent is not None and (prompt, number) not in self._told:
                forks.setdefault((prompt, state.live.parent), []).append(state)
        for key in sorted(states):
            for event in self._events_of(key, states[key], forks.get(key, [])):
                found.append({**event, "prompt": key[0]})
                size += len(event.get("text", "")) + 64
                if size > CHUNK:
                    yield found
                    found, size = [], 0
        if found:
            yield found

    def chosen(self, prompt: int, generation: Generation) -> Event:
        """The last event of a prompt."""
        best, by, strategy = generation.best, generation.chosen_by, self._strategies.get(prompt)
        why = CHOSEN[by]
        if by == "score" and best.answer is not None and isinstance(strategy, Majority):
            why = CHOSEN_BY_VOTE
        elif by == "score" and strategy and strategy.aggregation != self._model.head.aggregation:
            why = CHOSEN_BY_STEPS[strategy.aggregation]
        return {
            "type": "chosen", "candidate": best.number, "chosen_by": by, "why": why,
            "strategy": generation.strategy, "seed": generation.seed, "tokens": generation.tokens, "seconds": generation.seconds,
            "prompt": prompt,
        }  # fmt: skip

    # -- of one candidate --------------------------------------------------------------------------------------------

    def _events_of(self, key: tuple[int, int], state: _State, forks: list[_State]) -> Iterator[Event]:
        live, told = state.live, self._told.get(key)
        if told is None:
            told = self._told[key] = _Told(Incoming(self._model.decode, self._stops))
            begun = {"parent": None, "at": 0, "steps": 0}
            if live.parent is not None:  # which has told all up to here
                parent = self._told[key[0], live.parent]
                told = self._told[key] = self._forked.pop(key, None) or parent.forked(state)
                begun = {"parent": live.parent, "at": told.text.sent, "steps": len(told.steps)}
            yield {"type": "started", "candidate": live.number, **begun}
        for fork in sorted(forks, key=lambda s: s.live.inherited):
            yield from self._text(state, told, fork.live.inherited)
            self._forked[key[0], fork.live.number] = told.forked(fork)
        yield from self._text(state, told, state.tokens)
        if state.held != told.held and state.status == "running":
            told.held = state.held
            yield {"type": "held", "candidate": live.number, "held": state.held}
        if state.status != told.status:
            yield from self._end(state, told)

    def _text(self, state: _State, told: _Told, to: int) -> Iterator[Event]:
        """Text and steps up to ``to`` tokens."""
        number, tokens, scores = state.live.number, state.live.token_ids, finite(state.scores)
        ended, known = state.status != "running", scores[: len(told.steps)] == told.steps
        ends = state.ends if len(state.ends) == len(scores) else self._ends(state)
        if known:
            for score, end in list(zip(scores, ends, strict=True))[len(told.steps) :]:
                if end > to:
                    break
                yield from self._piece(state.live, told, end)
                told.steps.append(score)
                place = told.text.length if end == told.tokens else len(self._model.decode(tokens[:end]))
                yield {
                    "type": "step", "candidate": number, "step": len(told.steps) - 1, "score": score,
                    "running": self._running(state.scores[: len(told.steps)]), "end": place,
                }  # fmt: skip
        yield from self._piece(state.live, told, to)
        if not known and not ended:  # a tag has made others count; of who has ended the end says all
            told.steps = scores
            places = state.live.question.reader.ends(tokens, [end - 1 for end in ends])
            yield {
                "type": "steps", "candidate": number, "step_scores": scores, "ends": places, "running": self._running(state.scores),
            }  # fmt: skip

    def _piece(self, live: Live, told: _Told, to: int) -> Iterator[Event]:
        if to > told.tokens:
            piece = told.text.feed(live.token_ids[told.tokens : to])
            told.tokens = to
            if piece:
                yield {"type": "text", "candidate": live.number, "text": piece, "tokens": to - live.inherited}

    def _end(self, state: _State, told: _Told) -> Iterator[Event]:
        live, again = state.live, told.status != "running"
        c = candidate(live.question.reader, live.token_ids[: state.tokens], state.scored or Score())
        text = before(c.text, self._stops)
        if not again and (piece := told.text.finish(c.text)):
            yield {"type": "text", "candidate": live.number, "text": piece, "tokens": state.tokens - live.inherited}
        told.status = state.status
        yield {
            "type": "ended", "candidate": live.number, "status": state.status,
            "why": ENDS.get(state.status) or live.question.strategy.stops, "score": finite(c.score),
            "step_scores": finite(c.step_scores), "step_spans": [[min(place, len(text)) for place in span] for span in c.step_spans],
            "answer": c.answer, "error": c.error, "tokens": live.new_tokens,
        }  # fmt: skip

    def _running(self, scores: list[float]) -> float | None:
        return finite(aggregate(scores, self._model.head.in_progress))

    def _ends(self, state: _State) -> list[int]:
        """Of steps that a tag has made count, how many tokens there are up to the end of each."""
        prompt, tokens = state.live.question.prompts[state.live.asked], state.live.token_ids[: state.tokens]
        steps = self._model.check_head().to("cpu")
        ids = torch.tensor([[*prompt, *tokens]])
        found = steps.mask(ids, prompt_lengths=len(prompt))[0].nonzero().flatten() - len(prompt) + 1
        ends = found.tolist()[: len(state.scores)]
        return ends + [state.tokens] * (len(state.scores) - len(ends))
