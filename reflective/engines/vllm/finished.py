"""Scores of finished texts, by vLLM's prefill: every column's state passes by, and those of steps are read."""

import collections
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...scoring.scores import TrajectoryScores
from ...scoring.steps import StepTokens
from ...scoring.taps import At
from ..base import Score
from .core import Core
from .options import NAME
from .results import MissingSteps, collect


@dataclass(eq=False)
class Text:
    """One to be scored: ids of the whole, whose steps from column ``start`` on count. ``size``: tokens to be run, those left out that the text
    before it has in its prompt too."""

    ids: Sequence[int]
    start: int
    size: int
    request: str | None = None
    scores: TrajectoryScores | None = None
    again: bool = field(default=False)


class Finished:
    """Texts that are being scored, beside whatever decodes.

    Texts of one call share the cached beginnings of each other, as their prompts, and of nobody else: what was cached while it was decoded has
    no states. A text in whose scope others' cached columns lie, as it begins like another one, is run again without the cache.

    Args:
        at, aggregation, sigmoid, higher_is_better: of the head.
        texts: ``(ids, start)`` of each.
        begin: whether all are requests of vLLM's at once; else ``begin`` makes them such.
    """

    def __init__(
        self, core: Core, steps: StepTokens, at: At, texts: Sequence[tuple[Sequence[int], int]], *, begin: bool = True,
        aggregation: str = "geometric_mean", sigmoid: bool = True, higher_is_better: bool = True,
    ) -> None:  # fmt: skip
        self._core, self._steps = core, steps
        self._reading = {"at": at, "aggregation": aggregation, "sigmoid": sigmoid, "higher_is_better": higher_is_better}
        self.texts: list[Text] = []
        before: Sequence[int] = ()
        for ids, start in texts:
            prompt = ids[:start]
            self.texts.append(Text(ids, start, len(ids) - (start if prompt == before else 0)))
            before = prompt
        self._salt = uuid.uuid4().hex
        self._waiting = collections.deque(self.texts)
        if begin:
            self.begin()

    def begin(self, tokens: int | None = None) -> None:
        """Make requests of those that wait: of all, or of as many as have ``tokens`` in all, one at least."""
        while self._waiting and (tokens is None or tokens > 0):
            text = self._waiting.popleft()
            self._add(text)
            tokens = None if tokens is None else tokens - text.size

    @property
    def running(self) -> int:
        """Tokens of the texts that are under way."""
        return sum(text.size for text in self.texts if text.request is not None and text.scores is None)

    @property
    def waiting(self) -> int:
        """Tokens of the texts that were not begun."""
        return sum(text.size for text in self._waiting)

    def _add(self, text: Text) -> None:
        text.request = self._core.add(
            text.ids, cache_salt=self._salt, max_tokens=1, temperature=0.0, skip_reading_prefix_cache=text.again or None,
            extra_args={NAME: {"score_from": text.start}},
        )  # fmt: skip

    @property
    def left(self) -> int:
        """How many are not scored yet."""
        return sum(text.scores is None for text in self.texts)

    def collect(self) -> None:
        """Take in what vLLM has done by now."""
        running = [t for t in self.texts if t.request is not None and t.scores is None]
        ended = [t for t in running if any(o.finished for o in self._core.fetch(t.request))]
        logs = {log.key: log for log in self._core.logs([t.request for t in ended], forget=True)}
        for text in ended:
            try:
                text.scores = collect([logs[text.request]], [text.ids], [text.start], self._steps, **self._reading)
            except MissingSteps:
                if text.again:
                    raise
                text.again = True
                self._add(text)

    def run(self) -> list[TrajectoryScores]:
        """Have vLLM step until all are scored."""
        try:
            while self.left:
                self._core.step()
                self.collect()
        except BaseException:
            self.cancel()
            raise
        return [text.scores for text in self.texts]

    def cancel(self) -> None:
        """Give up those that are not scored."""
        self._waiting.clear()
        names = [t.request for t in self.texts if t.request is not None and t.scores is None]
        self._core.abort(names)
        self._core.logs(names, forget=True)


def of_response(scores: TrajectoryScores, prompt_length: int) -> Score:
    """Of the one trajectory in ``scores``, as the search knows it."""
    positions = scores.step_positions[0] - prompt_length
    return Score(float(scores.score[0]), scores.step_scores[0].tolist(), positions.tolist(), scores.errors.get(0))
