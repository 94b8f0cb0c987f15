"""What the engine keeps of each prompt and of each sequence behind it, from their opening to their end."""

import collections
import hashlib
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

from ...scoring.taps import At
from ..base import Chance, Prompt, Sampling
from .options import NAME
from .walk import Walk


@dataclass(eq=False)
class Prefix:
    """A prompt. ``request``: by which it is run on its own, for its chances or as nothing begins behind it."""

    number: int
    prompt: Prompt
    walk: Walk
    opened: bool = False
    request: str | None = None
    chances: list[Chance] = field(default_factory=list)
    sequences: list["Sequence"] = field(default_factory=list)  # that have not ended, in order of creation


@dataclass(eq=False)
class Sequence:
    """A sequence behind a prefix, until it ends. It may have several requests one after the other: each goes on with the prompt and the
    tokens so far, whose keys and values are in the prefix cache but for the last block's."""

    number: int
    prefix: Prefix
    sampling: Sampling
    walk: Walk  # over the prompt and the tokens told
    tokens: list[int] = field(default_factory=list)  # as told
    drawn: collections.deque[Chance] = field(default_factory=collections.deque)  # but not told
    forced: list[int] = field(default_factory=list)  # to come next, once a request has run them
    ended: bool = False  # behind what was drawn
    end: list[int] = field(default_factory=list)  # the token that ended it, which is no part of it
    request: str | None = None
    steps: int = 0  # that count, as told
    known: dict[int, tuple[int, float]] = field(default_factory=dict)  # column -> region, log-score
    resting: bool = False
    parked: bool = False  # for want of memory
    spare: bool = False  # what the request draws is not wanted: only the forced tokens before are
    owes_step: bool = False  # whether the last token told may have ended a step, which is told before the next

    @property
    def ids(self) -> list[int]:
        """Prompt and response, as told."""
        return [*self.prefix.prompt.ids, *self.tokens]

    @property
    def waits(self) -> bool:
        """Whether a request has to be made for it to go on."""
        return self.request is None and not (self.drawn or self.ended or self.resting or self.parked)


def continuation(s: Sequence, ends: Several[int], at: At = "predict") -> tuple[list[int], dict[str, Any]]:
    """The ids of a request that goes on where ``s`` is, and the fields of its ``SamplingParams``. ``at``: of the head."""
    sampling = s.sampling
    begun = [*s.ids, *(c.token for c in s.drawn)]
    left = sampling.max_tokens - len(s.tokens) - len(s.drawn)
    s.forced = s.forced[:left]
    s.spare = left == len(s.forced)
    behind = len(begun) - len(s.prefix.prompt.ids)  # tokens, which vLLM is given as part of its prompt
    wanted: dict[str, Any] = {"seeded_by_place": True}
    if steps := [(c, *s.known[c]) for c in sorted(s.known) if c < len(begun)]:
        wanted["steps"] = steps
    # Unless a step is read from the token before, the last token's own state comes with this request: vLLM never takes it from the prefix cache.
    owed = at != "predict" and behind > 0 and len(begun) - 1 not in s.known
    if s.forced or owed:
        wanted["score_from"] = len(begun) - owed
    if (sampling.presence_penalty or sampling.frequency_penalty) and behind + len(s.forced):
        wanted["output_from"] = len(s.prefix.prompt.ids)
    most, room = sampling.logprobs or 0, max(1, left - len(s.forced))
    return [*begun, *s.forced], {
        "max_tokens": room, "min_tokens": min(room, max(0, sampling.min_tokens - behind - len(s.forced))),
        "seed": seed(sampling.seed), **settings(sampling),
        # Where a response ends is ours to say, whatever the checkpoint's generation_config does.
        "stop_token_ids": list(ends), "ignore_eos": True, "logprobs": most,
        "prompt_logprobs": most if s.forced else None, "extra_args": {NAME: wanted},
    }  # fmt: skip


def settings(sampling: Sampling) -> dict[str, Any]:
    """Fields of ``SamplingParams`` that do not depend on how far a sequence has come."""
    return {
        "temperature": sampling.temperature, "top_p": max(sampling.top_p, 1e-6),  # vLLM takes no 0
        "top_k": sampling.top_k, "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty, "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
    }  # fmt: skip


def seed(numbers: Several[int]) -> int:
    """One number of 63 bits for those of a ``Sampling``."""
    digest = hashlib.blake2b(repr(tuple(map(int, numbers))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def chance_of(token: int, of: dict[int, Any] | None, most: int | None) -> Chance:
    """From what vLLM tells of a token's chances: ``logprob`` and ``rank`` by token, its own and the likeliest."""
    if of is None:
        return Chance(token, None, [])
    top = sorted((c.rank, t, c.logprob) for t, c in of.items() if c.rank is not None)
    return Chance(token, of[token].logprob, [(t, log_prob) for rank, t, log_prob in top if rank <= (most or 0)])
