"""Rollouts: their features are the states that scoring reads, and a run that was killed goes on as if it had not been."""

import itertools

import pytest
import torch
from test_train_sampler import CHARACTERS, reflective

import reflective as rf
from reflective.engines.hf.backbone import Backbone
from reflective.scoring.taps import Tap
from reflective.tasks import Question
from reflective.train.data import Rollouts
from reflective.train.rollout import View, recorded, roll_out, roll_out_views

QUESTIONS = [Question(text, text[0]) for text in ("why now?", "who?", "x", "how so, then?", "when?")]
SETTINGS = {"samples": 6, "temperature": 1.0, "max_new_tokens": 12, "batch_rows": 4, "seed": 3}


def judged(response, question):
    return None if "z" in response else float("b" in response)


def rolled(model, views, **settings):
    settings = {
        **SETTINGS,
        "top_p": 1.0,
        "verify": judged,
        "block": 2,
        "first": 0,
        "progress": lambda n: None,
    } | settings
    return roll_out_views(model, QUESTIONS, views, **settings)


def together(blocks):
    blocks = list(blocks)
    return {name: Rollouts.join([block[name] for block in blocks]) for name in blocks[0]}


def assert_same(a, b):
    assert (a.tap, a.model) == (b.tap, b.model)
    for name, value in a.tensors.items():
        torch.testing.assert_close(value, getattr(b, name), rtol=0, atol=0, equal_nan=True)


def hidden(model, rollouts, i):
    with torch.no_grad():
        return model.model(rollouts.ids(i).long()[None], output_hidden_states=True).hidden_states


def test_features_are_the_states_that_scoring_reads():
    model = reflective("llama")
    rules = {
        "vowels": model.steps,
        "two": rf.StepTokens.from_tokenizer(model.tokenizer, rule="text", delimiter=["ab", "b", "N"]),
        "some": rf.StepTokens.from_tokenizer(model.tokenizer, rule="contains", delimiter=list("RSTUVWXYZ .")),
    }
    views = {
        f"{name} {at}": View(steps, Tap(at=at)) for name, steps in rules.items() for at in ("predict", "token")
    } | {"deep": View(model.steps, Tap((-1,))), "shallow": View(model.steps, Tap((1,)))}
    found, dropped = together(rolled(model, views)), 0
    for name, view in views.items():
        r = found[name]
        rows = [r.ids(i).long() for i in range(len(r))]
        scores = rf.score(
            model.model, model.head, view.steps, rows, at=view.tap.at, prompt_lengths=r.prompt_length, backend="torch"
        )
        assert len(r.features) == len(r.trajectory) == len(r.position) > 20
        for i in range(len(r)):
            mine, expected = r.trajectory == i, scores.step_positions[i]
            # A step-token that was generated last was never fed: at="token" it has no state.
            seen = expected < int(r.length[i]) - int(view.tap.at == "token")
            dropped += int((~seen).sum())
            assert r.position[mine].tolist() == expected[seen].tolist()
            read = r.position[mine] - int(view.tap.at == "predict")
            torch.testing.assert_close(r.features[mine], hidden(model, r, i)[view.tap.layers[0]][0, read], rtol=1e-4, atol=1e-4)
            if view.tap.layers == (-2,):
                own = model.head(r.features[mine]).sigmoid().squeeze(-1)
                torch.testing.assert_close(own, scores.step_scores[i][seen], rtol=1e-3, atol=1e-5)
    assert dropped > 0
    for a, b in itertools.pairwise(found.values()):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.count, b.count)


def test_several_layers_are_recorded_at_once_and_read_alone():
    """Side by side in the order given, normalised where the tap says so; a head of one of them finds its own."""
    model = reflective("llama")
    norm = model.model.model.norm
    taps = {"two": Tap((-4, -1)), "turned": Tap((-1, -4)), "normed": Tap((-3, -2), norm=True, at="token")}
    taps |= {"alone": Tap((-4,)), "scaled": Tap((-2, 1), norm="rms")}
    found = together(rolled(model, {name: View(model.steps, tap) for name, tap in taps.items()}))
    for name, tap in taps.items():
        r = found[name]
        assert r.tap == tap and r.features.shape == (len(r.trajectory), 64 * len(tap.layers)) and len(r.features) > 20
        for i in range(len(r)):
            mine, states = r.trajectory == i, hidden(model, r, i)
            read = r.position[mine] - int(tap.at == "predict")
            expected = [states[layer][0, read] for layer in tap.layers]
            if tap.norm is True:
                with torch.no_grad():
                    expected = [norm(state) for state in expected]
            elif tap.norm == "rms":
                expected = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in expected]
            torch.testing.assert_close(r.features[mine], torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(found["two"].read(Tap((-4,))).features, found["alone"].features)
    assert torch.equal(found["two"].read(Tap((-1, -4))).features, found["turned"].features)
    default = Rollouts.join(list(roll_out(model, QUESTIONS, **SETTINGS, verify=judged, block=2)))
    given = Rollouts.join(list(roll_out(model, QUESTIONS, **SETTINGS, verify=judged, block=2, tap=Tap((-4,)))))
    assert default.tap == Tap() and given.tap == Tap((-4,)) and torch.equal(given.features, found["alone"].features)
    model.head = rf.SPRM(128).use(tap=Tap((-4, -1))).eval()
    own = Rollouts.join(list(roll_out(model, QUESTIONS, **SETTINGS, verify=judged, block=2)))
    assert torch.equal(own.features, found["two"].features), "where the model's head reads"


def test_every_token_is_a_step_but_the_end_and_the_last():
    model = reflective("llama")
    r = together(rolled(model, {"every": View(None, Tap((-3,), at="every"))}))["every"]
    ends = 0
    for i in range(len(r)):
        ids, prompt, mine = r.ids(i).tolist(), int(r.prompt_length[i]), r.trajectory == i
        expected = [t for t in range(max(prompt, 2), len(ids) - 1) if ids[t] not in (0, 2)]  # no text's second token ends a step
        assert r.position[mine].tolist() == expected
        ends += ids[-1] == 2
        torch.testing.assert_close(r.features[mine], hidden(model, r, i)[-3][0, expected], rtol=1e-4, atol=1e-4)
    assert 0 < ends < len(r)
    backbone = Backbone.of(model.model, r.tap)
    assert backbone.places.deepest == 2


@pytest.mark.parametrize("max_new_tokens", [1, 5])
def test_an_outcome_head_reads_the_last_state_that_was_computed(max_new_tokens):
    model = reflective("llama")
    r = together(rolled(model, {"outcome": View(None)}, max_new_tokens=max_new_tokens))["outcome"]
    assert r.trajectory.tolist() == list(range(len(r))) and int((r.length - r.prompt_length).max()) == max_new_tokens
    assert torch.equal(r.position, r.length - 1)
    expected = torch.stack([hidden(model, r, i)[-2][0, -2] for i in range(len(r))])
    torch.testing.assert_close(r.features, expected, rtol=1e-4, atol=1e-4)


def test_every_draw_is_counted_and_judged():
    model, told = reflective("llama", answer="([b-z])"), []
    r = Rollouts.join(list(roll_out(model, QUESTIONS, **SETTINGS, verify=judged, block=2, progress=told.append)))
    assert sum(told) == 6 * len(QUESTIONS)
    for q, question in enumerate(QUESTIONS):
        mine = (r.question == q).nonzero().flatten().tolist()
        assert int(r.count[mine].sum()) == 6
        texts = [model.decode(r.ids(i)[int(r.prompt_length[i]) :].tolist()) for i in mine]
        assert len(set(texts)) == len(texts)
        assert all(r.ids(i)[: int(r.prompt_length[i])].tolist() == model.tokenizer.encode(question.text) for i in mine)
        for i, text in zip(mine, texts, strict=True):
            verdict = judged(text, question)
            assert bool(r.outcome[i].isnan()) if verdict is None else float(r.outcome[i]) == verdict
            assert (int(r.answer[i]) < 0) == (model.answer(text) is None)
        for i, j in itertools.combinations(range(len(mine)), 2):
            same = model.answer(texts[i]) == model.answer(texts[j])
            assert (r.answer[mine[i]] == r.answer[mine[j]]) == same
    assert {0.0, 1.0} < set(r.outcome.nan_to_num(-1).tolist())
    (greedy,) = roll_out(model, QUESTIONS, **{**SETTINGS, "temperature": 0.0}, verify=judged)
    assert greedy.count.tolist() == [6] * len(QUESTIONS)


def test_questions_without_a_step_leave_the_features_as_they_are():
    model = reflective("llama")
    model.model.to(torch.bfloat16)
    nowhere = rf.StepTokens.from_tokenizer(model.tokenizer, rule="text", delimiter="".join(CHARACTERS[:20]))
    (r, *_) = rolled(model, {"none": View(nowhere), "some": View(model.steps)}, max_new_tokens=3, samples=2)
    assert r["none"].features.shape == (0, 64) and r["some"].features.shape[1] == 64
    assert r["none"].features.dtype == r["some"].features.dtype == torch.bfloat16


def test_a_later_block_is_what_it_is_in_a_whole_run():
    model, views = reflective("llama"), {"steps": View(reflective("llama").steps)}
    whole, told = list(rolled(model, views)), []
    (last,) = rolled(model, views, first=2, progress=told.append)
    assert len(whole) == 3 and sum(told) == 6 * len(QUESTIONS)
    assert_same(whole[2]["steps"], last["steps"])
    assert last["steps"].question.unique().tolist() == [4]
    twice = [block.tokens for block in roll_out(model, QUESTIONS[:1] * 2, **SETTINGS, verify=judged, block=1)]
    assert len(twice) == 2 and not torch.equal(*twice)  # every block has uniforms of its own


def test_a_killed_run_goes_on(tmp_path):
    model = reflective("llama")
    views = {"steps": View(model.steps), "outcome": View(None)}
    began = []

    def make(first):
        began.append(first)
        return rolled(model, views, first=first)

    def killed(first):
        yield next(make(first))
        raise KeyboardInterrupt

    whole = recorded(tmp_path / "whole", {"seed": 3}, make)
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path / "killed", {"seed": 3}, killed)
    (tmp_path / "killed" / "unfinished").mkdir()
    (tmp_path / "killed" / "unfinished" / "steps.safetensors").write_bytes(b"half of")
    again = recorded(tmp_path / "killed", {"seed": 3}, make)
    read = recorded(tmp_path / "killed", {"seed": 3}, make)
    assert began == [0, 0, 1, 3]
    for name in views:
        assert_same(whole[name], again[name])
        assert_same(whole[name], read[name])
    with pytest.raises(ValueError, match="made with other settings"):
        recorded(tmp_path / "killed", {"seed": 4}, make)
