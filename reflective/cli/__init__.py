"""The command line: ``reflective``, a file for each of its commands.

Torch and transformers are imported within the commands, so that ``--help`` need not wait for them.
"""

import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from . import bench, demo, doctor, evaluate, generate, score, serve, train, view
from .common import RayCommand, watched
from .help import ANSWER, EXIT_CODES, READ, TRAIN, Command, Commands

app = typer.Typer(
    cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Score an LLM's reasoning while the LLM decodes it.", epilog=EXIT_CODES,
)  # fmt: skip
_REFUSED: Any = typer.BadParameter.__mro__[2]  # click's ClickException, or that of the click within typer


def main() -> None:
    """Entry point: whatever ends badly ends in one line on stderr and an exit code, not in a traceback.

    0: done. 1: some rows could not be done, or a check failed. 2: bad input, or something is missing. 130: interrupted.
    """
    if not watched():
        os.environ.setdefault("TQDM_DISABLE", "1")  # before transformers is imported: tqdm reads it then
    try:
        code = app(standalone_mode=False)
    except _REFUSED as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            print(error.format_message())
        else:
            context = getattr(error, "ctx", None)
            _complain(f"{error.format_message()}" + (f" ({context.command_path.removeprefix('python -m ')} --help)" if context else ""))
        sys.exit(error.exit_code)
    except typer.Abort:  # at a question
        _complain("aborted")
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        _complain(str(error))
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(text: str) -> None:
    from rich.markup import escape

    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version; with -v what each backend can do.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", hidden=True, help="With --version: what each backend can do.")] = False,
) -> None:
    if version:
        import reflective

        print(f"reflective {reflective.__version__}")
        if verbose:
            for name, info in reflective.backends().items():
                print(f"  {name:7}{'yes' if info.available else 'no ':4} {info.detail}")
        raise typer.Exit


def _add(function: Any, group: str, short: str, name: str | None = None, cls: Any = Command, examples: str = "") -> None:
    app.command(name, cls=cls, rich_help_panel=group, short_help=short, epilog=examples)(function)


# In the order of --help.
_add(demo.demo, ANSWER, "Answer a sum on the embedded model, scored live", examples=demo.EXAMPLES)
_add(generate.generate, ANSWER, "Answer questions, by the best of N or another strategy", cls=RayCommand, examples=generate.EXAMPLES)
_add(serve.serve, ANSWER, "Serve a model and its scores over HTTP", examples=serve.EXAMPLES)
_add(score.score, READ, "Score finished text", cls=RayCommand, examples=score.EXAMPLES)
_add(evaluate.evaluate, READ, "Measure what candidates are worth", "eval", examples=evaluate.EXAMPLES)
_add(view.view, READ, "Look at a file's candidates in one page", examples=view.EXAMPLES)
_add(train.train, TRAIN, "Train a head, or a model with it, from outcomes alone", examples=train.EXAMPLES)
_add(bench.bench, TRAIN, "Measure every op against PyTorch and torch.compile", examples=bench.EXAMPLES)
_add(doctor.doctor, TRAIN, "Check this installation; what to paste into a bug report", examples=doctor.EXAMPLES)
