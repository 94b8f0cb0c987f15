"""The head of joint training, learning by itself from what the policy drew last."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scoring.loss import sprm_loss_rows
from ..scoring.sprm import SPRM
from .head import Standardised
from .processes import mix


@dataclass(frozen=True)
class Drawn:
    """Judged responses with a step: ``features`` [M, K] float32, ``owner`` [M] (which of the n), ``outcome``, ``weight`` [n]."""

    features: Tensor
    owner: Tensor
    outcome: Tensor
    weight: Tensor

    def of(self, chosen: Tensor) -> "Drawn":
        """The responses ``chosen`` [k]."""
        place = torch.full((len(self.outcome),), -1, device=chosen.device)
        place[chosen] = torch.arange(len(chosen), device=chosen.device)
        owner = place[self.owner]
        there = owner >= 0
        return Drawn(self.features[there], owner[there], self.outcome[chosen], self.weight[chosen])

    @classmethod
    def join(cls, parts: "list[Drawn]") -> "Drawn":
        first = torch.tensor([0, *(len(p.outcome) for p in parts)]).cumsum(0).tolist()
        owners = [p.owner + shift for p, shift in zip(parts, first, strict=False)]
        return cls(
            torch.cat([p.features for p in parts]), torch.cat(owners), torch.cat([p.outcome for p in parts]),
            torch.cat([p.weight for p in parts]),
        )  # fmt: skip


class Replay:
    """``head``, and steps of AdamW on batches of the last responses, in coordinates in which their features are standardised.

    Trained in the policy's optimizer the head takes one step for each of the policy's, on that step's answers alone, and on raw features, of
    which some dimensions are a thousand times as large as others: an AUC within questions of 0.69 to 0.72 came of that, less than the
    head had that nobody trained (``benchmarks/NOTES.md``, "Joint training and its head").

    Args:
        head: in float32; what is learnt is written into it after every ``learn``.
        lr, weight_decay, dropout, batch: of the steps; ``batch``: responses.
        keep: responses, the last ones.
        seed: of the batches and of dropout.
    """

    def __init__(self, head: SPRM, *, lr: float, weight_decay: float, dropout: float, batch: int, keep: int, seed: int) -> None:
        self.head, self.batch, self.keep, self.seed = head, batch, keep, seed
        self._settings = {"lr": lr, "weight_decay": weight_decay}
        self._dropout = dropout
        self._kept: deque[Drawn] = deque()
        self._scale: Standardised | None = None  # of the first responses, as the optimizer's moments are in its coordinates
        self._unfolded: SPRM | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def add(self, drawn: Drawn) -> None:
        """Keep responses, and let the oldest go."""
        if len(drawn.outcome):
            self._kept.append(drawn)
        while len(self._kept) > 1 and sum(len(d.outcome) for d in self._kept) - len(self._kept[0].outcome) >= self.keep:
            self._kept.popleft()

    def learn(self, steps: int, number: int, *, dynamic: bool, class_balance: bool) -> None:
        """So many steps; ``number``: of this call, with the seed it decides which batches they are of. Nothing where all are right, or wrong."""
        if not self._kept:
            return
        drawn = Drawn.join(list(self._kept))
        weighed = drawn.outcome[drawn.weight > 0]
        if not 0 < int((weighed > 0.5).sum()) < len(weighed):
            return
        if self._scale is None:
            self._begin(Standardised.of(drawn.features))
        features, head = self._scale(drawn.features), self._unfolded
        drawn = Drawn(features, drawn.owner, drawn.outcome, drawn.weight)
        size = min(self.batch, len(drawn.outcome))
        generator = torch.Generator().manual_seed(mix(self.seed, number))
        with torch.random.fork_rng([features.device] if features.is_cuda else []):
            torch.manual_seed(mix(self.seed, number, 1))
            for _ in range(steps):
                part = drawn.of(torch.randperm(len(drawn.outcome), generator=generator)[:size].sort().values.to(features.device))
                loss = sprm_loss_rows(
                    head, part.features, part.owner, part.outcome, dynamic=dynamic, class_balance=class_balance,
                    trajectory_weight=part.weight,
                )  # fmt: skip
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
        self.head.load_state_dict(self._scale.folded(head).state_dict())

    def _begin(self, scale: Standardised) -> None:
        device = self.head[0].weight.device
        self._scale = scale.to(device)
        self._unfolded = self._scale.unfolded(self.head).requires_grad_(True).train()
        self._unfolded[2].p = self._dropout
        self._optimizer = torch.optim.AdamW(self._unfolded.parameters(), **self._settings)

    # -- between two runs ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What ``load_state_dict`` goes on from."""
        begun = self._scale is not None
        return {
            "kept": [vars(d) for d in self._kept],
            "scale": vars(self._scale) if begun else None,
            "head": self._unfolded.state_dict() if begun else None,
            "optimizer": self._optimizer.state_dict() if begun else None,
        }

    def load_state_dict(self, state: dict) -> None:
        device = self.head[0].weight.device
        self._kept = deque(Drawn(**{k: v.to(device) for k, v in kept.items()}) for kept in state["kept"])
        if state["scale"] is not None:
            self._begin(Standardised(**state["scale"]))
            self._unfolded.load_state_dict(state["head"])
            self._optimizer.load_state_dict(state["optimizer"])
