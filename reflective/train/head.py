"""Way one: the head alone, from features recorded during the rollout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..scoring.loss import check_trainable, sprm_loss_rows
from ..scoring.sprm import SPRM
from ..utils.fingerprint import fingerprint
from .checkpoint import Checkpoint
from .data import Rollouts, question_weights
from .processes import Processes, mix

if TYPE_CHECKING:
    from accelerate import Accelerator


def fit(
    rollouts: Rollouts,
    *,
    epochs: int = 24,
    warmup: int | None = None,
    lr: float = 3e-4,
    batch: int = 64,
    width: int | None = None,
    dropout: float | None = None,
    weight_decay: float = 0.01,
    within_questions: bool = True,
    class_balance: bool = False,
    seed: int = 0,
    init: SPRM | None = None,
    on_epoch: Callable[[int, float, SPRM], object] | None = None,
    checkpoint: str | Path | None = None,
    accelerator: "Accelerator | None" = None,
) -> SPRM:
    """Fit a head to recorded features by the self-supervised loss; the backbone never runs.

    A new head is fitted to features standardised per dimension, and that is folded into its first layer at the end, so it
    reads raw hidden states. Trajectories without a verdict or without a step have no part.

    Args:
        epochs: passes over the questions.
        warmup: epochs of plain BCE before the dynamic weights; 0: none, as published; None: plain BCE throughout, which
            ranked best on questions held back, where the weights cost accuracy even after a warm-up
            (``benchmarks/results/head_schedules.csv``).
        batch: different trajectories a step, all of a question's together; over all processes.
        width: hidden units, default twice the features' size.
        dropout: of the hidden units while the head learns; None: that of ``init``, and of a new head 0.5 as published. With a thousand
            questions and more 0.1 ranked better on others (``benchmarks/results/reproduction_choosing.csv``).
        within_questions: use only questions with both outcomes and weigh the two sides of each equally, so that nothing
            can be learnt from how hard a question is.
        class_balance: weigh the two outcomes of a batch against each other, see ``sprm_loss``; adds nothing to the
            balance within questions.
        init: go on from this head, on raw features; published ones were trained with ``lr=1e-5``.
        on_epoch: called with the epoch, from 0, its mean loss and the head as it is then, in the main process only.
        checkpoint: directory for the state after every epoch. A run that was killed goes on there, and on a CPU ends with
            the bits of one that was not.
        accelerator: shares every batch between its processes, which must hold the same rollouts; default: this one alone.

    Returns:
        The head in float32, in eval mode, on the device of the features (with an accelerator: on its device). Its tap is that of
        the features, and ``trained_on`` their model.

    Raises:
        ValueError: a dropout outside [0, 1); no features; nothing to learn from (no step, or one outcome only); ``init`` of another size or tap, or of
            a form that is not trained here; ``checkpoint`` holds a run with other settings.
    """
    if rollouts.features is None:
        raise ValueError("rollouts: without features; record them while rolling out, or train with the backbone")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}; expected a share of the hidden units, from 0 to less than 1")
    size = rollouts.features.shape[1]
    if init is not None:
        check_trainable(init, "init")
        if init.hidden_size != size or width not in (None, init.width):
            raise ValueError(f"init: a head of {init.hidden_size} -> {init.width}; expected {size} -> {width or 'any'}")
        if rollouts.tap is not None and (init.tap.layers, init.tap.norm) != (rollouts.tap.layers, rollouts.tap.norm):
            raise ValueError(f"init: a head that reads {init.tap}, and the features are of {rollouts.tap}; record those that it reads")
    processes = Processes(accelerator, rollouts.features.device)
    n_steps = torch.bincount(rollouts.trajectory, minlength=len(rollouts))
    batches = Batches(rollouts, n_steps, batch, within_questions)
    rows_of = _Rows(n_steps)
    settings = {
        "epochs": epochs, "warmup": warmup, "lr": lr, "batch": batch, "width": width, "weight_decay": weight_decay,
        "within_questions": within_questions, "class_balance": class_balance, "seed": seed, "processes": processes.count,
        "init": None if init is None else fingerprint(init.parameters()),
        "rollouts": fingerprint(rollouts.tensors.values()),
    } | ({} if dropout is None else {"dropout": dropout})  # fmt: skip
    kept = Checkpoint(checkpoint, settings)
    if init is None:
        scale = Standardised.of(rollouts.features[rows_of(batches.used)[0]])
        with processes.seeded(seed):
            head = SPRM(size, width)
    else:
        scale = Standardised.none(size)
        head = scale.unfolded(init)
    head.use(**{k: v for k, v in (("tap", rollouts.tap), ("trained_on", rollouts.model)) if v is not None})
    if dropout is not None:
        head[2].p = dropout
    scale, head = scale.to(processes.device), head.to(processes.device).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    begin = 0
    if state := kept.load():
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["epoch"]
    for epoch in range(begin, epochs):
        total, steps = torch.zeros((), device=processes.device), 0
        with processes.seeded(seed, epoch, processes.index):
            for trajectories in batches.epoch(seed, epoch):
                trajectories = trajectories[processes.index :: processes.count]
                rows, owner = rows_of(trajectories)
                loss = sprm_loss_rows(
                    head, scale(rollouts.features[rows].to(processes.device)), owner.to(processes.device),
                    rollouts.outcome[trajectories], dynamic=warmup is not None and epoch >= warmup,
                    class_balance=class_balance, trajectory_weight=batches.weight[trajectories],
                    all_reduce=processes.add_up,
                )  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
                processes.add_up(*(p.grad for p in head.parameters()))
                optimizer.step()
                total, steps = total + loss.detach(), steps + 1
        processes.add_up(total)
        if processes.main:
            kept.save({"epoch": epoch + 1, "head": head.state_dict(), "optimizer": optimizer.state_dict()})
            if on_epoch is not None:
                on_epoch(epoch, float(total) / steps, scale.folded(head))
    return scale.folded(head)


@dataclass(frozen=True)
class Standardised:
    """``(x - mean) / sd`` [M, H] in float32, so that a head learns as fast from every dimension; ``mean``, ``sd``: [H]."""

    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Standardised":
        """By the statistics of ``features`` [M, H]. What hardly varies there is not blown up when it does elsewhere."""
        sd, mean = torch.std_mean(features.float(), 0, correction=0)
        return cls(mean, sd.clamp_min(max(0.01 * float(sd.median()), 1e-6)))

    @classmethod
    def none(cls, size: int) -> "Standardised":
        """The features as they are."""
        return cls(torch.zeros(size), torch.ones(size))

    def to(self, device: torch.device) -> "Standardised":
        return Standardised(self.mean.to(device), self.sd.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.sd

    def folded(self, head: SPRM) -> SPRM:
        """``f`` with ``f(x) = head((x - mean) / sd)``: ``W1 / sd``, ``b1 - (W1 / sd) mean``; float32, in eval mode."""
        return self._with(head, lambda w, b, mean, sd: (w / sd, b - (w / sd) @ mean))

    def unfolded(self, head: SPRM) -> SPRM:
        """The opposite: ``W1 sd``, ``b1 + W1 mean``."""
        return self._with(head, lambda w, b, mean, sd: (w * sd, b + w @ mean))

    def _with(self, head: SPRM, first: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> SPRM:
        state = {k: v.detach().double() for k, v in head.state_dict().items()}
        state["0.weight"], state["0.bias"] = first(
            state["0.weight"], state["0.bias"], self.mean.double(), self.sd.double()
        )
        with torch.device("meta"):  # draws no random numbers
            other = SPRM(head.hidden_size, head.width)
        other.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
        other[2].p = head[2].p
        other.configure(head.metadata())
        return other.requires_grad_(False).eval()


class Batches:
    """Which trajectories have a part in training, and which of them make a step. ``used``: those; ``weight``: [N]."""

    def __init__(self, rollouts: Rollouts, n_steps: Tensor, batch: int, within_questions: bool) -> None:
        self.batch, outcome = batch, rollouts.outcome
        self.weight = question_weights(rollouts.question, outcome, rollouts.count, within_questions=within_questions)
        self.used = ((self.weight > 0) & ~outcome.isnan() & (n_steps > 0)).nonzero().flatten()
        right = int((outcome[self.used] > 0.5).sum())
        if right in (0, len(self.used)):
            where = "of questions with both outcomes " if within_questions else ""
            raise ValueError(
                f"rollouts: {len(self.used)} trajectories {where}have a verdict and a step, {right} of them correct; "
                "both outcomes are needed"
            )
        self.question = torch.unique(rollouts.question[self.used], return_inverse=True)[1]

    def epoch(self, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """The trajectories of every step: about ``batch`` of them, all of a question together, questions in random order."""
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        place = torch.randperm(int(self.question.max()) + 1, generator=generator)[self.question]
        size = torch.bincount(place)
        step = ((size.cumsum(0) - size) // self.batch).repeat_interleave(size)  # a question belongs where it begins
        return self.used[place.argsort(stable=True)].split(step.unique_consecutive(return_counts=True)[1].tolist())


class _Rows:
    """Where the features of trajectories lie that have ``n_steps`` [N] of them, one trajectory's behind the other's."""

    def __init__(self, n_steps: Tensor) -> None:
        self.n_steps, self.first = n_steps, n_steps.cumsum(0) - n_steps

    def __call__(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        """``(rows, owner)`` [M] of ``trajectories`` [n]: places of their features, and which of the n each is of."""
        n = self.n_steps[trajectories]
        owner = torch.arange(len(n)).repeat_interleave(n)
        return torch.arange(len(owner)) + (self.first[trajectories] - n.cumsum(0) + n)[owner], owner
