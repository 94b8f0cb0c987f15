"""Run the cases in the systems that are here, show who is right where, and keep it as CSV.

    python -m reflective.benchmarks.inflight [--system NAME ...] [--case NAME ...] [--out FOLDER] [--list]

Without --system every system whose packages are installed; without --case every case. With --out rows go into FOLDER/inflight.csv; those of other systems and
cases that are there already stay. vLLM's second model runner is a system of its own, and runs where VLLM_USE_V2_MODEL_RUNNER=1 is set.
Exit code 1: one of this package's systems was wrong.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from ..record import read, write
from . import systems
from .cases import Case, chosen
from .system import System, Verdict, judge
from .table import MARKS, NAME
from .world import World


def row(system: System, case: Case, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """As the CSV has it."""
    shown = {
        "system": system.name, "case": case.name, "result": verdict.result,
        "difference": "" if verdict.difference is None else f"{verdict.difference:.2e}",
        "allowed": "" if verdict.allowed is None else f"{verdict.allowed:.2e}",
        "steps": verdict.steps or "", "sequences": verdict.sequences or "",
        "same_bits": "" if verdict.same_bits is None else "yes" if verdict.same_bits else "no",
        "said": verdict.said, "about": system.about, "seconds": round(seconds, 2),
    }  # fmt: skip
    return shown | systems.versions(system)


def merged(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows``, and of those that were recorded before the others."""
    new = {(r["system"], r["case"]) for r in rows}
    kept = [r for r in before if (r["system"], r["case"]) not in new]
    place = {s: i for i, s in enumerate(systems.ORDER)}
    order = {case.name: i for i, case in enumerate(chosen())}
    found = [r for r in (*kept, *rows) if r["case"] in order]
    return sorted(found, key=lambda r: (place.get(r["system"], len(place)), r["system"], order[r["case"]]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflective.benchmarks.inflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", nargs="+", metavar="NAME", help="only these, see --list")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these, see --list")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the results in FOLDER/inflight.csv")
    parser.add_argument("--list", action="store_true", help="name systems and cases, and stop")
    args = parser.parse_args(arguments)
    try:
        cases, found = chosen(args.case), systems.chosen(args.system)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if args.list:
        for case in cases:
            print(f"{case.name:20} {case.must}")
        for name, why in systems.known().items():
            print(f"{name:26} {why}")
        return 0
    own_process = [s for s in found if getattr(s, "own_process", False)] if len(found) > 1 else []
    wrong = run([s for s in found if s not in own_process], cases, args.out)
    for system in own_process:
        more = ["--out", str(args.out)] if args.out else []
        names = [case.name for case in cases]
        command = [sys.executable, "-m", "reflective.benchmarks.inflight", "--system", system.name, "--case", *names, *more]
        code = subprocess.run(command, check=False).returncode
        if code not in (0, 1):
            raise SystemExit(f"{system.name}: its process ended with {code}")
        wrong |= code == 1
    return int(wrong)


def _settings(case: Case) -> tuple[Any, ...]:
    """By which the cases of one engine are neighbours. One that looks drafts up comes last: vLLM's CPU build starts none after it, for it cannot do
    with numba imported."""
    return case.drafts == "lookup", case.drafts, case.rule, case.piece, case.few_blocks


def run(found: Sequence[System], cases: Sequence[Case], out: Path | None) -> bool:
    """Whether a system of this package was wrong."""
    warnings.simplefilter("ignore")
    disable_progress_bar()
    world, rows, ours_wrong = World(), [], False
    for system in found:
        for case in sorted(cases, key=_settings) if getattr(system, "own_process", False) else cases:
            began = time.perf_counter()
            verdict = judge(world, system, case)
            ours_wrong |= verdict.result == "wrong" and system.name.startswith("reflective")
            shown = "" if verdict.difference is None else f"{verdict.difference:.1e} of {verdict.allowed:.1e}"
            print(f"{MARKS[verdict.result]} {system.name:26} {case.name:18} {verdict.result:9} {shown:19} {verdict.said[:150]}", flush=True)
            rows.append(row(system, case, verdict, time.perf_counter() - began))
            if out:  # a run that is ended keeps what it found
                write(NAME, merged(rows, read(NAME, out)), out)
    return ours_wrong


if __name__ == "__main__":
    sys.exit(main())
