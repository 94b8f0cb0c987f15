"""What users have written: whole, through links, into regular files alone; and JSON that every reader takes."""

import contextlib
import json
import math
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import tiny
import torch
from forked import error_of

from reflective.plot import draw, image, pyplot
from reflective.search.strategies.prune import Prune
from reflective.train.checkpoint import Checkpoint
from reflective.train.data import Rollouts
from reflective.utils import outputs

posix = pytest.mark.skipif(os.name != "posix", reason="needs the files of Unix")


def rollouts():
    one = torch.ones(1, dtype=torch.int64)
    return Rollouts(torch.ones(2, dtype=torch.int32), 2 * one, 1 * one, 0 * one, one.float(), -one, 3 * one)


def figure(path):
    fig, ax = pyplot().subplots(figsize=(1, 1))
    ax.plot([0, 1])
    draw(fig, path, dpi=10)


WRITERS = {
    "text": (lambda path: outputs.write_text(path, "new"), "out.txt"),
    "head": (lambda path: tiny.head().save_pretrained(path), "head.safetensors"),
    "pickled head": (lambda path: tiny.head().save_pretrained(path), "head.pt"),
    "picture": (figure, "out.png"),
    "rule": (lambda path: Prune(threshold=1.0).save(path), "prune.json"),
    "rollouts": (lambda path: rollouts().save(path), "rollouts.safetensors"),
    "state": (lambda path: Checkpoint(path.parent, {}).save({}), "training_state.pt"),
}
by_writer = pytest.mark.parametrize(("write", "name"), WRITERS.values(), ids=WRITERS)


@posix
@by_writer
def test_what_is_a_link_is_written_through(write, name, tmp_path):
    place = tmp_path / "elsewhere" / name
    place.parent.mkdir()
    write(place)
    whole = place.read_bytes()
    (tmp_path / "between").symlink_to(place)
    link = tmp_path / name
    link.symlink_to(tmp_path / "between")
    for old in ("old", None):  # a link to a link to a file, then a dangling one
        if old is None:
            place.unlink()
        else:
            place.write_text(old)
            place.chmod(0o640)
        inode = place.stat().st_ino if old else None
        write(link)
        assert link.is_symlink() and (tmp_path / "between").is_symlink() and not place.is_symlink()
        assert len(place.read_bytes()) == len(whole)
        if old:
            assert place.stat().st_ino != inode and stat.S_IMODE(place.stat().st_mode) == 0o640  # replaced as a whole
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["between", "elsewhere", name, name])


@posix
@by_writer
def test_what_is_no_regular_file_is_refused_and_left_alone(write, name, tmp_path):
    with contextlib.ExitStack() as stack:
        for kind, make in (
            ("a directory", os.mkdir), ("a pipe", os.mkfifo), ("a device", lambda path: os.symlink("/dev/null", path)),
            ("a device", lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))),
            ("a socket", lambda path: stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))),
        ):  # fmt: skip
            path = tmp_path / name
            try:
                make(path)
            except PermissionError:
                continue  # a node of its own needs root; the link to /dev/null stands for it
            if name == "prune.json" and kind == "a directory":
                path.rmdir()  # that is a place for the rule
                continue
            before = os.lstat(path)
            for given in (path, tmp_path / f"link{path.suffix}"):
                if given != path:
                    given.symlink_to(path)
                if name == "training_state.pt" and given != path:
                    given.unlink()
                    continue
                with pytest.raises(OSError, match=rf"is {kind}; give the name of a file") as refused:
                    write(given)
                assert "--overwrite" not in str(refused.value)
                if given != path:
                    given.unlink()
            after = os.lstat(path)
            assert (after.st_mode, after.st_ino, after.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
            path.rmdir() if kind == "a directory" else path.unlink()
    assert not list(tmp_path.iterdir())


@posix
def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "lost").symlink_to(tmp_path / "none" / "out.txt")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("lost", r"lost, a link to .*none/out\.txt, cannot be written: there is no folder .*none"),
        ("ring", "ring cannot be written: Too many levels of symbolic links"),
        ("file/out.txt", r"file/out\.txt cannot be written: Not a directory"),
        ("n" * 300, "cannot be written: File name too long"),
    ):
        with pytest.raises(OSError, match=message), outputs.replacing(tmp_path / name):
            pass
    with pytest.raises(FileExistsError, match="file is there already; give another, or replace it with --overwrite"):
        outputs.destination(tmp_path / "file", replace=False)
    with open(tmp_path / "open", "wb") as file:
        (tmp_path / "open").unlink()
        if Path(f"/dev/fd/{file.fileno()}").exists():
            with pytest.raises(OSError, match="is an open file without a name"):
                outputs.destination(f"/dev/fd/{file.fileno()}")


def as_nobody(do):
    """What error ``do`` ends with, in a process of a user that may not write everywhere, as root may."""

    def without_rights():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        do()

    return error_of(without_rights)


@posix
def test_a_folder_that_is_read_only():
    with tempfile.TemporaryDirectory() as name:  # which others may enter, as those of pytest not
        place = Path(name)
        for folder in ("closed", "open"):
            (place / folder).mkdir()
        (place / "closed" / "old.txt").write_text("old")
        (place / "closed" / "link.txt").symlink_to(place / "open" / "new.txt")
        (place / "open" / "link.txt").symlink_to(place / "closed" / "old.txt")
        place.chmod(0o755)
        (place / "closed").chmod(0o555)
        (place / "open").chmod(0o777)
        try:
            for path in ("closed/out.txt", "closed/old.txt", "open/link.txt"):
                said = as_nobody(lambda path=path: outputs.write_text(place / path, "new"))
                assert said.startswith("PermissionError: output: "), said
                assert said.endswith(f"cannot be written: the folder {place}/closed is read-only"), said
            assert (
                as_nobody(lambda: outputs.write_text(place / "closed" / "link.txt", "new")) == ""
            )  # it leads elsewhere
            assert as_nobody(lambda: outputs.folder(place / "closed")).endswith("closed is read-only; give another")
            assert as_nobody(lambda: outputs.folder(place / "closed" / "new")).endswith("be made: Permission denied")
        finally:
            (place / "closed").chmod(0o755)
        assert (place / "open" / "new.txt").read_text() == "new" and (place / "closed" / "old.txt").read_text() == "old"
        assert sorted(p.name for p in place.rglob("*.txt")) == ["link.txt", "link.txt", "new.txt", "old.txt"]


def test_directories(tmp_path):
    (tmp_path / "file").write_text("x")
    assert outputs.folder(tmp_path / "a" / "b") == (tmp_path / "a" / "b").resolve()
    for name in ("file", "file/below"):
        with pytest.raises(
            NotADirectoryError, match=f"out: .*{name} is no directory, or lies in none; give a directory"
        ):
            outputs.folder(tmp_path / name, "out")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert outputs.folder(tmp_path / "link").is_dir() and (tmp_path / "link").is_symlink()
    with pytest.raises(NotADirectoryError, match="file is no directory"):
        tiny.head().save_pretrained(tmp_path / "file" / "head.pt")
    with pytest.raises(NotADirectoryError, match="file is no directory"):
        Checkpoint(tmp_path / "file", {}).save({})


def test_what_does_not_get_complete_is_gone_and_what_was_there_stays(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), outputs.replacing(path) as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.txt"]
    with pytest.raises(ZeroDivisionError), outputs.replacing(path, keep=True) as file:
        file.write(b"some")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and outputs.partial(path).read_text() == "some"
    path.unlink()
    with (
        pytest.raises(FileExistsError, match=r"out\.txt\.partial holds what an unfinished run"),
        outputs.replacing(path, False, keep=True),
    ):
        pass
    with outputs.replacing(path, True, keep=True) as file:
        file.write(b"all")
    assert path.read_text() == "all" and [p.name for p in tmp_path.iterdir()] == ["out.txt"]


@posix
def test_two_at_one_output(tmp_path):
    """By the same name or another; who comes second is refused, and the first is not disturbed."""
    path, link = tmp_path / "out.txt", tmp_path / "link.txt"
    link.symlink_to(path)
    code = "import sys; from reflective.utils import outputs; outputs.write_text(sys.argv[1], 'second')"
    with outputs.replacing(path) as file:
        file.write(b"first")
        for other in (path, link):
            with pytest.raises(OSError, match="another process is at work on this output; wait for it"):
                outputs.write_text(other, "second")
        done = subprocess.run([sys.executable, "-c", code, link], capture_output=True, text=True, check=False)
        assert "another process is at work on this output" in done.stderr
    assert path.read_text() == "first"
    path.write_text("a")
    wrong = []

    def often(text):
        for _ in range(200):
            with contextlib.suppress(BlockingIOError):
                outputs.write_text(path, text)
            if len(set(path.read_text())) != 1:
                wrong.append(path.read_text())

    threads = [threading.Thread(target=often, args=(letter * 5000,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sorted(p.name for p in tmp_path.iterdir()) == ["link.txt", "out.txt"]


@posix
@by_writer
def test_a_full_disk_is_told_by_name_and_leaves_what_was_there(write, name, tmp_path):
    """As a limit of the size of files, of which Python is told by the same kind of error."""
    path = tmp_path / name
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        with pytest.raises(OSError, match=rf"{name} cannot be written: .*File too large"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [name]


def test_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"plot: .*x\.txt: \.txt is no format of pictures; give one of .*png"):
        image(tmp_path / "x.txt")
    figure(tmp_path / "x")
    figure(tmp_path / "y.PDF")
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG" and (tmp_path / "y.PDF").read_bytes()[:4] == b"%PDF"


def refuse(name):
    raise ValueError(name)


def test_json_has_null_for_numbers_that_it_has_not(tmp_path):
    value = {
        "a": math.inf,
        "b": [-math.inf, (math.nan, 1.5)],
        "c": {"d": {"e": [float("1e999")]}},
        "f": True,
        "g": 2**70,
    }
    text = outputs.json_text(value)
    assert json.loads(text, parse_constant=refuse) == {
        "a": None, "b": [None, [None, 1.5]], "c": {"d": {"e": [None]}}, "f": True, "g": 2**70
    }  # fmt: skip
    assert math.isinf(value["a"])
    with pytest.raises(ValueError, match="threshold=inf"):
        Prune(threshold=math.inf).save(tmp_path)
    Prune(threshold=0.5).save(tmp_path)
    assert Prune.load(tmp_path).threshold == 0.5
