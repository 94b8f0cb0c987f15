"""Records of JSON text: a value a line, one behind the other, or of an array."""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from .record import BUFFER, Record

_SPACES = re.compile(r"[ \t\r\n]*")
_ESCAPE = 16  # characters of the longest thing that is not a string but may be cut: an escaped pair of surrogates


def read_lines(lines: Iterable[bytes], first: int = 1) -> Iterator[Record]:
    """Records of JSON lines. As bytes: JSON strings may hold what str.splitlines takes for line ends, and one bad byte
    spoils one line."""
    return (Record(n, *_parse(line), len(line)) for n, line in enumerate(lines, first) if not is_blank(line))


def read_values(stream: io.TextIOBase) -> Iterator[Record]:
    """Records of JSON values one behind the other, or of an array, read as far as is needed for the next.

    Raises:
        ValueError: it is broken.
    """
    decoder, text, at, number, size = json.JSONDecoder(), "", 0, 0, BUFFER
    array: bool | None = None  # not known yet
    after = False  # a value, within an array

    def more() -> bool:
        nonlocal text, at, size
        new = stream.read(size)
        text, at, size = text[at:] + new, 0, 2 * size
        return bool(new)

    while True:
        at = _SPACES.match(text, at).end()
        if at == len(text):
            if more():
                continue
            if array:
                raise ValueError(f"item {number + 1}: the array has no end")
            return
        if array is None and text[at] == "[":
            array, at = True, at + 1
            continue
        if array and text[at] == "]" and (after or not number):
            at = _SPACES.match(text, at + 1).end()
            if at < len(text) or (more() and _SPACES.fullmatch(text, 0) is None):
                raise ValueError("something stands behind the array")
            return
        if array and after:
            if text[at] != ",":
                raise ValueError(f"item {number}: expected , or ] behind it, found {text[at : at + 20]!r}")
            at, after = at + 1, False
            continue
        array = bool(array)
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos > len(text) - _ESCAPE
            )
            if cut and more():
                continue
            raise ValueError(f"item {number + 1} is no JSON: {getattr(error, 'msg', error)}") from error
        if end == len(text) and more():  # of a number there may be more
            continue
        number, after, size = number + 1, array, BUFFER
        fields, fault = _checked(value, text[at:end])
        yield Record(number, fields, fault, end - at)
        at = end


def is_blank(line: bytes) -> bool:
    """Whether it holds no record, but white space at most."""
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def _parse(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        text = line.decode("utf-8-sig")  # by json.loads it would let halves of surrogate pairs through
        return _checked(json.loads(text), text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError; brackets without end
        return {}, f"{type(error).__name__}: {error}"


def _checked(value: Any, text: str) -> tuple[dict[str, Any], str | None]:
    """Fields and fault of a record, from what ``text`` says."""
    if not isinstance(value, dict):
        return {}, f"expected an object, found {type(value).__name__}"
    if "\\ud" in text.lower():
        text = json.dumps(value, ensure_ascii=False)
        whole = text.encode(errors="replace").decode()
        if whole != text:
            return json.loads(whole), "it holds half a surrogate pair, which is no text"
    return value, None
