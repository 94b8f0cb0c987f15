"""Lays out the ops as Hugging Face's ``kernels`` package loads them, and as its kernel-builder builds them.

``python release/hub/layout.py build/hub`` (``make hub``) makes a folder with

- ``build/<variant>/``: a package that ``kernels.get_local_kernel`` imports, for CPUs and, where nvcc is found, for CUDA, compiled here
  by setup.py under an op namespace of that build alone (``REFLECTIVE_NAMESPACE``), so that several versions live in one process;
- ``build.toml``, ``CARD.md``, ``flake.nix``, ``csrc/`` and ``torch-ext/``: the sources, from which ``kernel-builder build`` makes the variants that the
  Hub asks for (old glibc, every CUDA release).

The Python is the repository's own, ``kernels/*.py`` and ``reflective/scoring/ops.py``, in which two lines change: the namespace and
the module whose import loads the extension are the builder's ``_ops``.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))
NAME = BUILD["general"]["name"]
PACKAGE = NAME.replace("-", "_")
OWN_LINES = {  # of ops.py, by what stands there instead
    r'^NAMESPACE = "\w+"$': "NAMESPACE = _ops.ops.name",
    r'^_EXTENSION = f".*\._C"$': "_EXTENSION = _ops.__name__",
    r"^from \.\. import kernels$": "from .. import _ops, kernels",
}


def matching(patterns: Iterable[str], named: set[str]) -> list[str]:
    """The files of ``patterns``, relative to the repository. What some list names in full (``named``) no pattern brings in."""
    found = set()
    for pattern in patterns:
        files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        if not files:
            raise SystemExit(f"build.toml: no file matches {pattern!r}")
        found |= files if pattern in named else files - named
    return sorted(found)


def build_toml() -> str:
    """``build.toml`` with files for patterns."""
    lists = [BUILD["torch"]["src"], *(kernel["src"] for kernel in BUILD["kernel"].values())]
    named = {pattern for patterns in lists for pattern in patterns if "*" not in pattern}

    def files(match: re.Match[str]) -> str:
        listed = "".join(f'    "{file}",\n' for file in matching(json.loads(match[1]), named))
        return f"src = [\n{listed}]"

    text = (HERE / "build.toml").read_text(encoding="utf-8")
    return re.sub(r"^src = (\[.*\])$", files, text.partition("\n\n")[2], flags=re.MULTILINE)


def python(folder: Path) -> None:
    """The package's Python, but for ``_ops``."""
    folder.mkdir(parents=True)
    shutil.copy(HERE / "__init__.py", folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "scoring").mkdir()
    shutil.copy(ROOT / "reflective" / "scoring" / "__init__.py", folder / "scoring")
    text = (ROOT / "reflective" / "scoring" / "ops.py").read_text(encoding="utf-8")
    for line, other in OWN_LINES.items():
        text, n = re.subn(line, other, text, flags=re.MULTILINE)
        if n != 1:
            raise SystemExit(f"reflective/scoring/ops.py has {n} lines {line}; release/hub/layout.py exchanges one")
    (folder / "scoring" / "ops.py").write_text(text, encoding="utf-8")


def unique(backend: str) -> str:
    """A name that this build alone has: of the commit, and of what is not committed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=7", "HEAD")
    dirty = git("status", "--porcelain", "--", "csrc", "kernels", "reflective/scoring", "setup.py", "release/hub")
    if commit and not dirty:
        return f"_{PACKAGE}_{backend}_{commit}"
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/*"), *ROOT.glob("kernels/*.py"), ROOT / "reflective/scoring/ops.py", ROOT / "setup.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"_{PACKAGE}_{backend}_{digest.hexdigest()[:7]}_dirty"


def compile_extension(namespace: str, temp: Path, cuda: bool) -> tuple[Path, list[str], str]:
    """The extension, what its CUDA kernels were compiled for as ``TORCH_CUDA_ARCH_LIST`` says it, and nvcc's release ("13.0")."""
    lib = temp / f"lib-{namespace}"
    own = {"REFLECTIVE_NAMESPACE": namespace, "REFLECTIVE_FORCE_BUILD": "1", "REFLECTIVE_SKIP_CUDA_BUILD": "0" if cuda else "1"}
    own |= {"FORCE_CUDA": "1"} if cuda else {}
    # Objects of nvcc are kept between builds: they do not know the namespace.
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(lib), "--build-temp", str(temp / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")
    (made,) = (lib / "reflective").glob("_C*.so")
    if not cuda:
        return made, [], ""
    ask = f"import torch; torch.ops.load_library({str(made)!r}); print(torch.ops.{namespace}.compiled_cuda_architectures())"
    codes = subprocess.check_output([sys.executable, "-c", ask], text=True).split()
    release = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc(), "--version"], text=True))[1]
    return made, [architecture(code, codes) for code in codes if code.startswith("sm_")], release


def architecture(code: str, codes: list[str]) -> str:
    """``sm_90a`` as "9.0a"; "10.0+PTX" where there is PTX of it, too."""
    number, variant = re.fullmatch(r"sm_(\d+)([af]?)", code).groups()
    return f"{number[:-1]}.{number[-1]}{variant}" + "+PTX" * (f"compute_{number}{variant}" in codes)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def digest(folder: Path) -> dict[str, object]:
    """The hash of each file, as ``metadata.json`` holds it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "metadata.json")
    hashed = {p.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode() for p in files}
    return {"algorithm": "sha256", "files": hashed}


def variant(out: Path, temp: Path, cuda: bool) -> Path:
    """``out``/build/<variant>, compiled for this machine's processor."""
    namespace = unique("cuda" if cuda else "cpu")
    extension, architectures, release = compile_extension(namespace, temp, cuda)
    backend = f"cu{release.replace('.', '')}" if cuda else "cpu"
    abi = BUILD["torch"]["stable-abi"]["cuda" if cuda else "cpu"].replace(".", "")
    folder = out / "build" / f"torch-stable-abi{abi}-{backend}-{platform.machine()}-{platform.system().lower()}"
    python(folder)
    shutil.copy(extension, folder / "_C.abi3.so")
    (folder / "_ops.py").write_text(
        "import torch\n\n"
        "from . import _C  # noqa: F401  its import registers the ops\n\n"
        f"ops = torch.ops.{namespace}\n\n\n"
        "def add_op_namespace_prefix(op_name: str) -> str:\n"
        f'    return f"{namespace}::{{op_name}}"\n',
        encoding="utf-8",
    )
    about = {"type": "cuda", "archs": architectures} if cuda else {"type": "cpu"}
    general = BUILD["general"]
    metadata = {
        "name": NAME, "id": namespace, "version": general["version"], "license": general["license"], "kernels-minver": "0.17.0",
        "python-depends": [], "backend": about, "digest": digest(folder),
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def sources(out: Path) -> None:
    """What kernel-builder builds from."""
    (out / "build.toml").write_text(build_toml(), encoding="utf-8")
    shutil.copytree(ROOT / "csrc", out / "csrc")
    python(out / "torch-ext" / PACKAGE)
    for name in ("CARD.md", "flake.nix"):
        shutil.copy(HERE / name, out)
    shutil.copy(ROOT / "LICENSE", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder, made anew")
    parser.add_argument("--temp", type=Path, default=ROOT / "build" / "hub-temp", help="objects, kept for the next time")
    parser.add_argument("--cpu", action="store_true", help="no CUDA variant, even where nvcc is found")
    args = parser.parse_args()
    out, temp = args.out.resolve(), args.temp.resolve()
    if out.exists() and not (out / "build.toml").exists() and any(out.iterdir()):
        parser.error(f"{out} holds something else")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    sources(out)
    for cuda in (False, True):
        if cuda and (args.cpu or nvcc() is None):
            print("no CUDA variant: " + ("--cpu" if args.cpu else "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"))
        else:
            print(variant(out, temp, cuda))


if __name__ == "__main__":
    main()
