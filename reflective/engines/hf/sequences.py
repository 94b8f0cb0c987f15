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
    steps: int = 0
    forced: tuple[int, Sequence[int]] = (0, ())  # from which length on, which tokens
    state: int | None = None  # of the scorer; None: as the prefix left it
    row: Row | None = None  # keys and values, outside of the batch
    seated: bool = False
    unfed: bool = False  # whether the newest of tokens is still to be fed
    resting: bool = False
    drawn: Chance | None = None  # but not told
    logits: Tensor | None = None  # [V], that it was or will be drawn from

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.sampling.seed)

    @property
    def ready(self) -> bool:
        """Whether there is a token to feed."""
        return self.unfed and not self.resting

    def next(self) -> int:
        """The token that it is forced to, or -1."""
        begin, tokens = self.forced
        place = len(self.tokens) - begin
        return tokens[place] if place < len(tokens) else -1
