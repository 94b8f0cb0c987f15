"""Tokens and their chances from logits.

``pick`` and ``log_probs_of`` are functions of fixed shape: they read nothing back from the device, and branch on no tensor, so that
they can be traced whole and captured. Rows of different settings go through together: each has its own in ``Rules``, and ``Uses``
says what none of them needs, which is left out. ``draw`` and ``chances`` are these two with one read of the device, whatever the batch.
On a CPU, where reading costs nothing and sorting a vocabulary much, ``draw`` has ``pick`` look at the likeliest tokens first.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ..base import Chance, Sampling

Text = tuple[Sequence[int], Sequence[int]]  # ids of a prompt, and of what came behind it
_COLDEST = torch.finfo(torch.float32).tiny  # a temperature below it would be a 0 to divide by
_PIECE = 128  # tokens whose masses are added up at once; vocabularies are multiples of it as a rule
_HEAD = 256  # likeliest tokens of a row that are looked at before its whole vocabulary is sorted


def _greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _COLDEST


@dataclass(frozen=True)
class Uses:
    """What at least one row needs; all else is left out of ``pick``.

    Attributes:
        draws: a row is not greedy; greedy: a row is.
        bias, repetition, min_tokens, top_k, top_p, min_p: as in ``Sampling``; counts: a presence or a frequency penalty.
    """

    draws: bool = True
    greedy: bool = False
    bias: bool = False
    repetition: bool = False
    counts: bool = False
    min_tokens: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> Self:
        drawn = [s for s in samplings if not _greedy(s)]
        return cls(
            draws=bool(drawn), greedy=len(drawn) < len(samplings),
            bias=any(s.logit_bias for s in samplings), repetition=any(s.repetition_penalty != 1 for s in samplings),
            counts=any(s.presence_penalty or s.frequency_penalty for s in samplings),
            min_tokens=any(s.min_tokens for s in samplings),
            top_k=any(s.top_k for s in drawn), top_p=any(s.top_p < 1 for s in drawn), min_p=any(s.min_p for s in drawn),
        )  # fmt: skip


@dataclass(eq=False)
class Rules:
    """How each of R rows is drawn, from logits over V tokens: the fields of ``Sampling`` as tensors [R], and what they apply to.

    Attributes:
        temperature, min_p, repetition, presence, frequency: float32; top_p: float64; top_k, min_tokens: int64.
        length: int64, tokens behind the prompt so far.
        ends: [E] int64, the tokens that may not come before ``min_tokens``; none where no row has any.
        bias: [R, V] float32, to be added to the logits; None where no row has one.
        seen: [R, V] bool, tokens of the prompt and behind it; None without a repetition penalty.
        counts: [R, V] int32, how often each token came behind the prompt; None without a presence or frequency penalty.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    min_tokens: Tensor
    length: Tensor
    ends: Tensor
    bias: Tensor | None = None
    seen: Tensor | None = None
    counts: Tensor | None = None

    @classmethod
    def of(
        cls,
        samplings: Sequence[Sampling],
        texts: Sequence[Text],
        ends: Collection[int],
        vocabulary: int,
        device: torch.device | str,
    ) -> Self:
        """For rows that have come as far as ``texts`` says, in one copy to the device, or a few more where a row has a bias, a penalty
        or ``min_tokens``. Ids that the ``vocabulary`` of the logits does not reach, as some embeddings have them, cannot be drawn and are left out.
        """
        uses = Uses.of(samplings)
        rows = [
            (
                0.0 if _greedy(s) else s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty, s.presence_penalty,
                s.frequency_penalty, s.min_tokens, len(output),
            )
            for s, (_, output) in zip(samplings, texts, strict=True)
        ]  # fmt: skip
        sent = torch.tensor([*zip(*rows, strict=True)], dtype=torch.float64).to(device, non_blocking=True)
        temperature, top_p, top_k, min_p, repetition, presence, frequency, min_tokens, length = sent
        rules = cls(
            temperature.float(), top_p, top_k.long(), min_p.float(), repetition.float(), presence.float(), frequency.float(),
            min_tokens.long(), length.long(),
            torch.tensor([t for t in ends if t < vocabulary and uses.min_tokens], dtype=torch.int64).to(device, non_blocking=True),
        )  # fmt: skip
        shape = len(samplings), vocabulary
        if uses.bias:
            pairs = [[(t, v) for t, v in s.logit_bias if t < vocabulary] for s in samplings]
            at = _places([[t for t, _ in row] for row in pairs], vocabulary, device)
            values = torch.tensor([v for row in pairs for _, v in row], dtype=torch.float32)
            rules.bias = torch.zeros(shape, device=device)
            rules.bias.view(-1).scatter_(0, at, values.to(device, non_blocking=True))
        if uses.repetition:
            at = _places([[*prompt, *output] for prompt, output in texts], vocabulary, device)
            rules.seen = torch.zeros(shape, dtype=torch.bool, device=device)
            rules.seen.view(-1).scatter_(0, at, True)
        if uses.counts:
            at = _places([output for _, output in texts], vocabulary, device)
            rules.counts = torch.zeros(shape, dtype=torch.int32, device=device)
            rules.counts.view(-1).scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))
        return rules

    def first(self, n: int) -> Self:
        """Of the first ``n`` rows, not copied."""
        return type(self)(**{k: t if t is None or k == "ends" else t[:n] for k, t in vars(self).items()})

    def took(self, tokens: Tensor) -> None:
        """Note the next token of every row, ``tokens`` [R] int64, in place."""
        self.length.add_(1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))


def _places(rows: Sequence[Sequence[int]], vocabulary: int, device: torch.device | str) -> Tensor:
    """Where the ids of each row lie in a tensor [R, vocabulary], seen as one row."""
    found = []
    for i, ids in enumerate(rows):
        ids = np.asarray(ids, dtype=np.int64)
        found.append(ids[ids < vocabulary] + i * vocabulary)
    return torch.from_numpy(np.concatenate(found)).to(device, non_blocking=True)


def pick(
    logits: Tensor, uniforms: Tensor, forced: Tensor, rules: Rules, uses: Uses, head_first: bool = False
) -> Tensor:
    """The next token of each of R rows: [R] int64.

    What ``Sampling`` names is applied in this order, as transformers' processors do it and, what these do not have, vLLM: bias, repetition
    penalty, frequency and presence penalty, ``min_tokens``; then, but for greedy rows, temperature, top-k, top-p, min-p.

    Args:
        logits: [R, V].
        uniforms: [R] float64 in [0, 1): token i is where the distribution function of row i exceeds ``uniforms[i]``.
        forced: [R] int64, the token that it is to be instead, or -1.
        head_first: spare rows the sort of the vocabulary whose likeliest tokens settle it. The tokens are the same; tensors are read.
    """
    logits = _changed(logits.float(), rules, uses)
    if not uses.draws:
        tokens = logits.argmax(-1)
    else:
        tokens = (_drawn_by_head if head_first else _drawn)(logits, uniforms, rules, uses)
        if uses.greedy:
            tokens = torch.where(rules.temperature > 0, tokens, logits.argmax(-1))
    return torch.where(forced < 0, tokens, forced)


def _changed(logits: Tensor, rules: Rules, uses: Uses) -> Tensor:
    """Logits [R, V] after all that concerns greedy rows too."""
    if uses.bias:
        logits = logits + rules.bias
    if uses.repetition:
        penalty = rules.repetition[:, None]
        logits = torch.where(rules.seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if uses.counts:
        logits = logits - rules.frequency[:, None] * rules.counts - rules.presence[:, None] * (rules.counts > 0)
    if uses.min_tokens:
        ends = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device).index_fill(0, rules.ends, True)
        logits = logits.masked_fill(ends & (rules.length < rules.min_tokens)[:, None], -torch.inf)
    return logits


def _drawn(logits: Tensor, uniforms: Tensor, rules: Rules, uses: Uses) -> Tensor:
    """Tokens [R] of rows that are not greedy: the inverse of each one's distribution function at ``uniforms``."""
    logits = _tempered(logits, rules)
    if uses.top_k or uses.top_p:
        logits = _cut(logits, rules, uses)
    if uses.min_p:
        chances = logits.softmax(-1)
        least = rules.min_p[:, None] * chances.amax(-1, keepdim=True)
        logits = logits.masked_fill(chances < least, -torch.inf)
    # float64: a float32 sum over the vocabulary would round away probabilities below 6e-8.
    return _leading((logits - logits.amax(-1, keepdim=True)).double().exp(), uniforms[:, None])


def _leading(masses: Tensor, share: Tensor) -> Tensor:
    """Of the masses [R, V] of each row, how many from the first on come to no more than ``share`` [R, 1] float64 of them all: [R]. No
    more than lie before the last that is not 0.

    Over pieces, then within the one that crosses the share: cumsum along rows of a vocabulary takes 285 us on an H200, of 32 rows in
    float64, where this reads the masses once.
    """
    V = masses.shape[1]
    if (rest := -V % _PIECE) > 0:
        masses = torch.nn.functional.pad(masses, (0, rest))
    pieces = masses.unflatten(1, (-1, _PIECE))  # [R, V / PIECE, PIECE]
    upto = pieces.sum(-1, dtype=torch.float64).cumsum(1)
    wanted = share * upto[:, -1:]
    which = _crossed(upto, wanted)
    before = torch.where(which > 0, upto.gather(1, (which - 1).clamp_min(0)), 0.0)
    within = pieces.gather(1, which[:, :, None].expand(-1, 1, _PIECE)).squeeze(1).double().cumsum(1)
    return (which * _PIECE + _crossed(within, wanted - before)).squeeze(1).clamp_max(V - 1)


def _crossed(upto: Tensor, wanted: Tensor) -> Tensor:
    """Where ``upto`` [R, n], which rises, exceeds ``wanted`` [R, 1]; at its last rise if, as sums round, nowhere: [R, 1]."""
    last = torch.searchsorted(upto, upto[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(upto, wanted, right=True), last).clamp_max(upto.shape[1] - 1)  # NaN rises nowhere


def _tempered(logits: Tensor, rules: Rules) -> Tensor:
    """Logits [R, V] at each row's temperature; as they are where it is greedy."""
    temperature = rules.temperature.where(rules.temperature > 0, 1.0)[:, None]
    # By the reciprocal on CUDA devices, as PyTorch divides by a number there: the bits stay those of transformers' TemperatureLogitsWarper.
    return logits * temperature.reciprocal() if logits.is_cuda else logits / temperature


def _cut(logits: Tensor, rules: Rules, uses: Uses) -> Tensor:
    """Logits [R, V] without what lies outside of top-k and top-p, by one sort for both."""
    ascending, order = logits.sort()
    if uses.top_k:
        last = logits.shape[1] - rules.top_k.where(rules.top_k > 0, logits.shape[1])
        least = ascending.gather(1, last.clamp_min(0)[:, None])
        logits = logits.masked_fill(logits < least, -torch.inf)
        ascending = ascending.masked_fill(ascending < least, -torch.inf)
    if uses.top_p:
        out = _leading((ascending - ascending[:, -1:]).exp(), (1 - rules.top_p).float().double()[:, None])
        out = out.where(rules.top_p < 1, 0)  # at 1 not even those whose chance rounds to 0 go
        out = torch.arange(logits.shape[1], device=logits.device) < out[:, None]
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return logits


def _drawn_by_head(logits: Tensor, uniforms: Tensor, rules: Rules, uses: Uses) -> Tensor:
    """What ``_drawn`` gives, which is asked only for rows that their heads do not settle."""
    if logits.shape[1] <= _HEAD or not (uses.top_k or uses.top_p or uses.min_p):
        return _drawn(logits, uniforms, rules, uses)
    tokens, sure = _of_head(logits, uniforms, rules, uses)
    rows = (~sure & (rules.temperature > 0)).nonzero().squeeze(1)
    if len(rows):
        some = replace(
            rules, temperature=rules.temperature[rows], top_p=rules.top_p[rows], top_k=rules.top_k[rows], min_p=rules.min_p[rows]
        )  # fmt: skip
        tokens[rows] = _drawn(logits[rows], uniforms[rows], some, uses)
    return tokens


def _of_head(logits: Tensor, uniforms: Tensor, rules: Rules, uses: Uses) -> tuple[Tensor, Tensor]:
    """Of ``logits`` [R, V], by the ``_HEAD`` likeliest of each row: tokens [R], and whether ``_drawn`` is sure to give the same.

    Sure is a row whose every comparison there comes out as here, however both round; NaN, which no comparison holds for, never is.
    Below, u = 2**-24 is the rounding of float32 and masses are exp(logit - greatest). In float32 these are off by 106 u of themselves:
    |logit - greatest| < 104, else they are 0, rounds by 104 u, and exp by 2 u. Subnormal ones, below 1e-37, count for nothing against
    1 - top_p >= 1e-16. Here, those of the head are in float64.
    """
    logits = _tempered(logits, rules)  # anew
    head, ids = logits.topk(_HEAD)  # descending
    mass = (head.double() - head[:, :1].double()).exp()
    kept = torch.ones_like(head, dtype=torch.bool)
    clear = torch.ones_like(kept)
    limited = torch.zeros_like(kept[:, :1])
    if uses.top_k:
        limited = (rules.top_k > 0)[:, None]
        least = head.gather(1, rules.top_k.clamp(1, _HEAD)[:, None] - 1)
        kept = ~limited | (head >= least)
        clear &= ~limited | ((rules.top_k[:, None] < _HEAD) & (head[:, -1:] < least))  # else the head may lack a few
    if uses.top_p:
        # A float32 sum is off by u times each term times the additions that it goes through. Whether added one by one, in lanes or in
        # pairs, in ascending order these are < V for a term of the tail and < _HEAD + 64 for one of the head, which comes last. So with
        # masses in units of their sum, `tail` what lies outside of the head, `upto` a token and all below it, _cut's sum over `upto` is off by
        #     upto * u * (2 * 106 for masses and sum, _HEAD + 64 + V * tail for the order of the sum, 3 for dividing and the last rounding)
        #     + u * (V * tail + _HEAD * upto) for the order of the cumulative sum, were it in float32 too (on CPUs it is in float64),
        # ours by u * (106 * upto + V * tail): less than u * (1000 * upto + 3 * V * tail), below with room for products of errors.
        tail = logits.sub_(head[:, :1]).exp_().scatter_(1, ids, 0).sum(1, keepdim=True).double()
        upto = torch.where(kept, mass, 0.0).flip(1).cumsum(1).flip(1) + tail.where(~limited, 0.0)
        tail, upto = tail.where(~limited, 0.0) / upto[:, :1], upto / upto[:, :1]
        most = (1 - rules.top_p).float().double()[:, None]
        off = 2.0**-24 * (2000 * upto + 4 * logits.shape[1] * tail)
        whole = (rules.top_p >= 1)[:, None]
        kept &= (upto > most) | whole
        clear &= ((upto - most).abs() > off) | whole
        kept[:, 0] = clear[:, 0] = True  # whatever its mass
    if uses.min_p:
        # Both sides of _drawn's comparison have one divisor; 106 u for the mass, 6 for divisions and products, twice that to be safe.
        # Below 1e-30 a chance may have become subnormal, or 0.
        least, greatest = rules.min_p.double()[:, None], head == head[:, :1]
        kept &= (mass >= least) | greatest
        clear &= ((mass - least).abs() > 2.0**-24 * 250 * mass + 1e-30) | greatest | (least == 0)
    # All that is kept must be in the head, and no token kept that equals one that isn't: which of them is, sort alone knows.
    n = kept.sum(1, keepdim=True)
    last, after = (head.gather(1, i.clamp(0, _HEAD - 1)) for i in (n - 1, n))
    sure = clear.all(1) & ((n < _HEAD) & (last > after)).squeeze(1)
    ids, order = torch.where(kept, ids, logits.shape[1]).sort()
    cdf = torch.where(kept, mass, 0.0).gather(1, order).cumsum(1)
    # Both distribution functions are sums of fewer than _HEAD float64 numbers other than 0, off by 256 * 2**-53 = 3e-14 of the whole; so is
    # the product with the uniform, and exp by less than 1e-13 as |logit - greatest| < 746.
    wanted = uniforms[:, None] * cdf[:, -1:]
    sure &= ((cdf - wanted).abs() > 1e-12 * cdf[:, -1:]).all(1)
    at = torch.searchsorted(cdf, wanted, right=True).clamp_max(_HEAD - 1)
    return ids.gather(1, at).squeeze(1), sure


class Likely(NamedTuple):
    """Log-probabilities of raw logits: ``log_prob`` [R] of a token each; the k likeliest tokens ``top`` [R, k] with theirs, ``log_probs`` [R, k]."""

    log_prob: Tensor
    top: Tensor
    log_probs: Tensor


def log_probs_of(logits: Tensor, tokens: Tensor, k: int) -> Likely:
    """After ``logits`` [R, V]: of ``tokens`` [R], and of the k likeliest; of fixed shape, as ``pick`` is."""
    logits = logits.float()
    total = logits.logsumexp(1, keepdim=True)
    top = logits.topk(min(k, logits.shape[1]))
    return Likely((logits.gather(1, tokens[:, None]) - total).squeeze(1), top.indices, top.values - total)


def told(tokens: Tensor, likely: Likely, most: Sequence[int | None]) -> list[Chance]:
    """``tokens`` [R] with their chances, and of as many of the likeliest as ``most`` says of each; one read of the device."""
    k = likely.top.shape[1]
    columns = torch.cat(
        [tokens[:, None].double(), likely.log_prob[:, None].double(), likely.top.double(), likely.log_probs.double()], 1
    )
    found = []
    for (token, log_prob, *rest), m in zip(columns.tolist(), most, strict=True):
        top = zip(map(int, rest[:k]), rest[k:], strict=True)
        found.append(Chance(int(token), log_prob, list(itertools.islice(top, m or 0))))
    return found


def chances(logits: Tensor, tokens: Tensor, most: Sequence[int | None]) -> list[Chance]:
    """``told`` of ``log_probs_of``."""
    return told(tokens, log_probs_of(logits, tokens, max((m or 0 for m in most), default=0)), most)


def draw(
    logits: Tensor,
    uniforms: Sequence[float],
    forced: Sequence[int],
    samplings: Sequence[Sampling],
    texts: Sequence[Text],
    ends: Collection[int],
) -> list[Chance]:
    """``pick`` for rows of ``logits`` [R, V], each by its own sampling behind its text, and what the chances were."""
    sent = torch.tensor([uniforms, forced], dtype=torch.float64).to(logits.device, non_blocking=True)
    rules = Rules.of(samplings, texts, ends, logits.shape[1], logits.device)
    tokens = pick(logits, sent[0], sent[1].long(), rules, Uses.of(samplings), head_first=logits.device.type == "cpu")
    return chances(logits, tokens, [s.logprobs for s in samplings])
