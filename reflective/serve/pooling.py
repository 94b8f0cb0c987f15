"""vLLM's ``/pooling`` and ``/score``: scores of finished text, where a reward model is expected."""

import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from ..model import Candidate
from ..utils.outputs import finite
from .schemas import PairScore, Pooling
from .service import Service, Shared

Pairs = tuple[list[str], list[str | list[int]]]  # formatted prompts, each empty where a whole text counts; responses
router = APIRouter()


@router.post("/pooling")
async def pooling(body: Pooling, request: Request, service: Shared) -> dict[str, Any]:
    """As of a process reward model: of every text a row for each step, holding its score (``task`` ``"token_classify"``), or
    the trajectory's score alone (``"classify"``). Texts count as a whole; of a chat that ends with the assistant's message only
    this does."""
    service.check_name(body.model)

    def pairs() -> Pairs:
        if not body.messages:
            return [""] * len(body.input), body.input
        *before, last = body.messages
        if last.role == "assistant" and before:
            return [service.prompt(before)], [last.text]
        return [""], [service.engine.encode(service.prompt(body.messages, answered=True))]

    found, usage = await _score(request, service, pairs)
    data = [
        [finite(c.score)] if body.task == "classify" else [[finite(score)] for score in c.step_scores] for c in found
    ]
    return _answer("pool", service, found, usage, [{"object": "pooling", "data": rows} for rows in data])


@router.post("/v1/score")
async def score_pairs(body: PairScore, request: Request, service: Shared) -> dict[str, Any]:
    """The score of every response to its question, which is put into the model's prompt."""
    service.check_name(body.model)
    questions, responses = body.questions, body.responses
    if len(questions) not in (1, len(responses)):
        raise HTTPException(400, f"{len(questions)} questions for {len(responses)} responses; give one, or one each")

    def pairs() -> Pairs:
        prompts = [service.engine.model.format(q) for q in questions]
        return prompts * (len(responses) // len(prompts)), responses

    found, usage = await _score(request, service, pairs)
    return _answer("score", service, found, usage, [{"object": "score", "score": finite(c.score)} for c in found])


async def _score(
    request: Request, service: Service, pairs: Callable[[], Pairs]
) -> tuple[list[Candidate], dict[str, int]]:
    """Of all texts. What is wrong with one of several is its own error, and the others are scored."""
    engine, tokens, wrong = service.engine, 0, {}

    def ask() -> Future[list[Candidate]]:
        nonlocal tokens
        prompts, responses = pairs()
        service.check_count("texts", len(responses))
        known: dict[str, list[int]] = {}
        heads, texts = [], []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                if prompt not in known:
                    known[prompt] = engine.encode(prompt) if prompt else []
                head, text = known[prompt], engine.encode_response(response, not prompt)
                engine.check_text(head, text, "" if len(responses) == 1 else f"[{i}]")
            except ValueError as error:
                wrong[i] = str(error)
                continue
            heads.append(head)
            texts.append(text)
        if not texts:
            raise ValueError("; ".join(list(wrong.values())[:4]))
        tokens = sum(map(len, heads)) + sum(map(len, texts))
        return engine.score(heads, texts)

    scored = await service.outcome(request, await service.begin(request, ask))
    service.metrics.scored(scored)
    rest = iter(scored)
    found = [
        Candidate("", math.nan, [], [], [], error=wrong[i]) if i in wrong else next(rest)
        for i in range(len(scored) + len(wrong))
    ]
    return found, {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}


def _answer(
    kind: str, service: Service, found: list[Candidate], usage: dict[str, int], data: list[dict[str, Any]]
) -> dict[str, Any]:
    """A list as vLLM answers it; a text that has no score says so beside its number."""
    errors = [{"error": c.error} if c.error else {} for c in found]
    return {
        "id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": service.name,
        "data": [{"index": i, **row, **error} for i, (row, error) in enumerate(zip(data, errors, strict=True))],
        "usage": usage,
    }  # fmt: skip
