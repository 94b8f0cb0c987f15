"""Batch work over a Ray cluster: the local command's bytes, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

import clustered
import tiny
from clustered import PATIENCE, SETTINGS, WINDOW, loading
from ray.cluster_utils import Cluster as Machines
from test_batch import Watched, read, rows, write
from test_model import byte_tokenizer, small  # noqa: F401 (a fixture)
from typer.testing import CliRunner

import reflective as rf
from reflective import batch
from reflective.batch import score
from reflective.batch.cluster import Cluster
from reflective.cli import app

PATH = os.pathsep.join(
    [*map(str, (Path(__file__).parent, Path(rf.__path__[0]).parent)), os.environ.get("PYTHONPATH", "")]
)
LIMIT = 300  # seconds after which a test hangs


@pytest.fixture(autouse=True)
def limited():
    def stop(*_):
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def machines():
    """A cluster of two machines, of which this process is a driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        yield from clustered_machines()


def clustered_machines():
    found = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.second = found.add_node(num_cpus=1, resources={"second": 1})
    ray.init(found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):  # noqa: F811
    small.save_pretrained(folder := tmp_path_factory.mktemp("checkpoint"))
    return folder


@pytest.fixture
def files(checkpoint, tmp_path, monkeypatch):
    """A file with a broken row in it, and where replicas write notes."""
    monkeypatch.setattr(score, "WINDOW_ROWS", WINDOW)
    (tmp_path / "notes").mkdir()
    records = rows(24)
    records.insert(3, {"nothing": "here"})
    records.insert(9, {"prompt": "Q: 1\n", "responses": ["nabe", "", "code"]})
    return write(tmp_path / "in.jsonl", records), tmp_path / "notes"


def scored(load, source, output, **settings):
    told = []
    batch.score_file(load, source, output, batch_tokens=200, report=told.append, **settings)
    return told


def local(checkpoint, source, notes, name="whole.jsonl"):
    """What the local command makes of it: its bytes, and what it tells."""
    output = source.with_name(name)
    told = scored(loading(checkpoint, notes), source, output)
    for note in notes.iterdir():
        note.unlink()
    return output.read_bytes(), told


def calls(notes):
    """Calls of each process."""
    found = {}
    for note in notes.glob("call-*"):
        found.setdefault(int(note.name.split("-")[1]), []).append(note)
    return found


def until(done, what):
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.parametrize("wanted", ["out.parquet", "out.jsonl.gz"])
def test_scores_have_the_bytes_of_a_local_run(machines, checkpoint, files, wanted):
    source, notes = files
    if wanted == "out.jsonl.gz":
        source = write(source.with_suffix(".parquet"), rows(24))
    expected, told = local(checkpoint, source, notes, f"whole.{wanted}")
    output = source.with_name(wanted)
    assert scored(loading(checkpoint, notes, "both"), source, output, run=Cluster("local", 2)) == told
    assert output.read_bytes() == expected
    assert len(calls(notes)) == 2
    assert sorted(p.name for p in source.parent.glob("*out*")) == sorted([f"whole.{wanted}", wanted])


def test_answers_have_the_bytes_of_a_local_run(machines, checkpoint, tmp_path):
    (notes := tmp_path / "notes").mkdir()
    source = write(tmp_path / "in.jsonl", [{"question": f"{i}?"} for i in range(9)] + [{"nothing": "here"}])
    for name, where in (("whole.parquet", {}), ("out.parquet", {"run": Cluster("local", 2)})):
        told = []
        batch.generate_file(
            loading(checkpoint, notes), source, tmp_path / name, report=told.append, **SETTINGS, **where
        )
        assert [line.split(":")[0] for line in told] == ["line 10"]
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert len(read(tmp_path / "out.parquet")) == 10


def test_a_replica_that_is_killed(machines, checkpoint, files, capsys):
    source, notes = files
    expected, told = local(checkpoint, source, notes)
    output = source.with_name("out.jsonl")
    assert scored(loading(checkpoint, notes, "mortal"), source, output, run=Cluster("local", 2)) == told
    assert output.read_bytes() == expected
    dead = int((notes / "died").read_text())
    assert len(calls(notes)[dead]) == 2 and len(calls(notes)) > 2, "another was started"
    assert "rows were lost with replicas that died, and are begun again" in capsys.readouterr().err


def test_a_part_that_kills_every_replica_ends_the_run(machines, checkpoint, files):
    source, notes = files
    output = source.with_name("out.jsonl")
    write(source, rows(2))
    with pytest.raises(
        OSError, match=r"2 rows could not be done, their replicas died 3 times in a row.*; what is done is kept"
    ):
        scored(loading(checkpoint, notes, "deadly"), source, output, run=Cluster("local", 1))
    assert not output.exists()


def test_a_machine_that_is_killed(machines, checkpoint, files):
    source, notes = files
    expected, told = local(checkpoint, source, notes)
    output = source.with_name("out.jsonl")

    def kill():
        until((notes / "waits").exists, "no replica on the second machine")
        machines.remove_node(machines.second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert scored(loading(checkpoint, notes, "lodger"), source, output, run=Cluster("local", 2)) == told
    finally:
        killer.join()
        machines.second = machines.add_node(num_cpus=1, resources={"second": 1})
    assert output.read_bytes() == expected
    assert int((notes / "waits").read_text()) in calls(notes)


def test_goes_on_with_what_a_local_run_has_left(machines, small, checkpoint, files):  # noqa: F811
    source, notes = files
    expected, told = local(checkpoint, source, notes)
    output = source.with_name("out.jsonl")
    first = Watched(small, calls=4)
    with pytest.raises(KeyboardInterrupt):
        scored(lambda: first, source, output)
    assert scored(loading(checkpoint, notes), source, output, run=Cluster("local", 2)) == told
    assert output.read_bytes() == expected
    done = sum(int(note.name.split("-")[3]) for notes in calls(notes).values() for note in notes)
    assert sum(map(len, first.given)) + done == 32, "nothing was scored twice"
    head = tiny.head(seed=1)
    with pytest.raises(KeyboardInterrupt):
        changed = rf.ReflectiveModel(small.model, small.tokenizer, head, small.config)
        stopped = Watched(changed, calls=2)
        scored(lambda: stopped, source, source.with_name("other.jsonl"))
    with pytest.raises(ValueError, match=r"other.jsonl.unfinished holds the work of another run \(model was"):
        scored(loading(checkpoint, notes), source, source.with_name("other.jsonl"), run=Cluster("local", 1))


def test_what_fails_locally_fails_by_the_same_name(machines, checkpoint, files):
    source, notes = files
    output = source.with_name("out.jsonl")
    with pytest.raises(OSError, match="nowhere"):
        scored(loading("nowhere/at/all", notes), source, output, run=Cluster("local", 1))
    questions = write(source.with_name("q.jsonl"), [{"question": "a?"}])
    with pytest.raises(ValueError, match="top_p"):
        batch.generate_file(loading(checkpoint, notes), questions, output, top_p=2.0, run=Cluster("local", 1))
    source.write_text("")
    assert scored(loading(checkpoint, notes), source, output, run=Cluster("local", 1)) == [] and not output.read_bytes()


# -- drivers of their own -----------------------------------------------------------------------------------------------


class Driver:
    """A process, and those that it has started, which are told by a variable of their environment."""

    def __init__(self, *command, folder):
        self.mark, self.told = f"REFLECTIVE_TEST={uuid.uuid4()}", folder / "stderr"
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=folder, start_new_session=True,
            env={**os.environ, "PYTHONPATH": PATH, "RAY_ADDRESS": "", name: value}, stderr=self.told.open("wb"),
        )  # fmt: skip

    def end(self):
        """Its exit code, when no process is left."""
        code = self.process.wait(PATIENCE)
        until(lambda: not self.left(), "its cluster is still there")
        return code

    def left(self):
        return [process for process in Path("/proc").glob("[0-9]*") if self.mark in alive(process)]


def alive(process):
    """The environment of a process of ``/proc``; empty of one that ended."""
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        return "" if state == "Z" else (process / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_driver_that_is_killed(small, checkpoint, files):  # noqa: F811
    """Its cluster ends with it; the local command goes on with what it has left."""
    source, notes = files
    expected, told = local(checkpoint, source, notes)
    output = source.with_name("out.jsonl")
    driver = Driver(clustered.__file__, checkpoint, notes, source, output, "waiting", folder=source.parent)
    until((notes / "waits").exists, "no replica at work")
    journal = source.with_name("out.jsonl.unfinished")
    until(lambda: b'"step_scores"' in journal.read_bytes(), "no part came back")
    assert not output.exists()
    driver.process.kill()
    assert driver.process.wait(PATIENCE) == -signal.SIGKILL
    ((replica, before),) = calls(notes).items()
    until(lambda: not alive(Path(f"/proc/{replica}")), "its replica is still there")
    assert len(before) == 3 and not output.exists() and journal.exists()
    rest = Watched(small)
    assert scored(lambda: rest, source, output) == told
    assert output.read_bytes() == expected
    assert 0 < sum(map(len, rest.given)) < 32, "what had been done was not done again"


@linux
def test_the_command_starts_a_cluster_and_ends_it(checkpoint, files):
    source, _ = files
    output = source.with_name("out.jsonl")
    command = "-m", "reflective", "score", "--model", os.path.relpath(checkpoint, source.parent), "--batch-tokens", 200
    driver = Driver(*command, "--ray", source.name, "-o", output, folder=source.parent)
    assert driver.end() == 1
    told = driver.told.read_text()
    assert "1 replica(s) of the model on a cluster of 1 machine(s)" in told and "line 4: expected text" in told
    here = CliRunner().invoke(
        app,
        [
            *map(str, command[2:4]),
            str(checkpoint),
            "--batch-tokens",
            "200",
            str(source),
            "-o",
            str(output.with_name("w.jsonl")),
        ],
    )
    assert here.exit_code == 1 and output.read_bytes() == output.with_name("w.jsonl").read_bytes()
    output.unlink()
    driver = Driver(*command, source.name, "-o", output, "--ray", folder=source.parent)
    until(lambda: b"replica(s)" in driver.told.read_bytes(), "it does not begin")
    driver.process.send_signal(signal.SIGINT)
    assert driver.end() == 130 and not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "--ray", "--text", "x"], "--ray works from a file to a file"),
        (["score", "--ray"], "--ray works from a file to a file"),
        (["score", "in.jsonl", "--ray"], "--ray works from a file to a file"),
        (["generate", "--ray", "local", "why?"], "--ray works from a file to a file"),
        (["score", "in.jsonl", "-o", "out.jsonl", "--replicas", "2"], "--replicas is for --ray"),
        (["score", "--ray", "ray://head:10001", "in.jsonl", "-o", "out.jsonl"], "HOST:PORT"),
        (["score", "--ray=head", "in.jsonl", "-o", "out.jsonl"], "expected HOST:PORT, auto or local, found 'head'"),
        (["score", "in.jsonl", "-o", "out.jsonl", "--ray", "127.0.0.1:9"], "no cluster at '127.0.0.1:9'"),
    ],
)
def test_arguments_that_are_refused(tmp_path, monkeypatch, arguments, said):
    ray.shutdown()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    found = CliRunner().invoke(app, arguments)
    assert said in str(found.exception), found
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_without_ray(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "a"}) + "\n")
    code = "import sys; sys.modules['ray'] = None; from reflective.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "score", "--ray", str(source), "-o", str(tmp_path / "out.jsonl")],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert found.returncode == 2 and "--ray needs Ray: pip install 'reflective-kernels[ray]'" in found.stderr
