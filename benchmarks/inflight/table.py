"""The results as Markdown, and the part of ``docs/inflight.md`` that is made of them.

    python -m reflective.benchmarks.inflight.table            # print it
    python -m reflective.benchmarks.inflight.table --write    # put it between the page's markers
    python -m reflective.benchmarks.inflight.table --draw     # docs/inflight.png, with matplotlib
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from reflective.plot import pyplot

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


COLOURS = {  # told apart in every kind of colour vision, and by their marks
    "right": "#56b4e9", "wrong": "#d55e00", "refuses": "#f0e442", "fails": "#e69f00", "cannot": "#f2f2f2", "untested": "#ffffff",
}  # fmt: skip
MEANING = {
    "right": "right", "wrong": "wrong, and nobody is told", "refuses": "refuses", "fails": "fails: an error by accident",
    "cannot": "cannot express it", "untested": "did not come about",
}  # fmt: skip


def draw(path: Path, folder: Path = RESULTS) -> Path:
    """The same as a picture: a field for every system and case.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = pyplot()
    from matplotlib.patches import Patch, Rectangle

    rows, cases = read(NAME, folder), [c.name for c in chosen()]
    names = list(dict.fromkeys(r["system"] for r in rows))
    names = [n for n in names if not _in_vllm(n)] + [n for n in names if _in_vllm(n)]
    gap = sum(not _in_vllm(n) for n in names)
    places = {name: i + 0.4 * (i >= gap) for i, name in enumerate(names)}
    figure, axes = plt.subplots(figsize=(11, 8.2), layout="constrained")
    for r in rows:
        x, y = places[r["system"]], cases.index(r["case"])
        axes.add_patch(Rectangle((x, y), 0.94, 0.9, color=COLOURS[r["result"]], linewidth=0))
        light = r["result"] in ("cannot", "untested")
        axes.text(x + 0.47, y + 0.46, MARKS[r["result"]], ha="center", va="center", color="#888888" if light else "black", fontsize=10)
    axes.set_xticks([places[n] + 0.47 for n in names], names, rotation=40, ha="left", rotation_mode="anchor", fontsize=9)
    axes.set_yticks([i + 0.45 for i in range(len(cases))], cases, fontsize=9)
    axes.set(xlim=(-0.1, max(places.values()) + 1), ylim=(len(cases), -0.1))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for name, label in zip(names, axes.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if name.startswith("reflective") else "normal")
    axes.spines[:].set_visible(False)
    axes.text(gap / 2, len(cases) + 0.25, "on transformers", ha="center", va="top", fontsize=10)
    axes.text((gap + 0.4 + max(places.values()) + 0.94) / 2, len(cases) + 0.25, "in vLLM", ha="center", va="top", fontsize=10)
    there = [k for k in MARKS if any(r["result"] == k for r in rows)]
    patches = [Patch(facecolor=COLOURS[k], label=f"{MARKS[k]}  {MEANING[k]}") for k in there]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(there), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


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
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if args.draw:
        print(draw(PAGE.with_suffix(".png")))
    elif not args.write:
        print(page())
    if not args.write:
        return
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + page() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
