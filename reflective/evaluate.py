"""What the candidates in finished files are worth: pass@1, votes and best of N, against N and against tokens decoded.

Neither a model nor torch is needed, but for aggregations other than the geometric mean, which come from the step scores.
"""

import csv
import glob
import io
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from . import compute_metric
from .search.selection import Array, Metric, any_of, best_of, saturation, select, subsets
from .search.strategies.votes import classes
from .search.verify import Verifier, verifier
from .tasks import Question
from .utils.outputs import write_text
from .utils.records import open_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHOICES = ("majority", "weighted_vote", "best_of", "any")  # in the order of tables
_BY_ANSWER = ("answer", "exact")  # verifiers of the answer, and not of the whole response
_GYM = "reasoning-gym:"
_QUESTION = ("question", "prompt", "problem")
_TAGGED = re.compile(r"(?s).*<answer>(.*?)</answer>")
_RESAMPLES = 2000
_STYLE = {"best_of": "-", "weighted_vote": "--", "majority": ":", "any": "-."}


@dataclass(frozen=True)
class Row:
    """A number of the report: a line of the CSV file.

    Attributes:
        result: the file's name.
        metric: ``pass``, one of ``CHOICES``, ``chosen``, ``compute_metric.py``, or ``CHOICE limit`` and ``CHOICE n95``.
        n: candidates; None for ``chosen`` and for what is fitted to all n.
        aggregation: of the scores that it rests on.
        value, low, high: with its 95 % bootstrap interval over questions; NaN where there is none.
        questions, of: with so many candidates that have a verdict, and in all.
        tokens, tokens_low, tokens_high: decoded a question, NaN where the file does not tell.
        difference, difference_low, difference_high, shared: from the first result, on the questions that both have.
        verdict: what called candidates right: a verifier, a column, or a task ``of compute_metric.py``.
    """

    result: str
    metric: str
    n: int | None
    aggregation: str | None
    value: float
    low: float
    high: float
    questions: int
    of: int
    tokens: float = math.nan
    tokens_low: float = math.nan
    tokens_high: float = math.nan
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan
    shared: int = 0
    verdict: str = ""

    @property
    def name(self) -> str:
        return self.metric if self.n is None else f"{self.metric}@{self.n}"


@dataclass
class Report:
    """Attributes: ``counts``: of each result, see ``Result.counts``; ``rows``: the numbers, result by result."""

    counts: dict[str, dict[str, Any]]
    rows: list[Row]

    def json(self) -> dict[str, Any]:
        return {"results": self.counts, "metrics": [vars(row) for row in self.rows]}

    def write_csv(self, path: str | Path) -> None:
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
        from .plot import draw, pyplot

        plt = pyplot()
        first = next((row.aggregation for row in self.rows if row.aggregation), None)
        rows = [row for row in self.rows if row.aggregation in (None, first)]
        told = not all(math.isnan(row.tokens) for row in rows)
        fig, axes = plt.subplots(1, 1 + told, figsize=(5.2 * (1 + told), 4.4), layout="constrained", squeeze=False)
        keys = list(self.counts) if len(self.counts) > 1 else list(CHOICES)
        colours = dict(zip(keys, itertools.cycle(plt.get_cmap("tab10").colors), strict=False))
        for result, metric in itertools.product(self.counts, CHOICES):
            mine = [row for row in rows if row.result == result and row.metric in ("pass", metric)]
            if len(mine) < 2:
                continue
            alone = len(self.counts) == 1
            look = {"color": colours[metric if alone else result], "linestyle": _STYLE[metric]}
            _line(axes[0, 0], mine, [row.n for row in mine], metric if alone else f"{result}, {metric}", look)
            fitted = {row.metric: row.value for row in rows if row.result == result}
            if f"{metric} limit" in fitted:
                axes[0, 0].axhline(fitted[f"{metric} limit"], lw=0.6, alpha=0.6, **look)
                axes[0, 0].plot(fitted[f"{metric} n95"], fitted[f"{metric} limit"], "|", ms=12, color=look["color"])
            if not math.isnan(mine[0].tokens):
                _line(axes[0, 1], mine, [row.tokens for row in mine], None, look)
        for row in rows:
            if row.metric == "chosen" and not math.isnan(row.tokens):
                spread = np.abs(np.array([[row.low], [row.high]]) - row.value)
                axes[0, 1].errorbar(
                    row.tokens, row.value, spread, fmt="*", ms=11, capsize=2, label=f"{row.result}, chosen",
                    color=colours.get(row.result, "k"),
                )  # fmt: skip
        most = max((row.n for row in rows if row.n), default=1)
        axes[0, 0].set(xlabel="candidates N", ylabel="accuracy", xscale="log", xlim=(0.9, 1.12 * most))
        axes[0, 0].set_xticks(*[sorted({row.n for row in rows if row.n})] * 2)
        axes[0, 0].minorticks_off()
        if told:
            axes[0, 1].set(xlabel="tokens decoded a question", ylabel="accuracy", xscale="log")
        for ax in axes.flat:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.3)
        fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        draw(fig, path)


def evaluate(
    paths: Sequence[str | Path],
    *,
    verifier: str | Verifier | None = None,
    answers: str | Path | None = None,
    outcome: str | None = None,
    pattern: str | None = None,
    task: str | None = None,
    aggregations: Sequence[str] = ("geometric_mean",),
    n: Sequence[int] | None = None,
    tokenizer: str | Path | None = None,
    resamples: int = _RESAMPLES,
    seed: int = 0,
    bars: Progress | None = None,
) -> Report:
    """Judge the candidates in files, and measure what selecting among N of them by votes or by score is worth.

    A result is a file of JSON or parquet, or all files that match a pattern such as ``results/aime24_*.jsonl``. Its rows are

    =================  ===========================================================================================
    ``candidates``     of ``reflective generate``: objects of ``text``, ``score``, ``step_scores``, ``answer``,
                       ``tokens``; ``best`` is the index of the chosen one
    ``output``         of the published code's ``inference.py``: ``prompt``, ``answer`` and ``output``, an object of
                       ``content`` (prompt), ``solution_lst`` (prompt and response) and ``score_lst``
    ``response``       of ``reflective score``, or a list ``responses``, with ``score`` and ``step_scores``
    =================  ===========================================================================================

    and have a ``question``, ``prompt`` or ``problem``. The rows of one question are taken together. Every question weighs the
    same, and a number @N is the mean over all groups of N of its candidates that have a verdict: exact for ``any`` and
    ``best_of``, for votes over at most 512 groups. A score that is missing or not a number counts as 0.

    ``chosen`` is the candidate that a run chose, at what the run decoded. Where a strategy stopped or forked candidates these
    are no independent draws, and it is all that is reported. ``compute_metric.py`` is what that file of the published code
    prints: best of N of consecutive groups, as many as the question with the fewest candidates has, by its own verdicts
    (``reflective.compute_metric``). Files of the published code are judged by these in all other numbers too, unless there
    is a verifier, ``outcome`` or ``pattern``.
    ``limit`` and ``n95`` are ``selection.saturation`` of the numbers at the N that all questions have, four at least.

    Args:
        paths: of results; the first is the one that the others are compared with.
        verifier: of candidates, see ``reflective.train.verifier``; of their ``answer``, where that is what is compared, or
            what ``pattern`` finds, or else the last ``\\boxed{}`` or ``<answer>`` holds. None: the task's of the published
            code where there is one, else ``answer``.
        answers: file of questions with the right ``answer``; by default each row has its own (a published one may be an
            object with ``target``).
        outcome: column or field of candidates with 1, 0 or null, in place of a verifier.
        pattern: regular expression whose first group is the answer, looked for behind ``</think>``.
        task: of the published code, ``aime...`` or ``ceval``; by default what names of its files or else their right answers
            tell. Given, other files are judged by it too, question and response together.
        aggregations: of step scores, see ``reflective.scoring.scores.aggregate``.
        n: of the candidates; default the powers of two up to the most that a question has.
        tokenizer: ``tokenizer.json`` or its directory, for files that do not tell their candidates' tokens.
        resamples, seed: of the questions, for intervals.

    Raises:
        ValueError: a row of another form, by its place; nothing to judge by; a task unknown, or of programs to run; no candidate that has a verdict; unknown
            aggregations; no step scores to aggregate; ``n`` that no question has.
        OSError: files that cannot be read. ImportError: a package that a verifier, parquet or ``tokenizer`` needs.
    """
    reader = _Reader(verifier, answers, outcome, pattern, task, tuple(aggregations), tokenizer, bars)
    results = [reader.result(name, files) for name, files in _named(paths).items()]
    most = max(result.most() for result in results)
    sizes = [2**k for k in range(1, max(most, 1).bit_length())] if n is None else sorted({*n} - {1})
    if sizes and (sizes[0] < 1 or sizes[-1] > max(most, 1)):
        raise ValueError(f"n={sizes}: no question has so many independent candidates with a verdict; {most} at most")
    table = [result.measures(tuple(aggregations), sizes) for result in results]
    rows = []
    for result, measures in zip(results, table, strict=True):
        rows += _rows(result, measures, table[0] if measures is not table[0] else {}, resamples, seed)
    return Report({result.name: result.counts() for result in results}, rows)


# -- reading -------------------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """A candidate. ``scores``: by aggregation, NaN for none; ``outcome``, ``tokens``: NaN where unknown; ``answer``: or None."""

    scores: tuple[float, ...]
    outcome: float
    answer: str | None
    tokens: float


class Chosen(NamedTuple):
    """What a run chose. ``outcome`` NaN without a verdict; ``tokens``: decoded by all its candidates, NaN where unknown."""

    outcome: float
    tokens: float


@dataclass
class Result:
    """What is in a file, or in several.

    Attributes:
        draws: of every question, in order, whether or not they have a verdict.
        chosen: of every question, one a row of the file.
        steered: a strategy stopped or forked candidates; interrupted: rows that Ctrl-C cut short, left out.
        verdicts: what judged the draws.
        tasks: of its files that the published code has written, None for an unknown one.
        published: of every prompt there, as it stands, score and verdict of ``compute_metric.py``.
    """

    name: str
    draws: dict[str, list[Draw]] = field(default_factory=dict)
    chosen: dict[str, list[Chosen]] = field(default_factory=dict)
    steered: bool = False
    interrupted: int = 0
    verdicts: set[str] = field(default_factory=set)
    tasks: set[str | None] = field(default_factory=set)
    published: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)

    def judged(self) -> dict[str, list[Draw]]:
        """Of every question the candidates with a verdict, if any."""
        return {q: kept for q, draws in self.draws.items() if (kept := [d for d in draws if not math.isnan(d.outcome)])}

    def most(self) -> int:
        """The most candidates that a question's groups can have."""
        return 0 if self.steered else max(map(len, self.judged().values()), default=0)

    def counts(self) -> dict[str, Any]:
        """What is there, and what is left out of which numbers."""
        candidates = [draw for draws in self.draws.values() for draw in draws]
        return {
            "questions": len(self.draws),
            "without_candidates": sum(not draws for draws in self.draws.values()),
            "without_verdict": sum(map(bool, self.draws.values())) - len(self.judged()),
            "candidates": len(candidates),
            "candidates_without_verdict": sum(math.isnan(d.outcome) for d in candidates),
            "candidates_without_score": sum(math.isnan(d.scores[0]) for d in candidates),
            "candidates_without_answer": sum(d.answer is None for d in candidates),
            "interrupted_rows": self.interrupted,
            "steered": self.steered,
            "verdict": ", ".join(sorted(self.verdicts)),
            "task": self._task(),
        }

    def _task(self) -> str | None:
        """The published task, why there is none, or None where no file is the published code's."""
        if None in self.tasks:
            return "none: unknown task, give task="
        return "none: several tasks" if len(self.tasks) > 1 else next(iter(self.tasks), None)

    def measures(self, aggregations: tuple[str, ...], sizes: Sequence[int]) -> "dict[_Key, _Values]":
        """Every number of every question that has it, with its tokens."""
        table: dict[_Key, _Values] = defaultdict(dict)
        judged = {} if self.steered else self.judged()
        for question, draws in judged.items():
            right, answer = np.array([d.outcome for d in draws]), np.array(_numbers([d.answer for d in draws]))
            scores = np.nan_to_num([d.scores for d in draws], nan=0.0)  # [M, A]
            tokens = float(np.mean([d.tokens for d in draws]))
            table[_Key("pass", 1)][question] = float(right.mean()), tokens
            for n in sizes:
                if n > len(draws):
                    break
                groups, values = subsets(len(draws), n), {("any", None): any_of(right, n)}
                for score, aggregation in zip(scores.T, aggregations, strict=True):
                    votes = select(*(v[groups].ravel() for v in (score, right, answer)), n)
                    values["majority", None] = votes["majority"].mean()
                    values["weighted_vote", aggregation] = votes["weighted_vote"].mean()
                    values["best_of", aggregation] = best_of(score, right, n)
                for (metric, aggregation), value in values.items():
                    table[_Key(metric, n, aggregation)][question] = float(value), n * tokens
        for question, runs in self.chosen.items():
            if known := [run for run in runs if not math.isnan(run.outcome)]:
                table[_Key("chosen", None)][question] = tuple(np.mean(known, 0).tolist())
        order = ("pass", *CHOICES, "chosen")
        return dict(sorted(table.items(), key=lambda item: (order.index(item[0].metric), item[0].n or 0)))

    def compute_metric(self, n: int) -> float:
        """What the published ``compute_metric.py --N n`` prints: best of n of consecutive candidates, of equals the first.

        Of every prompt as many groups count as the one with the fewest candidates has. NaN where that has too few, or where
        the files are of no task or of several.
        """
        groups = min(map(len, self.published.values()), default=0) // n
        if not groups or len(self.tasks) > 1 or None in self.tasks:
            return math.nan
        right = [
            [max(drawn[g * n : (g + 1) * n], key=itemgetter(0))[1] for drawn in self.published.values()]
            for g in range(groups)
        ]
        return float(np.mean([sum(group) / len(group) for group in right]))


class _Reader:
    """Reads and judges, see ``evaluate``."""

    def __init__(
        self,
        spec: str | Verifier | None,
        answers: str | Path | None,
        outcome: str | None,
        pattern: str | None,
        task: str | None,
        aggregations: tuple[str, ...],
        tokenizer: str | Path | None,
        bars: Progress | None,
    ) -> None:
        self.outcome, self.pattern, self.bars = outcome, _compiled(pattern), bars
        self.task = None if task is None else compute_metric.task(task)
        self.by_task = spec is None and outcome is None and pattern is None
        spec = spec or "answer"
        name = spec if isinstance(spec, str) else getattr(spec, "__name__", str(spec))
        self.name = name if outcome is None else f"column {outcome}"
        self.by_answer = isinstance(spec, str) and (spec in _BY_ANSWER or spec.startswith(_GYM))
        self.by_right = isinstance(spec, str) and (spec in _BY_ANSWER or spec == "math")
        judge = verifier(spec, lambda answer: answer)
        self.judge = lru_cache(4096)(judge) if self.by_answer else judge  # a question has few different answers
        self.right = None if answers is None else self._answers(answers)
        self.aggregate = _aggregators(aggregations)
        self.count = _counter(tokenizer)
        self.rights: dict[tuple[str, str], str] = {}  # of results' published prompts

    def _answers(self, path: str | Path) -> dict[str, Question]:
        found: dict[str, Question] = {}
        for where, fields in self._records(path):
            question = self._question(where, fields)
            if not question.answer:
                raise ValueError(f"{where}: no answer")
            if found.setdefault(question.text, question).answer != question.answer:
                raise ValueError(f"{where}: another answer to the same question: {question.text[:80]!r}")
        return found

    def _records(self, path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
        file = open_file(path, "results")
        records = file.records()
        for record in self.bars.track(records, len(file), description=Path(path).name) if self.bars else records:
            where = f"{path}, {file.row} {record.number}"
            if record.fault:
                raise ValueError(f"{where}: {record.fault}")
            yield where, record.fields

    def _question(self, where: str, fields: dict[str, Any]) -> Question:
        text = next((fields[k] for k in _QUESTION if fields.get(k) is not None), None)
        if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
            text = text[0].get("content")  # a conversation of one message
        if type(text) is not str:
            raise ValueError(f"{where}: expected a question, prompt or problem: a text, or one message")
        right = fields.get("answer")
        right = right.get("target") if isinstance(right, dict) else right
        return Question(text.strip(), "" if right is None else str(right).strip(), fields)

    def result(self, name: str, files: Sequence[str | Path]) -> Result:
        result = Result(name)
        for where, fields, task in itertools.chain.from_iterable(map(self._told_apart, files)):
            question = self._question(where, fields)
            asked = question if self.right is None else self.right.get(question.text)
            candidates = _candidates(where, fields)
            draws = result.draws.setdefault(question.text, [])
            if any(c.get("status") == "interrupted" for c in candidates):
                result.interrupted += 1
                continue
            judging = task if self.by_task else None
            read = [
                self._draw(f"{where}, candidate {i}", fields, i, c, asked, judging) for i, c in enumerate(candidates)
            ]
            draws += read
            result.verdicts.add(f"{task} of compute_metric.py" if judging else self.name)
            result.steered |= any(c.get("status") == "stopped" or c.get("parent") is not None for c in candidates)
            if _is_published(fields):
                self._publish(result, task, question, asked, candidates)
            best = fields.get("best")
            if isinstance(best, int) and 0 <= best < len(read):
                chosen = Chosen(read[best].outcome, _number(where, "tokens", fields.get("tokens")))
                result.chosen.setdefault(question.text, []).append(chosen)
        if not result.judged():
            raise ValueError(
                f"{name}: no candidate has a verdict; its rows need an answer, or give answers=FILE of question and answer, "
                "or outcome=COLUMN"
            )
        return result

    def _told_apart(self, path: str | Path) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        """The records with their task, None for one that is neither given nor the published code's."""
        tasks: list[str | None] = []
        for where, fields in self._records(path):
            if self.task is None and not tasks and _is_published(fields):
                tasks.append(self._find_task(path))
            yield where, fields, tasks[0] if tasks and _is_published(fields) else self.task

    def _find_task(self, path: str | Path) -> str | None:
        records = ((f"{path}, {r.number}", r.fields) for r in open_file(path).records() if not r.fault)
        found = compute_metric.find_task(path, (self._question(*r).answer for r in records if _is_published(r[1])))
        if found is None and self.by_task:
            compute_metric.refuse_programs(Path(path).name)
        return found

    def _publish(
        self,
        result: Result,
        task: str | None,
        question: Question,
        asked: Question | None,
        candidates: list[dict[str, Any]],
    ) -> None:
        result.tasks.add(task)
        if task is None:
            return
        prompt = str((question.entry or {}).get("prompt", question.text))
        # There the first row of a prompt tells its answer.
        right = self.rights.setdefault((result.name, prompt), question.answer or (asked.answer if asked else ""))
        drawn = result.published.setdefault(prompt, [])
        for c in candidates:
            score = math.nan if c["score"] is None else float(c["score"])
            drawn.append((score, bool(right) and compute_metric.verdict(task, c["whole"], right)))

    def _draw(
        self,
        where: str,
        fields: dict[str, Any],
        place: int,
        candidate: dict[str, Any],
        asked: Question | None,
        task: str | None,
    ) -> Draw:
        text, score = candidate.get("text"), _number(where, "score", candidate.get("score"))
        if type(text) is not str:
            raise ValueError(f"{where}: text={text!r}; expected a text")
        answer = self._answer(text, candidate.get("answer"), task)
        tokens = _number(where, "tokens", candidate.get("tokens"))
        try:
            scores = tuple(how(score, candidate.get("step_scores")) for how in self.aggregate)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if self.outcome is not None:
            outcome = self._told(where, fields, place, candidate)
        elif asked is None or ((self.by_right or task) and not asked.answer):
            outcome = math.nan
        elif task:
            whole = candidate["whole"] if _is_published(fields) else f"{asked.text}\n{text}"
            outcome = float(compute_metric.verdict(task, whole, asked.answer))
        else:
            verdict = self.judge(answer if self.by_answer else text, asked)
            outcome = math.nan if verdict is None else verdict
        return Draw(scores, outcome, answer, self.count(text) if math.isnan(tokens) else tokens)

    def _answer(self, text: str, recorded: Any, task: str | None) -> str | None:
        if self.pattern:
            found = self.pattern.search(text.rpartition("</think>")[2])
            return found and found.group(1) and found.group(1).strip()
        if task and (read := compute_metric.answer(task, text)):
            return read
        if recorded is not None:
            return str(recorded).strip() or None
        tagged = _TAGGED.match(text)
        return _boxed(text) or (tagged and tagged.group(1).strip()) or None

    def _told(self, where: str, fields: dict[str, Any], place: int, candidate: dict[str, Any]) -> float:
        """The verdict in the column ``outcome``."""
        if self.outcome in candidate:
            told = candidate[self.outcome]
        elif self.outcome not in fields:
            raise ValueError(f"{where}: outcome={self.outcome!r} is neither a field of it nor a column")
        elif "response" in fields:
            told = fields[self.outcome]
        elif isinstance(fields[self.outcome], list) and place < len(fields[self.outcome]):
            told = fields[self.outcome][place]
        else:
            raise ValueError(f"{where}: {self.outcome}: expected a verdict for each candidate")
        told = _number(where, self.outcome, told)
        if told not in (0, 1) and not math.isnan(told):
            raise ValueError(f"{where}: {self.outcome}={told!r}; expected 1, 0 or null")
        return told


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        compiled = pattern and re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error
    if compiled and not compiled.groups:
        raise ValueError(f"pattern={pattern!r}: expected a group, as in 'answer is (.+)'")
    return compiled or None


def _named(paths: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Names of results and their files: the stems where these tell them apart."""
    if not paths:
        raise ValueError("paths: expected at least one file")
    found = {}
    for path in dict.fromkeys(map(str, paths)):
        files = [Path(path)] if Path(path).exists() else sorted(map(Path, glob.glob(path)))
        if not files:
            raise FileNotFoundError(f"{path!r} does not exist, and as a pattern it matches nothing")
        found[path] = files
    stems = [Path(path).stem for path in found]
    return found if len(set(stems)) < len(stems) else dict(zip(stems, found.values(), strict=True))


def _candidates(where: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates of a row in the first form; none where generating them failed."""
    if "candidates" in fields:
        candidates = fields["candidates"] or []
    elif _is_published(fields):
        output = fields["output"]
        prompt = output.get("content") or ""
        whole = [str(t) for t in output["solution_lst"]]
        candidates = _zipped(
            where, text=[t.removeprefix(prompt) for t in whole], score=output["score_lst"], whole=whole
        )
    elif "responses" in fields:
        names = {"text": "responses", "score": "score", "step_scores": "step_scores"}
        texts = fields["responses"] or []
        candidates = _zipped(where, **{k: fields.get(name) or [None] * len(texts) for k, name in names.items()})
    elif "response" in fields:
        kept = {"score": fields.get("score"), "step_scores": fields.get("step_scores")}
        candidates = [{"text": fields["response"], **kept}]
    else:
        raise ValueError(
            f"{where}: expected candidates, output (with solution_lst and score_lst), response or responses; found "
            + ", ".join(fields)
        )
    if not isinstance(candidates, list) or not all(isinstance(c, dict) for c in candidates):
        raise ValueError(f"{where}: candidates: expected a list of objects")
    return candidates


def _is_published(fields: dict[str, Any]) -> bool:
    output = fields.get("output")
    return "candidates" not in fields and isinstance(output, dict) and {"solution_lst", "score_lst"} <= output.keys()


def _zipped(where: str, **columns: Sequence[Any]) -> list[dict[str, Any]]:
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{len(values)} of {name}" for name, values in columns.items())
        raise ValueError(f"{where}: expected one of each for every candidate, found {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _number(where: str, name: str, value: Any) -> float:
    if value is not None and not isinstance(value, int | float):
        raise ValueError(f"{where}: {name}={value!r}; expected a number or null")
    return math.nan if value is None else float(value)


def _boxed(text: str) -> str | None:
    r"""What the last ``\boxed{}`` holds, braces balanced."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for i, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[:i].strip()
    return None


def _aggregators(names: tuple[str, ...]) -> list[Callable[[float, Sequence[float] | None], float]]:
    """Functions of a candidate's score and step scores."""

    def of(name: str) -> Callable[[float, Sequence[float] | None], float]:
        from .scoring.scores import AGGREGATIONS, aggregate  # not above: with torch it takes seconds

        if name not in AGGREGATIONS:
            raise ValueError(f"aggregation={name!r}; expected one of {', '.join(AGGREGATIONS)}")

        def aggregated(score: float, steps: Sequence[float | None] | None) -> float:
            if steps is None and math.isnan(score):
                return math.nan
            if steps is None:
                raise ValueError(f"no step_scores to aggregate by {name}; the file has geometric means alone")
            return aggregate([math.nan if s is None else s for s in steps], name)

        return aggregated

    if not names:
        raise ValueError("aggregations: expected at least one")
    return [(lambda score, steps: score) if name == "geometric_mean" else of(name) for name in names]


def _counter(tokenizer: str | Path | None) -> Callable[[str], float]:
    """Tokens of a response."""
    if tokenizer is None:
        return lambda text: math.nan
    from tokenizers import Tokenizer

    path = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: {path} does not exist; give a tokenizer.json or its directory")
    counting = Tokenizer.from_file(str(path))
    return lambda text: float(len(counting.encode(text, add_special_tokens=False)))


# -- measuring -----------------------------------------------------------------------------------------------------------


class _Key(NamedTuple):
    metric: str
    n: int | None
    aggregation: str | None = None


_Values = dict[str, tuple[float, float]]  # value and tokens of every question


def _numbers(answers: Sequence[str | None]) -> list[int]:
    """Equal numbers for answers that mean the same, -1 for None."""
    distinct = list(dict.fromkeys(a for a in answers if a is not None))
    number = {distinct[i]: k for k, group in enumerate(classes(distinct)) for i in group}
    return [-1 if a is None else number[a] for a in answers]


def _rows(
    result: Result, measures: dict[_Key, _Values], first: dict[_Key, _Values], resamples: int, seed: int
) -> Iterator[Row]:
    of, verdict = len(result.draws), ", ".join(sorted(result.verdicts))
    for key, values in measures.items():
        value, tokens = (_bootstrap(v, resamples, seed) for v in np.array(list(values.values())).T)
        other = first.get(key, {})
        shared = [values[q][0] - other[q][0] for q in values if q in other]
        difference = vars(_bootstrap(np.array(shared), resamples, seed)).values() if shared else [math.nan] * 3
        yield Row(
            result.name,
            *key,
            *vars(value).values(),
            len(values),
            of,
            *vars(tokens).values(),
            *difference,
            len(shared),
            verdict,
        )
    for n in sorted({1} | {key.n for key in measures if key.n}):
        if not math.isnan(value := result.compute_metric(n)):
            (task,) = result.tasks
            yield Row(
                result.name, "compute_metric.py", n, "geometric_mean", value, math.nan, math.nan, of, of,
                verdict=f"{task} of compute_metric.py",
            )  # fmt: skip
    for metric, aggregation in dict.fromkeys((k.metric, k.aggregation) for k in measures if k.metric in CHOICES):
        everyone = measures[_Key("pass", 1)]
        curve = {1: everyone} | {n: v for (name, n, how), v in measures.items() if (name, how) == (metric, aggregation)}
        means = {n: np.mean(list(v.values()), 0)[0] for n, v in curve.items() if len(v) == len(everyone)}
        if len(means) > 3:  # more points than the fit has parameters
            fit = saturation(list(means), list(means.values()))
            for name, value in (("limit", fit.limit), ("n95", fit.n95)):
                yield Row(
                    result.name, f"{metric} {name}", None, aggregation, value, math.nan, math.nan, len(everyone), of,
                    verdict=verdict,
                )  # fmt: skip


@lru_cache(4)
def _weights(questions: int, resamples: int, seed: int) -> Array:
    """[R, Q] share of each question in a resample."""
    drawn = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), resamples)
    return drawn / questions


def _bootstrap(values: Array, resamples: int, seed: int) -> Metric:
    """Mean over questions, and the interval of it from as many drawn with replacement."""
    low, high = np.quantile(_weights(len(values), resamples, seed) @ values, (0.025, 0.975))
    return Metric(float(values.mean()), float(low), float(high))


# -- showing -------------------------------------------------------------------------------------------------------------


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


def _line(ax: "Axes", rows: Sequence[Row], at: Iterable[float], label: str | None, look: dict[str, Any]) -> None:
    at, values = list(at), [row.value for row in rows]
    ax.plot(at, values, marker="o", ms=4, lw=1.2, label=label, **look)
    fewer = [i for i, row in enumerate(rows) if row.questions < rows[0].questions]
    ax.plot([at[i] for i in fewer], [values[i] for i in fewer], "o", ms=4, color=look["color"], mfc="w", ls="")
    ax.fill_between(at, [row.low for row in rows], [row.high for row in rows], color=look["color"], alpha=0.12, lw=0)
