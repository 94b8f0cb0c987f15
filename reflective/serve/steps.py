"""Decoding in vLLM, and texts that are scored beside it: all of them requests of vLLM's, which interleaves them in its steps."""

from collections.abc import Callable
from typing import Any

from ..engines.vllm.finished import Finished, of_response
from ..model import Candidate, ReflectiveModel
from ..search.candidates import Question
from ..search.loop import Search
from ..search.outcome import candidate
from .asides import Asides
from .jobs import Queue, Score


class Steps(Asides):
    """vLLM takes requests in the order of their arrival. So that whoever decodes, or goes on behind a rest, need not wait for all texts that
    came before, these are requests of vLLM's only for as many tokens as it runs in one step."""

    def __init__(self, model: ReflectiveModel, queue: Queue) -> None:
        super().__init__(model, queue)
        self._host, self._core = model.host, model.host.core
        self._most = self._core.config.scheduler_config.max_num_batched_tokens
        self._under_way: dict[Score, Finished] = {}
        self._told: dict[Score, int] = {}  # how many of their texts are counted
        self._oldest_first = True

    def engine(self, batch_rows: int | None, **settings: Any) -> Any:
        """For a search; ``settings`` were said when vLLM was started."""
        return self.model.engine(batch_rows=batch_rows)

    def serve(self, search: Search, arrivals: Callable[[int], list[Question]]) -> None:
        """Steps of vLLM, until there is nothing to be run."""
        with search.engine:
            while True:
                called = self.call()
                self._collect()
                self._add()
                worked = search.turn(arrivals)
                if not worked and self._under_way:
                    self._core.step()
                if not (worked or called or self._under_way or self.queue.asides):
                    break
        self._core.step()  # of nothing: its worker hears of an end with the step behind it

    def _collect(self) -> None:
        """Take in what is scored, and give up what was cancelled."""
        with self.queue.changed:
            wanted = set(self.queue.asides)
        for job, finished in list(self._under_way.items()):
            if job not in wanted:
                self._drop(job)
                continue
            try:
                finished.collect()
            except Exception as error:  # noqa: BLE001  # it is the future
                self._drop(job)
                self.fail(job, error)
                continue
            done = len(finished.texts) - finished.left
            self.scored += done - self._told[job]
            self._told[job] = done
            if not finished.left:
                self._drop(job)
                self.settle(job, lambda job=job, finished=finished: self._candidates(job, finished))

    def _add(self) -> None:
        """Make requests of texts that wait: by turns of the job that came first and of that of which least is left."""
        spare = self._most - sum(finished.running for finished in self._under_way.values())
        if spare <= 0:
            return
        with self.queue.changed:
            jobs = [job for job in self.queue.asides if isinstance(job, Score)]
        for job in jobs:
            if job not in self._under_way:
                texts = [([*text.prompt, *text.response], len(text.prompt)) for text in job.texts]
                self._under_way[job] = self._host.scoring(texts, begin=False)
                self._told[job] = 0
        jobs = [job for job in jobs if self._under_way[job].waiting]
        if not self._oldest_first:
            jobs.sort(key=lambda job: self._under_way[job].waiting)
        self._oldest_first = not self._oldest_first
        for job in jobs:
            if spare <= 0:
                return
            self.begin(job)
            finished = self._under_way[job]
            before = finished.running
            try:
                finished.begin(spare)
            except Exception as error:  # noqa: BLE001  # it is the future
                self._drop(job)
                self.fail(job, error)
            else:
                spare -= finished.running - before

    def _drop(self, job: Score) -> None:
        self._under_way.pop(job).cancel()
        del self._told[job]

    def _candidates(self, job: Score, finished: Finished) -> list[Candidate]:
        found = [of_response(text.scores, text.start) for text in finished.texts]
        return [candidate(self.model.reader, t.response, s) for t, s in zip(job.texts, found, strict=True)]
