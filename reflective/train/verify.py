"""Verifiers: whether a response answers its question, 1 or 0, or None where that cannot be told."""

import importlib
import math
import os
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any

from ..strategies.votes import same_answer
from ..tasks import Question

Verifier = Callable[[str, Question], float | None]
Extract = Callable[[str], str | None]


def verifier(spec: str | Verifier, extract: Extract | None = None) -> Verifier:
    """The verifier that ``spec`` names.

    ===========================  =================================================================================
    ``answer``                   the extracted answer means the same as the right one (``votes.same_answer``)
    ``exact``                    the extracted answer, or without ``extract`` the response, is the right one's text
    ``math``                     math-verify of the whole response; None where it cannot read the right answer
    ``reasoning-gym:<dataset>``  that dataset gives the extracted answer, or what stands in its ``<answer>`` tags, the
                                 score 1; the question needs its ``entry``
    ``module.path:function``     a function ``(response, question) -> 1, 0 or None``; modules of the working directory
                                 are found too
    a callable                   itself
    ===========================  =================================================================================

    A response without an answer is wrong.

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
        return _comparing(extract, same_answer)
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


def _comparing(extract: Extract, same: Callable[[str, str], bool]) -> Verifier:
    def verify(response: str, question: Question) -> float:
        given = extract(response)
        return float(given is not None and same(given, question.answer))

    return verify


def _math(response: str, question: Question) -> float | None:
    from math_verify import parse, verify

    right, seconds = _parsed(question.answer, _seconds()), _seconds()
    if not right:
        return None
    return float(verify(right, parse(response, parsing_timeout=seconds), timeout_seconds=seconds))


@lru_cache(4096)
def _parsed(answer: str, seconds: int | None) -> list[Any]:
    from math_verify import parse

    return parse(f"${answer}$", parsing_timeout=seconds)


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
