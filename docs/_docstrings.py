"""griffe: docstrings of this project in Markdown. Their tables are drawn with ``===``, and ``::`` announces a block of code."""

import re
from typing import Any

from griffe import Extension, Object

_RULE = re.compile(r"=+( +=+)+")
_FENCE = "```python"


class Docstrings(Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called with each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """``text`` with its tables as Markdown has them."""
    lines, table, starts, code = [], None, [], False
    for line in text.splitlines():
        indented = line.startswith("    ")
        if code and (indented or not line):  # what follows ``::``, without the blank line before it
            lines += [line[4:]] if indented or lines[-1] != _FENCE else []
            continue
        if code:
            lines[-1:] = ["```", ""]  # for the blank line after it
            code = False
        if _RULE.fullmatch(line.strip()):
            if table is None:
                table, starts = [], [m.start() for m in re.finditer("=+", line)]
            else:
                lines += _table(table)
                table = None
        elif table is not None:
            cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            if cells[0]:
                table.append(cells)
            elif table:  # goes on from the row above
                table[-1] = [" ".join(part for part in pair if part) for pair in zip(table[-1], cells, strict=True)]
        elif line.endswith("::"):
            lines += [*([f"{line[:-1]}", ""] if line != "::" else []), _FENCE]
            code = True
        else:
            lines.append(line)
    return "\n".join([*lines, "```"] if code else lines)


def _table(rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return ["", "|" + "   |" * len(rows[0]), "|" + "---|" * len(rows[0]), *(f"| {' | '.join(row)} |" for row in escaped), ""]
