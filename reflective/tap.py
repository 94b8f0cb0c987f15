"""How scorers hear a model: while any listens, three classes are exchanged for subclasses that tell.

The model's class tells of token ids, generate calls and their arguments; its last layer's of the hidden states that enter
it; the class of the KV cache in use of rows that are reordered, selected, repeated or rolled back. When the last scorer
leaves, every object has its own class again.

Why not hooks: ``torch.compile`` guards on the type of each module that it traced, but not on its hooks, so code that was
compiled before a hook came would go on without it, and code compiled with it would be lost when it goes. With types, the
first forward that is heard is compiled once more, with the scorer's op in the graph; the plain code serves again
afterwards, and the next scorer, any scorer of the same shapes, finds the code of the first.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .backbone import Backbone

_ATTRIBUTE = "_reflective_tap"
_COMPILED_CALL = "_compiled_call"  # where transformers' generate keeps its compiled forward


class Listener(Protocol):
    """What a tap tells. All but ``on_trace`` are called in eager mode only.

    Attributes:
        unheard: set when a compiled forward ran of which nothing but ``on_trace`` was told.
    """

    unheard: bool

    def on_generate(self, arguments: dict[str, Any], batching: Any) -> None:
        """``generate`` (or, with its manager as ``batching``, ``generate_batch``) begins; raise to refuse."""

    def on_generated(self) -> None:
        """``generate`` is over, also after an exception."""

    def on_forward(self, given: dict[str, Any]) -> None:
        """A forward begins, with these arguments."""

    def on_features(self, hidden: Tensor) -> None:
        """The states [B, q, H] that enter the last layer of that forward."""

    def on_trace(self, ids: Tensor, hidden: Tensor) -> None:
        """The same inside of a compiled forward: tensors only, nothing of the host."""

    def on_select(self, indices: Tensor, reorder: bool) -> None:
        """Row i of the cache is now what row ``indices[i]`` was; ``reorder``: by beam search."""

    def on_repeat(self, repeats: int) -> None:
        """Every row of the cache now stands there ``repeats`` times, one after the other."""

    def on_crop(self, length: int) -> None:
        """The cache now holds ``length`` tokens."""


class Tap:
    """One model's; see the module. ``listeners`` are told in the order in which they came."""

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.layer = backbone.model, backbone.layers[-1]
        self.listeners: tuple[Listener, ...] = ()
        self.inputs = tuple(inspect.signature(self.model.forward).parameters)  # names, for positional arguments
        self.given: dict[str, Any] | None = None  # the arguments of the forward in progress
        self.called = False  # whether the model's __call__ has told of it
        self.ids: Tensor | None = None  # the token ids of the compiled forward in progress
        self.depth = 0  # of generate calls; early-exit drafts call the model's own generate
        self.cache: Callable[[], Any] = lambda: None  # weak reference to the cache that is followed
        self.plain_call: Any = None  # what generate compiled before; with listeners it compiles the listening __call__

    @classmethod
    def add(cls, backbone: Backbone, listener: Listener) -> None:
        """Have ``listener`` told of what the backbone's model does."""
        tap = vars(backbone.model).get(_ATTRIBUTE) or cls(backbone)
        if not tap.listeners:
            tap.plain_call = vars(tap.model).pop(_COMPILED_CALL, None)
            _exchange(tap.model, _listening_model, tap)
            _exchange(tap.layer, _listening_layer, tap)
        tap.listeners += (listener,)

    @classmethod
    def remove(cls, backbone: Backbone, listener: Listener) -> None:
        """The opposite of ``add``."""
        tap = vars(backbone.model)[_ATTRIBUTE]
        tap.listeners = tuple(other for other in tap.listeners if other is not listener)
        if not tap.listeners:
            tap.follow(None)
            _restore(tap.layer)
            _restore(tap.model)
            vars(tap.model).pop(_COMPILED_CALL, None)
            if tap.plain_call is not None:
                vars(tap.model)[_COMPILED_CALL] = tap.plain_call

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        """Of a copied model or cache nobody hears."""
        copy = object.__new__(Tap)
        vars(copy).update(vars(self), listeners=(), cache=lambda: None)
        return copy

    def begin_forward(self, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        self.ids = given.get("input_ids")
        if torch.compiler.is_compiling():
            for listener in self.listeners:
                listener.unheard = True
            return
        if self.depth > 1:
            return
        if (cache := given.get("past_key_values")) is not None:
            self.follow(cache)
        for listener in self.listeners:
            listener.on_forward(given)
        self.given = given

    def enter_last_layer(self, hidden: Tensor, cache: Any) -> None:
        if torch.compiler.is_compiling():
            for listener in self.listeners:
                listener.on_trace(self.ids, hidden)
            return
        if self.given is None:  # the decoder alone, as rf.score runs it, or a draft: no part of the stream
            return
        self.given = None
        if cache is not None:
            self.follow(cache)
        for listener in self.listeners:
            listener.on_features(hidden)

    def follow(self, cache: Any) -> None:
        """From now on tell of what is done to the rows of ``cache``, and of no other."""
        old = self.cache()
        if cache is old and cache is not None:
            return
        if old is not None:
            _restore(old)
        self.cache = lambda: None
        if hasattr(cache, "reorder_cache"):
            _exchange(cache, _listening_cache, self)
            self.cache = weakref.ref(cache)


def _exchange(thing: Any, subclass: Callable[[type], type], tap: Tap) -> None:
    vars(thing)[_ATTRIBUTE] = tap
    thing.__class__ = subclass(type(thing))


def _restore(thing: Any) -> None:
    vars(thing).pop(_ATTRIBUTE, None)
    thing.__class__ = type(thing).__mro__[1]


def _alike(subclass: type, base: type) -> type:
    """Under its own name: transformers looks names up, and so do users."""
    subclass.__name__, subclass.__qualname__, subclass.__module__ = base.__name__, base.__qualname__, base.__module__
    subclass.__doc__ = base.__doc__
    return subclass


@functools.cache
def _listening_model(base: type) -> type:
    class Listening(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            tap = self._reflective_tap
            tap.begin_forward(args, kwargs)
            tap.called = True
            try:
                return super().__call__(*args, **kwargs)
            finally:
                tap.called, tap.given = False, None

        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            # Not through __call__: by code that torch.compile made of the plain class's.
            if not self._reflective_tap.called:
                self._reflective_tap.begin_forward(args, kwargs)
            return super().forward(*args, **kwargs)

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            tap = self._reflective_tap
            if tap.depth == 0:
                arguments = inspect.signature(super().generate).bind_partial(*args, **kwargs).arguments
                arguments |= arguments.pop("kwargs", {})
                for listener in tap.listeners:
                    listener.on_generate(arguments, None)
            tap.depth += 1
            try:
                return super().generate(*args, **kwargs)
            finally:
                tap.depth -= 1
                if tap.depth == 0:
                    for listener in tap.listeners:
                        listener.on_generated()

        def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().init_continuous_batching(*args, **kwargs)
            for listener in self._reflective_tap.listeners:
                listener.on_generate({}, manager)
            return manager

    return _alike(Listening, base)


@functools.cache
def _listening_layer(base: type) -> type:
    class Listening(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._reflective_tap.enter_last_layer(hidden, kwargs.get("past_key_values"))
            return super().__call__(*args, **kwargs)

    return _alike(Listening, base)


@functools.cache
def _listening_cache(base: type) -> type:
    class Listening(base):
        def _listeners(self) -> tuple[Listener, ...]:
            tap = self._reflective_tap
            return tap.listeners if tap.cache() is self else ()

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            for listener in self._listeners():
                listener.on_select(beam_idx, True)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            for listener in self._listeners():
                listener.on_select(indices, False)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            for listener in self._listeners():
                listener.on_repeat(repeats)

        def crop(self, *args: Any, **kwargs: Any) -> None:
            super().crop(*args, **kwargs)
            for listener in self._listeners():
                listener.on_crop(int(self.get_seq_length()))

    return _alike(Listening, base)
