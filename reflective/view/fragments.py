"""Trajectories as HTML that can stand in any page: no script, and no style that reaches beyond itself."""

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files

from .escape import text
from .lines import line, number, tree
from .trajectory import Scale, Trajectory, pieces, words

NOTEBOOK = 400_000  # characters of HTML: a notebook keeps them in its file, and its page shows them all
_PIECE = 10_000  # characters of a text without steps that fit or do not
_ROWS = 200  # of a table in a notebook
_ALL = '<code>.html("page.html")</code> writes all of it'


@cache
def styles() -> str:
    """The style sheets of fragments, ``scores.css`` among them."""
    home = files(__package__)
    return "".join(home.joinpath(name).read_text(encoding="utf-8") for name in ("scores.css", "view.css"))


class Left:
    """What is left of a limit of characters; ``None``: there is no limit."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def takes(self, html: str) -> bool:
        """Whether it fits; then it counts."""
        if self.limit is None:
            return True
        fits = len(html) <= self.limit
        self.limit -= len(html) if fits else 0
        return fits

    def part(self) -> "Left":
        """At most half of it, for one of several: it has to be counted here afterwards."""
        return Left(None if self.limit is None else self.limit // 2)


def one(trajectory: Trajectory, *, asked: str = "", aggregation: str = "geometric_mean", limit: int | None = None) -> str:
    """A trajectory: its numbers, its running score and its text, each step tinted.

    Args:
        asked: the prompt, shown folded.
        aggregation: of the running score, to be named.
        limit: characters of HTML, about; what does not fit is counted.
    """
    scale = _scale([trajectory])
    body = (
        f'{_head(trajectory)}{_error(trajectory)}{line(trajectory, scale, width=480, height=92, axis=True)}'
        f"{_legend(scale, aggregation)}{_text(trajectory, scale, Left(limit))}{_further(trajectory, Left(limit))}{_asked(asked)}"
    )
    return _framed(body)


def many(
    items: Sequence[Trajectory], *, title: str, note: str, asked: str = "", aggregation: str = "geometric_mean", limit: int | None = None
) -> str:
    """Candidates side by side, the chosen one first and then by score, above them the tree of forks where there are any.

    Args:
        title, note: what heads them.
        asked, aggregation, limit: as for ``one``.
    """
    scale, left = _scale(items), Left(limit)
    best = 1 if scale.higher_is_better else -1
    order = sorted(items, key=lambda t: (not t.chosen, t.cut, -best * t.score if t.score == t.score else float("inf")))
    cards = []
    for t in order:
        kinds = f"card{' is-chosen' if t.chosen else ''}{' is-cut' if t.cut else ''}"
        card = (
            f'<article class="{kinds}">{_head(t)}{_error(t)}{line(t, scale, width=260, height=44)}{_text(t, scale, left.part())}'
            f"{_further(t, left.part())}</article>"
        )
        if not left.takes(card):
            break
        cards.append(card)
    missing = len(order) - len(cards)
    more = f'<p class="note">{_count(missing, "more candidate")}: {_ALL}</p>' if missing else ""
    body = (
        f'<div class="head"><span class="name">{text(title)}</span><span class="note">{text(note)}</span></div>{tree(items, scale)}'
        f'<div class="cards" tabindex="0" role="group" aria-label="Candidates side by side">{"".join(cards)}</div>{more}{_legend(scale, aggregation)}{_asked(asked)}'
    )
    return _framed(body)


def table(
    items: Sequence[Trajectory],
    positions: Sequence[Sequence[int]],
    gates: Sequence[Sequence[float]] | None = None,
    *,
    best: int | None = None,
    aggregation: str = "geometric_mean",
    limit: int | None = None,
) -> str:
    """Trajectories without a search: a row each, and folded below it the step scores, and the text where there is one.

    Args:
        positions: of each one's steps, columns of their ids.
        gates: of each one's steps, or None.
        best: index of the one with the best score.
        aggregation, limit: as for ``one``.
    """
    scale, left = _scale(items), Left(limit)
    gates = [()] * len(items) if gates is None else gates
    parts = []
    for i, (t, where, weights) in enumerate(zip(items, positions, gates, strict=True)):
        mark = '<span class="mark picked">best</span>' if i == best and len(items) > 1 else ""
        rows = zip(t.step_scores, t.running, where, itertools.chain(weights, itertools.repeat(None)), strict=False)
        shown = itertools.islice(rows, None if limit is None else _ROWS)
        rest = len(t.step_scores) - _ROWS if limit is not None else 0
        steps = "".join(
            f'<tr><td>{k}</td><td>{at}</td><td class="step" style="--score:{scale.good(s):.3f}">{number(s)}</td><td>{number(r)}</td>'
            + ("" if w is None else f"<td>{number(w)}</td>")
            + "</tr>"
            for k, (s, r, at, w) in enumerate(shown, 1)
        )
        more = f'<p class="note">{_count(rest, "more step")}: {_ALL}</p>' if rest > 0 else ""
        gate, steps_of = "<th>gate</th>" if len(weights) else "", _count(len(t.step_scores), "step")
        folded = (
            f"<details{' open' if len(items) == 1 else ''}><summary>{steps_of} one by one</summary><table><thead><tr><th>step</th>"
            f"<th>position</th><th>score</th><th>so far</th>{gate}</tr></thead><tbody>{steps}</tbody></table>{more}</details>"
            if t.step_scores
            else ""
        )
        part = (
            f'<section class="trajectory">{_head(t, mark)}{_error(t)}{line(t, scale, width=420, height=56, axis=True)}'
            f"{_text(t, scale, left.part())}{folded}</section>"
        )
        if not left.takes(part):
            parts.append(f'<p class="note">{len(items) - i:,} more trajectories: {_ALL}</p>')
            break
        parts.append(part)
    return _framed("<hr>".join(parts) + _legend(scale, aggregation))


def _framed(body: str) -> str:
    # The last two classes keep Jupyter's MathJax off the text, which it would take apart between dollar signs.
    return f'<div class="rf rf-view tex2jax_ignore mathjax_ignore"><style>{styles()}</style>{body}</div>'


def _scale(items: Sequence[Trajectory]) -> Scale:
    return Scale.of((s for t in items for s in (*t.step_scores, t.score)), all(t.higher_is_better for t in items))


def _head(t: Trajectory, more: str = "") -> str:
    marks = [f'<span class="name">{text(t.name)}</span>{more}']
    if t.chosen:
        marks.append('<span class="mark picked">chosen</span>')
    if t.right is not None:
        marks.append('<span class="mark right">✓ right</span>' if t.right else '<span class="mark wrong">✗ wrong</span>')
    figures = [f'<span class="score" title="{text(repr(float(t.score)))}">{number(t.score)}</span>']
    if t.answer is not None:
        figures.append(f'<span><span class="note">answer</span> <span class="answer">{text(t.answer)}</span></span>')
    notes = [f"chosen {t.chosen}" if t.chosen else "", _count(len(t.step_scores), "step"), "" if t.tokens is None else _count(t.tokens, "token")]
    notes += [f"forked from candidate {t.parent}" if t.parent is not None else "", t.ended]
    return (
        f'<div class="head">{"".join(marks)}</div><div class="head">{"".join(figures)}</div>'
        f'<div class="note">{text(" · ".join(filter(None, notes)))}</div>'
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _error(t: Trajectory) -> str:
    return f'<p class="error">No score: {text(t.error)}</p>' if t.error else ""


def _text(t: Trajectory, scale: Scale, left: Left) -> str:
    """The text as far as it fits, and how much of it does not."""
    if not t.text:
        return ""
    parts, missing = [], ""
    for part, begins, step in _tinted(t, scale):
        if not left.takes(part):
            steps = len(t.step_scores) - step
            rest = _count(steps, "more step") if steps else _count(len(t.text) - begins, "more character")
            missing = f'<p class="note">… {rest}: {_ALL}</p>'
            break
        parts.append(part)
    return f'<div class="text" tabindex="0" role="group" aria-label="Text of {text(t.name)}">{"".join(parts)}</div>{missing}'


def _tinted(t: Trajectory, scale: Scale) -> Iterator[tuple[str, int, int]]:
    """Pieces of the text: steps with their scores, and what belongs to none; where they begin, and how many steps are before them."""
    spans, end = pieces(t)
    at = 0
    for k, ((begin, stop), score) in enumerate(zip(spans, t.step_scores, strict=False), 1):
        step = t.text[begin:stop]
        said = step.rstrip()  # the delimiter's line ends: with them the number would stand at the beginning of the next line
        so_far = f", {number(t.running[k - 1])} so far" if len(t.running) >= k else ""
        if begin > at:
            yield text(t.text[at:begin]), at, k - 1
        tinted = (
            f'<span class="step" style="--score:{scale.good(score):.3f}" title="step {k} of {len(spans)}: {number(score)}{so_far}">{text(said)}'
            f"<small>{number(score)}</small></span>{text(step[len(said) :])}"
        )
        yield tinted, begin, k - 1
        at = stop
    for begin in range(end, len(t.text), _PIECE):
        rest = text(t.text[begin : begin + _PIECE])
        yield (f'<span class="rest">{rest}</span>' if spans else rest), begin, len(t.step_scores)


def _further(t: Trajectory, left: Left) -> str:
    parts = []
    for other in t.further:
        scale = _scale([other])
        risk = "" if other.higher_is_better else '<span class="note">of risk: low is good</span>'
        part = (
            f'<details><summary>by {text(other.name)}: {number(other.score)}</summary>{risk}{_error(other)}'
            f"{line(other, scale, width=260, height=44)}{_text(other, scale, left)}</details>"
        )
        parts.append(part)
    return "".join(parts)


def _asked(asked: str) -> str:
    return f'<details><summary>Prompt</summary><div class="asked">{text(asked)}</div></details>' if asked else ""


def _legend(scale: Scale, aggregation: str) -> str:
    low, high = f"{scale.low:g}" if scale.low == 0 else number(scale.low), f"{scale.high:g}" if scale.high == 1 else number(scale.high)
    ends = (low, high) if scale.higher_is_better else (high, low)
    risk = "" if scale.higher_is_better else " · scores of risk: low is good"
    return (
        f'<div class="legend"><span>{ends[0]}</span><i role="img" aria-label="vermilion is poor, blue is good"></i><span>{ends[1]}</span>'
        f"<span>· dots: steps · line: {text(words(aggregation))} so far{risk}</span></div>"
    )


