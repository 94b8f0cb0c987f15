"""What scoring needs to know of a Hugging Face model, found without a list of class names."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Backbone:
    """The parts of a decoder-only model that scoring touches.

    Attributes:
        model: the model as the user runs it.
        decoder: the stack of layers with its embedding, without the LM head.
        last_layer: layer ``n``; what enters it is ``hidden_states[-2]``, the state that the SPRM reads.
        hidden_size, vocab_size: of the text decoder.
        dtype, device: of the hidden states that enter ``last_layer``.
    """

    model: nn.Module
    decoder: nn.Module
    last_layer: nn.Module
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module) -> "Backbone":
        """Find the parts of ``model``.

        Raises:
            ValueError: an encoder-decoder, fewer than two layers, or no stack of ``config.num_hidden_layers`` layers.
        """
        name, config = type(model).__name__, getattr(model, "config", None)
        if config is None or not hasattr(model, "get_decoder"):
            raise ValueError(f"model: {name} is not a transformers model")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model: {name} is an encoder-decoder; the reflective form needs a decoder-only model")
        text = config.get_text_config(decoder=True)
        n = text.num_hidden_layers
        if n < 2:
            raise ValueError(f"model: {name} has {n} layer(s); the SPRM reads the input of the last of at least two")
        decoder = model.get_decoder()
        stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
        if not stacks:
            raise ValueError(f"model: no stack of {n} layers found in the decoder of {name}")
        layer = next(stacks[0][-2].parameters())
        return cls(model, decoder, stacks[0][-1], text.hidden_size, text.vocab_size, layer.dtype, layer.device)

    def on_features(self, use: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Call ``use(hidden [B, q, H])`` whenever the last layer is about to run. Remove the handle to detach."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            use(args[0] if args else kwargs["hidden_states"])

        return self.last_layer.register_forward_pre_hook(hook, with_kwargs=True)

    def features(self, ids: Tensor, attention_mask: Tensor | None, row: Tensor, column: Tensor) -> Tensor:
        """States [M, H] that enter the last layer at ``(row, column)`` of ``ids`` [B, T].

        The last layer, the final norm and the LM head never run, and no other layer's states are kept.
        Left or right padding gives the positions that the text has alone.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
        if attention_mask is not None and "position_ids" in inspect.signature(self.decoder.forward).parameters:
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)

        def stop(hidden: Tensor) -> None:
            raise _Reached(hidden[row, column])

        handle = self.on_features(stop)
        try:
            with torch.no_grad():
                self.decoder(**inputs)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise RuntimeError(f"the last layer of {type(self.model).__name__} never ran; it cannot be scored")


class _Reached(Exception):
    """Ends a forward once the features are there."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
