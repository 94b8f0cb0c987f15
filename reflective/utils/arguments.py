"""Arguments: checked, and named in the errors that refuse them."""

from numbers import Integral, Real
from typing import Any


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}")


def whole(name: str, value: Any, least: int) -> None:
    """ValueError unless ``value`` is an integer, ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r}: expected an integer")  # noqa: TRY004
    if value < least:
        raise ValueError(
            f"{name}={value} must be at least {least}" if least else f"{name}={value} must not be negative"
        )


def real(value: Any) -> bool:
    """Whether it is a number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def brief(value: Any) -> str:
    """``value`` for an error message."""
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:76]} ..."


def check_text(name: str, text: Any) -> None:
    """ValueError unless tokenizers take it."""
    if not isinstance(text, str):
        raise ValueError(f"{name}={brief(text)}: expected a text")  # noqa: TRY004
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start} is {text[error.start]!r}, half of a surrogate pair, which no tokenizer knows; "
            "read the text as UTF-8, or replace it"
        ) from error
