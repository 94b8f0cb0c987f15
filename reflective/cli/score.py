"""``reflective score``: finished text, scored."""

import functools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..utils.outputs import partial
from .common import (
    EngineOption,
    FetchOption,
    ModelOption,
    OverwriteOption,
    RayOption,
    ReplicasOption,
    VLLMOption,
    complain,
    end,
    everywhere,
    interruptible,
    load_model,
    place,
    progress_bars,
)
from .help import FILES, MODEL, SPEED

if TYPE_CHECKING:
    from ..model import ReflectiveModel

Item = TypeVar("Item")
EXAMPLES = """
reflective score --text $'15 + 7 = 22.\\n\\nThe answer is 22.\\n\\n'
# rows of text, or of question and response; the same rows with scores
reflective score responses.jsonl -o scored.parquet --model ORG/NAME
cat responses.jsonl | reflective score > scored.jsonl
# by several heads at once
reflective score a.jsonl -o b.jsonl --head ours=heads/1 --head probe=heads/2
"""


def score(
    source: Annotated[
        str, typer.Argument(help="File of JSON or parquet, packed or not, or '-' for JSONL from stdin.")
    ] = "-",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", rich_help_panel=FILES, help="File: .jsonl, .json, .parquet, .jsonl.gz; default: JSONL on stdout."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Score this text alone instead.")] = None,
    model: ModelOption = "default",
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH", rich_help_panel=MODEL,
            help="Head, ours or a published one (STEP, SWIFT, ...), where it lies apart from the model. Given several times, each as NAME=PATH "
            "or PATH: a text is run once, and scored by each.",
        ),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(rich_help_panel=SPEED, min=1, help="Tokens a forward, padding included; texts of similar lengths go together.")
    ] = 16_384,
    overwrite: OverwriteOption = False,
    fetch: FetchOption = False,
    ray: RayOption = None,
    replicas: ReplicasOption = None,
    engine: EngineOption = "hf",
    vllm: VLLMOption = None,
) -> None:
    """Score finished text: rows of text, or of response and prompt or question (put into the model's prompt); or of responses,
    a list, which get lists.

    Every row comes back, in order, with score, n_steps, step_scores, step_spans and error; by a second head, with score_NAME and so on. Rows that cannot be scored are
    reported by number, the rest is scored, and the exit code is 1. From file to file: started again after it was killed, the
    command goes on where it was, and the output appears when it is complete.
    """
    from .. import batch

    piped = source == "-" or _is_pipe(source)  # which is read once
    run = place(ray, replicas, text is None and not piped and output is not None)
    heads = _named(head or [])
    first = next(iter(heads.values()), None)
    others = {name: everywhere(path) for name, path in list(heads.items())[1:]}
    load = functools.partial(_load, everywhere(model), everywhere(first), others, fetch, engine, vllm)
    given = {"batch_tokens": batch_tokens, "report": complain, "further": list(others)}
    if text is not None:
        arrivals = iter([list(batch.read_lines([json.dumps({"text": text}).encode()]))])
    elif piped:
        arrivals = batch.arriving(source)
    elif output is not None:
        with interruptible():
            broken = batch.score_file(load, source, output, replace=overwrite, run=run, **given)
        return end(broken, "scored")
    else:
        file = batch.open_file(source)
        given["row"] = file.row
        arrivals = batch.windows(_progress(f"{file.row}s", file.records(), len(file)))
    if output is None:
        return end(batch.score_stream(load, arrivals, sys.stdout.buffer, **given), "scored")
    if batch.form_of(output)[0] == "parquet":
        raise ValueError(
            f"output: {output} is made from a file, not from a pipe or --text; give one that ends in .jsonl"
        )
    try:
        with batch.replacing(output, overwrite, keep=True) as target:
            broken = batch.score_stream(load, arrivals, target, output=output, **given)
    except BaseException as error:
        if not isinstance(error, FileExistsError | BlockingIOError) and partial(output).exists():
            complain(f"what was scored until then is in {partial(output)}")
        raise
    end(broken, "scored")


def _load(
    model: str, head: str | None, others: dict[str, str], fetch: bool, engine: str, vllm: str | None
) -> "ReflectiveModel":
    """The model with all of the heads."""
    found = load_model(model, head, fetch, engine=engine, vllm=vllm)
    for name, path in others.items():
        found.add_head(name, path)
    return found


def _named(heads: list[str]) -> dict[str, str]:
    """Paths of heads by their names: by what is said, or by that of the file or directory.

    Raises:
        ValueError: a name comes twice.
    """
    found: dict[str, str] = {}
    for given in heads:
        name, _, path = given.rpartition("=") if not Path(given).exists() else ("", "", given)
        name = name or (Path(path).parent.name if Path(path).stem == "score_module" else Path(path).stem)
        if name in found:
            raise ValueError(f"--head {given}: the name {name!r} is taken; give NAME=PATH")
        found[name] = path
    return found


def _is_pipe(source: str) -> bool:
    return Path(source).exists() and not Path(source).is_file() and not Path(source).is_dir()


def _progress(name: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    with progress_bars() as bars:
        yield from bars.track(items, total=total, description=name)
