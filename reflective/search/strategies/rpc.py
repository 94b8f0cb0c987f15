"""Reasoning-pruned perplexity consistency."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from . import likelihood
from .votes import Majority

if TYPE_CHECKING:
    from ..results import Candidate


@dataclass
class RPC(Majority):
    """Answer: ``argmax_a sum_{i : answer_i = a, i not pruned} p_i``, a response that was sampled twice counting once.

    ``p_i = exp(log_prob_i / length_i)``. A mixture of two Weibull distributions is fitted to p; i is pruned if it more
    likely belongs to the component with the lower mean and ``p_i < mean(p)``. The step scores only break ties.

    Source: Zhou et al., A Theoretical Study on Bridging Internal Probability and Self-Consistency for LLM Reasoning,
    arXiv 2510.15444 (and 2502.00511), and its code, whose p is the mean over tokens as here, whose start and bounds of the
    fit are kept. Deviation: the fit is by torch's L-BFGS on unbounded parameters in place of SciPy's L-BFGS-B; where it
    diverges nothing is pruned.
    """

    name: ClassVar[str] = "rpc"
    about: ClassVar[str] = "All run to their end; a vote by how likely the model holds each, improbable ones left out."
    _weighs: ClassVar[str] = "strategy"

    def weights(self, voters: "Sequence[Candidate]") -> list[float]:
        if any(math.isnan(c.log_prob) for c in voters):
            raise ValueError("rpc needs the log-probability of every candidate")
        p = [likelihood(c) for c in voters]
        seen: set[tuple[int, ...]] = set()
        for v, (c, dropped) in enumerate(zip(voters, unlikely(p), strict=True)):
            if dropped or tuple(c.token_ids) in seen:
                p[v] = 0.0
            seen.add(tuple(c.token_ids))
        return p


def unlikely(p: Sequence[float]) -> list[bool]:
    """Which of the probabilities belong to the lower component of the mixture and lie below the mean."""
    x = torch.tensor(p, dtype=torch.float64).clamp(1e-10, 1.0)
    joint, means = fit_mixture(x)
    low = joint[1] > joint[0] if means[0] >= means[1] else joint[0] > joint[1]
    return (low & (x < x.mean())).tolist()


def fit_mixture(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum likelihood of ``w Weibull(k_0, l_0) + (1 - w) Weibull(k_1, l_1)`` on x [n] in (0, 1], float64.

    ``Weibull(k, l)(x) = k/l (x/l)^(k-1) exp(-(x/l)^k)``; w in [0.2, 0.8], k and l at least 0.01, starting from
    w = 0.5, k = (1, 1.5), l = (1, 2).

    Returns:
        log of each component's part in the density [2, n], and the components' means [2].
    """
    free = torch.tensor([0.0, *(math.log(v - 0.01) for v in (1.0, 1.5, 1.0, 2.0))], dtype=torch.float64)
    free.requires_grad_()

    def parts() -> tuple[Tensor, Tensor]:
        w = 0.2 + 0.6 * torch.sigmoid(free[0])
        k, scale = (0.01 + free[1:].exp()).view(2, 2, 1)
        z = x.log() - scale.log()
        joint = torch.stack([w, 1 - w])[:, None].log() + k.log() - x.log() + k * z - (k * z).exp()
        return joint, (scale * torch.lgamma(1 + 1 / k).exp()).flatten()

    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -parts()[0].logsumexp(0).sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return parts()
