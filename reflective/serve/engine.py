"""What a server decodes with: one thread that owns the model. What arrives joins the batch that is decoding.

Whatever else is to be run, texts to be scored and long prompts, is run beside those that decode: with transformers in pieces between their
forwards (``pieces``), in vLLM in the same steps (``steps``); between two of them cancellation is seen. What needs no model, tokenizing and reading
answers, is done in other threads.
"""

import collections
import contextlib
import functools
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from typing_extensions import Unpack

from ..engines.hf.engine import Decoding
from ..engines.hf.pace import Pace
from ..engines.hf.scorer import Schedule
from ..model import Candidate, Generation, ReflectiveModel
from ..search.candidates import Ask, Live, Question, SamplingSettings
from ..search.loop import Search
from ..search.prompts import asking_anew
from ..search.strategies import Strategy
from .jobs import Aside, Closed, Generate, Job, Lane, Queue, QueueFull, Score
from .logprobs import Spelling
from .pieces import PIECE, Pieces
from .steps import Steps

__all__ = ["Closed", "Engine", "QueueFull"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
ROWS = 32  # candidates decoded together with transformers, unless another number is said
MAX_TOKENS = 512  # where the model does not say how many positions it has
LONG = 1 << 13  # bytes of a request that is prepared apart: 120 kB are tokenized in 40 ms, 8 MiB in 10 s
AHEAD = 2  # of those, how many are prepared before the model has begun with them: who hangs up by then has cost nothing


class Engine:
    """One model and one queue. Requests are taken in the order of their arrival, as soon as there is a place for one of their
    candidates; texts are scored, and long prompts prefilled, in pieces between two forwards. Short texts that wait are scored in one
    batch, and none waits for a longer one.

    Args:
        batch_rows: candidates decoded together at most; None: ``ROWS``, in vLLM as many as it decodes.
        max_queue: requests that wait at most.
        max_steps: steps of a candidate that are kept one by one; its score counts all. In vLLM set when the model is loaded.
        batch_tokens: padded tokens that are scored between two forwards at most; fewer where these would take longer than a forward. In vLLM
            its ``max_num_batched_tokens``.
        schedule: as for ``StreamScorer``; vLLM's is immediate.
        decoding, kv_tokens: as for ``ReflectiveModel.generate``; vLLM has its own.

    Raises:
        ValueError: a limit that lets nothing through; another ``schedule`` than vLLM's.
    """

    def __init__(
        self,
        model: ReflectiveModel,
        *,
        batch_rows: int | None = None,
        max_queue: int = 64,
        max_steps: int = 4096,
        batch_tokens: int = 16_384,
        schedule: Schedule = "immediate",
        decoding: Decoding = "auto",
        kv_tokens: int | None = None,
    ) -> None:
        for name, value in (("batch_rows", batch_rows), ("max_queue", max_queue)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model = model
        self._settings = {"schedule": schedule, "max_steps": max_steps, "decoding": decoding, "kv_tokens": kv_tokens}
        self.queue = Queue(max_queue)
        self._tokens = 0
        self._tokenizing = threading.Lock()
        self._lanes = Lane(model, "short"), Lane(model, "long")
        self._here = threading.local()  # ``lane``: of a thread that prepares
        self._turns: Pieces | Steps
        if model.host is None:
            batch_rows = batch_rows or ROWS
            self._pace = Pace(batch_tokens, model.model.device, PIECE[1])
            self._turns = Pieces(model, self.queue, self._pace, batch_tokens)
        else:
            mine = None if schedule == "immediate" else schedule
            model.host.refuse({"schedule": mine, "decoding": decoding, "kv_tokens": kv_tokens})
            self._turns = Steps(model, self.queue)
        self._search = self._new_search(batch_rows)
        self.batch_rows: int = self._search.engine.batch_rows
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
            again: the prompt with a text behind its question, for strategies that ask so, where there is one prompt.
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
        seed: int | None = None,
        stop: Sequence[str] = (),
        thinking_budget: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        again: Callable[[str], str] | None = None,
        on_step: Callable[..., None] | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Generate:
        seed, questions, texts = secrets.randbits(32) if seed is None else seed, [], []
        for i, prompt in enumerate(prompts):
            name = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
            text, ids = (prompt, self.encode(prompt)) if isinstance(prompt, str) else ("", list(prompt))
            room = max(1, self.max_length - len(ids)) if self.max_length is not None else MAX_TOKENS
            chosen = self.model.strategy(strategy, n=n)
            usual = max(1, room // 2) if chosen.asks else room  # the other half is for the drafts, which become part of a prompt
            most = usual if max_new_tokens is None else max_new_tokens
            anew = asking_anew(lambda text: self.encode(again(text)), most, self.max_length) if again and len(prompts) == 1 else None
            ask = Ask(
                ids, chosen, max_new_tokens=most, seed=seed, stop=stop, thinking_budget=thinking_budget, logprobs=logprobs,
                prompt_logprobs=prompt_logprobs, again=anew, **sampling,
            )  # fmt: skip
            self.model.check_sampling(ask)
            self.check(name, ids)
            if self.max_length is not None and len(ids) + most > self.max_length:
                raise ValueError(
                    f"max_new_tokens={most}: with the prompt's {len(ids)} tokens that is more than the "
                    f"{self.max_length} positions of the model"
                )
            if wrong := self.model.too_long(len(ids)):  # with no token behind it
                raise ValueError(f"{name}: {len(ids)} tokens, {wrong}")
            questions.append(Question(self.model.reader, ask))
            texts.append(text)
        job = Generate(self.queue, self.model, questions, texts, on_step, one)
        self._queue(self.queue.waiting, job)
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
        job = Score(self.queue, heads, texts)
        self._queue(self.queue.asides, job)
        return job

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Anything else that needs the model: called between two forwards.

        Raises:
            QueueFull, Closed.
        """
        job = Aside(self.queue, function)
        self._queue(self.queue.asides, job)
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
                with self.queue.changed:
                    self.queue.changed.wait_for(lambda: self.queue.closing or self.queue.ahead() < AHEAD)
            return function()

        with self.queue.changed:
            self.queue.check_room()
            self.queue.preparing += 1
            future = lane.thread.submit(run)
        future.add_done_callback(self._prepared)
        return future

    def _prepared(self, _: Future) -> None:
        with self.queue.changed:
            self.queue.preparing -= 1

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
        with self.queue.changed:
            running, scoring = list(self.queue.running), sum(job.started for job in self.queue.asides)
            return {
                "queued": self.queue.preparing + len(self.queue.waiting) + len(self.queue.asides) - scoring,
                "running": len(set(self.queue.running.values())) + scoring,
                "rows": min(self.batch_rows, sum(len(q.open) for q in running)),
                "tokens": self._tokens + sum(q.tokens for q in running),
                "scored": self._turns.scored,
            }

    @property
    def broken(self) -> Exception | None:
        """Why nothing can be decoded any more: vLLM has failed."""
        return None if self.model.host is None else self.model.host.core.broken

    def close(self, timeout: float | None = None) -> list[str]:
        """Take no further requests, and finish those that are there.

        Args:
            timeout: seconds after which they are cancelled; None: never.

        Returns:
            What was cut off, a line a request.
        """
        with self.queue.changed:
            self.queue.closing = True
            self.queue.changed.notify_all()
        self._thread.join(timeout)
        with self.queue.changed:
            running = dict.fromkeys(self.queue.running.values())
            cut = [*running, *self.queue.waiting, *self.queue.asides] if self._thread.is_alive() else []
            lines = [str(job) for job in dict.fromkeys(cut)]
        for job in dict.fromkeys(cut):
            job.cancel()
        self._thread.join()
        for thread in (*(lane.thread for lane in self._lanes), self.queue.finishing):
            thread.shutdown(cancel_futures=thread is not self.queue.finishing)
        return lines

    def check(self, name: str, ids: Sequence[int]) -> None:
        """ValueError, naming ``name``, unless ``ids`` are the model's."""
        size = self.model.vocab_size
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
        size = len(prompt) + len(response)
        if wrong := self.model.too_long(size, more):  # before anything is done for each token
            whole = "with its prompt " if prompt else ""
            raise ValueError(f"{name}{which}: {whole}{size} tokens, {wrong}")
        self.check(f"{name}{which}", response)
        if prompt:
            self.check(f"prompt{which}", prompt)

    def _queue(self, place: "collections.deque[Any]", job: Job) -> None:
        lane = getattr(self._here, "lane", None)
        job.long = lane is self._lanes[1]
        self.queue.put(place, job, prepared=lane is not None)

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _new_search(self, batch_rows: int | None) -> Search:
        engine = self._turns.engine(batch_rows, **self._settings)
        return Search(engine, self.model.reader, on_step=self._stepped, on_end=self._ended)

    def _run(self) -> None:
        while True:
            with self.queue.changed:
                self.queue.changed.wait_for(lambda: self.queue.waiting or self.queue.asides or self.queue.closing)
                if not self.queue.waiting and not self.queue.asides:
                    return
            try:
                self._turns.serve(self._search, self._arrivals)
            except Exception as error:  # noqa: BLE001  # of one, while the thread serves all
                _log.exception("decoding failed; the requests under way are answered with the error")
                broken = self.broken is not None
                with self.queue.changed:
                    failed = dict.fromkeys(self.queue.running.values())
                    self.queue.running.clear()
                    self.queue.closing = self.queue.closing or broken
                    if broken or not failed:  # else whoever waits would have it fail again, for ever
                        failed |= dict.fromkeys((*self.queue.waiting, *self.queue.asides))
                        self.queue.asides.clear()
                    self.queue.waiting = collections.deque(job for job in self.queue.waiting if job not in failed)
                    self.queue.changed.notify_all()
                for job in failed:
                    with contextlib.suppress(InvalidStateError):  # it was cancelled
                        job.set_exception(error)
                if broken:
                    return
                self._search = self._new_search(self.batch_rows)

    def _arrivals(self, room: int) -> list[Question]:
        new = []
        with self.queue.changed:
            while self.queue.waiting and room > 0:
                job = self.queue.waiting[0]
                if not job.started and not job.set_running_or_notify_cancel():
                    self.queue.waiting.popleft()
                    continue
                job.started = True
                while job.pending and room > 0:
                    question = job.pending.popleft()
                    self.queue.running[question] = job
                    new.append(question)
                    room -= len(question.candidates)
                if not job.pending:
                    self.queue.waiting.popleft()
            if new:
                self.queue.changed.notify_all()
        return new

    def _stepped(self, candidates: list[list[Live]]) -> None:
        for group in candidates:
            job = self.queue.running[group[0].question]
            if job.on_step:
                try:
                    question = group[0].question
                    job.on_step(group) if job.one else job.on_step(job.questions.index(question), group)
                except Exception:  # noqa: BLE001  # of a caller; decoding goes on
                    _log.exception("on_step failed and is not called again")
                    job.on_step = None

    def _ended(self, question: Question) -> None:
        with self.queue.changed:
            job = self.queue.running.pop(question)
            self._tokens += question.tokens
            job.unanswered -= 1
            ended = not job.unanswered
        if ended:
            job.finish()
