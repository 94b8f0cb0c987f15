"""Score an LLM's reasoning while the LLM decodes it (the reflective generative form of arXiv 2507.01951)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.hf.finished import score
    from .engines.hf.scorer import StreamScorer
    from .model import ReflectiveModel
    from .scoring.backend import backends
    from .scoring.loading import load_head
    from .scoring.loss import sprm_loss, sprm_loss_rows
    from .scoring.scores import NonFiniteWarning, TrajectoryScores
    from .scoring.sprm import SPRM
    from .scoring.steps import StepTokens
    from .scoring.taps import Tap

__version__ = "0.1.0"
__all__ = [
    "SPRM",
    "NonFiniteWarning",
    "ReflectiveModel",
    "StepTokens",
    "StreamScorer",
    "Tap",
    "TrajectoryScores",
    "backends",
    "load_head",
    "score",
    "sprm_loss",
    "sprm_loss_rows",
]
_HOME = {
    "SPRM": "scoring.sprm",
    "NonFiniteWarning": "scoring.scores",
    "ReflectiveModel": "model",
    "StepTokens": "scoring.steps",
    "StreamScorer": "engines.hf.scorer",
    "Tap": "scoring.taps",
    "TrajectoryScores": "scoring.scores",
    "backends": "scoring.backend",
    "load_head": "scoring.loading",
    "score": "engines.hf.finished",
    "sprm_loss": "scoring.loss",
    "sprm_loss_rows": "scoring.loss",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and transformers take seconds, ``reflective --help`` should not."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
