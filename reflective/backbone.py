"""What scoring needs to know of a Hugging Face model, found without a list of class names."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PIECE = 512  # tokens; SmolLM2's activations of one piece (3 MB each) stay in cache


@dataclass(frozen=True)
class Backbone:
    """The parts of a decoder-only model that scoring touches.

    Attributes:
        model: the model as the user runs it.
        decoder: the stack of layers with its embedding, without the LM head.
        layers: all ``n`` of them. What enters the last is ``hidden_states[-2]``, the state that the SPRM reads.
        hidden_size, vocab_size: of the text decoder.
        dtype, device: of the hidden states that enter the last layer.
    """

    model: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
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
        return cls(model, decoder, stacks[0], text.hidden_size, text.vocab_size, layer.dtype, layer.device)

    def on_features(self, use: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Call ``use(hidden [B, q, H])`` whenever the last layer is about to run. Remove the handle to detach."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            use(args[0] if args else kwargs["hidden_states"])

        return self.layers[-1].register_forward_pre_hook(hook, with_kwargs=True)

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
            with torch.no_grad(), self._narrow_mlps():
                self.decoder(**inputs)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise RuntimeError(f"the last layer of {type(self.model).__name__} never ran; it cannot be scored")

    @contextmanager
    def _narrow_mlps(self) -> Iterator[None]:
        """Have every layer's MLP take a long text in pieces: at 4,096 tokens of SmolLM2 its three [T, 1536] activations,
        75 of 105 MB alive, are what the peak consists of."""
        mlps = [child for layer in self.layers for child in layer.children() if _takes_positions_one_by_one(child)]
        before = [mlp.__dict__.get("forward") for mlp in mlps]  # set where accelerate or a user wrapped it
        try:
            for mlp in mlps:
                mlp.forward = _in_pieces(mlp.forward)
            yield
        finally:
            for mlp, forward in zip(mlps, before, strict=True):
                if forward is None:
                    mlp.__dict__.pop("forward", None)
                else:
                    mlp.forward = forward


def _takes_positions_one_by_one(module: nn.Module) -> bool:
    """Whether ``module`` looks like an MLP or a mixture of experts: matrices, and hidden states as its only input."""
    inputs = inspect.signature(module.forward).parameters
    return len(inputs) == 1 and sum(p.dim() >= 2 for p in module.parameters()) >= 2


def _in_pieces(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def run(hidden: Tensor) -> Any:
        if hidden.dim() != 3 or hidden.shape[1] <= _PIECE:
            return forward(hidden)
        # What looks like an MLP might still mix positions. Two tokens tell: the second must not notice the first.
        pair, alone = forward(hidden[:, :2]), forward(hidden[:, 1:2])
        if not isinstance(pair, Tensor) or not torch.allclose(pair[:, 1:], alone, rtol=0.05, atol=0.05 * _size(alone)):
            return forward(hidden)
        out = torch.empty_like(hidden)
        for piece, target in zip(hidden.split(_PIECE, 1), out.split(_PIECE, 1), strict=True):
            target.copy_(forward(piece))
        return out

    return run


def _size(x: Tensor) -> float:
    return float(x.abs().max())


class _Reached(Exception):
    """Ends a forward once the features are there."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
