"""A server for tests, in a thread."""

import contextlib
import threading
import time
from types import SimpleNamespace

import httpx
import tiny

from reflective.serve.app import Server, create_app
from reflective.serve.engine import Engine


@contextlib.contextmanager
def live(model, *, batch_rows=8, max_queue=64, **settings):
    """A server in a thread, on a port of its own."""
    engine = Engine(model, batch_rows=batch_rows, max_queue=max_queue)
    server = Server(create_app(engine, name="tiny", **settings), "127.0.0.1", 0, grace=5, log_level="error")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=tiny.PATIENCE) as http:
        yield SimpleNamespace(url=url, http=http, engine=engine, model=model)
    server.should_exit = True
    thread.join()


def until(condition):
    deadline = time.monotonic() + tiny.PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
