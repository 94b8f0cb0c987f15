"""Sequences that decode together in one cache that grows with them: eager, for every model whose cache can be taken apart.

``seats`` has the same calls, and is faster where a model can be given it.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from typing_extensions import Self

from ..base import Chance
from .internals import cache_argument
from .kv import Row, Rows
from .sampling import draw
from .scorer import StreamScorer
from .sequences import Continuation


class Drawn(NamedTuple):
    """The next token of a sequence that was fed, and what is known of its steps.

    Attributes:
        steps: how many count; None if nobody asked.
        newest: score of the one that ended last, and a number for the tags seen, -1 for unknown.
    """

    sequence: Continuation
    chance: Chance
    steps: int | None
    newest: tuple[float, int] = (0.0, -1)


@dataclass(frozen=True)
class Forward:
    """A model's forward as it is called here; ``cache_name`` is what it calls its cache, ``known`` which of our arguments it has."""

    model: PreTrainedModel
    cache_name: str
    known: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        inputs = inspect.signature(model.forward).parameters
        known = ("attention_mask", "position_ids", "logits_to_keep")
        return cls(model, cache_argument(model), frozenset(name for name in known if name in inputs))

    def __call__(
        self, cache: Cache, ids: Tensor, positions: Tensor, mask: Tensor | None, keep: int = 1, **others: Any
    ) -> Tensor:
        """Logits [R, V] after the last of ``ids`` [R, T]; with ``keep`` 0 [R, T, V], after each of them. ``others``: as they are."""
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        given = {name: value for name, value in given.items() if name in self.known}
        logits = self.model(input_ids=ids, **{self.cache_name: cache}, use_cache=True, **given, **others).logits
        return logits[:, -1] if keep else logits


class Batch:
    """Args: as for ``Seats``.

    Attributes:
        how: ``"batch"``.
        ahead: never; keeps_idle: never, for whoever is in a batch is fed.
    """

    how = "batch"
    ahead = keeps_idle = False

    def __init__(self, model: PreTrainedModel, scorer: StreamScorer, ends: frozenset[int]) -> None:
        self.device, self.scorer, self.ends, self.call = model.device, scorer, ends, Forward.of(model)
        self.seated: list[Continuation] = []
        self._rows: Rows | None = None
        self._logits: Tensor | None = None
        self._drawn: list[Drawn] = []

    @staticmethod
    def tokens(sequences: int, longest: int) -> int:
        """For how many tokens there are places where so many sequences decode, the longest of so many tokens."""
        return sequences * longest

    @staticmethod
    def own(s: Continuation) -> int:
        """How many of the tokens of ``s`` have a place here."""
        return s.fed

    def learn(self, rows: Rows, logits: Tensor) -> None:
        """Rows of nobody, from which a batch is made, and logits [0, V]."""
        self._rows = rows

    def arrange(self, leave: Sequence[Continuation], join: Sequence[Continuation]) -> None:
        """Take ``leave`` out of the batch, and ``join``, whose rows are there, into it."""
        gone = set(leave)
        stay = [i for i, s in enumerate(self.seated) if s not in gone]
        self._rows.arrange(stay, [s.row.whole() for s in join])
        self.seated = [self.seated[i] for i in stay] + list(join)
        self.assign()

    def assign(self) -> None:
        """The forwards to come are those of the batch."""
        self.scorer.assign([s.state for s in self.seated])

    def take(self, s: Continuation) -> Row:
        """A copy of the keys and values of what it was fed."""
        return self._rows.take(self.seated.index(s))

    def logits_of(self, s: Continuation) -> Tensor:
        """[V] after what it was fed last; a copy."""
        return self._logits[self.seated.index(s)].clone()

    def launch(self, steps: bool) -> None:
        """Feed every sequence its newest token, and draw its next. ``steps``: whether somebody is told of them."""
        batch = self.seated
        sent = torch.tensor([[s.tokens[-1] for s in batch], self._rows.lengths]).to(self.device, non_blocking=True)
        mask = self._rows.mask(self.device)
        self._logits = self.call(self._rows.cache, sent[0, :, None], sent[1, :, None], mask)
        self._rows.grown()
        chances = draw(
            self._logits, [s.uniform() for s in batch], [s.next() for s in batch], [s.sampling for s in batch],
            [s.text for s in batch], self.ends,
        )  # fmt: skip
        counts = self.scorer.counts() if steps else None
        for s in batch:
            s.fed += 1
        self._drawn = [
            Drawn(s, chance, counts[s.state] if counts else None) for s, chance in zip(batch, chances, strict=True)
        ]

    @property
    def unread(self) -> int:
        return int(bool(self._drawn))

    def forget(self) -> None:
        """Nothing is launched that was not read."""

    def halted(self, s: Continuation) -> None:
        """What waits leaves the batch."""

    def halt(self, s: Continuation) -> None:
        """Nor does it feed anything that was not told."""

    def read(self) -> list[Drawn]:
        """What came of the launch."""
        drawn, self._drawn = self._drawn, []
        return drawn
