"""``reflective view``: candidates of a file as a page to read."""

import os
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from . import complete
from .common import complain, progress_bars

EXAMPLES = """
reflective view answers.jsonl --open
# right and wrong by another file's answers; the page where one wants it
reflective view answers.parquet --answers questions.jsonl -o page.html
"""

_PACKED = (".gz", ".bz2", ".xz", ".zst")
_PAGES = (".html", ".htm")


def view(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="File of candidates, JSON or parquet, packed or not, or '-' for JSON lines from stdin.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The page; default: FILE.view.html beside the file, replaced if there.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL or parquet file of question and answer; default: the file's own answers.")
    ] = None,
    verifier: Annotated[
        str | None, typer.Option(metavar="NAME", autocompletion=complete.verifiers, help="answer (default), exact, math, reasoning-gym:DATASET or MODULE:FUNCTION: tells right from wrong.")
    ] = None,
    outcome: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of 1, 0 or null, in place of a verifier.")] = None,
    pattern: Annotated[str | None, typer.Option(metavar="REGEX", help="Regular expression whose first group is a response's answer.")] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", autocompletion=complete.metrics, help="aime24, aime25, ceval: whose verdicts of the published compute_metric.py; default: as its files tell.")
    ] = None,
    risk: Annotated[bool, typer.Option("--risk", help="The scores are of risk: low is good.")] = False,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Make a page of a file of candidates: every text with its steps tinted by their scores, to search, sort, filter and compare.

    Reads what `reflective generate` and `reflective score` write, and all that `reflective eval` reads. The page is one file, which needs
    no network; it prints where it is.
    """
    from ..evaluate.shown import show

    given, name = source, None
    if output is not None and output.suffix.lower() not in _PAGES:
        raise ValueError(f"output: {output} is to be a page; give a name that ends in .html")
    if source == "-":
        given, name = _spooled(), "stdin"
    try:
        place = output or _beside(source)
        with progress_bars() as bars:
            told = show(
                given, place, answers=answers, verifier=verifier, outcome=outcome, pattern=pattern, task=task, risk=risk, name=name, bars=bars
            )
    finally:
        if source == "-":
            os.unlink(given)
    verdicts = f", {told['right']:,} right, {told['wrong']:,} wrong" if told["right"] + told["wrong"] else ""
    complain(f"view: {told['questions']:,} questions, {told['candidates']:,} candidates{verdicts}, {told['bytes'] / 1e6:.1f} MB")
    print(place, flush=True)
    if browse and not webbrowser.open(place.resolve().as_uri()):
        raise ValueError(f"--open: no browser was found; open {place} yourself")


def _beside(source: str) -> Path:
    """The page's name by default: beside the file, or for stdin and where that folder cannot be written a temporary place."""
    path = Path("stdin.jsonl" if source == "-" else source)
    name = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    page = name.with_name(f"{name.stem}.view.html")
    if source == "-" or not os.access(path.parent, os.W_OK):
        return Path(tempfile.mkdtemp(prefix="reflective-")) / page.name
    return page


def _spooled() -> str:
    """What stdin brings, in a file: it is read more than once."""
    with tempfile.NamedTemporaryFile(prefix="reflective-", suffix=".jsonl", delete=False) as file:
        while block := sys.stdin.buffer.read(1 << 20):
            file.write(block)
    return file.name
