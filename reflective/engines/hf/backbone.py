"""What scoring needs to know of a Hugging Face model, found without a list of class names."""

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig

from ...scoring.taps import Tap, by_rms
from .internals import DynamicLayer, cache_layers, checkpoints, unknown, with_cache
from .listening import DecoderOutput, LayerInput, Point
from .pieces import narrow_mlps
from .places import Places


@dataclass(frozen=True)
class Backbone:
    """The parts of a decoder-only model that scoring touches.

    Attributes:
        model: the model as the user runs it.
        decoder: the stack of layers with its embedding, without the LM head.
        layers: all ``n`` of them. What enters the last is ``hidden_states[-2]``, the state that the paper's SPRM reads.
        hidden_size, vocab_size: of the text decoder.
        dtype, device: of the hidden states that are read.
        tap: which these are.
    """

    model: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    tap: Tap

    @classmethod
    def of(cls, model: nn.Module, tap: Tap | None = None) -> "Backbone":
        """Find the parts of ``model``, for who reads it at ``tap``, by default where the paper's SPRM does.

        Its decoder is the innermost module that holds both the token embedding and ``config.num_hidden_layers`` layers; a
        vision tower may have as many, but embeds no tokens.

        Raises:
            ValueError: an encoder-decoder, fewer than two layers, no such module, or weights that were never loaded; a tap that it
                does not have, or whose states lie on several devices.
        """
        tap = tap or Tap()
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
        dtype = next(embedding.parameters()).dtype
        devices = {i: _device_of(layers[i - 1] if i else embedding) for i in tap.indices(n, name)}
        device = next(iter(devices.values()))
        if len(set(devices.values())) > 1:
            told = ", ".join(f"hidden_states[{i}] on {device}" for i, device in devices.items())
            raise ValueError(
                f"layers={tap.layers}: {name} has {told}; place it so that all that the head reads is on one device (device_map)"
            )
        if device.type == "meta":
            raise ValueError(f"model: the weights of {name} are on the meta device; load them first")
        return cls(model, decoder, layers, text.hidden_size, text.vocab_size, dtype, device, tap)

    @functools.cached_property
    def last(self) -> LayerInput:
        """The last layer, which every forward calls."""
        return LayerInput(self.layers[-1], self.hidden_size, self.model)

    @functools.cached_property
    def places(self) -> Places:
        """Where what is read comes by."""
        n, name = len(self.layers), type(self.model).__name__
        indices = self.tap.indices(n, name)
        norm = by_rms if self.tap.norm == "rms" else None
        if self.tap.norm is True and indices != (n,):
            if n in indices:
                raise ValueError(
                    f"norm=True: of layers={self.tap.layers} the last has the final norm already and the others have not; name layers of one "
                    "kind"
                )
            norm = self._final_norm()
        return Places({i: self._point(i) for i in indices}, norm, self.hidden_size)

    @property
    def below(self) -> Sequence[nn.Module]:
        """The layers on which what is read depends."""
        return self.layers[: self.places.deepest]

    @property
    def width(self) -> int:
        """Values of what is read of a token, K."""
        return self.places.width

    def _point(self, i: int) -> Point:
        """Where ``hidden_states[i]`` comes by."""
        n = len(self.layers)
        if i == n:
            return DecoderOutput(self.decoder, self.hidden_size, self.model, "the decoder")
        return self.last if i == n - 1 else LayerInput(self.layers[i], self.hidden_size, self.model, f"layer {i}")

    def _final_norm(self) -> nn.Module:
        """What normalises the last layer's output: of the decoder's own modules of H weights, the one that comes last.

        Raises:
            ValueError: there is none.
        """
        norms = [m for m in self.decoder.children() if [p.shape for p in m.parameters()][:1] == [(self.hidden_size,)]]
        if not norms:
            raise ValueError(f"norm=True: no final norm found in {type(self.decoder).__name__}; take norm=False, or layer -1")
        return norms[-1]

    def listening(self, use: Callable[[Tensor], object]) -> AbstractContextManager[None]:
        """``Places.listening``: within, ``use(features [B, T, K])`` gets what is read in every forward."""
        return self.places.listening(use)

    def hidden(self, ids: Tensor, attention_mask: Tensor | None, shared: int = 0, kv: Cache | None = None) -> Tensor:
        """What is read [B, T - shared, K], with its autograd graph, for ``ids`` [B, T].

        The forward ends at the deepest state that is read: with the paper's tap the last layer, the final norm and the LM head never
        run. No other layer's states are kept. Left or right padding gives the positions that the text has alone.

        Args:
            shared: this many columns, alike in all rows and without padding, run once for all rows and are not returned.
                See ``can_share``.
            kv: the cache of the columns before ``ids``, which are added to it: a text is run a piece at a time. Without padding,
                and without ``shared``.

        Raises:
            ValueError: an id stands for an image, a video or a sound, which the ids do not hold.
        """
        return self.places.join(self._hidden_states(self.places, ids, attention_mask, shared, kv))

    def _hidden_states(
        self, places: Places, ids: Tensor, attention_mask: Tensor | None, shared: int = 0, kv: Cache | None = None
    ) -> dict[int, Tensor]:
        """The same as the ``hidden_states`` [B, T - shared, H] at ``places``, by their index."""
        self._check_text_only(ids)
        first = _device_of(self.model.get_input_embeddings())  # several devices: the last layer's may be another
        ids, inputs = ids.to(first), {"use_cache": False}
        if shared:
            kv = self.prefill(ids[:1, :shared], len(ids), functools.partial(self._states, places))
        if kv is not None:
            inputs = {"use_cache": True, **with_cache(self.decoder, kv)}
        # No token sees padding on its right. Without a mask attention is faster, and a sliding window over nothing but padding
        # does not make its row NaN.
        if attention_mask is not None and not (attention_mask[:, 0] != 0).all():
            inputs["attention_mask"] = mask = attention_mask.to(first)
            if "position_ids" in inspect.signature(self.decoder.forward).parameters:
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return self._states(places, input_ids=ids[:, shared:], **inputs)

    def prefill(self, prefix: Tensor, rows: int, run: Callable[..., Any] | None = None) -> Cache:
        """The cache of ``rows`` texts that all begin with ``prefix`` [1, S], which runs once, with its autograd graph.

        Args:
            run: what runs it; None for the decoder, whose cache the whole model can go on from. See ``can_share``.
        """
        kv = DynamicCache(config=self._text_config())
        (run or self.decoder)(input_ids=prefix, **with_cache(self.decoder, kv), use_cache=True)
        kv.batch_repeat_interleave(rows)
        return kv

    def can_share(self) -> bool:
        """Whether what is cached of a prefix can be shared, and gradients go through it: no recurrent state, and no gradient
        checkpointing, which computes every layer anew, without a cache."""
        layers = cache_layers(self._text_config())
        recomputes = self.model.training and checkpoints(self.layers)
        return not recomputes and all(isinstance(layer, DynamicLayer) for layer in layers)

    def _text_config(self) -> PretrainedConfig:
        return self.model.config.get_text_config(decoder=True)

    def _states(self, places: Places, **inputs: Any) -> dict[int, Tensor]:
        """The ``hidden_states`` at ``places`` when the decoder is given ``inputs``; with the deepest the forward ends."""
        thread = threading.get_ident()

        def stop(states: dict[int, Tensor]) -> None:
            if threading.get_ident() == thread:  # else another thread's forward, which goes on
                raise _Reached(states)

        try:
            with places.gathering(stop):
                self.decoder(**inputs)
        except _Reached as reached:
            return reached.states
        raise unknown(f"model: {places.points[places.deepest].name} of {type(self.model).__name__} never ran", self.model)

    def features(
        self, ids: Tensor, attention_mask: Tensor | None, row: Tensor, column: Tensor, kv: Cache | None = None
    ) -> Tensor:
        """What is read [M, K] at ``(row, column)`` of ``hidden(ids, attention_mask, kv=kv)``, without a graph."""
        return self.features_at([self.places], ids, attention_mask, [(row, column)], kv)[0]

    def features_at(
        self, places: Sequence[Places], ids: Tensor, attention_mask: Tensor | None, at: Sequence[tuple[Tensor, Tensor]],
        kv: Cache | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The same for several who read at ``places``, each [M_i, K_i] at its ``(row, column)``, by one forward."""
        with torch.no_grad(), narrow_mlps(self.layers):
            states = self._hidden_states(Places.together(places), ids, attention_mask, kv=kv)
            return [
                p.join({i: states[i][row, column] for i in p.points}) for p, (row, column) in zip(places, at, strict=True)
            ]

    def _check_text_only(self, ids: Tensor) -> None:
        for kind in ("image", "video", "audio"):
            placeholder = getattr(self.model.config, f"{kind}_token_id", None)
            if placeholder is not None and (ids == placeholder).any():
                raise ValueError(
                    f"input_ids: token {placeholder} stands for {kind} features, which finished text does not hold; score "
                    "such trajectories with a StreamScorer, while they are decoded"
                )


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


class _Reached(Exception):
    """Ends a forward once its states are there."""

    def __init__(self, states: dict[int, Tensor]) -> None:
        self.states = states
