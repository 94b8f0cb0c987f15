"""What the candidates in finished files are worth: pass@1, votes and best of N, against N and against tokens decoded.

Neither a model nor torch is needed, but for aggregations other than the geometric mean, which come from the step scores.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from ..search.verify import Verifier
from .measures import CHOICES, Row, measured, rows_of
from .reading import Reader, named
from .report import Report

__all__ = ["CHOICES", "Report", "Row", "evaluate"]
_RESAMPLES = 2000


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
    reader = Reader(verifier, answers, outcome, pattern, task, tuple(aggregations), tokenizer, bars)
    results = [reader.result(name, files) for name, files in named(paths).items()]
    most = max(result.most() for result in results)
    sizes = [2**k for k in range(1, max(most, 1).bit_length())] if n is None else sorted({*n} - {1})
    if sizes and (sizes[0] < 1 or sizes[-1] > max(most, 1)):
        raise ValueError(f"n={sizes}: no question has so many independent candidates with a verdict; {most} at most")
    table = [measured(result, tuple(aggregations), sizes) for result in results]
    rows = []
    for result, measures in zip(results, table, strict=True):
        rows += rows_of(result, measures, table[0] if measures is not table[0] else {}, resamples, seed)
    return Report({result.name: result.counts() for result in results}, rows)
