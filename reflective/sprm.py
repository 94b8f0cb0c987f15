"""The SPRM head: a small MLP that scores a reasoning step from one hidden state."""

import math
import pickle
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

NAMES = ("score_module.safetensors", "score_module.pt")
_KEYS = ("0.weight", "0.bias", "3.weight", "3.bias")


class SPRM(nn.Sequential):
    """``Linear(H, 2H) -> ReLU -> Dropout(0.5) -> Linear(2H, 1)``; ``score = sigmoid(logit)``.

    The state dict is that of the published ``score_module.pt`` (keys ``0.weight 0.bias 3.weight 3.bias``), so published
    checkpoints load and ours load there. Source: arXiv 2507.01951, section 3.1.
    """

    def __init__(self, hidden_size: int, width: int | None = None, *, dtype: torch.dtype | None = None) -> None:
        width = width or 2 * hidden_size
        super().__init__(
            nn.Linear(hidden_size, width, dtype=dtype), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 1, dtype=dtype)
        )

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

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(w1 [2H, H], b1 [2H], w2 [1, 2H], b2 [1])``, detached: what every op takes."""
        return (
            self[0].weight.detach(), self[0].bias.detach(), self[3].weight.detach(), self[3].bias.detach()
        )  # fmt: skip

    @staticmethod
    def found(path: str | Path) -> Path | None:
        """The head's file: ``path`` itself, or the one in that directory; None if there is none."""
        place = Path(path).expanduser()
        return next((f for f in (place, *(place / name for name in NAMES)) if f.is_file()), None)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype | None = None) -> "SPRM":
        """Load ``score_module.safetensors`` or ``score_module.pt`` from a file or a directory; returned in eval mode.

        Pickled code is never run (``weights_only=True``).

        Raises:
            FileNotFoundError: no such file, or a directory without either.
            ValueError: the file is not a head: unreadable, other keys, shapes that do not fit together.
        """
        file = cls.found(path)
        if file is None:
            raise FileNotFoundError(f"path={str(path)!r} is no file, nor a directory with one of {', '.join(NAMES)}")
        try:
            if file.suffix == ".safetensors":
                state = safetensors.torch.load_file(file)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            raise ValueError(
                f"{file} was refused: it is damaged, or holds pickled code instead of tensors alone. "
                f"Save the head's state dict with SPRM.save_pretrained or torch.save(head.state_dict(), path). ({e})"
            ) from e
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
            raise ValueError(f"{file} cannot be read as a checkpoint (truncated or corrupted?): {e}") from e
        return cls._from_state(state, file, dtype)

    @classmethod
    def _from_state(cls, state: object, file: Path, dtype: torch.dtype | None) -> "SPRM":
        tensors = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        if not tensors or set(state) != set(_KEYS):
            keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"{file} is not an SPRM head: expected tensors under {list(_KEYS)}, found {keys}")
        w1 = state["0.weight"]
        expected = [tuple(w1.shape), w1.shape[:1], (1, w1.shape[0]), (1,)] if w1.dim() == 2 else None
        if expected is None or [tuple(state[k].shape) for k in _KEYS] != [tuple(s) for s in expected]:
            shapes = {k: tuple(state[k].shape) for k in _KEYS}
            raise ValueError(f"{file}: shapes do not fit Linear(H, W) -> Linear(W, 1): {shapes}")
        width, hidden_size = w1.shape
        with torch.device("meta"):
            head = cls(hidden_size, width)
        head.load_state_dict(state, assign=True)
        return head.to(dtype or w1.dtype).requires_grad_(False).eval()

    def save_pretrained(self, path: str | Path) -> Path:
        """Write the head: to a ``.pt`` or ``.safetensors`` file, or as ``score_module.safetensors`` into a directory.

        Returns:
            The file written.
        """
        file = Path(path).expanduser()
        if file.suffix not in (".pt", ".safetensors"):
            file = file / NAMES[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        if file.suffix == ".pt":
            torch.save(state, file)
        else:
            safetensors.torch.save_file(state, file)
        return file

    def check_model(self, hidden_size: int, dtype: torch.dtype, name: str = "model") -> None:
        """Raise ValueError unless this head fits a backbone of ``hidden_size`` and ``dtype``."""
        if self.hidden_size != hidden_size:
            raise ValueError(
                f"head: hidden size {self.hidden_size} differs from the {hidden_size} of {name}; "
                "a head works only on the backbone it was trained with"
            )
        if self.dtype != dtype:
            raise ValueError(f"head: dtype {self.dtype} differs from the {dtype} of {name}; use head.to({dtype})")


def geometric_mean(log_sum: float, n_steps: int) -> float:
    """Trajectory score ``exp(log_sum / n_steps)``; 0 without a step (paper section 3.2)."""
    return math.exp(log_sum / n_steps) if n_steps else 0.0
