"""The SPRM head: a small MLP that scores a reasoning step from one hidden state."""

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..utils.repository import directory
from .heads import ACTIVATIONS, FLOATS, NAMES, Head, check_dtype

KEYS = ("0.weight", "0.bias", "3.weight", "3.bias")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # in files; widened when they are read
_QUANTISED = re.compile("scale|zero|absmax|quant|qweight|packed|SCB")  # in what quantisers call their tensors


class SPRM(nn.Sequential, Head):
    """``Linear(H, 2H) -> ReLU -> Dropout(0.5) -> Linear(2H, 1)``; ``score = sigmoid(logit)``.

    The state dict is that of the published ``score_module.pt`` (keys ``0.weight 0.bias 3.weight 3.bias``), so published
    checkpoints load and ours load there. Source: arXiv 2507.01951, section 3.1.
    """

    form = "sprm"

    def __init__(
        self, hidden_size: int, width: int | None = None, *, dtype: torch.dtype | None = None, activation: str = "relu",
        bias: bool = True,
    ) -> None:  # fmt: skip
        """``width``: hidden units, None: 2H; ``activation``: a key of ``ACTIVATIONS``, ValueError for another; ``bias``: whether
        the layers have one."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}; expected one of {', '.join(map(repr, ACTIVATIONS))}")
        width = width or 2 * hidden_size
        first, second = (nn.Linear(*shape, bias, dtype=dtype) for shape in ((hidden_size, width), (width, 1)))
        super().__init__(first, ACTIVATIONS[activation](), nn.Dropout(0.5), second)
        self.activation = activation

    @property
    def hidden_size(self) -> int:
        return self[0].in_features

    @property
    def width(self) -> int:
        """Hidden units, K."""
        return self[0].out_features

    @property
    def dtype(self) -> torch.dtype:
        return self[0].weight.dtype

    def w1_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of ``weights(dtype)[0]``. ValueError if there is none, or float8 for another activation than ReLU."""
        if dtype not in (None, self.dtype, torch.float8_e4m3fn):
            raise ValueError(f"w1_dtype={dtype}; expected None, the head's {self.dtype} or torch.float8_e4m3fn")
        if dtype == torch.float8_e4m3fn and self.activation != "relu":
            raise ValueError(
                f"w1_dtype={dtype}: first weights of 8 bits have scales that only relu lets through, and this head has "
                f"{self.activation}; give None"
            )
        return dtype or self.dtype

    def weights(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(w1 [K, H], b1 [K], w2 [1, K], b2 [1])``, detached: what every op takes. Zeros for biases that there are none of.

        Args:
            dtype: of ``w1``. None: the head's own. ``torch.float8_e4m3fn``: half of bfloat16's bytes, see ``quantize``; the
                others are float32 then. Its error, and what it does to ranking: ``benchmarks/results/fp8_error.csv``.

        Raises:
            ValueError: another dtype, or weights that cannot be quantised.
        """
        w1, b1, w2, b2 = (t.detach() for layer in (self[0], self[3]) for t in _weight_and_bias(layer))
        if self.w1_dtype(dtype) == torch.float8_e4m3fn:
            return *quantize(w1, b1, w2), b2.float()
        return w1, b1, w2, b2

    @staticmethod
    def found(path: str | Path) -> Path | None:
        """The head's file: ``path`` itself, or the one in that directory; None if there is none."""
        place = Path(path).expanduser()
        return next((f for f in (place, *(place / name for name in NAMES)) if f.is_file()), None)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "SPRM":
        """Load ``score_module.safetensors`` or ``score_module.pt`` from a file, a directory or a repository of the Hub;
        returned in eval mode.

        Pickled code is never run (``weights_only=True``).

        Args:
            path: file, directory or, where there is none of that name, ``ORG/NAME`` on the Hub.
            dtype: None: that of the first weights; float32 for those of 8 bits, which it holds exactly.
            revision, cache_dir, local_files_only: see ``utils.repository.directory``.

        Raises:
            FileNotFoundError: no such file or repository, or one without either; others: see ``utils.repository.directory``.
            ValueError: the file is not a head: unreadable, other keys, shapes that do not fit together, quantised weights or
                others that are no floats, NaN or infinite ones; a ``dtype`` that no head computes in, or that has no room
                for a weight.
        """
        if dtype is not None and dtype not in FLOATS:
            raise ValueError(
                f"dtype={dtype!r}: a head computes in one of {', '.join(map(str, FLOATS))}; for first weights of 8 bits give "
                "what scores w1_dtype=torch.float8_e4m3fn"
            )
        where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        file = cls.found(directory(path, ("score_module.*",), **where))
        if file is None:
            raise FileNotFoundError(f"path={str(path)!r} is no file, nor a directory with one of {', '.join(NAMES)}")
        said: dict[str, str] = {}
        try:
            if file.suffix == ".safetensors":
                state = safetensors.torch.load_file(file)
                with safetensors.safe_open(file, "pt") as opened:
                    said = opened.metadata() or {}
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            raise ValueError(
                f"{file} was refused: it is damaged, or holds pickled code instead of tensors alone. "
                f"Save the head's state dict with SPRM.save_pretrained or torch.save(head.state_dict(), path). ({e})"
            ) from e
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
            raise ValueError(f"{file} cannot be read as a checkpoint (truncated or corrupted?): {e}") from e
        return cls._from_state(state, file, dtype, said).configure(said)

    @classmethod
    def _from_state(cls, state: object, file: Path, dtype: torch.dtype | None, said: Mapping[str, str]) -> "SPRM":
        tensors = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        if not tensors or set(state) != set(KEYS):
            keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            message = f"{file} is not an SPRM head: expected tensors under {list(KEYS)}, found {keys}"
            if isinstance(state, dict) and any(map(_QUANTISED.search, map(str, state))):
                message += "; it looks quantised, so give the head as it was trained"
            raise ValueError(message)
        for key in KEYS:
            check_dtype(state[key], f"{file}: {key}", (*FLOATS, *_FLOAT8))
        w1 = state["0.weight"]
        expected = [tuple(w1.shape), w1.shape[:1], (1, w1.shape[0]), (1,)] if w1.dim() == 2 else None
        if expected is None or [tuple(state[k].shape) for k in KEYS] != [tuple(s) for s in expected]:
            shapes = {k: tuple(state[k].shape) for k in KEYS}
            raise ValueError(f"{file}: shapes do not fit Linear(H, W) -> Linear(W, 1): {shapes}")
        width, hidden_size = w1.shape
        with torch.device("meta"):
            head = cls(hidden_size, width, activation=json.loads(said.get("activation", '"relu"')))
        # Copied: what safetensors reads is mapped from the file, which may be written anew while the head is in use.
        dtype = dtype or (torch.float32 if w1.dtype in _FLOAT8 else w1.dtype)
        loaded = {key: value.detach().to(dtype, copy=True) for key, value in state.items()}
        head.load_state_dict(loaded, assign=True)
        for key, value in state.items():
            if not value.to(torch.promote_types(torch.float32, loaded[key].dtype)).isfinite().all():
                raise ValueError(
                    f"{file}: {key} holds NaN or infinity, and every score would be NaN; train the head anew"
                )
        head.check_finite(str(file))
        return head.requires_grad_(False).eval()


def _weight_and_bias(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def quantize(w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``W1[u] = s_u q_u`` with ``q_u`` rounded to float8_e4m3fn, the scales folded into the rest of the head:

        w2_u relu(s_u q_u . f + b1_u) = (w2_u s_u) relu(q_u . f + b1_u / s_u)

    because ReLU is positively homogeneous; so no kernel needs to know of scales. ``s_u`` is the power of two that puts the
    row's largest magnitude into (224, 448], the upper end of e4m3's range (1 for a row of zeros, 2**-64 at the least, lest
    ``b1_u / s_u`` overflow). A power of two, because scaling by it is exact: nothing but ``q_u`` is rounded.

    Args:
        w1, b1, w2: [K, H], [K], [1, K] of any float dtype. GPU kernels need an H that is a multiple of 16.

    Returns:
        ``(w1 [K, H] float8_e4m3fn, b1 [K] float32, w2 [1, K] float32)``.

    Raises:
        ValueError: a weight is not finite, or not in float32 once it is scaled.
    """
    w1, b1, w2 = w1.float(), b1.float(), w2.float()
    largest = w1.abs().amax(1)
    power = largest / torch.frexp(largest).mantissa / 512  # 448 = 7/8 * 512, and the mantissa lies in [1/2, 1)
    scale = torch.where(largest > 448 * power, 2 * power, power)
    scale = torch.where(largest > 0, scale.clamp_min(2**-64), 1)  # [K]
    b1, w2 = b1 / scale, w2 * scale
    if not all(t.isfinite().all() for t in (w1, b1, w2)):
        raise ValueError("head: a weight is NaN or infinite, or too large to be quantised to float8_e4m3fn")
    return (w1 / scale[:, None]).to(torch.float8_e4m3fn), b1, w2


def geometric_mean(log_sum: float, n_steps: int) -> float:
    """Trajectory score ``exp(log_sum / n_steps)``; 0 without a step (paper section 3.2)."""
    return math.exp(log_sum / n_steps) if n_steps else 0.0
