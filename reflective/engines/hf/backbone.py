"""What scoring needs to know of a Hugging Face model, found without a list of class names."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig

from .internals import (
    DynamicLayer,
    cache_layers,
    checkpoints,
    state_argument,
    state_in,
    unknown,
    with_cache,
)

_PIECE = 512  # tokens; SmolLM2's activations of one piece (3 MB each) stay in cache
_EARS = "_reflective_ears"  # where the last layer keeps those who listen
_CHANGING = threading.Lock()  # while the class of a layer is exchanged
_NARROW = threading.RLock()  # while MLPs take texts in pieces: texts are scored by one thread after the other


class Ear(Protocol):
    """Who hears what enters the last layer."""

    def hear(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The layer is called with these arguments."""


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

        Its decoder is the innermost module that holds both the token embedding and ``config.num_hidden_layers`` layers; a
        vision tower may have as many, but embeds no tokens.

        Raises:
            ValueError: an encoder-decoder, fewer than two layers, no such module, or weights that were never loaded.
        """
        name, config = type(model).__name__, getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise ValueError(f"model: {name} is not a transformers model")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model: {name} is an encoder-decoder; the reflective form needs a decoder-only model")
        text = config.get_text_config(decoder=True)
        n = getattr(text, "num_hidden_layers", None)
        if n is None:
            raise ValueError(f"model: the configuration of {name} has no num_hidden_layers; pass its text decoder")
        if n < 2:
            raise ValueError(f"model: {name} has {n} layer(s); the SPRM reads the input of the last of at least two")
        try:
            embedding = model.get_input_embeddings()
        except NotImplementedError as e:
            raise ValueError(f"model: {name} has no single token embedding; pass its text decoder") from e
        decoder, layers = model, _stack(model, n)
        if layers is None:
            raise ValueError(f"model: no stack of {n} layers found in {name}")
        while inner := next((m for m in decoder.children() if embedding in m.modules() and _stack(m, n)), None):
            decoder, layers = inner, _stack(inner, n)
        # Not a layer's dtype: quantised layers hold their weights, and scales, in others than they compute in.
        dtype, device = next(embedding.parameters()).dtype, _device_of(layers[-2])
        if device.type == "meta":
            raise ValueError(f"model: the weights of {name} are on the meta device; load them first")
        return cls(model, decoder, layers, text.hidden_size, text.vocab_size, dtype, device)

    @contextmanager
    def listening(self, use: Callable[[Tensor], object]) -> Iterator[None]:
        """Within, ``use(hidden [B, T, H])`` gets what enters the last layer of every forward, with its autograd graph.

        Once a forward, also under gradient checkpointing: the class of the last layer is exchanged, because a hook may run
        within a checkpoint, where states are detached, and again when the checkpoint is computed anew. What wraps the model
        (DDP, accelerate, peft) makes no difference.

        Raises:
            ValueError: in a forward, if what the layers hand on is not one state a token.
        """

        ear = _Ear(self, use)
        self.add_ear(ear)
        try:
            yield
        finally:
            self.remove_ear(ear)

    def add_ear(self, ear: Ear) -> None:
        """Have ``ear`` hear every call of the last layer, those in code that is being compiled too."""
        layer = self.layers[-1]
        with _CHANGING:
            ears = vars(layer).get(_EARS, ())
            vars(layer)[_EARS] = (*ears, ear)
            if not ears:
                exchange(layer, _listening)

    def remove_ear(self, ear: Ear) -> None:
        """The opposite of ``add_ear``; after the last of them the layer has its own class again."""
        layer = self.layers[-1]
        with _CHANGING:
            vars(layer)[_EARS] = tuple(other for other in vars(layer)[_EARS] if other is not ear)
            if not vars(layer)[_EARS]:
                restore(layer)
                del vars(layer)[_EARS]

    @functools.cached_property
    def state_argument(self) -> str:
        """What the last layer calls the hidden states."""
        return state_argument(self.layers[-1])

    def state(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states [B, q, H] among the arguments of the last layer.

        Raises:
            ValueError: what the layers hand on is not one state a token.
            RuntimeError: they are given none.
        """
        hidden = state_in(self.state_argument, self.hidden_size, args, kwargs)
        if hidden is None:
            given = ", ".join([*(type(value).__name__ for value in args), *kwargs]) or "nothing"
            raise unknown(
                f"model: the last layer of {type(self.model).__name__} is given no hidden states of {self.hidden_size} "
                f"values, but {given}",
                self.model,
            )
        if hidden.dim() != 3 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"model: the layers of {type(self.model).__name__} hand on {list(hidden.shape)}, not one state of "
                f"{self.hidden_size} values a token; it has no hidden state that a head could read"
            )
        return hidden

    def hidden(self, ids: Tensor, attention_mask: Tensor | None, shared: int = 0, kv: Cache | None = None) -> Tensor:
        """States [B, T - shared, H] that enter the last layer, with their autograd graph, for ``ids`` [B, T].

        The last layer, the final norm and the LM head never run, and no other layer's states are kept.
        Left or right padding gives the positions that the text has alone.

        Args:
            shared: this many columns, alike in all rows and without padding, run once for all rows and are not returned.
                See ``can_share``.
            kv: the cache of the columns before ``ids``, which are added to it: a text is run a piece at a time. Without padding.

        Raises:
            ValueError: an id stands for an image, a video or a sound, which the ids do not hold.
        """
        self._check_text_only(ids)
        first = _device_of(self.model.get_input_embeddings())  # several devices: the last layer's may be another
        ids, inputs = ids.to(first), {"use_cache": False}
        if shared or kv is not None:
            kv = DynamicCache(config=self._text_config()) if kv is None else kv
            inputs = {"use_cache": True, **with_cache(self.decoder, kv)}
        if shared:
            self._states({"input_ids": ids[:1, :shared], **inputs})
            kv.batch_repeat_interleave(len(ids))
        # No token sees padding on its right. Without a mask attention is faster, and a sliding window over nothing but padding
        # does not make its row NaN.
        if attention_mask is not None and not (attention_mask[:, 0] != 0).all():
            inputs["attention_mask"] = mask = attention_mask.to(first)
            if "position_ids" in inspect.signature(self.decoder.forward).parameters:
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return self._states({"input_ids": ids[:, shared:], **inputs})

    def can_share(self) -> bool:
        """Whether what is cached of a prefix can be shared, and gradients go through it: no recurrent state, and no gradient
        checkpointing, which computes every layer anew, without a cache."""
        layers = cache_layers(self._text_config())
        recomputes = self.model.training and checkpoints(self.layers)
        return not recomputes and all(isinstance(layer, DynamicLayer) for layer in layers)

    def _text_config(self) -> PretrainedConfig:
        return self.model.config.get_text_config(decoder=True)

    def _states(self, inputs: dict[str, Any]) -> Tensor:
        thread = threading.get_ident()

        def stop(hidden: Tensor) -> None:
            if threading.get_ident() == thread:  # else another thread's forward, which goes on
                raise _Reached(hidden)

        try:
            with self.listening(stop):
                self.decoder(**inputs)
        except _Reached as reached:
            return reached.hidden
        raise unknown(f"model: the last layer of {type(self.model).__name__} never ran", self.model)

    def features(
        self, ids: Tensor, attention_mask: Tensor | None, row: Tensor, column: Tensor, kv: Cache | None = None
    ) -> Tensor:
        """States [M, H] at ``(row, column)`` of ``hidden(ids, attention_mask, kv=kv)``, without a graph."""
        with torch.no_grad(), self._narrow_mlps():
            return self.hidden(ids, attention_mask, kv=kv)[row, column]

    def _check_text_only(self, ids: Tensor) -> None:
        for kind in ("image", "video", "audio"):
            placeholder = getattr(self.model.config, f"{kind}_token_id", None)
            if placeholder is not None and (ids == placeholder).any():
                raise ValueError(
                    f"input_ids: token {placeholder} stands for {kind} features, which finished text does not hold; score "
                    "such trajectories with a StreamScorer, while they are decoded"
                )

    @contextmanager
    def _narrow_mlps(self) -> Iterator[None]:
        """Have every layer's MLP take a long text in pieces: at 4,096 tokens of SmolLM2 its three [T, 1536] activations,
        75 of 105 MB alive, are what the peak consists of."""
        mlps = [child for layer in self.layers for child in layer.children() if _takes_positions_one_by_one(child)]
        with _NARROW:
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


def _stack(module: nn.Module, n: int) -> nn.ModuleList | None:
    """The outermost list of ``n`` modules within ``module``: experts and the like lie deeper than layers."""
    stacks = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    return min(stacks, key=lambda found: found[0].count("."), default=("", None))[1]


def _device_of(module: nn.Module) -> torch.device:
    """Where ``module`` computes. Between forwards the parameters that accelerate offloads are elsewhere; its hook knows."""
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    placed = next((device for device in devices if device is not None), None)
    return next(module.parameters()).device if placed is None else torch.device(placed)


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


@dataclass(frozen=True, eq=False)
class _Ear:
    backbone: Backbone
    use: Callable[[Tensor], object]

    def hear(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.use(self.backbone.state(args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Ear":
        """Of a copied layer the same are told."""
        return self


def exchange(thing: Any, subclass: Callable[[type], type]) -> None:
    """Give ``thing`` a subclass of its class, until ``restore``."""
    thing.__class__ = subclass(type(thing))


def restore(thing: Any) -> None:
    """The opposite of ``exchange``."""
    thing.__class__ = type(thing).__mro__[1]


def alike(subclass: type, base: type) -> type:
    """``subclass`` under the name of ``base``: transformers looks names up, and so do users."""
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(subclass, name, getattr(base, name))
    return subclass


@functools.cache
def _listening(base: type) -> type:
    """``base``, whose instances tell of the arguments that they are called with."""

    class Listening(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            for ear in self._reflective_ears:
                ear.hear(args, kwargs)
            return super().__call__(*args, **kwargs)

    # transformers 5.23 and 5.24 wrap the forwards of subclasses for checkpointing; a layer that is computed anew when nobody
    # listens any more would then be checkpointed once more within.
    if "forward" in vars(Listening):
        del Listening.forward
    return alike(Listening, base)


class _Reached(Exception):
    """Ends a forward once its states are there."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
