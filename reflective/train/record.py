"""Features of responses that were not decoded here."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..engines.hf.backbone import Backbone
from ..engines.hf.finished import read_positions
from ..engines.hf.parts import check_steps, name_of
from ..model import ReflectiveModel
from ..scoring.taps import Tap
from ..utils.lengths import batches_by_length
from .data import Rollouts


def record_features(
    model: ReflectiveModel,
    rollouts: Rollouts,
    *,
    tap: Tap | None = None,
    batch_tokens: int = 16_384,
    progress: Callable[[int], None] = lambda n: None,
) -> Rollouts:
    """``rollouts`` with the states of their steps, by one forward of the backbone up to the deepest layer that is read.

    They are those that ``roll_out`` keeps while decoding: with ``at="token"`` or ``"every"`` a token that ends its response
    has none.

    Args:
        tap: as for ``roll_out``.
        batch_tokens: padded tokens a forward.
        progress: called with the number of trajectories that have just been read.

    Raises:
        ValueError: a vocabulary that does not fit the step-tokens, or bad ids.
    """
    backbone = Backbone.of(model.model, tap or model.tap)
    tap, size = backbone.tap, len(backbone.places.points) * backbone.hidden_size
    steps = check_steps(backbone, model.steps).to("cpu")
    features, owner, position = [], [], []
    for rows in map(torch.tensor, batches_by_length(rollouts.length.tolist(), batch_tokens)):
        ids, mask, prompt_lengths = rollouts.padded(rows, 0)
        found = read_positions(steps, ids, mask, prompt_lengths, tap.at)
        known = found[2] < rollouts.length[rows][found[0]] - 1
        row, step, read = (x[known] for x in found)
        if len(row):
            device = backbone.device
            hidden = backbone.features(ids[:, : int(read.max()) + 1], None, row.to(device), read.to(device))
            features.append(hidden[:, :size].cpu())
        owner.append(rows[row])
        position.append(step)
        progress(len(rows))
    trajectory = torch.cat(owner)
    order = trajectory.argsort(stable=True)
    states = torch.cat(features) if features else torch.empty(0, size, dtype=backbone.dtype)
    return replace(
        rollouts, features=states[order], trajectory=trajectory[order], position=torch.cat(position)[order], tap=tap,
        model=name_of(model.model),
    )  # fmt: skip
