"""The forms that rows of candidates come in, brought to one."""

import math
from collections.abc import Sequence
from typing import Any

from ..tasks import Question

_QUESTION = ("question", "prompt", "problem")


def read_question(where: str, fields: dict[str, Any]) -> Question:
    """The question of a row, with its right answer, ``""`` where it has none.

    Raises:
        ValueError: it has no question, prompt or problem.
    """
    text = next((fields[k] for k in _QUESTION if fields.get(k) is not None), None)
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
        text = text[0].get("content")  # a conversation of one message
    if type(text) is not str:
        raise ValueError(f"{where}: expected a question, prompt or problem: a text, or one message")
    right = fields.get("answer")
    right = right.get("target") if isinstance(right, dict) else right
    return Question(text.strip(), "" if right is None else str(right).strip(), fields)


def read_candidates(where: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates of a row in the first form; none where generating them failed.

    Raises:
        ValueError: a row of another form, by its place ``where``.
    """
    if "candidates" in fields:
        candidates = fields["candidates"] or []
    elif is_published(fields):
        output = fields["output"]
        prompt = output.get("content") or ""
        whole = [str(t) for t in output["solution_lst"]]
        candidates = _zipped(
            where, text=[t.removeprefix(prompt) for t in whole], score=output["score_lst"], whole=whole
        )
    elif "responses" in fields:
        names = {"text": "responses", "score": "score", "step_scores": "step_scores"}
        texts = fields["responses"] or []
        candidates = _zipped(where, **{k: fields.get(name) or [None] * len(texts) for k, name in names.items()})
    elif "response" in fields:
        kept = {"score": fields.get("score"), "step_scores": fields.get("step_scores")}
        candidates = [{"text": fields["response"], **kept}]
    else:
        raise ValueError(
            f"{where}: expected candidates, output (with solution_lst and score_lst), response or responses; found "
            + ", ".join(fields)
        )
    if not isinstance(candidates, list) or not all(isinstance(c, dict) for c in candidates):
        raise ValueError(f"{where}: candidates: expected a list of objects")
    return candidates


def is_published(fields: dict[str, Any]) -> bool:
    """Whether the published code's ``inference.py`` has written the row."""
    output = fields.get("output")
    return "candidates" not in fields and isinstance(output, dict) and {"solution_lst", "score_lst"} <= output.keys()


def _zipped(where: str, **columns: Sequence[Any]) -> list[dict[str, Any]]:
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{len(values)} of {name}" for name, values in columns.items())
        raise ValueError(f"{where}: expected one of each for every candidate, found {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def number(where: str, name: str, value: Any) -> float:
    """The number in the column ``name``, NaN for null.

    Raises:
        ValueError: another value, by its place ``where``.
    """
    if value is not None and not isinstance(value, int | float):
        raise ValueError(f"{where}: {name}={value!r}; expected a number or null")
    return math.nan if value is None else float(value)
