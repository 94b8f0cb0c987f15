"""What selecting one of n answers to a question is worth: estimators, and the fit of their growth with n. Without torch."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_SUBSETS = 512  # groups that stand for all of a question: their choice moves its mean by 0.02 at most (1 sd)


@dataclass(frozen=True)
class Metric:
    """Attributes: ``value``; ``low``, ``high``: 95 % bootstrap interval. NaN where nothing defines it."""

    value: float
    low: float
    high: float


def select(score: ArrayLike, right: ArrayLike, answer: ArrayLike, n: int) -> dict[str, Array]:
    """[G] outcome of every way to select from each group of ``n``; the arguments, [G n], are group by group.

    =================  =======================================================================================
    ``majority``       of the answer that most of a group give; of equally frequent ones the mean
    ``weighted_vote``  of the answer with the largest sum of scores, where it scores highest
    ``best_of``        of the highest score; of equals the mean
    ``any``            whether one is correct
    =================  =======================================================================================

    Where nobody in a group answers, ``majority`` is its mean outcome and ``weighted_vote`` its best of n.

    Args:
        score: at least 0. right: 1 or 0. answer: integers, equal ones for equal answers, -1 for none.
    """
    score, right = (np.asarray(v, np.float64) for v in (score, right))
    answer = np.asarray(answer, np.int64)
    groups = len(score) // n
    group = np.repeat(np.arange(groups), n)
    # Only who answers votes; where nobody does, all vote for the same.
    voters = (answer >= 0) | (answer.reshape(-1, n) < 0).all(1)[group]
    score_v, right_v = score[voters], right[voters]
    width = int(answer.max(initial=-1)) + 2
    party, party_of = np.unique(group[voters] * width + answer[voters] + 1, return_inverse=True)
    party_group = party // width

    def elected(weight: Array, choice: NDArray[np.bool_]) -> Array:
        votes = np.bincount(party_of, weight, len(party))
        return _mean(
            _mean(right_v, choice, party_of, len(party)), _top(votes, party_group, groups), party_group, groups
        )

    everyone = np.ones(len(score_v), bool)
    return {
        "majority": elected(everyone.astype(np.float64), everyone),
        "weighted_vote": elected(score_v, _top(score_v, party_of, len(party))),
        "best_of": _mean(right, _top(score, group, groups), group, groups),
        "any": right.reshape(-1, n).max(1, initial=0.0),
    }


def best_of(score: Sequence[float], right: Sequence[float], n: int) -> float:
    """Mean of ``select``'s ``best_of`` over all groups of ``n`` of M answers.

    ``sum_s r_s (C(u_s, n) - C(l_s, n)) / C(M, n)`` over the different scores ``s``: ``u_s`` answers score ``s`` or less,
    ``l_s`` less, and ``r_s`` is the mean outcome of those that score ``s``.
    """
    _, level, equal = np.unique(score, return_inverse=True, return_counts=True)
    mean = np.bincount(level, right) / equal
    within = np.array([math.comb(u, n) / math.comb(len(level), n) for u in (0, *equal.cumsum().tolist())])
    return float(mean @ np.diff(within))


def any_of(right: Sequence[float], n: int) -> float:
    """Mean of ``select``'s ``any`` over all groups of ``n`` of M answers: ``1 - C(wrong, n) / C(M, n)``.

    Source: Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374 (pass@k).
    """
    wrong = len(right) - round(math.fsum(right))
    return 1 - math.comb(wrong, n) / math.comb(len(right), n)


@lru_cache(256)
def subsets(m: int, n: int) -> NDArray[np.int64]:
    """[G, n] groups of ``n`` of ``m`` places: all there are, or 512 of them drawn, always the same."""
    if math.comb(m, n) <= _SUBSETS:
        return np.array(list(itertools.combinations(range(m), n)))
    return np.random.default_rng([m, n]).random((_SUBSETS, m)).argsort(1)[:, :n]


@dataclass(frozen=True)
class Saturation:
    """``acc(n) = limit - gain n^-rate``; ``n95``: the n with 95 % of the gain over n = 1, ``20^(1/rate)``."""

    limit: float
    gain: float
    rate: float
    n95: float


def saturation(ns: Sequence[int], accuracies: Sequence[float]) -> Saturation:
    """Least-squares fit of ``acc(n) = limit - gain n^-rate`` with ``limit`` in [0, 1]; rate infinite where nothing changes.

    Raises:
        ValueError: fewer than three different n, or one below 1.
    """
    if len(set(ns)) < 3 or min(ns) < 1:
        raise ValueError(f"ns={list(ns)}: expected at least three different n of 1 or more")
    n, acc = (np.asarray(v, np.float64) for v in (ns, accuracies))
    if acc.max() == acc.min():
        return Saturation(float(acc[0]), 0.0, math.inf, 1.0)
    low, high = 0.02, 16.0
    for _ in range(4):  # given the rate the rest is linear: a search in one dimension, refined around the best
        rate = np.geomspace(low, high, 401)
        x = n ** -rate[:, None]
        centred = x - x.mean(1, keepdims=True)
        slope = (centred @ (acc - acc.mean())) / np.square(centred).sum(1)
        limit = (acc.mean() - slope * x.mean(1)).clip(0, 1)
        gain = ((limit[:, None] - acc) * x).sum(1) / np.square(x).sum(1)
        best = int(np.square(limit[:, None] - gain[:, None] * x - acc).sum(1).argmin())
        low, high = float(rate[max(best - 1, 0)]), float(rate[min(best + 1, 400)])
    found = float(rate[best])
    return Saturation(float(limit[best]), float(gain[best]), found, 20 ** (1 / found))


def _top(value: Array, owner: NDArray[np.int64], owners: int) -> NDArray[np.bool_]:
    """Where ``value`` is its owner's largest, up to what the order of a sum changes."""
    best = np.full(owners, -math.inf)
    np.maximum.at(best, owner, value)
    best = best[owner]
    return value >= best - 1e-12 * np.abs(best)


def _mean(value: Array, chosen: NDArray[np.bool_], owner: NDArray[np.int64], owners: int) -> Array:
    """[owners] mean of the chosen ones' ``value``."""
    return np.bincount(owner[chosen], value[chosen], owners) / np.bincount(owner[chosen], minlength=owners)
