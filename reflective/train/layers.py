"""Which layer a new head reads, found on questions of the training that are held back from it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..scoring.taps import Tap
from .data import Rollouts, split_questions
from .head import fit
from .metrics import Metric, evaluate
from .processes import Processes

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD_BACK = 0.25  # of the questions
_TWELFTHS = 8  # of a model's depth that are looked through, from -2 on


def candidates(n: int) -> tuple[int, ...]:
    """Layers of a model of ``n`` that are worth a try, as indices of ``hidden_states``: -2, and from there on one every twelfth of the
    depth, down to a third of it; of 30 layers -2, -4, -7, -10, -12, -14, -17, -20 and -22."""
    depths = (-2 - round(n * k / 12) for k in range(_TWELFTHS + 1))
    return tuple(dict.fromkeys(layer for layer in depths if layer >= -n))


def choose_layer(
    rollouts: Rollouts,
    *,
    held_back: float = HELD_BACK,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    accelerator: "Accelerator | None" = None,
    on_layer: Callable[[int, Metric], object] = lambda layer, auc: None,
    **settings: Any,
) -> tuple[Tap, dict[int, Metric]]:
    """The layer whose head tells right from wrong best within questions that it has not learnt from.

    A head is fitted to each layer that ``rollouts`` have features of, on the questions that are not held back, and the AUC within the
    others decides; of equals the one that is named first. Questions of an evaluation have no part in it.

    Args:
        held_back: share of the questions that decide.
        seed: of the split, and of ``fit``.
        checkpoint: directory of the fits' states, see ``fit``.
        on_layer: called with each layer and the AUC of its head, in the main process only.
        accelerator, settings: as for ``fit``.

    Returns:
        The tap of that layer, and by layer the AUC within the questions held back.

    Raises:
        ValueError: no features, or nothing said of their layers; nothing to learn from, or no question held back that is answered both
            ways.
    """
    if rollouts.features is None or rollouts.tap is None:
        raise ValueError("rollouts: it is not known of which layers their features are; record them with a tap of several layers")
    learnt, others = split_questions(rollouts, 1 - held_back, seed)
    processes = Processes(accelerator, rollouts.features.device)
    found: dict[int, Metric] = {}
    for layer in rollouts.tap.layers:
        tap = replace(rollouts.tap, layers=(layer,))
        place = None if checkpoint is None else Path(checkpoint) / f"layer {layer}"
        head = fit(learnt.read(tap), seed=seed, checkpoint=place, accelerator=accelerator, **settings)
        auc = evaluate(others.read(tap), head, n=())["auc_within"]
        # One process decides: the others' GPUs may have rounded otherwise.
        told = torch.tensor([auc.value, auc.low, auc.high], dtype=torch.float64, device=processes.device)
        told = told if processes.main else torch.zeros_like(told)
        processes.add_up(told)
        found[layer] = Metric(*told.tolist())
        if processes.main:
            on_layer(layer, found[layer])
    known = {layer: auc.value for layer, auc in found.items() if not math.isnan(auc.value)}
    if not known:
        raise ValueError(
            f"layers: none of the {len(others.question.unique())} questions held back is answered both ways; give more questions or more "
            "samples, or name the layers"
        )
    return replace(rollouts.tap, layers=(max(known, key=known.__getitem__),)), found
