"""What makes two answers equal."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?\d{1,40}(?:\.\d{1,40}|/0{0,40}[1-9]\d{0,39})?")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")  # and not 1,2
_LETTER = re.compile("[A-Za-z]")
WORDS = re.compile(r"[^\W\d_]{2,}(?:\s+[^\W\d_]+)*")


def same_answer(given: str, right: str) -> bool:
    """Whether two answers mean the same: equal text, equal numbers, or else equal in math-verify's judgement.

    Words are compared as text, since as mathematics ``no`` would equal ``on``. So is everything that math-verify cannot
    parse, and where it is not installed. Its timeouts need the main thread; elsewhere it is not asked: a vote is to end.
    A verdict that training learns from is to be right instead, see ``reflective.train.verifier``.
    """
    told = same_text(given, right)
    if told is not None:
        return told
    try:
        from math_verify import parse, verify

        return bool(verify(parse(f"${bare(right)}$"), parse(f"${bare(given)}$")))
    except (ImportError, ValueError):  # not installed, not in the main thread
        return False


def same_text(given: str, right: str) -> bool | None:
    """``same_answer`` of texts, words, letters and numbers; None where mathematics has to tell."""
    given, right = bare(given), bare(right)
    if given == right:
        return True
    if WORDS.fullmatch(given) or WORDS.fullmatch(right):
        return given.casefold() == right.casefold()
    if _LETTER.fullmatch(given) and _LETTER.fullmatch(right) and given.casefold() != right.casefold():
        return False
    numbers = [text.replace(",", "") if _GROUPED.fullmatch(text) else text for text in (given, right)]
    if all(map(_NUMBER.fullmatch, numbers)):
        return Fraction(numbers[0]) == Fraction(numbers[1])
    return None


def bare(answer: str) -> str:
    """Without blanks and dollar signs around it."""
    return answer.strip().strip("$").strip()
