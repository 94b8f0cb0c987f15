"""StreamScorer: scores a model's reasoning while the model decodes it."""

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import Self

from ...scoring.backend import Backend
from ...scoring.heads import Head, Heads, parts_of, together
from ...scoring.scores import TrajectoryScores
from ...scoring.sharded import ShardedHead
from ...scoring.state import static
from ...scoring.steps import StepTokens
from ...scoring.taps import At
from ...utils.arguments import one_of
from .backbone import Backbone
from .continuous import Batching
from .follower import NO_CACHE, Follower
from .parts import check_cache_counts, check_padding, check_parts
from .places import Places
from .results import Results
from .states import States
from .stream import Schedule, Scope, Stream
from .tap import ModelTap
from .trial import try_release

__all__ = ["Schedule", "StreamScorer"]


class StreamScorer:
    """Scores every sequence that ``model`` decodes while attached.

    ::

        with rf.StreamScorer(model, head, steps) as scorer:
            out = model.generate(**inputs, do_sample=True, num_return_sequences=8)
        scores = scorer.result(out)

    It hears the token ids that enter the model and the hidden states that the head reads (``reflective.engines.hf.tap``). Each
    forward costs one op, ``torch.ops.reflective.decode_step``; nothing is run twice. A forward with an empty cache starts
    afresh, so one scorer serves any number of ``generate`` calls, one after the other. Several scorers may be attached to
    one model; none knows of the others.

    Forwards may be eager or compiled, by ``torch.compile(fullgraph=True)`` too: the op is then part of the graph. The
    scores follow the KV cache when its rows are reordered (beam search), selected, repeated, or rolled back (assisted
    decoding). Continuous batching (``generate_batch``) is scored request by request.

    Args:
        model: a decoder-only transformers model.
        head: an SPRM or another head, of the model's hidden size and dtype; it says where it reads the model, and what a step's and a
            trajectory's score are (``reflective.scoring.heads.Head``). Its weights are read when the scorer is attached. Several, in a row or
            by names, hear the same forwards: ``result`` then gives those of each, by its number or name.
        steps: which tokens end a step. A head that reads every token needs none.
        schedule: ``"deferred"`` scores in batches, when the buffer fills or a result is asked for; ``"immediate"`` has every
            step's score when its forward ends. The scores are the same to the bit.
        at: None: as the head says. ``"predict"`` reads the state that predicted the step-token (published checkpoints), ``"token"`` its
            own, ``"every"`` that of every generated token, each of which is a step then.
        scope: ``"response"`` scores what is generated, ``"text"`` the prompt too.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; None takes the first of these that runs on the model's device.
        buffer_rows: rows of the deferred buffer. With a ``process_group`` the buffer is taken for full as soon as it could
            be, after ``buffer_rows`` decoded tokens, and all of its rows go through the head, as the host does not know
            which hold a step.
        max_steps: steps a sequence whose single scores are kept; further ones still count in the trajectory's score.
            By default 16,384, enough for 32k generated tokens, as steps are never adjacent; 65,536 where every token is one.
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
        stream: the state on the device, and how far it has come.
        unheard: whether compiled forwards ran of which the host does not know how many.

    Raises:
        ValueError: head, steps and model do not fit together, or the model is none that can be scored.
    """

    def __new__(cls, model: nn.Module | None = None, head: Heads | None = None, *args: Any, **settings: Any) -> Self:
        if head is None or (isinstance(head, Head) and len(head.parts()) == 1):
            return super().__new__(cls)
        return super().__new__(SeveralHeads)

    def __init__(
        self,
        model: nn.Module,
        head: Heads,
        steps: StepTokens | None = None,
        schedule: Schedule = "deferred",
        at: At | None = None,
        *,
        scope: Scope = "response",
        backend: str | None = None,
        buffer_rows: int = 256,
        max_steps: int | None = None,
        record_features: bool = False,
        w1_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        one_of("schedule", schedule, ("deferred", "immediate"))
        one_of("scope", scope, ("response", "text"))
        tap = head.tap if at is None else replace(head.tap, at=at)
        max_steps = (65_536 if tap.at == "every" else 16_384) if max_steps is None else max_steps
        if buffer_rows < 1 or max_steps < 1:
            raise ValueError(f"buffer_rows={buffer_rows} and max_steps={max_steps} must be at least 1")
        self.backbone = Backbone.of(model, tap)
        check_cache_counts(self.backbone)
        self.head, self.schedule, self.at, self.scope = head, schedule, tap.at, scope
        self.steps = check_parts(self.backbone, head, steps)
        check_padding(self.backbone, self.steps)
        self.buffer_rows, self.max_steps, self.record_features = buffer_rows, max_steps, record_features
        self.stream = Stream(
            self.backbone,
            ShardedHead(head, self.backbone.device, self.backbone.dtype, backend, w1_dtype, process_group),
            self.steps, schedule=schedule, at=self.at, scope=scope, buffer_rows=buffer_rows, max_steps=max_steps,
            record_features=record_features,
        )  # fmt: skip
        self.flushes_by_hand = self.stream.flushes_by_hand
        self._follower, self._states, self._results = Follower(self.stream), States(self.stream), Results(self.stream)
        self._batching: Batching | None = None  # of continuous batching
        self._attached = False
        self.host_seconds = 0.0
        self._ids: Tensor | None = None  # of the forward in progress
        self._q = 0  # how many columns they are
        self.unheard = self._traced = False  # whether compiled forwards ran: of unknown number; one, of a known length

    @property
    def backend(self) -> Backend:
        return self.stream.placed.backend

    @property
    def places(self) -> Places:
        """Where it reads the model."""
        return self.backbone.places

    # -- attaching ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._attached:
            raise RuntimeError("this StreamScorer is attached already; use one `with` block at a time")
        weights = self.stream.placed.load().weights
        for tensor in (*weights, self.steps.token_class, self.steps.transition):
            static(tensor)
        ModelTap.add(self.backbone, self, try_release)
        self._attached = True
        self._as_one_batch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ModelTap.remove(self.backbone, self)
        self._attached, self._ids = False, None
        self._follower.close()

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
        prompts = self._follower.announce(input_ids, attention_mask)
        self._begin(prompts.pad, input_ids.shape[1])

    def _begin(self, pad: Tensor, prompt_length: int) -> None:
        """A generation begins: prompts of so many columns, of which ``pad`` [B] are left padding."""
        self.stream.begin(pad, prompt_length)
        self._follower.begin(prompt_length)
        self._states.begin(len(pad))
        self._results.begin()
        self._batching = None
        self.unheard = self._traced = False

    def _as_one_batch(self) -> None:
        """Forwards are no longer those of assigned states, nor of a manager's requests."""
        self._states.unassign()
        self._batching = None

    def _hear_host(self) -> None:
        """Bring the host's count of columns up to date after compiled forwards."""
        if self.unheard:
            self._follower.forget_announced()
            self.stream.moved_on(None)
        elif self._traced:
            self.stream.moved_on(self._q)
        self.unheard = self._traced = False

    # -- what the tap tells (reflective.engines.hf.tap.Listener) ----------------------------------------------------------------

    def on_generate(self, arguments: dict[str, Any], batching: Any) -> None:
        if batching is not None:
            batching = Batching(batching, self.stream, self._states)
            self._begin(torch.empty(0, dtype=torch.int64, device=self.backbone.device), 0)
            self._batching = batching
            return
        self._follower.refuse(arguments)
        if self.stream.state is not None:
            self._hear_host()
        self._results.returned(None)
        self._as_one_batch()
        self._follower.generate(arguments)

    def on_generated(self, output: Any) -> None:
        ids = getattr(output, "sequences", output)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            self._results.returned(ids)
        self._follower.generated()

    def on_forward(self, ids: Tensor | None, cache: Any, given: dict[str, Any]) -> None:
        began = time.perf_counter()
        if ids is None:
            raise ValueError("StreamScorer reads token ids: call the model with input_ids, not inputs_embeds")
        if self.unheard or self._traced:
            self._hear_host()
        if self._batching is not None:
            self._batching.before()
        elif self._states.assigned is not None:
            self._states.check(len(ids))
        else:
            if cache is None and given.get("use_cache") is False:
                raise ValueError(NO_CACHE)
            past = self._follower.past(cache, ids.shape[1])
            if (prompts := self._follower.opening(ids, past, given)) is not None:
                self._begin(prompts.pad, prompts.ids.shape[1])
                self._follower.skip(prompts, past)
            self._follower.check(ids, past)
        self._ids, self._q = ids, ids.shape[1]
        self.host_seconds += time.perf_counter() - began

    def on_features(self, hidden: Tensor) -> None:
        began = time.perf_counter()
        ids, hidden = self._ids.to(hidden.device), hidden.detach()
        if self._batching is not None:
            self._batching.features(ids, hidden)
        elif self._states.assigned is not None:
            self._follower.forget_draft()
            self.stream.consume(ids, hidden, self._states.assigned, self._states.prompts)
        else:
            self._follower.features(ids, hidden)
        self.host_seconds += time.perf_counter() - began

    def on_trace(self, ids: Tensor, hidden: Tensor) -> None:
        if self.stream.state is None:
            raise RuntimeError("the prompt is prefilled by a compiled model: announce it with scorer.begin beforehand")
        if self.flushes_by_hand or self._batching is not None:
            why = "record_features=True" if self.record_features else "process_group"
            why = why if self.flushes_by_hand else "continuous batching"
            raise RuntimeError(f"{why} needs eager forwards: the model is compiled, with this StreamScorer in it")
        self._traced = True
        self.stream.run(self.stream.state, ids.to(hidden.device), hidden.detach(), self._states.assigned)

    def on_select(self, indices: Tensor, reorder: bool) -> None:
        if self.stream.batch and self._states.assigned is None:
            self._hear_host()
            self._follower.select(indices, reorder)

    def on_repeat(self, repeats: int) -> None:
        self.on_select(torch.arange(self.stream.batch).repeat_interleave(repeats), reorder=False)

    def on_crop(self, length: int) -> None:
        self._follower.crop(length)

    # -- states assigned by hand ---------------------------------------------------------------------------------------
    #
    # A state is a trajectory's row in the scorer. Loops of one's own, which stop, fork or rest sequences or take in more of
    # them, say by ``assign`` which states the next forward belongs to.

    def admit(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[int]:
        """New states that begin with the prompts [B, P], to be assigned and fed; those that are there already rest.

        After ``begin`` with B prompts there are states 0 to B-1.
        """
        began = time.perf_counter()
        rows = self._states.admit(input_ids, attention_mask)
        self.host_seconds += time.perf_counter() - began
        return rows

    def fork(self, rows: Sequence[int]) -> list[int]:
        """New states that go on from those of ``rows``: text, tags and scores so far."""
        began = time.perf_counter()
        new = self._states.fork(rows)
        self.host_seconds += time.perf_counter() - began
        return new

    def feed(self, ids: Tensor, hidden: Tensor, rows: Tensor, bounds: Tensor | None = None) -> None:
        """Consume tokens of the states ``rows`` [B] int32: ids [B, q] int64 and hidden [B, q, H], or, with ``bounds`` [B + 1] int32,
        packed ids [1, T] and hidden [1, T, H] of which sequence i is columns ``bounds[i]`` to ``bounds[i + 1]``. A row of -1 is
        left out."""
        self.stream.run(self.stream.state, ids, hidden, rows, bounds)

    def no_hidden(self, n: int, q: int = 1) -> Tensor:
        """States [n, q, H] for tokens whose own are not known."""
        return self.stream.no_hidden(n, q)

    def assign(self, rows: Sequence[int], *, prompts: bool = False) -> None:
        """From now on sequence i of a forward is that of state ``rows[i]``. Other states rest.

        The scorer then no longer looks at the cache: its rows are the caller's business.

        Args:
            prompts: whether all tokens of these forwards, until the next ``assign``, are of the prompts that were admitted. With
                ``scope="response"`` none of their steps counts, and eager forwards are consumed in one piece.

        Raises:
            ValueError: the scorer records features, or a row that is no state.
        """
        self._states.assign(rows, prompts)

    def hold(self, n: int) -> None:
        """Have room for so many states at least."""
        if len(self.stream.state.seq) < n:
            self.stream.settle()
            self.stream.allocate(n)

    def assign_as(self, rows: Tensor) -> None:
        """The same by a tensor [B] int32 on the model's device, which is read in every forward and may change between them; a sequence
        whose row is -1 is not heard."""
        self._states.assign_as(rows)

    def release(self, rows: Sequence[int]) -> None:
        """Leave these states to later forks."""
        self._states.release(rows)

    def counts(self) -> list[int]:
        """Of every state, how many steps count so far. One read of the device; scores what waits in the buffer."""
        began = time.perf_counter()
        counts = self._states.counts()
        self.host_seconds += time.perf_counter() - began
        return counts

    def step_scores(self, row: int) -> list[float]:
        """Scores in (0, 1) of the steps of state ``row`` so far."""
        return self._states.step_scores(row)

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
        if not self.stream.batch and self._batching is None:
            raise RuntimeError(
                f"nothing to score: no forward of {type(self.backbone.model).__name__} ran while this scorer was attached"
            )
        self._hear_host()
        self._results.begin()
        if self._batching is not None:
            rows, sequences = self._batching.finished(sequences)
        self.stream.settle()
        if rows is not None:
            found = self._results.of_states(list(rows), sequences)
        elif sequences is None:
            found = self._results.of_all()
        else:
            ids = getattr(sequences, "sequences", sequences).to(self.backbone.device)
            lineage = self._follower.lineage
            found = self._results.of_batch(ids) if lineage is None else self._results.of_hypotheses(ids, lineage)
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
            self.head.aggregation,
            self.head.sigmoid,
            self.head.higher_is_better,
        )

    def features(self) -> tuple[Tensor, Tensor]:
        """The features of the steps that the last ``result`` scored: ``(features [M, H], sequence [M] int64)``.

        In the order of ``result``'s ``step_scores``, sequence by sequence. Needs ``record_features=True``.

        Raises:
            RuntimeError: features were not recorded.
        """
        if not self.record_features:
            raise RuntimeError("features were not kept; create the StreamScorer with record_features=True")
        return self._results.features()


class SeveralHeads(StreamScorer):
    """What ``StreamScorer`` is for several heads on one model, or one head of several parts: a stream each, which hear one tap."""

    def __init__(self, model: nn.Module, head: Heads, steps: StepTokens | None = None, *args: Any, **settings: Any) -> None:
        self.head = head
        self.each = [StreamScorer(model, part, steps, *args, **settings) for part in parts_of(head)]
        first = self.each[0]
        self.backbone, self.steps, self.schedule, self.at, self.scope = (
            first.backbone, first.steps, first.schedule, first.at, first.scope,
        )  # fmt: skip
        self.buffer_rows, self.max_steps, self.record_features = first.buffer_rows, first.max_steps, first.record_features
        self.stream = first.stream  # that of the part that is looked at while decoding
        self._entered: ExitStack | None = None

    @property
    def host_seconds(self) -> float:
        return sum(one.host_seconds for one in self.each)

    @property
    def flushes_by_hand(self) -> bool:
        """As one stream alone cannot do the work: whoever captures a step may not have it."""
        return True

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            for one in self.each:
                entered.enter_context(one)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered, self._entered = self._entered, None
        entered.close()

    def result(self, sequences: Any = None, *, rows: Sequence[int] | None = None) -> Any:
        return together(self.head, [one.result(sequences, rows=rows) for one in self.each])

    def features(self) -> tuple[Tensor, Tensor]:
        return self.each[0].features()


def _by_all(name: str) -> Any:
    def run(self: SeveralHeads, *args: Any, **settings: Any) -> Any:
        told = [getattr(one, name)(*args, **settings) for one in self.each]
        return told[0]

    run.__name__, run.__doc__ = name, getattr(StreamScorer, name).__doc__
    return run


for _name in ("begin", "admit", "fork", "assign", "assign_as", "hold", "release", "counts", "step_scores"):
    setattr(SeveralHeads, _name, _by_all(_name))
