"""What several commands share: options, the model, and what is printed."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..utils.arguments import one_of
from ..utils.outputs import json_text
from . import complete
from .help import CLUSTER, FILES, MODEL, SPEED, Command

if TYPE_CHECKING:  # at run time inside the functions, so that --help need not wait for torch
    from ..batch.run import Run
    from ..model import Generation, ReflectiveModel

_ADDRESS = re.compile(r"local|auto|ray://.*|\S+:\d+")  # what follows --ray, where that is not alone
Where = TypeVar("Where", str, str | None)
# Said by other options, or set for the scoring.
_OURS = {
    "model", "head", "fetch", "path", "engine", "untrained", "device_map", "revision", "cache_dir", "local_files_only", "hf_overrides",
    "worker_extension_cls", "additional_config",
}  # fmt: skip
_COSTS = ("strategy", "engine", "chosen_by", "seed", "tokens", "seconds", "scoring_seconds", "alive", "interrupted")
ModelOption = Annotated[
    str,
    typer.Option(
        metavar="PATH", rich_help_panel=MODEL,
        help="Directory, or ORG/NAME on the Hub, of model, tokenizer and head; 'default': SmolLM2-135M.",
    ),
]
HeadOption = Annotated[
    str | None,
    typer.Option(metavar="PATH", rich_help_panel=MODEL, help="Head and reflective.json, where they lie apart from the model."),
]  # fmt: skip
FetchOption = Annotated[
    bool, typer.Option("--fetch", rich_help_panel=MODEL, help="Download the default model's weights if they are missing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DecodingOption = Annotated[
    str,
    typer.Option(
        metavar="HOW", rich_help_panel=SPEED, autocompletion=complete.decodings,
        help="How a model of transformers is run a token: batch, seats or compiled; auto: seats on a GPU, and for long prompts."
    ),
]
KVOption = Annotated[
    int | None,
    typer.Option(
        "--kv-tokens",
        min=1,
        rich_help_panel=SPEED,
        help="Tokens whose keys and values are kept while they decode; candidates wait for more. Default: by the free memory.",
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        metavar="NAME", rich_help_panel=MODEL, autocompletion=complete.engines,
        help="Who decodes: hf, transformers in this process; vllm, a stock vLLM in this process.",
    ),
]
VLLMOption = Annotated[
    str | None,
    typer.Option(
        "--vllm", metavar="JSON", rich_help_panel=MODEL, help='Settings of --engine vllm: {"max_model_len": 4096, "tensor_parallel_size": 2}.'
    ),
]
SeedOption = Annotated[int | None, typer.Option(help="Makes the run repeatable.")]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=FILES, help="Replace the output, and what another run has left unfinished of it."),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="[ADDRESS]", rich_help_panel=CLUSTER,
        help="From file to file over a Ray cluster: HOST:PORT of its head, auto (this machine's), local (its own, the default).",
    ),
]  # fmt: skip
ReplicasOption = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=CLUSTER, help="With --ray: replicas of the model; default: one a GPU, or one a machine."),
]
TokensOption = Annotated[int, typer.Option(min=1, help="Tokens a candidate at most.")]


def load_model(
    model: str, head: str | None, fetch: bool, *, untrained: bool = False, engine: str = "hf", vllm: str | None = None
) -> "ReflectiveModel":
    """The model of ``--model``, ``--head``, ``--fetch``, ``--engine`` and ``--vllm``; ``untrained``: it may be without a head, which
    gets a new one.

    Raises:
        FileNotFoundError: no such directory. OSError, ValueError, ImportError: see ``ReflectiveModel``, ``vllm_settings``.
    """
    settings = vllm_settings(engine, vllm)
    if engine == "vllm":
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for answers and scores
    # Importing torch is the longer part for small models. Downloads have bars of their own, and vLLM has its log.
    quiet = engine == "vllm" or fetch or not (model == "default" or Path(model).is_dir())
    with nullcontext() if quiet else waiting(f"loading {'the default model' if model == 'default' else model}"):
        from ..checkpoints.hub import is_repository
        from ..model import ReflectiveModel

        if not quiet and watched():
            from transformers.utils import logging

            logging.disable_progress_bar()  # two would write over each other
        if model == "default":
            return ReflectiveModel.default(head=head, fetch=fetch, engine=engine, **settings)
        if not Path(model).is_dir() and not is_repository(model):
            raise FileNotFoundError(f"model: {model!r} is no directory; give one, ORG/NAME on the Hub, or 'default'")
        return ReflectiveModel.from_pretrained(model, head=head, untrained=untrained, engine=engine, **settings)


def vllm_settings(engine: str, given: str | None) -> dict[str, Any]:
    """What ``--vllm`` says.

    Raises:
        ValueError: an unknown ``--engine``; ``--vllm`` for another one; no JSON object; what has an option of its own.
    """
    one_of("engine", engine, ("hf", "vllm"))
    if given is None:
        return {}
    if engine != "vllm":
        raise ValueError(f"--vllm: these are settings of vLLM, and the engine is {engine!r}; add --engine vllm")
    try:
        settings = json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"--vllm {given!r}: no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f'--vllm {given!r}: expected a JSON object, such as {{"max_model_len": 4096}}')  # noqa: TRY004
    if own := sorted(_OURS & settings.keys()):
        raise ValueError(f"--vllm: {', '.join(own)}: not by --vllm; model and head have options of their own")
    return settings


class RayCommand(Command):
    """A command whose ``--ray`` needs no value: without one it is ``RAY_ADDRESS``, or a cluster of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for i, argument in enumerate(args):
            given.append(argument)
            if argument == "--":
                given += args[i + 1 :]
                break
            if argument == "--ray" and not _ADDRESS.fullmatch("".join(args[i + 1 : i + 2])):
                given.append(os.environ.get("RAY_ADDRESS") or "local")
        return super().parse_args(ctx, given)


def place(ray: str | None, replicas: int | None, files: bool) -> "Run":
    """Where ``--ray`` and ``--replicas`` have the work done that goes from file to file, as ``files`` says whether it does.

    Raises:
        ValueError: it does not, or what ``Cluster`` refuses. ImportError: Ray is not installed.
    """
    if ray is None:
        if replicas is not None:
            raise ValueError("--replicas is for --ray; give both, or neither")
        from ..batch.run import here

        return here
    if not files:
        raise ValueError("--ray works from a file to a file, not on a pipe, a text or the terminal; give both files")
    from ..batch.cluster import Cluster

    return Cluster(ray, replicas)


def everywhere(path: Where) -> Where:
    """A directory by a name that other processes know too; a repository, or None, as it is."""
    return os.path.abspath(path) if path is not None and Path(path).is_dir() else path


def check_plot(path: Path | None) -> None:
    """Raises where a picture cannot be drawn into ``path``, see ``plot.image``: before the work that it shows."""
    if path:
        from ..plot import image

        image(path)


def record(question: str, generation: "Generation") -> dict[str, Any]:
    """What ``--json`` prints of a question: its answer, all candidates and what they cost."""
    return {
        "question": question,
        "best": generation.candidates.index(generation.best),
        "text": generation.text,
        "score": generation.score,
        "candidates": [c.record() for c in generation.candidates],
        **{name: getattr(generation, name) for name in _COSTS},
    }


def print_json(value: Any) -> None:
    """A line of JSON on stdout."""
    print(json_text(value), flush=True)


def progress_bars() -> Progress:
    """Progress on stderr, with rate and remaining time, for people only: see ``watched``."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), Rate(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=Console(stderr=True), disable=not watched(), transient=True, expand=True,
    )  # fmt: skip


def watched() -> bool:
    """Whether somebody watches stderr, on a terminal that can redraw a line. Colours are another matter: NO_COLOR is rich's to heed."""
    return sys.stderr.isatty() and (os.name == "nt" or os.environ.get("TERM", "") not in ("", "dumb", "unknown"))


class Rate(ProgressColumn):
    """How many a second, or seconds for each."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:,.1f}/s" if speed >= 1 else f"{1 / speed:,.1f} s each", "progress.data.speed")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Within, ``what`` and the seconds since are shown to who watches: for what cannot tell how far it is."""
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True), disable=not watched(), transient=True
    ) as bar:  # fmt: skip
        bar.add_task(what, total=None)
        yield


def complain(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr)


def end(broken: int, done: str) -> None:
    """Ends the command with exit code 1 where rows of its input were ``broken``, and could not be ``done``."""
    if broken:
        complain(f"{broken} row(s) could not be {done}")
        raise typer.Exit(1)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C ends the command with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        complain("interrupted; what is done is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
