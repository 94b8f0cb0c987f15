"""What a server runs beside decoding: texts to be scored, a piece at a time, and functions that need the model."""

from collections.abc import Callable
from typing import Any

from ..engines.hf.pace import Pace
from ..model import Candidate, ReflectiveModel
from .jobs import Aside, Queue, Score, Text


class Asides:
    """
    Args:
        pace: how many tokens make a piece.
        batch_tokens: padded tokens that are scored in one forward at most.

    Attributes:
        scored: texts, so far.
    """

    def __init__(self, model: ReflectiveModel, queue: Queue, pace: Pace, batch_tokens: int) -> None:
        self.model, self.queue, self.batch_tokens, self.scored = model, queue, batch_tokens, 0
        self._pace, self._oldest_first = pace, True

    def step(self) -> bool:
        """Do a piece of what is no decoding; whether there was any. A function is called, or as many short texts are scored as
        make a piece, or a piece of a long one: by turns of the text that came first and of those of which least is left."""
        with self.queue.changed:
            job = next((job for job in self.queue.asides if not isinstance(job, Score)), None)
            texts = [text for job in self.queue.asides if isinstance(job, Score) for text in job.texts if not text.done]
        if job is not None:
            self._begin(job)
            self._settle(job, job.function)
            return True
        if not texts:
            return False
        most = self._pace.tokens()
        if not self._oldest_first:
            texts.sort(key=Text.left)
        self._oldest_first = not self._oldest_first
        first, longest, batch = texts[0], texts[0].left(), []
        self._begin(first.job)
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

    def _begin(self, job: Aside) -> None:
        if not job.started:
            with self.queue.changed:
                job.started = True
                self.queue.changed.notify_all()

    def _score(self, texts: list[Text]) -> None:
        try:
            found = self.model.score_tokens(
                [text.prompt for text in texts], [text.response for text in texts], batch_tokens=self.batch_tokens
            )
        except Exception as error:  # noqa: BLE001  # it is the future
            if len(texts) == 1:
                self._settle(texts[0].job, lambda error=error: _raise(error))
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
            self._settle(text.job, lambda error=error: _raise(error))
            return
        if not reading.left:
            self._done(text, lambda: self.model.read_candidate(reading, text.prompt, text.response))

    def _done(self, text: Text, candidate: Callable[[], Candidate]) -> None:
        text.done = candidate
        self.scored += 1
        if all(other.done for other in text.job.texts):
            self._settle(text.job, lambda: [other.done() for other in text.job.texts])

    def _settle(self, job: Aside, function: Callable[[], Any]) -> None:
        with self.queue.changed:
            if job in self.queue.asides:
                self.queue.asides.remove(job)
            self.queue.changed.notify_all()
        if job.set_running_or_notify_cancel():
            if isinstance(job, Score):
                self.queue.finishing.submit(job.settle, function)
            else:
                job.settle(function)


def _raise(error: Exception) -> None:
    raise error
