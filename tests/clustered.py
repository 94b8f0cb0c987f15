"""Models for replicas, which write down what they are given, die and fail; and a driver to kill.

python clustered.py CHECKPOINT NOTES SOURCE OUTPUT KIND
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path

import reflective as rf
from reflective import batch
from reflective.batch import score

WINDOW, PATIENCE = 4, 120.0  # rows a part; seconds
SETTINGS = {"n": 2, "max_new_tokens": 6, "seed": 3, "together": 2}


class Noting(rf.ReflectiveModel):
    """Notes every call as a file in the folder ``notes``; ``kind`` says what else it does."""

    def __init__(self, model, notes, kind):
        self.__dict__ |= vars(model)
        self.notes, self.kind, self.calls = Path(notes), kind, 0

    def note(self, name):
        """Whether this is the first to note it."""
        try:
            with open(self.notes / name, "x") as file:
                file.write(f"{os.getpid()}")
        except FileExistsError:
            return False
        return True

    def score_tokens(self, prompts, responses, **kwargs):
        self.called(len(responses))
        return super().score_tokens(prompts, responses, **kwargs)

    def generate(self, questions, **settings):
        self.called(len(questions))
        return super().generate(questions, **settings)

    def called(self, items):
        self.calls += 1
        self.note(f"call-{os.getpid()}-{self.calls}-{items}")
        if self.kind == "mortal" and self.calls == 2 and self.note("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "both":
            self.wait(lambda: len({note.name.split("-")[1] for note in self.notes.glob("call-*")}) > 1)
        if self.kind == "waiting" and self.calls == 3 and self.note("waits"):
            time.sleep(PATIENCE)
        if self.kind == "lodger" and not on_second():
            self.wait((self.notes / "waits").exists)
        elif self.kind == "lodger" and self.calls == 2 and self.note("waits"):
            time.sleep(PATIENCE)

    def wait(self, done):
        end = time.monotonic() + PATIENCE
        while not done() and time.monotonic() < end:
            time.sleep(0.05)


def on_second():
    """Whether this is a replica on the machine that the test has added, and kills."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and "second" in node["Resources"] for node in ray.nodes())


def load(checkpoint, notes, kind):
    return Noting(rf.ReflectiveModel.from_pretrained(checkpoint), notes, kind)


def loading(checkpoint, notes, kind="plain"):
    return functools.partial(load, str(checkpoint), str(notes), kind)


if __name__ == "__main__":
    from reflective.batch.cluster import Cluster

    checkpoint, notes, source, output, kind = sys.argv[1:]
    score.WINDOW_ROWS = WINDOW
    import clustered  # what replicas import it as

    batch.score_file(clustered.loading(checkpoint, notes, kind), source, output, batch_tokens=200, run=Cluster())
