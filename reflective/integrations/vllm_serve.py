"""``vllm serve``: scores in the answers of its ``/v1/completions`` and ``/v1/chat/completions``, in the field ``reflective`` of every choice.

An entry point of the group ``vllm.endpoint_plugins``, which vLLM loads where ``VLLM_PLUGINS`` names it. No route is added or replaced: those that
are there ask two objects of the app's state, and in the place of these stand such as ask them in turn, each time with an engine that listens. So
whatever vLLM does before and behind them, authentication, validation, load, disconnects, errors, stays as it is; and a server that was started
without scores has nothing of it.
"""

import asyncio
import copy
import json
import uuid
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..engines.vllm.options import NAME, Options
from ..engines.vllm.requests import Log
from ..engines.vllm.results import collect
from ..engines.vllm.worker import logs_of
from ..utils.outputs import finite
from ..vllm import steps_for

LOOK_S = 0.05  # between looks at who was pruned, where an end-of-sequence token ends nothing
_ENDS = '"finish_reason":"'  # in a chunk that is a choice's last; elsewhere it is null
_CREATE = {"openai_serving_completion": "create_completion", "openai_serving_chat": "create_chat_completion"}


class Plugin:
    """See ``vllm.plugins.endpoint_plugins.interface``."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Nothing: the routes are vLLM's own."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Have the app score, if its model was started with scores.

        Raises:
            ValueError: a mode in which scores are refused.
        """
        config = getattr(engine_client, "vllm_config", None)
        said = getattr(config, "additional_config", None)
        if not isinstance(said, dict) or NAME not in said:
            return
        await engine_client.collective_rpc("reflective_start")
        scorer = _Scorer(engine_client)
        for name, method in _CREATE.items():
            if (serving := getattr(state, name, None)) is not None:
                setattr(state, name, _Scored(serving, method, scorer))


class _Scored:
    """One of vLLM's objects that answer, whose answers to requests are scored."""

    def __init__(self, inner: Any, method: str, scorer: "_Scorer") -> None:
        self.inner, self.scorer = inner, scorer
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return self._create if name == self._method else getattr(self.inner, name)

    async def _create(self, request: Any, raw_request: Any = None) -> Any:
        """Chunks, an answer or an error, as vLLM makes them."""
        call = _Call(self.scorer, request)
        serving = copy.copy(self.inner)
        serving.engine_client = _Listening(self.scorer.engine, call)
        streams = False
        try:
            answer = await getattr(serving, self._method)(request, raw_request)
            if streams := hasattr(answer, "__aiter__"):
                return self._chunks(call, answer)
            for choice in getattr(answer, "choices", ()):
                setattr(choice, NAME, await call.scores(choice.index))
            return answer
        finally:
            if not streams:
                call.end()

    async def _chunks(self, call: "_Call", chunks: AsyncGenerator[str, None]) -> AsyncIterator[str]:
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield await self._with_scores(call, chunk) if _ENDS in chunk else chunk
        finally:
            call.end()

    async def _with_scores(self, call: "_Call", chunk: str) -> str:
        before, mark, text = chunk.partition("data: ")
        said = json.loads(text)
        for choice in said["choices"]:
            if choice.get("finish_reason") is not None:
                choice[NAME] = await call.scores(choice["index"])
        return f"{before}{mark}{json.dumps(said, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Listening:
    """vLLM's engine, for one request: what is asked of it gets a key, and what it answers is heard."""

    def __init__(self, inner: Any, call: "_Call") -> None:
        self.inner, self.call = inner, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **more: Any) -> AsyncIterator[Any]:
        return self._heard(self.call.ask(sampling_params), prompt, sampling_params, request_id, more)

    async def _heard(
        self, asked: "_Asked", prompt: Any, params: Any, request_id: str, more: dict[str, Any]
    ) -> AsyncIterator[Any]:
        with self.call.under_way(asked):
            async with aclosing(self.inner.generate(prompt, params, request_id, **more)) as outputs:
                async for output in outputs:
                    asked.hear(output)
                    yield output


@dataclass
class _Choice:
    ids: list[int] = field(default_factory=list)
    ended: bool = False


class _Asked:
    """One prompt of a request, of which n choices are made.

    Attributes:
        key: by which the worker knows all of them.
        stopped: number of a choice that had to be aborted -> what was known of it before.
    """

    def __init__(self, params: Any, prunes: bool) -> None:
        self.key, self.n = uuid.uuid4().hex, params.n
        self.prompt: list[int] = []
        self.choices = [_Choice() for _ in range(params.n)]
        self.stopped: dict[int, Log] = {}
        self._adds = params.output_kind.name == "DELTA"
        prunes = prunes and params.n > 1
        wanted = {"key": self.key, **({"group": self.key} if prunes else {})}
        params.extra_args = {**(params.extra_args or {}), NAME: wanted}
        # Whether the end-of-sequence token by which the worker prunes does not end it.
        self.watched = prunes and bool(params.ignore_eos or params.min_tokens)

    def hear(self, output: Any) -> None:
        if output.prompt_token_ids:  # the first outputs have them
            self.prompt = list(output.prompt_token_ids)
        for new in output.outputs:
            choice = self.choices[new.index]
            if not self._adds:
                choice.ids.clear()
            choice.ids += new.token_ids
            choice.ended |= new.finish_reason is not None

    def number(self, log: Log) -> int:
        """Whose of the n choices a log is: vLLM puts the number before the ids of several."""
        return int(log.request.partition("_")[0]) if self.n > 1 else 0


class _Call:
    """One HTTP request: what it asks of the engine, and the scores of its choices. vLLM numbers these prompt by prompt."""

    def __init__(self, scorer: "_Scorer", request: Any) -> None:
        self.scorer = scorer
        self._asked: list[_Asked] = []
        self._begun: list[str] = []  # keys that the worker may know
        self._open, self._closed, self._forgotten = 0, asyncio.Event(), False
        self._found: dict[int, dict[str, Any]] = {}
        self._beams = bool(getattr(request, "use_beam_search", False))
        # vLLM then samples a token that it does not show.
        self._prompt_only = bool(getattr(request, "echo", False)) and request.max_tokens == 0

    def ask(self, params: Any) -> _Asked:
        self._asked.append(asked := _Asked(params, self.scorer.prunes and not self._beams))
        return asked

    @contextmanager
    def under_way(self, asked: _Asked) -> Iterator[None]:
        """While the engine answers."""
        self._begun.append(asked.key)
        self._open += 1
        self._closed.clear()
        if asked.watched:
            self.scorer.watch(asked)
        try:
            yield
        finally:
            self.scorer.unwatch(asked.key)
            self._open -= 1
            if not self._open:
                self._closed.set()

    async def scores(self, index: int) -> dict[str, Any]:
        """Of a choice that has ended, in one call of the worker for all that have ended by now."""
        if self._beams:
            return _without("beam search is not scored")
        if index not in self._found:
            await self._read()
        return self._found[index]

    async def _read(self) -> None:
        ended = {}
        for i, asked in enumerate(self._asked):
            for j, choice in enumerate(asked.choices):
                if choice.ended and i * asked.n + j not in self._found:
                    ended[i * asked.n + j] = asked, j
        over = all(choice.ended for asked in self._asked for choice in asked.choices)
        keys = self._begun if over else list({asked.key: None for asked, _ in ended.values()})
        try:
            logs = await self.scorer.logs(keys, forget=over)
        except Exception as error:  # noqa: BLE001  # the texts are there all the same
            self._found |= {index: _without(f"the worker did not answer: {error}") for index in ended}
            return
        self._forgotten |= over
        self._found |= await asyncio.to_thread(self._scores_of, logs, ended)

    def _scores_of(self, logs: list[Log], ended: dict[int, tuple[_Asked, int]]) -> dict[int, dict[str, Any]]:
        by_key = {asked.key: asked for asked in self._asked}
        found = {(log.key, by_key[log.key].number(log)): log for log in logs}
        scores = {}
        for index, (asked, j) in ended.items():
            log, ids = found.get((asked.key, j)), [] if self._prompt_only else asked.choices[j].ids
            if j in asked.stopped:  # the worker went on until it heard of the abort
                log = asked.stopped[j]
                ids = ids[: log.seen - len(asked.prompt) + (self.scorer.at != "predict")]
            scores[index] = self.scorer.scores_of(log, asked.prompt, ids)
        return scores

    def end(self) -> None:
        """The request is over, whatever became of it."""
        if self._begun and not self._forgotten:
            self.scorer.later(self._forget())

    async def _forget(self) -> None:
        await self._closed.wait()  # by then vLLM has aborted what it aborts, and nothing of these keys will be admitted
        await self.scorer.logs(self._begun, forget=True)


class _Scorer:
    """What all requests share: the engine, how scores are read, and who looks after the pruned.

    Attributes:
        prunes: whether the worker does; at: as it has it.
    """

    def __init__(self, engine: Any) -> None:
        options = Options.of(engine.vllm_config.additional_config)
        self.engine, self.prunes = engine, options.prune is not None
        self._steps, self.at, self._reading = steps_for(engine.vllm_config), options.at, options.reading
        self._watched: dict[str, _Asked] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself would let them go
        self._looking = False

    async def logs(self, keys: list[str], *, forget: bool) -> list[Log]:
        return logs_of(await self.engine.collective_rpc("reflective_logs", args=(keys, forget)))

    def scores_of(self, log: Log | None, prompt: list[int], ids: list[int]) -> dict[str, Any]:
        """The field of a choice whose tokens are ``ids``, checked by their hash."""
        if log is None:
            return _without("the worker does not know this request")
        try:
            found = collect([log], [prompt + ids], [len(prompt)], self._steps, **self._reading)
        except ValueError as error:
            return _without(str(error))
        said = {
            "score": found.score[0].item(), "step_scores": found.step_scores[0].tolist(),
            "positions": [column - len(prompt) for column in found.step_positions[0].tolist()],
            "error": found.errors.get(0),
        }  # fmt: skip
        return finite(said | ({"pruned": log.pruned} if self.prunes else {}))

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def watch(self, asked: _Asked) -> None:
        """Abort those choices that are pruned."""
        self._watched[asked.key] = asked
        if not self._looking:
            self._looking = True
            self.later(self._look())

    def unwatch(self, key: str) -> None:
        self._watched.pop(key, None)

    async def _look(self) -> None:
        """One call of the worker at a time, for all that are watched."""
        try:
            while self._watched:
                await asyncio.sleep(LOOK_S)
                for log in await self.logs(list(self._watched), forget=False):
                    if not log.pruned or (asked := self._watched.get(log.key)) is None:
                        continue
                    # Only after a further look: by then the tokens that this log is of have come.
                    if asked.stopped.setdefault(asked.number(log), log) is not log:
                        await self.engine.abort(log.request, internal=True)
        finally:
            self._looking = False


def _without(error: str) -> dict[str, Any]:
    return {"score": None, "step_scores": [], "positions": [], "error": error}
