"""Scored text as HTML, for notebooks and pages. Plain values go in; nothing here knows of models, heads or searches."""

from importlib.resources import files

from .document import browse, page, written
from .escape import plain
from .fragments import NOTEBOOK, many, one, table
from .trajectory import Trajectory, aggregation_of, running

__all__ = ["NOTEBOOK", "Trajectory", "aggregation_of", "browse", "many", "one", "page", "plain", "running", "style", "table", "written"]


def style() -> str:
    """The style sheet that every view of scores shares: ``.rf .step`` with ``--score``."""
    return files(__package__).joinpath("scores.css").read_text(encoding="utf-8")
