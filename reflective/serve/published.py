"""MetaStone-S1's two servers, as its ``inference.py`` calls them.

As there, what cannot be computed is answered with status 200 and ``{"error"}``, a body of another form with 422. Limits, which
they have none of, are answered with 4xx and 503, on which their client prints the status and the question is tried again.

Other than there: a temperature or seed of 0 is 0, not the default, and a text that is longer than the model's positions is
refused; theirs runs any, over positions that the model has never seen.
"""

from concurrent.futures import Future
from typing import Any

import torch
from fastapi import APIRouter, HTTPException, Request

from ..engines.hf.finished import read_positions
from ..model import Candidate, Generation
from . import pooling
from .schemas import PublishedGenerate, PublishedScore, ScoreBody
from .service import Service, Shared

REREAD = 1 / 8  # of the positions: what was decoded up to the last may be a few more tokens when it is read again
PATHS = ("/score", "/generate")
router = APIRouter()


@router.post("/score")
async def score(body: ScoreBody, request: Request, service: Shared) -> Any:
    """The score of a whole text, prompt included: ``value``. With ``return_all_scores`` those of its steps, the text's tokens,
    and the steps' positions among them, each that of the token whose hidden state is read, before the separator.

    vLLM's ``/score`` is this path, too, and known by its fields: ``schemas.ScoreBody``."""
    if not isinstance(body, PublishedScore):
        return await pooling.score_pairs(body, request, service)
    try:
        return await _score(body, request, service)
    except HTTPException as error:
        return _told(error)


async def _score(body: PublishedScore, request: Request, service: Service) -> dict[str, Any]:
    engine = service.engine
    if not body.text:
        return {"error": "text: it is empty"}

    def ask() -> Future[list[Candidate]]:
        # As a prompt, and not as a response: their texts begin with what the chat template begins with.
        return engine.score([[]], [engine.encode(body.text)], name="text", more=REREAD)

    (scored,) = await service.outcome(request, await service.begin(request, ask))
    service.metrics.scored([scored])
    if scored.error:
        return {"error": scored.error}
    if not body.return_all_scores:
        return {"value": scored.score}
    model, ids = engine.model, scored.token_ids
    _, _, read = read_positions(model.check_head().to("cpu"), torch.tensor([ids]), None, None, model.head.tap.at)
    return {
        "value": scored.score, "all_scores": scored.step_scores, "token_ids": ids, "score_positions": read.tolist(),
    }  # fmt: skip


@router.post("/generate")
async def generate(body: PublishedGenerate, request: Request, service: Shared) -> dict[str, Any]:
    """``response_num`` responses to a formatted prompt, each with the stop text that ended it. More ``max_tokens`` than the model
    has positions for are as many as it has, as vLLM does it, with which the published server decodes."""
    service.check_count("response_num", body.response_num)
    engine = service.engine

    def ask() -> Future[Generation]:
        ids = engine.encode(body.prefix_prompt)
        room = engine.max_length - len(ids) if engine.max_length else body.max_tokens
        return engine.generate(
            ids, n=body.response_num, max_new_tokens=min(body.max_tokens, room) if room > 0 else body.max_tokens,
            temperature=body.temperature, repetition_penalty=body.repetition_penalty, seed=body.seed, stop=body.stop or [],
        )  # fmt: skip

    try:
        generation = await service.outcome(request, await service.begin(request, ask))
    except HTTPException as error:
        return _told(error)
    service.metrics.scored(generation.candidates)
    return {"results": [candidate.text for candidate in generation.candidates]}


def _told(error: HTTPException) -> dict[str, Any]:
    if error.status_code not in (400, 500):
        raise error
    return {"error": error.detail}
