"""What is built and shipped: sdist, wheel, extension, and the package without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from reflective.kernels import layout

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, pattern in (("csrc", "*"), ("kernels", "*.py"), ("reflective", "**/*.py"), ("reflective/data", "**/*"))
    for path in (ROOT / folder).glob(pattern)
    if path.is_file()
)

# Runs from anywhere with the package on PYTHONPATH: the fresh automaton has one class whose only entry ends a step.
RUN_AN_OP = """
import torch, reflective.ops
from reflective.kernels import layout
ids = torch.zeros(1, 3, dtype=torch.int64)
tables = torch.zeros(1, dtype=torch.int32), torch.tensor([[layout.STEP]], dtype=torch.int32)
column = torch.zeros(1, dtype=torch.int64)
print(torch.ops.reflective.step_mask(ids, *tables, column, column + 3, column).tolist())
print(reflective.ops.WHY_NO_EXTENSION)
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
    """Built from the sdist, which therefore holds all that a build needs."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, sdist, cwd=out, REFLECTIVE_FORCE_BUILD="1")
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


def test_a_forced_build_without_a_compiler_fails() -> None:
    done = setup_py("--version", CXX="/nonexistent/c++", REFLECTIVE_FORCE_BUILD="1")
    assert done.returncode != 0
    assert "REFLECTIVE_FORCE_BUILD=1, but there is no C++ compiler '/nonexistent/c++'" in done.stdout


@pytest.mark.parametrize("force", ["0", "1"])
def test_a_compiler_that_fails(force: str, tmp_path: Path) -> None:
    folders = "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")
    done = setup_py("build_ext", *folders, CXX=shutil.which("false"), REFLECTIVE_FORCE_BUILD=force)
    assert (done.returncode != 0) == (force == "1")
    assert ("reflective: the C++ compiler failed" in done.stdout) == (force == "0")


def test_without_torch_the_build_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    done = setup_py("--version", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "pip install --no-build-isolation reflective-kernels" in done.stdout


def test_layouts_agree() -> None:
    """``csrc/layout.h`` and ``kernels/layout.py`` hold the same constants."""
    text = (ROOT / "csrc" / "layout.h").read_text()
    mirrored = {name: eval(value) for name, value in re.findall(r"constexpr \w+ (\w+) = ([^;]+);", text)}
    constants = {name: value for name, value in vars(layout).items() if name.isupper()}
    assert mirrored == constants


def test_torch_is_new_enough_for_the_abi_that_is_targeted() -> None:
    assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
