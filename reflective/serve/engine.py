"""What a server decodes with: one thread that owns the model. What arrives joins the batch that is decoding.

Whatever else is to be run, texts to be scored and long prompts, is run in pieces between the forwards of those that decode, for
``SHARE`` of their time; between two pieces cancellation is seen. What needs no model, tokenizing and reading answers, is done in other threads.
"""

import collections
import copy
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ..engines.hf.finished import Reading
from ..engines.hf.pace import Pace
from ..engines.hf.scorer import Schedule
from ..model import Candidate, Generation, ReflectiveModel
from ..search.candidates import Ask, Live, Question
from ..search.loop import Search
from ..search.strategies import Strategy
from .logprobs import Spelling

T = TypeVar("T")
_log = logging.getLogger(__name__)
SHARE = 0.5  # of the seconds of decoding, which pieces beside it may take; without decoding they take all
PIECE = 0.02, 0.2  # seconds of a piece while others decode, at least and at most; the most when nobody does
MAX_TOKENS = 512  # where the model does not say how many positions it has
LONG = 1 << 13  # bytes of a request that is prepared apart: 120 kB are tokenized in 40 ms, 8 MiB in 10 s
AHEAD = 2  # of those, how many are prepared before the model has begun with them: who hangs up by then has cost nothing


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class Closed(RuntimeError):
    """The engine takes no further requests."""


class Engine:
    """One model and one queue. Requests are taken in the order of their arrival, as soon as there is a place for one of their
    candidates; texts are scored, and long prompts prefilled, in pieces between two forwards. Short texts that wait are scored in one
    batch, and none waits for a longer one.

    Args:
        batch_rows: candidates decoded together at most.
        max_queue: requests that wait at most.
        max_steps: steps of a candidate that are kept one by one; its score counts all.
        batch_tokens: padded tokens that are scored between two forwards at most; fewer where these would take longer than a forward.
        schedule: as for ``StreamScorer``.
    """

    def __init__(
        self,
        model: ReflectiveModel,
        *,
        batch_rows: int = 32,
        max_queue: int = 64,
        max_steps: int = 4096,
        batch_tokens: int = 16_384,
        schedule: Schedule = "immediate",
    ) -> None:
        for name, value in (("batch_rows", batch_rows), ("max_queue", max_queue)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model, self.batch_rows, self.max_queue, self.batch_tokens = model, batch_rows, max_queue, batch_tokens
        self._scoring = {"schedule": schedule, "max_steps": max_steps}
        self._changed = threading.Condition()  # guards what follows
        self._waiting: collections.deque[_Generate] = collections.deque()
        self._asides: collections.deque[_Aside] = collections.deque()  # those that are being scored, too
        self._running: dict[Question, _Generate] = {}
        self._preparing = 0
        self._closing = False
        self._tokens = self._scored = 0
        self._tokenizing = threading.Lock()
        self._lanes = _Lane(model, "short"), _Lane(model, "long")
        self._here = threading.local()  # ``lane``: of a thread that prepares
        self._finishing = ThreadPoolExecutor(1, "reflective-finish")
        self._pace, self._oldest_first = Pace(batch_tokens, model.model.device, PIECE[1]), True
        self._search = self._new_search()
        self._thread = threading.Thread(target=self._run, name="reflective-engine", daemon=True)
        self._thread.start()

    # -- for any thread ----------------------------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[int], **settings: Any) -> Future[Generation]:
        """Answer a formatted prompt, or its ids, as ``ReflectiveModel.generate`` does; see ``generate_all``."""
        return self._generate([prompt], one=True, **settings)

    def generate_all(self, prompts: Sequence[str | Sequence[int]], **settings: Any) -> Future[list[Generation]]:
        """Answer formatted prompts, or their ids, each as ``ReflectiveModel.generate`` would answer it alone, in one request.

        The future's ``cancel`` works while it runs, too: its candidates leave the batch before the next forward, and the
        result is what there is by then.

        Args:
            n: candidates of each; None: the strategy's own.
            max_new_tokens: None: what the model has positions for behind each prompt.
            logprobs, prompt_logprobs: see ``Ask``; they come in ``Candidate.logprobs`` and ``Generation.prompt_logprobs``.
            on_step: called in the engine's thread after every forward: with the candidates or, of ``generate_all``, with the
                number of a prompt and its candidates.

        Raises:
            QueueFull, Closed.
            ValueError: bad input, named; more tokens than the model has positions.
        """
        return self._generate(prompts, one=False, **settings)

    def _generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        one: bool,
        *,
        strategy: Strategy | str | None = None,
        n: int | None = 1,
        max_new_tokens: int | None = 512,
        temperature: float = 0.6,
        top_p: float = 0.95,
        seed: int | None = None,
        stop: Sequence[str] = (),
        thinking_budget: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        on_step: Callable[..., None] | None = None,
    ) -> "_Generate":
        seed, questions, texts = secrets.randbits(32) if seed is None else seed, [], []
        for i, prompt in enumerate(prompts):
            name = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
            text, ids = (prompt, self.encode(prompt)) if isinstance(prompt, str) else ("", list(prompt))
            room = max(1, self.max_length - len(ids)) if self.max_length is not None else MAX_TOKENS
            most = room if max_new_tokens is None else max_new_tokens
            ask = Ask(
                ids, self.model.strategy(strategy, n=n), max_new_tokens=most, temperature=temperature, top_p=top_p,
                seed=seed, stop=stop, thinking_budget=thinking_budget, logprobs=logprobs, prompt_logprobs=prompt_logprobs,
            )  # fmt: skip
            self.check(name, ids)
            if self.max_length is not None and len(ids) + most > self.max_length:
                raise ValueError(
                    f"max_new_tokens={most}: with the prompt's {len(ids)} tokens that is more than the "
                    f"{self.max_length} positions of the model"
                )
            questions.append(Question(self.model.reader, ask))
            texts.append(text)
        job = _Generate(self, questions, texts, on_step, one)
        self._queue(self._waiting, job)
        return job

    def score(
        self,
        prompts: Sequence[str | Sequence[int]],
        responses: Sequence[str | Sequence[int]],
        *,
        name: str = "response",
        more: float = 0.0,
    ) -> Future[list[Candidate]]:
        """Score finished texts, or their ids, as ``ReflectiveModel.score`` does.

        Args:
            name: of the responses, for errors.
            more: how much longer than the model's positions they may be, as a part of these.

        Raises:
            QueueFull, Closed.
            ValueError: bad input, named; more tokens than the model has positions.
        """
        if not responses or len(prompts) != len(responses):
            raise ValueError(
                f"responses: {len(responses)} for {len(prompts)} prompts; expected one each, and one at least"
            )
        heads = [self.encode(p) if isinstance(p, str) and p else list(p) for p in prompts]
        texts = [self.encode_response(r, not p) for p, r in zip(heads, responses, strict=True)]
        for i, (head, text) in enumerate(zip(heads, texts, strict=True)):
            self.check_text(head, text, "" if len(texts) == 1 else f"[{i}]", name=name, more=more)
        job = _Score(self, heads, texts)
        self._queue(self._asides, job)
        return job

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Anything else that needs the model: called between two forwards.

        Raises:
            QueueFull, Closed.
        """
        job = _Aside(self, function)
        self._queue(self._asides, job)
        return job

    def prepare(self, function: Callable[[], T], size: int = 0) -> Future[T]:
        """What comes before a request is asked for, as tokenizing does: called in another thread, in order, and counted as
        queued. What it asks for takes its place in the queue.

        Args:
            size: of the request, in bytes; long ones wait for each other and not in front of short ones.

        Raises:
            QueueFull, Closed.
        """
        lane = self._lanes[size > LONG]

        def run() -> T:
            self._here.lane = lane
            if lane is self._lanes[1]:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._ahead() < AHEAD)
            return function()

        with self._changed:
            self._check_room()
            self._preparing += 1
            future = lane.thread.submit(run)
        future.add_done_callback(self._prepared)
        return future

    def _ahead(self) -> int:
        return sum(job.long and not job.started for job in (*self._waiting, *self._asides))

    def _prepared(self, _: Future) -> None:
        with self._changed:
            self._preparing -= 1

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt.

        Raises:
            ValueError: it is empty.
        """
        model, lock = self._tokenizer()
        with lock:
            return model.encode(prompt)[0].tolist()

    def encode_response(self, response: str | Sequence[int], whole: bool) -> list[int]:
        """The ids of a response; ``whole``: of a text without a prompt."""
        if not isinstance(response, str):
            return list(response)
        model, lock = self._tokenizer()
        with lock:
            return model.tokenizer(response, add_special_tokens=whole).input_ids

    def _tokenizer(self) -> tuple[ReflectiveModel, threading.Lock]:
        """A thread that prepares long requests has a tokenizer of its own, or short ones would wait for it."""
        lane = getattr(self._here, "lane", self._lanes[0])
        return (self.model, self._tokenizing) if lane is self._lanes[0] else (lane.model, lane.lock)

    @functools.cached_property
    def spelling(self) -> Spelling:
        """Read when log-probabilities are first asked for, which takes a while."""
        with self._tokenizing:
            return Spelling(self.model)

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and response together, as far as the model's configuration says."""
        return self.model.max_length

    def stats(self) -> dict[str, int]:
        """``queued`` requests, ``running`` ones, that decode or are scored, ``rows`` (candidates that decode), and what was done
        since the start: ``tokens`` decoded, texts ``scored``."""
        with self._changed:
            running, scoring = list(self._running), sum(job.started for job in self._asides)
            return {
                "queued": self._preparing + len(self._waiting) + len(self._asides) - scoring,
                "running": len(set(self._running.values())) + scoring,
                "rows": min(self.batch_rows, sum(len(q.open) for q in running)),
                "tokens": self._tokens + sum(q.tokens for q in running),
                "scored": self._scored,
            }

    def close(self, timeout: float | None = None) -> list[str]:
        """Take no further requests, and finish those that are there.

        Args:
            timeout: seconds after which they are cancelled; None: never.

        Returns:
            What was cut off, a line a request.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            running = dict.fromkeys(self._running.values())
            cut = [*running, *self._waiting, *self._asides] if self._thread.is_alive() else []
            lines = [str(job) for job in dict.fromkeys(cut)]
        for job in dict.fromkeys(cut):
            job.cancel()
        self._thread.join()
        for thread in (*(lane.thread for lane in self._lanes), self._finishing):
            thread.shutdown(cancel_futures=thread is not self._finishing)
        return lines

    def check(self, name: str, ids: Sequence[int]) -> None:
        """ValueError, naming ``name``, unless ``ids`` are the model's."""
        size = self.model.model.get_input_embeddings().num_embeddings
        if not ids:
            raise ValueError(f"{name}: it is empty")
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size]
        if wrong:
            raise ValueError(f"{name}: {wrong[0]!r} is no token of this model; ids are integers from 0 to {size - 1}")

    def check_text(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        which: str = "",
        *,
        name: str = "response",
        more: float = 0.0,
    ) -> None:
        """ValueError, naming prompt or response with ``which`` behind it, unless they can be scored; see ``score``."""
        size, most = len(prompt) + len(response), self.max_length
        if most is not None and size > most + int(most * more):  # before anything is done for each token
            whole = "with its prompt " if prompt else ""
            raise ValueError(f"{name}{which}: {whole}{size} tokens, more than the model's {most} positions")
        self.check(f"{name}{which}", response)
        if prompt:
            self.check(f"prompt{which}", prompt)

    def _check_room(self, reserved: int = 0) -> None:
        if self._closing:
            raise Closed("the engine is shutting down")
        if self._preparing - reserved + len(self._waiting) + len(self._asides) >= self.max_queue:
            raise QueueFull(f"{self.max_queue} requests are waiting; try again later")

    def _queue(self, queue: "collections.deque[Any]", job: "_Job") -> None:
        lane = getattr(self._here, "lane", None)
        job.long = lane is self._lanes[1]
        with self._changed:
            self._check_room(reserved=int(lane is not None))
            queue.append(job)
            self._changed.notify_all()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _new_search(self) -> Search:
        engine = self.model.engine(batch_rows=self.batch_rows, pace=self._pace, **self._scoring)
        return Search(engine, self.model.reader, on_step=self._stepped, on_end=self._ended)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._asides or self._closing)
                if not self._waiting and not self._asides:
                    return
            try:
                self._serve()
            except Exception as error:  # noqa: BLE001  # of one, while the thread serves all
                _log.exception("decoding failed; the requests under way are answered with the error")
                with self._changed:
                    failed = dict.fromkeys(self._running.values())
                    self._running.clear()
                    self._waiting = collections.deque(job for job in self._waiting if job not in failed)
                for job in failed:
                    job.set_exception(error)
                self._search = self._new_search()

    def _serve(self) -> None:
        """Turns of the search, and beside them pieces of whatever else there is to run, until there is nothing."""
        search, engine, credit, filled = self._search, self._search.engine, 0.0, False
        with engine:
            while True:
                decoding = engine.decode_seconds
                self._pace.seconds = min(max(decoding, PIECE[0]), PIECE[1]) if decoding else PIECE[1]
                credit = credit if decoding else 0.0
                began, aside = time.perf_counter(), False
                fill = credit == 0 and engine.filling and not filled  # they take turns
                if credit == 0 and not fill:
                    aside = self._step_aside()
                    fill = engine.filling and not aside
                worked = search.turn(self._arrivals, fill=fill)
                filled = engine.did == "piece"
                spent = time.perf_counter() - began
                if engine.did == "tokens":
                    # What pieces took beyond their share is waited for; what they did not need is not saved up.
                    credit = min(0.0, credit - (spent - engine.decode_seconds) + SHARE * engine.decode_seconds)
                else:
                    credit -= spent
                if not worked and not aside and not self._asides:
                    return

    def _arrivals(self, room: int) -> list[Question]:
        new = []
        with self._changed:
            while self._waiting and room > 0:
                job = self._waiting[0]
                if not job.started and not job.set_running_or_notify_cancel():
                    self._waiting.popleft()
                    continue
                job.started = True
                while job.pending and room > 0:
                    question = job.pending.popleft()
                    self._running[question] = job
                    new.append(question)
                    room -= len(question.candidates)
                if not job.pending:
                    self._waiting.popleft()
            if new:
                self._changed.notify_all()
        return new

    def _step_aside(self) -> bool:
        """Do a piece of what is no decoding; whether there was any. A function is called, or as many short texts are scored as
        make a piece, or a piece of a long one: by turns of the text that came first and of those of which least is left."""
        with self._changed:
            job = next((job for job in self._asides if not isinstance(job, _Score)), None)
            texts = [text for job in self._asides if isinstance(job, _Score) for text in job.texts if not text.done]
        if job is not None:
            self._begin(job)
            self._settle(job, job.function)
            return True
        if not texts:
            return False
        most = self._pace.tokens()
        if not self._oldest_first:
            texts.sort(key=_Text.left)
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

    def _begin(self, job: "_Aside") -> None:
        if not job.started:
            with self._changed:
                job.started = True
                self._changed.notify_all()

    def _score(self, texts: "list[_Text]") -> None:
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

    def _read(self, text: "_Text", tokens: int) -> None:
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

    def _done(self, text: "_Text", candidate: Callable[[], Candidate]) -> None:
        text.done = candidate
        self._scored += 1
        if all(other.done for other in text.job.texts):
            self._settle(text.job, lambda: [other.done() for other in text.job.texts])

    def _settle(self, job: "_Aside", function: Callable[[], Any]) -> None:
        with self._changed:
            if job in self._asides:
                self._asides.remove(job)
            self._changed.notify_all()
        if job.set_running_or_notify_cancel():
            if isinstance(job, _Score):
                self._finishing.submit(job.settle, function)
            else:
                job.settle(function)

    def _stepped(self, candidates: list[list[Live]]) -> None:
        for group in candidates:
            job = self._running[group[0].question]
            if job.on_step:
                try:
                    question = group[0].question
                    job.on_step(group) if job.one else job.on_step(job.questions.index(question), group)
                except Exception:  # noqa: BLE001  # of a caller; decoding goes on
                    _log.exception("on_step failed and is not called again")
                    job.on_step = None

    def _ended(self, question: Question) -> None:
        with self._changed:
            job = self._running.pop(question)
            self._tokens += question.tokens
            job.unanswered -= 1
            ended = not job.unanswered
        if ended:
            self._finishing.submit(job.settle, job.answers)


def _raise(error: Exception) -> None:
    raise error


class _Lane:
    """A thread that prepares requests. Attributes: ``model``: with a tokenizer of its own, made when it is first needed."""

    def __init__(self, model: ReflectiveModel, name: str) -> None:
        self.thread, self.lock = ThreadPoolExecutor(1, f"reflective-prepare-{name}"), threading.Lock()
        self._shared = model

    @functools.cached_property
    def model(self) -> ReflectiveModel:
        own = copy.copy(self._shared)
        own.tokenizer = copy.deepcopy(own.tokenizer)
        return own


class _Job(Future):
    """Attributes: ``began``: when it was asked for, in seconds of ``time.perf_counter``; ``started``: whether the model has begun with it;
    ``long``: whether it was prepared apart."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.began, self.started, self.long = engine, time.perf_counter(), False, False

    def settle(self, function: Callable[[], Any]) -> None:
        try:
            self.set_result(function())
        except Exception as error:  # noqa: BLE001  # it is the future
            self.set_exception(error)

    def _withdraw(self, queue: "collections.deque[Any]") -> None:
        with self.engine._changed:
            if self in queue:
                queue.remove(self)
            self.engine._changed.notify_all()


class _Generate(_Job):
    """Attributes: ``pending``: questions that no place was found for yet; ``unanswered``: how many have not ended."""

    def __init__(
        self, engine: Engine, questions: list[Question], prompts: list[str],
        on_step: Callable[..., None] | None, one: bool,
    ) -> None:  # fmt: skip
        super().__init__(engine)
        self.questions, self.prompts, self.on_step, self.one = questions, prompts, on_step, one
        self.pending, self.unanswered = collections.deque(questions), len(questions)

    def cancel(self) -> bool:
        """True unless it has ended."""
        if super().cancel():
            self._withdraw(self.engine._waiting)
            return True
        with self.engine._changed:
            for question in self.questions:
                question.cancelled = True
            for question in self.pending:  # they never begin
                for candidate in question.candidates:
                    candidate.status = "interrupted"
            dropped = len(self.pending)
            self.unanswered -= dropped
            self.pending.clear()
            ended = bool(dropped) and not self.unanswered
        self._withdraw(self.engine._waiting)
        if ended:
            self.engine._finishing.submit(self.settle, self.answers)
        return not self.done()

    def answers(self) -> Generation | list[Generation]:
        model = self.engine.model
        found = [
            model.generation(text or model.decode(q.prompt, special=True), q)
            for text, q in zip(self.prompts, self.questions, strict=True)
        ]
        return found[0] if self.one else found

    def __str__(self) -> str:
        tokens = sum(q.tokens for q in self.questions)
        state = f"{tokens} tokens decoded" if self.running() else "still queued"
        return f"generate: {sum(len(q.candidates) for q in self.questions)} candidates, {state}"


class _Aside(_Job):
    def __init__(self, engine: Engine, function: Callable[[], Any]) -> None:
        super().__init__(engine)
        self.function = function

    def cancel(self) -> bool:
        """True unless it has ended: it is not gone on with."""
        cancelled = super().cancel()
        if cancelled:
            self._withdraw(self.engine._asides)
        return cancelled

    def __str__(self) -> str:
        return "a request beside decoding, still queued"


class _Score(_Aside):
    def __init__(self, engine: Engine, prompts: list[list[int]], responses: list[list[int]]) -> None:
        super().__init__(engine, lambda: None)
        self.texts = [_Text(self, p, r) for p, r in zip(prompts, responses, strict=True)]

    def __str__(self) -> str:
        done = sum(text.done is not None for text in self.texts)
        return f"score: {len(self.texts)} texts, " + (f"{done} of them scored" if self.started else "still queued")


@dataclass(eq=False)
class _Text:
    """One to be scored, as ids; ``reading``: where it is scored in pieces; ``done``: what gives its candidate, once it is."""

    job: _Score
    prompt: list[int]
    response: list[int]
    reading: Reading | None = None
    done: Callable[[], Candidate] | None = None

    def left(self) -> int:
        """Tokens that are still to be run, as far as known."""
        return len(self.prompt) + len(self.response) if self.reading is None else self.reading.left
