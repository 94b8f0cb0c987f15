"""Verifiers: whether a response answers its question, 1 or 0, or None where that cannot be told."""

import importlib
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any

from .. import compute_metric
from ..tasks import Question
from .answers import WORDS, bare, same_text

_SHOWN = re.compile(r"^\\(?:text|textbf|textit|mathrm|mathbf|underline|mbox)\{([^{}]*)\}$")
_APART = re.compile(r"\d\s+\d")
_BASE = re.compile(r"\d_\{?\d+")
_SIGNED = re.compile(r"-?\d+(?:\.\d+)?")

Verifier = Callable[[str, Question], float | None]
Extract = Callable[[str], str | None]


def verifier(spec: str | Verifier, extract: Extract | None = None) -> Verifier:
    """The verifier that ``spec`` names.

    ===========================  =================================================================================
    ``answer``                   the extracted answer means the same as the right one (``answers.same_answer``)
    ``exact``                    the extracted answer, or without ``extract`` the response, is the right one's text
    ``math``                     math-verify of the last ``\\boxed{}``, or without one of the whole response; None where it
                                 cannot read the right answer or other ways to compare deny its verdict
    ``reasoning-gym:<dataset>``  that dataset gives the extracted answer, or what stands in its ``<answer>`` tags, the
                                 score 1; the question needs its ``entry``
    ``module.path:function``     a function ``(response, question) -> 1, 0 or None``; modules of the working directory
                                 are found too
    a callable                   itself
    ===========================  =================================================================================

    A response without an answer is wrong. What takes longer than math-verify allows, or takes math-verify where it is not
    installed, has no verdict: a wrong label is worse than none.

    ``math`` asks three: math-verify, ``answer`` and the published code's way to compare (``reflective.compute_metric``), each of
    which errs on forms that the others know. Two that call an answer right make it right, and where one alone does there is
    no verdict. Words are compared as text. Without a box it is math-verify that calls an answer right.

    Args:
        extract: the answer within a response, or None: ``ReflectiveModel.answer``.

    Raises:
        ValueError: an unknown ``spec``, one that needs ``extract``, or a module without that function; later, what a function
            returns is no verdict.
        ImportError: its package or module is missing.
    """
    if callable(spec):
        return _checked(spec)
    if spec == "answer":
        if extract is None:
            raise ValueError(
                "verifier='answer': no answer pattern; give `answer` in reflective.json, or another verifier"
            )
        return _comparing(extract, _mean_the_same)
    if spec == "exact":
        return _comparing(extract or str, lambda given, right: given.strip() == right.strip())
    if spec == "math":
        importlib.import_module("math_verify")  # missing, it is to fail here and not in the middle of a run
        return _math
    home, _, name = spec.partition(":")
    if home == "reasoning-gym" and name:
        return _gym(name, extract)
    if name and all(part.isidentifier() for part in (*home.split("."), *name.split("."))):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # last, so that it shadows nothing
        module = importlib.import_module(home)
        try:
            return _checked(attrgetter(name)(module))
        except AttributeError as error:
            raise ValueError(f"verifier={spec!r}: module {home} has no {name}") from error
    raise ValueError(
        f"verifier={spec!r}; expected answer, exact, math, reasoning-gym:<dataset>, module:function or a callable"
    )


def _comparing(extract: Extract, same: Callable[[str, str], bool | None]) -> Verifier:
    def verify(response: str, question: Question) -> float | None:
        given = extract(response)
        if given is None:
            return 0.0
        equal = same(given, question.answer)
        return None if equal is None else float(equal)

    return verify


def _mean_the_same(given: str, right: str) -> bool | None:
    """``same_answer`` in any thread, and None where math-verify is needed but missing, or takes too long."""
    told = same_text(given, right)
    return _equal(f"${bare(given)}$", bare(right)) if told is None else told


def _math(response: str, question: Question) -> float | None:
    if _parsed(question.answer, _seconds()) in (None, []):
        return None
    given = compute_metric.boxed(response)
    if given is None:
        equal = _equal(response, question.answer)
        if equal is False and compute_metric.verdict("aime", response, question.answer):
            return None
        return None if equal is None else float(equal)
    given, right = (_SHOWN.sub(r"\1", text.strip()).removesuffix(".") for text in (given, question.answer))
    box = f"\\boxed{{{given}}}"
    equal = (_equal(box, right), _mean_the_same(given, right))
    if None in equal:
        return None
    if WORDS.fullmatch(bare(given)) or WORDS.fullmatch(bare(right)):  # as products of variables no would be on
        return None if equal == (True, False) else float(equal[1])
    votes = sum(equal) + compute_metric.verdict("aime", box, right)
    if votes == 0:
        return None if _SIGNED.findall(given) == [right] else 0.0  # 5 dollars
    # 1 000 may be read as 1 times 0, and 12_8 as 12 by all of them.
    sure = votes == 3 or not (_APART.search(given) or _APART.search(right))
    return 1.0 if votes > 1 and sure and len(_BASE.findall(given)) == len(_BASE.findall(right)) else None


def _equal(given: str, right: str) -> bool | None:
    """math-verify's judgement of a text and the right answer; None without it, or where it takes too long."""
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException
    except ImportError:
        return None
    seconds = _seconds()
    gold = _parsed(right, seconds)
    if gold is None:
        return None
    try:
        read = parse(given, parsing_timeout=seconds, raise_on_error=True)
        return bool(verify(gold, read, timeout_seconds=seconds, raise_on_error=True))
    except TimeoutException:
        return None
    except Exception:  # noqa: BLE001, it cannot read or compare this: not equal
        return False


@lru_cache(4096)
def _parsed(answer: str, seconds: int | None) -> list[Any] | None:
    """The right answer as math-verify reads it, empty where it cannot, None where it takes too long."""
    from math_verify import parse
    from math_verify.errors import TimeoutException

    try:
        return parse(f"${answer}$", parsing_timeout=seconds, raise_on_error=True)
    except TimeoutException:
        return None
    except Exception:  # noqa: BLE001, it cannot read this
        return []


def _seconds() -> int | None:
    """math-verify's time limit. It is an alarm signal, which only the main thread can set; elsewhere there is none."""
    return 5 if threading.current_thread() is threading.main_thread() else None


def _gym(dataset: str, extract: Extract | None) -> Verifier:
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.utils import extract_answer

    score, extract = get_score_answer_fn(dataset), extract or extract_answer

    def verify(response: str, question: Question) -> float:
        if question.entry is None or "metadata" not in question.entry:
            raise ValueError(f"verifier='reasoning-gym:{dataset}': {question.text!r} has no entry with its metadata")
        given = extract(response)
        if given is None:
            return 0.0
        try:
            return float(score(given, question.entry) == 1)
        except Exception:  # noqa: BLE001, many datasets choke on an answer of another form
            score(question.answer, question.entry)  # raises again where the entry is to blame
            return 0.0

    return verify


def _checked(function: Verifier) -> Verifier:
    def verify(response: str, question: Question) -> float | None:
        verdict = function(response, question)
        if verdict is None or math.isnan(verdict):
            return None
        if verdict not in (0, 1):
            raise ValueError(
                f"verifier {getattr(function, '__name__', function)!s} returned {verdict!r}; expected 1, 0 or None"
            )
        return float(verdict)

    return verify
