"""The command line: ``reflective``, a file for each of its commands.

Torch and transformers are imported within the commands, so that ``--help`` need not wait for them.
"""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from . import bench, demo, doctor, evaluate, generate, score, serve, train
from .common import RayCommand

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Score an LLM's reasoning while the LLM decodes it.",
)  # fmt: skip


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


app.command()(demo.demo)  # in the order of --help
app.command(cls=RayCommand)(generate.generate)
app.command(cls=RayCommand)(score.score)
app.command("eval")(evaluate.evaluate)
app.command()(serve.serve)
app.command()(train.train)
app.command()(bench.bench)
app.command()(doctor.doctor)
