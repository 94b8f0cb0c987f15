"""What users have written: whole or not at all, through links, into regular files alone; and JSON that every reader takes.

No torch here: a name that cannot be written is to fail before anything is loaded.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def destination(output: str | Path, replace: bool = True, what: str = "output") -> Path:
    """The file that is to be written: ``output``, or what it is a link to, which need not be there yet.

    Args:
        replace: what is there already.
        what: the argument's name, for errors.

    Raises:
        OSError: it is there and not to be replaced; no regular file; a link that leads nowhere; no folder that can be written.
    """
    output = Path(output)
    try:
        found = os.stat(output)
    except FileNotFoundError:
        found = None
    except OSError as error:  # a ring of links, a file in place of a folder, a name too long
        raise type(error)(f"{what}: {output} cannot be written: {error.strerror}") from error
    place = Path(os.path.realpath(output))
    told = f"{output}, a link to {place}," if output.is_symlink() else str(output)
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        refused = IsADirectoryError if stat.S_ISDIR(found.st_mode) else OSError
        raise refused(f"{what}: {told} is {kind}; give the name of a file")
    if found is not None and not place.exists():
        # As /dev/stdout may be.
        raise OSError(f"{what}: {output} is an open file without a name; give the name of a file")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{what}: {told} cannot be written: there is no folder {place.parent}")
    if not _writable(place.parent):
        raise PermissionError(f"{what}: {told} cannot be written: the folder {place.parent} is read-only")
    if found is not None and not replace:
        raise FileExistsError(f"{what}: {output} is there already; give another, or replace it with --overwrite")
    return place


def folder(output: str | Path, what: str = "output") -> Path:
    """``output`` or what it is a link to, made if need be, for files to be written into.

    Raises:
        OSError: it is no directory, cannot be made, or is read-only.
    """
    place = Path(os.path.realpath(output))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{what}: {output} is no directory, or lies in none; give a directory") from error
    except OSError as error:
        raise type(error)(f"{what}: the directory {output} cannot be made: {error.strerror}") from error
    if not _writable(place):
        raise PermissionError(f"{what}: the directory {output} is read-only; give another")
    return place


@contextmanager
def replacing(
    output: str | Path, replace: bool = True, *, what: str = "output", keep: bool = False
) -> Iterator[BinaryIO]:
    """A file that takes the place of ``destination(output)`` when it is complete, with the permissions of what was there.

    Until then it is ``partial(output)``, which one process at a time has. Where it does not get so far, nothing of it is left.

    Args:
        replace, what: as for ``destination``.
        keep: what was written stays in ``partial(output)`` where it does not get so far. What an earlier process has left so
            is replaced only with ``replace``.

    Raises:
        OSError: it cannot be written, another process is at work on it, or the disk is full, by name.
    """
    place, unfinished = destination(output, replace, what), partial(output)
    try:
        file = _alone(unfinished)
    except OSError as error:
        raise type(error)(f"{what}: {place} cannot be written: {error.strerror or error}") from error
    if keep and not replace and os.path.getsize(unfinished):
        file.close()
        raise FileExistsError(
            f"{what}: {unfinished} holds what an unfinished run has written; move it away, or start anew with --overwrite"
        )
    try:
        file.truncate()
        if place.exists():
            os.chmod(unfinished, stat.S_IMODE(os.stat(place).st_mode))
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.chmod(unfinished, mode)  # safetensors puts a file of its own in the place of this one
        if fcntl is None:  # Windows moves no open file
            file.close()
        os.replace(unfinished, place)
    except BaseException as error:
        cause = error
        try:
            file.flush()
        except OSError as late:  # what torch.save makes of a full disk does not tell of it
            cause = late
        except ValueError:
            pass  # it is closed
        if not keep or not os.path.getsize(unfinished):
            unfinished.unlink(missing_ok=True)
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise _renamed(cause, f"{what}: {place} cannot be written: {cause.strerror}") from error
        raise
    finally:
        with suppress(OSError):
            file.close()


def write_text(output: str | Path, text: str, what: str = "output") -> None:
    """``text`` in UTF-8 as the whole of ``output``, line ends as they are: the same bytes on every system."""
    with replacing(output, what=what) as file:
        file.write(text.encode())


def partial(output: str | Path) -> Path:
    """Where ``replacing`` has what is not complete."""
    place = Path(os.path.realpath(output))
    return place.with_name(place.name + ".partial")


def _writable(place: Path) -> bool:
    return os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _renamed(error: OSError, message: str) -> OSError:
    told = type(error)(message)
    told.errno = error.errno
    return told


def _alone(place: Path) -> BinaryIO:
    """``place``, opened for this process alone as far as the file system has locks.

    Raises:
        OSError: another process has it.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        file = os.fdopen(os.open(place, flags, 0o666), "r+b")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(place)):
                return file
        except BlockingIOError:
            file.close()
            raise BlockingIOError("another process is at work on this output; wait for it") from None
        except FileNotFoundError:
            pass  # who had it was done with it between our opening and our locking: open what is there now
        except OSError:
            return file  # a file system without locks
        file.close()


# -- JSON --------------------------------------------------------------------------------------------------------------


def json_text(value: Any, **how: Any) -> str:
    """``value`` as JSON. There is no NaN and no infinity in JSON, so null stands in their place, here and wherever this package
    writes JSON.

    Args:
        how: as for ``json.dumps``.
    """
    return json.dumps(finite(value), allow_nan=False, **how)


def finite(value: Any) -> Any:
    """``value`` with None for every float in it that is NaN or infinite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
