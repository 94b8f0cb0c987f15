"""What every head has, whatever its form: where it reads the model, what a step's score is, and the weights that the ops take."""

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ..utils.outputs import folder, replacing
from .scores import AGGREGATIONS, FROM_LOGARITHMS, TrajectoryScores
from .taps import Tap

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in which a head computes
NAMES = ("score_module.safetensors", "score_module.pt")
ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,  # the exact one, by erf
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}
_USE = ("aggregation", "sigmoid", "step_rule", "trained_on", "higher_is_better")  # beside the tap; what a file says


class Head(nn.Module):
    """A module that maps features [..., K] to logits [..., 1], and says how it is used.

    ``SPRM`` is the paper's, an MLP with one hidden layer; ``LinearHead`` and ``GatedLinear`` are others'.

    Attributes:
        tap: where it reads the model; K is the width of what it reads there.
        aggregation: how a trajectory's step scores become one number, a key of ``scores.AGGREGATIONS``.
        sigmoid: whether a step's score is the sigmoid of its logit; else it is the logit.
        step_rule: arguments of ``StepTokens.from_tokenizer`` by which it was trained; None: nothing is known.
        form: what kind of checkpoint it came from, for people.
        trained_on: the name of the model whose states it was trained on; None: unknown.
        higher_is_better: False: its scores are of risk, and of several candidates the lowest is the best.
        unknown: what its checkpoint does not say and was assumed, by name.
        activation: of the hidden units, one of ``ACTIVATIONS``.
    """

    tap: Tap = Tap()
    aggregation: str = "geometric_mean"
    sigmoid: bool = True
    step_rule: dict[str, Any] | None = None
    form: str = "head"
    trained_on: str | None = None
    higher_is_better: bool = True
    unknown: Mapping[str, str] = MappingProxyType({})
    activation: str = "relu"

    @property
    def hidden_size(self) -> int:
        """Inputs, K: hidden sizes of all layers that the tap names, together."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Hidden units, as the ops count them."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def weights(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(w1 [width, K], b1 [width], w2 [1, width], b2 [1])``, detached: the logit is ``w2 . activation(W1 f + b1) + b2``."""
        raise NotImplementedError

    def parts(self) -> dict[str, "Head"]:
        """The heads that are run, each of one logit; several are gathered by ``aggregation``."""
        return {"": self}

    @property
    def in_progress(self) -> str:
        """The aggregation for steps of a trajectory that goes on, by their scores alone."""
        return "mean" if self.aggregation == "gated" else self.aggregation

    # -- how it is used ----------------------------------------------------------------------------------------------

    def use(self, **settings: Any) -> Self:
        """Set ``tap``, ``aggregation``, ``sigmoid``, ``step_rule``, ``form``, ``trained_on``, ``higher_is_better`` or ``unknown``; returns itself.

        Raises:
            ValueError: an unknown name or aggregation, or a mean by logarithms of scores that are none of probabilities.
        """
        for name, value in settings.items():
            if name not in (*_USE, "tap", "form", "unknown"):
                raise ValueError(f"{name}: no setting of a head; there are tap, {', '.join(_USE)}")
            setattr(self, name, value)
        if self.aggregation not in AGGREGATIONS and self.aggregation != "gated":
            raise ValueError(f"aggregation={self.aggregation!r}; expected one of {', '.join(AGGREGATIONS)}")
        if (self.aggregation == "gated") != (len(self.parts()) > 1):
            raise ValueError(f"aggregation={self.aggregation!r} does not go with a {type(self).__name__}")
        if not self.sigmoid and self.aggregation in FROM_LOGARITHMS:
            raise ValueError(
                f"aggregation={self.aggregation!r} multiplies probabilities, and sigmoid=False says that scores are none; take 'mean'"
            )
        return self

    def metadata(self) -> dict[str, str]:
        """What ``scoring.forms`` reads beside the tensors of a file: how the head is used, as JSON each. Empty for the paper's use, which
        needs no word."""
        said = {name: getattr(self, name) for name in _USE} | {"activation": self.activation} | self.tap.to_dict()
        usual = {name: getattr(type(self), name) for name in _USE} | {"activation": "relu"} | Tap().to_dict()
        if said == usual:
            return {}
        return {name: json.dumps(value) for name, value in said.items() if value is not None}

    def configure(self, said: Mapping[str, str]) -> Self:
        """The opposite of ``metadata``, but for the activation, which the constructor takes; what is not said stays.

        Raises:
            ValueError: see ``use`` and ``Tap``; a value that is no JSON.
        """
        found = {name: json.loads(said[name]) for name in (*_USE, "layers", "norm", "at") if name in said}
        tap = {name: found.pop(name) for name in ("layers", "norm", "at") if name in found}
        return self.use(**found, tap=Tap.from_dict({**self.tap.to_dict(), **tap}))

    def save_pretrained(self, path: str | Path) -> Path:
        """Write the head: to a ``.pt`` or ``.safetensors`` file, or as ``score_module.safetensors`` into a directory. How it is used goes into
        the metadata of a safetensors file; a ``.pt`` file has no place for it.

        Returns:
            The file written.

        Raises:
            OSError: it cannot be written.
        """
        file = Path(path).expanduser()
        if file.suffix not in (".pt", ".safetensors"):
            file = file / NAMES[0]
        folder(file.parent, "path")
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        with replacing(file, what="path") as content:
            if file.suffix == ".pt":
                torch.save(state, content)
            else:
                content.write(safetensors.torch.save(state, self.metadata() or None))
        return file

    # -- whether it fits ---------------------------------------------------------------------------------------------

    def check_finite(self, name: str = "head") -> None:
        """Raise ValueError if a weight is too large for its dtype: every score would be NaN, and hidden states blamed."""
        for key, value in self.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"{name}: {key} has no room in {self.dtype}; use torch.bfloat16 or torch.float32")


    def check_model(self, width: int, dtype: torch.dtype, name: str = "model", tap: Tap | None = None) -> None:
        """Raise ValueError unless this head fits a backbone of which states of ``width`` values and ``dtype`` are read, by ``tap``."""
        for key, value in self.state_dict().items():
            check_dtype(value, f"head: {key}", FLOATS)
            if value.dtype != self.dtype:
                first = next(iter(self.state_dict()))
                raise ValueError(f"head: {key} is {value.dtype} and {first} {self.dtype}; use head.to({dtype})")
        if self.hidden_size != width:
            several = f", of which it reads layers {tap.layers} together" if tap and len(tap.layers) > 1 else ""
            raise ValueError(
                f"head: hidden size {self.hidden_size} differs from the {width} of {name}{several}; "
                "a head works only on the backbone it was trained with"
            )
        if self.dtype != dtype:
            raise ValueError(f"head: dtype {self.dtype} differs from the {dtype} of {name}; use head.to({dtype})")

    def check_trained_on(self, path: str | None) -> None:
        """Warn unless it may have been trained on the model of this name or directory: the last parts are the same, or one says nothing."""
        if self.trained_on and path and Path(self.trained_on).name.lower() != Path(path).name.lower():
            warnings.warn(
                f"head: trained on the states of {self.trained_on}, and this is {path}: of equal size, but its states may mean something else",
                stacklevel=4,
            )


def check_dtype(weight: Tensor, name: str, expected: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless ``weight`` is a plain tensor of one of the ``expected`` dtypes."""
    kind = type(weight).__name__
    if hasattr(type(weight), "__tensor_flatten__"):  # torchao's, DTensor: what their memory holds is their own affair
        raise ValueError(
            f"{name} is a {kind}, no plain tensor; leave the head out of what quantises or shards the model"
        )
    if weight.dtype not in expected or weight.layout != torch.strided:
        odd = weight.dtype if weight.dtype not in expected else weight.layout
        raise ValueError(
            f"{name} is {odd}, no plain float: the head was quantised or cast, and its scales are not known here; give the "
            "head as it was trained, and leave it out when the model is quantised"
        )


class LinearHead(Head):
    """``logit = w . f + b``: a linear probe.

    The ops take it as ``relu(z) - relu(-z)`` of ``z = w . f + b``, two units, which is z to the bit.

    Args:
        hidden_size: K.
        bias: whether it has one.
    """

    form = "linear"

    def __init__(self, hidden_size: int, *, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        layer = nn.Linear(hidden_size, 1, bias=bias, dtype=dtype)
        self.weight, self.bias = layer.weight, layer.bias

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def width(self) -> int:
        return 2

    def forward(self, features: Tensor) -> Tensor:
        """[..., K] -> [..., 1]."""
        return F.linear(features, self.weight, self.bias)

    def weights(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.w1_dtype(dtype)
        w, b = self.weight.detach(), self.bias
        b = w.new_zeros(1) if b is None else b.detach()
        return torch.cat([w, -w]), torch.cat([b, -b]), w.new_tensor([[1.0, -1.0]]), w.new_zeros(1)

    def w1_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of ``weights(dtype)[0]``. ValueError if there is none."""
        if dtype not in (None, self.dtype):
            raise ValueError(f"w1_dtype={dtype}: a linear head has {2 * self.hidden_size} weights, and takes its own {self.dtype} alone")
        return self.dtype


class GatedLinear(Head):
    """A value and a gate of each step, both linear: ``score = sum_i g_i v_i / sum_i g_i`` with ``g_i = sigmoid(gate . f_i + c)``.

    Each step's score is its value, ``value . f_i + b``, or the sigmoid of that. As SWIFT (arXiv 2505.12225), over every token.

    Args:
        hidden_size: K.
    """

    form, aggregation = "gated_linear", "gated"

    def __init__(self, hidden_size: int, *, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.value, self.gate = (LinearHead(hidden_size, bias=bias, dtype=dtype) for _ in range(2))

    @property
    def hidden_size(self) -> int:
        return self.value.hidden_size

    @property
    def width(self) -> int:
        return 2

    def forward(self, features: Tensor) -> Tensor:
        """[..., K] -> [..., 1], the values."""
        return self.value(features)

    def weights(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.value.weights(dtype)

    def parts(self) -> dict[str, Head]:
        value = self.value.use(tap=self.tap, aggregation="mean", sigmoid=self.sigmoid)
        return {"value": value, "gate": self.gate.use(tap=self.tap, aggregation="mean", sigmoid=True)}


Heads = Head | Sequence[Head] | Mapping[str, Head]  # one, or several on one model


def parts_of(head: Heads) -> list[Head]:
    """The heads that are run, each of one logit."""
    return [part for one in named(head).values() for part in one.parts().values()]


def named(head: Heads) -> dict[str, Head]:
    """Heads by their names; those in a row by their numbers.

    Raises:
        ValueError: there is none; TypeError: something else than a head.
    """
    found = head if isinstance(head, Mapping) else {"": head} if isinstance(head, Head) else dict(enumerate(head))
    found = {str(name): one for name, one in found.items()}
    if not found:
        raise ValueError("head: there is none; give one, or several by their names")
    for name, one in found.items():
        if not isinstance(one, Head):
            raise TypeError(f"head {name}: {type(one).__name__} is no reflective.scoring.heads.Head; load it with rf.load_head")
    return found


def together(head: Heads, parts: Sequence[TrajectoryScores]) -> Any:
    """Of the ``parts_of(head)``: the scores of one head, or of several by their names."""
    left, found = list(parts), {}
    for name, one in named(head).items():
        own = [left.pop(0) for _ in one.parts()]
        found[name] = TrajectoryScores.gated(*own) if len(own) > 1 else own[0]
    return found[""] if isinstance(head, Head) else found
