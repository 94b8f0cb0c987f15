"""Several heads on one model, or one head of several parts: a stream each, which hear one tap."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from ...scoring.heads import Heads, parts_of, together
from ...scoring.steps import StepTokens
from . import scorer


class SeveralHeads(scorer.StreamScorer):
    """What ``StreamScorer`` is for several heads; see there."""

    def __init__(self, model: nn.Module, head: Heads, steps: StepTokens | None = None, *args: Any, **settings: Any) -> None:
        self.head = head
        self.each = [scorer.StreamScorer(model, part, steps, *args, **settings) for part in parts_of(head)]
        first = self.each[0]
        self.backbone, self.steps, self.schedule, self.at, self.scope = (
            first.backbone, first.steps, first.schedule, first.at, first.scope,
        )  # fmt: skip
        self.buffer_rows, self.max_steps, self.record_features = first.buffer_rows, first.max_steps, first.record_features
        self.stream = first.stream  # that of the part that is looked at while decoding
        self._entered: ExitStack | None = None

    @property
    def host_seconds(self) -> float:
        return sum(one.host_seconds for one in self.each)

    @property
    def flushes_by_hand(self) -> bool:
        """As one stream alone cannot do the work: whoever captures a step may not have it."""
        return True

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            for one in self.each:
                entered.enter_context(one)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered, self._entered = self._entered, None
        entered.close()

    def result(self, sequences: Any = None, *, rows: Sequence[int] | None = None) -> Any:
        return together(self.head, [one.result(sequences, rows=rows) for one in self.each])

    def features(self) -> tuple[Tensor, Tensor]:
        return self.each[0].features()


def _by_all(name: str) -> Any:
    def run(self: SeveralHeads, *args: Any, **settings: Any) -> Any:
        told = [getattr(one, name)(*args, **settings) for one in self.each]
        return told[0]

    run.__name__, run.__doc__ = name, getattr(scorer.StreamScorer, name).__doc__
    return run


for _name in ("begin", "admit", "fork", "assign", "assign_as", "hold", "release", "counts", "step_scores"):
    setattr(SeveralHeads, _name, _by_all(_name))
