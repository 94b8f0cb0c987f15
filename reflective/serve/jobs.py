"""What is asked of a server's engine: requests that wait, and those under way, behind one lock."""

import collections
import copy
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..engines.hf.finished import Reading
from ..model import Candidate, Generation, ReflectiveModel
from ..search.candidates import Question


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class Closed(RuntimeError):
    """The engine takes no further requests."""


class Queue:
    """Requests in the order of their arrival.

    Args:
        most: requests that wait at most.

    Attributes:
        changed: guards all that follows, and is told of every change.
        waiting: to be decoded, those of which some questions wait included; asides: all else, those that are being scored included.
        running: of every question under way its request.
        preparing: how many are prepared; closing: whether no further ones are taken.
        finishing: the thread in which answers are read.
    """

    def __init__(self, most: int) -> None:
        self.most, self.changed = most, threading.Condition()
        self.waiting: collections.deque[Generate] = collections.deque()
        self.asides: collections.deque[Aside] = collections.deque()
        self.running: dict[Question, Generate] = {}
        self.preparing, self.closing = 0, False
        self.finishing = ThreadPoolExecutor(1, "reflective-finish")

    def check_room(self, reserved: int = 0) -> None:
        """With the lock held. ``reserved``: places among those that are prepared.

        Raises:
            QueueFull, Closed.
        """
        if self.closing:
            raise Closed("the engine is shutting down")
        if self.preparing - reserved + len(self.waiting) + len(self.asides) >= self.most:
            raise QueueFull(f"{self.most} request{'s are' if self.most != 1 else ' is'} waiting; try again later")

    def put(self, place: "collections.deque[Any]", job: "Job", prepared: bool) -> None:
        """``place``: ``waiting`` or ``asides``; ``prepared``: whether the request counts as one that is prepared.

        Raises:
            QueueFull, Closed.
        """
        with self.changed:
            self.check_room(reserved=int(prepared))
            place.append(job)
            self.changed.notify_all()

    def withdraw(self, job: "Job") -> None:
        """Whoever waits waits no more."""
        with self.changed:
            for place in (self.waiting, self.asides):
                if job in place:
                    place.remove(job)
            self.changed.notify_all()

    def ahead(self) -> int:
        """How many long ones were prepared and not begun with."""
        return sum(job.long and not job.started for job in (*self.waiting, *self.asides))


class Lane:
    """A thread that prepares requests. Attributes: ``model``: with a tokenizer of its own, made when it is first needed."""

    def __init__(self, model: ReflectiveModel, name: str) -> None:
        self.thread, self.lock = ThreadPoolExecutor(1, f"reflective-prepare-{name}"), threading.Lock()
        self._shared = model

    @functools.cached_property
    def model(self) -> ReflectiveModel:
        own = copy.copy(self._shared)
        own.tokenizer = copy.deepcopy(own.tokenizer)
        return own


class Job(Future):
    """Attributes: ``began``: when it was asked for, in seconds of ``time.perf_counter``; ``started``: whether the model has begun with it;
    ``long``: whether it was prepared apart."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self.queue, self.began, self.started, self.long = queue, time.perf_counter(), False, False

    def settle(self, function: Callable[[], Any]) -> None:
        """Its result is what ``function`` gives."""
        try:
            self.set_result(function())
        except Exception as error:  # noqa: BLE001  # it is the future
            self.set_exception(error)


class Generate(Job):
    """Attributes: ``pending``: questions that no place was found for yet; ``unanswered``: how many have not ended."""

    def __init__(
        self, queue: Queue, model: ReflectiveModel, questions: list[Question], prompts: list[str],
        on_step: Callable[..., None] | None, one: bool,
    ) -> None:  # fmt: skip
        super().__init__(queue)
        self.model = model
        self.questions, self.prompts, self.on_step, self.one = questions, prompts, on_step, one
        self.pending, self.unanswered = collections.deque(questions), len(questions)

    def cancel(self) -> bool:
        """True unless it has ended."""
        if super().cancel():
            self.queue.withdraw(self)
            return True
        with self.queue.changed:
            for question in self.questions:
                question.cancelled = True
            for question in self.pending:  # they never begin
                for candidate in question.candidates:
                    candidate.status = "interrupted"
            dropped = len(self.pending)
            self.unanswered -= dropped
            self.pending.clear()
            ended = bool(dropped) and not self.unanswered
        self.queue.withdraw(self)
        if ended:
            self.finish()
        return not self.done()

    def finish(self) -> None:
        """All questions have ended."""
        self.queue.finishing.submit(self.settle, self.answers)

    def answers(self) -> Generation | list[Generation]:
        model = self.model
        found = [
            model.generation(text or model.decode(q.prompt, special=True), q)
            for text, q in zip(self.prompts, self.questions, strict=True)
        ]
        return found[0] if self.one else found

    def __str__(self) -> str:
        tokens = sum(q.tokens for q in self.questions)
        state = f"{tokens} tokens decoded" if self.running() else "still queued"
        return f"generate: {sum(len(q.candidates) for q in self.questions)} candidates, {state}"


class Aside(Job):
    """A function that is called between two forwards."""

    def __init__(self, queue: Queue, function: Callable[[], Any]) -> None:
        super().__init__(queue)
        self.function = function

    def cancel(self) -> bool:
        """True unless it has ended: it is not gone on with."""
        cancelled = super().cancel()
        if cancelled:
            self.queue.withdraw(self)
        return cancelled

    def __str__(self) -> str:
        return "a request beside decoding, still queued"


class Score(Aside):
    """Texts to be scored."""

    def __init__(self, queue: Queue, prompts: list[list[int]], responses: list[list[int]]) -> None:
        super().__init__(queue, lambda: None)
        self.texts = [Text(self, p, r) for p, r in zip(prompts, responses, strict=True)]

    def __str__(self) -> str:
        done = sum(text.done is not None for text in self.texts)
        return f"score: {len(self.texts)} texts, " + (f"{done} of them scored" if self.started else "still queued")


@dataclass(eq=False)
class Text:
    """One to be scored, as ids; ``reading``: where it is scored in pieces; ``done``: what gives its candidate, once it is."""

    job: Score
    prompt: list[int]
    response: list[int]
    reading: Reading | None = None
    done: Callable[[], Candidate] | None = None

    def left(self) -> int:
        """Tokens that are still to be run, as far as known."""
        return len(self.prompt) + len(self.response) if self.reading is None else self.reading.left
