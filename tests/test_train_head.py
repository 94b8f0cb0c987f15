"""The head fitted to recorded features: what it finds, that a killed run goes on, and that two processes are as one."""

import copy
import dataclasses

import pytest
import torch
from safetensors import safe_open

import reflective as rf
from reflective.scoring.heads import LinearHead
from reflective.scoring.taps import Tap
from reflective.train.data import Rollouts, split_questions
from reflective.train.head import Batches, Standardised, fit
from reflective.train.layers import candidates, choose_layer
from reflective.train.metrics import evaluate


def synthetic(questions=60, samples=8, seed=0, hidden=16):
    """Rollouts whose features carry correctness in dimension 0 and the question's difficulty, larger, in dimension 1."""
    g = torch.Generator().manual_seed(seed)
    question = torch.arange(questions).repeat_interleave(samples)
    n = len(question)
    hard = torch.rand(questions, generator=g)[question]
    outcome = (torch.rand(n, generator=g) > hard).float()
    trajectory = torch.arange(n).repeat_interleave(torch.randint(1, 6, (n,), generator=g))
    features = torch.randn(len(trajectory), hidden, generator=g)
    features[:, 0] += 3 * (outcome[trajectory] - 0.5)
    features[:, 1] += 6 * (0.5 - hard[trajectory])
    one, zero = torch.ones_like(question), torch.zeros_like(question)
    return Rollouts(
        tokens=torch.zeros(n, dtype=torch.int32), length=one, prompt_length=zero, question=question, outcome=outcome,
        answer=zero, count=one, features=features * 5 + 40, trajectory=trajectory, position=torch.zeros_like(trajectory),
    )  # fmt: skip


def auc_within(head, rollouts):
    """Chance that a step of a correct trajectory outscores one of an incorrect trajectory of the same question."""
    score, y = head(rollouts.features).squeeze(-1), rollouts.outcome[rollouts.trajectory]
    question = rollouts.question[rollouts.trajectory]
    pairs = (question[:, None] == question) & (y[:, None] > y)
    return float((score[:, None] > score)[pairs].double().mean())


def weights(head):
    return torch.cat([p.flatten() for p in head.parameters()])


def test_finds_correctness_within_questions():
    losses, heads = [], []

    def on_epoch(epoch, loss, head):
        losses.append(loss), heads.append(head)

    head = fit(synthetic(300), epochs=8, warmup=4, lr=1e-3, on_epoch=on_epoch)
    assert auc_within(head, synthetic(seed=1)) > 0.9
    assert len(losses) == 8 and losses[3] < 0.9 * losses[0]
    assert torch.equal(weights(heads[-1]), weights(head)) and auc_within(heads[0], synthetic(seed=1)) < 0.9
    assert not head.training and head.dtype == torch.float32 and head.width == 32


def test_the_dynamic_weights_begin_after_the_warmup():
    """Until then runs are equal to the bit; a head that agrees with few outcomes then keeps few steps."""
    found = {}
    for warmup in (0, 2, None):
        fit(
            synthetic(20),
            epochs=4,
            warmup=warmup,
            on_epoch=lambda e, loss, h, w=warmup: found.__setitem__((w, e), loss),
        )
    assert found[2, 0] == found[None, 0] and found[2, 1] == found[None, 1] and found[2, 2] != found[None, 2]
    assert found[0, 0] < 0.8 * found[None, 0]


def test_dropout_is_that_which_is_asked_for():
    r = synthetic(40)
    losses = {p: [] for p in (0.0, 0.5, 0.9)}
    for p, found in losses.items():
        fit(r, epochs=12, lr=3e-3, dropout=p, on_epoch=lambda epoch, loss, head, found=found: found.append(loss))
    assert losses[0.0][-1] < losses[0.5][-1] < losses[0.9][-1]
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout="):
            fit(r, dropout=wrong)


def test_leaves_the_callers_random_numbers_alone():
    before = torch.get_rng_state()
    fit(synthetic(10), epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_has_no_part():
    """Without a verdict, without a step or without the other outcome: the head is the same to the bit, whatever it says."""
    rollouts = synthetic(20)
    rollouts.outcome[5] = float("nan")
    rollouts.outcome[rollouts.question == 3] = 1
    other = copy.deepcopy(rollouts)
    other.features[(other.trajectory == 5) | (other.trajectory // 8 == 3)] += 9
    assert torch.equal(weights(fit(rollouts, epochs=2)), weights(fit(other, epochs=2)))
    other = copy.deepcopy(rollouts)
    kept = other.trajectory != 9
    other.features, other.trajectory = other.features[kept], other.trajectory[kept]
    used = Batches(other, torch.bincount(other.trajectory, minlength=160), 64, True).used
    assert 9 not in used and 5 not in used and not (other.question[used] == 3).any()
    fit(other, epochs=1)


def test_batches():
    rollouts = synthetic(50)
    batches = Batches(rollouts, torch.bincount(rollouts.trajectory), 20, False)
    first, again, second = batches.epoch(0, 0), batches.epoch(0, 0), batches.epoch(0, 1)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, second))
    assert torch.equal(torch.cat(first).sort().values, torch.arange(len(rollouts)))
    for part in first:
        assert len(part) in (16, 24), "whole questions of 8, about 20 trajectories"
        assert all(torch.isin(torch.arange(8 * q, 8 * q + 8), part).all() for q in rollouts.question[part].unique())


def test_standardised_is_folded_exactly():
    torch.manual_seed(0)
    head, x = rf.SPRM(16).eval(), 5 * torch.randn(100, 16) + 40
    scale = Standardised.of(x)
    torch.testing.assert_close(scale(x).std(0, correction=0), torch.ones(16))
    folded, plain = scale.folded(head), copy.deepcopy(head)
    with torch.no_grad():
        plain[0].weight /= scale.sd
        plain[0].bias -= plain[0].weight @ scale.mean
        truth = copy.deepcopy(head).double()((x.double() - scale.mean) / scale.sd)
        assert (folded(x) - truth).abs().max() <= 2 * (plain(x) - truth).abs().max()
    torch.testing.assert_close(weights(scale.folded(scale.unfolded(head))), weights(head), rtol=1e-5, atol=1e-6)
    same = Standardised.none(16).folded(head)
    assert torch.equal(weights(same), weights(head)) and same[2].p == head[2].p
    x[:, 3] = 7
    assert 0 < Standardised.of(x).sd[3] < 0.011 * scale.sd.median(), "what never varies there is not blown up elsewhere"


def test_goes_on_from_a_published_head(tmp_path):
    first = fit(synthetic(20), epochs=1)
    first.to(torch.bfloat16).save_pretrained(tmp_path / "score_module.pt")
    published = rf.SPRM.from_pretrained(tmp_path)
    unchanged = fit(synthetic(20), epochs=1, lr=0.0, weight_decay=0.0, init=published)
    assert torch.equal(weights(unchanged), weights(published).float())
    assert not torch.equal(weights(fit(synthetic(20), epochs=1, lr=1e-5, init=published)), weights(unchanged))
    with pytest.raises(ValueError, match="init: a head of 16 -> 32; expected 16 -> 8"):
        fit(synthetic(20), init=first, width=8)


def several_layers(questions=40, seed=0):
    """Rollouts of three layers of 16 values, of which the second tells right from wrong."""
    told = synthetic(questions, seed=seed)
    noise = [torch.randn(told.features.shape, generator=torch.Generator().manual_seed(seed + i)) for i in (1, 2)]
    return dataclasses.replace(told, features=torch.cat([noise[0], told.features, noise[1]], 1), tap=Tap((-1, -4, -6)), model="org/policy")


def test_a_head_says_where_it_reads_and_of_which_model(tmp_path):
    told = several_layers().read(Tap((-4, -6)))
    head = fit(told, epochs=1)
    assert head.hidden_size == 32 and head.tap == Tap((-4, -6)) and head.trained_on == "org/policy"
    head.save_pretrained(tmp_path)
    again = rf.SPRM.from_pretrained(tmp_path)
    assert again.tap == head.tap and again.trained_on == "org/policy" and torch.equal(weights(again), weights(head))
    assert fit(told, epochs=1, init=again).tap == head.tap
    whole = evaluate(several_layers(seed=5), head, n=())["auc_step"]
    assert whole == evaluate(several_layers(seed=5).read(head.tap), head, n=())["auc_step"], "of several layers it takes its own"
    with pytest.raises(ValueError, match=r"init: a head that reads Tap\(layers=\(-4, -6\).*features are of Tap\(layers=\(-1, -4\)"):
        fit(several_layers().read(Tap((-1, -4))), init=again)
    plain = fit(synthetic(10), epochs=1)
    assert plain.tap == Tap() and plain.trained_on is None
    plain.save_pretrained(tmp_path / "plain")
    with safe_open(tmp_path / "plain" / "score_module.safetensors", framework="pt") as file:
        assert not file.metadata(), "nothing is said of what is as published"


def test_the_layer_is_chosen_by_questions_that_are_held_back():
    told, seen = several_layers(60), []
    settings = {"epochs": 6, "lr": 3e-3}
    tap, found = choose_layer(told, **settings, on_layer=lambda layer, auc: seen.append(layer))
    assert tap == Tap((-4,)) and list(found) == seen == [-1, -4, -6]
    assert found[-4].value > 0.9 and max(found[-1].value, found[-6].value) < 0.7
    assert found[-4].low < found[-4].value < found[-4].high

    memorised = dataclasses.replace(told, features=told.features.clone())
    memorised.features[:, :16] = 0  # of one that is right about every question but those held back
    kept, others = split_questions(told, 0.75, 0)
    inside = torch.isin(told.question, kept.question.unique())[told.trajectory]
    memorised.features[inside, 0] = 9 * (told.outcome[told.trajectory][inside] - 0.5)
    assert choose_layer(memorised, **settings)[0] == Tap((-4,))

    with pytest.raises(ValueError, match="not known of which layers"):
        choose_layer(synthetic(10))
    told.outcome[torch.isin(told.question, others.question.unique())] = 1
    with pytest.raises(ValueError, match="none of the 15 questions held back is answered both ways"):
        choose_layer(told, epochs=1)


def test_layers_worth_a_try():
    assert candidates(30) == (-2, -4, -7, -10, -12, -14, -17, -20, -22)
    assert candidates(4) == (-2, -3, -4) and candidates(2) == (-2,)


@pytest.mark.parametrize("settings", [{"activation": "gelu"}, {"sigmoid": False, "aggregation": "mean"}])
def test_heads_of_other_forms_are_not_gone_on_with(settings):
    head = rf.SPRM(16)
    for name, value in settings.items():
        setattr(head, name, value)
    with pytest.raises(ValueError, match="init: a sprm head .* begin with a new head"):
        fit(synthetic(10), init=head)
    with pytest.raises(ValueError, match="init: a linear head"):
        fit(synthetic(10), init=LinearHead(16))


def test_refused():
    rollouts = synthetic(20)
    rollouts.outcome[:] = 1
    with pytest.raises(ValueError, match="0 trajectories of questions with both outcomes .* both outcomes are needed"):
        fit(rollouts)
    with pytest.raises(ValueError, match=r"160 trajectories have a verdict and a step, 160 of them correct"):
        fit(rollouts, within_questions=False)
    rollouts.features = None
    with pytest.raises(ValueError, match="without features"):
        fit(rollouts)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", [0, 2])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, last):
    rollouts, flags = synthetic(20), {"epochs": 4, "warmup": 2, "class_balance": True}
    whole = fit(rollouts, **flags)

    def killed(epoch, loss, head):
        if epoch == last:
            raise Killed

    with pytest.raises(Killed):
        fit(rollouts, **flags, checkpoint=tmp_path, on_epoch=killed)
    epochs = []
    resumed = fit(rollouts, **flags, checkpoint=tmp_path, on_epoch=lambda epoch, loss, head: epochs.append(epoch))
    assert torch.equal(weights(resumed), weights(whole)) and epochs == list(range(last + 1, 4))
    assert torch.equal(weights(fit(rollouts, **flags, checkpoint=tmp_path)), weights(whole)), "one that is over stays"
    with pytest.raises(ValueError, match=r"other settings \(lr was 0.0003, is 0.1; warmup was 2, is 0\)"):
        fit(rollouts, epochs=4, warmup=0, class_balance=True, lr=0.1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="other settings .rollouts was"):
        fit(synthetic(21), **flags, checkpoint=tmp_path)


# -- two processes: also those of the backbone, to start them once ----------------------------------------------------


def without_dropout(hidden=16):
    torch.manual_seed(0)
    head = rf.SPRM(hidden)
    head[2].p = 0.0
    return head


def fit_shared(accelerator=None):
    return fit(
        synthetic(20), epochs=3, warmup=1, lr=1e-3, class_balance=True, init=without_dropout(), accelerator=accelerator
    )
