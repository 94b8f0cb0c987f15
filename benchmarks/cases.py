"""The cells of the suite: for each op its inputs, its implementations, its correctness gate, its bytes and operations."""

import functools
import importlib
import math
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from reflective import kernels
from reflective.benchmarks import peers
from reflective.kernels import layout
from reflective.scoring import backend, ops, sprm
from reflective.scoring.state import StreamState

FLOAT8 = torch.float8_e4m3fn
OURS = ("cuda", "triton", "cpu")
PEERS = ("expression", "cublas", "compile", "published")
VOCAB, TOKENS = 4096, 2048  # ids known to the automata; tokens of a finished text
BUFFER_ROWS, SEQUENCES, MAX_STEPS = 256, 32, 64
GATE_ROWS, GATE_STEPS = 64, 16  # the definition of what keeps tallies takes a row at a time


@dataclass(frozen=True)
class Form:
    """A head: its hidden units, what it does with them, and of how many layers' states, side by side, it reads.

    ``linear``: ``w . f + b`` as the ops take it, ``relu(z) - relu(-z)`` of two units.
    """

    units: int
    activation: int = layout.RELU
    layers: int = 1
    linear: bool = False


# Heads as others publish them, by the variant of ``decode_step`` that has them; at FORM_WIDTHS, unless others are asked for.
FORMS = {
    "mlp 512 relu": Form(512),
    "mlp 512 gelu": Form(512, layout.GELU),
    "mlp 1024 silu of 3 layers": Form(1024, layout.SILU, layers=3),
    "linear": Form(2, linear=True),
}
FORM_WIDTHS, FORM_ROWS = (2560, 4096, 5120), range(1, 65)


@dataclass(frozen=True)
class Cell:
    """One line of the suite: ``rows`` is what the op is about: rows scored, sequences that end a step, or texts."""

    op: str
    variant: str
    H: int  # 0 where the op has no hidden size
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, (self.op, self.variant, f"H={self.H}" * bool(self.H), f"rows={self.rows}", dtype)))


@dataclass
class Subject:
    """One implementation bound to one set of inputs. ``calls``: how many calls until ``reset`` is due, None for any number."""

    call: Callable[[], Any]
    reset: Callable[[], None] = lambda: None
    calls: int | None = None


@dataclass(frozen=True)
class Gate:
    """``error``: the root mean square deviation from the float64 definition over the latter's own, the worst of all outputs;
    ``definition``: that of the same-dtype PyTorch definition; ``exact``: whether every integer agrees.
    """

    error: float
    definition: float
    passed: bool
    exact: bool


class Case(ABC):
    """A cell on a device. Subclasses say what the op's inputs, implementations and results are."""

    op: ClassVar[str]
    variants: ClassVar[tuple[str, ...]] = ("",)
    idle: ClassVar[bool] = False  # whether no rows at all is a case of its own
    gate_rows = GATE_ROWS  # that a gate compares at the least: one row is no sample

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self.drawn_on = device  # where random inputs come from: the same seed gives others on a GPU

    @property
    def flops(self) -> int:
        """Of the head's two products."""
        return 2 * self.cell.rows * self.K * (self.H + 1)

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Each input that must be read once and each output that must be written once."""

    @property
    def weight_bytes(self) -> int:
        H, K = self.H, self.K
        rest = 4 if self.cell.dtype == FLOAT8 else self.cell.dtype.itemsize
        return K * H * self.cell.dtype.itemsize + (2 * K + 1) * rest

    @property
    def H(self) -> int:
        """Columns of a row."""
        return self.cell.H

    @property
    def K(self) -> int:
        """Hidden units."""
        return 2 * self.cell.H

    @property
    def row_dtype(self) -> torch.dtype:
        """Of features and hidden states: a float8 head goes with a bfloat16 model."""
        return torch.bfloat16 if self.cell.dtype == FLOAT8 else self.cell.dtype

    def names(self) -> list[str]:
        """The implementations that there are for this cell on this machine."""
        return [*(name for name in OURS if self.ours(name)), *self.peers]

    @property
    def peers(self) -> tuple[str, ...]:
        """``cublas`` where it has epilogues for the head; without a GPU ``expression`` is as good."""
        plain = self.cell.dtype != FLOAT8
        heads = plain and self.op in ("score_rows", "logit_rows", "flush") and self.device.type == "cuda"
        published = plain and self.op == "score_rows"
        return "expression", *("cublas",) * heads, "compile", *("published",) * published

    def capturable(self, name: str) -> bool:
        """Whether ``name`` runs without waiting for the device, as CUDA graphs demand."""
        return name != "published"

    def ours(self, name: str) -> Any | None:
        """The ops of our backend ``name``, or None if it cannot run this cell here."""
        rows, weights = (
            dtype if dtype.is_floating_point else torch.float32 for dtype in (self.row_dtype, self.cell.dtype)
        )
        try:
            backend.choose_backend(name, self.device, rows, weights)
        except ValueError:
            return None
        if self.op == "sprm_loss":  # Triton's is the only kernel
            return importlib.import_module("reflective.kernels.sprm_loss_triton") if name == "triton" else None
        return ops.triton_op if name == "triton" else ops.op

    def peer(self, name: str) -> Callable[..., Any]:
        function = getattr(peers, f"{self.op}_cublas" if name == "cublas" else self.op)
        return compiled(function, self.cell) if name == "compile" else function

    @abstractmethod
    def bind(self, name: str, weights: tuple[Tensor, ...], seed: int) -> Subject:
        """Implementation ``name`` (also "definition" and "truth") over fresh inputs."""

    @abstractmethod
    def outcome(self, name: str, weights: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
        """What implementation ``name`` makes of fresh inputs, by name; integers must agree with the definition's."""

    def functions(self, name: str) -> Any:
        """The ops of ``name``: ours, or the definitions."""
        return kernels if name in ("definition", "truth") else self.ours(name)

    def weights(self, seed: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """``w1, b1, w2, b2`` of a random head; ``dtype`` instead of the cell's gives the head before it was rounded."""
        H, K = self.H, self.K
        shapes = ((K, H), H**-0.5), ((K,), 0.1), ((1, K), 4 * K**-0.5), ((1,), 0.1)
        head = [self.random(seed, i, *shape, dtype=torch.float32) * scale for i, (shape, scale) in enumerate(shapes)]
        if (dtype or self.cell.dtype) == FLOAT8:
            return (*sprm.quantize(*head[:3]), head[3])
        return tuple(w.to(dtype or self.cell.dtype) for w in head)

    def random(self, seed: int, salt: int, *shape: int, dtype: torch.dtype) -> Tensor:
        g = torch.Generator(self.drawn_on).manual_seed(1000 * seed + salt)
        return torch.randn(shape, generator=g, device=self.drawn_on).to(self.device, dtype)

    def check(self, name: str) -> Gate:
        """The gate. Ours must have every output of the definition, peers may leave some out.

        Passes where the error is at most twice that of the definition in the same dtype, plus the rounding of the result.
        """
        definition, truth = self.yardstick
        weights = self.weights(0)
        found = _joined(self.outcome(name, weights, seed) for seed in range(self.samples))
        if missing := set(definition) - set(found) if name in OURS else ():
            raise RuntimeError(f"{name} leaves out {', '.join(sorted(missing))}")
        worst, exact, passed = (0.0, 0.0), True, True
        for key, ours in found.items():
            true, same = truth[key], definition[key]
            if not ours.is_floating_point() or ours.shape != true.shape:
                exact &= torch.equal(ours, true)
                continue
            error, allowed = deviation(ours, true), deviation(same, true)
            # The published way rounds its scores to the rows' dtype; so does the expression its activations beside float8.
            rounds = name == "published" or (name in PEERS and self.cell.dtype == FLOAT8)
            rounding = torch.finfo(self.row_dtype if rounds else torch.float32).eps
            passed &= error <= 2 * allowed + 4 * rounding  # false for NaN
            worst = max(worst, (error, allowed), key=lambda pair: (math.isnan(pair[0]), pair[0]))
        return Gate(*worst, passed and exact, exact)

    def as_rows(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The head in its rows' dtype: PyTorch's own expression of a float8 head."""
        return tuple(peers.in_one_dtype(weights, self.row_dtype)) if self.cell.dtype == FLOAT8 else weights

    @property
    def samples(self) -> int:
        """Fresh inputs that a gate looks at."""
        return -(-self.gate_rows // self.cell.rows) if self.cell.rows else 1

    @functools.cached_property
    def yardstick(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The definition's outcome in the cell's dtype, and in float64."""
        weights = self.weights(0)
        double = tuple(w.double() for w in weights)
        seeds = range(self.samples)
        return (
            _joined(self.outcome("definition", self.as_rows(weights), seed) for seed in seeds),
            _joined(self.outcome("truth", double, seed) for seed in seeds),
        )


class ScoreRows(Case):
    op = "score_rows"

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cell.rows * (self.cell.H * self.row_dtype.itemsize + 4)

    def bind(self, name: str, weights: tuple[Tensor, ...], seed: int) -> Subject:
        features = self.features(name, seed)
        if name == "published":
            T = max(TOKENS, self.cell.rows)
            states = features.new_zeros(T, self.cell.H)
            is_step = torch.arange(T, device=self.device) % (T // max(1, self.cell.rows)) == 0
            is_step &= is_step.cumsum(0) <= self.cell.rows
            states[is_step] = features
            return Subject(lambda: peers.published_score_rows(states, is_step, *weights))
        call = getattr(self.functions(name), self.op) if name not in PEERS else self.peer(name)
        return Subject(lambda: call(features, *weights))

    def outcome(self, name: str, weights: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
        found = self.bind(name, weights, seed).call()
        return {"score": found.float().log() if name == "published" else found}

    def features(self, name: str, seed: int) -> Tensor:
        rows = self.random(seed, 9, self.cell.rows, self.cell.H, dtype=self.row_dtype)
        return rows.double() if name == "truth" else rows

    def dtype_error(self) -> float:
        """Error of the definition for head and rows rounded to the cell's dtype, against float64 before the rounding."""
        features = self.random(0, 9, GATE_ROWS, self.cell.H, dtype=torch.float32)
        exact = getattr(kernels, self.op)(features.double(), *self.weights(0, torch.float64))
        return deviation(getattr(kernels, self.op)(features.to(self.row_dtype), *self.weights(0)), exact)


class LogitRows(ScoreRows):
    op = "logit_rows"


class DecodeStep(Case):
    """One token of each of ``max(8, rows)`` sequences, of which the first ``rows`` end a step. Variants but ``deferred`` are
    immediate; those of ``FORMS`` with other heads than the published one.
    """

    op = "decode_step"
    variants = ("immediate", "deferred", *FORMS)
    idle = True
    gate_rows = GATE_STEPS

    @property
    def immediate(self) -> bool:
        return self.cell.variant != "deferred"

    @property
    def form(self) -> Form:
        return FORMS.get(self.cell.variant, Form(2 * self.cell.H))

    @property
    def H(self) -> int:
        return self.cell.H * self.form.layers

    @property
    def K(self) -> int:
        return self.form.units

    def weights(self, seed: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        if not self.form.linear:
            return super().weights(seed, dtype)
        w, b = (self.random(seed, i, *shape, dtype=torch.float32) for i, shape in enumerate(((1, self.H), (1,))))
        head = torch.cat([w, -w]) * self.H**-0.5, torch.cat([b, -b]) * 0.1, w.new_tensor([[1, -1]]), w.new_zeros(1)
        return tuple(t.to(dtype or self.cell.dtype) for t in head)

    @property
    def batch(self) -> int:
        return max(8, self.cell.rows)

    @property
    def flops(self) -> int:
        return super().flops if self.immediate else 0

    @property
    def bytes(self) -> int:
        row = self.H * self.row_dtype.itemsize
        moved = 2 * self.batch * row  # hidden to last_hidden
        if not self.cell.rows:
            return moved
        return moved + (self.weight_bytes + self.cell.rows * row if self.immediate else 2 * self.cell.rows * row)

    def capturable(self, name: str) -> bool:
        return name != "expression" or not self.immediate

    def peer(self, name: str) -> Callable[..., Any]:
        if not self.immediate:
            function = peers.decode_step_deferred
        else:
            function = peers.decode_step if name == "expression" else peers.decode_step_masked
        return compiled(function, self.cell) if name == "compile" else function

    def bind(self, name: str, weights: tuple[Tensor, ...], seed: int) -> Subject:
        run, state = self.stream(name, weights)
        hidden = self.hidden(name, seed)
        mutable = list(state.values()) if name in PEERS else [state.seq, state.tally, state.n_slots]
        pristine = [t.clone() for t in mutable]
        ids = self.ids(self.cell.rows)
        return Subject(
            lambda: run(ids, hidden),
            lambda: torch._foreach_copy_(mutable, pristine),
            None if self.immediate or not self.cell.rows else self.buffer_rows // self.cell.rows,
        )

    @property
    def buffer_rows(self) -> int:
        return max(BUFFER_ROWS, self.batch)

    def ids(self, rows: int) -> Tensor:
        return (torch.arange(self.batch, device=self.device) < rows).long()[:, None]

    def hidden(self, name: str, seed: int) -> Tensor:
        rows = self.random(seed, 9, self.batch, 1, self.H, dtype=self.row_dtype)
        return rows.double() if name == "truth" else rows

    def stream(self, name: str, weights: tuple[Tensor, ...]) -> tuple[Callable[[Tensor, Tensor], None], Any]:
        """A step as a function of ids and hidden states, and the state that it mutates."""
        tables = one_id_automaton(self.device)
        if name in PEERS:
            state, step, head = self.peer_state(), self.peer(name), weights if self.immediate else ()
            rest = (None if self.form.linear else self.form.activation,) if self.immediate else ()
            return lambda ids, hidden: step(ids, hidden, *tables, *head, *state.values(), *rest), state
        state, step = self.new_state(name), self.functions(name).decode_step
        tensors, rest = state.tensors(), (True, self.immediate, None, None, 0, self.form.activation)
        return lambda ids, hidden: step(ids, hidden, *tables, *weights, *tensors, *rest), state

    def new_state(self, name: str) -> StreamState:
        state = StreamState.allocate(
            self.batch, self.H, self.K, buffer_rows=self.buffer_rows, max_steps=MAX_STEPS,
            dtype=torch.float64 if name == "truth" else self.row_dtype, device=self.device,
        )  # fmt: skip
        state.seq[:, layout.SEEN] = 2  # the first two tokens of a text end no step
        if name == "truth":
            state.step_score = state.step_score.double()
        return state

    def peer_state(self) -> dict[str, Tensor]:
        B, device = self.batch, self.device
        count = functools.partial(torch.zeros, dtype=torch.int64, device=device)
        state = {
            "state": count(B),
            "column": torch.full((), 2, device=device),
            "last_hidden": torch.zeros(B, self.H, dtype=self.row_dtype, device=device),
            "n_steps": count(B),
        }
        if self.immediate:
            return state | {"log_sum": torch.zeros(B, dtype=torch.float64, device=device)}
        # Ours empties a full buffer by itself, a peer needs room for both steps of its gate.
        R = max(self.buffer_rows, 2 * self.cell.rows) + 1
        slots = torch.zeros(R, self.H, dtype=self.row_dtype, device=device)
        return state | {"slots": slots, "owner": count(R), "n_slots": count(())}

    def outcome(self, name: str, weights: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
        """Three steps: rows, none, rows; what waits is flushed."""
        run, state = self.stream(name, weights)
        for i, rows in enumerate((self.cell.rows, 0, self.cell.rows)):
            run(self.ids(rows), self.hidden(name, 3 * seed + i))
        if name in PEERS:
            return self.peer_outcome(state, weights)
        if not self.immediate:
            self.functions(name).flush(*weights, *state.buffer())
        return stream_outcome(state)

    def peer_outcome(self, state: dict[str, Tensor], weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if not self.immediate:
            n = int(state["n_slots"])
            state["log_sum"] = torch.zeros(self.batch, dtype=torch.float64, device=self.device)
            peers.flush(*weights, state["slots"][:n], state["owner"][:n], state["log_sum"])
        return {"log_sum": state["log_sum"], "n_steps": state["n_steps"]}


class Flush(Case):
    """``rows`` waiting rows of ``SEQUENCES`` sequences in a buffer of ``max(BUFFER_ROWS, rows)``."""

    op = "flush"
    idle = True
    gate_rows = GATE_STEPS

    @property
    def bytes(self) -> int:
        rows = self.cell.rows
        return (self.weight_bytes + rows * self.cell.H * self.row_dtype.itemsize) * (rows > 0)

    def new_state(self, name: str, seed: int) -> StreamState:
        rows = self.cell.rows
        R = max(BUFFER_ROWS, rows)
        double = name == "truth"
        state = StreamState.allocate(
            SEQUENCES, max(8, self.cell.H), max(16, self.K), buffer_rows=R, max_steps=MAX_STEPS,
            dtype=torch.float64 if double else self.row_dtype, device=self.device,
        )  # fmt: skip
        if double:
            state.step_score = state.step_score.double()
        if self.cell.H:
            state.slots.copy_(self.random(seed, 9, R, self.cell.H, dtype=self.row_dtype))
        row = torch.arange(R, device=self.device, dtype=torch.int32)
        state.slot_owner.copy_(torch.stack([row % SEQUENCES, row // SEQUENCES, row % layout.N_REGIONS], 1))
        state.n_slots.fill_(rows)
        sequence = torch.arange(SEQUENCES, device=self.device)
        state.seq[:, layout.N_STEPS] = (rows - sequence + SEQUENCES - 1) // SEQUENCES
        return state

    def arguments(self, name: str, weights: tuple[Tensor, ...], state: StreamState, seed: int) -> tuple[Tensor, ...]:
        return *weights, *state.buffer()

    def peer_arguments(self, weights: tuple[Tensor, ...], state: StreamState, seed: int) -> tuple[Tensor, ...]:
        rows = self.cell.rows
        log_sum = torch.zeros(SEQUENCES, dtype=torch.float64, device=self.device)
        return *weights, state.slots[:rows], state.slot_owner[:rows, layout.OWNER_SEQUENCE].long(), log_sum

    def bind(self, name: str, weights: tuple[Tensor, ...], seed: int) -> Subject:
        state, once = self.new_state(name, seed), 1 if self.cell.rows else None
        if name in PEERS:
            call, arguments = self.peer(name), self.peer_arguments(weights, state, seed)
            return Subject(lambda: call(*arguments), calls=once)  # they could do without, but a comparison could not
        call, arguments = getattr(self.functions(name), self.op), self.arguments(name, weights, state, seed)
        return Subject(lambda: call(*arguments), lambda: state.n_slots.fill_(self.cell.rows), once)

    def outcome(self, name: str, weights: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
        state = self.new_state(name, seed)
        if name in PEERS:
            arguments = self.peer_arguments(weights, state, seed)
            self.peer(name)(*arguments)
            return {"log_sum": arguments[-1]}
        getattr(self.functions(name), self.op)(*self.arguments(name, weights, state, seed))
        return stream_outcome(state)


class TallySlots(Flush):
    op = "tally_slots"

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        # A logit and its owner in; its score, and the tally in and out.
        return self.cell.rows * (4 + 4 * layout.OWNER_FIELDS + 4 + 16 * layout.TALLY_FIELDS)

    def weights(self, seed: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return (self.random(seed, 3, 1, dtype=torch.float32),)

    def logits(self, name: str, seed: int) -> Tensor:
        logits = self.random(seed, 9, max(BUFFER_ROWS, self.cell.rows), dtype=torch.float32)
        return logits.double() if name == "truth" else logits

    def arguments(self, name: str, weights: tuple[Tensor, ...], state: StreamState, seed: int) -> tuple[Tensor, ...]:
        return self.logits(name, seed), *weights, state.tally, state.step_score, state.slot_owner, state.n_slots

    def peer_arguments(self, weights: tuple[Tensor, ...], state: StreamState, seed: int) -> tuple[Tensor, ...]:
        *_, owner, log_sum = super().peer_arguments((), state, seed)
        return self.logits("", seed)[: self.cell.rows], *weights, owner, log_sum


class StepMask(Case):
    """``rows`` texts of ``TOKENS`` tokens; one token in twenty ends a step, either tag occurs once."""

    op = "step_mask"

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return self.cell.rows * TOKENS * (8 + 1) + 4 * VOCAB  # ids in, mask out; the class table

    @property
    def samples(self) -> int:
        return 1

    def weights(self, seed: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return ()

    def bind(self, name: str, weights: tuple[Tensor, ...], seed: int) -> Subject:
        g = torch.Generator(self.drawn_on).manual_seed(seed)
        B, THINK, END = self.cell.rows, VOCAB - 1, VOCAB - 2
        ids = torch.randint(END, (B, TOKENS), generator=g, device=self.drawn_on).to(self.device)
        ids[:, 1], ids[:, TOKENS * 7 // 8] = THINK, END
        token_class = (torch.arange(VOCAB, device=self.device) < VOCAB // 20).int()
        token_class[THINK], token_class[END] = 2, 3
        # By class, then by state: 1 is the state after a step-token or the opening tag, where none counts.
        entries = [[0, 0], [layout.STEP | 1, 1], [layout.THINK | 1] * 2, [layout.END] * 2]
        tables = token_class, torch.tensor(entries, dtype=torch.int32, device=self.device)
        if name in PEERS:
            function = self.peer(name)
            return Subject(lambda: function(ids, *tables))
        zero = torch.zeros(B, dtype=torch.int64, device=self.device)
        function = self.functions(name).step_mask
        length = zero + TOKENS
        return Subject(lambda: function(ids, *tables, zero, length, zero))

    def outcome(self, name: str, weights: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
        return {"mask": self.bind(name, weights, seed).call()}


class SprmLoss(Case):
    """Forward and backward over ``rows`` rows of ``rows / 8`` trajectories: the gradients of the head, none of the features."""

    op = "sprm_loss"

    @property
    def flops(self) -> int:
        return 2 * super().flops  # forward, and G = a^T f

    @property
    def bytes(self) -> int:
        return 2 * self.weight_bytes + self.cell.rows * self.cell.H * self.cell.dtype.itemsize

    def peer(self, name: str) -> Callable[..., Any]:
        return peers.with_gradients(super().peer(name))

    def weights(self, seed: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """All logits far above 0: which rows keep their weight does not hang on rounding."""
        w1, b1, w2, b2 = super().weights(seed, dtype)
        return w1, b1, w2, b2.abs() + 4

    def bind(self, name: str, weights: tuple[Tensor, ...], seed: int) -> Subject:
        features, trajectory, outcome = self.inputs(name, seed)
        if name in PEERS:
            function = self.peer(name)
            return Subject(lambda: function(features, *weights, trajectory, outcome))
        op = self.functions(name)

        def call() -> tuple[Tensor, ...]:
            sums, _, dlogit, alive = op.sprm_loss(features, *weights, trajectory, outcome, None, None, 0.0, 1.0, True)
            _, *gradients = op.sprm_loss_backward(
                torch.ones_like(sums), dlogit, alive, features, *weights[:3], 0.0, 1.0, False
            )
            return sums, *gradients

        return Subject(call)

    def inputs(self, name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        M = self.cell.rows
        features = self.random(seed, 9, M, self.cell.H, dtype=self.cell.dtype)
        trajectory = torch.arange(M, device=self.device) // 8
        outcome = (torch.arange(-(-M // 8), device=self.device) % 2).float()
        return (features.double(), trajectory, outcome.double()) if name == "truth" else (features, trajectory, outcome)

    def outcome(self, name: str, weights: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
        found = self.bind(name, weights, seed).call()
        return {key: t.double().flatten() for key, t in zip(("sums", "w1", "b1", "w2", "b2"), found, strict=True)}


CASES: dict[str, type[Case]] = {
    case.op: case for case in (DecodeStep, Flush, ScoreRows, LogitRows, TallySlots, StepMask, SprmLoss)
}
WITHOUT_WIDTH = {"tally_slots": torch.float32, "step_mask": torch.int64}


def make(cell: Cell, device: torch.device) -> Case:
    return CASES[cell.op](cell, device)


def cells(
    ops: tuple[str, ...], widths: tuple[int, ...], rows: tuple[int, ...], dtypes: tuple[torch.dtype, ...],
    form_widths: tuple[int, ...] = (),
) -> Iterator[Cell]:  # fmt: skip
    """Every combination that makes sense. ``form_widths``: those of the ``FORMS``; none: ``widths``."""
    for op in ops:
        case = CASES[op]
        wide = op not in WITHOUT_WIDTH
        for variant in case.variants:
            for dtype in dtypes if wide else (WITHOUT_WIDTH[op],):
                if op == "sprm_loss" and dtype == FLOAT8:
                    continue
                if variant in FORMS:
                    if dtype != FLOAT8:
                        widths_here = form_widths or widths
                        yield from (Cell(op, variant, H, n, dtype) for H in widths_here for n in rows if n in FORM_ROWS)
                    continue
                for H in widths if wide else (0,):
                    yield from (Cell(op, variant, H, n, dtype) for n in rows if n or case.idle)


def one_id_automaton(device: torch.device) -> tuple[Tensor, Tensor]:
    """Token 1 ends a step, every other does not."""
    token_class = (torch.arange(VOCAB, device=device) == 1).int()
    return token_class, torch.tensor([[0], [layout.STEP]], dtype=torch.int32, device=device)


def stream_outcome(state: StreamState) -> dict[str, Tensor]:
    """All that a stream leaves behind for the reader of its result."""
    logged = torch.arange(state.step_score.shape[1], device=state.seq.device) < state.seq[:, layout.N_STEPS, None]
    now = state.seq[:, layout.SEEN] & 1
    counted = state.tally[..., layout.COUNT] > 0
    floats = {"log_sum": layout.LOG_SUM, "least": layout.MIN, "last": layout.LAST}
    return {
        "log_sum": state.tally[..., layout.LOG_SUM].sum(1),
        "n_steps": state.seq[:, layout.N_STEPS],
        "seq": state.seq,
        "count": state.tally[..., layout.COUNT].long(),
        "n_slots": state.n_slots,
        "last_hidden": state.last_hidden[torch.arange(len(now), device=now.device), now],
        "columns": state.step_column[logged],
        "regions": state.step_region[logged],
        "scores": state.step_score[logged],
        **{f"tally {name}": state.tally[..., field][counted] for name, field in floats.items()},
    }


def deviation(found: Tensor, truth: Tensor) -> float:
    """``||found - truth|| / ||truth||``."""
    if not truth.numel():
        return 0.0
    return float((found.double() - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def compiled(function: Callable[..., Any], cell: Cell) -> Callable[..., Any]:
    """``torch.compile(function)``, kept for the cells that differ in rows alone."""
    return _compiled(function, cell.op, cell.variant, cell.H, cell.dtype)


@functools.cache
def _compiled(function: Callable[..., Any], *key: Any) -> Callable[..., Any]:
    # Of a copy: dynamo counts recompilations, and looks through guards, by code object.
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(copy, fullgraph=True)


def _joined(outcomes: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = list(outcomes)
    return {key: torch.cat([p[key].flatten() for p in parts]) for key in parts[0]}
