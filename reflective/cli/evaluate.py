"""``reflective eval``: what candidates in files are worth."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..utils.outputs import destination
from .common import JsonOption, check_plot, print_json, progress_bars


def evaluate(
    results: Annotated[
        list[str], typer.Argument(help="Files of candidates, JSON or parquet; a quoted pattern is one result.")
    ],
    answers: Annotated[
        Path | None, typer.Option(help="JSONL or parquet file of question and answer; default: the files' own answers.")
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="answer, exact, math, reasoning-gym:DATASET or MODULE:FUNCTION: judges candidates. Default: answer, and for "
            "files of the published code the verdicts of its compute_metric.py."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="aime24, aime25, ceval: whose verdicts of the published compute_metric.py; default: as its files tell."
        ),
    ] = None,
    outcome: Annotated[str | None, typer.Option(help="Column of 1, 0 or null, in place of a verifier.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose first group is a response's answer.")
    ] = None,
    aggregation: Annotated[
        list[str] | None,
        typer.Option(help="geometric_mean (default), mean, min, last, product; may be given several times."),
    ] = None,
    n: Annotated[
        list[int] | None,
        typer.Option("-n", min=1, help="Candidates; default powers of two; may be given several times."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or its directory, for files without counts of tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Write every number into this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw accuracy against N and against tokens decoded into this file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what candidates are worth: pass@1, any, majority, weighted vote and best of N, with 95 % intervals.

    Reads what `reflective generate` and `reflective score` write, and the files of the published inference.py. Results after
    the first are told with their differences from it.
    """
    from ..evaluate import evaluate as run

    if csv:
        destination(csv, what="csv")
    check_plot(plot)
    with progress_bars() as bars:
        report = run(
            results, answers=answers, verifier=verifier, outcome=outcome, pattern=pattern, task=task, n=n,
            aggregations=aggregation or ["geometric_mean"], tokenizer=tokenizer, seed=seed, bars=bars,
        )  # fmt: skip
    if csv:
        report.write_csv(csv)
    if plot:
        report.plot(plot)
    if as_json:
        print_json(report.json())
    else:
        Console().print(report.table())
