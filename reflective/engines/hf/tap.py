"""How scorers hear a model: while any listens, three classes are exchanged for subclasses that tell.

The model's class tells of token ids, generate calls and their arguments; its last layer's of the cache that it is given; those of the
layers that somebody reads of the hidden states that enter them; the class of the KV cache in use of rows that are reordered, selected, repeated or rolled back. When the last scorer
leaves, every object has its own class again.

Why not hooks: ``torch.compile`` guards on the type of each module that it traced, but not on its hooks, so code that was
compiled before a hook came would go on without it, and code compiled with it would be lost when it goes. With types, the
first forward that is heard is compiled once more, with the scorer's op in the graph; the plain code serves again
afterwards, and the next scorer, any scorer of the same shapes, finds the code of the first.
"""

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import internals
from .backbone import Backbone
from .listening import Point, alike, exchange, restore
from .places import Places

_ATTRIBUTE = "_reflective_tap"


class Listener(Protocol):
    """What a tap tells. All but ``on_trace`` are called in eager mode only.

    Attributes:
        places: where it reads the model.
        unheard: set when a compiled forward ran of which nothing but ``on_trace`` was told.
    """

    places: Places
    unheard: bool

    def on_generate(self, arguments: dict[str, Any], batching: Any) -> None:
        """``generate`` (or, with its manager as ``batching``, ``generate_batch``) begins; raise to refuse."""

    def on_generated(self, output: Any) -> None:
        """``generate`` is over and returned ``output``; None after an exception."""

    def on_forward(self, ids: Tensor | None, cache: Any, given: dict[str, Any]) -> None:
        """A forward of these token ids on this cache begins; ``given`` are all of its arguments."""

    def on_features(self, hidden: Tensor) -> None:
        """What is read [B, q, K] in that forward."""

    def on_trace(self, ids: Tensor, hidden: Tensor) -> None:
        """The same inside of a compiled forward: tensors only, nothing of the host."""

    def on_select(self, indices: Tensor, reorder: bool) -> None:
        """Row i of the cache is now what row ``indices[i]`` was; ``reorder``: by beam search."""

    def on_repeat(self, repeats: int) -> None:
        """Every row of the cache now stands there ``repeats`` times, one after the other."""

    def on_crop(self, length: int) -> None:
        """The cache now holds ``length`` tokens."""


class ModelTap:
    """One model's; see the module. ``listeners`` are told in the order in which they came."""

    def __init__(self, backbone: Backbone) -> None:
        self.model = backbone.model
        self.listeners: tuple[Listener, ...] = ()
        self.inputs = tuple(inspect.signature(self.model.forward).parameters)  # names, for positional arguments
        self.ids_name, self.last = internals.ids_argument(self.model), backbone.last
        self.ears: dict[int, _StateEar] = {}  # at the hidden states that somebody reads
        self.states: dict[int, Tensor] = {}  # of the forward in progress, which somebody reads together with later ones
        self.given: dict[str, Any] | None = None  # the arguments of the forward in progress
        self.hearing = False  # whether it is one of the stream
        self.called = False  # whether the model's __call__ has told of it
        self.traced = False  # whether its hidden states came in compiled code
        self.ids: Tensor | None = None  # its token ids
        self.thread: int | None = None  # that runs a forward or generate
        self.depth = 0  # of generate calls; early-exit drafts call the model's own generate
        self.forwards = 0  # of the generate call in progress
        self.rolls_back = False  # whether that is one that drafts
        self.proved = False  # whether a forward was seen to the end, and its cache counted
        self.cache: Callable[[], Any] = lambda: None  # weak reference to the cache that is followed
        self.try_release: Callable[[str], None] | None = None  # see `add`
        self.plain_call: Any = None  # what generate compiled before; with listeners it compiles the listening __call__

    @classmethod
    def of(cls, model: nn.Module) -> "ModelTap | None":
        """The model's, while a listener is attached."""
        return vars(model).get(_ATTRIBUTE)

    @classmethod
    def add(cls, backbone: Backbone, listener: Listener, try_release: Callable[[str], None] | None = None) -> "ModelTap":
        """Have ``listener`` told of what the backbone's model does.

        Args:
            try_release: tries, with a transformers that the tests were not run with, "decoding" right now, and "drafts" or
                "beams" before the first ``generate`` call that has them.

        Raises:
            RuntimeError: this transformers is not as scoring needs it; or another thread runs the model.
        """
        if try_release is not None and not internals.is_tested():
            try_release("decoding")
        tap = cls.of(backbone.model) or cls(backbone)
        tap.check_thread()
        if not tap.listeners:
            tap.plain_call = internals.take_compiled_call(tap.model)
            vars(tap.model)[_ATTRIBUTE] = tap
            exchange(tap.model, _listening_model)
            tap.last.add(tap)
        tap.try_release = tap.try_release or try_release
        tap.listeners += (listener,)
        for i, point in listener.places.points.items():
            if i not in tap.ears:
                tap.ears[i] = _StateEar(tap, i, point)
                point.add(tap.ears[i])
        return tap

    @classmethod
    def remove(cls, backbone: Backbone, listener: Listener) -> None:
        """The opposite of ``add``."""
        tap = vars(backbone.model)[_ATTRIBUTE]
        tap.listeners = tuple(other for other in tap.listeners if other is not listener)
        read = {i for other in tap.listeners for i in other.places.points}
        for i in sorted(set(tap.ears) - read, reverse=True):
            ear = tap.ears.pop(i)
            ear.point.remove(ear)
        if not tap.listeners:
            tap.follow(None)
            tap.last.remove(tap)
            restore(tap.model)
            del vars(tap.model)[_ATTRIBUTE]
            internals.give_compiled_call(tap.model, tap.plain_call)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelTap":
        """Of a copied model or cache nobody hears."""
        other = object.__new__(ModelTap)
        vars(other).update(vars(self), listeners=(), cache=lambda: None, ears={}, states={})
        return other

    # -- generate ----------------------------------------------------------------------------------------------------

    def check_thread(self) -> None:
        """Raise RuntimeError if another thread runs the model: which forward is whose, nobody could tell."""
        if self.thread not in (None, threading.get_ident()):
            raise RuntimeError(
                f"another thread runs this {type(self.model).__name__}, and a StreamScorer that follows it is attached; let one "
                "thread decode at a time, or give each a model of its own (copy.deepcopy)"
            )

    def begin_generate(self, arguments: dict[str, Any]) -> None:
        self.check_thread()
        if self.depth == 0:
            config = arguments.get("generation_config") or self.model.generation_config
            given = {
                name: arguments.get(name, getattr(config, name, None)) for name in ("num_beams", *internals.DRAFTS)
            }
            self.rolls_back = any(given.pop(name) for name in internals.DRAFTS)
            if self.try_release is not None and not internals.is_tested():
                for way in ["drafts"] * self.rolls_back + ["beams"] * ((given["num_beams"] or 1) > 1):
                    self.try_release(way)
            for listener in self.listeners:
                listener.on_generate(arguments, None)
            self.follow(None)
            self.forwards, self.thread = 0, threading.get_ident()
        self.depth += 1

    def end_generate(self, output: Any, prompt: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        self.thread, self.rolls_back = None, False
        for listener in self.listeners:
            listener.on_generated(output)
        ids = getattr(output, "sequences", output)
        heard = self.forwards or any(listener.unheard for listener in self.listeners)
        if isinstance(ids, Tensor) and not heard and not (isinstance(prompt, Tensor) and ids.shape == prompt.shape):
            raise internals.unknown(
                f"generate of {type(self.model).__name__} called neither the model nor its forward, so that nothing of it was scored",
                self.model,
            )

    # -- forwards ----------------------------------------------------------------------------------------------------

    def run(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the model's ``forward``, and tell of it if it is one of the stream."""
        self.check_thread()
        of_stream = self.begin_forward(args, kwargs)
        called, thread, listeners, hearing = self.called, self.thread, self.listeners, self.hearing
        self.called, self.thread, self.hearing = True, threading.get_ident(), of_stream
        if not of_stream:  # what is compiled of it is compiled without listeners
            self.listeners = ()
        try:
            output = forward(*args, **kwargs)
            if of_stream:
                self.end_forward()
            return output
        finally:
            self.called, self.thread, self.listeners, self.hearing, self.given = called, thread, listeners, hearing, None
            self.states.clear()

    def begin_compiled(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward with these arguments begins in code that is being compiled."""
        self.ids = (dict(zip(self.inputs, args, strict=False)) | kwargs).get(self.ids_name)
        for listener in self.listeners:
            listener.unheard = True

    def begin_forward(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the forward with these arguments is one of the stream."""
        if self.depth > 1:  # a draft by the model's own first layers
            return False
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        ids, cache = given.get(self.ids_name), internals.cache_in(given.values())
        if self.depth and not self._goes_on(cache):
            return False
        if cache is not None:
            self.follow(cache)
        past = 0 if self.proved or cache is None else int(cache.get_seq_length())
        for listener in self.listeners:
            listener.on_forward(ids, cache, given)
        self.forwards += 1
        self.given, self.ids, self.past, self.traced = given, ids, past, False
        return True

    def _goes_on(self, cache: Any) -> bool:
        """Whether a forward within ``generate`` is one of its own: on the cache of its first. Others are run by logits
        processors (classifier-free guidance) and stopping criteria, on caches of theirs or none."""
        followed = self.cache()
        if self.forwards and followed is None and cache is None:
            raise internals.unknown(
                f"generate of {type(self.model).__name__} handed no key-value cache to its forwards: there is none among their "
                "arguments and those of the last layer",
                self.model,
            )
        return followed is None or cache is followed

    def end_forward(self) -> None:
        """A forward of the stream has returned."""
        if self.given is not None and not self.traced:
            raise internals.unknown(
                f"model: a forward of {type(self.model).__name__} did not call its last layer, whose input is what is scored",
                self.model,
            )
        if not self.proved and (cache := self.cache()) is not None:
            held, expected = int(cache.get_seq_length()), self.past + self.ids.shape[1]
            if held != expected:
                raise internals.unknown(
                    f"model: after a forward of {self.ids.shape[1]} tokens on {self.past} the {type(cache).__name__} of "
                    f"{type(self.model).__name__} says that it holds {held}, not {expected}, so its decoding cannot be followed",
                    self.model,
                )
            self.proved = True

    def hear(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The last layer is called with these arguments."""
        if torch.compiler.is_compiling():
            self.traced = True
            return
        # Else the decoder alone, as rf.score runs it, perhaps in another thread; or a forward that is not of the stream.
        if self.given is None or self.thread != threading.get_ident():
            return
        self.given = None
        if (cache := internals.cache_in((*args, *kwargs.values()))) is not None:
            self.follow(cache)

    def hear_state(self, index: int, point: Point, args: tuple, kwargs: dict[str, Any]) -> None:
        """``hidden_states[index]`` comes by at ``point``, among these arguments."""
        if torch.compiler.is_compiling():
            hidden = point.given(args, kwargs)
        elif not self.hearing or self.thread != threading.get_ident():
            return
        else:
            hidden = point.state(args, kwargs)
            if hidden.shape[:2] != self.ids.shape:
                raise internals.unknown(
                    f"model: {point.name} of {type(self.model).__name__} is given states {list(hidden.shape)} for token ids "
                    f"{list(self.ids.shape)}",
                    self.model,
                )
        for listener in self.listeners:
            places = listener.places
            if index not in places.points:
                continue
            if index < places.deepest:
                self.states[index] = hidden
                continue
            features = places.join({**self.states, index: hidden} if len(places.points) > 1 else {index: hidden})
            if torch.compiler.is_compiling():
                listener.on_trace(self.ids, features)
            else:
                listener.on_features(features)
        if self.states and index == max(self.ears):
            self.states.clear()

    def follow(self, cache: Any) -> None:
        """From now on tell of what is done to the rows of ``cache``, and of no other."""
        old = self.cache()
        if cache is old and cache is not None:
            return
        if old is not None:
            vars(old).pop(_ATTRIBUTE, None)
            restore(old)
        self.cache = lambda: None
        if hasattr(cache, "reorder_cache"):
            vars(cache)[_ATTRIBUTE] = self
            exchange(cache, _listening_cache)
            self.cache = weakref.ref(cache)


class _StateEar:
    """Tells a tap of the hidden states at one point."""

    def __init__(self, tap: ModelTap, index: int, point: Point) -> None:
        self.tap, self.index, self.point = tap, index, point

    def hear(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.tap.hear_state(self.index, self.point, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_StateEar":
        """Of a copied layer nobody hears."""
        return _StateEar(copy.deepcopy(self.tap, memo), self.index, self.point)


@functools.cache
def _listening_model(base: type) -> type:
    class Listening(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            tap = self._reflective_tap
            if not torch.compiler.is_compiling():
                return tap.run(super().__call__, args, kwargs)
            tap.begin_compiled(args, kwargs)
            tap.called = True
            try:
                return super().__call__(*args, **kwargs)
            finally:
                tap.called = False

        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            # Not through __call__: by code that torch.compile made of the plain class's.
            tap = self._reflective_tap
            if not tap.called:
                if not torch.compiler.is_compiling():
                    return tap.run(super().forward, args, kwargs)
                tap.begin_compiled(args, kwargs)
            return super().forward(*args, **kwargs)

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            tap, output = self._reflective_tap, None
            arguments = inspect.signature(super().generate).bind_partial(*args, **kwargs).arguments
            arguments |= arguments.pop("kwargs", {})
            tap.begin_generate(arguments)
            try:
                output = super().generate(*args, **kwargs)
            finally:
                tap.end_generate(output, arguments.get("input_ids", arguments.get("inputs")))
            return output

        def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
            # What is drafted in compiled code could not be taken back.
            return self.__call__ if self._reflective_tap.rolls_back else super().get_compiled_call(*args, **kwargs)

        def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().init_continuous_batching(*args, **kwargs)
            for listener in self._reflective_tap.listeners:
                listener.on_generate({}, manager)
            return manager

    return alike(Listening, base)


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

    return alike(Listening, base)
