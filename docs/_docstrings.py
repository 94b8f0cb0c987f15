"""griffe: docstrings of this project in Markdown. Their tables are drawn with ``===``, and ``::`` announces a block of code."""

import re
from typing import Any

from griffe import Extension, Object

_RULE = re.compile(r"=+( +=+)+")


class Docstrings(Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called with each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """``text`` with its tables as Markdown has them."""
    lines, table, starts = [], None, []
    for line in text.splitlines():
        if _RULE.fullmatch(line.strip()):
            if table is None:
                table, starts = [], [m.start() for m in re.finditer("=+", line)]
            else:
                lines += _table(table)
                table = None
        elif table is None:
            lines.append(re.sub(r"::$", ":", line))
        else:
            cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            if cells[0]:
                table.append(cells)
            elif table:  # goes on from the row above
                table[-1] = [" ".join(part for part in pair if part) for pair in zip(table[-1], cells, strict=True)]
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return ["", "|" + "   |" * len(rows[0]), "|" + "---|" * len(rows[0]), *(f"| {' | '.join(row)} |" for row in escaped), ""]
