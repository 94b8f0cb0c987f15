"""Many answers to many questions, quickly: what answers have in common is decoded once.

Three things make it faster than ``generate`` with ``num_return_sequences``:

* Draws that agree so far are one row. A row stands for ``k`` of a question's draws; each draws its own next token from the
  row's one distribution, and the row forks where they differ. Every draw is distributed as if decoded alone.
* What all prompts begin with (worked examples, a system prompt) is prefilled once and kept once: attention reads it as one
  matrix product for all rows.
* A row that ends makes room at once, for a fork or for the next question; nothing is padded to the longest answer.

That is why it does not share the decoding of ``engines.hf``, where every draw is a row: for 16 draws of each of 16 sums behind worked
examples (temperature 0.8, the embedded model in float32) that engine was fed 10,911 to 10,933 tokens and this sampler 1,331 to 1,422, for
the same 256 answers to the token, in a ninth to a tenth of its time, on one thread of a CPU that others used too.
"""

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TopPLogitsWarper

from ..engines.hf.backbone import Backbone
from ..engines.hf.internals import (
    cache_argument,
    can_exchange_attention,
    causal_mask_function,
    exchange_attention,
    register_attention,
    state_argument,
    state_in,
)
from ..engines.hf.kv import check_rows_apart
from ..engines.hf.tap import ModelTap
from ..search.text import TAIL
from ..utils.patterns import search

_ATTENTION = "reflective_shared_prefix"
_HARMLESS = ("position_ids", "position_embeddings", "cache_position", "use_cache")  # what attention may be told besides
_PIECE = 32  # rows drawn for at a time on a CPU: their float32 logits (6 MB each copy, SmolLM2) stay in cache
_HEAD = 256  # likeliest tokens of a row that are looked at before its whole vocabulary is sorted
_BLOCK = 256  # probabilities summed together before one is looked for, see ``_choose``


@dataclass
class Draw:
    """One of the different responses to a question.

    Attributes:
        token_ids: of the response, the end-of-sequence token included where there was one.
        count: how many of the question's draws came out so.
        finished: ``"stop"`` or ``"length"``.
        log_prob: sum of the log-probabilities of its tokens at temperature 1; NaN unless asked for.
    """

    token_ids: list[int]
    count: int
    finished: str
    log_prob: float
    _states: list[tuple[Tensor, int]] = field(repr=False)

    def state(self, token: int) -> Tensor:
        """[layers, H]: what was computed from response token ``token``; -1 is the prompt's last token.

        Raises:
            IndexError: the last token, which was never fed, or none of the response's.
        """
        if token < -1:
            raise IndexError(f"token={token}: states begin with the prompt's last token, -1")
        chunk, row = self._states[token + 1]
        return chunk[row]

    def forget(self) -> None:
        """Let go of the states: one of them keeps those of all rows that were decoded beside it."""
        self._states.clear()


@dataclass
class _Row:
    """Draws of one question that agree so far, each its generator of uniforms. ``fed``: its tokens in the buffers, those of
    the common prefix left out."""

    question: int
    draws: list[np.random.Generator]
    fed: int
    tokens: list[int] = field(default_factory=list)
    states: list[tuple[Tensor, int]] = field(default_factory=list)
    log_prob: float = 0.0

    def fork(self, draws: list[np.random.Generator]) -> "_Row":
        return _Row(self.question, draws, self.fed, list(self.tokens), list(self.states), self.log_prob)


class Sampler:
    """Draws responses of ``model``, which is as it was whenever the caller has the control.

    Args:
        model: in evaluation mode, on one device. Its attention goes through transformers' interface, is causal, and has no
            windows, sinks or soft caps.
        ends: token ids that end a response; stop: regular expression that ends it, looked for in its newest tokens.
        max_new_tokens: of a response.
        temperature, top_p: 0 decodes greedily.
        batch_rows: rows decoded together, about; at most four times as many, or as one question has samples.
        layers: whose input states are kept, as indices of ``hidden_states``; -2 is what the SPRM reads.
        log_probs: keep them, at the price of one more pass over the logits.

    Attributes:
        forwards, tokens: of all runs, the model's calls and what it was fed.

    Raises:
        ValueError: bad settings; a model that it cannot run. What no configuration tells is seen in the first forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ends: set[int],
        stop: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.6,
        top_p: float = 0.95,
        batch_rows: int = 256,
        layers: Sequence[int] = (-2,),
        log_probs: bool = False,
    ) -> None:
        least = {"max_new_tokens": (max_new_tokens, 1), "batch_rows": (batch_rows, 1), "temperature": (temperature, 0)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{name}={value} must be at least {bound}")
        name, self.inputs = type(model).__name__, inspect.signature(type(model).forward).parameters
        check_rows_apart(model)
        if not can_exchange_attention(model):
            raise ValueError(f"model: the attention of {name} cannot be exchanged; sample with generate")
        if "position_ids" not in self.inputs:
            raise ValueError(f"model: {name} takes no position_ids; sample with generate")
        if len({weight.device for weight in model.parameters()}) > 1:
            raise ValueError(f"model: the weights of {name} are on several devices; sample with generate")
        self.model, self.tokenizer, self.ends, self.cache_name = model, tokenizer, ends, cache_argument(model)
        self.stop = stop
        self.max_new_tokens, self.temperature, self.batch_rows = max_new_tokens, temperature, batch_rows
        self.warp = TopPLogitsWarper(top_p) if temperature and top_p < 1 else None
        self.backbone, self.log_probs = Backbone.of(model), log_probs
        n = len(self.backbone.layers)
        self.layers = [layer + n + 1 if layer < 0 else layer for layer in layers]
        if not all(0 <= layer <= n for layer in self.layers):
            raise ValueError(f"layers={list(layers)}: the model has hidden_states 0 to {n}, or -1 to {-n - 1}")
        self.forwards = self.tokens = 0

    def run(self, prompts: Sequence[Sequence[int]], samples: int, seed: int = 0) -> Iterator[tuple[int, list[Draw]]]:
        """Answer every prompt ``samples`` times; yields ``(prompt's index, its draws)`` as prompts are done.

        Draw ``s`` of prompt ``q`` takes a uniform a token from ``default_rng([seed, q, s])``, as
        ``ReflectiveModel.generate`` does: its text does not depend on what else is decoded.

        Raises:
            ValueError: an empty prompt, ``samples`` below 1; a model in training mode, with a scorer attached, or whose
                attention is not what ``Sampler`` says.
        """
        if samples < 1 or not prompts or not all(len(p) for p in prompts):
            raise ValueError(f"samples={samples}, {len(prompts)} prompts: at least one of each, and no empty prompt")
        shared = _common(prompts)
        cache = RowCache(self._prefix(list(prompts[0][:shared])) if shared else [])
        waiting, rows = list(range(len(prompts)))[::-1], []
        done: dict[int, list[Draw]] = {}
        missing: dict[int, int] = {}  # draws that have not ended
        while waiting or rows:
            room = min(self.batch_rows - len(rows), (4 * self.batch_rows - sum(missing.values())) // samples)
            new = min(len(waiting), room)
            if new > 0 and (new >= self.batch_rows // 8 or new == len(waiting)) or not rows:
                chosen, first = [waiting.pop() for _ in range(max(1, new))], len(rows)
                feed = [list(prompts[q][shared:]) for q in chosen]
                for q in chosen:
                    missing[q], done[q] = samples, []
                rows += [_Row(q, [np.random.default_rng([seed, q, s]) for s in range(samples)], fed=0) for q in chosen]
            else:
                feed, first = [r.tokens[-1:] for r in rows], 0
            logits, states = self.feed(feed, rows, first, shared, cache)
            rows, ended = self._advance(rows, first, logits, states, cache)
            for r, how in ended:
                done[r.question].append(Draw(r.tokens, len(r.draws), how, r.log_prob, r.states))
                missing[r.question] -= len(r.draws)
                if not missing[r.question]:
                    del missing[r.question]
                    yield r.question, done.pop(r.question)

    def _prefix(self, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [heads, P, size] of ``ids``, layer by layer."""
        cache = DynamicCache()
        self._call([ids], cache)
        held = [(layer.keys[0], layer.values[0]) for layer in cache.layers if layer.keys is not None]
        self._check_attended(len(held))
        return held

    def _check_attended(self, n: int) -> None:
        if n != len(self.backbone.layers):
            raise ValueError(
                f"model: {n} of the {len(self.backbone.layers)} layers of {type(self.model).__name__} attend through "
                "transformers' attention interface, each with keys of its own; sample with generate"
            )

    def feed(
        self, feed: list[list[int]], rows: list[_Row], first: int, shared: int, cache: "RowCache"
    ) -> tuple[Tensor, Tensor]:
        """Feed slots ``first`` and following: logits [R, V] behind the last token of each, its states [R, layers, H]."""
        rows, width = rows[first:], max(map(len, feed))
        # Every row ends in the last column. What fills up a shorter one is written behind it, where nobody looks.
        column = torch.tensor(
            [
                [*range(r.fed + len(f), r.fed + width), *range(r.fed, r.fed + len(f))]
                for r, f in zip(rows, feed, strict=True)
            ],
            device=self.backbone.device,
        )
        cache.place(first, column, max(r.fed for r in rows) + width)
        with self._listening() as heard:
            try:
                logits = self._call([[0] * (width - len(f)) + f for f in feed], cache, position_ids=column + shared)
            except (AttributeError, TypeError) as error:  # it gets no keys back from the cache
                raise ValueError(
                    f"model: {type(self.model).__name__} does not hand its keys on as the cache gave them ({error}); "
                    "sample with generate"
                ) from error
        self._check_attended(cache.attended)
        for r, f in zip(rows, feed, strict=True):
            r.fed += len(f)
        return logits, torch.stack([heard[n][:, -1] for n in self.layers], 1) if self.layers else logits[:, :0]

    @torch.no_grad()
    def _call(self, ids: list[list[int]], cache: DynamicCache, **given: Tensor) -> Tensor:
        """Logits [R, V] after the last of ``ids``."""
        if self.model.training:
            raise ValueError("model: it is in training mode, and would be sampled with dropout; call model.eval()")
        if ModelTap.of(self.model):
            raise ValueError("model: a StreamScorer is attached, which cannot follow rows that fork; leave it first")
        if "logits_to_keep" in self.inputs:
            given["logits_to_keep"] = 1
        self.forwards, self.tokens = self.forwards + 1, self.tokens + sum(map(len, ids))
        ids = torch.tensor(ids, device=self.backbone.device)
        return self.model(input_ids=ids, **{self.cache_name: cache}, use_cache=True, **given).logits[:, -1]

    @contextmanager
    def _listening(self) -> Iterator[dict[int, Tensor]]:
        """Within, attention is ours, and what enters the layers asked for is heard: [R, q, H] each."""
        layers, decoder, heard = self.backbone.layers, self.backbone.decoder, {}

        def hear(n: int, hidden: Tensor) -> None:
            heard[n] = hidden

        hooks = [decoder.register_forward_hook(lambda module, args, output: hear(len(layers), output[0]))]
        size = self.backbone.hidden_size
        for n in set(self.layers) - {len(layers)}:
            name = state_argument(layers[n])
            hook = lambda module, args, given, n=n, name=name: hear(n, state_in(name, size, args, given))
            hooks.append(layers[n].register_forward_pre_hook(hook, with_kwargs=True))
        before = exchange_attention(decoder, _ATTENTION)
        try:
            yield heard
        finally:
            exchange_attention(decoder, before)
            for hook in hooks:
                hook.remove()

    def _advance(
        self, rows: list[_Row], first: int, logits: Tensor, states: Tensor, cache: "RowCache"
    ) -> tuple[list[_Row], list[tuple[_Row, str]]]:
        """Draw for the rows from ``first`` on, fork and end them: those that go on, by their new slots, and the ended."""
        fed = rows[first:]
        size = _PIECE if logits.device.type == "cpu" else len(fed)
        pieces = (self._draw(fed[i : i + size], logits[i : i + size]) for i in range(0, len(fed), size))
        drawn = itertools.chain.from_iterable(pieces)
        heirs = [(r, i) for i, r in enumerate(rows[:first])]  # that go on, beside the slot whose keys they need
        ended: list[tuple[_Row, str]] = []
        for i, r in enumerate(fed):
            r.states.append((states, i))
            groups: dict[int, tuple[float, list[np.random.Generator]]] = {}
            for draw, (token, log_prob) in zip(r.draws, drawn, strict=False):
                groups.setdefault(token, (log_prob, []))[1].append(draw)
            for token, (log_prob, draws) in groups.items():
                child = r if len(groups) == 1 else r.fork(draws)
                child.tokens.append(token)
                child.log_prob += log_prob
                if how := self._ends(child):
                    ended.append((child, how))
                else:
                    heirs.append((child, first + i))
        return cache.arrange(heirs), ended

    def _ends(self, row: _Row) -> str | None:
        if row.tokens[-1] in self.ends:
            return "stop"
        if self.stop and search(self.stop, self.tokenizer.decode(row.tokens[-TAIL:], skip_special_tokens=True)):
            return "stop"
        return "length" if len(row.tokens) >= self.max_new_tokens else None

    def _draw(self, rows: list[_Row], logits: Tensor) -> list[tuple[int, float]]:
        """A token for every draw of ``rows``, and its log-probability."""
        chance = [draw.random() for r in rows for draw in r.draws]
        owner = torch.tensor([i for i, r in enumerate(rows) for _ in r.draws], device=logits.device)
        logits = logits.float()
        if self.temperature:
            tokens = self._choose(logits, owner, torch.tensor(chance, dtype=torch.float64, device=logits.device))
        else:
            tokens = logits.argmax(-1)[owner]
        if not self.log_probs:
            return [(token, math.nan) for token in tokens.tolist()]
        log_prob = logits[owner, tokens] - logits.logsumexp(-1)[owner]
        return list(zip(tokens.tolist(), log_prob.tolist(), strict=True))

    def _choose(self, logits: Tensor, owner: Tensor, chance: Tensor) -> Tensor:
        """Token [S] at the uniform ``chance`` [S] of the cumulative distribution of ``logits[owner]``.

        Blocks of 256 probabilities are summed first, and only the block that holds the token is looked through: one pass
        over the vocabulary in float32, where a cumulative sum in float64 takes eight times as long on a CPU.
        """
        warped = logits / self.temperature
        if self.warp:
            warped = self._nucleus(warped)
        weight = warped.sub_(warped.amax(-1, keepdim=True)).exp_()
        weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % _BLOCK)).view(len(weight), -1, _BLOCK)
        ahead = weight.sum(-1).double().cumsum(-1)[owner]  # [S, blocks]
        target = chance[:, None] * ahead[:, -1:]
        # What NaN logits lead to is clamped: they sum to no distribution.
        block = torch.searchsorted(ahead, target, right=True).clamp_max(ahead.shape[1] - 1)
        before = torch.where(block > 0, ahead.gather(1, (block - 1).clamp_min(0)), 0.0)
        within = weight[owner, block[:, 0]].double().cumsum(-1)
        # Of a block's sum in float32 and in float64 the one may be the larger: never beyond the last that can be drawn.
        inside = torch.minimum(target - before, within[:, -1:] * (1 - 1e-12))
        return (block * _BLOCK + torch.searchsorted(within, inside, right=True))[:, 0].clamp_max(logits.shape[1] - 1)


    def _nucleus(self, logits: Tensor) -> Tensor:
        """``self.warp`` of ``logits`` [R, V], without a sort of the vocabulary for rows whose likeliest tokens come to ``top_p``.

        On one thread of a CPU, 32 rows over a vocabulary of 49,152: 174 ms by the sort, 12 ms so.
        """
        head, ids = logits.topk(min(_HEAD, logits.shape[1]))  # descending
        p = (head - logits.logsumexp(-1, keepdim=True)).exp()
        upto = p.cumsum(-1)
        outside = upto - p >= self.warp.top_p
        outside[:, 0] = False
        kept = torch.full_like(logits, -math.inf).scatter_(1, ids, head.masked_fill(outside, -math.inf))
        wide = upto[:, -1] < self.warp.top_p + 1e-4  # or so near that rounding decides
        if wide.any():
            kept[wide] = self.warp(None, logits[wide])
        return kept


class RowCache(DynamicCache):
    """Keys and values: ``prefix`` once, and of every row what is its own, in slots of [rows, heads, width, size]."""

    def __init__(self, prefix: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.prefix = prefix
        self.own: list[tuple[Tensor, Tensor]] = []

    def place(self, first: int, column: Tensor, width: int) -> None:
        """The next forward is of slots from ``first`` on, its tokens at ``column`` [n, q]."""
        self.first, self.end, self.column, self.width = first, first + len(column), column, width
        self.row = torch.arange(first, self.end, device=column.device)[:, None]
        self.mask = torch.arange(width, device=column.device) > column[:, :, None]  # [n, q, width]
        self.attended = 0  # layers of this forward

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == len(self.own):
            self.own.append((_roomy(key_states, self.end, self.width), _roomy(value_states, self.end, self.width)))
        pair = self.own[layer_idx]
        if pair[0].shape[0] < self.end or pair[0].shape[2] < self.width:
            pair = self.own[layer_idx] = tuple(_grown(old, self.end, self.width) for old in pair)
        for buffer, new in zip(pair, (key_states, value_states), strict=True):
            buffer[self.row, :, self.column] = new.transpose(1, 2)
        return (self, layer_idx), None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def arrange(self, heirs: list[tuple[_Row, int]]) -> list[_Row]:
        """Put rows into slots 0 to n, each beside the slot whose keys it needs; as few are copied as possible."""
        seats: list[_Row | None] = [None] * len(heirs)
        late: list[tuple[_Row, int]] = []
        for row, slot in heirs:
            if slot < len(seats) and seats[slot] is None:
                seats[slot] = row
            else:
                late.append((row, slot))
        free = [i for i, row in enumerate(seats) if row is None]
        for i, (row, _) in zip(free, late, strict=True):
            seats[i] = row
        if late:
            device, width = self.column.device, max(row.fed for row, _ in late)
            target = torch.tensor(free, device=device)
            source = torch.tensor([slot for _, slot in late], device=device)
            for layer, pair in enumerate(self.own):
                if pair[0].shape[0] < len(seats):
                    pair = self.own[layer] = tuple(_grown(old, len(seats), old.shape[2]) for old in pair)
                for buffer in pair:
                    buffer[target, :, :width] = buffer[source, :, :width]
        return seats

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Attention of ``query`` [n, heads, q, size] to prefix and own keys: [n, q, heads, size]."""
        self.attended += 1
        n, heads, q, size = query.shape
        keys, values = (x[self.first : self.end, :, : self.width] for x in self.own[layer])
        kv, wide = keys.shape[1], torch.promote_types(query.dtype, torch.float32)
        query = query.reshape(n, kv, heads // kv * q, size)
        own = (query @ keys.transpose(-1, -2)).to(wide).view(n, kv, -1, q, self.width) * scaling
        own = own.masked_fill(self.mask[:, None, None], -math.inf).view(n, kv, -1, self.width)
        if not self.prefix:
            out = own.softmax(-1).to(values.dtype) @ values
        else:
            shared_keys, shared_values = self.prefix[layer]
            turned = query.transpose(0, 1).reshape(kv, -1, size)  # all rows beside each other: one product a head
            shared = (turned @ shared_keys.transpose(-1, -2)).to(wide) * scaling
            shared = shared.view(kv, n, -1, shared.shape[-1]).transpose(0, 1)
            weights = torch.cat([shared, own], -1).softmax(-1).to(values.dtype)
            cut = shared.shape[-1]
            out = weights[..., cut:] @ values
            others = weights[..., :cut].transpose(0, 1).reshape(kv, -1, cut) @ shared_values
            out = out + others.view(kv, n, -1, values.shape[-1]).transpose(0, 1)
        return out.reshape(n, heads, q, values.shape[-1]).transpose(1, 2)


def _attention(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    told = {name: given for name, given in kwargs.items() if name not in _HARMLESS} | {"a mask": attention_mask}
    for name, given in told.items():
        if isinstance(given, Tensor) or given:
            raise ValueError(f"model: {type(module).__name__} attends with {name}; sample with generate")
    cache, layer = key
    return cache.attend(layer, query, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _no_mask(*args: Any, mask_function: Any = causal_mask_function, **kwargs: Any) -> None:
    """Where a model asks for its attention mask; ``RowCache`` has the causal one."""
    if mask_function is not causal_mask_function:
        raise ValueError("model: not every token attends to all before it, and to these only; sample with generate")


register_attention(_ATTENTION, _attention, _no_mask)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; each keeps one of its own at least."""
    low, high = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    return next((i for i, (a, b) in enumerate(zip(low[:most], high, strict=False)) if a != b), most)


def _roomy(like: Tensor, rows: int, width: int) -> Tensor:
    return like.new_zeros(rows + rows // 4, like.shape[1], width + 32, like.shape[3])


def _grown(old: Tensor, rows: int, width: int) -> Tensor:
    """A larger copy. Zeros where nothing was written: what a mask hides must not be NaN."""
    rows = max(old.shape[0], rows + rows // 4 if rows > old.shape[0] else 0)
    width = max(old.shape[2], width + 32 if width > old.shape[2] else 0)
    new = old.new_zeros(rows, old.shape[1], width, old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
