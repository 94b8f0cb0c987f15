"""What a run over a file has done so far, kept beside its output until that is complete."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import Self

from ..utils.outputs import destination, replacing

WHOLE_ROW = -1
Result = tuple[int, int, dict[str, Any]]  # row number, place within the row (or WHOLE_ROW), what came of it


class Journal:
    """``OUTPUT.unfinished``, an SQLite file: whenever a run is killed, each result is there whole or not at all, and once.

    One process at a time has it open.

    Args:
        output: the file that the run is to make, or a link to it: it lies beside the file, so that runs meet in it by whatever
            name they know that.
        replace: an output that is there, and what a run with other settings has left.

    Raises:
        FileExistsError: the output is there, and is not to be replaced.
        OSError: the directory cannot be written, another process is at work, or the file is none of ours; see ``destination``.

    Attributes:
        name: the output as it was given; output: the file, behind its links.
    """

    def __init__(self, output: Path, replace: bool) -> None:
        self.name, self.output, self.replace = output, destination(output), replace
        self.file = self.output.with_name(self.output.name + ".unfinished")
        self._settings: dict[str, str] = {}
        self._reading: sqlite3.Cursor | None = None
        destination(output, replace or self.file.exists())
        with self._naming():
            self._db = sqlite3.connect(self.file, timeout=0)
            try:
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # until it is closed
                with self._db:
                    self._db.execute("BEGIN EXCLUSIVE")
                    self._db.execute("CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT)")
                    self._db.execute(
                        "CREATE TABLE IF NOT EXISTS results"
                        " (row INTEGER, place INTEGER, result TEXT, PRIMARY KEY (row, place)) WITHOUT ROWID"
                    )
                destination(output, replace or "replaces" in self._stored())
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._naming():
            finished = not self.file.exists()
            empty = finished or not self.count()
            self._close()
        if empty:
            self.file.unlink(missing_ok=True)

    def agree(self, settings: dict[str, Any]) -> None:
        """Go on with the results that are there, if they were made with these settings.

        Raises:
            ValueError: they were not; it names which.
        """
        now = {name: json.dumps(value) for name, value in settings.items()}
        with self._naming(), self._db:
            then = self._stored()
            other = [
                f"{name} was {then[name]}, is {now[name]}" for name in now if then.get(name, now[name]) != now[name]
            ]
            if other and self.count() and not self.replace:
                raise ValueError(
                    f"{self.file} holds the work of another run ({'; '.join(other)}); finish that one with its own command, "
                    "give another --output, or start anew with --overwrite"
                )
            self._settings |= now | ({"replaces": "true"} if self.replace else {})
            if other:
                self._db.execute("DELETE FROM results")
                self._db.execute("DELETE FROM settings")
            self._db.executemany("REPLACE INTO settings VALUES (?, ?)", self._settings.items())

    def setting(self, name: str) -> Any:
        """What the run before had agreed on; None if nothing."""
        with self._naming():
            return json.loads(self._stored().get(name, "null"))

    def count(self) -> int:
        """Rows with a result."""
        return self._db.execute("SELECT count(DISTINCT row) FROM results").fetchone()[0]

    def done(self, first: int, last: int) -> set[tuple[int, int]]:
        """Row and place of the results of rows ``first`` to ``last``."""
        with self._naming():
            found = self._db.execute("SELECT row, place FROM results WHERE row BETWEEN ? AND ?", (first, last))
            return set(found)

    def keep(self, results: Iterable[Result]) -> None:
        """All of them or, if the process is killed meanwhile, none."""
        lines = [(row, place, json.dumps(result, allow_nan=False)) for row, place, result in results]
        with self._naming(), self._db:
            self._db.executemany("INSERT INTO results VALUES (?, ?, ?)", lines)

    def rows(self) -> Iterator[list[tuple[int, int, dict[str, Any]]]]:
        """The results of each row, in order."""
        self._reading = self._db.execute("SELECT row, place, result FROM results ORDER BY row, place")
        for _, results in groupby(self._reading, itemgetter(0)):
            yield [(row, place, json.loads(result)) for row, place, result in results]

    @contextmanager
    def finished(self) -> Iterator[BinaryIO]:
        """A file that becomes the output when it is complete; then the journal goes. Where that fails, the journal stays."""
        with self._naming(), self._comforting():
            with replacing(self.output) as file:
                yield file
                with self._db:  # killed before the journal is gone, the run may replace what it has made itself
                    self._db.execute("REPLACE INTO settings VALUES ('replaces', 'true')")
            self._close()
        self.file.unlink()

    def _close(self) -> None:
        if self._reading is not None:  # which an error that is looked at keeps, and with it the lock
            self._reading.close()
            self._reading = None
        self._db.close()

    def _stored(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT name, value FROM settings"))

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise OSError(f"{self.file}: another process is at work on this output; wait for it") from error
            with self._comforting():
                raise OSError(f"{self.file} cannot be written: {error}") from error

    @contextmanager
    def _comforting(self) -> Iterator[None]:
        """Say of an error of the disk that what was done is kept, where something is."""
        try:
            yield
        except OSError as error:
            if not self._kept():
                raise
            raise type(error)(
                f"{error}; what is done is kept in {self.file}, and the same command goes on there"
            ) from error

    def _kept(self) -> bool:
        try:
            return bool(self.count())
        except (sqlite3.Error, AttributeError):  # closed, broken or never opened
            return False
