"""Scoring as the published pipeline does it after generation, to compare with: in the demo and in ``benchmarks/``."""

import torch
from torch import Tensor

from .model import ReflectiveModel


def second_pass(model: ReflectiveModel, ids: Tensor, prompt_length: int | None) -> Tensor:
    """Step scores of one finished text by a second forward of the whole model, every hidden state and logit kept.

    Args:
        ids: [1, T]; prompt_length: tokens of it that are prompt, None to score the whole text.

    Returns:
        [n_steps] scores in (0, 1), the head's dtype.
    """
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
        hidden = torch.cat([states[layer] for layer in model.head.tap.layers], -1)  # [1, T, H]
        steps = model.steps.mask(ids, prompt_lengths=prompt_length)[0].nonzero().flatten()
        return model.head(hidden[0, steps - int(model.head.tap.at == "predict")]).squeeze(-1).sigmoid()
