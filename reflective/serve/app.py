"""The server: its routes, who may call them, and its life."""

import asyncio
import ipaddress
import logging
import secrets
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engines.hf.engine import Decoding
from ..model import ReflectiveModel
from . import offers, openai, page, pooling, published
from .engine import Engine
from .metrics import Metrics
from .service import Limits, Service, Shared, error_response

_log = logging.getLogger("uvicorn.error")  # where uvicorn says what it listens at
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OPEN = ("/health", *page.PATHS)  # without a key


def serve(
    model: ReflectiveModel,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    api_key: str | None = None,
    name: str | None = None,
    limits: Limits | None = None,
    batch_rows: int | None = None,
    decoding: Decoding = "auto",
    kv_tokens: int | None = None,
    max_queue: int = 64,
    grace: float = 30.0,
    log_level: str = "info",
) -> None:
    """Serve until SIGTERM or Ctrl-C; then no further requests are taken, and those under way are finished.

    Args:
        model: alone used by the server from now on, and closed at the end.
        host, port: 0 is any free port, which the log names.
        api_key: what clients must send as ``Authorization: Bearer KEY``; None: nothing.
        name: of the model, for clients; default the last part of its path.
        limits: of a request.
        batch_rows, max_queue: candidates decoded together, and requests that wait, at most; see ``Engine``.
        decoding, kv_tokens: as for ``ReflectiveModel.generate``.
        grace: seconds to finish in; what is not finished then is cancelled, its client told so, and listed on stderr.
        log_level: of uvicorn.

    Raises:
        ValueError: a model that cannot be scored, an empty ``api_key``, a limit that lets nothing through.
    """
    if api_key == "":
        raise ValueError("api_key: it is empty; give a key, or none")
    engine = Engine(model, batch_rows=batch_rows, decoding=decoding, kv_tokens=kv_tokens, max_queue=max_queue)
    if host not in LOOPBACK and api_key is None:
        print(f"warning: {host} can be reached from other machines, and no api_key is asked for", file=sys.stderr)
    server = Server(create_app(engine, api_key=api_key, name=name, limits=limits), host, port, grace, log_level)
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn raises the signal again when all is done
        pass
    finally:
        model.close()


def create_app(
    engine: Engine, *, api_key: str | None = None, name: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """The routes over an engine, which the caller closes; see ``serve``."""
    limits = limits or Limits()
    name = name or engine.model.name.rstrip("/").rpartition("/")[2] or "reflective"
    service = Service(engine, name, limits, Metrics(engine), time.time())
    app = FastAPI(title="reflective", docs_url=None, redoc_url=None)
    app.state.service = service
    for module in (published, openai, pooling, offers, page):
        app.include_router(module.router)

    @app.get("/health")
    async def health() -> Response:
        if error := engine.broken:
            return error_response(503, f"nothing can be decoded any more: {type(error).__name__}: {error}")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(service: Shared) -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(HTTPException, _refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failure)
    paths = {*app.openapi()["paths"], *page.PATHS}
    app.add_middleware(_Door, service=service, api_key=api_key, paths=paths)
    return app


class Server(uvicorn.Server):
    """uvicorn, which closes the app's engine while it waits for the requests under way."""

    def __init__(self, app: FastAPI, host: str, port: int, grace: float, log_level: str) -> None:
        self.engine, self.grace = app.state.service.engine, grace
        # uvicorn's own limit is for what hangs: the engine ends every request within the grace.
        super().__init__(
            uvicorn.Config(
                app, host, port, log_level=log_level, server_header=False, timeout_graceful_shutdown=int(grace) + 5
            )
        )

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            _log.info("Ask and watch in a browser: %s", self.page)

    @property
    def page(self) -> str:
        """The address of the page that people open, on this machine."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        return f"http://{host}:{port}/"

    async def shutdown(self, sockets: Any = None) -> None:
        closing = asyncio.ensure_future(asyncio.to_thread(self.engine.close, self.grace))
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(self.engine.close, 0)
        for line in await closing:
            print(f"cancelled at shutdown: {line}", file=sys.stderr, flush=True)


class _Door:
    """Asks for the key before anything is read, reads so much and no more, and counts what is answered."""

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None, paths: set[str]) -> None:
        self.app, self.metrics = app, service.metrics
        self.limit, self.seconds = service.limits.body_bytes, service.limits.seconds
        self.api_key, self.paths = api_key, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, read, whole, began = 500, 0, False, time.monotonic()
        scope.setdefault("state", {})["began"] = began

        async def limited() -> Message:
            """Bodies are measured as they come: not all have a Content-Length, and not all come."""
            nonlocal read, whole
            left = None if whole or self.seconds is None else max(0.0, began + self.seconds - time.monotonic())
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body had not come after {self.seconds} seconds") from None
            whole = whole or not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, f"the body is larger than the {self.limit} bytes that this server takes")
            return message

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"] if scope["path"] in self.paths else "other"
        if scope["path"].startswith(openai.ONE_MODEL):
            path = openai.ONE_MODEL + "{model}"
        try:
            await (self._refusal(path, Headers(scope=scope)) or self.app)(scope, limited, seen)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - began)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        if self.api_key is None and (why := _foreign(headers)):
            return error_response(403, f"{why}; start the server with an api_key, which the client sends, to allow that")
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key if scheme.lower() == "bearer" else ""
        known = self.api_key is None or secrets.compare_digest(key.encode(), self.api_key.encode())
        if not known and path not in OPEN:
            message = "expected the API key: Authorization: Bearer KEY"
            return error_response(401, message, {"WWW-Authenticate": "Bearer"})
        return None


def _foreign(headers: Headers) -> str | None:
    """Why a request may be somebody else's page in a browser on this machine: without a key nothing else tells it from the user's own.

    Programs send no ``Origin``. A page whose name was pointed at this machine meanwhile (DNS rebinding) has an origin that is the server's, so
    that the server has to know its own names: addresses, and those of this machine.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return f"the request comes from a page of {origin!r:.80}, not of this server"
    if origin is None and "sec-fetch-site" not in headers and not headers.get("user-agent", "").startswith("Mozilla/"):
        return None  # no browser
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        own = socket.gethostname().lower()
        if name not in ("localhost", own, f"{own}.local") and not name.endswith(".localhost"):
            return f"the browser calls this server {name!r:.80}, which is none of its names"
    return None


async def _refusal(request: Request, error: HTTPException) -> Response:
    return error_response(error.status_code, error.detail, error.headers)


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """400, as OpenAI and vLLM say it; 422 where MetaStone-S1's servers do."""
    # Without what was given: it may hold numbers and characters that JSON cannot.
    found = [{name: e[name] for name in ("type", "loc", "msg")} for e in error.errors()]
    if request.url.path in published.PATHS and "pairs" not in found[0]["loc"]:
        return await request_validation_exception_handler(request, RequestValidationError(found))
    return error_response(400, "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in found[:4]))


async def _failure(request: Request, error: Exception) -> Response:
    return error_response(500, f"{type(error).__name__}: {error}")
