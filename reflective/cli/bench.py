"""``reflective bench``: every op against its peers."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import complete
from .common import JsonOption, print_json, progress_bars

EXAMPLES = """
reflective bench --quick
reflective bench --op score_rows -H 1536 -H 3584 --dtype bfloat16
reflective bench --device cuda --budget 600 --out results
"""


def bench(
    op: Annotated[
        list[str] | None, typer.Option(metavar="NAME", autocompletion=complete.ops, help="Only this op; may be given several times, as may the next four.")
    ] = None,
    width: Annotated[list[int] | None, typer.Option("-H", "--width", min=8, help="Hidden size.")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=0, help="Rows, sequences that end a step, or texts.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(metavar="NAME", autocompletion=complete.dtypes, help="float32, bfloat16, float16 or float8_e4m3fn.")] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(metavar="NAME", autocompletion=complete.implementations, help="cuda, triton, cpu, expression, cublas, compile or published.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", autocompletion=complete.devices, help="cuda or cpu; default: a GPU if there is one.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Time for each measurement.")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds after which no further cell is begun.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few repetitions: does everything work?")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the CSV file and the plots.")] = Path("reflective-bench"),
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
    with progress_bars() as bars:
        results = command.run(device, quick, given, out, bars)
    if as_json:
        for row in results.rows:
            print_json(row)
    else:
        results.show(Console(width=None if sys.stdout.isatty() else 180))
    if results.red:
        raise typer.Exit(1)
