"""The command line."""

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .search.strategies import NAMES as STRATEGIES
from .train.settings import Settings
from .utils.outputs import destination, json_text, partial

if TYPE_CHECKING:  # at run time inside the commands, so that --help need not wait for torch
    from .model import Generation, ReflectiveModel

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Score an LLM's reasoning while the LLM decodes it.",
)  # fmt: skip

Item = TypeVar("Item")
_COSTS = ("strategy", "chosen_by", "seed", "tokens", "seconds", "scoring_seconds", "alive", "interrupted")
ModelOption = Annotated[
    str, typer.Option(help="Directory, or ORG/NAME on the Hub, of model, tokenizer and head; 'default': SmolLM2-135M.")
]
HeadOption = Annotated[str | None, typer.Option(help="Head and reflective.json, where they lie apart from the model.")]
FetchOption = Annotated[bool, typer.Option("--fetch", help="Download the default model's weights if they are missing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes the run repeatable.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output, and what another run has left unfinished of it.")
]
TokensOption = Annotated[int, typer.Option(min=1, help="Tokens a candidate at most.")]


def main() -> None:
    """Entry point: bad input ends in one line on stderr and exit code 2, not in a traceback."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # before transformers is imported: tqdm reads it then
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
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
    from . import demo as show

    console = Console()
    _check_plot(plot)
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
    as_json: JsonOption = False,
) -> None:
    """Answer questions, by the best of N or another strategy. On a terminal the candidates are shown live.

    Prints the chosen text; --json prints every candidate and what the run cost, a line a question. Ctrl-C prints what there
    is and ends with exit code 130.

    From --input to --output: every row comes back, in order, with text, score, best, candidates, strategy, seed, tokens and
    error. Started again after it was killed, the command goes on where it was; the output appears when it is complete, and a
    seed repeats it. Rows without a question are reported by number, the rest is answered, and the exit code is 1.
    """
    if source is not None or output is not None:
        if source is None or output is None:
            raise ValueError(
                "--input and --output go together: the one holds questions, the other is to hold the answers"
            )
        if questions or plot or as_json:
            raise ValueError("--input takes the place of questions, and --plot and --json are for these alone")
        from . import batch

        with _interruptible():
            broken = batch.generate_file(
                functools.partial(_load, model, head, fetch), source, output, effort=effort, strategy=strategy, n=n,
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, thinking_budget=thinking_budget,
                seed=seed, together=together, replace=overwrite, report=_complain,
            )  # fmt: skip
        return _end(broken, "answered")
    _check_plot(plot)
    by_line = not questions or questions == ["-"]
    asked = _stdin_lines() if by_line else iter(questions)
    reflective_model = _load(model, head, fetch)
    screen = Console(stderr=True)
    while part := list(itertools.islice(asked, 1 if by_line and sys.stdin.isatty() else together)):
        with _board(screen) if screen.is_terminal else nullcontext() as board:
            results = reflective_model.generate(
                part, effort, strategy=strategy, n=n, max_new_tokens=max_new_tokens, temperature=temperature,
                top_p=top_p, seed=seed, thinking_budget=thinking_budget, on_step=board and board.update,
            )  # fmt: skip
        for question, result in zip(part, results, strict=True):
            if as_json:
                _print_json(_record(question, result))
            else:
                print(result.text.strip(), flush=True)
                if screen.is_terminal:
                    screen.print(f"[dim]{_costs(result)}[/]", highlight=False)
        if plot:
            results[-1].plot(plot)
        if any(result.interrupted for result in results):
            raise typer.Exit(130)


@app.command()
def score(
    source: Annotated[
        str, typer.Argument(help="File of JSON or parquet, packed or not, or '-' for JSONL from stdin.")
    ] = "-",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File: .jsonl, .json, .parquet, .jsonl.gz; default: JSONL on stdout."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Score this text alone instead.")] = None,
    model: ModelOption = "default",
    head: HeadOption = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens a forward, padding included; texts of similar lengths go together.")
    ] = 16_384,
    overwrite: OverwriteOption = False,
    fetch: FetchOption = False,
) -> None:
    """Score finished text: rows of text, or of response and prompt or question (put into the model's prompt); or of responses,
    a list, which get lists.

    Every row comes back, in order, with score, n_steps, step_scores, step_spans and error. Rows that cannot be scored are
    reported by number, the rest is scored, and the exit code is 1. From file to file: started again after it was killed, the
    command goes on where it was, and the output appears when it is complete.
    """
    from . import batch

    load = functools.partial(_load, model, head, fetch)
    given = {"batch_tokens": batch_tokens, "report": _complain}
    if text is not None:
        arrivals = iter([list(batch.read_lines([json.dumps({"text": text}).encode()]))])
    elif source == "-" or _is_pipe(source):  # which is read once
        arrivals = batch.arriving(source)
    elif output is not None:
        with _interruptible():
            broken = batch.score_file(load, source, output, replace=overwrite, **given)
        return _end(broken, "scored")
    else:
        file = batch.open_file(source)
        given["row"] = file.row
        arrivals = batch.windows(_progress(f"{file.row}s", file.records(), len(file)))
    if output is None:
        return _end(batch.score_stream(load, arrivals, sys.stdout.buffer, **given), "scored")
    if batch.form_of(output)[0] == "parquet":
        raise ValueError(
            f"output: {output} is made from a file, not from a pipe or --text; give one that ends in .jsonl"
        )
    try:
        with batch.replacing(output, overwrite, keep=True) as target:
            broken = batch.score_stream(load, arrivals, target, output=output, **given)
    except BaseException as error:
        if not isinstance(error, FileExistsError | BlockingIOError) and partial(output).exists():
            _complain(f"what was scored until then is in {partial(output)}")
        raise
    _end(broken, "scored")


@app.command("eval")
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
    from .evaluate import evaluate as run

    if csv:
        destination(csv, what="csv")
    _check_plot(plot)
    with _bars() as bars:
        report = run(
            results, answers=answers, verifier=verifier, outcome=outcome, pattern=pattern, task=task, n=n,
            aggregations=aggregation or ["geometric_mean"], tokenizer=tokenizer, seed=seed, bars=bars,
        )  # fmt: skip
    if csv:
        report.write_csv(csv)
    if plot:
        report.plot(plot)
    if as_json:
        _print_json(report.json())
    else:
        Console().print(report.table())


@app.command()
def serve(
    model: ModelOption = "default",
    head: HeadOption = None,
    host: Annotated[str, typer.Option(help="Address; other machines reach the server on 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="REFLECTIVE_API_KEY", help="What clients must send as a bearer token.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, for clients; default: that of its directory.")] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Candidates decoded together.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait; more are answered with 503.")] = 64,
    max_candidates: Annotated[int, typer.Option(min=1, help="Of a request.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 8 << 20,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds for a request; default: no limit.")] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish in at shutdown.")] = 30.0,
    fetch: FetchOption = False,
) -> None:
    """Serve MetaStone-S1's /score and /generate, OpenAI's /v1/chat/completions and vLLM's /pooling and /score.

    Requests that come at the same time are decoded in one batch. /health and /metrics (Prometheus) tell how it goes.
    """
    try:
        from .serve.app import serve as run
        from .serve.service import Limits
    except ModuleNotFoundError as error:
        raise ImportError(f"the server needs {error.name}: pip install 'reflective-kernels[serve]'") from error

    limits = Limits(body_bytes=max_body, candidates=max_candidates, seconds=timeout)
    run(
        _load(model, head, fetch), host, port, api_key=api_key, name=name, limits=limits, batch_rows=batch_rows,
        max_queue=max_queue, grace=grace,
    )  # fmt: skip


@app.command()
def train(
    output: Annotated[
        Path, typer.Argument(help="Directory for head or model, rollouts and report; an interrupted run goes on there.")
    ],
    model: ModelOption = "default",
    way: Annotated[
        str,
        typer.Option(help="head: the head alone; backbone: LoRA or all weights too; joint: policy and head, by GRPO."),
    ] = Settings.way,
    task: Annotated[
        str,
        typer.Option(help="sums, chain_sum, reasoning-gym:DATASET, or a JSONL or parquet file of question and answer."),
    ] = Settings.task,
    verifier: Annotated[
        str | None,
        typer.Option(help="answer (default), exact, math, reasoning-gym:DATASET or MODULE:FUNCTION: judges responses."),
    ] = Settings.verifier,
    data: Annotated[
        str | None,
        typer.Option(help="JSONL or parquet file of prompt, response and outcome, to learn from these; no --task."),
    ] = Settings.data,
    questions: Annotated[int, typer.Option(min=2, help="Questions to learn from.")] = Settings.questions,
    eval_questions: Annotated[
        int, typer.Option(min=1, help="Other questions to measure on; of --data a third at most.")
    ] = Settings.eval_questions,
    samples: Annotated[int, typer.Option(min=2, help="Responses to each question.")] = Settings.samples,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the responses.")] = Settings.temperature,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = Settings.top_p,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a response at most.")] = Settings.max_new_tokens,
    batch_rows: Annotated[int, typer.Option(min=1, help="Responses decoded together.")] = Settings.batch_rows,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of the head over the rollouts.")] = Settings.epochs,
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Epochs (head) or steps in plain BCE before dynamic weights; default: never dynamic; 0: as published.",
        ),
    ] = Settings.warmup,
    lr: Annotated[float, typer.Option(min=0, help="Of the head.")] = Settings.lr,
    batch: Annotated[int, typer.Option(min=1, help="Responses an optimizer step.")] = Settings.batch,
    within_questions: Annotated[
        bool, typer.Option(help="Use only questions answered both ways, their two sides weighted equally.")
    ] = Settings.within_questions,
    class_balance: Annotated[
        bool, typer.Option(help="Weigh the outcomes of a batch against each other.")
    ] = Settings.class_balance,
    width: Annotated[
        int | None, typer.Option(min=1, help="Hidden units of the head; default twice the hidden size.")
    ] = Settings.width,
    continue_head: Annotated[
        str | None, typer.Option(help="Go on from this head, which may be a published one.")
    ] = Settings.continue_head,
    lora: Annotated[int, typer.Option(min=1, help="Rank of the LoRA layers (backbone, joint).")] = Settings.lora,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of LoRA layers.")] = False,
    backbone_lr: Annotated[
        float, typer.Option(min=0, help="Of LoRA layers or backbone (backbone, joint).")
    ] = Settings.backbone_lr,
    backbone_epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the rollouts (backbone).")
    ] = Settings.backbone_epochs,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps (joint).")] = Settings.steps,
    group: Annotated[int, typer.Option(min=2, help="Answers to each question of a step (joint).")] = Settings.group,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a second forward (backbone, joint).")
    ] = Settings.gradient_checkpointing,
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16 or float32, for rollouts and training; auto: the model's for rollouts, bfloat16 to train."
        ),
    ] = Settings.dtype,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = Settings.seed,
    published: Annotated[
        bool, typer.Option("--published", help="Write score_module.pt too, which the published code reads.")
    ] = Settings.published,
    fetch: FetchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a head from outcomes alone, or the model with it, and report on unseen questions.

    Works under `accelerate launch` too. Started again, an interrupted run goes on and a finished one prints its report.
    """
    given = {**locals(), "lora": None if full else lora}
    settings = Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})
    from .train.run import is_main_process, table
    from .train.run import train as run

    with _bars() as bars:
        report = run(_load(model, None, fetch, untrained=True), settings, output, bars)
    if not is_main_process():
        return
    if as_json:
        _print_json(report)
    else:
        Console().print(table(report))


@app.command()
def bench(
    op: Annotated[
        list[str] | None, typer.Option(help="Only this op; may be given several times, as may the next four.")
    ] = None,
    width: Annotated[list[int] | None, typer.Option("-H", "--width", min=8, help="Hidden size.")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=0, help="Rows, sequences that end a step, or texts.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16 or float8_e4m3fn.")] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(help="cuda, triton, cpu, expression, cublas, compile or published.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: a GPU if there is one.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Time for each measurement.")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds after which no further cell is begun.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few repetitions: does everything work?")] = False,
    out: Annotated[Path, typer.Option(help="Directory for the CSV file and the plots.")] = Path("reflective-bench"),
    as_json: JsonOption = False,
) -> None:
    """Measure every op against PyTorch, torch.compile and the published pipeline's way, each cell behind a correctness gate.

    Exit code 1 if one of our implementations failed its gate; everything else is measured all the same.
    """
    from reflective.benchmarks import command

    chosen = {
        "ops": op, "widths": width, "rows": rows, "dtypes": dtype, "implementations": implementation,
        "seconds": seconds, "budget": budget,
    }  # fmt: skip
    given = {
        name: value if isinstance(value, float) else tuple(value) for name, value in chosen.items() if value is not None
    }
    with _bars() as bars:
        results = command.run(device, quick, given, out, bars)
    if as_json:
        for row in results.rows:
            _print_json(row)
    else:
        results.show(Console(width=None if sys.stdout.isatty() else 180))
    if results.red:
        raise typer.Exit(1)


def _load(model: str, head: str | None, fetch: bool, *, untrained: bool = False) -> "ReflectiveModel":
    from .checkpoints.hub import is_repository
    from .model import ReflectiveModel

    if model == "default":
        return ReflectiveModel.default(head=head, fetch=fetch)
    if not Path(model).is_dir() and not is_repository(model):
        raise FileNotFoundError(f"model: {model!r} is no directory; give one, ORG/NAME on the Hub, or 'default'")
    return ReflectiveModel.from_pretrained(model, head=head, untrained=untrained)


def _check_plot(path: Path | None) -> None:
    """Raises where a picture cannot be drawn into ``path``: before the work that it shows."""
    if path:
        from .plot import image

        image(path)


def _is_pipe(source: str) -> bool:
    return Path(source).exists() and not Path(source).is_file() and not Path(source).is_dir()


def _record(question: str, generation: "Generation") -> dict[str, Any]:
    return {
        "question": question,
        "best": generation.candidates.index(generation.best),
        "text": generation.text,
        "score": generation.score,
        "candidates": [c.record() for c in generation.candidates],
        **{name: getattr(generation, name) for name in _COSTS},
    }


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


def _end(broken: int, done: str) -> None:
    if broken:
        _complain(f"{broken} row(s) could not be {done}")
        raise typer.Exit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _complain("interrupted; what is done is kept, and the same command goes on from there")
        raise typer.Exit(130) from None


def _costs(result: "Generation") -> str:
    from .demo import chosen_by

    stopped = sum(c.status == "stopped" for c in result.candidates)
    return (
        f"{result.strategy}{chosen_by(result)}: {result.tokens} tokens, {len(result.candidates)} candidates, {stopped} of them stopped, "
        f"{result.seconds:.1f} s, {1e3 * result.scoring_seconds:.1f} ms of it scoring"
    )


def _board(console: Console) -> Any:
    from .demo import Board

    return Board(console)


def _print_json(value: Any) -> None:
    print(json_text(value), flush=True)


def _stdin_lines() -> Iterator[str]:
    return (line.strip() for line in sys.stdin if line.strip())


def _bars() -> Progress:
    """Progress on stderr, for people only: nothing is drawn when stderr is piped."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def _progress(name: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    with _bars() as bars:
        yield from bars.track(items, total=total, description=name)
