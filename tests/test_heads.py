# ruff: noqa: F811
"""Heads of every form: what they compute, how they are saved and loaded, several on one model."""

import copy
import json

import published
import pytest
import safetensors.torch
import test_taps
import tiny
import torch
from test_forms import ids, model, reasoning  # noqa: F401  # fixtures
from transformers import DynamicCache

import reflective as rf
from reflective.engines.hf.internals import with_cache
from reflective.scoring.heads import GatedLinear, LinearHead
from reflective.scoring.scores import logit_of

H, N = tiny.HIDDEN, 4
PROMPT = 5


def streamed(net, head, steps, ids, prompt, **how):
    """Scores of ``ids``, fed a token at a time; the last is not."""
    scorer = rf.StreamScorer(net, head, steps, **how)
    whole = torch.tensor([ids])
    with torch.no_grad(), scorer:
        cache = with_cache(net, DynamicCache())
        net(whole[:, :prompt], **cache)
        for t in range(prompt, len(ids) - 1):
            net(whole[:, t : t + 1], **cache)
    return scorer.result(whole)


def agrees(found, expected):
    assert found.step_positions[0].tolist() == expected.positions and len(expected.positions) > 2
    assert found.step_scores[0].tolist() == pytest.approx(expected.step_scores, rel=1e-4, abs=1e-4)
    assert float(found.score[0]) == pytest.approx(expected.score, rel=1e-4, abs=1e-4)


# -- published heads, in a stream and on finished text, against what their projects compute ----------------------------------


@pytest.mark.parametrize("schedule", ["deferred", "immediate"])
def test_step(reasoning, tmp_path, schedule):
    net, tokenizer, ids, prompt = reasoning
    state = published.step_checkpoint(H)
    torch.save(state, tmp_path / "scorer.pt")
    head = rf.load_head(tmp_path / "scorer.pt")
    assert (head.form, head.width, head.tap, head.aggregation) == ("step", 512, rf.Tap((-1,), at="token"), "mean")
    steps = rf.StepTokens.from_tokenizer(tokenizer, **head.step_rule)
    of = {at: published.oracle_step(net, ids, prompt, state, tokenizer=tokenizer, streamed=at) for at in (False, True)}
    agrees(rf.score(net, head, steps, [ids], prompt_lengths=prompt), of[False])
    agrees(streamed(net, head, steps, ids, prompt, schedule=schedule), of[True])


@pytest.mark.parametrize("gate", [True, False])
def test_swift(model, ids, tmp_path, gate):
    state = published.swift_checkpoint((N + 1) * H, gate=gate)
    torch.save(state, tmp_path / "swift.pt")
    head = rf.load_head(tmp_path / "swift.pt", model=model)
    assert head.form == "swift" and head.tap == rf.Tap((0, 1, 2, 3, 4), at="every") and "norm" in head.unknown
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, None
    agrees(rf.score(model, head, None, [ids], prompt_lengths=PROMPT), published.oracle_swift(model, ids, PROMPT, state))
    found = streamed(model, head, None, ids, PROMPT)
    agrees(found, published.oracle_swift(model, ids, PROMPT, state, streamed=True))
    assert (found.aggregation, found.gates is None) == ("gated" if gate else "mean", not gate)


@pytest.mark.parametrize(("act", "output"), [("gelu", 9), ("relu", 7)])
def test_singprobe(model, ids, tmp_path, act, output):
    state, config = published.singprobe_checkpoint(2 * H), published.singprobe_config(H, [3, 1], act)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = rf.load_head(tmp_path, output=output)
    assert (head.form, head.activation, head.tap) == ("singprobe", act, rf.Tap((3, 1), "rms", "every"))
    head.use(trained_on=None)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, None
    how = {"config": config, "output": output}
    agrees(rf.score(model, head, None, [ids], prompt_lengths=PROMPT), published.oracle_singprobe(model, ids, PROMPT, state, **how))
    found = streamed(model, head, None, ids, PROMPT)
    agrees(found, published.oracle_singprobe(model, ids, PROMPT, state, **how, streamed=True))
    assert found.higher_is_better == (output == 7)


def test_metastone(reasoning, tmp_path):
    net, tokenizer, ids, prompt = reasoning
    state = published.metastone_checkpoint(H)
    torch.save(state, tmp_path / "score_module.pt")
    head = rf.load_head(tmp_path)
    assert (head.form, head.tap) == ("metastone", rf.Tap())
    steps = rf.StepTokens.from_tokenizer(tokenizer, "exact")
    expected = published.oracle_metastone(net, ids, prompt, state, tokenizer=tokenizer)
    agrees(rf.score(net, head, steps, [ids], prompt_lengths=prompt), expected)
    agrees(streamed(net, head, steps, ids, prompt), expected)


def test_a_linear_probe_of_ones_own(model, ids, tmp_path):
    state = published.linear_checkpoint(2 * H)
    metadata = {"layers": "[1, -2]", "at": '"token"', "sigmoid": "false", "aggregation": '"last"', "trained_on": '"x"'}
    safetensors.torch.save_file(state, tmp_path / "probe.safetensors", metadata)
    head = rf.load_head(tmp_path / "probe.safetensors").use(trained_on=None)
    found = rf.score(model, head, tiny.steps(), [ids], prompt_lengths=PROMPT)
    columns = [t for t in tiny.expected_steps(ids, PROMPT)]
    expected = published.oracle_linear(model, ids, columns, state, layers=(1, -2), sigmoid=False)
    agrees(found, expected._replace(score=expected.step_scores[-1]))


def test_layers_that_nobody_says(tmp_path):
    torch.save(published.swift_checkpoint(2 * H), tmp_path / "swift.pt")
    with pytest.raises(ValueError, match="nothing says which of hidden_states its 128 inputs are; give layers="):
        rf.load_head(tmp_path / "swift.pt")
    assert rf.load_head(tmp_path / "swift.pt", layers=(4, 2)).tap.layers == (4, 2)


# -- what they compute -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_head_is_two_units_to_the_bit(bias, dtype):
    torch.manual_seed(0)
    head = LinearHead(64, bias=bias, dtype=dtype)
    features = torch.randn(33, 64).to(dtype)
    log_scores = rf.scoring.ops.op.score_rows(features, *head.weights())
    z = features.float() @ head.weight.detach().float().T[:, 0] + (head.bias.detach().float() if bias else 0)
    torch.testing.assert_close(log_scores, torch.nn.functional.logsigmoid(z), rtol=1e-5, atol=1e-6)
    w1, b1, w2, b2 = head.weights()
    assert torch.equal(w1[0], -w1[1]) and w2.tolist() == [[1, -1]] and not b2.any() and torch.equal(b1[0], -b1[1])
    with pytest.raises(ValueError, match="w1_dtype=torch.float8_e4m3fn: a linear head"):
        head.w1_dtype(torch.float8_e4m3fn)


def test_a_value_is_read_back_from_its_log_sigmoid():
    values = torch.cat([torch.linspace(-22.9, 86, 2001), torch.tensor([-0.0, 1e-4, -1e-4])])
    found = logit_of(torch.nn.functional.logsigmoid(values))
    assert ((found - values).abs() <= 4 * 2**-24 * values.abs().clamp_min(1)).all()
    limits = torch.nn.functional.logsigmoid(torch.tensor([-50.0, 200.0])).clamp_min(-23.025851)
    assert logit_of(limits).tolist() == pytest.approx([-23.025851, 87.0]) and logit_of(torch.tensor([float("nan")])).isnan()


@pytest.mark.parametrize("aggregation", ["geometric_mean", "mean", "min", "max", "last", "product"])
def test_a_score_is_what_the_head_makes_of_its_steps(model, ids, aggregation):
    head = test_taps.head(rf.Tap((-2,))).use(aggregation=aggregation)
    found = rf.score(model, head, tiny.steps(), [ids, ids[:30]])
    assert found.aggregation == aggregation
    by_hand = copy.copy(found)
    by_hand.aggregation = ""
    torch.testing.assert_close(found.score, by_hand.aggregate(aggregation))
    assert torch.equal(found.aggregate(aggregation), found.score)


def test_a_state_that_is_not_finite_has_no_score(model, ids):
    net = copy.deepcopy(model)
    net.model.embed_tokens.weight.data[ids[20]] = torch.inf
    gated = GatedLinear(H).use(tap=rf.Tap(at="every"), sigmoid=False).eval()
    for head in (test_taps.head(rf.Tap()).use(aggregation="max"), gated):
        with pytest.warns(rf.NonFiniteWarning):
            found = rf.score(net, head, tiny.steps(), [ids, ids[:18]])
        assert found.score.isnan().tolist() == [True, False] and list(found.errors) == [0] and found.best() == 1


# -- saved and loaded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    "head",
    [
        rf.SPRM(H), rf.SPRM(H, 24).use(tap=rf.Tap((-3,))), rf.SPRM(2 * H, 8, activation="silu").use(tap=rf.Tap((1, 2), "rms", "every")),
        LinearHead(H).use(tap=rf.Tap((2,), at="token"), sigmoid=False, aggregation="last", trained_on="a/b"),
        GatedLinear(H).use(tap=rf.Tap((2,), at="every"), sigmoid=False, higher_is_better=False),
    ],
    ids=["sprm", "layer", "mlp", "linear", "gated"],
)  # fmt: skip
def test_a_head_comes_back_as_it_was(head, suffix, tmp_path):
    file = head.save_pretrained(tmp_path / f"score_module.{suffix}")
    if suffix == "pt":
        if head.activation != "relu":
            return  # what a .pt file cannot say, reflective.json does
        loaded = rf.load_head(file, layers=head.tap.layers)
    else:
        loaded = rf.load_head(file)
        assert (loaded.tap, loaded.aggregation, loaded.sigmoid, loaded.trained_on, loaded.higher_is_better, loaded.activation) == (
            head.tap, head.aggregation, head.sigmoid, head.trained_on, head.higher_is_better, head.activation,
        )  # fmt: skip
    assert type(loaded) is type(head)
    features = torch.randn(5, head.hidden_size)
    assert torch.equal(loaded(features), head.eval()(features))


def test_the_papers_head_is_saved_without_a_word(tmp_path):
    file = rf.SPRM(H).save_pretrained(tmp_path)
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() is None


def test_a_model_keeps_its_heads_tap(tmp_path):
    from test_search import reflective_model

    model = reflective_model()
    model.head = test_taps.head(rf.Tap((-3, -1), at="token")).use(aggregation="mean", trained_on=tmp_path.name)
    model.save_pretrained(tmp_path)
    loaded = rf.ReflectiveModel.from_pretrained(tmp_path)
    assert loaded.head.tap == rf.Tap((-3, -1), at="token") and loaded.config.at == "token"
    found = loaded.generate("what is 2 + 2?", n=3, max_new_tokens=30, temperature=1.0, seed=1)
    again = loaded.score(found.prompt, [c.text for c in found.candidates if c.step_scores])
    assert [c.score for c in again] == pytest.approx([c.score for c in found.candidates if c.step_scores], rel=1e-3)
    for c in found.candidates:
        if c.step_scores:
            assert c.score == pytest.approx(sum(c.step_scores) / len(c.step_scores), rel=1e-5)


def test_a_pt_file_is_told_by_reflective_json(tmp_path):
    from test_search import reflective_model

    model = reflective_model()
    head = test_taps.head(rf.Tap((-3,), at="token")).use(aggregation="mean")
    model.save_pretrained(tmp_path)
    (tmp_path / "score_module.safetensors").unlink()
    head.save_pretrained(tmp_path / "score_module.pt")
    said = json.loads((tmp_path / "reflective.json").read_text())
    (tmp_path / "reflective.json").write_text(json.dumps(said | {"head": {"layers": [-3], "at": "token", "aggregation": "mean"}}))
    loaded = rf.ReflectiveModel.from_pretrained(tmp_path).head
    assert (loaded.tap, loaded.aggregation) == (head.tap, "mean")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"aggregation": "median"}, "aggregation='median'; expected one of"), ({"sigmoid": False}, "multiplies probabilities"),
        ({"aggregation": "gated"}, "aggregation='gated' does not go with a SPRM"), ({"layers": (1,)}, "layers: no setting of a head"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(said, why):
    with pytest.raises(ValueError, match=why):
        rf.SPRM(H).use(**said)


# -- several on one model ---------------------------------------------------------------------------------------------------


def heads():
    torch.manual_seed(5)
    gated = GatedLinear(2 * H).use(tap=rf.Tap((-1, 1), at="every"), sigmoid=False).eval()
    return {"ours": test_taps.head(rf.Tap()), "last": LinearHead(H).use(tap=rf.Tap((2,), at="token"), aggregation="max").eval(), "gated": gated}


def test_several_heads_are_each_what_they_are_alone():
    net, all_heads = test_taps.model(), heads()
    scorer = rf.StreamScorer(net, all_heads, tiny.steps())
    out = test_taps.decoded(net, scorer)
    found, finished = scorer.result(out), rf.score(net, all_heads, tiny.steps(), out, prompt_lengths=test_taps.P)
    assert list(found) == list(finished) == list(all_heads)
    for name, head in all_heads.items():
        alone = rf.StreamScorer(net, head, tiny.steps())
        test_taps.decoded(net, alone)
        one, whole = alone.result(out), rf.score(net, head, tiny.steps(), out, prompt_lengths=test_taps.P)
        assert torch.equal(found[name].score, one.score) and found[name].step_positions[0].tolist() == one.step_positions[0].tolist()
        torch.testing.assert_close(finished[name].score, whole.score, rtol=1e-5, atol=1e-6)
    assert list(rf.score(net, list(all_heads.values())[:2], tiny.steps(), out)) == ["0", "1"]


def test_one_forward_serves_several_heads():
    net, run = test_taps.model(), []
    net.model.layers[0].register_forward_pre_hook(lambda *_: run.append(1))
    ids = test_taps.prompts()
    rf.score(net, heads(), tiny.steps(), ids)
    assert len(run) == 1
    assert not any("_reflective_ears" in vars(m) for m in net.modules())


def test_a_gated_head_searches_in_a_batch(tmp_path):
    from test_search import reflective_model

    model = reflective_model()
    model.head = heads()["gated"]
    found = model.generate("what is 2 + 2?", n=3, max_new_tokens=20, temperature=1.0, seed=1)
    whole = rf.score(
        model.model, model.head, None, [model.encode(found.prompt)[0].tolist() + c.token_ids for c in found.candidates],
        prompt_lengths=[len(model.encode(found.prompt)[0])] * 3,
    )  # fmt: skip
    assert [len(c.step_scores) for c in found.candidates] == [len(c.token_ids) for c in found.candidates] or all(
        len(c.token_ids) - len(c.step_scores) <= 1 for c in found.candidates
    )
    assert found.best.score == max(c.score for c in found.candidates) and len(whole) == 3
    with pytest.raises(ValueError, match="decoding='seats': its scorer keeps features, has a part of the head alone, or several"):
        model.generate("what is 2 + 2?", n=2, max_new_tokens=4, decoding="seats")


def test_a_search_by_risk_is_refused():
    from test_search import reflective_model

    model = reflective_model()
    model.head.use(higher_is_better=False)
    with pytest.raises(ValueError, match="its scores are of risk"):
        model.generate("what is 2 + 2?", n=2, max_new_tokens=4)


def test_what_is_no_head():
    with pytest.raises(TypeError, match=r"head 0: Linear is no reflective.scoring.heads.Head; load it with rf.load_head"):
        rf.StreamScorer(test_taps.model(), [torch.nn.Linear(64, 1)], tiny.steps())
    with pytest.raises(ValueError, match="head: there is none"):
        rf.StreamScorer(test_taps.model(), {}, tiny.steps())


# -- on the command line ----------------------------------------------------------------------------------------------------


def test_reflective_score_with_published_heads(reasoning, tmp_path):
    from test_checkpoints import publish
    from test_cli import run

    net, tokenizer, ids, prompt = reasoning
    path = publish("xbai", tmp_path / "model", torch.float32)
    state = published.step_checkpoint(H)
    torch.save(state, tmp_path / "STEP.pt")
    text = {"prompt": tokenizer.decode(ids[:prompt]), "response": tokenizer.decode(ids[prompt:])}
    (tmp_path / "in.jsonl").write_text(json.dumps(text) + "\n" + json.dumps({"prompt": "x", "response": ""}) + "\n")
    both = run("score", "--model", path, "--head", path, "--head", f"step={tmp_path / 'STEP.pt'}", tmp_path / "in.jsonl", code=1)
    row, fault = map(json.loads, both.stdout.splitlines())
    alone = [
        json.loads(run("score", "--model", path, *head, tmp_path / "in.jsonl", code=1).stdout.splitlines()[0])
        for head in ((), ("--head", tmp_path / "STEP.pt"))
    ]
    expected = published.oracle_step(net, ids, prompt, state, tokenizer=tokenizer)
    assert row["score_step"] == pytest.approx(expected.score, rel=1e-4) == alone[1]["score"]
    assert row["n_steps_step"] == len(expected.positions) and row["step_spans_step"] == alone[1]["step_spans"]
    assert row["score"] == pytest.approx(alone[0]["score"], rel=1e-4) and row["error"] is None
    assert fault["error"] == "the response is empty" and fault["score_step"] is None
    taken = run("score", "--model", path, "--head", path, "--head", path, tmp_path / "in.jsonl", code=2)
    assert "is taken; give NAME=PATH" in taken.stderr
