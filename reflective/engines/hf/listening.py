"""Objects that tell: while anybody listens, their class is exchanged for a subclass that says how it is called.

Here is how classes are exchanged, and where hidden states come by: at a layer's input, and at the decoder's output. Which of them a
head reads is ``places``' to say; what a whole model tells while it decodes is ``tap``'s.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from .internals import state_argument, state_in, unknown

_EARS = "_reflective_ears"  # where a module keeps those who listen
_CHANGING = threading.Lock()  # while the class of a module is exchanged


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
    """Who hears what goes by."""

    def hear(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """A layer is called with these arguments, or the decoder has returned ``args[0]``."""


class Point:
    """A module of ``model`` at which hidden states of ``size`` values go by, and who listens to it. ``name``: for errors."""

    def __init__(self, module: nn.Module, size: int, model: nn.Module, name: str) -> None:
        self.module, self.size, self.model, self.name = module, size, model, name

    def subclass(self, base: type) -> type:
        """``base``, whose instances tell."""
        raise NotImplementedError

    def given(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The hidden states among what is heard, unchecked: all that code which is being compiled can tell."""
        raise NotImplementedError

    def add(self, ear: Ear) -> None:
        """Have ``ear`` hear every call of the module, those in code that is being compiled too."""
        with _CHANGING:
            ears = vars(self.module).get(_EARS, ())
            vars(self.module)[_EARS] = (*ears, ear)
            if not ears:
                exchange(self.module, self.subclass)

    def remove(self, ear: Ear) -> None:
        """The opposite of ``add``; after the last of them the module has its own class again."""
        own = vars(self.module)
        with _CHANGING:
            own[_EARS] = tuple(other for other in own[_EARS] if other is not ear)
            if not own[_EARS]:
                restore(self.module)
                del own[_EARS]

    def state(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states [B, q, H] among what is heard.

        Raises:
            ValueError: what the layers hand on is not one state a token.
            RuntimeError: there are none.
        """
        hidden = self.given(args, kwargs)
        if hidden is None:
            given = ", ".join([*(type(value).__name__ for value in args), *kwargs]) or "nothing"
            raise unknown(
                f"model: {self.name} of {type(self.model).__name__} is given no hidden states of {self.size} "
                f"values, but {given}",
                self.model,
            )
        if hidden.dim() != 3 or hidden.shape[-1] != self.size:
            raise ValueError(
                f"model: the layers of {type(self.model).__name__} hand on {list(hidden.shape)}, not one state of "
                f"{self.size} values a token; it has no hidden state that a head could read"
            )
        return hidden


class LayerInput(Point):
    """What enters a layer."""

    def __init__(self, layer: nn.Module, size: int, model: nn.Module, name: str = "the last layer") -> None:
        super().__init__(layer, size, model, name)
        self.state_name = state_argument(layer)

    def subclass(self, base: type) -> type:
        return _tells_arguments(base)

    def given(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        return state_in(self.state_name, self.size, args, kwargs)


class DecoderOutput(Point):
    """What the decoder returns first: the last layer's states after the final norm."""

    def subclass(self, base: type) -> type:
        return _tells_output(base)

    def given(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        output = args[0]
        hidden = getattr(output, "last_hidden_state", None)
        return output[0] if hidden is None and isinstance(output, tuple) else hidden


@functools.cache
def _tells_arguments(base: type) -> type:
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


@functools.cache
def _tells_output(base: type) -> type:
    """``base``, whose instances tell of what they return."""

    class Listening(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **kwargs)
            for ear in self._reflective_ears:
                ear.hear((output,), {})
            return output

    if "forward" in vars(Listening):  # as above
        del Listening.forward
    return alike(Listening, base)
