"""Score an LLM's reasoning while the LLM decodes it (the reflective generative form of arXiv 2507.01951)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import backends
    from .finished import score
    from .loss import sprm_loss, sprm_loss_rows
    from .model import ReflectiveModel
    from .scorer import StreamScorer
    from .scores import NonFiniteWarning, TrajectoryScores
    from .sprm import SPRM
    from .steps import StepTokens

__version__ = "0.1.0"
__all__ = [
    "SPRM",
    "NonFiniteWarning",
    "ReflectiveModel",
    "StepTokens",
    "StreamScorer",
    "TrajectoryScores",
    "backends",
    "score",
    "sprm_loss",
    "sprm_loss_rows",
]
_HOME = {
    "SPRM": "sprm",
    "NonFiniteWarning": "scores",
    "ReflectiveModel": "model",
    "StepTokens": "steps",
    "StreamScorer": "scorer",
    "TrajectoryScores": "scores",
    "backends": "backend",
    "score": "finished",
    "sprm_loss": "loss",
    "sprm_loss_rows": "loss",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and transformers take seconds, ``reflective --help`` should not."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
