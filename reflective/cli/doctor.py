"""``reflective doctor``: what is installed here, and whether it agrees."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .common import JsonOption, print_json, progress_bars

if TYPE_CHECKING:  # at run time within the function, as everywhere here
    from ..doctor import Check

_STYLES = {"ok": "green", "differs": "bold red", "broken": "bold red", "not here": "dim"}

EXAMPLES = """
reflective doctor
# for a script: exit code 0 if all that is here agrees, else 1
reflective doctor --quick --json
# Triton's kernels without a GPU, in Triton's interpreter
TRITON_INTERPRET=1 reflective doctor --quick
"""


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out vLLM and the default model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this installation, and print what to paste into a bug report.

    A known trajectory is scored by every backend and engine that is here, while it is decoded and when it is finished, and compared
    with numbers recorded in float64; where equal bits are promised, bits are compared. Each check is a line: ok; differs, by how much
    and what was expected; broken, it is installed and does not run; not here, and why.

    The block at the end holds no keys and no home directories.
    """
    from ..doctor import examine
    from ..doctor.report import clean

    console = Console(soft_wrap=False)
    with progress_bars() as bars:
        task = bars.add_task("checking", total=None)
        report = examine(
            quick,
            begun=lambda name, i, n: bars.update(task, description=f"checking {name}", completed=i, total=n),
            found=lambda check: None if as_json else _line(console, check),
        )
    if as_json:
        print_json(report.json())
    else:
        console.print()
        console.print(Text(report.verdict(), "bold green" if report.ok else "bold red"))
        advised: dict[str, list[str]] = {}
        for check in report.checks:
            if check.advice:
                advised.setdefault(check.advice, []).append(check.name)
        for advice, names in advised.items():
            console.print(Text.assemble(("; ".join(names) + ": ", "bold"), clean(advice)))
        console.print("\nTo paste into a bug report:\n", style="bold")
        print(report.paste())
    if not report.ok:
        raise typer.Exit(1)


def _line(console: Console, check: "Check") -> None:
    from ..doctor.report import clean

    if not console.is_terminal:  # a line a check, for grep
        print(f"{check.status:8}  {check.name:21}  {clean(check.detail)}", flush=True)
        return
    row = Table.grid(padding=(0, 2), expand=True)
    for column in ({"width": 8}, {"width": 21}, {"ratio": 1, "overflow": "fold"}):
        row.add_column(**column)
    style = _STYLES[check.status]
    row.add_row(Text(check.status, style), Text(check.name), Text(clean(check.detail), "dim" if style == "dim" else ""))
    console.print(row)
