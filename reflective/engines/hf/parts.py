"""Whether a model, a head and step-tokens fit together."""

from collections.abc import Collection
from pathlib import Path

from torch import nn

from ...scoring.heads import Head
from ...scoring.steps import StepTokens
from . import internals
from .backbone import Backbone


def check_parts(backbone: Backbone, head: Head, steps: StepTokens | None) -> StepTokens:
    """``steps`` sized to the model's vocabulary and on its device; with ``at="every"``, which asks for none, all tokens but those that end
    a sequence or pad it.

    Raises:
        ValueError: head, steps and model do not fit together.
    """
    name, tap = type(backbone.model).__name__, backbone.tap
    _ = backbone.places  # there are such
    head.check_model(len(tap.layers) * backbone.hidden_size, backbone.dtype, name, tap)
    head.check_trained_on(backbone.model.name_or_path)
    return check_steps(backbone, steps)


def check_steps(backbone: Backbone, steps: StepTokens | None) -> StepTokens:
    """What ``check_parts`` returns, for who has no head yet.

    Raises:
        ValueError: steps and model do not fit together.
    """
    tap = backbone.tap
    if tap.at == "every":
        return StepTokens.every(backbone.vocab_size, _no_text(backbone)).to(backbone.device)
    if steps is None:
        raise ValueError(f"steps=None: a head that reads at={tap.at!r} needs StepTokens, which say where steps end")
    steps.check_model(backbone.vocab_size)
    return steps.resized(backbone.vocab_size).to(backbone.device)


def _no_text(backbone: Backbone) -> Collection[int]:
    """Tokens that end a sequence, or pad it, as the model's generation configuration says."""
    config = backbone.model.generation_config
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return {token for token in (*ends, config.pad_token_id) if token is not None and 0 <= token < backbone.vocab_size}


def name_of(model: nn.Module) -> str | None:
    """By what name a head says that it was trained on ``model``: of a directory the last part. None: it has none."""
    name = str(getattr(model, "name_or_path", None) or "")
    return (Path(name).name if Path(name).is_dir() else name) or None


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
