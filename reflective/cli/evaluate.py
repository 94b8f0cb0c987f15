"""``reflective eval``: what candidates in files are worth."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..utils.outputs import destination
from . import complete
from .common import JsonOption, check_plot, print_json, progress_bars
from .help import FILES

EXAMPLES = """
reflective eval answers.jsonl --answers questions.jsonl
# two results compared, at 1, 8 and 32 candidates, with a picture
reflective eval ours.jsonl theirs.jsonl -n 1 -n 8 -n 32 --plot worth.png
# files of the published code, and a verifier of one's own
reflective eval "results/*.json" --task aime24
reflective eval answers.jsonl --verifier my_checks:is_right
"""


def evaluate(
    results: Annotated[
        list[str], typer.Argument(help="Files of candidates, JSON or parquet; a quoted pattern is one result.")
    ],
    answers: Annotated[
        Path | None, typer.Option(rich_help_panel=FILES, help="JSONL or parquet file of question and answer; default: the files' own answers.")
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(metavar="NAME", autocompletion=complete.verifiers, 
            help="answer, exact, math, reasoning-gym:DATASET or MODULE:FUNCTION: judges candidates. Default: answer, and for "
            "files of the published code the verdicts of its compute_metric.py."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", autocompletion=complete.metrics, 
            help="aime24, aime25, ceval: whose verdicts of the published compute_metric.py; default: as its files tell."
        ),
    ] = None,
    outcome: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of 1, 0 or null, in place of a verifier.")] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Regular expression whose first group is a response's answer.")
    ] = None,
    aggregation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", autocompletion=complete.aggregations, help="geometric_mean (default), mean, min, last, product; may be given several times."),
    ] = None,
    n: Annotated[
        list[int] | None,
        typer.Option("-n", min=1, help="Candidates; default powers of two; may be given several times."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(rich_help_panel=FILES, help="tokenizer.json or its directory, for files without counts of tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 0,
    csv: Annotated[Path | None, typer.Option(rich_help_panel=FILES, help="Write every number into this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(rich_help_panel=FILES, help="Draw accuracy against N and against tokens decoded into this file.")
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
