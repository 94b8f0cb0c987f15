"""Decoding with transformers, and what is run beside it: a piece at a time, for ``SHARE`` of the time that decoding takes."""

import time
from collections.abc import Callable
from typing import Any

from ..engines.hf.pace import Pace
from ..model import Candidate, ReflectiveModel
from ..search.candidates import Question
from ..search.loop import Search
from .asides import Asides
from .jobs import Queue, Score, Text

SHARE = 0.5  # of the seconds of decoding, which pieces beside it may take; without decoding they take all
PIECE = 0.02, 0.2  # seconds of a piece while others decode, at least and at most; the most when nobody does


class Pieces(Asides):
    """
    Args:
        pace: how many tokens make a piece.
        batch_tokens: padded tokens that are scored in one forward at most.
    """

    def __init__(self, model: ReflectiveModel, queue: Queue, pace: Pace, batch_tokens: int) -> None:
        super().__init__(model, queue)
        self.batch_tokens = batch_tokens
        self._pace, self._oldest_first = pace, True

    def engine(self, batch_rows: int | None, **settings: Any) -> Any:
        """For a search; ``settings``: of it and its scorer."""
        return self.model.engine(batch_rows=batch_rows, pace=self._pace, **settings)

    def serve(self, search: Search, arrivals: Callable[[int], list[Question]]) -> None:
        """Turns of the search, and beside them pieces of whatever else there is to run, until there is nothing."""
        engine, credit, filled = search.engine, 0.0, False
        with engine:
            while True:
                decoding = engine.decode_seconds
                self._pace.seconds = min(max(decoding, PIECE[0]), PIECE[1]) if decoding else PIECE[1]
                credit = credit if decoding else 0.0
                began, aside = time.perf_counter(), False
                fill = credit == 0 and engine.filling and not filled  # they take turns
                if credit == 0 and not fill:
                    aside = self.step()
                    fill = engine.filling and not aside
                worked = search.turn(arrivals, fill=fill)
                filled = engine.did == "piece"
                spent = time.perf_counter() - began
                if engine.did == "tokens":
                    # What pieces took beyond their share is waited for; what they did not need is not saved up.
                    credit = min(0.0, credit - (spent - engine.decode_seconds) + SHARE * engine.decode_seconds)
                else:
                    credit -= spent
                if not worked and not aside and not self.queue.asides:
                    return

    def step(self) -> bool:
        """Do a piece of what is no decoding; whether there was any. A function is called, or as many short texts are scored as
        make a piece, or a piece of a long one: by turns of the text that came first and of those of which least is left."""
        if self.call():
            return True
        with self.queue.changed:
            texts = [text for job in self.queue.asides if isinstance(job, Score) for text in job.texts if not text.done]
        if not texts:
            return False
        most = self._pace.tokens()
        if not self._oldest_first:
            texts.sort(key=Text.left)
        self._oldest_first = not self._oldest_first
        first, longest, batch = texts[0], texts[0].left(), []
        self.begin(first.job)
        if first.reading is not None or longest > most:
            self._read(first, most)
            return True
        for text in texts:
            longer = max(longest, text.left())
            if text.reading is None and longer * (len(batch) + 1) <= most:
                batch.append(text)
                longest = longer
        with self._pace.timed(longest * len(batch)):
            self._score(batch)
        return True

    def _score(self, texts: list[Text]) -> None:
        try:
            found = self.model.score_tokens(
                [text.prompt for text in texts], [text.response for text in texts], batch_tokens=self.batch_tokens
            )
        except Exception as error:  # noqa: BLE001  # it is the future
            if len(texts) == 1:
                self.fail(texts[0].job, error)
            else:  # whose fault it was does not concern the others
                for text in texts:
                    self._score([text])
            return
        for text, candidate in zip(texts, found, strict=True):
            self._done(text, lambda candidate=candidate: candidate)

    def _read(self, text: Text, tokens: int) -> None:
        try:
            reading = text.reading = text.reading or self.model.reading(text.prompt, text.response)
            with self._pace.timed(min(tokens, reading.left)):
                if reading.left:
                    reading.read(tokens)
        except Exception as error:  # noqa: BLE001  # it is the future
            self.fail(text.job, error)
            return
        if not reading.left:
            self._done(text, lambda: self.model.read_candidate(reading, text.prompt, text.response))

    def _done(self, text: Text, candidate: Callable[[], Candidate]) -> None:
        text.done = candidate
        self.scored += 1
        if all(other.done for other in text.job.texts):
            self.settle(text.job, lambda: [other.done() for other in text.job.texts])
