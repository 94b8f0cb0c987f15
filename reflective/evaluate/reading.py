"""Reading results, and judging their candidates."""

import glob
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .. import compute_metric
from ..search.verify import Verifier, verifier
from ..tasks import Question
from ..utils.records import open_file
from .forms import is_published, number, read_candidates, read_question
from .results import Chosen, Draw, Result

_BY_ANSWER = ("answer", "exact")  # verifiers of the answer, and not of the whole response
_GYM = "reasoning-gym:"
_TAGGED = re.compile(r"(?s).*<answer>(.*?)</answer>")


def named(paths: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Names of results and their files: the stems where these tell them apart.

    Raises:
        ValueError: no path. FileNotFoundError: one that neither exists nor matches anything.
    """
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


class Reader:
    """Reads and judges, see ``evaluate``, whose arguments these are; ``spec``: of the verifier."""

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
            question = read_question(where, fields)
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

    def result(self, name: str, files: Sequence[str | Path]) -> Result:
        """What is in the files of one result, read and judged.

        Raises:
            ValueError, OSError: see ``evaluate``.
        """
        result = Result(name)
        for where, fields, task in itertools.chain.from_iterable(map(self.told_apart, files)):
            question = read_question(where, fields)
            asked = question if self.right is None else self.right.get(question.text)
            candidates = read_candidates(where, fields)
            draws = result.draws.setdefault(question.text, [])
            if any(c.get("status") == "interrupted" for c in candidates):
                result.interrupted += 1
                continue
            judging = task if self.by_task else None
            read = [
                self.draw(f"{where}, candidate {i}", fields, i, c, asked, judging) for i, c in enumerate(candidates)
            ]
            draws += read
            result.verdicts.add(f"{task} of compute_metric.py" if judging else self.name)
            result.steered |= any(c.get("status") == "stopped" or c.get("parent") is not None for c in candidates)
            if is_published(fields):
                self._publish(result, task, question, asked, candidates)
            best = fields.get("best")
            if isinstance(best, int) and 0 <= best < len(read):
                chosen = Chosen(read[best].outcome, number(where, "tokens", fields.get("tokens")))
                result.chosen.setdefault(question.text, []).append(chosen)
        if not result.judged():
            raise ValueError(
                f"{name}: no candidate has a verdict; its rows need an answer, or give answers=FILE of question and answer, "
                "or outcome=COLUMN"
            )
        return result

    def told_apart(self, path: str | Path) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        """The records with their task, None for one that is neither given nor the published code's.

        Raises:
            ValueError: a record that could not be read, by its place.
        """
        tasks: list[str | None] = []
        for where, fields in self._records(path):
            if self.task is None and not tasks and is_published(fields):
                tasks.append(self._find_task(path))
            yield where, fields, tasks[0] if tasks and is_published(fields) else self.task

    def _find_task(self, path: str | Path) -> str | None:
        records = ((f"{path}, {r.number}", r.fields) for r in open_file(path).records() if not r.fault)
        found = compute_metric.find_task(path, (read_question(*r).answer for r in records if is_published(r[1])))
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

    def draw(
        self,
        where: str,
        fields: dict[str, Any],
        place: int,
        candidate: dict[str, Any],
        asked: Question | None,
        task: str | None,
    ) -> Draw:
        """A candidate, judged.

        Args:
            where, fields: of its row, and its ``place`` there; asked: the question with its right answer, or None; task: as ``told_apart`` has it.

        Raises:
            ValueError: of another form, by its place.
        """
        text, score = candidate.get("text"), number(where, "score", candidate.get("score"))
        if type(text) is not str:
            raise ValueError(f"{where}: text={text!r}; expected a text")
        answer = self._answer(text, candidate.get("answer"), task)
        tokens = number(where, "tokens", candidate.get("tokens"))
        try:
            scores = tuple(how(score, candidate.get("step_scores")) for how in self.aggregate)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if self.outcome is not None:
            outcome = self._told(where, fields, place, candidate)
        elif asked is None or ((self.by_right or task) and not asked.answer):
            outcome = math.nan
        elif task:
            whole = candidate["whole"] if is_published(fields) else f"{asked.text}\n{text}"
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
        told = number(where, self.outcome, told)
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
        from ..scoring.scores import AGGREGATIONS, aggregate  # not above: with torch it takes seconds

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
