"""Tokens and their chances from logits: each draw one read of the device, whatever the batch."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from ..base import Chance, Sampling


def draw(
    logits: Tensor, uniforms: Sequence[float], forced: Sequence[int], samplings: Sequence[Sampling]
) -> list[Chance]:
    """A token for every row of ``logits`` [R, V], each by its own sampling.

    Args:
        uniforms: [R] in [0, 1): token i is where the distribution function of row i exceeds ``uniforms[i]``.
        forced: [R], the token that it is to be instead, or -1.
    """
    sent = torch.tensor([uniforms, forced], dtype=torch.float64).to(logits.device, non_blocking=True)
    logits = logits.float()
    ways = [(s.temperature, s.top_p) for s in samplings]
    tokens = torch.empty(len(ways), 1, dtype=torch.int64, device=logits.device)
    for way in dict.fromkeys(ways):
        rows = [i for i, other in enumerate(ways) if other == way]
        part = slice(None) if len(rows) == len(ways) else torch.tensor(rows, device=logits.device)
        tokens[part] = _drawn(logits[part], sent[0, part], *way)
    tokens = tokens.clamp_max(logits.shape[1] - 1)  # NaN logits sum to no distribution
    tokens = torch.where(sent[1, :, None] < 0, tokens, sent[1, :, None].long())
    return chances(logits, tokens, [s.logprobs for s in samplings])


def _drawn(logits: Tensor, chance: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [R, 1]: of logits [R, V] the distribution's inverse at ``chance`` [R] in [0, 1), float64."""
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    logits = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(float(top_p))(None, logits)
    # float64: a float32 sum over the vocabulary would round away probabilities below 6e-8.
    cdf = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    return torch.searchsorted(cdf, chance[:, None] * cdf[:, -1:], right=True)


def chances(logits: Tensor, tokens: Tensor, most: Sequence[int | None]) -> list[Chance]:
    """Of ``tokens`` [R, 1], and of as many of the likeliest as ``most`` says of each, after float32 ``logits`` [R, V]; one read
    of the device."""
    total = logits.logsumexp(1, keepdim=True)
    columns = [tokens.double(), (logits.gather(1, tokens) - total).double()]
    k = min(max((m or 0 for m in most), default=0), logits.shape[1])
    if k:
        top = logits.topk(k)
        columns += [top.indices.double(), (top.values - total).double()]
    found = []
    for (token, log_prob, *likely), m in zip(torch.cat(columns, 1).tolist(), most, strict=True):
        top = zip(map(int, likely[:k]), likely[k:], strict=True)
        found.append(Chance(int(token), log_prob, list(itertools.islice(top, m or 0))))
    return found
