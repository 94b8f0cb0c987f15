"""Text as data: in HTML, in its attributes, and in JSON within a script element.

What a model has written may hold anything. Nothing of it is markup here, none of it is lost, and none of it can change how what stands
around it is read: control characters are shown as their pictures, as HTML knows no NUL.
"""

import html
import json
from typing import Any

# Pictures of control characters, but for tab and line feed. A carriage return would become a line feed in HTML.
_PICTURES = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)} | {0x7F: 0x2421}
_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def plain(text: str) -> str:
    """``text`` as every encoding can hold it: U+FFFD for half a surrogate pair, pictures for control characters; CR LF as one line end."""
    text = text.replace("\r\n", "\n").translate(_PICTURES)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # two halves that belong together are whole again
    return text


def text(value: object) -> str:
    """For HTML, as text or within a quoted attribute."""
    return html.escape(plain(str(value)))


def in_script(value: Any) -> str:
    """JSON that can stand within a script element: no ``<``, so neither its end nor a comment. Numbers are finite, as JSON has them."""
    found = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escaped in _IN_SCRIPT.items():  # within strings alone: JSON has none of them elsewhere
        found = found.replace(character, escaped)
    return found
