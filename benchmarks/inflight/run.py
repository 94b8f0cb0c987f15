"""What a system hands over: the sequences that it decoded, and what happened on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scored:
    """One sequence that a system decoded.

    Attributes:
        ids: its tokens, prompt and response, without padding. They are what it *decoded*: not what a tokenizer makes of its text.
        prompt: how many of them are the prompt.
        scores: of its steps in their order, in (0, 1).
        columns: where in ``ids`` the step-tokens are; None: the system does not tell.
    """

    ids: Sequence[int]
    prompt: int
    scores: Sequence[float]
    columns: Sequence[int] | None = None


@dataclass(frozen=True)
class Run:
    """What a system made of a case.

    Attributes:
        sequences: all of them.
        events: what is said to have happened on the way, and how often: ``cached`` (tokens), ``pieces`` (of prompts), ``preempted``, ``rejected``
            (drafted tokens), ``reordered`` or ``forked`` (rows), ``stopped`` (sequences). Without the event that a case is about it is not tested.
    """

    sequences: Sequence[Scored]
    events: Mapping[str, int] = field(default_factory=dict)
