"""The recipe under benchmarks/reproduction: its questions are right and disjoint, and its tables say what the data say."""

import itertools
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from reflective.benchmarks import record
from reflective.benchmarks.reproduction import heads, results, rollouts, separate, tables
from reflective.benchmarks.reproduction.families import FAMILIES
from reflective.checkpoints.default import HEAD, converted
from reflective.train.data import Rollouts

ANSWERS = {
    "sums": lambda q: eval(q),
    "products": lambda q: eval(q),
    "boxes": lambda q: eval("{} * {} + {}".format(*re.findall(r"\d+", q))),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_and_examples_are_right(name):
    family = FAMILIES[name]
    for question in itertools.islice(family.questions(3), 200):
        assert int(question.answer) == ANSWERS[name](question.text)
    for question, steps, answer in family.examples:
        assert int(answer) == ANSWERS[name](question)
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert steps[-1].endswith(f" = {answer}")
    prompt = family.config.prompt.replace("{question}", "?")
    assert prompt.endswith("Question: ?\n") and prompt.count("The answer is") == len(family.examples)
    assert re.search(family.config.stop, "The answer is 27.\n\n") and not re.search(
        family.config.stop, "20 + 7 = 27.\n\n"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_that_is_held_out_was_trained_on(name):
    train, held_out = rollouts.questions(FAMILIES[name])
    assert len({q.text for q in train}) == rollouts.TRAIN and len({q.text for q in held_out}) == rollouts.EVAL >= 500
    assert not {q.text for q in train} & {q.text for q in held_out}
    assert not {question for question, *_ in FAMILIES[name].examples} & {q.text for q in held_out}
    dealt = [held_out[seed :: rollouts.SEEDS] for seed in range(rollouts.SEEDS)]
    assert sum(map(len, dealt)) == rollouts.EVAL and rollouts.SEEDS >= 3


def test_the_recipe_begins_with_a_policy_that_nothing_of_it_has_trained(default_model):
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(converted() / "model.safetensors").items()}
    before = rollouts.untrained(torch.bfloat16).model.state_dict()
    assert all(torch.equal(before[k], v) for k, v in weights.items())
    after = rollouts.trained(torch.bfloat16).model.state_dict()
    assert (HEAD / "adapter_config.json").is_file() == any(not torch.equal(after[k], v) for k, v in weights.items())


def synthetic(questions, draws, seed, signal=2.0):
    """Rollouts whose features tell right from wrong; every draw different, three steps each."""
    g = torch.Generator().manual_seed(seed)
    n = questions * draws
    outcome = (torch.rand(n, generator=g) < 0.3).float()
    owner = torch.arange(n).repeat_interleave(3)
    features = torch.randn(3 * n, 8, generator=g)
    features[:, 0] += signal * (outcome[owner] - 0.5)
    return Rollouts(
        tokens=torch.arange(5).repeat(n).int(), length=torch.full((n,), 5), prompt_length=torch.full((n,), 2),
        question=torch.arange(questions).repeat_interleave(draws), outcome=outcome,
        answer=torch.where(outcome > 0, 0, torch.randint(1, 4, (n,), generator=g)), count=torch.ones(n, dtype=torch.int64),
        features=features, trajectory=owner, position=torch.arange(2, 5).repeat(n),
    )  # fmt: skip


def test_thinning_draws_without_replacement():
    whole = synthetic(6, 5, 0)
    whole.count = torch.arange(30) % 3 + 1
    thin = heads.thinned(whole, 4, seed=1)
    drawn = torch.zeros(6, dtype=torch.int64).index_add(0, thin.question, thin.count)
    assert drawn.tolist() == [4] * 6
    at = 0
    for i in range(len(whole)):  # still in their order, none drawn more often than it was there
        if at < len(thin) and torch.equal(thin.features[thin.trajectory == at], whole.features[whole.trajectory == i]):
            assert thin.count[at] <= whole.count[i]
            at += 1
    assert at == len(thin)
    assert not torch.equal(heads.thinned(whole, 4, seed=2).count, thin.count) or len(thin) != len(
        heads.thinned(whole, 4, 2)
    )


def test_another_prompt_leaves_the_responses(default_model):
    from reflective.tasks import Question

    found = synthetic(2, 3, 0)
    other = separate.reprompted(default_model, found, [Question("1 + 1", "2"), Question("a longer one", "3")])
    for i in range(len(found)):
        assert other.ids(i)[int(other.prompt_length[i]) :].tolist() == found.ids(i)[2:].tolist()
        text = ("1 + 1", "a longer one")[int(found.question[i])]
        assert default_model.tokenizer.decode(other.ids(i)[: int(other.prompt_length[i])]) == f"Question: {text}\n"


def test_heads_and_tables_of_a_small_work_directory(tmp_path, monkeypatch):
    """All stages behind the rollouts, on rollouts whose features tell right from wrong."""
    monkeypatch.setattr(heads, "TRAIN", 40)
    main, small = (
        heads.Variant(v.group, v.name, view="steps", questions=40, epochs=6) for v in (heads.MAIN, heads.BASELINE)
    )
    token = heads.Variant("at", "token", view="token", questions=20, epochs=6)
    for name, value in {"MAIN": main, "OUTCOME": main, "BASELINE": small}.items():
        monkeypatch.setattr(heads, name, value)
    monkeypatch.setattr(heads, "variants", lambda: [main, small, token])
    monkeypatch.setattr(heads, "EPOCHS", 2)
    for number, family in enumerate(FAMILIES):
        for part, questions in (("train", 40), ("eval", 30)):
            block = tmp_path / family / part / "00000"
            block.mkdir(parents=True)
            synthetic(questions, 32, 2 * number + (part == "eval")).save(block / "steps.safetensors")
            synthetic(questions, 32, 2 * number + (part == "eval"), signal=0.0).save(block / "token.safetensors")
    for task in [
        (tmp_path, f, v, s) for f in (*FAMILIES, heads.ALL) for v in heads.variants() for s in range(rollouts.SEEDS)
    ]:
        if task[1] != heads.ALL or task[2] is main:
            heads._fit(task)
    assert list(heads.fit_all(tmp_path)) == [], "everything is there"
    out = tmp_path / "out"
    tables.make(tmp_path, out)
    rows = {(r["table"], r["family"], r["variant"], r["measure"]): r for r in record.read("reproduction", out)}

    def value(*key):
        return float(rows[key]["value"])

    assert (
        value("before joint training", "sums", "SPRM", "best_of@8")
        > value("before joint training", "sums", "SPRM", "pass@1") + 0.2
    )
    assert value("at", "boxes", "predict", "auc_within") > 0.9
    assert value("at", "boxes", "token", "auc_within") < 0.65
    assert value("transfer", "boxes", "trained on sums", "auc_within") > 0.9
    assert rows["before joint training", "sums", "SPRM", "pass@1"]["questions"] == "30"
    assert rows["before joint training", "sums", "SPRM", "pass@1"]["seeds"] == "3"
    assert value("saturation", "sums", "any", "limit") >= value("accuracy against N", "sums", "SPRM", "any@32") - 0.02
    assert ("aggregation", "sums", "min", "best_of@8") in rows and (out / "reproduction.png").is_file()
    assert not any(key[0] in ("after joint training", "separate PRM") for key in rows)
    text = results.markdown(out)
    shown = rows["before joint training", "sums", "SPRM", "best_of@8"]
    assert (
        f"| best_of@8 | {float(shown['value']):.3f} ({float(shown['low']):.3f}" in text
        and "## Width of the head" in text
    )
    steps = record.read("reproduction_divergence", out)
    assert {r["weights"] for r in steps} == set(tables.DIVERGENCE) and json.loads(
        (tmp_path / "divergence.json").read_text()
    )


def test_the_recorded_text_is_that_of_the_recorded_numbers():
    assert results.FILE.read_text(encoding="utf-8") == results.markdown()
