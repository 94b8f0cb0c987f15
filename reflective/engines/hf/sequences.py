"""What the engine keeps of each prompt and of each sequence behind it, from their opening to their end."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from transformers import DynamicCache

from ..base import Chance, Prompt, Sampling
from .kv import Row


@dataclass(eq=False)
class Prefix:
    """A prompt, of which ``done`` tokens are in ``cache`` while it is prefilled in pieces."""

    number: int
    prompt: Prompt
    columns: list[int] = field(default_factory=list)  # as the scorer was given it, left padding included
    state: int | None = None  # of the scorer, from which sequences fork
    row: Row | None = None  # keys and values, once they are there
    logits: Tensor | None = None  # [V] after its last token
    chances: list[Chance] = field(default_factory=list)
    cache: DynamicCache | None = None
    ids: Tensor | None = None  # [1, P] and positions, of one in pieces
    positions: Tensor | None = None
    done: int = 0
    sequences: list["Continuation"] = field(default_factory=list)  # that have not ended, in order of creation


@dataclass(eq=False)
class Continuation:
    """A sequence behind a prefix, until it ends."""

    number: int
    prefix: Prefix
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)  # as told
    steps: int = 0  # that count
    step_scores: list[float] = field(default_factory=list)  # of these, as told; never changed in place
    tags: int = -1  # of which tags these steps count, see ``StreamState.newest``
    forced: tuple[int, Sequence[int]] = (0, ())  # from which length on, which tokens
    state: int | None = None  # of the scorer; None: as the prefix left it
    row: Row | None = None  # keys and values, outside of its place
    fed: int = 0  # tokens, the prompt's included, that were fed or are being fed
    seated: bool = False
    shares: bool = False  # whether its place reads the prompt where others do
    halted: bool = False  # whether its seat stands still until it is told of the token to feed
    flying: int = 0  # tokens that are being drawn, of which nothing was read yet
    resting: bool = False
    drawn: Chance | None = None  # but not told
    logits: Tensor | None = None  # [V], that it was or will be drawn from

    def __post_init__(self) -> None:
        self._random, self._uniforms, self._used = np.random.default_rng(self.sampling.seed), [], 0

    @property
    def text(self) -> tuple[Sequence[int], Sequence[int]]:
        """The prompt's tokens, and its own."""
        return self.prefix.prompt.ids, self.tokens

    @property
    def ready(self) -> bool:
        """Whether there is a token to feed that was told."""
        return not self.resting and 0 < self.fed < len(self.prefix.prompt.ids) + len(self.tokens)

    @property
    def goes(self) -> bool:
        """Whether its place may feed it now: a token that was told, or the one that is being drawn."""
        return self.ready or (self.flying > 0 and not self.resting and self.drawn is None)

    def uniform(self) -> float:
        """The next of its random numbers in [0, 1)."""
        if self._used == len(self._uniforms):
            self._uniforms += self._random.random(64).tolist()
        self._used += 1
        return self._uniforms[self._used - 1]

    def unused(self) -> None:
        """Nothing was drawn by the number that came last."""
        self._used -= 1

    def next(self) -> int:
        """What the token behind those told and those that are being drawn is forced to, or -1."""
        begin, tokens = self.forced
        place = len(self.tokens) + self.flying - begin
        return tokens[place] if place < len(tokens) else -1
