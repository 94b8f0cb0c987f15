"""Scored text as HTML, for notebooks and pages."""

from importlib.resources import files


def style() -> str:
    """The style sheet that every view of scores shares: ``.rf .step`` with ``--score``."""
    return files(__package__).joinpath("scores.css").read_text(encoding="utf-8")
