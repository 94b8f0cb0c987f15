"""Figures in README.md and docs/: each has a mark that says from which file it comes, and can be written anew from there.

Behind a number stands an HTML comment, which no rendered page shows::

    27.3<!--= best_of_n[way=published].score_s | .1f --> s
    597<!--= best_of_n[way=published].score_s / best_of_n[way=reflective].score_s | .0f --> times

Before ``|`` stands arithmetic on cells, ``FILE[COLUMN=VALUE, ...].COLUMN`` of ``benchmarks/results/FILE.csv``, where exactly one row has these values; ``embedded[METRIC].value``
is of the embedded head's report. Behind it stands how the number is written, as for ``format``.

What looks like a measurement and has no mark is told (``unmarked``), unless ``unmeasured.csv`` says, page by page, why it is none.
"""

import ast
import csv
import difflib
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from reflective.benchmarks.record import RESULTS, read

HERE = Path(__file__).parent
ROOT = HERE.parent
ALLOWED = HERE / "unmeasured.csv"
_HEAD = ROOT / "reflective" / "data" / "smollm2-135m-instruct" / "report.json"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_NUMBER = re.compile(r"([^\s(|*]*)<!--= ([^|>]*?) \| ([^ >]+) -->")
_CELL = re.compile(r"([a-z]\w*)\[([^\]]*)\]\.(\w+)")
_MARK = "\u2713"  # stands for what is marked, where numbers without a mark are looked for
_UNITS = (
    r"%|‰|[nµu]s|ms|s|seconds?|min|minutes?|hours?|h|[KMGT]i?B|bytes/s|[GT]B/s|TFLOP/s|tokens/s|tokens a second|tokens per second|"
    r"times (?:less|more|faster|slower|as|ours)|(?:points?|per cent)\b|x (?:faster|slower)|nats"
)
_MEASUREMENT = re.compile(rf"(?<![\w.{_MARK}-])([+-]?\d[\d,.]*)(?:\s?| to \d[\d,.]* )(?:{_UNITS})(?![\w])|(?<![\w.])0\.\d{{3,}}(?!\d*{_MARK})")
_KIND = re.compile(r"\d+(?: to \d+)? %\s(?:intervals?|quantiles?)")  # of interval; not what was measured
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def pages() -> list[Path]:
    """README.md and every page in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def update(table: Callable[[str], str], *, write: bool) -> list[str]:
    """Every line in which a page differs from its files, as ``page: - was`` and ``page: + should be``; ``write``: they are mended.

    Raises:
        ValueError: a mark that names no table, no file, no row or several, or no column; it is named.
    """
    told = []
    for page in pages():
        name, text = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")
        try:
            found = updated(text, table)
        except (ValueError, KeyError, SyntaxError) as error:
            raise ValueError(f"{name}: {error}") from error
        difference = difflib.ndiff(text.splitlines(), found.splitlines()) if found != text else ()
        told += [f"{name}: {line}" for line in difference if line[:2] in ("- ", "+ ")]
        if write and found != text:
            page.write_text(found, encoding="utf-8")
    return told


def updated(text: str, table: Callable[[str], str]) -> str:
    """``text`` with its tables and numbers as their files have them."""
    if text.count("<!-- table: ") != len(_TABLE.findall(text)) or text.count("<!--=") != len(_NUMBER.findall(text)):
        raise ValueError("a mark that cannot be read: <!-- table: NAME -->, or NUMBER<!--= CELLS | FORMAT -->")
    text = _TABLE.sub(lambda m: m[1] + table(m[2]) + m[3], text)
    return _NUMBER.sub(lambda m: f"{value(m[2]):{m[3]}}<!--= {m[2]} | {m[3]} -->", text)


def value(expression: str) -> float:
    """What arithmetic on cells comes to.

    Raises:
        ValueError: a cell that is not there; anything but cells, numbers, ``+ - * /`` and parentheses.
    """
    cells: list[float] = []

    def keep(match: re.Match[str]) -> str:
        cells.append(cell(*match.groups()))
        return f" _{len(cells) - 1} "

    tree = ast.parse(_CELL.sub(keep, expression).strip(), mode="eval").body

    def of(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.Name) and re.fullmatch(r"_\d+", node.id):
            return cells[int(node.id[1:])]
        raise ValueError(f"{expression!r}: expected cells, numbers, + - * / and parentheses")

    return of(tree)


def cell(file: str, where: str, column: str, folder: Path = RESULTS) -> float:
    """A number of ``file``, from the row in which columns have the values that ``where`` gives.

    Raises:
        ValueError: no such file, no such row or several, no such column, or no number there.
    """
    if file == "embedded":
        return float(_embedded()[where][column])
    rows = read(file, folder)
    if not rows:
        raise ValueError(f"{file}: no such file in {folder.name}/")
    wanted = dict(part.strip().split("=", 1) for part in where.split(";" if ";" in where else ",") if part.strip())
    if unknown := {*wanted, column} - rows[0].keys():
        raise ValueError(f"{file}: no column {', '.join(sorted(unknown))}")
    found = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{file}[{where}]: {len(found)} rows; expected one")
    try:
        return float(found[0][column])
    except ValueError:
        raise ValueError(f"{file}[{where}].{column}: {found[0][column]!r} is no number") from None


@functools.cache
def _embedded() -> dict[str, dict[str, float]]:
    report = json.loads(_HEAD.read_text(encoding="utf-8"))
    return report["metrics"] | {"size": {k: report[k] for k in ("questions", "samples")}}


def unmarked() -> list[str]:
    """What looks like a measurement, has no mark and is not in ``unmeasured.csv``; and what that file allows for nothing."""
    allowed = {(r["page"], r["text"]): False for r in _allowed()}
    told = []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        for found in measurements(page.read_text(encoding="utf-8")):
            if (name, found) in allowed:
                allowed[name, found] = True
            else:
                told.append(f"{name}: {found!r} has no mark; mark it, or give {ALLOWED.name} a reason")
    told += [f"{ALLOWED.name}: {page}: {text!r} is not on that page" for (page, text), used in allowed.items() if not used and (ROOT / page).exists()]
    return told


def measurements(text: str) -> Iterator[str]:
    """What in the prose and the tables of ``text`` looks like a measurement and has no mark; code is left out."""
    text = _KIND.sub(" ", _NUMBER.sub(_MARK, _TABLE.sub("", text)))
    text = re.sub(r"^```.*?^```|<!--.*?-->|`[^`\n]+`|\]\([^)]*\)", " ", text, flags=re.DOTALL | re.MULTILINE)
    for match in _MEASUREMENT.finditer(text):
        yield " ".join(match[0].split())


def _allowed() -> list[dict[str, str]]:
    with ALLOWED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if missing := [r["text"] for r in rows if not (r["reason"] or "").strip()]:
        raise ValueError(f"{ALLOWED.name}: no reason for {', '.join(missing)}")
    return rows
