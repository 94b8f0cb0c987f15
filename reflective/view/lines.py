"""Pictures of step scores, as SVG within HTML: a running score, and forks."""

import math
from collections.abc import Sequence

from .escape import text
from .trajectory import Scale, Trajectory, in_order, shared

_MOST = 240  # points of a line, dots, and cells of a row: more than a reader's screen tells apart
_ROW, _CELL = 20, 14  # px


def line(trajectory: Trajectory, scale: Scale, *, width: int = 150, height: int = 34, axis: bool = False) -> str:
    """The running score as a line, over the step scores as dots. Told in words to those who cannot see it."""
    running, steps = trajectory.running, trajectory.step_scores
    if all(map(math.isnan, steps)):
        return ""
    left, right, top, bottom = (30 if axis else 4), 6, 5, 5
    low, high = scale.low, scale.high
    inner = width - left - right

    def x(k: int) -> float:
        return round(left + (inner * k / (len(steps) - 1) if len(steps) > 1 else inner / 2), 1)

    def y(value: float) -> float:
        return round(top + (height - top - bottom) * (1 - (value - low) / ((high - low) or 1.0)), 1)

    parts, points = [], [k for k in _some(running) if not math.isnan(running[k])]
    if axis:
        for value in (low, (low + high) / 2, high):
            parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value)}" y2="{y(value)}"/>')
            parts.append(f'<text x="{left - 5}" y="{y(value) + 3}" text-anchor="end">{value:g}</text>')
    dots = [k for k in _some(steps) if not math.isnan(steps[k])]
    size = 2.4 if axis else 1.8
    parts += [f'<circle class="cell" style="--score:{scale.good(steps[k]):.3f}" cx="{x(k)}" cy="{y(steps[k])}" r="{size}"/>' for k in dots]
    if points:
        parts.append(f'<polyline points="{" ".join(f"{x(k)},{y(running[k])}" for k in points)}"/>')
        last = points[-1]
        parts.append(f'<circle class="end" cx="{x(last)}" cy="{y(running[last])}" r="2.6"/>')
    said = f"Score after each of {len(steps)} steps: " + (
        f"{number(running[points[0]])} after the first, {number(running[points[-1]])} after the last" if points else "none"
    )
    return f'<svg class="line" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{said}"><title>{said}</title>{"".join(parts)}</svg>'


def tree(items: Sequence[Trajectory], scale: Scale) -> str:
    """Candidates and their forks: a row each, a cell each step, a fork's row where it left its parent's. Nothing where nobody forked."""
    if all(t.parent is None for t in items):
        return ""
    order = in_order(items)
    row = {items[i].number: r for r, (i, _) in enumerate(order)}
    by_number = {t.number: t for t in items}
    longest = max((len(t.step_scores) for t in items), default=0)
    each = -(-longest // _MOST) or 1  # steps a cell
    cell = max(2.0, min(_CELL, 560 * each / max(1, longest)))
    left = 34
    width, height = round(left + cell * math.ceil(longest / each) + 150), _ROW * len(order) + 4
    parts = []
    for r, (i, _) in enumerate(order):
        t, middle = items[i], r * _ROW + _ROW / 2 + 2
        begins = 0
        if t.parent in by_number and t.parent in row and row[t.parent] < r:
            begins = shared(t.text, by_number[t.parent].text, t.step_spans)
            x, above = left + begins / each * cell, row[t.parent] * _ROW + _ROW / 2 + 2
            parts.append(f'<path class="fork" d="M{x:.1f} {above:.1f}V{middle:.1f}h4"/>')
        bold = ' class="chosen"' if t.chosen else ""
        parts.append(f'<text x="{left - 8}" y="{middle + 4}" text-anchor="end"{bold}>{text(t.number)}</text>')
        for k in range(begins, len(t.step_scores), each):
            some = [s for s in t.step_scores[k : k + each] if not math.isnan(s)]
            good = scale.good(math.fsum(some) / len(some)) if some else 0.5
            told = f"candidate {t.number}, step {k + 1}: " + ", ".join(map(number, t.step_scores[k : k + each]))
            parts.append(
                f'<rect class="cell" style="--score:{good:.3f}" x="{left + k / each * cell + 1:.1f}" y="{middle - 6:.1f}" '
                f'width="{max(1.0, cell - 2):.1f}" height="12" rx="2"><title>{text(told)}</title></rect>'
            )
        end = left + math.ceil(len(t.step_scores) / each) * cell + 6
        mark = "✕" if t.cut else "●"
        said = f"{mark} {number(t.score)}{' chosen' if t.chosen else ''}"
        parts.append(f'<text x="{end:.1f}" y="{middle + 4}"{bold}>{text(said)}</text>')
    forks = sum(t.parent is not None for t in items)
    said = f"Tree of {len(items)} candidates, {forks} of them forks; ✕ were stopped before their end"
    return f'<div class="scroll" tabindex="0" role="group" aria-label="Tree of forks"><svg class="tree" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{said}">{"".join(parts)}</svg><p class="note">● ended by itself · ✕ stopped before</p></div>'


def number(value: float | None) -> str:
    """A score for people: three digits behind the point, and more where it would be 0 otherwise."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.0e}"


def _some(values: Sequence[float]) -> list[int]:
    """Indices of at most ``_MOST`` of the values, the first and the last, the least and the greatest of each stretch among them."""
    if len(values) <= _MOST:
        return list(range(len(values)))
    each = math.ceil(2 * len(values) / (_MOST - 2))
    found = {0, len(values) - 1}
    for begin in range(0, len(values), each):
        stretch = [k for k in range(begin, min(begin + each, len(values))) if not math.isnan(values[k])]
        found |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)} if stretch else set()
    return sorted(found)
