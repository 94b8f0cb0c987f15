"""Regular expressions that somebody else wrote: a checkpoint's. One that backtracks without end is given up, and no run hangs on it.

``re`` cannot be stopped; ``regex``, which transformers needs too, can, and reads the same expressions.
"""

import warnings
from functools import lru_cache
from typing import Any

import regex

SECONDS = 1.0  # for one search; those in use take microseconds
_given_up: set[str] = set()


@lru_cache(256)
def compiled(pattern: str) -> Any:
    """
    Raises:
        ValueError: it is no regular expression.
    """
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def search(pattern: str, text: str) -> Any:
    """The first match of ``pattern`` in ``text``, or None: also where the search takes longer than ``SECONDS``. Then a warning names the
    pattern, and it is not tried again in this process.

    Raises:
        ValueError: see ``compiled``.
    """
    if pattern in _given_up:
        return None
    try:
        return compiled(pattern).search(text, timeout=SECONDS)
    except TimeoutError:
        _given_up.add(pattern)
        warnings.warn(
            f"the checkpoint's pattern {pattern!r} took more than {SECONDS:g} s on {len(text)} characters, and is not used any more: it "
            "backtracks without end",
            stacklevel=2,
        )
        return None
