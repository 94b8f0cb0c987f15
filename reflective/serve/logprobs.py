"""Log-probabilities of tokens as OpenAI's two routes write them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..engines.base import Chance
from ..model import ReflectiveModel
from ..scoring.vocabulary import token_bytes
from .text import Incoming

LEAST = -9999.0  # in place of minus infinity, for which JSON has no number: as OpenAI and vLLM


class Spelling:
    """What every token of a model adds to a text."""

    def __init__(self, model: ReflectiveModel) -> None:
        self.decode, self._texts = model.decode, token_bytes(model.tokenizer)

    def bytes(self, token: int, *, first: bool = False, special: bool = False) -> bytes:
        """``first``: of a text, where some tokenizers leave spaces out; ``special``: with the texts of special tokens."""
        text = self._texts[token] if token < len(self._texts) else None
        if text is None:
            return self.decode([token], special=True).encode(errors="surrogatepass") if special else b""
        if first and text.startswith(b" "):
            alone = self.decode([token], special=special).encode(errors="surrogatepass")
            return alone if alone.lstrip(b" ") == text.lstrip(b" ") else text
        return text

    def name(self, token: int, text: bytes, mark: str = "") -> str:
        """Of a token whose text is ``text``: that or, of part of a character, its bytes behind ``mark``, so that no two parts
        are called the same; a special token's own."""
        try:
            return text.decode() or self.decode([token], special=True)
        except UnicodeDecodeError:
            return mark + "".join(f"\\x{byte:02x}" for byte in text)


class Told:
    """A text's tokens and their chances, told as the text comes.

    Args:
        write: one of the two ways, ``chat`` or ``completion``.
        special: whether the text shows special tokens.
        begin: characters in front of it.
    """

    def __init__(
        self, write: "Callable[[Told, list[tuple[Chance, int]]], dict[str, Any]]", spelling: Spelling,
        *, special: bool = False, begin: int = 0,
    ) -> None:  # fmt: skip
        self.write, self.spelling, self.special, self.begin = write, spelling, special, begin
        self.count = 0  # of tokens that were fed
        self._text = Incoming(lambda tokens: spelling.decode(tokens, special=special))
        self._waiting: list[tuple[Chance, int]] = []  # each with the place at which it begins
        self._first = True
        self._ended = False

    def feed(self, chances: Sequence[Chance], *, ending: bool = False) -> None:
        """Further tokens; ``ending``: which end the text and are no part of it."""
        for chance in chances:
            self._waiting.append((chance, -1 if ending else self._text.length))
            if not ending:
                self._text.feed([chance.token])
        self.count += len(chances)

    def take(self, length: int | None) -> dict[str, Any] | None:
        """Those that begin within the first ``length`` characters of the text, None: all, and were not taken before."""
        count = len(self._waiting)
        if length is not None:
            count = next((i for i, (_, place) in enumerate(self._waiting) if not 0 <= place < length), count)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return self.write(self, taken) if taken else None

    def texts(self, chance: Chance, place: int) -> tuple[bytes, list[tuple[int, bytes, float]]]:
        """What the token adds to the text, and what each of the likeliest would have added."""
        first, ending = self._first, place < 0
        own = b"" if ending else self.spelling.bytes(chance.token, first=first, special=self.special)
        self._first = first and not self.spelling.bytes(chance.token, special=self.special)
        return own, [(t, self.spelling.bytes(t, first=first, special=self.special), p) for t, p in chance.top]


def chat(told: Told, taken: list[tuple[Chance, int]]) -> dict[str, Any]:
    content = []
    for chance, place in taken:
        own, top = told.texts(chance, place)
        entries = [_entry(told.spelling, t, text, p) for t, text, p in [(chance.token, own, chance.log_prob), *top]]
        content.append({**entries[0], "top_logprobs": entries[1:]})
    return {"content": content, "refusal": None}


def _entry(spelling: Spelling, token: int, text: bytes, log_prob: float) -> dict[str, Any]:
    return {"token": spelling.name(token, text), "logprob": _number(log_prob), "bytes": list(text)}


def completion(told: Told, taken: list[tuple[Chance, int]]) -> dict[str, Any]:
    """The token that came is among the likeliest, also where there are then more than were asked for."""
    said: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chance, place in taken:
        own, top = told.texts(chance, place)
        name, number = told.spelling.name(chance.token, own, "bytes:"), _number(chance.log_prob)
        likely: dict[str, float | None] = {}
        for token, text, p in top:  # of two that are called the same, the likelier
            likely.setdefault(name if token == chance.token else told.spelling.name(token, text, "bytes:"), _number(p))
        likely.setdefault(name, number)
        said["tokens"].append(name)
        said["token_logprobs"].append(number)
        said["top_logprobs"].append(None if chance.log_prob is None else likely)
        said["text_offset"].append(told.begin + (place if place >= 0 else told._text.length))
    return said


def _number(log_prob: float | None) -> float | None:
    return None if log_prob is None or math.isnan(log_prob) else max(log_prob, LEAST)
