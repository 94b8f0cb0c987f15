"""The text of a response while its tokens come."""

import copy
from collections.abc import Callable, Sequence

from typing_extensions import Self

_UNFINISHED = "\ufffd"  # what a decoder writes for the bytes of a character that is not complete


def before(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the ``stop`` texts in it, or all of it."""
    return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]


class Incoming:
    """Hands on a response in pieces that, joined, are ``before(its text, stop)``.

    Held back until more is known: a character of which bytes are missing, and an end that may become a stop text.

    Args:
        decode: text of tokens; that of a token may depend on the one before it.
        stop: texts, none of them empty.

    Attributes:
        sent: characters that were handed on.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._known: list[int] = []  # the tokens of the piece before, whose text is known
        self._new: list[int] = []
        self._pending = ""
        self.sent = 0

    def feed(self, tokens: Sequence[int]) -> str:
        """The piece that becomes certain with these further tokens."""
        self._new += tokens
        text = self._decode(self._known + self._new)
        if not tokens or text.endswith(_UNFINISHED):
            return ""
        self._pending += text[len(self._decode(self._known)) :]
        self._known, self._new = self._new, []
        piece = before(self._pending, self._stop)
        if len(piece) == len(self._pending):
            piece = piece[: len(piece) - self._held(piece)]
        self._pending = self._pending[len(piece) :]
        self.sent += len(piece)
        return piece

    def copy(self) -> Self:
        """Another one that goes on from here."""
        other = copy.copy(self)
        other._new = list(self._new)  # the one list that is changed in place
        return other

    @property
    def length(self) -> int:
        """Characters so far, those that are held back too, but for one of which bytes are missing."""
        new = self._decode(self._known + self._new)[len(self._decode(self._known)) :] if self._new else ""
        return self.sent + len(self._pending) + len(new.rstrip(_UNFINISHED))

    def finish(self, text: str) -> str:
        """The last piece of the response, whose whole text this is."""
        return before(text, self._stop)[self.sent :]

    def _held(self, text: str) -> int:
        """Characters at the end of ``text`` with which a stop text begins."""
        return max((k for s in self._stop for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
