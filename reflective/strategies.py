"""``reflective.search.strategies`` by the name that users import."""

from typing import Any

from .search import strategies as _strategies
from .search.strategies import ANSWER, HOLD, KEEP, NAMES, STOP, Step, Strategy, by_name

__all__ = ["ANSWER", "HOLD", "KEEP", "NAMES", "STOP", "Step", "Strategy", "by_name"]


def __getattr__(name: str) -> Any:
    """A strategy's class, imported on first use."""
    return getattr(_strategies, name)
