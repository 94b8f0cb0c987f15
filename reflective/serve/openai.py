"""OpenAI's ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``, with the scores of every choice in ``reflective``."""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..engines.base import Chance
from ..model import Candidate, Generation
from ..scoring.scores import aggregate
from ..search.candidates import Live
from ..utils.outputs import finite, json_text
from . import logprobs
from .logprobs import Told
from .schemas import ChatCompletion, Completion, Sampling
from .service import Service, Shared, error_body, settled
from .text import Incoming, before
from .watch import Event, Watch

CHANCES = 1 << 19  # of prompts' tokens in one answer: 50 MB of JSON
UNREAD = 5.0  # seconds, beyond the limit, in which the last events may be read
ONE_MODEL = "/v1/models/"
router = APIRouter()


@router.get("/v1/models")
async def models(service: Shared) -> dict[str, Any]:
    return {"object": "list", "data": [_model(service)]}


@router.get(ONE_MODEL + "{model:path}")
async def one_model(model: str, service: Shared) -> dict[str, Any]:
    service.check_name(model)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name, "object": "model", "created": int(service.began), "owned_by": "reflective",
        "max_model_len": service.engine.max_length,
    }  # fmt: skip


@router.post("/v1/chat/completions")
async def chat(body: ChatCompletion, request: Request, service: Shared) -> Any:
    def again(text: str) -> str:
        return service.prompt(body.messages, behind=text)

    return await _complete(_CHAT, body, lambda: [service.prompt(body.messages)], request, service, again)


@router.post("/v1/completions")
async def completions(body: Completion, request: Request, service: Shared) -> Any:
    return await _complete(_TEXT, body, lambda: body.prompt, request, service)


@dataclass(frozen=True)
class _Form:
    """How one of the two writes its answers: ``whole`` and ``part`` put a text into a choice, ``chances`` its tokens'."""

    prefix: str
    object: str
    chunk: str
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str], dict[str, Any]]
    chances: Callable[[Told, list[tuple[Chance, int]]], dict[str, Any]]
    first: dict[str, Any] | None = None  # of a streamed choice


_CHAT = _Form(
    "chatcmpl", "chat.completion", "chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    part=lambda text: {"delta": {"content": text} if text else {}},
    chances=logprobs.chat,
    first={"delta": {"role": "assistant", "content": ""}},
)  # fmt: skip
_TEXT = _Form(
    "cmpl", "text_completion", "text_completion",
    whole=lambda text: {"text": text}, part=lambda text: {"text": text}, chances=logprobs.completion,
)  # fmt: skip


async def _complete(
    form: _Form, body: Sampling, given: Callable[[], list[str | list[int]]], request: Request, service: Service,
    again: Callable[[str], str] | None = None,
) -> Any:  # fmt: skip
    service.check_name(body.model)
    engine, loop, news = service.engine, asyncio.get_running_loop(), asyncio.Queue()
    sent: dict[tuple[int, int], tuple[int, int]] = {}
    answer = _Answer(form, body, service)
    watch = Watch(engine.model, body.stops) if body.watched else None

    def on_step(question: int, candidates: Sequence[Live]) -> None:
        """In the engine's thread: hand over what is new."""
        if watch and watch.note(answer.index(question, 0) // answer.width, candidates):
            loop.call_soon_threadsafe(news.put_nowait, watch)
        if body.steered:
            return
        for c in candidates:
            tokens, steps = sent.get((question, c.number), (0, 0))
            if len(c.token_ids) > tokens or len(c.step_scores) > steps:
                sent[question, c.number] = len(c.token_ids), len(c.step_scores)
                new = _News(
                    answer.index(question, c.number), c.token_ids[tokens:], c.step_scores[steps:],
                    c.chances[tokens : len(c.token_ids)], c.question.prompt_chances,
                )  # fmt: skip
                loop.call_soon_threadsafe(news.put_nowait, new)

    def ask() -> Future[list[Generation]]:
        strategy = engine.model.strategy(body.strategy, body.effort, body.best_of if body.steered else body.n or 1)
        prompts = answer.read(given())
        service.check_count("prompt, n, best_of, effort, strategy", len(answer.lengths) * strategy.n)
        of_prompt = body.echoes and (body.alternatives is not None or body.max_tokens == 0)
        if body.alternatives is not None:
            count = sum(answer.lengths) * answer.width * (1 + body.alternatives) if body.echoes else 0
            if count > CHANCES:
                raise ValueError(
                    f"prompt, n, logprobs: {count} of the prompts in one answer; this server gives {CHANCES}; leave out echo, or "
                    "send fewer prompts at once"
                )
            _ = engine.spelling  # read here, where it holds up nobody
        return engine.generate_all(
            prompts, strategy=strategy, n=None, max_new_tokens=body.max_tokens, **body.sampling, seed=body.seed,
            stop=body.stops, thinking_budget=body.thinking_budget, logprobs=body.alternatives,
            prompt_logprobs=(body.alternatives or 0) if of_prompt else None, again=again,
            on_step=on_step if body.stream and (watch or not body.steered) else None,
        )  # fmt: skip

    future = await service.begin(request, ask)
    if not body.stream:
        generations = await service.outcome(request, future)
        if body.alternatives is None:
            return JSONResponse(answer.whole(generations))
        return await asyncio.to_thread(lambda: JSONResponse(answer.whole(generations)))  # a long prompt's takes seconds
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(news.put_nowait, None))
    left = service.left(request)
    return _Events(answer.events(news, future, left, watch), future, left)


@dataclass(frozen=True)
class _News:
    """What is new of a choice, and what is known of its prompt."""

    index: int
    tokens: list[int]
    scores: list[float]
    chances: list[Chance]
    prompt_chances: list[Chance]


class _Answer:
    """What is said of one request.

    Attributes:
        lengths: tokens of each of its prompts; echoes: these as texts where they are to be repeated, and whether they show
            special tokens; wrong: what is wrong with one of several, by its number. Those are not decoded.
    """

    def __init__(self, form: _Form, body: Sampling, service: Service) -> None:
        self.form, self.body, self.service = form, body, service
        self.id, self.created = f"{form.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.lengths: list[int] = []
        self.echoes: list[tuple[str, bool]] = []
        self.wrong: dict[int, str] = {}
        self.width = 1 if body.steered else body.n or 1  # choices of a prompt

    def read(self, given: list[str | list[int]]) -> list[list[int]]:
        """The ids of the prompts that can be answered.

        Raises:
            ValueError: there is none.
        """
        engine, prompts, least = self.service.engine, [], 1 if self.body.max_tokens is None else self.body.max_tokens
        self.service.check_count("prompt", len(given))
        for i, prompt in enumerate(given):
            name, ids = "prompt" if len(given) == 1 else f"prompt[{i}]", []
            try:
                if prompt == "" and len(given) > 1:
                    raise ValueError(f"{name}: it is empty")
                ids = engine.encode(prompt) if isinstance(prompt, str) else prompt
                engine.check(name, ids)
                if engine.max_length and len(ids) + least > engine.max_length and len(given) > 1:
                    raise ValueError(
                        f"{name}: {len(ids)} tokens and max_tokens={least} are more than the model's "
                        f"{engine.max_length} positions"
                    )
                prompts.append(ids)
            except ValueError as error:
                self.wrong[i] = str(error)
            self.lengths.append(len(ids))
            self.echoes.append(self._shown(prompt, ids) if self.body.echoes and i not in self.wrong else ("", False))
        if not prompts:
            raise ValueError("; ".join(list(self.wrong.values())[:4]))
        return prompts

    def _shown(self, prompt: str | list[int], ids: list[int]) -> tuple[str, bool]:
        text = self.service.engine.model.decode(ids, special=True)
        return (text, True) if isinstance(prompt, list) else (prompt, prompt == text)

    def index(self, question: int, number: int) -> int:
        """Of the choice that is candidate ``number`` of a question that was asked."""
        asked = [i for i in range(len(self.lengths)) if i not in self.wrong]
        return asked[question] * self.width + number

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        choices, echoed = [], {}
        for index, c, prompt_chances in self._chosen(generations):
            i = index // self.width
            if i not in echoed:
                echoed[i] = self._echo(i, prompt_chances)
            text, said = before(c.text, self.body.stops), self._end(c, index, self._told(index))
            said["logprobs"] = _joined(echoed[i], said["logprobs"])
            choices.append({"index": index, **self.form.whole(self.echoes[i][0] + text), **said})
        return {
            **self._head(self.form.object), "choices": choices, "usage": self._usage(generations),
            "reflective": _run(generations),
        }  # fmt: skip

    async def events(
        self, news: asyncio.Queue, future: Future[list[Generation]], left: float | None, watch: Watch | None = None
    ) -> AsyncIterator[str]:
        """Server-sent events: pieces of the choices as they come, with the scores of the steps that they end, and what is watched."""
        try:
            async for event in self._events(news, future, left, watch):
                yield _sse(event)
        except HTTPException as error:
            yield _sse(error_body(error.status_code, error.detail))
        yield "data: [DONE]\n\n"

    async def _events(
        self, news: asyncio.Queue, future: Future[list[Generation]], left: float | None, watch: Watch | None
    ) -> AsyncIterator[dict[str, Any]]:
        form, decode = self.form, self.service.engine.model.decode
        texts = [Incoming(decode, self.body.stops) for _ in range(len(self.lengths) * self.width)]
        steps: list[list[float]] = [[] for _ in texts]
        told, echoed = [self._told(i) for i in range(len(texts))], set()

        async def echo(index: int, chances: list[Chance] | None) -> list[dict[str, Any]]:
            """The chunk with the choice's prompt, once."""
            text = self.echoes[index // self.width][0]
            if not text or index in echoed:
                return []
            echoed.add(index)
            said = {"logprobs": await asyncio.to_thread(self._echo, index // self.width, chances)}
            return [self._chunk({"index": index, **form.part(text), **said, "finish_reason": None})]

        if form.first:
            for i in range(len(texts)):
                yield self._chunk({"index": i, **form.first, "finish_reason": None})
        until = None if left is None else time.monotonic() + left
        while True:
            try:
                new = await asyncio.wait_for(news.get(), None if until is None else until - time.monotonic())
            except asyncio.TimeoutError:
                raise HTTPException(504, self.service.too_slow) from None
            if new is None:
                break
            if new is watch:
                for found in watch.events():
                    yield self._watched(found)
                continue
            i, scores = new.index, new.scores
            for chunk in await echo(i, new.prompt_chances):
                yield chunk
            piece = texts[i].feed(new.tokens)
            steps[i] += scores
            more: dict[str, Any] = {}
            if told[i] is not None:
                told[i].feed(new.chances)
                more["logprobs"] = told[i].take(texts[i].sent)
            if scores:
                score = aggregate(steps[i], self.service.engine.model.head.in_progress)
                said = {"score": finite(score), "n_steps": len(steps[i]), "step_scores": finite(scores)}
                more["reflective"] = said
            if piece or scores or more.get("logprobs"):
                yield self._chunk({"index": i, **form.part(piece), "finish_reason": None, **more})
        generations = settled(future)
        if watch:
            asked = [i for i in range(len(self.lengths)) if i not in self.wrong]
            yield self._watched([watch.chosen(i, generation) for i, generation in zip(asked, generations, strict=True)])
        for index, c, prompt_chances in self._chosen(generations):
            for chunk in await echo(index, prompt_chances):
                yield chunk
            piece, said = texts[index].finish(c.text), self._end(c, index, told[index])
            yield self._chunk({"index": index, **form.part(piece), **said}, reflective=_run(generations))
        if self.body.with_usage:
            yield {**self._head(form.chunk), "choices": [], "usage": self._usage(generations)}

    def _chosen(self, generations: list[Generation]) -> list[tuple[int, Candidate, list[Chance] | None]]:
        """Every choice with its number, and its prompt's chances: those of the first prompt, then of the second; what is wrong
        with a prompt is its choices' error."""
        rest, chosen = iter(generations), []
        for i in range(len(self.lengths)):
            if i in self.wrong:
                wrong = Candidate("", math.nan, [], [], [], error=self.wrong[i], status="error")
                chosen += [(wrong, None)] * self.width
                continue
            generation = next(rest)
            self.service.metrics.scored(generation.candidates)
            found = [generation.best] if self.body.steered else generation.candidates
            chosen += [(c, generation.prompt_logprobs) for c in found]
        return [(i, *choice) for i, choice in enumerate(chosen)]

    def _told(self, index: int) -> Told | None:
        """What will tell the chances of a choice's tokens, where they are asked for."""
        if self.body.alternatives is None:
            return None
        return Told(self.form.chances, self.service.engine.spelling, begin=len(self.echoes[index // self.width][0]))

    def _echo(self, i: int, chances: list[Chance] | None) -> dict[str, Any] | None:
        """The chances of prompt ``i``, where they are asked for."""
        if self.body.alternatives is None or not chances:
            return None
        told = Told(self.form.chances, self.service.engine.spelling, special=self.echoes[i][1])
        told.feed(chances)
        return told.take(None)

    def _end(self, c: Candidate, index: int, told: Told | None) -> dict[str, Any]:
        """How a choice ended, its scores, and the chances that are not told yet. The text lacks the stop text that ended it, and
        its spans begin behind the prompt, if that is repeated."""
        text, begins = before(c.text, self.body.stops), len(self.echoes[index // self.width][0])
        size = len(text)
        if told is not None and c.logprobs is not None:
            told.feed(c.logprobs[told.count : len(c.token_ids)])
            told.feed(c.logprobs[told.count :], ending=True)
        scores = {
            "score": finite(c.score), "n_steps": len(c.step_scores), "step_scores": finite(c.step_scores),
            "step_spans": [[begins + min(place, size) for place in span] for span in c.step_spans], "answer": c.answer,
            "error": c.error,
        }  # fmt: skip
        reason = c.status if c.status in ("length", "error") else "stop"
        chances = told.take(None if text == c.text else size) if told is not None else None
        return {"finish_reason": reason, "logprobs": chances, "reflective": scores}

    def _chunk(self, choice: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self.body.with_usage else {}
        return {**self._head(self.form.chunk), "choices": [] if choice is None else [choice], **usage, **more}

    def _watched(self, events: list[Event]) -> dict[str, Any]:
        return self._chunk(None, reflective={"events": events})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}

    def _usage(self, generations: list[Generation]) -> dict[str, int]:
        """Tokens of all candidates that were decoded, chosen or not."""
        prompt = sum(n for i, n in enumerate(self.lengths) if i not in self.wrong)
        completion = sum(generation.tokens for generation in generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Events(StreamingResponse):
    """Cancels the request when the client goes away, before its first event too, and when the time is up and it does not
    read what is sent."""

    def __init__(self, events: AsyncIterator[str], future: Future[list[Generation]], left: float | None) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.future, self.left = future, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self.left and self.left + UNREAD)
        except asyncio.TimeoutError:
            raise ClientDisconnect from None
        finally:
            self.future.cancel()


def _run(generations: list[Generation]) -> dict[str, Any]:
    """With which the run can be repeated, and what all of its candidates scored, prompt by prompt."""
    return {
        "strategy": generations[0].strategy, "seed": generations[0].seed,
        "chosen_by": [generation.chosen_by for generation in generations],
        "scores": finite([c.score for generation in generations for c in generation.candidates]),
    }  # fmt: skip


def _joined(first: dict[str, Any] | None, then: dict[str, Any] | None) -> dict[str, Any] | None:
    """The chances of a prompt and of what follows."""
    return {name: first[name] + then[name] for name in first} if first and then else first or then


def _sse(event: dict[str, Any]) -> str:
    return f"data: {json_text(event, ensure_ascii=False)}\n\n"
