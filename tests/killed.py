"""Batch work in processes that are killed: SIGKILL after so many lines of its modules and of those that write, at every part of a run.

    python killed.py CHECKPOINT score|generate SOURCE OUTPUT POINTS

Prints JSON: the number of lines of a whole run, and where it was killed. Whatever the point, the command started again gives the
output of a run that nobody killed, byte for byte, and until then there is no output or a whole one.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

import reflective as rf
from reflective import batch
from reflective.utils import outputs, records

HOME = str(Path(batch.__file__).parent), outputs.__file__, records.__file__
LAST = 16  # lines at the end, of which each is a point


def work(model, kind, source, output):
    """Small batches, several of them in the only window."""
    given = {"load": lambda: model, "source": source, "output": output, "report": lambda text: None}
    if kind == "score":
        return batch.score_file(**given, batch_tokens=200)
    return batch.generate_file(**given, n=2, max_new_tokens=6, seed=3, together=2)


def child(run, limit):
    """Lines that ``run`` had in a process of its own, or None as it was killed at the ``limit``th."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if not frame.f_code.co_filename.startswith(HOME):
                return None
            if event == "line":
                lines += 1
                if lines == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        run()
        sys.settrace(None)
        os.write(writer, str(lines).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with open(reader) as told:
        found = told.read()
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0, f"killed at {limit}, status {status}"
    return int(found)


def main(checkpoint, kind, source, output, points):
    torch.set_num_threads(1)
    model = rf.ReflectiveModel.from_pretrained(checkpoint)
    run, output, journal = partial(work, model, kind, source, output), Path(output), Path(output + ".unfinished")
    total = child(run, 0)
    expected = output.read_bytes()
    output.unlink()
    killed = sorted({*range(1, total, max(1, total // int(points))), *range(max(1, total - LAST), total + 1)})
    for limit in killed:
        assert child(run, limit) is None, limit
        assert not output.exists() or output.read_bytes() == expected, limit
        if not output.exists() or journal.exists():
            child(run, 0)
        assert output.read_bytes() == expected, limit
        left = sorted(file.name for file in output.parent.iterdir() if file.name.startswith(output.name))
        assert left == [output.name], (limit, left)
        output.unlink()
    limit, times = total // 4, 0
    while child(run, limit) is None and not output.exists():  # each time somewhat further
        limit, times = limit + total // 10, times + 1
    assert times > 1 and output.read_bytes() == expected
    print(json.dumps({"lines": total, "killed": killed, "in a row": times}))


if __name__ == "__main__":
    main(*sys.argv[1:])
