"""The recipe under benchmarks/reproduction: its questions are right and disjoint, and its tables say what the data say."""

import dataclasses
import itertools
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from reflective.benchmarks import record
from reflective.benchmarks.reproduction import (
    choosing,
    heads,
    layers,
    results,
    rollouts,
    separate,
    settle,
    tables,
)
from reflective.benchmarks.reproduction.families import FAMILIES
from reflective.checkpoints.default import HEAD, converted
from reflective.scoring.sprm import SPRM
from reflective.scoring.taps import Tap
from reflective.train.data import Rollouts
from reflective.train.head import fit
from reflective.train.metrics import evaluate

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
    more, calibration = rollouts.further(FAMILIES[name])
    parts = [{q.text for q in part} for part in (train, held_out, more, calibration)]
    assert [len(part) for part in parts] == [rollouts.TRAIN, rollouts.EVAL, rollouts.MORE, rollouts.CALIBRATION]
    assert not any(a & b for a, b in itertools.combinations(parts, 2)), "what a rule is calibrated on measures nothing, nor is it learnt from"
    assert not {question for question, *_ in FAMILIES[name].examples} & parts[3]
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


def test_the_dtype_of_rollouts_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "_seconds", lambda dtype: {torch.float32: 1.0, torch.bfloat16: 2.0}[dtype])
    assert rollouts.dtype_of(tmp_path) == torch.float32
    monkeypatch.setattr(rollouts, "_seconds", lambda dtype: {torch.float32: 2.0, torch.bfloat16: 1.0}[dtype])
    assert rollouts.dtype_of(tmp_path) == torch.float32, "as it was begun"
    (tmp_path / "b" / "sums").mkdir(parents=True)
    assert rollouts.dtype_of(tmp_path / "b") == torch.bfloat16
    monkeypatch.undo()
    assert rollouts._seconds(torch.float32) > 0


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


def test_what_joint_training_led_to_is_written_alone_and_the_other_rows_stay(tmp_path):
    out, place = tmp_path / "out", tmp_path / "joint"
    other = {k: "" for k in ("table", "family", "variant", "measure", "value", "low", "high", "seeds", "questions")}
    record.write("reproduction", [other | {"table": "at", "commit": "of before"}, other | {"table": tables.JOINT}], out)
    for seed in range(rollouts.SEEDS):
        block = place / f"seed {seed}" / "sums" / "00000"
        block.mkdir(parents=True)
        # Two layers, of which the second tells right from wrong, and nothing does what the head trained along has learnt.
        told, dull = synthetic(20, 8, seed), synthetic(20, 8, seed, signal=0.0)
        dull.save(block / "steps.safetensors")
        both = dataclasses.replace(told, features=torch.cat([dull.features, told.features], 1), tap=Tap((-2, -10)))
        both.save(block / "layers.safetensors")
        SPRM(8).save_pretrained(place / f"seed {seed}")
        if seed < rollouts.SEEDS - 1:
            fit(both.read(Tap((-10,))), epochs=10, lr=3e-3, seed=seed).save_pretrained(settle.head_file(tmp_path, seed, "sums"))
    tables.make_joint(tmp_path, out)
    rows = record.read("reproduction", out)
    assert rows[0]["table"] == "at" and rows[0]["commit"] == "of before", "as it was recorded"
    assert {r["variant"] for r in rows[1:]} == {"policy and SPRM"}, "one seed's head is missing"
    settled = fit(both.read(Tap((-10,))), epochs=10, lr=3e-3, seed=2)
    settled.save_pretrained(settle.head_file(tmp_path, 2, "sums"))
    tables.make_joint(tmp_path, out)
    auc = {r["variant"]: float(r["value"]) for r in record.read("reproduction", out) if r["measure"] == "auc_within"}
    assert auc["policy, its SPRM fitted again"] > 0.9 and auc["policy and SPRM"] < 0.7


def test_choosing_in_a_small_work_directory(tmp_path, monkeypatch):
    """Heads that learn one thing after the other, a rule that is calibrated on other questions, and paired differences."""
    for name, value in {"TRAIN": 40, "MAIN": dataclasses.replace(heads.MAIN, questions=40, epochs=6)}.items():
        monkeypatch.setattr(heads, name, value)
    monkeypatch.setattr(rollouts, "TRAIN", 40)
    for part, seed, questions in (("train", 0, 40), ("more", 1, 40), ("calibration", 2, 40), ("eval", 3, 30)):
        block = tmp_path / "sums" / part / "00000"
        block.mkdir(parents=True)
        for view in ("steps", "layers"):
            synthetic(questions, 32, seed).save(block / f"{view}.safetensors")
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "sums, chosen.json").write_text(json.dumps({"layer": -10, "auc_within": {}}))
    assert choosing.done(tmp_path) == []
    variants = choosing.variants(tmp_path, "sums")
    assert variants["the main head"] is heads.MAIN and variants[choosing.BEST].layers == (-10,)
    for variant in variants.values():
        for seed in range(rollouts.SEEDS):
            heads._fit((tmp_path, "sums", variant, seed))
    assert choosing.done(tmp_path) == ["sums"] and heads.train_rollouts(tmp_path, "sums", "steps", more=True).question.max() == 79
    choosing.make(tmp_path, tmp_path / "out")
    rows = {(r["table"], r["variant"], r["measure"]): r for r in record.read("reproduction_choosing", tmp_path / "out")}
    at = {k: float(rows["learning", choosing.BEST, k]["value"]) for k in ("select@8", "majority@8", "select@8 - majority@8", "within_beyond")}
    assert at["select@8 - majority@8"] == pytest.approx(at["select@8"] - at["majority@8"], abs=2e-4) and at["select@8"] > at["majority@8"] + 0.1
    assert at["within_beyond"] > 0.9 and float(rows["rule", choosing.BEST, "exponent, seed 2"]["value"]) > 0
    text = "\n".join(results._choosing(record.read("reproduction_choosing", tmp_path / "out")))
    assert "(here -10)" in text and f"| select@8 | {float(rows['learning', 'the main head', 'select@8']['value']):.3f} (" in text
    assert "| select@32 - best_of@32 |" in text and "| candidates drawn again | 0 |" in text
    assert rows["learning", choosing.TOGETHER, "pass@1"]["seeds"] == "1" and rows["learning", choosing.BEST, "pass@1"]["seeds"] == "3"
    assert float(rows["accuracy against N", choosing.BEST, "any@32"]["value"]) == 1 and (tmp_path / "out" / "reproduction_choosing.png").is_file()


def test_heads_together_are_one_of_their_mean_logit():
    parts = [SPRM(8, width).requires_grad_(False).eval() for width in (4, 6, 5)]
    x = torch.randn(7, 8)
    torch.testing.assert_close(choosing.together(parts)(x), torch.stack([p(x) for p in parts]).mean(0))


# -- layers ------------------------------------------------------------------------------------------------------------


def of_lengths(questions, draws, seed):
    """Rollouts of hard and easy questions whose right answers are shorter; with each what is right for reasons of its own."""
    g = torch.Generator().manual_seed(seed)
    n = questions * draws
    question = torch.arange(questions).repeat_interleave(draws)
    own = torch.randn(n, generator=g)
    hard = 2 * torch.randn(questions, generator=g)[question]
    length = (20 + 4 * torch.randn(n, generator=g)).round().clamp(8, 40).long()
    outcome = (torch.rand(n, generator=g) < (1.5 * own - hard - 0.4 * (length - 20) - 1).sigmoid()).float()
    steps = 1 + length // 10
    owner = torch.arange(n).repeat_interleave(steps)
    r = Rollouts(
        tokens=torch.zeros(int(length.sum() + 2 * n), dtype=torch.int32), length=length + 2, prompt_length=torch.full((n,), 2),
        question=question, outcome=outcome, answer=torch.zeros(n, dtype=torch.int64), count=torch.ones(n, dtype=torch.int64),
        trajectory=owner, position=torch.zeros_like(owner),
    )  # fmt: skip
    return r, own, hard, length


def told_beyond(r, score, within):
    """AUCs of the score, of the covariates, and of the score beside them."""
    name = "auc_within" if within else "auc_trajectory"
    log = torch.nn.functional.logsigmoid(score.double())[r.trajectory]
    covariates, left = layers.beyond(r, log, within=within)
    return [evaluate(x, y, n=(), resamples=2)[name].value for x, y in ((r, log), layers.as_run(r, covariates), layers.as_run(r, left))]


@pytest.mark.parametrize("within", [False, True])
def test_what_a_score_tells_beyond_length_and_difficulty(within):
    r, own, hard, length = of_lengths(200, 32, 0)
    noise = 0.5 * torch.randn(len(r), generator=torch.Generator().manual_seed(9))
    alone, covariates, left = told_beyond(r, -hard - 0.4 * (length - 20) + noise, within)
    most = 0.03 if within else 0.08  # of difficulty the share of 31 draws tells nearly all
    assert alone > 0.75 and covariates > 0.75 and abs(left - 0.5) < most, "reads length and difficulty alone"
    alone, covariates, left = told_beyond(r, own + noise, within)
    assert left > 0.63 and abs(left - alone) < 0.05, "reads what neither tells"
    alone, covariates, left = told_beyond(r, 1.5 * own - hard - 0.4 * (length - 20), within)
    assert alone > left > 0.66, "of both, what is its own is left"


def test_difficulty_is_that_of_the_other_draws():
    r = dataclasses.replace(synthetic(2, 3, 0), outcome=torch.tensor([1.0, 0, 0, 1, 1, 0]), count=torch.tensor([2, 1, 1, 1, 1, 4]))
    sizes, difficulty = layers.covariates(r)
    assert sizes.tolist() == [[3, 3]] * 6
    assert difficulty[:, 0].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 5, 1 / 5, 2 / 5])


def test_a_layer_is_chosen_and_measured(tmp_path, monkeypatch):
    """On rollouts of four layers of which one tells right from wrong; the recorded table as text."""
    monkeypatch.setattr(rollouts, "LAYERS", (-2, -5, -9))
    monkeypatch.setattr(rollouts, "TRAIN", 40)
    monkeypatch.setattr(heads, "TRAIN", 40)
    settings = {"epochs": 6, "lr": 1e-3}
    monkeypatch.setattr(layers, "CHOICES", {"chosen": ((-9, -2), settings), "chosen early": ((-2, -5), {**settings, "epochs": 1})})
    monkeypatch.setattr(heads, "MAIN", dataclasses.replace(heads.MAIN, questions=40, epochs=6))
    for part, questions in (("train", 40), ("eval", 30)):
        parts = [synthetic(questions, 32, 7 + (part == "eval"), signal) for signal in (0.3, 0.0, 2.0)]
        block = tmp_path / "sums" / part / "00000"
        block.mkdir(parents=True)
        whole = dataclasses.replace(parts[0], features=torch.cat([r.features for r in parts], 1), tap=Tap((-2, -5, -9)))
        whole.save(block / "layers.safetensors")
        parts[0].save(block / "steps.safetensors")
    monkeypatch.setattr(heads, "fit_tasks", lambda tasks: map(heads._fit, tasks))  # the same, in this process
    begun = layers.fit_all(tmp_path, ["sums"])
    assert next(begun) == "sums: chosen -9"
    layers.make(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "heads are missing"
    early = next(begun).removeprefix("sums: chosen early ")
    assert len(list(layers.fit_all(tmp_path, ["sums"]))) == 2 + rollouts.SEEDS * (2 if early == "-2" else 3)
    assert heads.head(tmp_path, "sums", layers.variants(tmp_path, "sums")["-9, chosen"], 0).tap == Tap((-9,))
    layers.make(tmp_path, tmp_path / "out")
    rows = {(r["table"], r["variant"], r["measure"]): r for r in record.read("reproduction_layers", tmp_path / "out")}
    value = {key: float(r["value"]) for key, r in rows.items()}
    assert value["chosen", "-9", "auc_within"] > 0.9 > value["chosen", "-2", "auc_within"]
    assert ("chosen early", "-5", "auc_within") in value
    for measure in ("best_of@8", "auc_within", "auc_beyond", "within_beyond"):
        assert value["full size", "-9, chosen", measure] > value["full size", "-2", measure] + 0.1
    assert abs(value["full size", "-2", "within_covariates"] - 0.5) < 0.2, "all are of one length"
    shown = rows["full size", "-9, chosen", "auc_beyond"]
    assert (shown["seeds"], shown["questions"]) == ("3", "30") and float(shown["low"]) < float(shown["value"]) < float(shown["high"])
    monkeypatch.setattr(results, "read", lambda name, folder: record.read(name, tmp_path / "out" if name.endswith("layers") else record.RESULTS))
    text = results.markdown()
    assert "## A layer chosen on training questions: sums" in text and f"{float(shown['value']):.3f} ({float(shown['low']):.3f}" in text


def test_a_trained_policys_head_is_fitted_again_to_training_questions(tmp_path, monkeypatch):
    """Of the layer that tells right from wrong; to questions of which none is held out."""
    monkeypatch.setattr(settle, "LAYERS", (-2, -9))
    monkeypatch.setattr(settle, "EPOCHS", 8)
    monkeypatch.setattr(settle.joint, "merged", lambda place, dtype: place)
    (tmp_path / "dtype.json").write_text(json.dumps({"dtype": "float32"}))
    asked = {}

    def rolled(model, family, questions, place, **settings):
        assert model == tmp_path / "joint" / "seed 1" and not place.exists()
        asked[place.relative_to(model).as_posix()] = {q.text for q in questions}
        parts = [synthetic(30, 32, 7, signal) for signal in (0.3, 2.0)]
        return {"layers": dataclasses.replace(parts[0], features=torch.cat([r.features for r in parts], 1), tap=Tap((-2, -9)))}

    monkeypatch.setattr(rollouts, "rollouts", rolled)
    assert settle.answer(tmp_path, 1, "boxes") == "rollouts, seed 1, boxes" and len(asked["boxes"]) == rollouts.EVAL // rollouts.SEEDS
    settle.head_file(tmp_path, 1, "boxes").parent.mkdir(parents=True)
    assert settle.settle(tmp_path, 1, "boxes").endswith("layer -9") and settle.head(tmp_path, 1, "boxes").tap == Tap((-9,))
    learnt = asked["boxes, train"]
    assert len(learnt) == rollouts.TRAIN + rollouts.MORE and not learnt & {q.text for q in rollouts.questions(FAMILIES["boxes"])[1]}
    assert not learnt & {q.text for q in rollouts.further(FAMILIES["boxes"])[1]}
    asked.clear()
    settle.settle(tmp_path, 1, "boxes")
    assert not asked, "it lies there"


def test_the_recorded_text_is_that_of_the_recorded_numbers():
    assert results.FILE.read_text(encoding="utf-8") == results.markdown()
