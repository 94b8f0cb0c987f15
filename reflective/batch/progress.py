"""How far a run over a file is: on a terminal a bar, elsewhere a line a minute."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from typing_extensions import Self

EVERY = 60.0  # seconds between two lines where nobody watches


class Tally:
    """Rows and tokens of which somebody else tells.

    Attributes: ``rows`` and ``tokens`` that are done; ``broken``: responses of which nothing came.
    """

    def __init__(self) -> None:
        self.rows = self.tokens = self.broken = 0

    def expect(self, rows: int, tokens: int) -> None:
        """So many were read and are still to do."""

    def advance(self, rows: int, tokens: int, broken: int = 0) -> None:
        """So many are done."""
        self.rows, self.tokens, self.broken = self.rows + rows, self.tokens + tokens, self.broken + broken


class Meter(Tally):
    """Rows done, rates and remaining time, on stderr.

    The time is told from tokens, for rows of different lengths take different times: those of rows not read yet are taken to
    be the mean of the others.

    Args:
        name: of what is done.
        total: rows in all; before: of these, done by earlier processes.
    """

    def __init__(self, name: str, total: int, before: int = 0) -> None:
        super().__init__()
        self.name, self.total, self.before = name, total, before
        self._read_rows = self._read_tokens = 0
        self._console = Console(stderr=True)
        self._watched = self._console.is_interactive and sys.stderr.isatty()  # FORCE_COLOR makes a pipe a terminal
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn(),
            console=self._console, disable=not self._watched, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=None, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        self._began = self._told = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, rows: int, tokens: int) -> None:
        self._read_rows += rows
        self._read_tokens += tokens

    def advance(self, rows: int, tokens: int, broken: int = 0) -> None:
        super().advance(rows, tokens, broken)
        left = self._left()
        self._bar.update(self._task, completed=self.tokens, total=self.tokens + left, text=str(self))
        if not self._watched and time.monotonic() - self._told > EVERY:
            self._told = time.monotonic()
            self.say(str(self))

    def say(self, text: str) -> None:
        self._console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True, markup=False)

    def summary(self) -> str:
        return f"{self.before + self.rows:,} of {self.total:,} rows, {self._rates()}"

    def __str__(self) -> str:
        rate = self.tokens / self._seconds()
        left = timedelta(seconds=round(self._left() / rate)) if rate else "?"
        return f"{self.summary()}, {left} left" + (f", {self.broken:,} broken" if self.broken else "")

    def _rates(self) -> str:
        return f"{self.rows / self._seconds():,.1f} rows/s, {self.tokens / self._seconds():,.0f} tokens/s"

    def _left(self) -> float:
        """Tokens still to do."""
        unread = self.total - self.before - self._read_rows
        return self._read_tokens - self.tokens + unread * self._read_tokens / max(1, self._read_rows)

    def _seconds(self) -> float:
        return max(1e-9, time.monotonic() - self._began)
