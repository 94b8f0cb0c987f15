"""``GET /v1/strategies``: which efforts and strategies this server can answer by, and within which limits."""

from typing import Any

from fastapi import APIRouter

from ..model import EFFORT
from ..search.candidates import SAMPLING_DEFAULTS
from ..search.strategies import NAMES, Strategy
from .service import Service, Shared

router = APIRouter()


@router.get("/v1/strategies")
async def strategies(service: Shared) -> dict[str, Any]:
    """What a request may ask for as ``effort``, as ``strategy`` and as ``best_of``."""
    efforts = [(effort, _found(service, effort=effort)) for effort in (*EFFORT, "auto")]
    named = [(name, _found(service, strategy=name)) for name in NAMES]
    most = service.limits.candidates
    return {
        "object": "list", "model": service.name, "max_model_len": service.engine.max_length, "max_candidates": most,
        "sampling": {"temperature": SAMPLING_DEFAULTS["temperature"], "top_p": SAMPLING_DEFAULTS["top_p"]},
        "efforts": [{"effort": e, "candidates": s.n, "strategy": s.name} for e, s in efforts if s is not None and s.n <= most],
        "data": [
            {"id": name, "object": "strategy", "candidates": min(s.n, most), "about": s.about} for name, s in named if s is not None
        ],
    }  # fmt: skip


def _found(service: Service, **asked: str) -> Strategy | None:
    """None where the checkpoint has no rule for it, or the head's scores cannot steer."""
    try:
        return service.engine.model.strategy(**asked)
    except ValueError:
        return None
