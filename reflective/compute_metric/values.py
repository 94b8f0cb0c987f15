"""Whether two answers are equal in value: the second of the two ways to compare."""

import ast
import math
import re
from typing import Any

from .mathematics import arithmetic, is_zero, to_number, value

_CLOSE = 1e-4
_INTERVALS = {"Interval": "[]", "Interval.Ropen": "[)", "Interval.Lopen": "(]", "Interval.open": "()"}


def equal_in_value(given: str, right: str) -> bool:
    """Whether they are close as numbers, or by sympy; part by part where they are lists or intervals."""
    circles = (math.pi, 3.14) if r"\pi" in given or r"\pi" in right else (math.pi,)
    try:
        equal = [_equal(given, right, pi) for pi in circles]
    except Exception:  # noqa: BLE001, of many kinds: there, too, it ends the comparison, wherever it is
        return False
    return any(equal)


def _equal(given: Any, right: Any, pi: float = math.pi) -> bool:
    given, right = _measure(given, pi), _measure(right, pi)
    given = given[:1000] if isinstance(given, str) else given
    texts = isinstance(given, str) and isinstance(right, str)
    if texts and (given.strip().lower() == right.strip().lower() or given.replace(" ", "") == right.replace(" ", "")):
        return True
    numbers = [_comma_number(str(x)) for x in (given, right)]
    if None not in numbers:
        return any(
            math.isclose(x, numbers[0], rel_tol=_CLOSE) for x in (numbers[1] / 100, numbers[1], numbers[1] * 100)
        )
    if not given and given not in (0, False):
        return False
    given, right = _interval(str(given).strip()), str(right).strip()
    bare = [given, right]
    square, round_ = given[:1] == "[" and given[-1:] == "]", given[:1] == "(" and given[-1:] == ")"
    if (square and right[:1] != "(") or (round_ and right[:1] != "["):
        bare = [text.strip("[]()") for text in bare]
    if len({re.sub(r"[{}()]", "", text) for text in bare}) == 1:
        return True
    alike = (
        given and right and given[0] in "([" and given[-1] in ")]" and (given[0], given[-1]) == (right[0], right[-1])
    )
    if alike and _equal_lists(given[1:-1].split(","), right[1:-1].split(",")):
        return True
    if "," in given and "," in right:
        lists = [[part.strip() for part in text.split(",")] for text in (given, right)]
        if len(lists[0]) == len(lists[1]):
            return _equal_lists(*lists)
    point = given.startswith("Point") and right[0] == "(" and right[-1] == ")"
    if point and _equal_lists(given[given.find("(") + 1 : -1].split(","), right[1:-1].split(",")):
        return True
    return _equal_by_sympy(given, right)


def _equal_lists(given: list[str], right: list[str]) -> bool:
    if len(given) != len(right):
        return False
    equal = [_equal(a, b) for a, b in zip(given, right, strict=True)]  # every one: what cannot be read ends it all
    return all(equal)


def _measure(text: Any, pi: float) -> Any:
    r"""Without a dollar or percent sign, the base of a number, and with ``\pi`` as a number.

    Raises:
        ValueError: what stands before ``_`` is no number.
    """
    if re.match(r"\$\d+", text):
        return text[1:]
    if re.match(r"^\d+(\.\d+)?\\?%$", text):
        return text.replace("\\%", "").replace("%", "")
    if "_" in text:
        return int(float(text.partition("_")[0]))
    if r"\pi" not in text:
        return text
    found, at = "", 0
    for match in re.finditer(r"\\pi", text):
        found += text[at : match.start()]
        found, at = found + ("*" if found and found[-1].isdigit() else "1*") + str(pi), match.end()
    found += text[at:]
    try:
        return arithmetic(ast.parse(found.strip(" \t"), mode="eval").body, {"pi": pi})
    except Exception:  # noqa: BLE001, no arithmetic
        return found


def _comma_number(text: str) -> float | None:
    return to_number(text.replace("{,}", "") if "{,}" in text else text.replace(",", ""))


def _interval(text: str) -> str:
    for name, (left, right) in _INTERVALS.items():
        if found := re.match(rf"^{re.escape(name)}\((.*)\)$", text):
            return left + found.group(1) + right
    return text


def _equal_by_sympy(given: str, right: str) -> bool:
    values: list[Any] = []
    for text in (given, right):
        try:
            values.append(value(text))
        except Exception:  # noqa: BLE001, no mathematics. Its LaTeX parser never runs with the requirements as published
            values.append(text)
    for equal in (_differ_by_zero, _are_close):
        try:
            if equal(*values):
                return True
        except Exception:  # noqa: BLE001, S112, the other may know
            continue
    return False


def _differ_by_zero(given: Any, right: Any) -> bool:
    return is_zero(given - right)


def _are_close(given: Any, right: Any) -> bool:
    import sympy

    values = [value(v, loose=True) if isinstance(v, str) else v for v in (given, right)]
    if any(getattr(v, "free_symbols", None) for v in values):
        return False  # no number, which sympy may take minutes to find out: log(e^1024)
    return math.isclose(*map(sympy.N, values), rel_tol=_CLOSE)
