"""The results as Markdown, and the part of ``docs/inflight.md`` that is made of them.

    python -m reflective.benchmarks.inflight.table            # print it
    python -m reflective.benchmarks.inflight.table --write    # put it between the page's markers
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..record import RESULTS, read
from .cases import Case, chosen

NAME = "inflight"
PAGE = Path(__file__).parents[2] / "docs" / "inflight.md"
BEGIN = "<!-- measured: python -m reflective.benchmarks.inflight.table --write -->\n"
END = "<!-- end of measured -->\n"
MARKS = {"right": "✓", "wrong": "✗", "refuses": "R", "fails": "E", "cannot": "–", "untested": "?"}
Rows = Sequence[dict[str, str]]


def _in_vllm(system: str) -> bool:
    return "vllm" in system


def matrix(rows: Rows, cases: Sequence[Case]) -> list[str]:
    """A line a case, a column a system."""
    systems = list(dict.fromkeys(r["system"] for r in rows))
    found = {(r["system"], r["case"]): MARKS[r["result"]] for r in rows}
    lines = ["| | " + " | ".join(f"`{s}`" for s in systems) + " |", "|---|" + ":-:|" * len(systems)]
    for case in cases:
        marks = [found.get((s, case.name), "") for s in systems]
        marks = [f"**{m}**" if m == "✗" else m for m in marks]
        if any(marks):
            lines.append(f"| [{case.name}](#{case.name}) | " + " | ".join(marks) + " |")
    return lines


def wrong(rows: Rows) -> list[str]:
    """Who was wrong, by how much, and in which rows."""
    lines = ["| system | case | largest difference | allowed | rows |", "|---|---|---|---|---|"]
    for r in rows:
        if r["result"] == "wrong":
            lines.append(f"| `{r['system']}` | {r['case']} | {r['difference'] or 'no pairs'} | {r['allowed']} | {_cell(r['said'])} |")
    return lines if len(lines) > 2 else ["Nobody."]


def said(rows: Rows, *results: str) -> list[str]:
    """What systems said, each once, with the cases in which they said it."""
    by_system: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r["result"] in results:
            by_system.setdefault((r["said"], r["system"]), []).append(r["case"])
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (message, system), names in by_system.items():
        found.setdefault((message, tuple(names)), []).append(f"`{system}`")
    return [f"- **{', '.join(names)}**, {', '.join(who)}: {_escaped(message)}" for (message, names), who in found.items()] or ["- nothing"]


def cases_told(cases: Sequence[Case]) -> list[str]:
    """What must hold, and why people get it wrong."""
    lines = []
    for case in cases:
        seen = ", ".join(_linked(source) for source in case.sources)
        lines += [f'<a id="{case.name}"></a>', f"**{case.name}.** {_escaped(case.must)} *{_escaped(case.why)}*" + (f" Sources: {seen}." if seen else ""), ""]
    return lines


def page(folder: Path = RESULTS) -> str:
    """What stands between the markers."""
    rows, cases = read(NAME, folder), chosen()
    here = [r for r in rows if not _in_vllm(r["system"])]
    there = [r for r in rows if _in_vllm(r["system"])]
    lines = ["### On transformers", "", *matrix(here, cases), ""]
    if there:
        lines += ["### In vLLM", "", *matrix(there, cases), ""]
    pairs = [r for r in rows if r["same_bits"] and r["result"] == "right"]
    bits = ", ".join(f"`{r['system']}` {r['same_bits']}" for r in pairs)
    lines += ["### Who was wrong, and where", "", *wrong(rows), ""]
    lines += ["### What was refused, and what failed", "", *said(rows, "refuses", "fails", "untested"), ""]
    lines += ["### What cannot be expressed", "", *said(rows, "cannot"), ""]
    if bits:
        lines += [f"Whether in `batch` the same tokens, decoded in company and alone, have scores of the same bits: {bits}.", ""]
    lines += ["### What the systems are", "", *(f"- `{s}`: {_escaped(about)}." for s, about in {r["system"]: r["about"] for r in rows}.items()), ""]
    lines += ["### What the cases are", "", *cases_told([c for c in cases if c.name in {r["case"] for r in rows}])]
    machines = dict.fromkeys(f"{r['cpu']}, torch {r['torch']}, transformers {r['transformers']}" for r in rows)
    packages = dict.fromkeys(p for r in rows for p in r["package"].split("; ") if p)
    lines += [f"Run on: {'; '.join(machines)}" + (f"; {', '.join(packages)}" if packages else "") + ". File: `benchmarks/results/inflight.csv`.", ""]
    return "\n".join(lines)


def _linked(source: str) -> str:
    """``owner/name#number`` as a link, whatever follows in words behind it."""
    place, _, more = source.partition(" ")
    name, _, number = place.partition("#")
    link = f"[{place}](https://github.com/{name}{f'/issues/{number}' if number else ''})"
    return f"{link} {more}".strip()


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|")


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reflective.benchmarks.inflight.table")
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(page())
        return
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + page() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
