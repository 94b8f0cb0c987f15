"""What a server runs beside decoding: texts to be scored, and functions that need the model. How it takes turns with decoding is said
where it is run, in ``pieces`` and in ``steps``."""

from collections.abc import Callable
from typing import Any

from ..model import ReflectiveModel
from .jobs import Aside, Queue, Score


class Asides:
    """Attributes: ``scored``: texts, so far."""

    def __init__(self, model: ReflectiveModel, queue: Queue) -> None:
        self.model, self.queue, self.scored = model, queue, 0

    def call(self) -> bool:
        """Call a function that waits; whether there was one."""
        with self.queue.changed:
            job = next((job for job in self.queue.asides if not isinstance(job, Score)), None)
        if job is None:
            return False
        self.begin(job)
        self.settle(job, job.function)
        return True

    def begin(self, job: Aside) -> None:
        """The model has begun with it."""
        if not job.started:
            with self.queue.changed:
                job.started = True
                self.queue.changed.notify_all()

    def settle(self, job: Aside, function: Callable[[], Any]) -> None:
        """Its result is what ``function`` gives; unless it was cancelled."""
        with self.queue.changed:
            if job in self.queue.asides:
                self.queue.asides.remove(job)
            self.queue.changed.notify_all()
        if job.set_running_or_notify_cancel():
            if isinstance(job, Score):
                self.queue.finishing.submit(job.settle, function)
            else:
                job.settle(function)

    def fail(self, job: Aside, error: Exception) -> None:
        """``error`` is what comes of it."""

        def failed() -> None:
            raise error

        self.settle(job, failed)
