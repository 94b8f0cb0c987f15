"""A wheel in environments that hold nothing else: installed as a user installs it, then tested.

``python release/bare.py WHEEL --pair python3.10 torch==2.11.0 --pair python3.13 torch`` gives every pair of a Python and a torch
an environment of its own, installs that torch and the wheel, without extras and without a compiler on its PATH, runs the README's first
example, and then, with pytest added, the tests of the compiled kernels and of the stream against the plain-PyTorch definition.
``--here`` does the same in the environment that runs this file. A line of each goes to ``--out``, in place of an earlier one of the same pair.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/test_cpu.py", "tests/test_scorer.py", "-k", "not triton")
VERSIONS = (
    "import json, platform, torch, transformers, reflective.scoring.ops as ops;"
    "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__,"
    " 'machine': platform.machine(), 'libc': ' '.join(platform.libc_ver()), 'extension': ops.WHY_NO_EXTENSION or 'loaded',"
    " 'cuda': ' '.join(ops.cuda_architectures())}))"
)


def run(*command: object, cwd: Path, quiet: bool = False) -> str:
    """What ``command`` prints. Raises SystemExit, with all of it, where it fails."""
    # No compiler is found, and neither this checkout nor a user's own packages are.
    hidden = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [str(part) for part in command], check=False, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **hidden},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    if not quiet:
        print(done.stdout.rstrip().rpartition("\n")[2], flush=True)
    return done.stdout


def check(python: Path | str) -> dict[str, str]:
    """What the environment of ``python`` holds and how many tests passed there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)  # with tests, and without the package
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "README.md", folder)
        found = json.loads(run(python, "-c", VERSIONS, cwd=folder, quiet=True).splitlines()[-1])
        if found["extension"] != "loaded":
            sys.exit(f"the compiled backend is missing: {found['extension']}")
        run(python, ROOT / "release" / "first_example.py", "README.md", cwd=folder)
        run(python, "-m", "pip", "install", "--quiet", "pytest>=8.4", cwd=folder, quiet=True)
        told = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, cwd=folder)
    counts = {what: n for n, what in re.findall(r"(\d+) (passed|skipped)", told.rstrip().rpartition("\n")[2])}
    if not int(counts.get("passed", 0)):
        sys.exit(f"no test ran:\n{told}")
    return {**found, "passed": counts["passed"], "skipped": counts.get("skipped", "0")}


def bare(wheel: Path, python: str, torch: str, torch_args: list[str], folder: Path) -> dict[str, str]:
    """The same in a new environment of ``python`` with ``torch``, which goes afterwards: it may take 8 GB."""
    env = folder / re.sub(r"\W+", "-", f"{Path(python).name}-{torch}")
    shutil.rmtree(env, ignore_errors=True)
    print(f"{python}, {torch}:", flush=True)
    run(python, "-m", "venv", env, cwd=folder, quiet=True)
    own = env / "bin" / "python"
    install = (own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    try:
        run(*install, *torch_args, torch, cwd=folder, quiet=True)
        # Whatever pip would have to compile is refused: of the dependencies none does, either.
        run(*install, "--only-binary=:all:", torch, wheel, cwd=folder, quiet=True)
        return check(own)
    finally:
        shutil.rmtree(env, ignore_errors=True)


def write(path: Path, results: list[dict[str, str]]) -> None:
    known = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            known = {pair(line): line for line in csv.DictReader(file)}
    known |= {pair(result): result for result in results}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, results[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[key] for key in sorted(known))


def pair(line: dict[str, str]) -> tuple[object, ...]:
    """Processor, Python and torch, in the order of their releases."""
    releases = (tuple(map(int, re.findall(r"\d+", line[name])[:2])) for name in ("python", "torch"))
    return (line["machine"], *releases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?")
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar=("PYTHON", "TORCH"))
    parser.add_argument("--here", action="store_true", help="the environment of this Python, with the wheel installed")
    parser.add_argument("--torch-args", default="", help="more arguments for pip where torch is installed")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bare")
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    if args.here == bool(args.pair) or bool(args.pair) != (args.wheel is not None):
        parser.error("either a wheel and at least one --pair PYTHON TORCH, or --here")
    results = [check(sys.executable)] if args.here else []
    for python, torch in args.pair:
        if shutil.which(python) is None:
            parser.error(f"--pair: there is no {python!r} on PATH")
    args.folder.mkdir(parents=True, exist_ok=True)
    for python, torch in args.pair:
        results.append(bare(args.wheel.resolve(), python, torch, args.torch_args.split(), args.folder.resolve()))
    for result in results:
        print(result, flush=True)
    if args.out:
        write(args.out, results)


if __name__ == "__main__":
    main()
