"""The report: as a table, as JSON, as a file of CSV, and as a picture."""

import csv
import io
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ..utils.outputs import write_text
from .measures import Row


@dataclass
class Report:
    """Attributes: ``counts``: of each result, see ``Result.counts``; ``rows``: the numbers, result by result."""

    counts: dict[str, dict[str, Any]]
    rows: list[Row]

    def json(self) -> dict[str, Any]:
        """``{"results": counts, "metrics": rows}``; unknown numbers are NaN."""
        return {"results": self.counts, "metrics": [vars(row) for row in self.rows]}

    def write_csv(self, path: str | Path) -> None:
        """Write the rows, a line each, unknown numbers left empty.

        Raises:
            OSError: ``path`` cannot be written, see ``outputs.destination``.
        """
        text = io.StringIO(newline="")
        lines = csv.DictWriter(text, list(Row.__dataclass_fields__))
        lines.writeheader()
        lines.writerows({k: None if _unknown(v) else v for k, v in vars(row).items()} for row in self.rows)
        write_text(path, text.getvalue(), what="csv")

    def table(self) -> Group:
        """For a terminal: what was read, and the numbers with their differences from the first result below them."""
        heads = ("", *map(escape, self.counts))
        read = Table(*heads, box=box.SIMPLE_HEAD)
        for name in next(iter(self.counts.values())):
            read.add_row(name.replace("_", " "), *(_count(counts[name]) for counts in self.counts.values()))
        numbers = Table(*heads, box=box.SIMPLE_HEAD)
        several = len({row.aggregation for row in self.rows} - {None}) > 1
        cells: dict[str, dict[str, str]] = defaultdict(dict)
        for row in self.rows:
            label = f"{row.name} ({row.aggregation})" if several and row.aggregation else row.name
            cells[label][row.result] = _cell(row)
        for label, by_result in cells.items():
            numbers.add_row(label, *(by_result.get(result, "") for result in self.counts))
        return Group(read, numbers)

    def plot(self, path: str | Path) -> None:
        """Draw accuracy against N, with what it tends to, and against tokens decoded, where the files tell them.

        Of several aggregations the first is drawn. A hollow mark stands for fewer questions than others of its line.

        Args:
            path: image file; the suffix decides the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        from .plot import plot_report  # not above: with torch it takes seconds

        plot_report([*self.counts], self.rows, path)


def _unknown(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _count(value: int | bool | str | None) -> str:
    if value is None or isinstance(value, str):
        return escape(value or "")
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:,}"


def _cell(row: Row) -> str:
    text = f"{row.value:.3f}" if row.value <= 1 else f"{row.value:.3g}"
    if not math.isnan(row.low):
        text += f" ({row.low:.3f} – {row.high:.3f})"
    if row.metric == "chosen" and not math.isnan(row.tokens):
        text += f", {row.tokens:,.0f} tokens"
    if row.questions < row.of:
        text += f", {row.questions} questions"
    if row.shared:
        text += f"\n{row.difference:+.3f} ({row.difference_low:+.3f} – {row.difference_high:+.3f})"
    return text
