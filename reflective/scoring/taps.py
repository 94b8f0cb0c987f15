"""Where a head reads a model: which hidden states, and at which tokens."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..utils.arguments import one_of

At = Literal["predict", "token", "every"]
Norm = Literal[False, True, "rms"]
AT = ("predict", "token", "every")


@dataclass(frozen=True)
class Tap:
    """What a head reads. Part of the head: saved and loaded with it, and read from it by all who score.

    Attributes:
        layers: indices of ``hidden_states`` as transformers counts them, from the end if negative: 0 is the embeddings, -2 what enters the
            last of the layers (the paper's), -1 what the final norm makes of that layer's output. The states of several layers
            are concatenated, in the order given.
        norm: what is done to each of them. False: nothing; True: the model's final norm, which -1 has already; ``"rms"``: it is divided by
            ``sqrt(mean(x^2) + 1e-6)``.
        at: which token's state is a step's feature. ``"predict"``: that of the token before the step-token, which predicted it (published
            checkpoints of MetaStone); ``"token"``: the step-token's own; ``"every"``: every generated token is a step, and its own
            state the feature, but for tokens that end a sequence or pad it.

    Raises:
        ValueError: no layer, one that is no integer, or one named twice; an unknown ``norm`` or ``at``.
    """

    layers: tuple[int, ...] = (-2,)
    norm: Norm = False
    at: At = "predict"

    def __post_init__(self) -> None:
        layers = self.layers
        try:
            layers = (layers,) if not isinstance(layers, Sequence) else layers
            layers = tuple(operator.index(layer) for layer in layers)
        except TypeError as error:
            raise ValueError(f"layers={self.layers!r}: expected indices of hidden_states, such as (-2,)") from error
        if not layers:
            raise ValueError("layers=(): name at least one of the hidden_states, such as (-2,)")
        _check_once(layers, layers)
        one_of("at", self.at, AT)
        if self.norm not in (False, True, "rms"):
            raise ValueError(f"norm={self.norm!r}; expected False, True or 'rms'")
        object.__setattr__(self, "layers", layers)

    def indices(self, n: int, model: str = "model") -> tuple[int, ...]:
        """``layers`` counted from 0, for a model of ``n`` layers, which has n + 1 ``hidden_states``.

        Raises:
            ValueError: the model has no such layer, or two of them are one there.
        """
        for layer in self.layers:
            if not -n - 1 <= layer <= n:
                raise ValueError(
                    f"layers={self.layers}: {model} has hidden_states 0 to {n} (or {-n - 1} to -1), so no {layer}; the head was made "
                    "for a deeper model"
                )
        found = tuple(layer % (n + 1) for layer in self.layers)
        _check_once(found, self.layers)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Self:
        """The opposite of ``to_dict``; what is not said is the paper's.

        Raises:
            ValueError: an unknown name, or a value that is none.
        """
        if unknown := sorted(set(said) - {f.name for f in fields(cls)}):
            raise ValueError(f"tap: unknown {', '.join(unknown)}; expected layers, norm, at")
        return cls(**said)


def by_rms(state: Tensor) -> Tensor:
    """``x / sqrt(mean(x^2) + 1e-6)`` of each state [..., H]: a norm without weights, computed in float32."""
    wide = state.to(torch.promote_types(state.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(state.dtype)


def _check_once(counted: Sequence[int], layers: Sequence[int]) -> None:
    if len(set(counted)) < len(counted):
        twice = next(layer for layer, i in zip(layers, counted, strict=True) if list(counted).count(i) > 1)
        raise ValueError(f"layers={tuple(layers)}: {twice} is named twice; name each of the hidden_states once")
