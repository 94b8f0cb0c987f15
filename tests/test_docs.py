"""What README.md, docs/ and CONTRIBUTING.md say holds: code runs as it stands there, commands and options exist, figures are those of their files, and
every module is named."""

import ast
import contextlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import tiny
import torch
import typer
from test_model import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import reflective as rf
from reflective.benchmarks import figures, report, right_answers, second_pass, train_a_head
from reflective.checkpoints.default import HEAD
from reflective.cli import app
from reflective.scoring import ops
from reflective.strategies import NAMES

ROOT = Path(__file__).parents[1]
INSTALLED = ("kernels", "csrc", "benchmarks")  # below reflective/, but lying beside it
TEXTS = {name: pages.text(name) for name in ("docs/architecture.md", "docs/integrate.md", "CONTRIBUTING.md")}
WAYS, MODULES = TEXTS["docs/architecture.md"].split("## Every module")
PAGES = pages.names()
PYTHON = [name for name in PAGES if any(b.run_by is None for b in pages.blocks(name, "python"))]
OPTIONAL = ("accelerate", "gguf", "peft", "trl", "datasets", "pyarrow", "reasoning_gym", "math_verify", "fastapi", "uvicorn", "prometheus_client", "ray", "matplotlib", "triton", "vllm")
# Of pages whose code is written for another machine: what stands there, and what is run.
CHECKPOINT = '"MetaStone-S1-1.5B"'
SMALLER = {
    "README.md": {"max_new_tokens=2048": "max_new_tokens=30"},
    "docs/decoding.md": {"max_new_tokens=2048": "max_new_tokens=30"},
}
NEEDS = {"docs/serving.md": ("openai", "fastapi"), "docs/strategies.md": ("matplotlib",)}
TRAINING = {  # the worked example, in seconds
    "512, 64, 128": "8, 3, 3",
    "epochs=64": "epochs=4",
}


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path_factory):
    """A checkpoint in the published form: a transformers directory with score_module.pt beside the weights."""
    path = tmp_path_factory.mktemp("published")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([".\n\n"])
    config = LlamaConfig(**{**tiny._SIZES, "vocab_size": len(tokenizer), "eos_token_id": 1})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    tiny.head().save_pretrained(path / "score_module.pt")
    return path


@pytest.mark.parametrize("name", [name for name in PYTHON if name != "docs/training.md"])
def test_the_blocks_of_a_page_run_as_they_stand(name, request, tmp_path, monkeypatch, capsys):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    blocks = [b for b in pages.blocks(name, "python") if b.run_by is None]
    code = "".join(b.code for b in blocks)
    changed = dict(SMALLER.get(name, {}))
    if CHECKPOINT in code:
        changed[CHECKPOINT] = repr(str(request.getfixturevalue("published")))
    for there in changed:
        assert there in code, f"{name} no longer has {there}"
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        if ".default()" in code or "127.0.0.1:8000" in code:
            model = request.getfixturevalue("default_model")
            monkeypatch.setattr(type(model), "default", lambda **_: model)
        if "127.0.0.1:8000" in code:
            from served import live

            changed["http://127.0.0.1:8000"] = stack.enter_context(live(model)).url
        names = {"__name__": name}
        for block in blocks:
            source = block.code
            for there, here in changed.items():
                source = source.replace(there, here)
            exec(compile(source, str(block), "exec"), names)  # noqa: S102
    if name == "README.md":
        assert len(names["scores"]) == 8 and capsys.readouterr().out and names["best"].score > 0
    if name == "docs/serving.md":
        assert len(names["answer"].choices) == 1 and 0 < names["answer"].choices[0].reflective["score"] < 1


def test_the_worked_example_of_training_runs(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    names, seconds = train_a_head.run(TRAINING)
    assert len(seconds) == len(train_a_head.blocks()) == 6
    assert names["held_out"].count.sum() == 3 * 16 and set(train_a_head.SHOWN) <= set(names["found"])
    assert names["best"].candidates and (tmp_path / "my-head" / "select.json").is_file()
    for there in TRAINING:
        assert there in pages.text("docs/training.md"), there


def test_the_first_example_needs_no_extra(published, tmp_path):
    """In a process in which none of the optional packages can be imported."""
    code = pages.blocks("README.md", "python")[0].code.replace(CHECKPOINT, repr(str(published))).replace("2048", "30")
    blocker = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import importlib
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in {OPTIONAL} else find(name, package)
"""
    (tmp_path / "first.py").write_text(blocker + code + "\nassert len(scores) == 8\n")
    done = subprocess.run([sys.executable, "first.py"], check=False, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PAGES)
def test_blocks_that_are_run_elsewhere_are(name):
    for block in pages.blocks(name, "python"):
        if block.run_by is None:
            continue
        test = (ROOT / block.run_by).read_text(encoding="utf-8")
        if Path(name).name in test:  # it reads the page itself
            continue
        tree = ast.parse(block.code)
        imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "reflective" in (node.module or "") for a in node.names}
        called = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)} - {"format", "get"}
        assert imported | called, f"{block}: nothing of it can be looked for"
        missing = [n for n in imported | called if not re.search(rf"\b{n}\b", test)]
        assert not missing, f"{block}: {block.run_by} has none of {missing}"


# -- commands ----------------------------------------------------------------------------------------------------------


class UsageError(Exception):
    """``reflective`` would refuse it."""


def parse(arguments):
    """Raises UsageError where ``reflective`` would refuse a command or an option by its name; nothing is run."""
    command = typer.main.get_command(app)
    try:
        context = command.context_class(command, info_name="reflective")
        while hasattr(command, "resolve_command") and arguments and not arguments[0].startswith("-"):
            name, command, arguments = command.resolve_command(context, list(arguments))
            context = command.context_class(command, info_name=name, parent=context)
        if "--ray" in arguments:  # which needs no value, as RayCommand has it
            at = arguments.index("--ray")
            if not re.fullmatch(r"local|auto|\S+:\d+", "".join(arguments[at + 1 : at + 2])):
                arguments = [*arguments[: at + 1], "local", *arguments[at + 1 :]]
        values, rest, _ = command.make_parser(context).parse_args(list(arguments))
    except Exception as error:  # of click, or of the click within typer, by the release
        if not any(kind.__name__ == "UsageError" for kind in type(error).__mro__):
            raise
        raise UsageError(error.format_message()) from error
    if rest:
        raise UsageError(f"unexpected: {' '.join(rest)}")
    for name in (values.get("strategy"),):
        if isinstance(name, str) and name not in NAMES:
            raise UsageError(f"no strategy {name}")


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_commands_exist(name):
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"(?m)^([\w-]+) = \[", extras))
    for where, arguments in pages.commands(name):
        try:
            parse([a for a in arguments if a not in ("&", "&&")])
        except UsageError as error:
            raise AssertionError(f"{where}: {error}") from error
    for where, words in pages.lines(name):
        if words[0] == "make":
            assert {w for w in words[1:2] if "=" not in w and w.isidentifier()} <= targets, where
        if words[0].startswith("python") and words[1:2] and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), where
        if words[0].startswith("python") and words[1:2] == ["-m"] and words[2].startswith("reflective"):
            assert importlib.util.find_spec(words[2]), where
        if words[:2] == ["pip", "install"]:
            asked = {e for w in words for e in (re.findall(r"\[([\w,-]+)\]", w) or [""])[0].split(",") if "reflective" in w and e}
            assert asked <= extras, f"{where}: no extra {asked - extras}"


def test_a_renamed_option_is_found():
    for wrong in ("generate x --strategi prune", "generate x --strategy prun", "answer x", "score in.jsonl --out x", "eval a.jsonl --verify math", "--versoin", "demo a b"):
        with pytest.raises(UsageError):
            parse(wrong.split())
    for right in ("generate x -n 8", "score in.parquet -o out.parquet --ray", "generate --input a -o b --ray 10.0.0.1:6379 --replicas 2", "--version -v", "serve --port 1"):
        parse(right.split())
    assert sum(1 for name in PAGES for _ in pages.commands(name)) > 30


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_their_files(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    try:
        report.main()
    except SystemExit:
        pytest.fail("make numbers:\n" + capsys.readouterr().err)


def test_a_figure_that_differs_is_told_and_mended():
    page = "It took 27.0<!--= best_of_n[way=published].score_s | .1f --> s, 5<!--= best_of_n[way=published].score_s / best_of_n[way=reflective].score_s | .0f --> times.\n"
    page += "<!-- table: head -->\nold\n<!-- end of table -->\n"
    found = figures.updated(page, report.table)
    shipped = json.loads((HEAD / "report.json").read_text())["metrics"]["best_of@8"]["value"]
    assert "took 27.3<!--= best_of_n" in found and "597<!--=" in found and "old" not in found and f"| `best_of@8` | {shipped:.3f} |" in found
    assert figures.updated(found, report.table) == found
    for wrong, error in (
        ("1<!--= no_file[a=b].c | .1f -->", "no such file"),
        ("1<!--= best_of_n[way=nobody].score_s | .1f -->", "0 rows"),
        ("1<!--= best_of_n[n=32].score_s | .1f -->", "2 rows"),
        ("1<!--= best_of_n[way=published].secs | .1f -->", "no column secs"),
        ("1<!--= best_of_n[way=published].cpu | .1f -->", "is no number"),
        ("1<!--= __import__('os') | .1f -->", "expected cells"),
        ("1<!--= best_of_n[way=published].score_s -->", "cannot be read"),
        ("<!-- table: head -->\n", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=error):
            figures.updated(wrong, report.table)


def test_a_measurement_without_a_mark_is_found():
    for text in ("took 3.2 ms a step", "12,000 tokens/s", "is 98.7 % of it", "needs 4 GiB", "69 times less time", "an AUC of 0.895", "in 71 minutes", "11.9 µs", "2 seconds"):
        assert list(figures.measurements(text)), text
    for text in ("best of 32", "Python 3.11", "took 3.2<!--= a[b=c].d | .1f --> ms", "`--timeout 30 s`", "with 95 % intervals", "temperature 0.6", "a 7B model", "```\n3 ms\n```"):
        assert not list(figures.measurements(text)), text


def test_what_is_allowed_has_a_reason_and_is_there(monkeypatch, tmp_path):
    assert figures.unmarked() == []
    monkeypatch.setattr(figures, "ALLOWED", tmp_path / "unmeasured.csv")
    figures.ALLOWED.write_text("page,text,reason\nREADME.md,3 ms,a setting\n")
    told = figures.unmarked()
    assert any("is not on that page" in line for line in told) and any("docs/vllm.md: '50 ms' has no mark" in line for line in told)
    figures.ALLOWED.write_text("page,text,reason\nREADME.md,3 ms,\n")
    with pytest.raises(ValueError, match="no reason for 3 ms"):
        figures.unmarked()


@pytest.mark.parametrize("made", [second_pass, right_answers], ids=lambda made: made.__name__.rpartition(".")[2])
def test_the_pictures_of_the_readme_are_of_recorded_files(tmp_path, made):
    pytest.importorskip("matplotlib")
    for end, (ground, ink) in second_pass.GROUNDS.items():
        drawn = made.picture(tmp_path / f"{made.__name__.rpartition('.')[2]}{end}.png", ground, ink)
        assert drawn.read_bytes()[:4] == b"\x89PNG" and drawn.stat().st_size > 20_000
        assert (figures.RESULTS / drawn.name).exists() and drawn.name in (ROOT / "README.md").read_text()


# -- names, links, modules ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", sorted({*PAGES, *TEXTS}))
def test_paths_exist(name):
    text = pages.text(name).replace("<op>", "decode_step")
    paths = re.findall(r"`((?:\w+/)+[\w.]*|\w+\.(?:py|md|json|cpp|cuh?|h))`", text)
    assert paths or name not in TEXTS
    if name in TEXTS:
        for path in paths:
            assert path == "reflective.json" or (ROOT / path).exists() or (ROOT / "reflective" / path).exists(), path
    else:
        for path in re.findall(r"`((?:benchmarks|tests|docs|reflective|kernels|csrc)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), path
        for path in re.findall(r"`(\w+\.(?:csv|png))`", text):
            assert path in ("accuracy.csv", "prune.png") or (figures.RESULTS / path).exists(), path
    for path in re.findall(r"\]\(((?!http|#)[^)#]+)(?:#[\w-]*)?\)|(?:src|srcset)=\"([^\"]+)\"", re.sub(r"(?ms)^```.*?^```", "", text)):
        assert ((ROOT / name).parent / "".join(path)).exists(), f"{name}: {''.join(path)}"


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


def test_the_readme_fits_a_screen_and_links_all():
    readme = pages.text("README.md")
    assert readme.count("\n") < 100
    for name in (*TEXTS, *(p for p in PAGES if "/api/" not in p and p not in ("README.md", "docs/index.md"))):
        assert f"]({name})" in readme, name


def test_every_page_is_in_the_sites_menu():
    menu = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(set(menu)) == len(menu)
    assert {p.removeprefix("docs/") for p in PAGES if p != "README.md"} <= set(menu)


def test_every_public_name_is_on_an_api_page():
    import reflective.hub
    import reflective.steps
    import reflective.strategies
    import reflective.train
    import reflective.vllm

    shown = "\n".join(pages.text(p) for p in PAGES if "/api/" in p)
    documented = set(re.findall(r"(?m)^::: ([\w.]+)$", shown))
    for module in (rf, reflective.hub, reflective.steps, reflective.strategies, reflective.train, reflective.vllm):
        for name in module.__all__:
            assert any(d.rpartition(".")[2] == name for d in documented) or f"`{name}`" in shown, f"{module.__name__}.{name}"
    assert {f"kernels.{name.removesuffix('_backward')}.{name}" for name in ops.SCHEMAS} == {d for d in documented if d.startswith("kernels.")}
    for path in documented:
        assert _resolves(path), path


def _resolves(path):
    module, _, name = path.rpartition(".")
    return hasattr(importlib.import_module(module.replace("kernels", "reflective.kernels") if module.startswith("kernels") else module), name)
