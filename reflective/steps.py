"""``reflective.scoring.steps`` by the name that users import."""

from .scoring.steps import StepTokens, token_bytes

__all__ = ["StepTokens", "token_bytes"]
