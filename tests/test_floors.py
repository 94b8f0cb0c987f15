"""Imports go down the floors of the package: the contracts of pyproject.toml, of the whole package and without exceptions."""

import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="needs import-linter, and Python 3.11: pip install import-linter")
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
FLOORS = "Imports go down the floors"
ENGINES = "Engines know their base alone"
SEARCH = "The search knows no engine but the base"
CIRCLES = "No package imports itself in a circle"
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("tests that lie beside no sources", allow_module_level=True)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package's Python files as they are installed, kernels/ and benchmarks/ among them, where the linter finds them."""
    for source in ("reflective", "kernels", "benchmarks"):
        for file in (ROOT / source).rglob("*.py"):
            place = file.relative_to(ROOT / source)
            if source != "reflective" or place.parts[0] not in ("kernels", "benchmarks"):
                copy = tmp_path / ("" if source == "reflective" else "reflective") / source / place
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(re.sub("(?m)^ignore_imports = .*$", "", text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reflective", raising=False)  # which the linter would find in place of the copy
    return tmp_path / "reflective"


def broken(package, capsys):
    """Names of the contracts that do not hold, and what the linter says of them."""
    lint_imports(no_cache=True, no_logo=True, is_debug_mode=True)
    said = capsys.readouterr().out
    told = dict(re.findall(r"(?m)^(.+) (KEPT|BROKEN)\b", said))
    assert set(told) == {FLOORS, ENGINES, SEARCH, CIRCLES}, said
    return {name for name, verdict in told.items() if verdict == "BROKEN"}, said


def test_imports_go_down_the_floors(package, capsys):
    names, said = broken(package, capsys)
    assert not names, said


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("utils/arguments.py", "from ..scoring import steps", FLOORS),
        ("kernels/layout.py", "from ..scoring.steps import At", FLOORS),
        ("scoring/loss.py", "from .. import ReflectiveModel", FLOORS),
        ("engines/hf/kv.py", "def late():\n    from ...search import selection", FLOORS),
        ("search/selection.py", "if TYPE_CHECKING:\n    from ..model import ReflectiveModel", FLOORS),
        ("train/record.py", "from ..batch import journal", FLOORS),
        ("serve/text.py", "from reflective.benchmarks import record", FLOORS),
        ("new.py", "", FLOORS),  # is on no floor
        ("engines/vllm.py", "from .hf import kv", ENGINES),
        ("engines/base.py", "from .hf import kv", ENGINES),
        ("search/selection.py", "from ..engines.hf.kv import Row", SEARCH),
        ("utils/outputs.py", "from .records import Lines", CIRCLES),
        ("train/data.py", "if TYPE_CHECKING:\n    from .rollout import roll_out", CIRCLES),
    ],
)
def test_what_breaks_a_contract_is_told(package, capsys, file, line, contract):
    with open(package / file, "a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    names, said = broken(package, capsys)
    assert contract in names, said
