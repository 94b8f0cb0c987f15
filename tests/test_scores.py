"""Step scores to one number, by hand."""

import math

import pytest
import torch

import reflective as rf
from reflective.scoring.scores import AGGREGATIONS, aggregate

STEPS = [0.5, 0.25, 0.8]
BY_HAND = {"geometric_mean": 0.1 ** (1 / 3), "mean": 1.55 / 3, "min": 0.25, "max": 0.8, "last": 0.8, "product": 0.1}


def trajectories(*steps: list[float], n_steps: list[int] | None = None) -> rf.TrajectoryScores:
    logs = [torch.tensor(s).log() for s in steps]
    counts = n_steps or [len(s) for s in steps]
    return rf.TrajectoryScores.collect(
        [float(x.sum()) for x in logs], counts, logs, [torch.arange(len(s)) for s in steps], "predict"
    )


def test_every_aggregation_is_covered():
    assert set(AGGREGATIONS) == set(BY_HAND)


@pytest.mark.parametrize("how", BY_HAND)
def test_aggregations(how):
    assert aggregate(STEPS, how) == pytest.approx(BY_HAND[how], rel=1e-12)
    assert aggregate([0.3], how) == pytest.approx(0.3, rel=1e-12)
    assert aggregate([], how) == 0.0
    assert math.isnan(aggregate([0.5, math.nan, 0.2], how))
    of_tensors = trajectories(STEPS, [], [0.3]).aggregate(how)
    assert of_tensors.dtype == torch.float32
    torch.testing.assert_close(of_tensors, torch.tensor([BY_HAND[how], 0.0, 0.3]), rtol=1e-6, atol=0)


def test_steps_are_clamped_only_under_a_logarithm():
    assert aggregate([0.0, 1.0]) == pytest.approx(1e-5, rel=1e-12)
    assert aggregate([0.0, 1.0], "product") == 1e-10
    assert aggregate([0.0, 1.0], "min") == 0.0 and aggregate([1.0, 0.0], "last") == 0.0


def test_the_geometric_mean_is_the_score_itself():
    found = trajectories(STEPS, [0.9, 0.1])
    assert torch.equal(found.aggregate(), found.score)


def test_a_trajectory_without_a_score_has_no_aggregate():
    with pytest.warns(rf.NonFiniteWarning):
        found = trajectories([0.5, math.nan], [0.4])
    for how in BY_HAND:
        values = found.aggregate(how)
        assert values[0].isnan() and values[1] == pytest.approx(0.4)


def test_refusals():
    with pytest.raises(ValueError, match=r"aggregation='median'.*geometric_mean"):
        aggregate(STEPS, "median")
    with pytest.raises(ValueError, match="aggregation='median'"):
        trajectories(STEPS).aggregate("median")
    with pytest.raises(ValueError, match="of the 5 steps of trajectory 0 only 3 were recorded"):
        trajectories(STEPS, n_steps=[5]).aggregate("min")
