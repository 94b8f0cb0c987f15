"""What the README shows works as it stands there."""

import itertools
import re
import runpy
from pathlib import Path

import pytest
import tiny
import torch
from test_model import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import reflective as rf
from reflective import tasks

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# What needs vLLM is run by tests/in_vllm/test_texts.py.
BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "vllm" not in b]


@pytest.fixture
def published(tmp_path):
    """A checkpoint in the published form: a transformers directory with score_module.pt beside the weights."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([".\n\n"])
    config = LlamaConfig(**{**tiny._SIZES, "vocab_size": len(tokenizer), "eos_token_id": 1})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tiny.head().save_pretrained(tmp_path / "score_module.pt")
    return tmp_path


def test_scoring_during_generate(published, capsys):
    code = BLOCKS[0].replace('"MetaStone-S1-1.5B"', repr(str(published))).replace("2048", "30")
    names = {}
    exec(code, names)  # noqa: S102
    assert len(names["scores"]) == 8
    assert capsys.readouterr().out


def test_everything_in_one_object(default_model, monkeypatch):
    monkeypatch.setattr(type(default_model), "default", lambda: default_model)
    names = {}
    exec("import reflective as rf\n" + BLOCKS[1].replace('effort="medium"', 'effort="low", max_new_tokens=8'), names)  # noqa: S102
    assert len(names["best"].candidates) == 2


def test_other_heads(default_model):
    model = default_model
    ids = model.encode(model.format("4 + 9 + 6"))
    names = {"rf": rf, "hf_model": model.model, "head": model.head, "steps": model.steps, "inputs": {"input_ids": ids}}
    exec(BLOCKS[2], names)  # noqa: S102
    scores = names["scorer"].result(names["out"])
    assert list(scores) == ["ours", "probe", "every"] and scores["every"].n_steps[0] > 8 and scores["probe"].aggregation == "mean"


def test_strategies(default_model, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(type(default_model), "default", lambda: default_model)
    monkeypatch.chdir(tmp_path)
    names = {"rf": rf}
    for block in BLOCKS[3:5]:
        exec(block.replace("64", "6"), names)  # noqa: S102
    assert (tmp_path / "prune.png").stat().st_size > 10_000
    assert names["first"].tokens >= 8 and names["first"].alive


def test_training(default_model):
    pytest.importorskip("trl")
    questions = list(itertools.islice(tasks.sums(0, high=9), 8))
    names = {"model": default_model, "questions": questions}
    exec(BLOCKS[5].replace("fit(rollouts)", "fit(rollouts, epochs=2)"), names)  # noqa: S102
    assert names["rollouts"].count.sum() == 8 * 12 and names["head"].hidden_size == 576


def test_the_commands_exist_and_the_numbers_have_a_file():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)\b", TEXT)) <= set(targets)
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    assert report["BEGIN"] + report["table"]() + report["END"] in TEXT, "run: python benchmarks/report.py --write"
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT) + re.findall(r"`(benchmarks/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
