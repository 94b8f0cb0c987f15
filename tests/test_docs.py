"""What docs/ and CONTRIBUTING.md say holds: code runs as it stands there, what is named exists, and every module is named."""

import ast
import re
from pathlib import Path

import pytest

from reflective.scoring import ops

ROOT = Path(__file__).parents[1]
INSTALLED = ("kernels", "csrc", "benchmarks")  # below reflective/, but lying beside it
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("docs/architecture.md", "docs/integrate.md", "CONTRIBUTING.md")
}
WAYS, MODULES = TEXTS["docs/architecture.md"].split("## Every module")


def sources():
    """Every file of the package, of kernels/ and of csrc/, as the list names it, and every folder of modules."""
    package = [p.relative_to(ROOT / "reflective") for p in (ROOT / "reflective").rglob("*.py")]
    package = [p for p in package if p.parts[0] not in INSTALLED]
    files = {p.as_posix() for p in package if p.name != "__init__.py"} | {"__init__.py"}
    folders = {p.parent.as_posix() + "/" for p in package if p.name == "__init__.py"} - {"./"}
    files |= {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py") if p.name != "__init__.py"}
    return files | folders | {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir() if p.is_file()}


def test_every_module_has_its_sentence():
    named, said = [], []
    for line in re.findall(r"(?m)^- (.*(?:\n  .*)*)", MODULES):
        names, sentence = re.fullmatch(r"((?:`[\w/.]+`(?:,\s+)?)+):\s(.+)\.", line, re.DOTALL).groups()
        named += re.findall(r"`(.+?)`", names)
        said.append(sentence)
    assert sorted(named) == sorted(sources())
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("name", TEXTS)
def test_paths_exist(name):
    text = TEXTS[name].replace("<op>", "decode_step")
    paths = re.findall(r"`((?:\w+/)+[\w.]*|\w+\.(?:py|md|json|cpp|cuh?|h))`", text)
    assert paths
    for path in paths:
        assert path == "reflective.json" or (ROOT / path).exists() or (ROOT / "reflective" / path).exists(), path
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert ((ROOT / name).parent / path).exists(), path


@pytest.mark.parametrize("text", [WAYS, TEXTS["CONTRIBUTING.md"]], ids=["the ways", "CONTRIBUTING"])
def test_names_exist(text):
    """Of classes, with their methods, of functions and of ops."""
    known = set(ops.SCHEMAS)
    for folder in ("reflective", "kernels", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                for target in getattr(node, "targets", []):
                    known.add(getattr(target, "id", ""))
                known.add(getattr(node, "name", ""))
                if isinstance(node, ast.ClassDef):
                    known |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    known |= {name.partition(".")[2] for name in known}
    names = re.findall(r"`(?:rf\.)?([A-Z]\w+(?:\.\w+)*|_?[a-z]+_[a-z_]+)`", text)
    assert len(names) > 10
    unknown = set(names) - known
    assert not unknown


def test_commands_exist():
    targets = re.findall(r"(?m)^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert set(re.findall(r"\bmake (\w+)\b", TEXTS["CONTRIBUTING.md"])) <= set(targets)


def test_the_readme_links_all_three():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in TEXTS:
        assert f"]({name})" in readme, name


def test_the_blocks_of_integrate_run_as_they_stand():
    names = {"__name__": "integrate"}
    for block in re.findall(r"```python\n(.*?)```", TEXTS["docs/integrate.md"], re.DOTALL):
        exec(block, names)  # noqa: S102
