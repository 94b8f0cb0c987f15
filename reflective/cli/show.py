"""What a terminal shows of candidates: live while they are decoded, and in the end. Imported where there is something to show."""

import time
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Column, Table
from typing_extensions import Self

from ..plot import sparkline
from ..search.candidates import Live as Candidate
from ..search.results import Generation

_REFRESH_S = 0.1


@dataclass(frozen=True)
class Costs:
    """Measured on one run, in seconds: decoding without the scorer's share, that share, and a second pass instead."""

    decoding: float
    scoring: float
    second_pass: float


class Board:
    """The live table: one row a candidate, there while the ``with`` block lasts; below it how far, how fast and how long at most.

    Args:
        max_new_tokens: of a candidate.
        questions, done: in all, None where that is not known; those before.
    """

    def __init__(self, console: Console, max_new_tokens: int, questions: int | None = 1, done: int = 0) -> None:
        self.live = Live(console=console, transient=True, auto_refresh=False)
        self.max_new_tokens, self.questions, self.done = max_new_tokens, questions, done
        self.began = time.perf_counter()
        self.shown = 0.0

    def __enter__(self) -> Self:
        self.live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.__exit__(None, None, None)

    def update(self, questions: list[list[Candidate]]) -> None:
        """Called after every decoded token; redraws at most ten times a second."""
        if time.perf_counter() - self.shown < _REFRESH_S:
            return
        table = Table("", Column("decoding", no_wrap=True, ratio=3), Column("step scores", no_wrap=True, ratio=1), "score", expand=True)
        room = max(1, self.live.console.height - 6)  # for what is around the rows; a table that scrolls could not be redrawn
        shown = questions[0] if len(questions[0]) <= room else sorted(questions[0], key=lambda c: not c.running)[:room]
        for c in sorted(shown, key=lambda c: c.number):
            score = f"{c.score():.3f}" if c.step_scores else ""
            style = "dim" if c.status == "stopped" else None
            tail = " ".join(c.text.split())[-60:]
            table.add_row(str(c.number + 1), tail, sparkline(c.step_scores), score, style=style)
        table.caption = self._progress(questions)
        self.live.update(table, refresh=True)
        self.shown = time.perf_counter()

    def _progress(self, questions: list[list[Candidate]]) -> str:
        candidates = [c for live in questions for c in live]
        seconds, lengths = max(1e-9, time.perf_counter() - self.began), [len(c.token_ids) for c in candidates]
        running = [n for c, n in zip(candidates, lengths, strict=True) if c.running]
        told = [f"{sum(lengths)} tokens, {sum(lengths) / seconds:,.0f} tokens/s", f"{len(candidates) - len(running)} of {len(candidates)} ended"]
        if self.questions != 1:
            told.insert(0, f"question {self.done + 1} to {self.done + len(questions)}" + (f" of {self.questions}" if self.questions else ""))
        if running and max(lengths):  # all that run get a token in the time of one
            left = seconds / max(lengths) * (self.max_new_tokens - min(running))
            told.append(f"{timedelta(seconds=round(seconds))}, at most {timedelta(seconds=round(max(0, left)))} left")
        return "; ".join(told)


def report(console: Console, generation: Generation, costs: Costs) -> None:
    """The candidates with their final scores, the chosen answer, and the two measured lines."""
    table = Table("", "response", "step scores", "score", "answer", expand=True)
    for i, c in enumerate(generation.candidates, 1):
        style = "bold green" if c is generation.best else None
        table.add_row(
            str(i), " ".join(c.text.split()), sparkline(c.step_scores), f"{c.score:.3f}", c.answer or "", style=style
        )
    console.print(table)
    console.print(
        Panel(
            generation.best.text.strip(),
            title=f"best of {len(generation.candidates)}{chosen_by(generation)}",
            expand=False,
        )
    )
    share = costs.scoring / costs.decoding
    console.print(
        f"scoring added [bold]{1e3 * costs.scoring:.1f} ms[/] to {costs.decoding:.2f} s of decoding ({share:.2%})\n"
        f"a second pass over the finished texts took [bold]{costs.second_pass:.2f} s[/] "
        f"({costs.second_pass / costs.decoding:.0%} of decoding, {costs.second_pass / costs.scoring:,.0f} times as long)",
        highlight=False,
    )


def chosen_by(generation: Generation) -> str:
    """For people: how the answer was chosen, unless by its score."""
    if generation.chosen_by == "abstained":
        return " (abstained: nothing is promised of it)"
    if generation.chosen_by not in ("majority", "likelihood"):
        return ""
    none = not any(c.step_scores for c in generation.candidates if c.status != "stopped")
    return f" (chosen by {generation.chosen_by}{', as no candidate has a step' if none else ''})"


def summary(generation: Generation) -> str:
    """What the answer to a question cost, in a line."""
    stopped = sum(c.status == "stopped" for c in generation.candidates)
    return (
        f"{generation.strategy}{chosen_by(generation)}: {generation.tokens} tokens, {len(generation.candidates)} candidates, "
        f"{stopped} of them stopped, {generation.seconds:.1f} s, {1e3 * generation.scoring_seconds:.1f} ms of it scoring"
    )
