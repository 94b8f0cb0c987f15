"""``reflective generate``: questions, answered by a strategy."""

import functools
import itertools
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..search.strategies import NAMES as STRATEGIES
from .common import (
    EngineOption,
    FetchOption,
    HeadOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    RayOption,
    ReplicasOption,
    SeedOption,
    TokensOption,
    VLLMOption,
    check_plot,
    complain,
    end,
    everywhere,
    interruptible,
    load_model,
    place,
    print_json,
    record,
)


def generate(
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions; none, or '-': one a line from stdin.")
    ] = None,
    model: ModelOption = "default",
    head: HeadOption = None,
    strategy: Annotated[
        str, typer.Option(help="How candidates are steered by their scores and chosen: " + ", ".join(STRATEGIES) + ".")
    ] = "best_of_n",
    effort: Annotated[
        str | None, typer.Option(help="low, medium or high: 2, 8 or 32 candidates; default medium.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Candidates, instead of --effort.")] = None,
    max_new_tokens: TokensOption = 512,
    thinking_budget: Annotated[
        int | None, typer.Option(min=0, help="Tokens after which thinking is ended and the answer is written.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: SeedOption = None,
    together: Annotated[int, typer.Option(min=1, help="Questions decoded in one batch.")] = 8,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", help="File of question, prompt or problem, JSON or parquet, instead of questions here."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for the answers to --input: as of `reflective score`.")
    ] = None,
    overwrite: OverwriteOption = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the (last) question's candidates into this file.")] = None,
    fetch: FetchOption = False,
    engine: EngineOption = "hf",
    vllm: VLLMOption = None,
    as_json: JsonOption = False,
    ray: RayOption = None,
    replicas: ReplicasOption = None,
) -> None:
    """Answer questions, by the best of N or another strategy. On a terminal the candidates are shown live.

    Prints the chosen text; --json prints every candidate and what the run cost, a line a question. Ctrl-C prints what there
    is and ends with exit code 130.

    From --input to --output: every row comes back, in order, with text, score, best, candidates, strategy, seed, tokens and
    error. Started again after it was killed, the command goes on where it was; the output appears when it is complete, and a
    seed repeats it. Rows without a question are reported by number, the rest is answered, and the exit code is 1.
    """
    run = place(ray, replicas, source is not None and output is not None)
    if source is not None or output is not None:
        if source is None or output is None:
            raise ValueError(
                "--input and --output go together: the one holds questions, the other is to hold the answers"
            )
        if questions or plot or as_json:
            raise ValueError("--input takes the place of questions, and --plot and --json are for these alone")
        from .. import batch

        with interruptible():
            broken = batch.generate_file(
                functools.partial(load_model, everywhere(model), everywhere(head), fetch, engine=engine, vllm=vllm), source, output,
                effort=effort, strategy=strategy, n=n,
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, thinking_budget=thinking_budget,
                seed=seed, together=together, replace=overwrite, report=complain,
                run=run,
            )  # fmt: skip
        return end(broken, "answered")
    check_plot(plot)
    by_line = not questions or questions == ["-"]
    asked = _stdin_lines() if by_line else iter(questions)
    reflective_model = load_model(model, head, fetch, engine=engine, vllm=vllm)
    from .show import Board, summary  # with torch, which the model has brought

    screen = Console(stderr=True)
    while part := list(itertools.islice(asked, 1 if by_line and sys.stdin.isatty() else together)):
        with Board(screen) if screen.is_terminal else nullcontext() as board:
            results = reflective_model.generate(
                part, effort, strategy=strategy, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                top_p=top_p, seed=seed, thinking_budget=thinking_budget, on_step=board and board.update,
            )  # fmt: skip
        for question, result in zip(part, results, strict=True):
            if as_json:
                print_json(record(question, result))
            else:
                print(result.text.strip(), flush=True)
                if screen.is_terminal:
                    screen.print(f"[dim]{summary(result)}[/]", highlight=False)
        if plot:
            results[-1].plot(plot)
        if any(result.interrupted for result in results):
            raise typer.Exit(130)


def _stdin_lines() -> Iterator[str]:
    return (line.strip() for line in sys.stdin if line.strip())
