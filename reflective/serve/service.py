"""What all routes share: the engine, the limits, and how its answers and failures become HTTP."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, HTTPException, Request
from fastapi.responses import JSONResponse

from ..model import Generation
from ..search.prompts import with_behind
from .engine import Closed, Engine, QueueFull
from .metrics import Metrics
from .schemas import Message

T = TypeVar("T")
_log = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx's number; nobody reads it but the metrics


@dataclass(frozen=True)
class Limits:
    """Of a request.

    Attributes:
        body_bytes: of its body; beyond them 413.
        candidates: decoded for it, or texts scored; beyond them 400.
        seconds: until it is cancelled and answered with 504; None: never.

    Raises:
        ValueError: one that lets nothing through.
    """

    body_bytes: int = 8 << 20
    candidates: int = 64
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("body_bytes", "candidates", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be greater than 0")


@dataclass(frozen=True)
class Service:
    """Attributes: ``name``: the model's, in answers and in ``/v1/models``; ``began``: in seconds since the epoch."""

    engine: Engine
    name: str
    limits: Limits
    metrics: Metrics
    began: float

    def check_count(self, name: str, count: int) -> None:
        if count > self.limits.candidates:
            raise HTTPException(400, f"{name}: {count} in one request; this server takes {self.limits.candidates}")

    def check_name(self, model: str | None) -> None:
        if model not in (None, self.name):
            raise HTTPException(404, f"model: there is no {model!r}; this server has {self.name!r}")

    def prompt(self, messages: Sequence[Message], *, answered: bool = False, behind: str = "") -> str:
        """The formatted prompt after ``messages``; ``answered``: these as a text, after which no answer is asked for; ``behind``: a text behind what was said
        last.

        Raises:
            ValueError: the checkpoint's prompt has no room for them, or the chat template refuses them.
        """
        return self.engine.model.format(with_behind([m.templated for m in messages], behind), "messages", answered=answered)

    async def begin(self, request: Request, ask: Callable[[], "Future[T]"]) -> "Future[T]":
        """What ``ask`` asks of the engine; in another thread, for it tokenizes, and counted as queued.

        Raises:
            HTTPException: 400 bad input; 503 the queue is full, or the server is shutting down; and see ``outcome``.
        """
        asked = None
        try:
            asked = self.engine.prepare(ask, len(await request.body()))
            await self._wait(request, asked)
            if asked.cancelled():
                raise Closed("the server is shutting down")
            return asked.result()
        except HTTPException:
            if asked is not None:
                asked.add_done_callback(_forget)  # where it could not be cancelled any more
            raise
        except (QueueFull, Closed) as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
        except (ValueError, TypeError) as error:  # what a tokenizer, or a chat template, does not take
            raise HTTPException(400, str(error)) from error

    async def outcome(self, request: Request, future: "Future[T]") -> T:
        """The result of ``future``, which is cancelled when the client goes away or the time is up.

        Raises:
            HTTPException: see ``settled``; 504 the time is up.
        """
        await self._wait(request, future)
        return settled(future)

    async def _wait(self, request: Request, future: "Future[Any]") -> None:
        result, gone = asyncio.wrap_future(future), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((result, gone), timeout=self.left(request), return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                result.cancelled() or result.exception()  # which asyncio wants to be looked at
            elif gone.done():
                raise HTTPException(CLIENT_GONE, "the client closed the connection")
            else:
                raise HTTPException(504, self.too_slow)
        finally:
            gone.cancel()
            result.cancel()

    def left(self, request: Request) -> float | None:
        """Seconds until the time is up, which began with the request's head; None: there is no limit."""
        if self.limits.seconds is None:
            return None
        return max(0.0, request.scope["state"]["began"] + self.limits.seconds - time.monotonic())

    @property
    def too_slow(self) -> str:
        return f"cancelled: it took longer than {self.limits.seconds} seconds"


def service(request: Request) -> Service:
    return request.app.state.service


Shared = Annotated[Service, Depends(service)]


def settled(future: "Future[T] | asyncio.Future[T]") -> T:
    """The result of a future that is done.

    Raises:
        HTTPException: 500 it failed; 503 it was cut off, which nobody but a server that shuts down does.
    """
    cut = "cancelled: the server is shutting down"
    if future.cancelled():
        raise HTTPException(503, cut)
    if error := future.exception():
        _log.error("a request failed", exc_info=error)
        raise HTTPException(500, f"{type(error).__name__}: {error}")
    result = future.result()
    found = [g for g in (result if isinstance(result, list) else [result]) if isinstance(g, Generation)]
    if any(g.interrupted for g in found):
        raise HTTPException(503, f"{cut}; {sum(g.tokens for g in found)} tokens had been decoded")
    return result


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's and vLLM's servers write it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_response(status: int, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(error_body(status, message), status, headers)


def _forget(asked: "Future[Future[Any]]") -> None:
    if not asked.cancelled() and not asked.exception():
        asked.result().cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
