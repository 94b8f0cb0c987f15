"""From a request's log and the ids that came back to scores. The ids are the truth: what was sampled past their end counts nowhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.layout import HASH_FACTOR
from ...scoring.scores import TrajectoryScores
from ...scoring.state import hash_ids
from ...scoring.steps import StepTokens
from ...scoring.taps import At
from .requests import Log

_INVERSE = pow(HASH_FACTOR, -1, 1 << 64)


def collect(
    logs: Sequence[Log], texts: Sequence[Sequence[int]], starts: Sequence[int], steps: StepTokens, at: At,
    aggregation: str = "geometric_mean", sigmoid: bool = True, higher_is_better: bool = True,
) -> TrajectoryScores:  # fmt: skip
    """Scores of ``texts``, ids of prompt and response, whose steps from column ``starts[i]`` on are in scope, by a head of this ``aggregation``,
    ``sigmoid`` and ``higher_is_better``.

    Raises:
        ValueError: a log is of other ids; steps are missing from it.
    """
    if not texts:
        return TrajectoryScores(
            torch.zeros(0), torch.zeros(0, dtype=torch.int64), [], [], aggregation=aggregation, higher_is_better=higher_is_better
        )
    found: list[Tensor] = []
    where: list[Tensor] = []
    for log, ids, start in zip(logs, texts, starts, strict=True):
        check_ids(log, ids, steps.vocab_size)
        columns = steps.mask(torch.tensor([list(ids)]), None, [start])[0].nonzero().flatten()
        if at != "predict":
            columns = columns[columns < len(ids) - 1]  # one that came last was never fed back, and has no state
        scored = {column: score for column, _, score in log.steps}
        if missing := [c for c in columns.tolist() if c not in scored]:
            why = (
                "more steps than max_steps; raise it" if log.n_found > len(log.steps)
                else "their hidden states were not computed, as they were in the prefix cache"
            )  # fmt: skip
            raise MissingSteps(f"request {log.request}: the steps at columns {missing} have no score: {why}")
        found.append(torch.tensor([scored[c] for c in columns.tolist()], dtype=torch.float32))
        where.append(columns)
    log_sums, counts = [float(f.double().sum()) for f in found], [len(f) for f in found]
    return TrajectoryScores.collect(log_sums, counts, found, where, at, aggregation, sigmoid, higher_is_better)


class MissingSteps(ValueError):
    """Steps that count were not scored."""


def check_ids(log: Log, ids: Sequence[int], vocab_size: int) -> None:
    """Whether ``log`` is of ``ids``, by the running hash: with further tokens behind them, or, where the last one was not consumed, without it.

    Raises:
        ValueError: it is not.
    """
    at_end = [int(h) & (1 << 64) - 1 for h in hash_ids(torch.tensor([list(ids)]))]
    own, surplus = log.hash & (1 << 64) - 1, log.seen - len(ids)
    if surplus == -1:  # all but at="predict" are one token behind
        at_end = [int(h) & (1 << 64) - 1 for h in hash_ids(torch.tensor([list(ids)[:-1]]))]
        surplus = 0
    if surplus == 1 and not log.newest:
        token = (own - at_end[0] * HASH_FACTOR - 1) % (1 << 64)
        same = token < vocab_size
    elif 0 <= surplus <= len(log.newest):
        for token in reversed(log.newest[len(log.newest) - surplus :]):
            own = (own - token - 1) * _INVERSE % (1 << 64)
        same = own == at_end[0]
    else:
        same = False
    if not same:
        raise ValueError(
            f"request {log.request}: the worker scored other tokens ({log.seen} of them) than the {len(ids)} that came back; pass outputs "
            "of this LLM, unchanged, and each once"
        )
