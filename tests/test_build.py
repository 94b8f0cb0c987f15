"""What is built and shipped: sdist, wheel, extension, and the package without a compiler."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reflective.kernels import layout
from reflective.scoring import ops

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, pattern in (
        ("csrc", "*"),
        ("kernels", "*.py"),
        ("benchmarks", "**/*.py"),
        ("reflective", "**/*.py"),
        ("reflective/data", "**/*"),
        ("reflective/view", "*.*"),
    )
    for path in (ROOT / folder).glob(pattern)
    if path.is_file()
)

# Runs from anywhere with the package on PYTHONPATH: the fresh automaton has one class whose only entry ends a step.
RUN_AN_OP = """
import torch, reflective.scoring.ops
from reflective.kernels import layout
ids = torch.zeros(1, 3, dtype=torch.int64)
tables = torch.zeros(1, dtype=torch.int32), torch.tensor([[layout.STEP]], dtype=torch.int32)
column = torch.zeros(1, dtype=torch.int64)
print(torch.ops.reflective.step_mask(ids, *tables, column, column + 3, column).tolist())
print(reflective.scoring.ops.WHY_NO_EXTENSION)
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pip(*arguments: object, cwd: Path, **environment: str) -> str:
    done = run(
        sys.executable, "-m", "pip", *arguments, "--no-deps", "--disable-pip-version-check", cwd=cwd, **environment
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def install_and_run_an_op(wheel: Path, folder: Path) -> str:
    pip("install", "--target", folder / "site", wheel, cwd=folder)
    # -S: an editable install of this checkout, if there is one, must not lend what the wheel lacks.
    path = os.pathsep.join([str(folder / "site"), str(Path(torch.__file__).parents[1])])
    done = run(sys.executable, "-S", "-c", RUN_AN_OP, cwd=folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, as in a fresh clone: nothing left over from an earlier build goes in."""
    tree = tmp_path_factory.mktemp("tree") / "reflective"
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=leftovers)
    out = tmp_path_factory.mktemp("sdist")
    done = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, cwd=tree)
    assert done.returncode == 0, done.stdout
    return next(out.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which therefore holds all that a build needs; the CUDA kernels take minutes of their own."""
    out = tmp_path_factory.mktemp("wheel")
    environment = {"REFLECTIVE_FORCE_BUILD": "1", "REFLECTIVE_SKIP_CUDA_BUILD": "1"}
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, sdist, cwd=out, **environment)
    return next(out.iterdir())


def test_sdist_carries_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not {*SOURCES, "setup.py", "pyproject.toml", "LICENSE", "reflective/py.typed"} - names


def test_wheel_carries_every_source_and_one_abi3_extension(wheel: Path) -> None:
    assert re.fullmatch(r"reflective_kernels-0\.1\.0-cp310-abi3-\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    installed = {source if source.startswith("reflective/") else f"reflective/{source}" for source in SOURCES}
    assert not {*installed, "reflective/_C.abi3.so", "reflective/py.typed"} - names
    assert {name.split("/")[0] for name in names} == {"reflective", "reflective_kernels-0.1.0.dist-info"}


def test_wheel_installs_into_a_clean_folder_and_runs(wheel: Path, tmp_path: Path) -> None:
    assert install_and_run_an_op(wheel, tmp_path) == "[[False, False, True]]\nNone\n"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_extension_uses_only_the_stable_abi(wheel: Path, tmp_path: Path) -> None:
    extension = zipfile.ZipFile(wheel).extract("reflective/_C.abi3.so", tmp_path)
    undefined = subprocess.check_output(["nm", "-D", "--undefined-only", extension], text=True)
    symbols = {line.split()[-1].partition("@")[0] for line in undefined.splitlines()}
    from_torch = {symbol for symbol in symbols if re.search("torch|c10|at[0-9]", symbol)}
    assert from_torch
    assert all(re.match("(aoti_)?torch_", symbol) for symbol in from_torch), sorted(from_torch)
    assert not {symbol for symbol in symbols if re.match("_ZNK?(3c10|2at|5torch)", symbol)}
    assert {symbol for symbol in symbols if symbol.startswith("Py")} == {"PyModule_Create2"}


def test_without_a_compiler_the_package_is_pure_and_says_so(sdist: Path, tmp_path: Path) -> None:
    command = "wheel", "-v", "--no-build-isolation", "--wheel-dir", tmp_path, sdist
    output = pip(*command, cwd=tmp_path, CXX="/nonexistent/c++")
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name == "reflective_kernels-0.1.0-py3-none-any.whl"
    assert "reflective: no C++ compiler '/nonexistent/c++'; installing without the compiled CPU backend" in output
    answer, why = install_and_run_an_op(wheel, tmp_path).splitlines()
    assert answer == "[[False, False, True]]"
    assert "not compiled" in why


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "setup.py", *arguments, cwd=ROOT, **environment)


# Both packages at once: the tree's, with whatever extension it has, and the pure one that was built under another name.
RUN_TWO_BUILDS = """
import torch, reflective.scoring.ops as ours, other.scoring.ops as theirs
print(ours.NAMESPACE, theirs.NAMESPACE, theirs.op.score_rows is ours.op.score_rows)
rows = torch.randn(3, 8)
head = torch.randn(4, 8), torch.randn(4), torch.randn(1, 4), torch.randn(1)
print(torch.equal(torch.ops.other_name.score_rows(rows, *head), theirs.kernels.score_rows(rows, *head)))
torch.testing.assert_close(ours.op.score_rows(rows, *head), theirs.op.score_rows(rows, *head))
print(theirs.WHY_NO_EXTENSION)
"""


def test_a_build_under_another_name_lives_beside_another(tmp_path: Path) -> None:
    for name in ("other_name", ops.NAMESPACE, "other_name"):  # each build says its own, whatever lay there
        done = setup_py("build_py", "--build-lib", str(tmp_path), REFLECTIVE_NAMESPACE=name)
        assert done.returncode == 0, done.stdout
        assert f'NAMESPACE = "{name}"' in (tmp_path / "reflective" / "scoring" / "ops.py").read_text()
    (tmp_path / "reflective").rename(tmp_path / "other")
    done = run(sys.executable, "-c", RUN_TWO_BUILDS, cwd=ROOT, PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    said = done.stdout.splitlines()
    assert said[0] == "reflective other_name False", done.stdout
    assert said[1] == "True" and "not compiled" in said[2], done.stdout


def test_the_extension_is_told_the_name(tmp_path: Path) -> None:
    (tmp_path / "c++").write_text('#!/bin/sh\necho "$@" >> $(dirname "$0")/log\n[ "$1" != -MMD ]\n')
    (tmp_path / "c++").chmod(0o755)
    folders = "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")
    chosen = {"CXX": str(tmp_path / "c++"), "REFLECTIVE_SKIP_CUDA_BUILD": "1"}
    setup_py("build_ext", *folders, **chosen, REFLECTIVE_NAMESPACE="other_name")
    assert "-DREFLECTIVE_NAMESPACE=other_name" in (tmp_path / "log").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("bind*.cpp"))
    assert set(re.findall(r"STABLE_TORCH_LIBRARY\w+\((\w+)", sources)) == {"REFLECTIVE_NAMESPACE"}


@pytest.mark.parametrize("name", ["two words", "9lives", "a::b"])
def test_a_name_that_cannot_be(name: str) -> None:
    done = setup_py("--version", REFLECTIVE_NAMESPACE=name)
    assert done.returncode != 0
    assert f"reflective: REFLECTIVE_NAMESPACE={name!r} is no name" in done.stdout


def test_an_editable_install_has_the_tree_s_name(tmp_path: Path) -> None:
    done = setup_py("build_ext", "--inplace", "--build-temp", str(tmp_path), REFLECTIVE_NAMESPACE="other_name")
    assert done.returncode != 0
    assert "an editable install takes ops.py as it is" in done.stdout


def test_a_forced_build_without_a_compiler_fails() -> None:
    done = setup_py("--version", CXX="/nonexistent/c++", REFLECTIVE_FORCE_BUILD="1")
    assert done.returncode != 0
    assert "REFLECTIVE_FORCE_BUILD=1, but there is no C++ compiler '/nonexistent/c++'" in done.stdout


def build_ext(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """The C++ compiler fails at once: what is looked at is what comes before it."""
    folders = "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")
    return setup_py("build_ext", *folders, CXX=shutil.which("false"), **environment)


@pytest.mark.parametrize("force", ["0", "1"])
def test_a_compiler_that_fails(force: str, tmp_path: Path) -> None:
    done = build_ext(tmp_path, REFLECTIVE_FORCE_BUILD=force, REFLECTIVE_SKIP_CUDA_BUILD="1")
    assert (done.returncode != 0) == (force == "1")
    assert ("reflective: the C++ compiler failed" in done.stdout) == (force == "0")
    ours = [line for line in done.stdout.splitlines() if line.startswith("reflective:")]
    assert "CUDA" not in "".join(ours)  # torch's CUDA builds have warnings of their own


def test_without_torch_the_build_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    done = setup_py("--version", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "pip install --no-build-isolation reflective-kernels" in done.stdout


# -- CUDA ----------------------------------------------------------------------------------------------------------------

NO_CUDA = "installing without the compiled CUDA backend (FORCE_CUDA=1 makes this an error)"


@pytest.mark.parametrize("force", ["FORCE_CUDA", "REFLECTIVE_FORCE_BUILD"])
def test_without_nvcc(force: str, tmp_path: Path) -> None:
    """The second forces only what this machine has the tools for."""
    told = build_ext(tmp_path, CUDA_HOME="/nonexistent", **{force: "1"}).stdout
    assert ("reflective: FORCE_CUDA=1, but no nvcc in /nonexistent/bin" in told) == (force == "FORCE_CUDA")
    assert (f"reflective: no nvcc in /nonexistent/bin; {NO_CUDA}" in told) == (force != "FORCE_CUDA")


FAKE_NVCC = """#!/bin/sh
echo "$@" >> $(dirname "$0")/log
case "$1" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.99" ;;
  --list-gpu-arch) echo compute_75 compute_80 compute_86 compute_89 compute_90 ;;
  *) {compile} ;;
esac
"""
COMPILES = 'while [ "$1" != -o ]; do shift; done; touch "$2"'


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``setup.py``'s Nvcc for a compiler that only says that it compiled, in a folder with one source and one header."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "csrc").mkdir()
    for name in ("kernel.cu", "primitives.cuh"):
        (tmp_path / "csrc" / name).touch()
    for name in ("TORCH_CUDA_ARCH_LIST", "NVCC_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MAX_JOBS", "6")

    def make(compile: str = COMPILES) -> Any:
        (tmp_path / "bin" / "nvcc").write_text(FAKE_NVCC.format(compile=compile))
        (tmp_path / "bin" / "nvcc").chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["setup.py", "--version"])
            return runpy.run_path(str(ROOT / "setup.py"))["Nvcc"]()

    return make


@pytest.mark.parametrize(
    ("asked", "codes"),
    [
        ("", "sm_80 sm_90a compute_90"),  # this nvcc is too old for the default's 10.0
        ("8.0;9.0+PTX", "sm_80 sm_90a compute_90"),  # Hopper's own instructions
        ("7.5 8.6 9.0a", "sm_86 sm_90a"),
        (" 8.0; 8.0+PTX;", "sm_80 compute_80"),
    ],
)
def test_architectures(nvcc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, asked: str, codes: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert nvcc().architectures() == codes.split()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("8.0;10.0", r"'8.0;10.0': nvcc 12.4 \(.*/bin/nvcc\) is too old to compile for 10.0$"),
        ("8.0;Hopper", "'Hopper' is no architecture; expected a list such as '8.0;9.0;10.0\\+PTX'"),
        ("7.5", "nothing to compile for: TORCH_CUDA_ARCH_LIST='7.5'"),
    ],
)
def test_architectures_that_cannot_be(
    nvcc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, asked: str, message: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(BaseException, match=message) as raised:
        nvcc().architectures()
    assert raised.typename == ("NoCuda" if asked == "7.5" else "SystemExit")


def test_cuda_objects_are_made_once_and_again_when_something_changed(nvcc: Callable[..., Any], tmp_path: Path) -> None:
    compiler, log = nvcc(), tmp_path / "bin" / "log"
    codes = ["sm_80", "compute_80"]

    def compiles() -> list[str]:
        before = log.read_text() if log.exists() else ""
        (made,) = compiler.compile(codes, tmp_path / "build")
        assert Path(made).exists()
        return [line for line in log.read_text()[len(before) :].splitlines() if " -c " in line]

    (command,) = compiles()
    assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_80,code=compute_80 --threads 6" in command
    assert "fast" not in command
    assert not compiles()
    os.utime(tmp_path / "csrc" / "primitives.cuh", (time.time() + 9, time.time() + 9))
    assert len(compiles()) == 1
    os.utime(tmp_path / "csrc" / "primitives.cuh", (0, 0))
    codes.pop()
    assert len(compiles()) == 1, "other architectures"
    assert not compiles()


@pytest.mark.parametrize("force", ["0", "1"])
def test_an_nvcc_that_fails(nvcc: Callable[..., Any], tmp_path: Path, force: str) -> None:
    nvcc('echo "kernel.cu(7): error: no such thing"; exit 1')
    done = build_ext(tmp_path, CUDA_HOME=str(tmp_path), REFLECTIVE_FORCE_BUILD=force)
    failure = f"{tmp_path}/bin/nvcc failed (kernel.cu(7): error: no such thing)"
    assert (f"reflective: REFLECTIVE_FORCE_BUILD=1, but {failure}" in done.stdout) == (force == "1")
    assert (f"reflective: {failure}; {NO_CUDA}" in done.stdout) == (force == "0")


def test_a_host_compiler_that_nvcc_refuses(nvcc: Callable[..., Any], tmp_path: Path) -> None:
    line = "#error -- unsupported GNU version! gcc versions later than 13 are not supported!"
    with pytest.raises(Exception, match="refuses the C.. compiler .*later than 13.*name another one in NVCC_CCBIN"):
        nvcc(f'echo "{line}"; exit 1').compile(["sm_80"], tmp_path)


def test_layouts_agree() -> None:
    """``csrc/layout.h`` and ``kernels/layout.py`` hold the same constants."""
    text = (ROOT / "csrc" / "layout.h").read_text()
    mirrored = {name: eval(value) for name, value in re.findall(r"constexpr \w+ (\w+) = ([^;]+);", text)}
    constants = {name: value for name, value in vars(layout).items() if name.isupper()}
    assert mirrored == constants


def test_torch_is_new_enough_for_the_abi_that_is_targeted() -> None:
    assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
