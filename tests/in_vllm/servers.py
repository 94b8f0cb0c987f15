"""vLLM's own server in a process of its own, on loopback."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def arguments(settings):
    """Of the command line, for keywords of ``vllm.LLM``."""
    for name, value in settings.items():
        yield "--" + name.replace("_", "-")
        if value is not True:
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def registered(folder: Path) -> list[str]:
    """Folders for ``PYTHONPATH``: this checkout, and where it is not installed with its entry points, a stand-in that says the same of them."""
    if "reflective" in entry_points(group="vllm.endpoint_plugins").names:
        return [str(ROOT)]
    said = re.findall(
        r'(?m)^\[project\.entry-points\."(vllm\.\w+)"\]\n(.+) = "(.+)"', (ROOT / "pyproject.toml").read_text()
    )
    place = folder / "reflective_kernels-0.dist-info"
    place.mkdir(exist_ok=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: reflective-kernels\nVersion: 0\n")
    (place / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {value}\n" for group, name, value in said))
    return [str(folder), str(ROOT)]


@contextmanager
def server(settings, folder: Path, plugins="reflective"):
    """The URL of a server that is ready; ``settings``: as for ``vllm.LLM``; ``plugins``: ``VLLM_PLUGINS``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    more = {"served_model_name": "tiny", "host": "127.0.0.1", "port": port, "chat_template": template}
    path = os.pathsep.join([*registered(folder), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"VLLM_PLUGINS": plugins, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(settings | more)]
    with (
        open(folder / f"server.{port}.log", "w+") as log,
        subprocess.Popen(command, env=env, stdout=log, stderr=log) as p,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            while not _answers(url):
                if p.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server ended: {log.read()[-4000:]}")
                time.sleep(0.2)
            yield url
        finally:
            p.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def stats(url: str) -> dict[str, float]:
    """Of the scorer in the worker."""
    return httpx.post(url + "/collective_rpc", json={"method": "reflective_stats"}, timeout=60).json()["results"][0]


def empty(url: str) -> dict[str, float]:
    """``stats``, when nothing is left of any request, or after 30 s: what vLLM aborts takes a step or two."""
    until = time.monotonic() + 30
    while (found := stats(url))["rows"] + found["kept"] and time.monotonic() < until:
        time.sleep(0.1)
    return found
