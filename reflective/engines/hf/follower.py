"""Plain generations: one batch, followed by its key-value cache through prompts, drafts and reordered rows."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import internals
from .lineage import Lineage
from .prompts import Prompts, left_padding
from .stream import Mark, Stream

NO_CACHE = "StreamScorer needs the KV cache (use_cache=True); for finished text use rf.score"


@dataclass
class _Draft:
    """A forward of several tokens after the prompt, and where the stream was before it."""

    mark: Mark
    ids: Tensor
    hidden: Tensor


class Follower:
    """What the stream's current generation is doing, by what its cache says.

    A forward's parts are told in this order: ``past``, ``opening``, and, where it opens a generation, ``begin`` and
    ``skip``; ``check``; ``features``.

    Attributes:
        lineage: of beam search; None before it has reordered rows.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._prompt_length = 0
        self._cache: Callable[[], Any] = lambda: None  # weak reference to the cache of the last forward
        self._announced: Prompts | None = None  # the prompts of the next generation
        self._generating = False  # whether a `generate` call is in progress
        self._draft: _Draft | None = None  # the last forward, if the cache may yet be rolled back into it
        self.lineage: Lineage | None = None

    def begin(self, prompt_length: int) -> None:
        """A generation begins."""
        self._prompt_length, self._draft, self.lineage = prompt_length, None, None

    def close(self) -> None:
        """The model is no longer heard."""
        self._generating, self._announced, self._draft = False, None, None

    # -- what is about to come ---------------------------------------------------------------------------------------

    def announce(self, ids: Tensor, attention_mask: Tensor | None) -> Prompts:
        """The prompts [B, P] of the next generation, by the user."""
        pad = left_padding(ids, attention_mask, self._stream.backbone.device)
        self._announced = Prompts(ids, pad, by_user=True)
        return self._announced

    def forget_announced(self) -> None:
        """The next forward goes on with the generation that is there."""
        self._announced = None

    def refuse(self, arguments: dict[str, Any]) -> None:
        """Raise ValueError for a ``generate`` call with these arguments that cannot be followed."""
        given, stream = self._given(arguments), self._stream
        ids = arguments.get("input_ids", arguments.get("inputs"))
        if ids is None and arguments.get("inputs_embeds") is not None:
            raise ValueError("StreamScorer reads token ids: call generate with input_ids, not inputs_embeds")
        if given("use_cache") is False:
            raise ValueError(NO_CACHE)
        if stream.record_features and (given("num_beams") or 1) > 1:
            raise ValueError("record_features=True cannot follow beam search (num_beams > 1); sample, or leave it out")
        on_gpu = stream.backbone.device.type == "cuda"
        graphs = on_gpu and str(given("cache_implementation")).startswith("static")
        if stream.flushes_by_hand and (given("compile_config") or graphs) and not given("disable_compile"):
            why = "record_features=True" if stream.record_features else "process_group"
            raise ValueError(f"{why} needs eager forwards: leave compile_config out or set disable_compile=True")

    def generate(self, arguments: dict[str, Any]) -> None:
        """A ``generate`` call with these arguments begins, and announces its prompts."""
        self._generating = True
        ids, mask = arguments.get("input_ids", arguments.get("inputs")), arguments.get("attention_mask")
        if self._announced is None and isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1]:
            config = arguments.get("generation_config") or self._stream.backbone.model.generation_config
            pad = getattr(config, "pad_token_id", None)
            if mask is None and pad is not None and pad != getattr(config, "eos_token_id", None):
                mask = (ids != pad).long()  # as generate infers it
            if mask is None or mask.shape == ids.shape:  # else the ids are only what is new
                mask = None if mask is None or mask.all() else mask
                self._announced = Prompts(ids, left_padding(ids, mask, self._stream.backbone.device))

    def generated(self) -> None:
        """The ``generate`` call is over; what it announced and never decoded is void."""
        self._generating = False
        if self._announced is not None and not self._announced.by_user:
            self._announced = None

    def _given(self, arguments: dict[str, Any]) -> Callable[[str], Any]:
        config = arguments.get("generation_config") or self._stream.backbone.model.generation_config
        return lambda name: arguments.get(name, getattr(config, name, None))

    # -- forwards ----------------------------------------------------------------------------------------------------

    def past(self, cache: Any, new: int) -> int:
        """Tokens in the cache before a forward of ``new`` tokens."""
        if cache is None:
            return 0
        # A static cache counts on the device: asking it at every token would stall the host. What it would tell of a
        # rolled-back cache, the ids' hash tells when the result is asked for.
        if new == 1 and self._stream.seen and internals.counts_on_device(cache) and self._cache() is cache:
            return self._stream.seen
        self._cache = weakref.ref(cache)
        return int(cache.get_seq_length())

    def opening(self, ids: Tensor, past: int, given: dict[str, Any]) -> Prompts | None:
        """The prompts of the generation that begins with the forward of ``ids`` [B, q]: those announced, which may stand there
        several times in a row each (their padding is that of all B), or its own. None if it goes on with one."""
        prompts = self._announced
        if prompts is not None:
            if len(ids) % len(prompts.ids):
                raise RuntimeError(f"this forward has {len(ids)} sequences, {len(prompts.ids)} prompts were announced")
            self._announced = None
            return Prompts(prompts.ids, prompts.pad.repeat_interleave(len(ids) // len(prompts.ids)))
        if past:
            return None
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        return Prompts(ids, left_padding(ids, mask, self._stream.backbone.device, positions))

    def skip(self, prompts: Prompts, past: int) -> None:
        """Consume the first ``past`` columns of announced prompts, whose states are in the cache only."""
        if not past:
            return
        stream, ids = self._stream, prompts.ids
        if stream.scope == "text":
            raise ValueError("scope='text' scores the prompt too, so no part of it may be in the cache beforehand")
        if past >= ids.shape[1]:
            raise ValueError(
                f"the cache holds {past} tokens, all of the announced prompt; leave at least one to decode"
            )
        ids = ids.repeat_interleave(len(prompts.pad) // len(ids), 0)
        stream.consume(ids[:, :past].to(stream.backbone.device), stream.no_hidden(len(ids), past))

    def check(self, ids: Tensor, past: int) -> None:
        """Raise RuntimeError unless the forward of ``ids`` on ``past`` tokens goes on from what was seen."""
        stream = self._stream
        if past != stream.seen:
            raise RuntimeError(
                f"the cache holds {past} tokens but the scorer has seen {stream.seen}: the cache was filled before the "
                "scorer was attached (announce the whole prompt with scorer.begin), or rolled back by more than the "
                "tokens of its last forward"
            )
        if past >= self._prompt_length and ids.shape[1] > 1 and not self._generating:
            raise RuntimeError(
                f"{ids.shape[1]} tokens at once after the prompt: if the prompt comes in pieces (chunked prefill, a "
                "further turn on the same cache), announce the whole of it with scorer.begin"
            )
        if len(ids) != stream.batch:
            raise RuntimeError(f"this forward has {len(ids)} sequences, the generation began with {stream.batch}")

    def features(self, ids: Tensor, hidden: Tensor) -> None:
        """Consume the forward of ``ids`` [B, q] with states [B, q, H]; what follows the prompt may be a draft."""
        stream = self._stream
        self._draft = None
        rest = max(0, self._prompt_length - stream.seen)  # of the prompt
        if ids.shape[1] > max(1, rest):
            if rest:
                stream.consume(ids[:, :rest], hidden[:, :rest])
                ids, hidden = ids[:, rest:], hidden[:, rest:].clone()
            self._draft = _Draft(stream.mark(), ids, hidden)
        stream.consume(ids, hidden)

    def forget_draft(self) -> None:
        """The cache can no longer be followed back into the last forward."""
        self._draft = None

    # -- what is done to the cache -----------------------------------------------------------------------------------

    def select(self, indices: Tensor, reorder: bool) -> None:
        """Row i of the cache is now what row ``indices[i]`` was; ``indices`` may be a mask of the rows that stay."""
        stream = self._stream
        stream.settle()
        indices = indices.to(stream.backbone.device)
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices.long()
        if reorder:
            self.lineage = self.lineage or Lineage()
            self.lineage.record(stream.state, stream.seen, indices)
        stream.select(indices)
        self._draft = None

    def crop(self, length: int) -> None:
        """The cache now holds ``length`` tokens."""
        draft = self._draft
        # Further back it cannot follow; the next forward, if it goes on from there, says so.
        if draft is None or not draft.mark.seen <= length < self._stream.seen:
            return
        self._stream.rewind(draft.mark)
        kept = length - draft.mark.seen
        self._stream.consume(draft.ids[:, :kept], draft.hidden[:, :kept])
