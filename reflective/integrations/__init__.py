"""Adapters: this package's scores and decoding behind the interfaces of other projects, a module each.

What here is given a ``reflective.serve.engine.Engine`` may be called from any thread and event loop: the engine owns the model,
and answers what is asked at the same time in one batch or one after the other. Scores are those of ``ReflectiveModel.score``;
what a step is to the caller, and how that meets the steps of the SPRM, each adapter says.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ..utils.arguments import check_text

if TYPE_CHECKING:
    from ..model import Candidate
    from ..serve.engine import Engine

T = TypeVar("T")
RETRY_S = 0.02
_OTHER_NAMES = {"prod": "product", "model": "geometric_mean"}


def aggregation(how: Any) -> str:
    """The name in ``reflective.scoring.scores.AGGREGATIONS`` of what other projects call ``how``, by name or by enum member.

    ``"prod"`` is ``"product"``; ``"model"``, to them the model's own verdict on a response, is ``"geometric_mean"``, the
    score of a trajectory. The others bear the same names.

    Raises:
        ValueError: unknown name.
    """
    from ..scoring.scores import AGGREGATIONS

    name = getattr(how, "value", how)
    if name not in AGGREGATIONS and name not in _OTHER_NAMES:
        raise ValueError(f"aggregation={name!r}; expected one of {', '.join([*AGGREGATIONS, *_OTHER_NAMES])}")
    return _OTHER_NAMES.get(name, name)


def scored(
    engine: "Engine", prompts: Sequence[str | Sequence[int]], responses: Sequence[str | Sequence[int]]
) -> "list[Candidate]":
    """Responses, texts or ids, scored behind their prompts.

    An empty one has no step, and so has, whatever its ``error`` says, one whose hidden states are not finite: its score is 0.
    Callers sort, clip and exponentiate scores, and NaN would win there or break it.

    Raises:
        ValueError: a text that the model has no room for, or that is none.
    """
    from ..model import Candidate

    for i, r in enumerate(responses):
        if isinstance(r, str) or not isinstance(r, Sequence):
            check_text(f"response {i + 1}", r)
    there = [i for i, r in enumerate(responses) if len(r)]
    found = [Candidate("", 0.0, [], [], []) for _ in responses]
    if there:
        job = admitted(lambda: engine.score([prompts[i] for i in there], [responses[i] for i in there]))
        for i, c in zip(there, job.result(), strict=True):
            found[i] = c if c.error is None else Candidate(c.text, 0.0, [], [], c.token_ids, error=c.error)
    return found


def admitted(ask: "Callable[[], Future[T]]") -> "Future[T]":
    """What ``ask`` queues, as soon as the queue has room. It is bounded for the sake of a server; here who asks can wait."""
    from ..serve.engine import QueueFull

    while True:
        try:
            return ask()
        except QueueFull:
            time.sleep(RETRY_S)
