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

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from .text import equal_as_text
from .values import equal_in_value

TASKS = ("aime", "ceval")
_PROGRAMS = re.compile(r"(?i)live[-_ ]?code[-_ ]?bench|lcb|human[-_]?eval|mbpp")
_NAMED = {"ceval": re.compile(r"(?i)c-?eval"), "aime": re.compile(r"(?i)aime")}
_CHOICE = re.compile(r"(?i)(?:答案|answer)\s*[:：]\s*([A-D])")
_LETTER = re.compile(r"[A-Da-d]")
_WHOLE = re.compile(r"\d{1,3}")
_LEADS = ("be ", "is ", "are ", "=", ": ", "get ", "be\n", "is\n", "are\n", ":\n", "get\n")


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


def answer(task: str, response: str) -> str | None:
    """What the task reads in a response alone, for votes."""
    if task == "ceval":
        found = _CHOICE.search(response)
        return found and found.group(1).upper()
    return _extracted(response) if boxed(response) else None


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


@lru_cache(4096)  # candidates of a question give few different answers
def _same(given: str, right: str, boxed: bool) -> bool:
    return equal_as_text(given, right) or (boxed and equal_in_value(given, right))
