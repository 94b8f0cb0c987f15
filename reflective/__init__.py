"""Score an LLM's reasoning while the LLM decodes it (the reflective generative form of arXiv 2507.01951)."""

from .backends import backends
from .finished import score
from .loss import sprm_loss
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
]
