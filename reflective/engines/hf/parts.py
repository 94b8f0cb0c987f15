"""Whether a model, a head and step-tokens fit together."""

from ...scoring.sprm import SPRM
from ...scoring.steps import StepTokens
from . import internals
from .backbone import Backbone


def check_parts(backbone: Backbone, head: SPRM, steps: StepTokens) -> StepTokens:
    """``steps`` sized to the model's vocabulary and on its device.

    Raises:
        ValueError: head, steps and model do not fit together.
    """
    name = type(backbone.model).__name__
    head.check_model(backbone.hidden_size, backbone.dtype, name)
    steps.check_model(backbone.vocab_size)
    return steps.resized(backbone.vocab_size).to(backbone.device)


def check_padding(backbone: Backbone, steps: StepTokens) -> None:
    """Whether the padding that generate feeds a sequence after its end would count as steps.

    Raises:
        ValueError: the padding token is a step-token.
    """
    pad = getattr(backbone.model.generation_config, "pad_token_id", None)
    if steps.step_ids is not None and pad in steps.step_ids:
        raise ValueError(f"steps: the padding token {pad} is a step-token; give the model another pad_token_id")


def check_cache_counts(backbone: Backbone) -> None:
    """Whether the model's cache tells how many tokens it holds, by which a stream knows where it is.

    Raises:
        ValueError: it consists of recurrent states alone.
    """
    config = backbone.model.config.get_text_config(decoder=True)
    layers = internals.cache_layers(config)
    if layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
        raise ValueError(
            f"model: the cache of {type(backbone.model).__name__} consists of {type(layers[0]).__name__}s, which do not tell how "
            "many tokens they hold, so its decoding cannot be followed; rf.score scores its finished text"
        )
