"""How a model attends from seats: one token a seat, on keys that stay where they are, and on prompts that several seats share."""

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .internals import register_attention

NAME = "reflective_seats"
# What attention may be told besides.
_HARMLESS = ("position_ids", "position_embeddings", "cache_position", "use_cache", "dropout", "is_causal")

_HERE = threading.local()  # ``calls``: of ``attend`` by this thread, with shared prompts and without


class Unseatable(Exception):
    """Why a model's sequences cannot have seats."""


@dataclass
class Shared:
    """Prompts that are kept once, and read by all whose prompt they are.

    Attributes:
        prompts: by layer, of each prompt keys and values [groups, P, width].
        reads: [S] int64, which of the prompts a seat has before its own tokens; -1 for none.
    """

    prompts: list[list[tuple[Tensor, Tensor]]]
    reads: Tensor


def takes_shared(model: PreTrainedModel) -> bool:
    """Whether the model may be called with ``shared_prompts``; that it hands them on to its layers remains to be seen."""
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def calls() -> list[int]:
    """How often this thread has attended, with ``shared_prompts`` and without: [without, with]."""
    if not hasattr(_HERE, "calls"):
        _HERE.calls = [0, 0]
    return _HERE.calls


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    shared_prompts: Shared | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Of a token a seat, query [S, heads, 1, D], on keys [S, groups, C, D], of which a mask [S, 1, 1, C] says which there are: it is
    added to the scores, 0 or -inf.

    The heads of a group are rows of one product, so that keys and values are read where they lie, not copied for each head; with a
    shared prompt those of all seats are, so that it is read once.
    """
    for name, given in kwargs.items():
        if name not in _HARMLESS and (isinstance(given, Tensor) or given):
            raise Unseatable(f"{type(module).__name__} attends with {name}")
    seats, heads, q, width = query.shape
    if q != 1 or attention_mask is None or attention_mask.dim() != 4:
        raise Unseatable(f"{type(module).__name__} attends to {q} tokens at once, or without the mask that it was given")
    if not torch.compiler.is_compiling():
        calls()[shared_prompts is not None] += 1
    groups = key.shape[1]
    grouped = query.reshape(seats, groups, heads // groups, width)
    if shared_prompts is None or not (prompts := shared_prompts.prompts[module.layer_idx]):
        mask = attention_mask.to(query.dtype)  # as it is, but under autocast
        out = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    else:
        scale = width**-0.5 if scaling is None else scaling
        out = _on_all(grouped, key, value, attention_mask, prompts, shared_prompts.reads, scale)
    return out.reshape(seats, 1, heads, value.shape[-1]), None


def _on_all(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prompts: list[tuple[Tensor, Tensor]], reads: Tensor, scale: float
) -> Tensor:  # fmt: skip
    """[S, groups, R, width]: on each of the prompts and on a seat's own keys apart, then weighed by their shares of the whole.

    A seat attends to prompts of others too, with weight 0: a prompt's keys are read from memory once however many do.
    """
    S, G, R, D = query.shape
    together = query.transpose(0, 1).reshape(G, S * R, D)
    parts = [_on(query, key, value, scale, mask)]
    for i, (k, v) in enumerate(prompts):
        out, highest, total = (x.unflatten(1, (S, R)).transpose(0, 1) for x in _on(together, k, v, scale))
        parts.append((out, highest.masked_fill((reads != i)[:, None, None, None], -torch.inf), total))
    outs, highest, totals = map(torch.stack, zip(*parts, strict=True))  # [parts, S, G, R, width], and twice [parts, S, G, R, 1]
    weights = totals * (highest - highest.amax(0)).exp()
    return ((weights / weights.sum(0)) * outs).sum(0).to(query.dtype)


def _on(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of ``query`` [..., N, D] on ``key`` [..., C, D]; the highest score of each [..., N, 1]; and the sum, over the keys, of
    exp(score - highest)."""
    scores = _product(query * scale, key.transpose(-1, -2))
    if mask is not None:
        scores = scores.add_(mask)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights.div_(total).to(value.dtype) @ value).to(scores.dtype), highest, total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of 16-bit numbers not rounded to 16 bits: a score of 40 in bfloat16 is wrong by up to 0.125."""
    if a.dtype.itemsize > 2:
        return a @ b
    if a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32).reshape(*a.shape[:-1], b.shape[-1])


def _mask_as_it_is(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask


def register() -> None:
    """Have transformers know ``attend`` under ``NAME``."""
    register_attention(NAME, attend, _mask_as_it_is)


register()
