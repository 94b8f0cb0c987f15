"""The door by which the search drives an engine."""

from typing import NamedTuple


class Chance(NamedTuple):
    """What a token's chances were: natural logarithms of the softmax, in float32, of the model's logits as they are, before
    temperature and top-p.

    Attributes:
        token: that came; log_prob: its own; of the first token of a prompt, which nothing precedes, None.
        top: the likeliest tokens with theirs, in descending order, as many as were asked for.
    """

    token: int
    log_prob: float | None
    top: list[tuple[int, float]]
