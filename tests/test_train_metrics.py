"""Measures of scores: each against a case done by hand, and the areas under curves against all pairs counted one by one."""

import itertools
import math
import random

import pytest
import torch

import reflective as rf
from reflective.scoring.scores import AGGREGATIONS, aggregate
from reflective.train.data import Rollouts
from reflective.train.metrics import (
    calibration,
    evaluate,
    evaluate_seeds,
    log_scores,
    saturation,
    trajectory_scores,
    vote_rule,
)


def rollouts(outcome, question=None, answer=None, count=None, steps=None):
    """Trajectories of ``steps`` steps each, by default one."""
    n = len(outcome)
    trajectory = torch.arange(n).repeat_interleave(torch.tensor(steps or [1] * n))
    return Rollouts(
        tokens=torch.zeros(n, dtype=torch.int32),
        length=torch.ones(n, dtype=torch.int64),
        prompt_length=torch.zeros(n, dtype=torch.int64),
        question=torch.tensor(question or [0] * n),
        outcome=torch.tensor(outcome, dtype=torch.float32),
        answer=torch.tensor(answer or [0] * n),
        count=torch.tensor(count or [1] * n),
        trajectory=trajectory,
        position=torch.zeros_like(trajectory),
    )


def logs(*scores):
    return torch.tensor(scores, dtype=torch.float64).log()


def values(*args, **kwargs):
    return {k: m.value for k, m in evaluate(*args, resamples=2, **kwargs).items()}


def scattered(seed, questions=30, trajectories=200):
    """Random rollouts with counts, steps, ties of scores and missing verdicts; questions are numbered with gaps."""
    rng = random.Random(seed)
    steps = [rng.randrange(4) for _ in range(trajectories)]
    r = rollouts(
        [rng.choice([0, 1, 1, math.nan]) for _ in range(trajectories)],
        [7 * rng.randrange(questions) + 3 for _ in range(trajectories)],
        [rng.randrange(-1, 3) for _ in range(trajectories)],
        [rng.randrange(1, 4) for _ in range(trajectories)],
        steps,
    )
    return r, logs(*(rng.randrange(1, 10) / 10 for _ in range(sum(steps))))


def auc(scored):
    """Of ``(score, right, weight, group)``: over all pairs of one group."""
    won = pairs = 0.0
    for (a, right, v, g), (b, wrong, w, h) in itertools.product(scored, scored):
        if right and not wrong and g == h:
            pairs, won = pairs + v * w, won + v * w * ((a > b) + (a == b) / 2)
    return won / pairs


@pytest.mark.parametrize("seed", range(3))
def test_areas_are_those_over_all_pairs(seed):
    r, log = scattered(seed)
    found, score = values(r, log, n=()), trajectory_scores(r, log)
    each = list(zip(score.tolist(), r.outcome.tolist(), r.count.tolist(), r.question.tolist(), strict=True))
    each = [e for e in each if not math.isnan(e[1])]
    steps = [(s, *(float(t[i]) for t in (r.outcome, r.count))) for s, i in zip(log.tolist(), r.trajectory, strict=True)]
    assert found["auc_within"] == pytest.approx(auc(each), abs=1e-12)
    assert found["auc_trajectory"] == pytest.approx(auc([(*e[:3], 0) for e in each]), abs=1e-12)
    assert found["auc_step"] == pytest.approx(auc([(*e, 0) for e in steps if not math.isnan(e[1])]), abs=1e-12)


def test_resamples_of_many_different_scores_stay_near_the_exact_area():
    g = torch.Generator().manual_seed(0)
    outcome = torch.randint(2, (4000,), generator=g).tolist()
    log = torch.nn.functional.logsigmoid(torch.randn(4000, generator=g).double() + torch.tensor(outcome))
    # Of one question every resample is the whole.
    metric = evaluate(rollouts(outcome), log, n=(), resamples=1)["auc_trajectory"]
    assert metric.value != metric.low == pytest.approx(metric.value, abs=5e-5)


def test_measures_by_hand():
    """Question 0: 0.9 right, 0.3 wrong twice. Question 1: 0.6 wrong, 0.5 right, 0.4 right, and one without a verdict."""
    r = rollouts([1, 0, 1, 0, 1, math.nan], [0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1], [1, 2, 1, 1, 1, 9])
    m = values(r, logs(0.9, 0.3, 0.5, 0.6, 0.4, 0.99), n=(3, 4))
    assert m["pass@1"] == m["majority@3"] == m["best_of@3"] == 0.5
    assert m["weighted_vote@3"] == m["any@3"] == 1, "0.9 against 0.6, 0.9 against 0.6"
    assert not any(name.endswith("@4") for name in m), "neither has four judged draws"
    assert m["auc_within"] == pytest.approx(2 / 4)
    assert m["auc_trajectory"] == m["auc_step"] == pytest.approx((3 + 2 + 2) / 9)
    assert m["score_correct"] == pytest.approx(0.6) and m["score_incorrect"] == pytest.approx(0.4)
    assert m["score_gap"] == pytest.approx(0.2)
    assert m["kept"] == pytest.approx(3 / 6), "0.9 and twice 0.3; 0.5 agrees with nothing"
    assert m["brier"] == pytest.approx((0.01 + 2 * 0.09 + 0.25 + 0.36 + 0.36) / 6)
    assert m["ece"] == pytest.approx((0.1 + 0.6 + 0.5 + 0.6 + 0.6) / 6)


def test_ties():
    """Equal votes, equal scores: the mean. The two 0.3 add up to what another has alone, in whatever order."""
    r = rollouts([1, 1, 0, 0], answer=[0, 0, 1, 2])
    m = values(r, logs(0.3, 0.3, 0.6, 0.6), n=(4,))
    assert m["best_of@4"] == 0 and m["majority@4"] == 1 and m["weighted_vote@4"] == pytest.approx(1 / 3)
    m = values(rollouts([1, 0, 0], answer=[0, 1, 2]), logs(0.1, 0.7, 0.7), n=(3,))
    assert m["majority@3"] == pytest.approx(1 / 3) and m["best_of@3"] == 0
    # 0.1 + 0.2 + 0.3 on both sides, added up in the orders in which they were drawn: a tie in every question.
    sides = rollouts([1, 1, 1, 0, 0, 0] * 40, [q for q in range(40) for _ in range(6)], [0, 0, 0, 1, 1, 1] * 40)
    assert values(sides, logs(*[0.1, 0.2, 0.3] * 80), n=(6,))["weighted_vote@6"] == 0.5
    # The same answer judged differently: a vote's outcome is a share of its party, the weighted one's that of its best.
    m = values(rollouts([0, 1, 1, 0], answer=[0, 0, 0, 1]), logs(0.9, 0.1, 0.1, 0.1), n=(4,))
    assert m["majority@4"] == pytest.approx(2 / 3) and m["weighted_vote@4"] == 0


def test_those_without_an_answer_do_not_vote():
    m = values(rollouts([0, 0, 1], answer=[-1, -1, 3]), logs(0.9, 0.9, 0.2), n=(3,))
    assert m["majority@3"] == m["weighted_vote@3"] == 1 and m["best_of@3"] == 0
    m = values(rollouts([0, 0, 1], answer=[-1, -1, -1]), logs(0.9, 0.2, 0.3), n=(3,))
    assert m["majority@3"] == pytest.approx(1 / 3) and m["weighted_vote@3"] == 0, "then the best of n"


def test_groups_are_disjoint_whole_and_of_one_question():
    """17 draws of one trajectory, right in question 0 and wrong in question 1: 4 groups of 4 there, 2 of 8 draws here."""
    r = rollouts([1, 0], [0, 1], count=[17, 8])
    m = values(r, logs(0.5, 0.5), n=(4, 16, 32))
    assert m["best_of@4"] == m["any@4"] == pytest.approx(4 / 6)
    assert m["any@16"] == 1 and "any@32" not in m
    # One draw in four is right: one of two pairs holds it, and the only four do.
    r = rollouts([1, 0] * 50, [q for q in range(50) for _ in "ab"], count=[1, 3] * 50)
    m = values(r, logs(*[0.5] * 100), n=(2, 4))
    assert m["any@4"] == 1 and m["any@2"] == 0.5 and m["best_of@2"] == 0.25
    # Two in four are right: a pair of draws, shuffled, holds one with a chance of 5/6.
    r = rollouts([1, 0] * 500, [q for q in range(500) for _ in "ab"], count=[2, 2] * 500)
    assert values(r, logs(*[0.5] * 1000), n=(2,))["any@2"] == pytest.approx(5 / 6, abs=0.05)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_aggregations_are_those_of_scores(how):
    r, log = scattered(0)
    log[3], log[11] = -math.inf, math.nan
    parts = log.exp().split(torch.bincount(r.trajectory, minlength=len(r)).tolist())
    expected = torch.tensor([aggregate(p.tolist(), how) for p in parts], dtype=torch.float64)
    assert torch.allclose(trajectory_scores(r, log, how), expected, rtol=1e-12, atol=0, equal_nan=True)
    assert len(trajectory_scores(rollouts([1, 0], steps=[0, 0]), logs(), how).nonzero()) == 0


def test_what_has_no_valid_score_counts_as_scored_0():
    r = rollouts([0, 1, 0], steps=[1, 1, 0])
    m = values(r, torch.tensor([math.nan, -1.0]), n=(3,))
    assert m["best_of@3"] == m["auc_within"] == m["auc_trajectory"] == 1
    assert m["score_incorrect"] == 0 and math.isnan(m["auc_step"]) and m["kept"] == 0, "no wrong step is left"
    m = values(rollouts([0, 1], steps=[0, 0]), logs(), n=(2,))
    assert m["best_of@2"] == m["auc_within"] == 0.5 and math.isnan(m["auc_step"]) and math.isnan(m["kept"])


def test_a_head_scores_its_features_without_dropout():
    torch.manual_seed(0)
    head = rf.SPRM(8).train()
    r = rollouts([1, 0, 1])
    r.features = torch.randn(3, 8)
    expected = torch.nn.functional.logsigmoid(head.eval()(r.features).squeeze(-1))
    head.train()
    assert torch.allclose(log_scores(r, head), expected, atol=1e-6) and head.training
    assert values(r, head) == values(r, log_scores(r, head))


def test_intervals_are_over_questions():
    """100 questions of 50 equal draws each: the interval is that of 100 draws of a coin, not of 5,000."""
    outcome = [float(q % 2) for q in range(100)]
    m = evaluate(rollouts(outcome, list(range(100)), count=[50] * 100), logs(*[0.5] * 100), n=(2,), seed=3)
    for name in ("pass@1", "any@2", "best_of@2", "majority@2"):
        assert m[name].value == 0.5
        assert m[name].low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015), name
        assert m[name].high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015), name
    # All pairs are between questions: none within, and nothing to resample.
    assert math.isnan(m["auc_within"].value) and math.isnan(m["auc_within"].low)
    assert (m["auc_trajectory"].low, m["auc_trajectory"].value, m["auc_trajectory"].high) == (0.5, 0.5, 0.5)


def test_intervals_of_every_measure_hold_their_value():
    for name, metric in evaluate(*scattered(5), n=(2, 4), resamples=500).items():
        assert metric.low < metric.value < metric.high, name


def test_seeds_are_pooled():
    """Seeds that differ as a whole: 0.3 and 0.7. Questions alone would say 0.5 with a narrow interval."""
    runs = []
    for share in (0.3, 0.7):
        r = rollouts([float(q < 200 * share) for q in range(200)], list(range(200)))
        runs.append((r, logs(*[0.5] * 200)))
    metric = evaluate_seeds(runs, n=(1,))["pass@1"]
    assert metric.value == 0.5 and metric.low < 0.3 and metric.high > 0.7
    one, same = evaluate(*runs[0])["pass@1"], evaluate_seeds([runs[0]] * 3)["pass@1"]
    assert one.value == same.value and one.low == pytest.approx(same.low, abs=0.01), (
        "one set of questions, seen three times"
    )
    short = (rollouts([1, 0], [5, 9999]), logs(0.9, 0.1))  # other questions, and too few draws
    assert not any("@2" in name for name in evaluate_seeds([(rollouts([1, 1]), logs(0.5, 0.5)), short], n=(2,)))


def test_differences_are_paired():
    """Best of 2 is majority, and a fifth of the questions better: its interval is a fraction of theirs."""
    n, better = 400, 80
    right = [[float(q % 2)] * 2 if q >= better else [1.0, 0.0] for q in range(n)]
    r = rollouts([x for pair in right for x in pair], [q for q in range(n) for _ in range(2)], [0, 1] * n)
    runs = [(r, logs(*[0.9, 0.1] * n))]
    pair = ("best_of@2", "majority@2")
    found = evaluate_seeds(runs * 2, n=(2,), differences=[pair, ("best_of@2", "best_of@9")])
    told = found["best_of@2 - majority@2"]
    assert told.value == pytest.approx(found["best_of@2"].value - found["majority@2"].value) == pytest.approx(0.1)
    assert 0.06 < told.low < 0.1 < told.high < 0.14
    assert found["best_of@2"].high - found["best_of@2"].low > 2 * (told.high - told.low)
    assert not any("@9" in name for name in found)


def test_votes_by_a_rule():
    """A right answer that scores 0.9 against three wrong ones alike of 0.5."""
    r = rollouts([1, 0, 0, 0] * 50, [q for q in range(50) for _ in range(4)], [0, 1, 1, 1] * 50)
    scores = logs(*[0.9, 0.5, 0.5, 0.5] * 50)
    rule = vote_rule(r, scores)
    found = {k: m.value for k, m in evaluate(r, scores, n=(4,), rule=rule, resamples=2).items()}
    assert rule.exponent > 1 and found["select@4"] == 1 and found["weighted_vote@4"] == found["majority@4"] == 0
    assert "select@4" not in evaluate(r, scores, n=(4,), resamples=2)
    counted = rollouts([1, 0] * 50, [q for q in range(50) for _ in range(2)], [0, 1] * 50, [1, 3] * 50)
    assert vote_rule(counted, logs(*[0.9, 0.5] * 50)) == rule, "a draw as often as it was drawn"


def test_what_cannot_be_measured_is_refused():
    r = rollouts([1, 0])
    with pytest.raises(ValueError, match="no trajectory has a verdict"):
        evaluate(rollouts([math.nan]), logs(0.5))
    with pytest.raises(ValueError, match="no trajectory has a verdict"):
        evaluate_seeds([])
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 recorded steps"):
        evaluate(r, logs(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="a value above 0"):
        evaluate(r, torch.tensor([0.9, 0.5]))
    with pytest.raises(ValueError, match="aggregation='median'"):
        evaluate(r, logs(0.5, 0.5), aggregation="median")
    with pytest.raises(ValueError, match="no features were recorded"):
        evaluate(r, rf.SPRM(8))


def test_calibration():
    """A score of (k + 1/2) / 100 that is right so often: calibrated; twice as sure of itself: not."""
    outcome = [float(i < k) for k in range(100) for i in range(100)]
    sure = [(k + 0.5) / 100 for k in range(100) for _ in range(100)]
    points = calibration(rollouts(outcome), logs(*sure), bins=20)
    assert len(points) == 20 and all(w == pytest.approx(0.05) for _, _, w in points)
    assert all(s == pytest.approx(y + 0.005) for s, y, _ in points) and points == sorted(points)
    m = values(rollouts(outcome), logs(*sure), n=())
    assert m["ece"] == pytest.approx(0.005) and m["brier"] == pytest.approx(1 / 6, abs=0.001)
    m = values(rollouts(outcome), logs(*(s**0.5 for s in sure)), n=())
    assert m["ece"] == pytest.approx(2 / 3 - 1 / 2, abs=0.01)
    assert calibration(rollouts([1, 0, math.nan], count=[1, 3, 9]), logs(0.8, 0.2, 0.5)) == [
        (pytest.approx(0.2), 0, 0.75), (pytest.approx(0.8), 1, 0.25),
    ]  # fmt: skip


def test_saturation():
    ns = [1, 2, 4, 8, 16, 32]
    fit = saturation(ns, [0.6 - 0.4 * n**-0.8 for n in ns])
    assert (fit.limit, fit.gain, fit.rate) == tuple(pytest.approx(x, abs=1e-4) for x in (0.6, 0.4, 0.8))
    assert fit.limit - fit.gain * fit.n95**-fit.rate == pytest.approx(fit.limit - 0.05 * fit.gain)
    falling = saturation(ns, [0.2 + 0.1 / n for n in ns])
    assert (falling.limit, falling.gain) == (pytest.approx(0.2, abs=1e-4), pytest.approx(-0.1, abs=1e-4))
    assert saturation(ns, [0.1 * math.log2(n) + 0.3 for n in ns]).limit <= 1, "no accuracy is above 1"
    assert saturation(ns, [0.5] * 6).n95 == 1
    with pytest.raises(ValueError, match="three different n"):
        saturation([1, 2, 2], [0.1, 0.2, 0.2])
