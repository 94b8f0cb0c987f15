"""Whether two answers are equal as text, or by sympy part by part: the first of the two ways to compare."""

import math
import re

from .mathematics import is_zero, to_number, value

_IN_TEXT = re.compile(r"^\\text\{(.+?)\}$")
_UNITS = (
    "degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week", "month", "year", "foot", "feet",
    "inch", "yard", "liter",
)  # fmt: skip
_BARE = {
    "\\%": "%", "\\$": "$", "$": "", "%": "", " or ": " , ", " and ": " , ",
    "million": "*10^6", "billion": "*10^9", "trillion": "*10^12",
}  # fmt: skip
_SPELLED = {"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"}
_FRACTION = re.compile(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$")
_GROUPED = re.compile(r"(\d),(\d\d\d)($|\D)")
_NOT_TRIED = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+")


def equal_as_text(given: str, right: str) -> bool:
    """Whether one of two normal forms is the same, or every part of the second one is."""
    if _tidy(given) == _tidy(right):
        return True
    right, given = _plain(right), _plain(given)
    if right == given or not given:
        return right == given
    parts, others = _parts(right), _parts(given)
    if len(parts) != len(others) or (len(parts) > 1 and (right[0], right[-1]) != (given[0], given[-1])):
        return False
    return all(map(_same_part, others, parts))


def _same_part(given: str, right: str) -> bool:
    if _FRACTION.search(right) and _FRACTION.search(given):
        return right == given  # 2/4 is not 1/2
    if _is_whole(right) != _is_whole(given):
        return False
    whole = f"({right})-({given})"
    letters = {c for c in whole.replace("sqrt", "").replace("frac", "") if c.isalpha()}
    if len(letters) > 2 or _NOT_TRIED.search(whole):
        return False
    try:
        return is_zero(value(whole.replace("^", "**"), implicit=True))
    except Exception:  # noqa: BLE001, no mathematics
        return False


def _tidy(answer: str) -> str:
    """The first normal form, for LaTeX; the text itself where it has no such form."""
    answer = answer.strip()
    if found := _IN_TEXT.search(answer):
        answer = found.group(1).strip()
    text = answer.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for mark in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$"):
        text = text.replace(mark, "")
    text, unit, rest = text.partition(r"\text{ ")
    if unit and r"\text{ " in rest:
        return answer
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    if text.count("=") == 1 and text.index("=") <= 2:
        text = text.partition("=")[2]
    if text.endswith(r"\sqrt") or r"\sqrt\sqrt" in text:
        return answer
    text = re.sub(r"(?s)\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    try:
        text = _with_braces(text)
    except IndexError:
        return answer
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"\A(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)\Z", r"\\frac{\1}{\2}", text)


def _with_braces(text: str) -> str:
    r"""``\frac12`` as ``\frac{1}{2}``.

    Raises:
        IndexError: nothing follows ``\frac``.
    """
    head, *pieces = text.split(r"\frac")
    for piece in pieces:
        head += r"\frac"
        if piece[0] == "{":
            head += piece
        elif len(piece) < 2:
            return text
        else:
            above, below, rest = piece[0], piece[1], piece[2:]
            head += f"{{{above}}}" + (below + rest if below == "{" else f"{{{below}}}{rest}")
    return head


def _plain(answer: str) -> str:
    """The second normal form, for words, units and what Python reads as a number."""
    if found := _IN_TEXT.search(answer):
        answer = found.group(1)
    for old, new in _BARE.items():
        answer = answer.replace(old, new)
    for unit in _UNITS:
        answer = re.sub(unit + r"(es)?(s)? *(\^[0-9]+)?", "", answer)
    answer = re.sub(r"\^ *\\circ", "", answer)
    if answer.startswith("{") and answer.endswith("}"):
        answer = answer[1:-1]
    answer = re.sub(r",\\! *", "", answer)
    number = to_number(answer)
    if number is not None and _near_whole(number):
        answer = str(round(number))
    if "\\" in answer:
        answer = _without_latex(answer)
    answer = re.sub("- *", "-", answer)
    answer = re.sub("([0-9]) +([0-9])", r"\1+\2", answer).lower()  # 7 3/4
    return str(int(float(answer.replace(",", "")))) if _is_whole(answer) else answer


def _without_latex(text: str) -> str:
    from pylatexenc.latex2text import LatexNodes2Text

    spaced = text.replace(r"\tfrac", r"\frac").replace(r"\dfrac", r"\frac").replace(r"\frac", r" \frac")
    try:
        spaced = LatexNodes2Text().latex_to_text(spaced)
    except Exception:  # noqa: BLE001, not LaTeX
        return text
    for old, new in _SPELLED.items():
        spaced = spaced.replace(old, new)
    return spaced.strip()


def _near_whole(number: float) -> bool:
    return math.isfinite(number) and abs(number - round(number)) <= 1e-7


def _is_whole(text: str) -> bool:
    number = to_number(_ungrouped(text))
    return number is not None and _near_whole(number)


def _ungrouped(text: str) -> str:
    """``1,234,567`` without its commas, which are not those of a tuple."""
    while (shorter := _GROUPED.sub(r"\1\2\3", text)) != text:
        text = shorter
    return text


def _parts(text: str) -> list[str]:
    text = _ungrouped(text)
    inside = text[1:-1]
    if len(text) > 2 and text[0] in "()[]" and text[-1] in "()[]" and not set("()[]") & set(inside):
        return [part.strip() for part in inside.split(",")]
    return [text] if text else []
