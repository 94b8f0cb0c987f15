"""``reflective generate``: questions, answered by a strategy."""

import functools
import itertools
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..search.strategies import NAMES as STRATEGIES
from . import complete
from .common import (
    DecodingOption,
    EngineOption,
    FetchOption,
    HeadOption,
    JsonOption,
    KVOption,
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
    watched,
)
from .help import DRAWING, FILES, SPEED

if TYPE_CHECKING:  # at run time numpy, for which --help need not wait
    from ..search.candidates import SamplingSettings


EXAMPLES = """
reflective generate "15 + 7 + 16"
reflective generate --effort high --model ORG/NAME "A question" "Another"
# candidates and costs as JSON
reflective generate --json --strategy weighted_vote -n 16 "15 + 7 + 16"
# a file of questions to a file of answers; goes on where it was killed
reflective generate --input questions.jsonl -o answers.jsonl --seed 0
"""


def generate(
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions; none, or '-': one a line from stdin.")
    ] = None,
    model: ModelOption = "default",
    head: HeadOption = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", autocompletion=complete.strategies,
            help="How candidates are steered by their scores and chosen: " + ", ".join(STRATEGIES) + "; default best_of_n, with --effort "
            "select where the checkpoint has its rule."
        ),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL", autocompletion=complete.efforts,
            help="low, medium or high: 2, 8 or 32 candidates; auto: as many as needed, where the checkpoint has its rule; default medium.",
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Candidates, instead of --effort.")] = None,
    max_new_tokens: TokensOption = 512,
    thinking_budget: Annotated[
        int | None, typer.Option(min=0, help="Tokens after which thinking is ended and the answer is written.")
    ] = None,
    temperature: Annotated[
        list[float],
        typer.Option(rich_help_panel=DRAWING, min=0, help="0 decodes greedily. Given several times: one a candidate, and over again."),
    ] = [0.6],  # noqa: B006  # typer copies it
    top_p: Annotated[
        float, typer.Option(rich_help_panel=DRAWING, min=0, max=1, help="Keep the likeliest tokens whose probabilities come to this.")
    ] = 0.95,
    top_k: Annotated[int, typer.Option(rich_help_panel=DRAWING, min=0, help="Keep so many of the likeliest tokens; 0: all.")] = 0,
    min_p: Annotated[
        float, typer.Option(rich_help_panel=DRAWING, min=0, max=1, help="Keep tokens at least this part as probable as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(rich_help_panel=DRAWING, help="Above 1: make tokens of prompt and response less likely to come again.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(rich_help_panel=DRAWING, min=-2, max=2, help="Take this from the logits of tokens that the response has.")
    ] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(rich_help_panel=DRAWING, min=-2, max=2, help="The same, as often as it has them.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=DRAWING, metavar="ID=VALUE", help="Add this to the logit of a token; may be given several times."),
    ] = None,
    min_tokens: Annotated[
        int, typer.Option(rich_help_panel=DRAWING, min=0, help="Tokens of a candidate before which no end-of-sequence token comes.")
    ] = 0,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    together: Annotated[int, typer.Option(min=1, rich_help_panel=SPEED, help="Questions decoded in one batch.")] = 8,
    decoding: DecodingOption = "auto",
    kv_tokens: KVOption = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", rich_help_panel=FILES, help="File of question, prompt or problem, JSON or parquet, instead of questions here."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", rich_help_panel=FILES, help="File for the answers to --input: as of `reflective score`.")
    ] = None,
    overwrite: OverwriteOption = False,
    plot: Annotated[Path | None, typer.Option(rich_help_panel=FILES, help="Draw the (last) question's candidates into this file.")] = None,
    fetch: FetchOption = False,
    engine: EngineOption = "hf",
    vllm: VLLMOption = None,
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
    sampling: SamplingSettings = {
        "temperature": temperature[0] if len(temperature) == 1 else temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        "logit_bias": _biases(logit_bias or []), "min_tokens": min_tokens,
    }  # fmt: skip
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
                max_new_tokens=max_new_tokens, thinking_budget=thinking_budget, decoding=decoding, kv_tokens=kv_tokens, **sampling,
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
    total, done = None if by_line else len(questions), 0
    while part := list(itertools.islice(asked, 1 if by_line and sys.stdin.isatty() else together)):
        with Board(screen, max_new_tokens, total, done) if watched() else nullcontext() as board:
            results = reflective_model.generate(
                part, effort, strategy=strategy, n=n, max_new_tokens=max_new_tokens, **sampling, seed=seed,
                thinking_budget=thinking_budget, on_step=board and board.update, decoding=decoding, kv_tokens=kv_tokens,
            )  # fmt: skip
        for question, result in zip(part, results, strict=True):
            if as_json:
                print_json(record(question, result))
            else:
                print(result.text.strip(), flush=True)
                if watched():
                    screen.print(f"[dim]{summary(result)}[/]", highlight=False)
        done += len(part)
        if plot:
            results[-1].plot(plot)
        if any(result.interrupted for result in results):
            raise typer.Exit(130)


def _biases(given: list[str]) -> dict[int, float] | None:
    """What ``--logit-bias`` says, None without it.

    Raises:
        ValueError: it is no token id and number, or a token comes twice.
    """
    found: dict[int, float] = {}
    for text in given:
        token, _, value = text.partition("=")
        try:
            pair = int(token), float(value)
        except ValueError:
            raise ValueError(
                f"--logit-bias {text}: expected ID=VALUE, a token id and a number, such as 198=-5"
            ) from None
        if pair[0] in found:
            raise ValueError(f"--logit-bias {text}: token {pair[0]} has one already; give one a token")
        found |= [pair]
    return found or None


def _stdin_lines() -> Iterator[str]:
    return (line.strip() for line in sys.stdin if line.strip())
