"""The states that a head reads, wherever in the model they come by, as one tensor."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...scoring.sharded import aligned
from .listening import Point


class Places:
    """Where the states of a tap come by.

    Args:
        points: of the tap's ``hidden_states`` by their index, in the tap's order.
        norm: what is done to each of the states; None: nothing.
        size: values of a state.

    Attributes:
        deepest: the index of the point that comes last in a forward.
        width: values of what is read, K: all states', and zeros up to a multiple of 8.
    """

    def __init__(self, points: Mapping[int, Point], norm: Callable[[Tensor], Tensor] | None, size: int) -> None:
        self.points, self.norm, self.deepest = dict(points), norm, max(points)
        self.width = aligned(len(points) * size)

    def join(self, states: Mapping[int, Tensor]) -> Tensor:
        """What the head reads [B, q, K], of the ``hidden_states`` [B, q, H] by their index."""
        found = [states[i] if self.norm is None else self.norm(states[i]) for i in self.points]
        if len(found) == 1 and found[0].shape[-1] == self.width:
            return found[0]
        joined = torch.cat(found, -1)
        return F.pad(joined, (0, self.width - joined.shape[-1]))

    @classmethod
    def together(cls, places: Sequence["Places"]) -> "Places":
        """All of their points."""
        points = {i: point for several in places for i, point in several.points.items()}
        return cls(points, None, next(iter(points.values())).size)

    @contextmanager
    def listening(self, use: Callable[[Tensor], object]) -> Iterator[None]:
        """Within, ``use(features [B, T, K])`` gets what the head reads in every forward, with its autograd graph.

        Once a forward, also under gradient checkpointing: the class of a layer is exchanged, because a hook may run
        within a checkpoint, where states are detached, and again when the checkpoint is computed anew. What wraps the model
        (DDP, accelerate, peft) makes no difference.

        Raises:
            ValueError: in a forward, if what the layers hand on is not one state a token.
        """
        with self.gathering(lambda states: use(self.join(states))):
            yield

    @contextmanager
    def gathering(self, use: Callable[[dict[int, Tensor]], object]) -> Iterator[None]:
        """Within, ``use`` gets the ``hidden_states`` [B, T, H] of every forward, by their index."""
        heard = threading.local()  # the states so far of the forward that this thread runs
        ears = [_StateEar(self, i, use, heard) for i in self.points]
        added: list[_StateEar] = []
        try:
            for ear in ears:
                self.points[ear.index].add(ear)
                added.append(ear)
            yield
        finally:
            for ear in reversed(added):
                self.points[ear.index].remove(ear)


class _StateEar:
    """Gathers the states of a forward, and hands them on with the last."""

    def __init__(
        self, places: Places, index: int, use: Callable[[dict[int, Tensor]], object], heard: threading.local
    ) -> None:
        self.places, self.index, self.use, self.heard = places, index, use, heard

    def hear(self, args: tuple, kwargs: dict[str, Any]) -> None:
        states = vars(self.heard)
        states[self.index] = self.places.points[self.index].state(args, kwargs)
        if self.index == self.places.deepest:
            gathered = dict(states)
            states.clear()
            self.use(gathered)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_StateEar":
        """Of a copied layer the same are told."""
        return self
