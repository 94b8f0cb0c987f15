"""Objects that tell: while anybody listens, their class is exchanged for a subclass that says how it is called.

Here is how classes are exchanged, and the layer that everything listens to, the last. What a whole model tells while it
decodes is ``tap``'s.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from .internals import state_argument, state_in, unknown

_EARS = "_reflective_ears"  # where a layer keeps those who listen
_CHANGING = threading.Lock()  # while the class of a layer is exchanged


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


class Ear(Protocol):
    """Who hears what enters the last layer."""

    def hear(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The layer is called with these arguments."""


class LastLayer:
    """The last layer of ``model``, what it calls the hidden states of ``size`` values, and who listens to it."""

    def __init__(self, layer: nn.Module, size: int, model: nn.Module) -> None:
        self.layer, self.size, self.model = layer, size, model
        self.state_name = state_argument(layer)

    def add(self, ear: Ear) -> None:
        """Have ``ear`` hear every call of the layer, those in code that is being compiled too."""
        with _CHANGING:
            ears = vars(self.layer).get(_EARS, ())
            vars(self.layer)[_EARS] = (*ears, ear)
            if not ears:
                exchange(self.layer, _listening)

    def remove(self, ear: Ear) -> None:
        """The opposite of ``add``; after the last of them the layer has its own class again."""
        own = vars(self.layer)
        with _CHANGING:
            own[_EARS] = tuple(other for other in own[_EARS] if other is not ear)
            if not own[_EARS]:
                restore(self.layer)
                del own[_EARS]

    @contextmanager
    def listening(self, use: Callable[[Tensor], object]) -> Iterator[None]:
        """Within, ``use(hidden [B, T, H])`` gets what enters the layer in every forward, with its autograd graph.

        Once a forward, also under gradient checkpointing: the class of the layer is exchanged, because a hook may run
        within a checkpoint, where states are detached, and again when the checkpoint is computed anew. What wraps the model
        (DDP, accelerate, peft) makes no difference.

        Raises:
            ValueError: in a forward, if what the layers hand on is not one state a token.
        """
        ear = _StateEar(self, use)
        self.add(ear)
        try:
            yield
        finally:
            self.remove(ear)

    def given(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The hidden states among the arguments of a call, unchecked: all that code which is being compiled can tell."""
        return state_in(self.state_name, self.size, args, kwargs)

    def state(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states [B, q, H] among the arguments of a call.

        Raises:
            ValueError: what the layers hand on is not one state a token.
            RuntimeError: they are given none.
        """
        hidden = self.given(args, kwargs)
        if hidden is None:
            given = ", ".join([*(type(value).__name__ for value in args), *kwargs]) or "nothing"
            raise unknown(
                f"model: the last layer of {type(self.model).__name__} is given no hidden states of {self.size} "
                f"values, but {given}",
                self.model,
            )
        if hidden.dim() != 3 or hidden.shape[-1] != self.size:
            raise ValueError(
                f"model: the layers of {type(self.model).__name__} hand on {list(hidden.shape)}, not one state of "
                f"{self.size} values a token; it has no hidden state that a head could read"
            )
        return hidden


class _StateEar:
    """Hands on the states alone."""

    def __init__(self, last: LastLayer, use: Callable[[Tensor], object]) -> None:
        self.last, self.use = last, use

    def hear(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.use(self.last.state(args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_StateEar":
        """Of a copied layer the same are told."""
        return self


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
