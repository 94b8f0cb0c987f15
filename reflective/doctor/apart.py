"""The checks in a process of their own, watched: one that crashes or hangs is told as such, and the next begin in another."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from .checks import REPORT_IT, plan
from .report import Check

PATIENCE = 300.0  # seconds without a word after which a check hangs
# The modules of this process, whatever way they were found: a folder in which Python is started has no say.
_START = "import sys; sys.path[:] = {path!r}; from reflective.doctor.checks import main; main(sys.argv[1])"


def examined(
    quick: bool, begun: Callable[[str, int, int], None] = lambda name, i, n: None, patience: float = PATIENCE
) -> Iterator[Check | dict[str, str]]:
    """Every check in its order, and facts that checks find.

    Args:
        begun: called with the name of a check before it begins, its number and how many there are.
        patience: seconds.
    """
    steps, done = plan(quick), 0
    broken: list[str] = []
    while done < len(steps):
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = _started({"quick": quick, "skip": done, "broken": broken}, errors)
            try:
                for line in _lines(process, patience):
                    if line["check"] is None:
                        begun(line["begin"], done, len(steps))
                        continue
                    check = Check(**line["check"])
                    broken += [line["begin"]] * (check.status == "broken")
                    done += line["took"]
                    if line["facts"]:
                        yield line["facts"]
                    yield check
                hung = False
            except TimeoutError:
                hung = True
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
            if done < len(steps):
                step = steps[done]
                why = f"no answer within {patience:.0f} seconds" if hung else _ended(process.returncode, errors)
                broken.append(step.name)
                done += 1
                yield Check(step.name, "broken", why, step.advice if hung or REPORT_IT in step.advice else f"{step.advice}; {REPORT_IT}")


def _started(settings: dict[str, Any], errors: IO[str]) -> "subprocess.Popen[str]":
    code = _START.format(path=[os.path.abspath(place) if place else os.getcwd() for place in sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(settings)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8",
        env={**os.environ, "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONFAULTHANDLER": "0"},
    )  # fmt: skip


def _lines(process: "subprocess.Popen[str]", patience: float) -> Iterator[dict[str, Any]]:
    """What the process says.

    Raises:
        TimeoutError: it says nothing for so long.
    """
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            said.put(line)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = said.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            process.wait()
            return
        yield json.loads(line)


def _ended(code: int, errors: IO[str]) -> str:
    """How a process came to its end before its time."""
    errors.seek(0)
    last = [line.strip() for line in errors.read().splitlines() if line.strip()][-1:]
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return f"it crashed: {name}" + (" (an instruction that this processor lacks)" if name == "SIGILL" else "")
    return f"its process ended with exit code {code}" + (f": {last[0]}" if last else "")
