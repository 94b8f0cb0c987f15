r"""The verdicts of the published ``compute_metric.py`` (MetaStone-AI/MetaStone-S1, commit f09b983), task by task.

==========  ==============================================================================================================
``aime*``   reads the last ``\boxed{}``, or without one the end of the text, of prompt and response together, and compares it
            by two normal forms of text, as numbers (1 in 10,000 off, or 100 times too much or too little, is equal), and by
            sympy. The text must contain ``\box``; the usual prompt does
``ceval``   reads the first ``答案: X`` or ``answer: X``, X one of A to D, in prompt and response together
==========  ==============================================================================================================

Oddities are kept, since they decide what it prints; ``tests/compute_metric.jsonl`` holds verdicts that the script itself gave.
Three things are not: an answer is never run as Python (there ``eval`` sees it; here all but arithmetic and functions of
mathematics is no mathematics), powers and factorials of more digits than anyone prints are not computed, and nothing depends on
the machine's speed (there a comparison of more than a second is unequal).
"""

import ast
import builtins
import cmath
import math
import re
import types
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

TASKS = ("aime", "ceval")
_PROGRAMS = re.compile(r"(?i)live[-_ ]?code[-_ ]?bench|lcb|human[-_]?eval|mbpp")
_NAMED = {"ceval": re.compile(r"(?i)c-?eval"), "aime": re.compile(r"(?i)aime")}
_CHOICE = re.compile(r"(?i)(?:答案|answer)\s*[:：]\s*([A-D])")
_LETTER = re.compile(r"[A-Da-d]")
_WHOLE = re.compile(r"\d{1,3}")


def task(name: str) -> str:
    """The member of ``TASKS`` that its ``--task name`` means.

    Raises:
        ValueError: another name; a task whose answers are programs.
    """
    found = next((known for known in TASKS if name == known or name.startswith("aime") and known == "aime"), None)
    if found is None:
        refuse_programs(name)
        raise ValueError(
            f"task={name!r}; compute_metric.py knows ceval, and aime24, aime25 and whatever begins with aime"
        )
    return found


def find_task(path: str | Path, answers: Iterable[str]) -> str | None:
    """The task of a file: from its name, or else from its right answers, or None where these are of another form."""
    named = [found for found, pattern in _NAMED.items() if pattern.search(Path(path).name)]
    if len(named) == 1:
        return named[0]
    if not (answers := [*answers]):
        return None
    if all(map(_LETTER.fullmatch, answers)):
        return "ceval"
    return "aime" if all(map(_WHOLE.fullmatch, answers)) else None


def refuse_programs(name: str) -> None:
    """Where answers are programs nothing here can judge them.

    Raises:
        ValueError: ``name`` is that of such a task, or of its file.
    """
    if _PROGRAMS.search(name):
        raise ValueError(
            f"{name}: its answers are programs, which are not run here, nor by the published compute_metric.py; run the "
            "benchmark's own checker in a sandbox, put its verdicts into a column, and give outcome=COLUMN"
        )


def verdict(task: str, text: str, right: str) -> bool:
    """Whether the published code calls ``text``, prompt and response, right."""
    if task == "ceval":
        found = _CHOICE.search(text)
        return (found.group(1).lower() if found else "") == right.strip().lower()
    return _same(_extracted(text), right, r"\box" in text)


@lru_cache(4096)  # candidates of a question give few different answers
def _same(given: str, right: str, boxed: bool) -> bool:
    return _graded(given, right) or (boxed and _same_value(given, right))


def answer(task: str, response: str) -> str | None:
    """What the task reads in a response alone, for votes."""
    if task == "ceval":
        found = _CHOICE.search(response)
        return found and found.group(1).upper()
    return _extracted(response) if boxed(response) else None


# -- reading an answer ---------------------------------------------------------------------------------------------------

_LEADS = ("be ", "is ", "are ", "=", ": ", "get ", "be\n", "is\n", "are\n", ":\n", "get\n")


def boxed(text: str) -> str | None:
    r"""What stands in the braces from the last ``\boxed`` on, or else from the last ``\fbox``; None where they do not end."""
    begin = text.rfind(r"\boxed")
    if begin < 0:
        begin = text.rfind(r"\fbox")
    if begin < 0:
        return None
    depth, first = 0, None
    for i in range(begin, len(text)):
        if text[i] == "{":
            depth, first = depth + 1, i if first is None else first
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return None if first is None else text[first + 1 : i].strip()
    return None


def _extracted(text: str) -> str:
    text = boxed(text) or text
    sentence = text.lower().rfind(". ")
    if sentence >= 0:
        text = text[:sentence].strip()
    for lead in _LEADS:
        at = text.lower().rfind(lead)
        if at >= 0:
            text = text[at + len(lead) :].strip()
    return text


# -- equal as text, or by sympy part by part -----------------------------------------------------------------------------

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


def _graded(given: str, right: str) -> bool:
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
        return _is_zero(_value(whole.replace("^", "**"), implicit=True))
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
    number = _number(answer)
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


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _near_whole(number: float) -> bool:
    return math.isfinite(number) and abs(number - round(number)) <= 1e-7


def _is_whole(text: str) -> bool:
    number = _number(_ungrouped(text))
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


# -- equal in value ------------------------------------------------------------------------------------------------------

_CLOSE = 1e-4
_INTERVALS = {"Interval": "[]", "Interval.Ropen": "[)", "Interval.Lopen": "(]", "Interval.open": "()"}


def _same_value(given: str, right: str) -> bool:
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
        return _arithmetic(ast.parse(found.strip(" \t"), mode="eval").body, {"pi": pi})
    except Exception:  # noqa: BLE001, no arithmetic
        return found


def _comma_number(text: str) -> float | None:
    return _number(text.replace("{,}", "") if "{,}" in text else text.replace(",", ""))


def _interval(text: str) -> str:
    for name, (left, right) in _INTERVALS.items():
        if found := re.match(rf"^{re.escape(name)}\((.*)\)$", text):
            return left + found.group(1) + right
    return text


def _equal_by_sympy(given: str, right: str) -> bool:
    values: list[Any] = []
    for text in (given, right):
        try:
            values.append(_value(text))
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
    return _is_zero(given - right)


def _are_close(given: Any, right: Any) -> bool:
    import sympy

    values = [_value(v, loose=True) if isinstance(v, str) else v for v in (given, right)]
    if any(getattr(v, "free_symbols", None) for v in values):
        return False  # no number, which sympy may take minutes to find out: log(e^1024)
    return math.isclose(*map(sympy.N, values), rel_tol=_CLOSE)


# -- mathematics that is not run as Python -------------------------------------------------------------------------------

_FUNCTIONS = frozenset((
    "sqrt", "cbrt", "root", "exp", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "atan2", "acot",
    "asec", "acsc", "sinh", "cosh", "tanh", "coth", "floor", "ceiling", "frac", "round", "Abs", "abs", "sign", "Mod", "gcd",
    "lcm", "Max", "Min", "max", "min", "factorial", "factorial2", "binomial", "re", "im", "conjugate", "arg",
))  # fmt: skip
_LITERALS = frozenset(("Symbol", "Integer", "Float", "Rational", "Number", "Function"))
_NUMERAL = re.compile(r"[\d.eE+\-/_]+")
_CONSTANTS = frozenset(("pi", "E", "I", "oo", "zoo", "nan", "GoldenRatio", "EulerGamma", "Catalan"))
_NODES = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Tuple, ast.List, ast.Call, ast.Name, ast.Constant)
_DIGITS = 100_000


def _value(text: str, *, implicit: bool = False, loose: bool = False) -> Any:
    """What sympy makes of ``text``.

    Args:
        implicit: ``2x`` is a product. loose: ``^`` is a power and decimals are fractions, as for ``sympify``.

    Raises:
        Exception: of many kinds: it is no mathematics, not harmless, or too large.
    """
    from sympy.parsing import sympy_parser as parser

    more: tuple[Callable[..., Any], ...] = ()
    if implicit:
        more = (parser.implicit_multiplication_application,)
    elif loose:
        text, more = text.replace("\n", ""), (parser.rationalize, parser.convert_xor)
    code = parser.stringify_expr(text, {}, _known(), parser.standard_transformations + more)
    tree = ast.parse(code.strip(" \t"), mode="eval")
    if _digits(tree.body) > _DIGITS:
        raise OverflowError(text)
    # Only of nodes that _digits lets pass.
    return eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}}, _known())


@lru_cache(1)
def _known() -> dict[str, Any]:
    """Names that sympy's parser does not take for symbols."""
    import sympy

    known = {name: value for name, value in vars(builtins).items() if isinstance(value, types.BuiltinFunctionType)}
    return known | {name: getattr(sympy, name) for name in sympy.__all__} | {"max": sympy.Max, "min": sympy.Min}


def _digits(node: ast.expr) -> float:
    """At most so many decimal digits has the value.

    Raises:
        TypeError, ValueError: of a node that is more than arithmetic and functions of mathematics.
    """
    if not isinstance(node, _NODES):
        raise TypeError(ast.dump(node))
    if isinstance(node, ast.Name):
        if node.id not in _CONSTANTS:
            raise ValueError(node.id)
        return 1
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str | bytes) or node.value is Ellipsis:
            raise ValueError(node.value)
        return len(str(node.value))
    if isinstance(node, ast.Call):
        return _digits_of_call(node)
    parts = [_digits(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.Pow):
            return parts[0] * 10 ** min(parts[1], 9) if parts[1] > 1 else parts[0] * 10
        if isinstance(node.op, ast.LShift | ast.RShift | ast.MatMult):
            raise TypeError(ast.dump(node.op))
        return parts[0] + parts[1]
    return max(parts, default=1)


def _digits_of_call(node: ast.Call) -> float:
    function = node.func
    if node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
        raise ValueError(ast.dump(node))
    if isinstance(function, ast.Call):  # Function('f')(x)
        if not isinstance(function.func, ast.Name) or function.func.id != "Function":
            raise ValueError(ast.dump(node))
        return _digits(function) + sum(map(_digits, node.args))
    if not isinstance(function, ast.Name) or function.id not in _FUNCTIONS | _LITERALS:
        raise ValueError(ast.dump(function))
    if function.id in _LITERALS:
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        others = [a for a in node.args if not (isinstance(a, ast.Constant) and isinstance(a.value, str))]
        exponents = []
        if function.id not in ("Symbol", "Function"):  # Number('...') evaluates what is no numeral
            if not all(map(_NUMERAL.fullmatch, texts)):
                raise ValueError(texts)
            exponents = [abs(int(e)) for text in texts for e in re.findall(r"(?i)e([-+]?\d{1,9})", text)]
        return sum(map(len, texts)) + sum(exponents) + sum(map(_digits, others))
    parts = sum(map(_digits, node.args))
    # A factorial has a few times as many digits as its argument is large.
    return (
        10 ** min(parts, 9) if function.id in ("factorial", "factorial2", "binomial", "exp", "sinh", "cosh") else parts
    )


def _is_zero(value: Any) -> bool:
    """Whether sympy simplifies it to 0. It is asked where a number, or the value at a point, does not deny it."""
    import sympy

    if isinstance(value, sympy.Expr):
        points = dict(
            zip(sorted(value.free_symbols, key=str), map(sympy.Rational, ("0.7", "1.3", "2.1", "2.9")), strict=False)
        )
        try:
            there = complex(value.xreplace(points).evalf(20))
        except Exception:  # noqa: BLE001, no number there
            there = 0
        if cmath.isfinite(there) and abs(there) > 1e-6:
            return False
    return bool(sympy.simplify(value) == 0)


def _arithmetic(node: ast.expr, names: dict[str, float]) -> Any:
    """The value of numbers and operators, as Python's.

    Raises:
        Exception: of many kinds: anything else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | complex):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Tuple | ast.List):
        return type([] if isinstance(node, ast.List) else ())(_arithmetic(part, names) for part in node.elts)
    if isinstance(node, ast.UnaryOp):
        operand = _arithmetic(node.operand, names)
        return {ast.USub: lambda: -operand, ast.UAdd: lambda: +operand, ast.Not: lambda: not operand}[type(node.op)]()
    if not isinstance(node, ast.BinOp):
        raise TypeError(ast.dump(node))
    a, b = _arithmetic(node.left, names), _arithmetic(node.right, names)
    if not isinstance(a, int | float | complex) or not isinstance(b, int | float | complex):
        raise TypeError
    if isinstance(node.op, ast.Pow) and isinstance(a, int) and isinstance(b, int) and b * len(str(a)) > _DIGITS:
        raise OverflowError
    operators = {
        ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b, ast.Div: lambda: a / b,
        ast.FloorDiv: lambda: a // b, ast.Mod: lambda: a % b, ast.Pow: lambda: a**b, ast.BitXor: lambda: a ^ b,
    }  # fmt: skip
    return operators[type(node.op)]()
