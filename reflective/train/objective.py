"""The SPRM's loss on a batch of whole sequences, from the hidden states of the forward that is running anyway."""

from collections.abc import Callable

from torch import Tensor

from ..engines.hf.finished import read_positions
from ..scoring.loss import sprm_loss_rows
from ..scoring.sprm import SPRM
from ..scoring.steps import StepTokens
from ..scoring.taps import At


def sprm_objective(
    head: SPRM,
    steps: StepTokens,
    hidden: Tensor,
    ids: Tensor,
    attention_mask: Tensor | None,
    prompt_lengths: Tensor | None,
    outcomes: Tensor,
    *,
    at: At | None = None,
    dynamic: bool = True,
    class_balance: bool = True,
    trajectory_weight: Tensor | None = None,
    feature_gradient_scale: float = 1.0,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """``sprm_loss_rows`` of the steps of ``ids`` [B, T], whose states are those that ``rf.score`` would read.

    Args:
        hidden: [B, T, K], the states that the head reads, with their graph: what ``Backbone.listening`` gives, which may be filled up
            with zeros beyond the head's inputs.
        attention_mask, prompt_lengths: as for ``rf.score``.
        at: which token's state is a step's; None: the head's own.
        outcomes: [B], NaN without a verdict.
        dynamic ... all_reduce: as for ``sprm_loss_rows``.

    Returns:
        The loss, float32 scalar, part of the graph also where there is no step (distributed training waits for gradients
        of every parameter).
    """
    row, _, read = read_positions(steps, ids, attention_mask, prompt_lengths, at or head.tap.at)
    return sprm_loss_rows(
        head, hidden[row, read][:, : head.hidden_size], row, outcomes, dynamic=dynamic, class_balance=class_balance,
        trajectory_weight=trajectory_weight, feature_gradient_scale=feature_gradient_scale, all_reduce=all_reduce,
    )  # fmt: skip
