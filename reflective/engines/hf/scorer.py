"""StreamScorer: scores a model's reasoning while the model decodes it."""

import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import Self

from ...kernels import layout
from ...scoring.backend import Backend
from ...scoring.scores import TrajectoryScores
from ...scoring.sharded import ShardedHead
from ...scoring.sprm import SPRM
from ...scoring.state import SequenceTally, StreamState, hash_ids, hash_prefixes, static
from ...scoring.steps import At, StepTokens, padding
from ...utils.arguments import one_of
from . import internals
from .backbone import Backbone
from .continuous import Batching
from .lineage import Lineage
from .tap import Tap

Schedule = Literal["deferred", "immediate"]


class StreamScorer:
    """Scores every sequence that ``model`` decodes while attached.

    ::

        with rf.StreamScorer(model, head, steps) as scorer:
            out = model.generate(**inputs, do_sample=True, num_return_sequences=8)
        scores = scorer.result(out)

    It hears the token ids that enter the model and the hidden states that enter its last layer (``reflective.engines.hf.tap``). Each
    forward costs one op, ``torch.ops.reflective.decode_step``; nothing is run twice. A forward with an empty cache starts
    afresh, so one scorer serves any number of ``generate`` calls, one after the other. Several scorers may be attached to
    one model; none knows of the others.

    Forwards may be eager or compiled, by ``torch.compile(fullgraph=True)`` too: the op is then part of the graph. The
    scores follow the KV cache when its rows are reordered (beam search), selected, repeated, or rolled back (assisted
    decoding). Continuous batching (``generate_batch``) is scored request by request.

    Args:
        model: a decoder-only transformers model.
        head: the SPRM, of the model's hidden size and dtype. Its weights are read when the scorer is attached.
        steps: which tokens end a step.
        schedule: ``"deferred"`` scores in batches, when the buffer fills or a result is asked for; ``"immediate"`` has every
            step's score when its forward ends. The scores are the same to the bit.
        at: ``"predict"`` reads the state that predicted the step-token (published checkpoints), ``"token"`` its own.
        scope: ``"response"`` scores what is generated, ``"text"`` the prompt too.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; None takes the first of these that runs on the model's device.
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
        check_cache(self.backbone)
        self.head, self.schedule, self.at, self.scope = head, schedule, at, scope
        self.steps = check_parts(self.backbone, head, steps)
        pad = getattr(model.generation_config, "pad_token_id", None)
        if steps.step_ids is not None and pad in steps.step_ids:
            # After a sequence's end generate feeds it padding, which must not count as steps.
            raise ValueError(f"steps: the padding token {pad} is a step-token; give the model another pad_token_id")
        self._head = ShardedHead(head, self.backbone.device, self.backbone.dtype, backend, w1_dtype, process_group)
        self.backend: Backend = self._head.backend
        self.buffer_rows, self.max_steps, self.record_features = buffer_rows, max_steps, record_features
        # Whether the buffer must not empty itself: rows are to be kept, or a part of the head cannot score them.
        self.flushes_by_hand = record_features or process_group is not None
        self._waiting = 0  # if so, no more rows than these wait in the buffer
        self._state: StreamState | None = None
        self._read: StreamState | None = None  # the state that the last result was read from
        self._attached = False
        self.host_seconds = 0.0
        self._batch = 0  # sequences of the current generation; 0 before the first
        self._seen = 0  # columns consumed, a host-side twin of the state's SEEN
        self._prompt_length = 0
        self._start = 0  # first column in scope
        self._ids: Tensor | None = None  # of the forward in progress
        self._q = 0  # how many columns they are
        self._cache: Callable[[], Any] = lambda: None  # weak reference to the cache of the last forward
        self._announced: _Prompt | None = None  # the prompts of the next generation
        self._generating = False  # whether a `generate` call is in progress
        self._returned: Tensor | None = None  # hashes [B] of what the last one returned
        self._draft: _Draft | None = None  # the last forward, if the cache may yet be rolled back into it
        self._lineage: Lineage | None = None  # of beam search
        self._batching: Batching | None = None  # of continuous batching
        self._rows: Tensor | None = None  # states of the sequences of a forward, where they were assigned
        self._n_states, self._free = 0, []  # of those: how many there are, and which may be used again
        self.unheard = self._traced = False  # whether compiled forwards ran: of unknown number; one, of a known length
        self._recorded: list[tuple[Tensor, Tensor]] = []  # (rows, owners) moved out of the buffer
        self._recorded_last: list[tuple[Tensor, Tensor]] = []  # of the token that was never fed back

    # -- attaching ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._attached:
            raise RuntimeError("this StreamScorer is attached already; use one `with` block at a time")
        self._head.load()
        for tensor in (*self._head.weights, self.steps.token_class, self.steps.transition):
            static(tensor)
        Tap.add(self.backbone, self)
        self._attached = True
        self._rows = self._batching = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Tap.remove(self.backbone, self)
        self._attached = self._generating = False
        self._ids = self._announced = self._draft = None

    # -- the stream --------------------------------------------------------------------------------------------------

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Announce the prompts of the next generation, while attached.

        ``generate`` calls announce theirs by themselves. Needed in loops of one's own where prompts do not come in one
        eager forward on an empty cache: because the cache holds their first columns already (what the scorer must know of
        these, tags and open delimiters, it reads from here), because they are prefilled in pieces, or because the whole
        model is compiled, prefill included.

        Args:
            input_ids: [B, P] int64, the whole prompts. A forward may have each of them several times in a row.
            attention_mask: [B, P], 0 at left padding.

        Raises:
            ValueError: no prompt, an empty one, or padding that is not on the left.
        """
        self._announced = _Prompt(input_ids, _prompt(input_ids, attention_mask, self.backbone.device), by_user=True)
        self._begin(len(input_ids), self._announced.pad, input_ids.shape[1])

    def _begin(self, batch: int, pad: Tensor, prompt_length: int) -> None:
        self._allocate(batch)
        self._start = prompt_length if self.scope == "response" else 0
        self._state.reset(pad, torch.full_like(pad, self._start))
        self._batch, self._seen, self._waiting, self._prompt_length = batch, 0, 0, prompt_length
        self._draft = self._lineage = self._batching = self._rows = None
        self._n_states, self._free = batch, []
        self.unheard = self._traced = False
        self._recorded, self._recorded_last = [], []

    def _allocate(self, n: int) -> None:
        """Room for ``n`` sequences; what those in the state have come to stays."""
        b = self.backbone
        if self._state is not None:
            self._state = self._state.grown(n, self.head.width)
        else:
            self._state = StreamState.allocate(
                n, b.hidden_size, self.head.width, buffer_rows=max(self.buffer_rows, n), max_steps=self.max_steps,
                dtype=b.dtype, device=b.device,
            )  # fmt: skip

    def _hear_host(self) -> None:
        """Bring the host's count of columns up to date after compiled forwards."""
        if self.unheard:
            self._announced = None
            self._seen = int(self._state.seen()[: self._batch].max())
        elif self._traced:
            self._seen += self._q
        self.unheard = self._traced = False

    # -- what the tap tells (reflective.engines.hf.tap.Listener) ----------------------------------------------------------------

    def on_generate(self, arguments: dict[str, Any], batching: Any) -> None:
        if batching is not None:
            batching = Batching(batching, self)
            self._begin(0, torch.empty(0, dtype=torch.int64, device=self.backbone.device), 0)
            self._batching = batching
            return
        config = arguments.get("generation_config") or self.backbone.model.generation_config

        def given(name: str) -> Any:
            return arguments.get(name, getattr(config, name, None))

        ids, mask = arguments.get("input_ids", arguments.get("inputs")), arguments.get("attention_mask")
        if ids is None and arguments.get("inputs_embeds") is not None:
            raise ValueError("StreamScorer reads token ids: call generate with input_ids, not inputs_embeds")
        if given("use_cache") is False:
            raise ValueError("StreamScorer needs the KV cache (use_cache=True); for finished text use rf.score")
        if self.record_features and (given("num_beams") or 1) > 1:
            raise ValueError("record_features=True cannot follow beam search (num_beams > 1); sample, or leave it out")
        graphs = self.backbone.device.type == "cuda" and str(given("cache_implementation")).startswith("static")
        if self.flushes_by_hand and (given("compile_config") or graphs) and not given("disable_compile"):
            why = "record_features=True" if self.record_features else "process_group"
            raise ValueError(f"{why} needs eager forwards: leave compile_config out or set disable_compile=True")
        if self._state is not None:
            self._hear_host()
        self._generating, self._returned = True, None
        self._rows = self._batching = None
        if self._announced is None and isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1]:
            pad = getattr(config, "pad_token_id", None)
            if mask is None and pad is not None and pad != getattr(config, "eos_token_id", None):
                mask = (ids != pad).long()  # as generate infers it
            if mask is None or mask.shape == ids.shape:  # else the ids are only what is new
                pad = _prompt(ids, None if mask is None or mask.all() else mask, self.backbone.device)
                self._announced = _Prompt(ids, pad, by_user=False)

    def on_generated(self, output: Any) -> None:
        self._generating = False
        ids = getattr(output, "sequences", output)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            self._returned = hash_ids(ids)
        if self._announced is not None and not self._announced.by_user:
            self._announced = None

    def on_forward(self, ids: Tensor | None, cache: Any, given: dict[str, Any]) -> None:
        began = time.perf_counter()
        if ids is None:
            raise ValueError("StreamScorer reads token ids: call the model with input_ids, not inputs_embeds")
        self._hear_host()
        if self._batching is not None:
            self._batching.before()
        elif self._rows is not None:
            if len(ids) != len(self._rows):
                raise RuntimeError(f"this forward has {len(ids)} sequences, but {len(self._rows)} states are assigned")
        else:
            if cache is None and given.get("use_cache") is False:
                raise ValueError("StreamScorer needs the KV cache (use_cache=True); for finished text use rf.score")
            self._before_dense(ids, cache, given)
        self._ids, self._q = ids, ids.shape[1]
        self.host_seconds += time.perf_counter() - began

    def _before_dense(self, ids: Tensor, cache: Any, given: dict[str, Any]) -> None:
        past, prompt = self._cached(cache, ids.shape[1]), self._announced
        if prompt is not None:
            if len(ids) % len(prompt.ids):
                raise RuntimeError(f"this forward has {len(ids)} sequences, {len(prompt.ids)} prompts were announced")
            self._announced, times = None, len(ids) // len(prompt.ids)
            self._begin(len(ids), prompt.pad.repeat_interleave(times), prompt.ids.shape[1])
            if past:
                self._skip_cached(prompt.ids.repeat_interleave(times, 0), past)
        elif past == 0:
            pad = _prompt(ids, given.get("attention_mask"), self.backbone.device, given.get("position_ids"))
            self._begin(len(ids), pad, prompt_length=ids.shape[1])
        if past != self._seen:
            raise RuntimeError(
                f"the cache holds {past} tokens but the scorer has seen {self._seen}: the cache was filled before the "
                "scorer was attached (announce the whole prompt with scorer.begin), or rolled back by more than the "
                "tokens of its last forward"
            )
        if past >= self._prompt_length and ids.shape[1] > 1 and not self._generating:
            raise RuntimeError(
                f"{ids.shape[1]} tokens at once after the prompt: if the prompt comes in pieces (chunked prefill, a "
                "further turn on the same cache), announce the whole of it with scorer.begin"
            )
        if len(ids) != self._batch:
            raise RuntimeError(f"this forward has {len(ids)} sequences, the generation began with {self._batch}")

    def _cached(self, cache: Any, new: int) -> int:
        """Tokens in the cache before this forward."""
        if cache is None:
            return 0
        # A static cache counts on the device: asking it at every token would stall the host. What it would tell of a
        # rolled-back cache, the ids' hash tells when the result is asked for.
        if new == 1 and self._seen and internals.counts_on_device(cache) and self._cache() is cache:
            return self._seen
        self._cache = weakref.ref(cache)
        return int(cache.get_seq_length())

    def _skip_cached(self, ids: Tensor, past: int) -> None:
        """Consume the announced prompts' first ``past`` columns, whose states are in the cache only."""
        if self.scope == "text":
            raise ValueError("scope='text' scores the prompt too, so no part of it may be in the cache beforehand")
        if past >= ids.shape[1]:
            raise ValueError(
                f"the cache holds {past} tokens, all of the announced prompt; leave at least one to decode"
            )
        self._consume(ids[:, :past].to(self.backbone.device), self.no_hidden(len(ids), past))

    def no_hidden(self, n: int, q: int = 1) -> Tensor:
        """States [n, q, H] for tokens whose own are not known."""
        b = self.backbone
        return torch.zeros(n, 1, b.hidden_size, dtype=b.dtype, device=b.device).expand(-1, q, -1)

    def on_features(self, hidden: Tensor) -> None:
        began = time.perf_counter()
        ids, hidden = self._ids.to(hidden.device), hidden.detach()
        if self._batching is not None:
            self._batching.features(ids, hidden)
        else:
            self._draft = None
            rest = max(0, self._prompt_length - self._seen)  # of the prompt; what follows may be a draft
            if self._rows is None and ids.shape[1] > max(1, rest):
                if rest:
                    self._consume(ids[:, :rest], hidden[:, :rest])
                    ids, hidden = ids[:, rest:], hidden[:, rest:].clone()
                self._settle()
                self._draft = _Draft(self._seen, ids, hidden, self._state.snapshot(), len(self._recorded))
            self._consume(ids, hidden)
        self.host_seconds += time.perf_counter() - began

    def on_trace(self, ids: Tensor, hidden: Tensor) -> None:
        if self._state is None:
            raise RuntimeError("the prompt is prefilled by a compiled model: announce it with scorer.begin beforehand")
        if self.flushes_by_hand or self._batching is not None:
            why = "record_features=True" if self.record_features else "process_group"
            why = why if self.flushes_by_hand else "continuous batching"
            raise RuntimeError(f"{why} needs eager forwards: the model is compiled, with this StreamScorer in it")
        self._traced = True
        self._run(self._state, ids.to(hidden.device), hidden.detach(), self._rows)

    def on_select(self, indices: Tensor, reorder: bool) -> None:
        if not self._batch or self._rows is not None:
            return
        self._hear_host()
        self._settle()
        indices = indices.to(self.backbone.device)
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices.long()
        if reorder:
            self._lineage = self._lineage or Lineage()
            self._lineage.record(self._state, self._seen, indices)
        self._allocate(len(indices))
        self._state.put(torch.arange(len(indices), device=indices.device), indices, min(self._seen, self.max_steps))
        self._batch, self._draft = len(indices), None

    def on_repeat(self, repeats: int) -> None:
        self.on_select(torch.arange(self._batch).repeat_interleave(repeats), reorder=False)

    def on_crop(self, length: int) -> None:
        draft = self._draft
        # Further back it cannot follow; the next forward, if it goes on from there, says so.
        if draft is None or not draft.seen <= length < self._seen:
            return
        self._state.restore(draft.before)
        self._waiting = 0
        del self._recorded[draft.recorded :]
        self._seen = draft.seen
        kept = length - draft.seen
        self._consume(draft.ids[:, :kept], draft.hidden[:, :kept])

    # -- states assigned by hand ---------------------------------------------------------------------------------------

    #
    # A state is a trajectory's row in the scorer. Loops of one's own, which stop, fork or rest sequences or take in more of
    # them, say by ``assign`` which states the next forward belongs to.

    def admit(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[int]:
        """New states that begin with the prompts [B, P], to be assigned and fed; those that are there already rest.

        After ``begin`` with B prompts there are states 0 to B-1.
        """
        began = time.perf_counter()
        pad = _prompt(input_ids, attention_mask, self.backbone.device)
        rows = self._new_states(len(pad))
        self._batch = self._batch or len(pad)
        start = input_ids.shape[1] if self.scope == "response" else 0
        self._state.restart(torch.tensor(rows, device=pad.device), pad, start)
        self.host_seconds += time.perf_counter() - began
        return rows

    def fork(self, rows: Sequence[int]) -> list[int]:
        """New states that go on from those of ``rows``: text, tags and scores so far."""
        began = time.perf_counter()
        new, device = self._new_states(len(rows)), self.backbone.device
        self._state.put(torch.tensor(new, device=device), torch.tensor(list(rows), device=device))
        self.host_seconds += time.perf_counter() - began
        return new

    def _new_states(self, n: int) -> list[int]:
        if self._state is not None:
            self._settle()
        reused = self._free[:n]
        del self._free[:n]
        rows = [*reused, *range(self._n_states, self._n_states + n - len(reused))]
        self._n_states = max([self._n_states, *(row + 1 for row in rows)])
        n = 0 if self._state is None else len(self._state.seq)
        if self._n_states > n:
            self._allocate(max(self._n_states, 2 * n))
        return rows

    def feed(self, ids: Tensor, hidden: Tensor, rows: Tensor, bounds: Tensor | None = None) -> None:
        """Consume tokens of the states ``rows`` [B] int32: ids [B, q] int64 and hidden [B, q, H], or, with ``bounds`` [B + 1] int32,
        packed ids [1, T] and hidden [1, T, H] of which sequence i is columns ``bounds[i]`` to ``bounds[i + 1]``. A row of -1 is
        left out."""
        self._run(self._state, ids, hidden, rows, bounds)

    def assign(self, rows: Sequence[int]) -> None:
        """From now on sequence i of a forward is that of state ``rows[i]``. Other states rest.

        The scorer then no longer looks at the cache: its rows are the caller's business.

        Raises:
            ValueError: the scorer records features, or a row that is no state.
        """
        if self.record_features:
            raise ValueError("record_features=True records the sequences of a plain generation; leave assign out")
        if not all(0 <= row < self._n_states for row in rows) or len(set(rows)) < len(rows):
            raise ValueError(f"rows={list(rows)}: expected different states, each below {self._n_states}")
        self._rows = torch.tensor(list(rows), dtype=torch.int32).to(self.backbone.device, non_blocking=True)

    def release(self, rows: Sequence[int]) -> None:
        """Leave these states to later forks."""
        self._free += rows

    def counts(self) -> list[int]:
        """Of every state, how many steps count so far. One read of the device; scores what waits in the buffer."""
        began = time.perf_counter()
        if self.schedule == "deferred":
            self._settle()
        counts = self._state.counts()[: self._n_states]
        self.host_seconds += time.perf_counter() - began
        return counts

    def step_scores(self, row: int) -> list[float]:
        """Scores in (0, 1) of the steps of state ``row`` so far."""
        return self._state.sequences([row])[0].log_scores.exp().tolist()

    # -- running the op ----------------------------------------------------------------------------------------------

    def _consume(self, ids: Tensor, hidden: Tensor) -> None:
        if not self.flushes_by_hand:
            self._run(self._state, ids, hidden, self._rows)
            self._seen += ids.shape[1]
            return
        room, begin, (n, q) = len(self._state.slots), 0, ids.shape
        # GPU kernels give the steps of several columns their slots in any order; ranks must agree on it.
        piece = 1 if self._head.group else max(1, room // n)
        while begin < q:
            # Columns before the scope: whatever they hold, no step of it counts. Of assigned states the host does not know.
            quiet = self._start - self._seen if self._rows is None else 0
            end = min(begin + (quiet if quiet > 0 else piece), q)
            rows = 0 if quiet > 0 else (end - begin) * n
            if self._waiting + rows > room:
                self._settle()
            self._run(self._state, ids[:, begin:end], hidden[:, begin:end], self._rows)
            self._seen += end - begin
            self._waiting += rows
            begin = end
        if self.schedule == "immediate":
            self._settle()

    def _run(
        self, state: StreamState, ids: Tensor, hidden: Tensor, rows: Tensor | None = None, bounds: Tensor | None = None
    ) -> None:
        self.backend.decode_step(
            ids, hidden, self.steps.token_class, self.steps.transition, *self._head.weights, *state.tensors(),
            self.at == "predict", self.schedule == "immediate" and not self.flushes_by_hand, rows, bounds,
        )  # fmt: skip

    def _settle(self) -> None:
        """Score what waits in the buffer."""
        self._flush(self._state, self._waiting, self._recorded)
        self._waiting = 0

    def _flush(self, state: StreamState, rows: int, record: list[tuple[Tensor, Tensor]]) -> None:
        """Score the rows in the buffer, ``rows`` at the most; those to be kept go to ``record``."""
        if self.record_features and (n := int(state.n_slots)):
            record.append((state.slots[:n].clone(), state.slot_owner[:n].clone()))
        self._head.flush(state, rows)

    # -- results -----------------------------------------------------------------------------------------------------

    def result(self, sequences: Any = None, *, rows: Sequence[int] | None = None) -> TrajectoryScores:
        """Scores of the current generation.

        Args:
            sequences: what ``generate`` returned, ids [B, T] or an output object with ``sequences``; what ``generate_batch``
                returned, whose requests come in its order. A sequence's last token was never fed back, yet with
                ``at="predict"`` its step counts. None: what the model has consumed so far.
            rows: only of these states; ``sequences`` is then a list of their ids, [T_i] each, left padding included.

        Raises:
            RuntimeError: nothing was decoded while the scorer was attached.
            ValueError: ``sequences`` are not the ids that the model decoded.
        """
        began = time.perf_counter()
        if not self._batch and self._batching is None:
            raise RuntimeError(
                f"nothing to score: no forward of {type(self.backbone.model).__name__} ran while this scorer was attached"
            )
        self._hear_host()
        self._recorded_last = []
        if self._batching is not None:
            rows, sequences = self._batching.finished(sequences)
        self._settle()
        if rows is not None:
            found = self._of_states(list(rows), sequences)
        elif sequences is None:
            self._read = self._state
            found = self._state.sequences(range(self._batch))
        else:
            ids = getattr(sequences, "sequences", sequences).to(self.backbone.device)
            found = self._of_batch(ids) if self._lineage is None else self._of_hypotheses(ids)
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

    def _of_batch(self, ids: Tensor) -> list[SequenceTally]:
        """Of the sequences [B, T], of which all but one token at the most was consumed."""
        T = self._seen
        if ids.dim() != 2 or ids.shape[0] != self._batch or not T <= ids.shape[1] <= T + 1:
            raise self._other(
                ids, f"shape {list(ids.shape)} does not continue the {self._batch} x {T} tokens decoded while attached"
            )
        self._check_hashes(ids[:, :T], self._state.hashes()[: self._batch], ids)
        return self._after(list(range(self._batch)), ids[:, T:])

    def _after(self, rows: list[int], unfed: Tensor, state: StreamState | None = None) -> list[SequenceTally]:
        """Of the states ``rows`` once they have consumed ``unfed`` [len(rows), 0 or 1]; by a copy, as decoding may go on."""
        state = state or self._state
        if not unfed.shape[1]:
            self._read = state
            return state.sequences(rows)
        copy = self._read = state.take(rows)
        if self.at == "token":
            copy.silence()
        self._run(copy, unfed, self.no_hidden(len(rows)))
        self._flush(copy, len(rows), self._recorded_last)
        return copy.sequences(range(len(rows)))

    def _of_states(self, rows: list[int], sequences: Any) -> list[SequenceTally]:
        if sequences is None:
            return self._state.sequences(rows)
        device = self.backbone.device
        texts = [ids.to(device) for ids in sequences]
        seen = self._state.seen()[rows].tolist()
        for row, ids, n in zip(rows, texts, seen, strict=True):
            if not n <= len(ids) <= n + 1:
                raise ValueError(f"sequences: {len(ids)} tokens do not continue the {n} that state {row} has consumed")
        consumed = torch.stack([hash_ids(ids[None, :n])[0] for ids, n in zip(texts, seen, strict=True)])
        self._check_hashes(consumed, self._state.hashes()[rows])
        found: dict[int, SequenceTally] = {}
        for extra in (0, 1):
            group = [i for i, (ids, n) in enumerate(zip(texts, seen, strict=True)) if len(ids) - n == extra]
            if group:
                unfed = torch.stack([texts[i][seen[i] :] for i in group])
                found |= dict(zip(group, self._after([rows[i] for i in group], unfed), strict=True))
        return [found[i] for i in range(len(rows))]

    def _of_hypotheses(self, ids: Tensor) -> list[SequenceTally]:
        """Of what beam search returned: hypotheses that ended at any time, padded to one length."""
        T, found = self._seen, {}
        # The rows as they were before beam search reordered them for a step that it did not take.
        state = self._lineage.latest if self._lineage.seen[-1] == T else self._state
        prefix = hash_prefixes(ids)[:, T - 1] if ids.shape[1] >= T else ids.new_zeros(len(ids)) - 1
        alive = prefix[:, None] == state.hashes()[None, : self._batch]  # [M, B]
        living = {i: int(match.nonzero()[0]) for i, match in enumerate(alive.cpu()) if match.any()}
        if living:
            states = self._after(list(living.values()), ids[list(living), T : T + 1], state)
            found |= dict(zip(living, states, strict=True))
        ended = [i for i in range(len(ids)) if i not in living]
        for i, place in zip(ended, self._lineage.find(ids[ended]) if ended else [], strict=True):
            rest = ids[i, self._lineage.seen[place[0]] :] if place else ids[i]
            last, padding = rest[:1], rest[1:]
            if place is None or (padding != padding[:1]).any():
                raise self._other(ids, f"row {i} is none that beam search decoded")
            if (
                self.at == "predict"
                and (self.steps.transition[self.steps.token_class[last].long()] & layout.STEP).any()
            ):
                raise ValueError(
                    f"sequences: row {i} ends in token {int(last)}, a step-token whose state was given up with its beam; "
                    "sample instead, or use an end-of-sequence token that ends no step"
                )
            found[i] = self._lineage.tally(*place)
        return [found[i] for i in range(len(ids))]

    def _check_hashes(self, ids: Tensor, expected: Tensor, sequences: Tensor | None = None) -> None:
        """``ids`` [B, T], or their hashes [B], of ``sequences``."""
        differ = (hash_ids(ids) if ids.dim() == 2 else ids) != expected
        if differ.any():
            rows = differ.nonzero().flatten().tolist()
            raise self._other(sequences, f"rows {rows} are not the tokens that the model decoded")

    def _other(self, ids: Tensor | None, what: str) -> Exception:
        """The error for sequences of which ``what`` is wrong: they are others than those of ``generate``, or what ``generate``
        did was not heard as it was done."""
        if ids is not None and self._returned is not None and ids.dim() == 2:
            own = hash_ids(ids)
            if own.shape == self._returned.shape and torch.equal(own, self._returned.to(own.device)):
                return internals.unknown(
                    f"sequences: they are what generate returned, but {what}, so it decoded in a way that cannot be followed: "
                    "forwards on several caches, or ids that were changed after the model had seen them, as by custom_generate",
                    self.backbone.model,
                )
        return ValueError(f"sequences: {what}; pass what generate returned, unchanged")

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


@dataclass
class _Prompt:
    """Announced prompts [B, P], their left padding [B], and whether by the user or by ``generate``."""

    ids: Tensor
    pad: Tensor
    by_user: bool


@dataclass
class _Draft:
    """A forward of several tokens after the prompt, and the state before it."""

    seen: int
    ids: Tensor
    hidden: Tensor
    before: tuple[Tensor, ...]
    recorded: int


def check_parts(backbone: Backbone, head: SPRM, steps: StepTokens) -> StepTokens:
    """``steps`` sized to the model's vocabulary and on its device.

    Raises:
        ValueError: head, steps and model do not fit together.
    """
    name = type(backbone.model).__name__
    head.check_model(backbone.hidden_size, backbone.dtype, name)
    steps.check_model(backbone.vocab_size)
    return steps.resized(backbone.vocab_size).to(backbone.device)


def check_cache(backbone: Backbone) -> None:
    """Whether the model's cache tells how many tokens it holds, by which a stream knows where it is.

    Raises:
        ValueError: it consists of recurrent states alone.
    """
    config = backbone.model.config.get_text_config(decoder=True)
    layers = internals.cache_layers(config)
    if layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
        raise ValueError(
            f"model: the cache of {type(backbone.model).__name__} consists of {type(layers[0]).__name__}s, which do not tell how "
            "many tokens they hold, so its decoding cannot be followed; rf.score scores its finished text"
        )


def _prompt(
    ids: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    device: torch.device,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Columns of left padding [B] of the prompts [B, P]."""
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids: shape {list(ids.shape)}; expected at least one prompt of at least one token")
    ready_made = isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2)
    if ready_made and position_ids is not None:
        # A static cache gets its 4-d mask, or one a kind of layer; the positions still tell how much is padding.
        # Those of text come first where there are several kinds (Qwen2-VL: [4, B, P]).
        positions = position_ids if position_ids.dim() == 2 else position_ids[0]
        return (ids.shape[1] - 1 - positions[:, -1]).expand(len(ids)).to(device)
    pad, length = padding(attention_mask, ids.shape, device)
    if (length < ids.shape[1]).any():
        raise ValueError("attention_mask: right-padded prompts cannot be decoded; set tokenizer.padding_side='left'")
    return pad
