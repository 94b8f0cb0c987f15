"""``reflective demo``: candidates scored live as they are decoded, and what the scoring cost."""

import dataclasses
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .common import (
    FetchOption,
    JsonOption,
    SeedOption,
    TokensOption,
    check_plot,
    load_model,
    print_json,
    record,
    waiting,
)

if TYPE_CHECKING:  # at run time inside the functions, so that --help need not wait for torch
    from ..model import Generation, ReflectiveModel
    from .show import Costs

EXAMPLES = """
reflective demo
reflective demo "8 + 13 + 5" -n 32 --plot steps.png
"""


def demo(
    question: Annotated[
        str, typer.Argument(help="A sum; the default model's prompt shows it four worked ones.")
    ] = "15 + 7 + 16",
    n: Annotated[int, typer.Option("-n", min=1, help="Candidates.")] = 8,
    seed: SeedOption = 0,
    max_new_tokens: TokensOption = 64,
    plot: Annotated[Path | None, typer.Option(help="Draw the best candidate's step scores into this file.")] = None,
    fetch: FetchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Generate candidates on the embedded model, each step scored as it is decoded, and pick the best."""
    from .show import report

    console = Console()
    check_plot(plot)
    model = load_model("default", None, fetch)
    live = console if console.is_interactive and not as_json else None
    generation, costs = _run(model, question, n=n, seed=seed, max_new_tokens=max_new_tokens, console=live)
    if plot:
        from ..plot import plot_trajectory

        plot_trajectory(generation.best, plot, title=question)
    if as_json:
        print_json({**record(question, generation), "seconds": dataclasses.asdict(costs)})
    else:
        report(console, generation, costs)


def _run(
    model: "ReflectiveModel", question: str, *, n: int, seed: int | None, max_new_tokens: int, console: Console | None
) -> "tuple[Generation, Costs]":
    """Generate ``n`` candidates, show them live on ``console`` if there is one, and measure a second pass."""
    from .show import Board, Costs

    with Board(console, max_new_tokens) if console else nullcontext() as board:
        generation = model.generate(
            question, n=n, seed=seed, max_new_tokens=max_new_tokens, schedule="immediate",
            on_step=board.update if board else None,
        )  # fmt: skip
    scoring = generation.scoring_seconds
    with waiting("the finished texts once more, as the published pipeline has it, to compare"):
        second_pass = _second_pass_seconds(model, generation)
    return generation, Costs(generation.seconds - scoring, scoring, second_pass)


def _second_pass_seconds(model: "ReflectiveModel", generation: "Generation") -> float:
    """What the published pipeline would now spend: every finished text once more through the model, one at a time."""
    import torch

    from ..published import second_pass

    prompt = model.encode(generation.prompt)
    began = time.perf_counter()
    for candidate in generation.candidates:
        ids = torch.cat([prompt, torch.tensor([candidate.token_ids], device=prompt.device)], 1)
        second_pass(model, ids, prompt.shape[1])
    return time.perf_counter() - began
