"""The command line."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:  # imported late at run time: torch and transformers take seconds, --help should not
    from .model import Generation, ReflectiveModel

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Score an LLM's reasoning while the LLM decodes it.",
)  # fmt: skip

ModelOption = Annotated[
    str, typer.Option(help="Directory or Hub id of model, tokenizer and head; 'default' is the embedded SmolLM2-135M.")
]
HeadOption = Annotated[Path | None, typer.Option(help="Head and reflective.json, where they lie apart from the model.")]
FetchOption = Annotated[bool, typer.Option("--fetch", help="Download the default model's weights if they are missing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes the run repeatable.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Tokens a candidate at most.")]


def main() -> None:
    """Entry point: bad input ends in one line on stderr and exit code 2, not in a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError, ImportError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _plain(error: BaseException) -> str:
    from rich.markup import escape

    return escape(str(error))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="With --version: what each backend can do.")] = False,
) -> None:
    if version:
        import reflective

        print(f"reflective {reflective.__version__}")
        if verbose:
            for name, info in reflective.backends().items():
                print(f"  {name:7}{'yes' if info.available else 'no ':4} {info.detail}")
        raise typer.Exit


@app.command()
def demo(
    question: Annotated[str, typer.Argument(help="A sum; the default model's prompt shows it four worked ones.")] = "8 + 13 + 6",
    n: Annotated[int, typer.Option("-n", min=1, help="Candidates.")] = 8,
    seed: SeedOption = 0,
    max_new_tokens: TokensOption = 64,
    plot: Annotated[Path | None, typer.Option(help="Draw the best candidate's step scores into this file.")] = None,
    fetch: FetchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Generate candidates on the embedded model, each step scored as it is decoded, and pick the best."""
    from . import demo as show

    console = Console()
    model = _load("default", None, fetch)
    live = console if console.is_terminal and not as_json else None
    generation, costs = show.run(model, question, n=n, seed=seed, max_new_tokens=max_new_tokens, console=live)
    if plot:
        from .plot import plot_trajectory

        plot_trajectory(generation.best, plot, title=question)
    if as_json:
        _print_json({**_record(question, generation), "seconds": dataclasses.asdict(costs)})
    else:
        show.report(console, generation, costs)


@app.command()
def generate(
    questions: Annotated[list[str] | None, typer.Argument(help="Questions; none, or '-': one a line from stdin.")] = None,
    model: ModelOption = "default",
    head: HeadOption = None,
    effort: Annotated[str, typer.Option(help="low, medium or high: 2, 8 or 32 candidates.")] = "medium",
    n: Annotated[int | None, typer.Option("-n", help="Candidates, instead of --effort.")] = None,
    max_new_tokens: TokensOption = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: SeedOption = None,
    fetch: FetchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer questions, best of N by score. Prints the chosen text; --json prints every candidate, a line a question."""
    asked = _stdin_lines() if not questions or questions == ["-"] else questions
    reflective_model = _load(model, head, fetch)
    for question in _progress("questions", asked):
        result = reflective_model.generate(
            question, effort, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        if as_json:
            _print_json(_record(question, result))
        else:
            print(result.text.strip(), flush=True)


@app.command()
def score(
    source: Annotated[str, typer.Argument(help="JSONL file, or '-' for stdin.")] = "-",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSONL file; default stdout.")] = None,
    text: Annotated[str | None, typer.Option(help="Score this text alone instead.")] = None,
    model: ModelOption = "default",
    head: HeadOption = None,
    fetch: FetchOption = False,
) -> None:
    """Score finished text: lines {"text"}, {"prompt", "response"} or {"question", "response"} (put into the model's prompt).

    Every line comes back with score, n_steps, step_scores and step_spans. Broken lines are reported by number, the rest is
    scored, and the exit code is 1.
    """
    if text is None and source != "-" and not Path(source).is_file():
        raise FileNotFoundError(f"source: {source!r} does not exist; give a JSONL file, '-' for stdin, or --text")
    reflective_model = _load(model, head, fetch)
    lines = [json.dumps({"text": text})] if text is not None else _lines(source)
    broken = 0
    with open(output, "w", encoding="utf-8") if output else nullcontext(sys.stdout) as target:
        for number, line in enumerate(_progress("lines", lines), 1):
            if not line.strip():
                continue
            try:
                scored = _score_line(reflective_model, line)
                print(json.dumps(scored), file=target, flush=True)
                fault = scored["error"]
            except ValueError as error:
                fault = str(error)
            if fault:
                broken += 1
                print(f"line {number}: {fault}", file=sys.stderr)
    if broken:
        print(f"{broken} line(s) could not be scored", file=sys.stderr)
        raise typer.Exit(1)


def _score_line(model: "ReflectiveModel", line: str) -> dict[str, Any]:
    record = json.loads(line)  # its JSONDecodeError is a ValueError
    fields = record if isinstance(record, dict) else {}
    wrong = [k for k in ("text", "prompt", "question", "response") if not isinstance(fields.get(k, ""), str)]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected a string, found {type(fields[wrong[0]]).__name__}")
    if "text" in fields:
        prompt, response = "", fields["text"]
    elif "response" in fields and ("prompt" in fields or "question" in fields):
        prompt = fields["prompt"] if "prompt" in fields else model.format(fields["question"])
        response = fields["response"]
    else:
        raise ValueError("expected an object with text, or with response and prompt or question")
    if not response:
        raise ValueError("there is no text to score: it is empty")
    (candidate,) = model.score(prompt, [response])
    return {
        **record,
        "score": None if candidate.error else candidate.score,  # JSON has no NaN
        "n_steps": len(candidate.step_scores),
        "step_scores": [None if math.isnan(s) else s for s in candidate.step_scores],
        "step_spans": candidate.step_spans,
        "error": candidate.error,
    }


@app.command()
def train(
    output: Annotated[Path, typer.Argument(help="Directory for rollouts, head and report; an interrupted run goes on there.")],
    model: ModelOption = "default",
    task: Annotated[str, typer.Option(help="sums, chain_sum (reasoning-gym), or a JSONL file of question and answer.")] = "sums",
    questions: Annotated[int, typer.Option(min=2, help="Questions to train on.")] = 640,
    eval_questions: Annotated[int, typer.Option(min=1, help="Other questions to measure on.")] = 320,
    samples: Annotated[int, typer.Option(min=2, help="Responses to each question.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.7,
    max_new_tokens: TokensOption = 64,
    epochs: Annotated[int, typer.Option(min=1)] = 16,
    warmup: Annotated[int, typer.Option(min=0, help="Epochs in plain BCE before the dynamic weights switch on.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Trajectories decoded together.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    fetch: FetchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a head from outcomes alone: roll out with the scorer recording features, fit, report on unseen questions."""
    from . import train as training

    reflective_model = _load(model, None, fetch, untrained=True)
    settings = training.Settings(
        task=task, questions=questions, eval_questions=eval_questions, samples=samples, temperature=temperature,
        max_new_tokens=max_new_tokens, epochs=epochs, warmup=warmup, batch=batch, seed=seed,
    )  # fmt: skip
    with _bars() as bars:
        metrics = training.train(reflective_model, settings, output, bars)
    if as_json:
        _print_json({k: dataclasses.asdict(m) for k, m in metrics.items()})
    else:
        Console().print(training.table(metrics))


def _load(model: str, head: Path | None, fetch: bool, *, untrained: bool = False) -> "ReflectiveModel":
    from transformers.utils import logging

    from .model import ReflectiveModel

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if model == "default":
        return ReflectiveModel.default(fetch=fetch)
    return ReflectiveModel.from_pretrained(model, head=head, untrained=untrained)


def _record(question: str, generation: "Generation") -> dict[str, Any]:
    return {
        "question": question,
        "best": generation.candidates.index(generation.best),
        "text": generation.text,
        "score": generation.score,
        "candidates": [dataclasses.asdict(c) for c in generation.candidates],
    }


def _print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _lines(source: str) -> Iterable[str]:
    return sys.stdin if source == "-" else Path(source).read_text(encoding="utf-8").splitlines()


def _stdin_lines() -> Iterator[str]:
    return (line.strip() for line in sys.stdin if line.strip())


def _bars() -> Progress:
    """Progress on stderr, for people only: nothing is drawn when stderr is piped."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def _progress(name: str, items: Iterable[str]) -> Iterator[str]:
    with _bars() as bars:
        yield from bars.track(items, total=len(items) if isinstance(items, list) else None, description=name)
