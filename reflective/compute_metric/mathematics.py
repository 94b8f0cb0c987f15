"""Mathematics that is not run as Python: what sympy makes of an answer that may hold anything."""

import ast
import builtins
import cmath
import re
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

FUNCTIONS = frozenset((
    "sqrt", "cbrt", "root", "exp", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "atan2", "acot",
    "asec", "acsc", "sinh", "cosh", "tanh", "coth", "floor", "ceiling", "frac", "round", "Abs", "abs", "sign", "Mod", "gcd",
    "lcm", "Max", "Min", "max", "min", "factorial", "factorial2", "binomial", "re", "im", "conjugate", "arg",
))  # fmt: skip
LITERALS = frozenset(("Symbol", "Integer", "Float", "Rational", "Number", "Function"))
_NUMERAL = re.compile(r"[\d.eE+\-/_]+")
CONSTANTS = frozenset(("pi", "E", "I", "oo", "zoo", "nan", "GoldenRatio", "EulerGamma", "Catalan"))
_NODES = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Tuple, ast.List, ast.Call, ast.Name, ast.Constant)
_DIGITS = 100_000


def to_number(text: str) -> float | None:
    """What Python reads as a number, else None."""
    try:
        return float(text)
    except ValueError:
        return None


def value(text: str, *, implicit: bool = False, loose: bool = False) -> Any:
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
    code = parser.stringify_expr(text, {}, known(), parser.standard_transformations + more)
    tree = ast.parse(code.strip(" \t"), mode="eval")
    if _digits(tree.body) > _DIGITS:
        raise OverflowError(text)
    # Only of nodes that _digits lets pass.
    return eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}}, known())


@lru_cache(1)
def known() -> dict[str, Any]:
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
        if node.id not in CONSTANTS:
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
    if not isinstance(function, ast.Name) or function.id not in FUNCTIONS | LITERALS:
        raise ValueError(ast.dump(function))
    if function.id in LITERALS:
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


def is_zero(value: Any) -> bool:
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


def arithmetic(node: ast.expr, names: dict[str, float]) -> Any:
    """The value of numbers and operators, as Python's.

    Raises:
        Exception: of many kinds: anything else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | complex):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Tuple | ast.List):
        return type([] if isinstance(node, ast.List) else ())(arithmetic(part, names) for part in node.elts)
    if isinstance(node, ast.UnaryOp):
        operand = arithmetic(node.operand, names)
        return {ast.USub: lambda: -operand, ast.UAdd: lambda: +operand, ast.Not: lambda: not operand}[type(node.op)]()
    if not isinstance(node, ast.BinOp):
        raise TypeError(ast.dump(node))
    a, b = arithmetic(node.left, names), arithmetic(node.right, names)
    if not isinstance(a, int | float | complex) or not isinstance(b, int | float | complex):
        raise TypeError
    if isinstance(node.op, ast.Pow) and isinstance(a, int) and isinstance(b, int) and b * len(str(a)) > _DIGITS:
        raise OverflowError
    operators = {
        ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b, ast.Div: lambda: a / b,
        ast.FloorDiv: lambda: a // b, ast.Mod: lambda: a % b, ast.Pow: lambda: a**b, ast.BitXor: lambda: a ^ b,
    }  # fmt: skip
    return operators[type(node.op)]()
