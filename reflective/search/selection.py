"""What selecting one of n answers to a question is worth: estimators, and the fit of their growth with n. Without torch."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

Array = NDArray[np.float64]
_SUBSETS = 512  # groups that stand for all of a question: their choice moves its mean by 0.02 at most (1 sd)


@dataclass(frozen=True)
class Metric:
    """Attributes: ``value``; ``low``, ``high``: 95 % bootstrap interval. NaN where nothing defines it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class VoteRule:
    """How much a vote of score s weighs among n voters: ``s ** e(n)`` with ``e(n) = exponent * n ** growth``.

    0 is majority, 1 the weighted vote, infinity the answer of the highest score.
    """

    exponent: float
    growth: float = 0.0

    def of(self, voters: ArrayLike) -> Array:
        """``e`` of so many voters each."""
        return self.exponent * np.asarray(voters, np.float64) ** self.growth


def select(
    score: ArrayLike, right: ArrayLike, answer: ArrayLike, n: int, rule: VoteRule | None = None
) -> dict[str, Array]:
    """[G] outcome of every way to select from each group of ``n``; the arguments, [G n], are group by group.

    =================  =======================================================================================
    ``majority``       of the answer that most of a group give; of equally frequent ones the mean
    ``weighted_vote``  of the answer with the largest sum of scores, where it scores highest
    ``select``         of the answer with the largest sum of what ``rule`` makes of scores, where it scores highest
    ``best_of``        of the highest score; of equals the mean
    ``any``            whether one is correct
    =================  =======================================================================================

    Where nobody in a group answers, ``majority`` is its mean outcome and the votes by score are its best of n. Without a ``rule`` there is no
    ``select``.

    Args:
        score: at least 0. right: 1 or 0. answer: integers, equal ones for equal answers, -1 for none.
    """
    votes = _Votes.of(score, right, answer, n)
    found = {"majority": votes.majority(), "weighted_vote": votes.weighed()}
    if rule is not None:
        found["select"] = votes.weighed(rule)
    score, right = (np.asarray(v, np.float64) for v in (score, right))
    group = np.repeat(np.arange(votes.groups), n)
    return found | {
        "best_of": _mean(right, _top(score, group, votes.groups), group, votes.groups),
        "any": right.reshape(-1, n).max(1, initial=0.0),
    }


@dataclass(frozen=True)
class _Votes:
    """Those who vote in ``groups`` groups, and for whom: ``party_of`` [V] numbers pairs of a group and an answer, whose groups are
    ``party_group`` [P]."""

    score: Array
    right: Array
    group: NDArray[np.int64]
    party_of: NDArray[np.int64]
    party_group: NDArray[np.int64]
    groups: int

    @classmethod
    def of(cls, score: ArrayLike, right: ArrayLike, answer: ArrayLike, n: int) -> Self:
        score, right = (np.asarray(v, np.float64) for v in (score, right))
        answer = np.asarray(answer, np.int64)
        groups = len(score) // n
        group = np.repeat(np.arange(groups), n)
        # Only who answers votes; where nobody does, all vote for the same.
        voters = (answer >= 0) | (answer.reshape(-1, n) < 0).all(1)[group]
        width = int(answer.max(initial=-1)) + 2
        party, party_of = np.unique(group[voters] * width + answer[voters] + 1, return_inverse=True)
        return cls(score[voters], right[voters], group[voters], party_of, party // width, groups)

    def majority(self) -> Array:
        everyone = np.ones(len(self.score), bool)
        return self._elected(everyone.astype(np.float64), everyone)

    def weighed(self, rule: VoteRule | None = None) -> Array:
        return self._elected(self._weight(rule), self._best)

    def _weight(self, rule: VoteRule | None) -> Array:
        if rule is None:
            return self.score
        highest = np.zeros(self.groups)
        np.maximum.at(highest, self.group, self.score)
        # Of the highest of its group each: as they are, high powers of small scores would all be 0.
        part = self.score / np.where(highest > 0, highest, 1.0)[self.group]
        return part ** rule.of(np.bincount(self.group, minlength=self.groups))[self.group]

    @cached_property
    def _best(self) -> NDArray[np.bool_]:
        """Who scores highest of a party."""
        return _top(self.score, self.party_of, len(self.party_group))

    def _elected(self, weight: Array, choice: NDArray[np.bool_]) -> Array:
        votes = np.bincount(self.party_of, weight, len(self.party_group))
        return _mean(
            _mean(self.right, choice, self.party_of, len(self.party_group)), _top(votes, self.party_group, self.groups),
            self.party_group, self.groups,
        )  # fmt: skip


EXPONENTS = tuple(2.0 ** (k / 2) for k in range(-2, 11))  # 0.5 to 32
GROWTHS = (-0.25, 0.0, 0.25, 0.5)


def fit_vote_rule(
    score: ArrayLike, right: ArrayLike, answer: ArrayLike, question: ArrayLike, *, sizes: Sequence[int] = (2, 4, 8, 16, 32),
    seed: int = 0,
) -> VoteRule:  # fmt: skip
    """The rule of ``EXPONENTS`` and ``GROWTHS`` by which most is right in groups of ``sizes``, each size weighing the same.

    The accuracy of a rule is smoothed over its neighbours (a quarter, a half, a quarter in either direction), as it jumps by single questions:
    with 256 of them its error is 0.02, and rules within a factor of two in the exponent lie closer.

    Args:
        score, right, answer: as for ``select``, [M], of candidates in any order; question: [M], whose they are. Sizes above what a question has
            are left out for it.

    Raises:
        ValueError: no question has two candidates.
    """
    score, right, answer, question = (np.asarray(v) for v in (score, right, answer, question))
    rng, found = np.random.default_rng(seed), []
    of_question = [np.flatnonzero(question == q) for q in np.unique(question)]
    for n in sizes:
        # As many groups of a question as give the same number of draws, disjoint ones where there is but one way to be.
        drawn = [
            rng.permutation(own)[: len(own) // n * n] for own in of_question if len(own) >= n for _ in range(1 + 3 * (len(own) > n))
        ]
        if not drawn or n < 2:
            continue
        rows = np.concatenate(drawn)
        votes = _Votes.of(score[rows], right[rows], answer[rows], n)
        found.append([[votes.weighed(VoteRule(e, g)).mean() for g in GROWTHS] for e in EXPONENTS])
    if not found:
        raise ValueError("no question has as many candidates as one of the sizes")
    accuracy = np.mean(found, 0)
    for axis in (0, 1):
        accuracy = np.apply_along_axis(_smooth, axis, accuracy)
    e, g = np.unravel_index(accuracy.argmax(), accuracy.shape)
    return VoteRule(EXPONENTS[e], GROWTHS[g])


def _smooth(values: Array) -> Array:
    return np.convolve(np.pad(values, 1, "edge"), (0.25, 0.5, 0.25), "valid")


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
