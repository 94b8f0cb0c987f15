"""StreamScorer: scores a model's reasoning while the model decodes it."""

import inspect
import time
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import Self

from .backbone import Backbone
from .backend import Backend
from .parallel import ShardedHead
from .scores import TrajectoryScores
from .sprm import SPRM
from .state import StreamState, hash_ids
from .steps import StepTokens, padding

Schedule = Literal["deferred", "immediate"]
At = Literal["predict", "token"]


class StreamScorer:
    """Scores every sequence that ``model`` decodes while attached.

    ::

        with rf.StreamScorer(model, head, steps) as scorer:
            out = model.generate(**inputs, do_sample=True, num_return_sequences=8)
        scores = scorer.result(out)

    Two hooks do it: one on the model's forward takes the token ids, one on its last layer takes the hidden states that
    enter it. Each forward costs one op, ``torch.ops.reflective.decode_step``; nothing is run twice. A forward with an
    empty cache starts afresh, so one scorer serves any number of ``generate`` calls, one after the other. Several
    scorers may be attached to one model; none knows of the others.

    Args:
        model: a decoder-only transformers model.
        head: the SPRM, of the model's hidden size and dtype. Its weights are read when the scorer is attached.
        steps: which tokens end a step.
        schedule: ``"deferred"`` scores in batches, when the buffer fills or a result is asked for; ``"immediate"`` has every
            step's score when its forward ends. The scores are the same to the bit.
        at: ``"predict"`` reads the state that predicted the step-token (published checkpoints), ``"token"`` its own.
        scope: ``"response"`` scores what is generated, ``"text"`` the prompt too.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; None takes the fastest for the model's device.
        buffer_rows: rows of the deferred buffer. With a ``process_group`` the buffer is taken for full as soon as it could
            be, after ``buffer_rows`` decoded tokens, and all of its rows go through the head, as the host does not know
            which hold a step.
        max_steps: steps a sequence whose single scores are kept; further ones still count in the trajectory's score.
            16,384 are enough for 32k generated tokens, as steps are never adjacent.
        record_features: keep the feature of every step that is scored, for training (``features``). Costs a look at a
            device-side counter whenever the buffer could be full, and every forward if ``"immediate"``.
        w1_dtype: of the head's first weights: None for the head's own, or ``torch.float8_e4m3fn``, see ``SPRM.weights``.
        process_group: the ranks over which the model is tensor parallel (``tp_plan="auto"``), ``dist.group.WORLD`` for
            instance; None: it is not. Each rank keeps a part of the head, and flushes add up a float a row over the ranks:
            deferred every ``buffer_rows`` tokens, immediate every forward. All ranks must decode the same tokens and ask for
            the same results; they get the same bits.

    Attributes:
        backend: which code does the work (``backend.name``).
        host_seconds: host time spent within the scorer since it was made.

    Raises:
        ValueError: head, steps and model do not fit together, or the model is none that can be scored.
    """

    def __init__(
        self,
        model: nn.Module,
        head: SPRM,
        steps: StepTokens,
        schedule: Schedule = "deferred",
        at: At = "predict",
        *,
        scope: Literal["response", "text"] = "response",
        backend: str | None = None,
        buffer_rows: int = 256,
        max_steps: int = 16_384,
        record_features: bool = False,
        w1_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        one_of("schedule", schedule, ("deferred", "immediate"))
        one_of("at", at, ("predict", "token"))
        one_of("scope", scope, ("response", "text"))
        if buffer_rows < 1 or max_steps < 1:
            raise ValueError(f"buffer_rows={buffer_rows} and max_steps={max_steps} must be at least 1")
        self.backbone = Backbone.of(model)
        self.head, self.schedule, self.at, self.scope = head, schedule, at, scope
        self.steps = check_parts(self.backbone, head, steps)
        pad = getattr(model.generation_config, "pad_token_id", None)
        if steps.step_ids is not None and pad in steps.step_ids:
            # After a sequence's end generate feeds it padding, which must not count as steps.
            raise ValueError(f"steps: the padding token {pad} is a step-token; give the model another pad_token_id")
        self._head = ShardedHead(head, self.backbone, backend, w1_dtype, process_group)
        self.backend: Backend = self._head.backend
        self.buffer_rows, self.max_steps, self.record_features = buffer_rows, max_steps, record_features
        # Whether the buffer must not empty itself: rows are to be kept, or a part of the head cannot score them.
        self._flushes = record_features or process_group is not None
        self._waiting = 0  # if so, no more rows than these wait in the buffer
        self._state: StreamState | None = None
        self._read: StreamState | None = None  # the state that the last result was read from
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._inputs = tuple(inspect.signature(model.forward).parameters)  # names, for positional arguments
        self.host_seconds = 0.0
        self._batch = 0  # sequences of the current generation; 0 before the first
        self._seen = 0  # columns consumed, a host-side twin of the state's SEEN
        self._start = 0  # first column in scope
        self._ids: Tensor | None = None  # of the forward in progress
        self._cache: Callable[[], Any] = lambda: None  # weak reference to the cache of the last forward
        self._announced: Tensor | None = None  # the whole prompt, when `begin` gave it
        self._recorded: list[tuple[Tensor, Tensor]] = []  # (rows, owners) moved out of the buffer
        self._recorded_last: list[tuple[Tensor, Tensor]] = []  # of the token that was never fed back

    # -- attaching ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this StreamScorer is attached already; use one `with` block at a time")
        self._head.load()
        self._handles = [
            self.backbone.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.backbone.on_features(self._on_features),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._ids, self._announced = [], None, None

    # -- the stream --------------------------------------------------------------------------------------------------

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Announce the prompts of the next generation, while attached.

        Needed only where they do not come in one forward on an empty cache: because the cache holds their first columns
        already (what the scorer must know of these, tags and open delimiters, it reads from here), or because they are
        prefilled in pieces.

        Args:
            input_ids: [B, P] int64, the whole prompts.
            attention_mask: [B, P], 0 at left padding.

        Raises:
            ValueError: no prompt, an empty one, or padding that is not on the left.
        """
        self._begin(*_prompt(input_ids, attention_mask, self.backbone.device), prompt_length=input_ids.shape[1])
        self._announced = input_ids

    def _begin(self, batch: int, pad: Tensor, prompt_length: int) -> None:
        state = self._state
        if state is None or len(state.seq) < batch:
            b = self.backbone
            state = self._state = StreamState.allocate(
                batch, b.hidden_size, self.head.width, buffer_rows=max(self.buffer_rows, batch), max_steps=self.max_steps,
                dtype=b.dtype, device=b.device,
            )  # fmt: skip
        self._start = prompt_length if self.scope == "response" else 0
        state.reset(pad, torch.full_like(pad, self._start))
        self._batch, self._seen, self._waiting, self._announced = batch, 0, 0, None
        self._recorded, self._recorded_last = [], []

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        began = time.perf_counter()
        given = dict(zip(self._inputs, args, strict=False)) | kwargs
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        if ids is None:
            raise ValueError("StreamScorer reads token ids: call the model with input_ids, not inputs_embeds")
        if cache is None and given.get("use_cache") is False:
            raise ValueError("StreamScorer needs the KV cache (use_cache=True); for finished text use rf.score")
        past = self._cached(cache, ids.shape[1])
        if past == 0 and (self._announced is None or self._seen):
            batch, pad = _prompt(ids, given.get("attention_mask"), self.backbone.device, given.get("position_ids"))
            self._begin(batch, pad, prompt_length=ids.shape[1])
        elif past > 0 and self._seen == 0 and self._announced is not None:
            self._skip_cached(past)
        if past != self._seen:
            raise RuntimeError(
                f"the cache holds {past} tokens but the scorer has seen {self._seen}: the cache was filled before the "
                "scorer was attached (announce the whole prompt with scorer.begin), or decoded tokens were rolled back"
            )
        if past and ids.shape[1] > 1 and self._announced is None:
            raise RuntimeError(
                f"{ids.shape[1]} tokens at once after the prompt: if the prompt comes in pieces (chunked prefill, a "
                "further turn on the same cache), announce the whole of it with scorer.begin"
            )
        if len(ids) != self._batch:
            raise RuntimeError(f"this forward has {len(ids)} sequences, the generation began with {self._batch}")
        self._ids = ids
        self.host_seconds += time.perf_counter() - began

    def _cached(self, cache: Any, new: int) -> int:
        """Tokens in the cache before this forward."""
        if cache is None:
            return 0
        # A static cache counts on the device: asking it at every token would stall the host. What it would tell of a
        # rolled-back cache, the ids' hash tells when the result is asked for.
        if new == 1 and self._seen and getattr(cache, "is_compileable", False) and self._cache() is cache:
            return self._seen
        self._cache = weakref.ref(cache)
        return int(cache.get_seq_length())

    def _skip_cached(self, past: int) -> None:
        """Consume the announced prompt's first ``past`` columns, whose states are in the cache only."""
        if self.scope == "text":
            raise ValueError("scope='text' scores the prompt too, so no part of it may be in the cache beforehand")
        b = self.backbone
        if past >= self._announced.shape[1]:
            raise ValueError(
                f"the cache holds {past} tokens, all of the announced prompt; leave at least one to decode"
            )
        unknown = torch.zeros(self._batch, 1, b.hidden_size, dtype=b.dtype, device=b.device)
        self._consume(self._announced[:, :past].to(b.device), unknown.expand(-1, past, -1))

    def _on_features(self, hidden: Tensor) -> None:
        if self._ids is None:  # the decoder alone, as rf.score runs it: no part of the stream
            return
        began = time.perf_counter()
        ids, self._ids = self._ids, None
        self._consume(ids.to(hidden.device), hidden.detach())
        self.host_seconds += time.perf_counter() - began

    def _consume(self, ids: Tensor, hidden: Tensor) -> None:
        if not self._flushes:
            self._run(self._state, ids, hidden)
            self._seen += ids.shape[1]
            return
        room, begin, q = len(self._state.slots), 0, ids.shape[1]
        # GPU kernels give the steps of several columns their slots in any order; ranks must agree on it.
        piece = 1 if self._head.group else max(1, room // self._batch)
        while begin < q:
            quiet = self._start - self._seen  # columns before the scope: whatever they hold, no step of it counts
            end = min(begin + (quiet if quiet > 0 else piece), q)
            rows = 0 if quiet > 0 else (end - begin) * self._batch
            if self._waiting + rows > room:
                self._empty()
            self._run(self._state, ids[:, begin:end], hidden[:, begin:end])
            self._seen += end - begin
            self._waiting += rows
            begin = end
        if self.schedule == "immediate":
            self._empty()

    def _run(self, state: StreamState, ids: Tensor, hidden: Tensor) -> None:
        self.backend.decode_step(
            ids, hidden, self.steps.token_class, self.steps.transition, *self._head.weights, *state.tensors(),
            self.at == "predict", self.schedule == "immediate" and not self._flushes,
        )  # fmt: skip

    def _empty(self) -> None:
        self._flush(self._state, self._waiting, self._recorded)
        self._waiting = 0

    def _flush(self, state: StreamState, rows: int, record: list[tuple[Tensor, Tensor]]) -> None:
        """Score the rows in the buffer, ``rows`` at the most; those to be kept go to ``record``."""
        if self.record_features and (n := int(state.n_slots)):
            record.append((state.slots[:n].clone(), state.slot_owner[:n].clone()))
        self._head.flush(state, rows)

    # -- results -----------------------------------------------------------------------------------------------------

    def result(self, sequences: Any = None) -> TrajectoryScores:
        """Scores of the current generation.

        Args:
            sequences: what ``generate`` returned, ids [B, T] or an output object with ``sequences``. Its last token was
                never fed back, yet with ``at="predict"`` its step counts. None: what the model has consumed so far.

        Raises:
            RuntimeError: nothing was decoded while the scorer was attached.
            ValueError: ``sequences`` are not the ids that the model decoded (beam search reorders them, for instance).
        """
        began = time.perf_counter()
        if not self._batch:
            raise RuntimeError(
                f"nothing to score: no forward of {type(self.backbone.model).__name__} ran while this scorer was attached"
            )
        state, rows, self._recorded_last = self._state, 0, []
        if self._flushes:
            self._empty()
        if sequences is not None and (unseen := self._unseen(getattr(sequences, "sequences", sequences))).shape[1]:
            state, rows = state.clone(), self._batch  # decoding may go on, so the unfed token is consumed by a copy
            if self.at == "token":
                state.silence()
            no_hidden = state.slots.new_zeros(self._batch, unseen.shape[1], self.backbone.hidden_size)
            self._run(state, unseen, no_hidden)
        self._flush(state, rows, self._recorded_last)
        self._read = state
        found = [state.sequence(i) for i in range(self._batch)]
        if any(f.n_steps > len(f.columns) for f in found):
            warnings.warn(
                f"more than max_steps={self.max_steps} steps: their single scores were not kept", stacklevel=2
            )
        self.host_seconds += time.perf_counter() - began
        return TrajectoryScores.collect(
            [f.log_sum for f in found],
            [f.n_steps for f in found],
            [f.log_scores for f in found],
            [f.columns for f in found],
            self.at,
        )

    def features(self) -> tuple[Tensor, Tensor]:
        """The features of the steps that the last ``result`` scored: ``(features [M, H], sequence [M] int64)``.

        In the order of ``result``'s ``step_scores``, sequence by sequence. Needs ``record_features=True``.

        Raises:
            RuntimeError: features were not recorded.
        """
        if not self.record_features:
            raise RuntimeError("features were not kept; create the StreamScorer with record_features=True")
        records = self._recorded + self._recorded_last
        if not records:
            b = self.backbone
            return torch.empty(0, b.hidden_size, dtype=b.dtype), torch.empty(0, dtype=torch.int64)
        rows, owners = (torch.cat(parts) for parts in zip(*records, strict=True))
        order = self._read.counted_order(owners)
        return rows[order], owners[order, 0].long()

    def _unseen(self, ids: Tensor) -> Tensor:
        """The tokens of ``ids`` that were never fed back; checks that the others are those that were."""
        ids, T = ids.to(self.backbone.device), self._seen
        if ids.dim() != 2 or ids.shape[0] != self._batch or not T <= ids.shape[1] <= T + 1:
            raise ValueError(
                f"sequences: shape {list(ids.shape)} does not continue the {self._batch} x {T} tokens decoded while "
                "attached; pass exactly what generate returned"
            )
        differ = hash_ids(ids[:, :T]) != self._state.hashes()[: self._batch]
        if differ.any():
            raise ValueError(
                f"sequences: rows {differ.nonzero().flatten().tolist()} are not the tokens that the model decoded; pass "
                "what generate returned, unchanged (beam search, which reorders sequences, is not supported)"
            )
        return ids[:, T:]


def check_parts(backbone: Backbone, head: SPRM, steps: StepTokens) -> StepTokens:
    """``steps`` sized to the model's vocabulary and on its device.

    Raises:
        ValueError: head, steps and model do not fit together.
    """
    name = type(backbone.model).__name__
    head.check_model(backbone.hidden_size, backbone.dtype, name)
    steps.check_model(backbone.vocab_size)
    return steps.resized(backbone.vocab_size).to(backbone.device)


def _prompt(
    ids: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    device: torch.device,
    position_ids: Tensor | None = None,
) -> tuple[int, Tensor]:
    """``(B, columns of left padding [B])`` of the prompts [B, P]."""
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids: shape {list(ids.shape)}; expected at least one prompt of at least one token")
    ready_made = isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2)
    if ready_made and position_ids is not None and position_ids.dim() == 2:
        # A static cache gets its 4-d mask, or one a kind of layer; the positions still tell how much is padding.
        return len(ids), (ids.shape[1] - 1 - position_ids[:, -1]).expand(len(ids)).to(device)
    pad, length = padding(attention_mask, ids.shape, device)
    if (length < ids.shape[1]).any():
        raise ValueError("attention_mask: right-padded prompts cannot be decoded; set tokenizer.padding_side='left'")
    return len(ids), pad


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}")
