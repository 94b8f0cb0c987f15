"""Random heads, automata and streams, and the rule by which backends are compared with the definitions.

Whatever has yet to be written is poisoned, and behind the last weight and behind each row lies a NaN: reading there shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from reflective import kernels
from reflective.benchmarks.peers import in_one_dtype
from reflective.kernels import layout
from reflective.scoring.sprm import quantize

V, CLASSES, STATES = 50, 6, 7
NEVER = 2**63 - 1  # a scope that never begins
FLOAT8 = torch.float8_e4m3fn
NAN = float("nan")
ACTIVATIONS = [
    pytest.param(layout.RELU, id="relu"),
    pytest.param(layout.GELU, id="gelu"),
    pytest.param(layout.GELU_TANH, id="gelu_tanh"),
    pytest.param(layout.SILU, id="silu"),
]
# Width and units of heads as they are published: probes of one layer, of three side by side, and linear ones, of one layer
# and of all 33 states of a model.
FORMS = [(2560, 512), (4096, 512), (5120, 512), (3 * 4096, 1024), (4096, 2), (33 * 4096, 2)]
STATE = (
    "seq", "tally", "last_hidden", "step_column", "step_region", "step_score", "slots", "slot_owner", "n_slots", "workspace",
)  # fmt: skip
State = dict[str, Tensor]


def random_head(
    H: int, K: int, dtype: torch.dtype, *, seed: int = 0, fp8: bool = False, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """``w1, b1, w2, b2`` of ``dtype``; with ``fp8`` a float8 ``w1`` whose row scales are folded into a float32 rest."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((K, H), H**-0.5), ((K,), 0.1), ((1, K), 4 * K**-0.5), ((1,), 0.1)
    w1, b1, w2, b2 = (torch.randn(shape, generator=g) * scale for shape, scale in shapes)
    if fp8:
        w1, b1, w2 = quantize(w1, b1, w2)

    def guarded(t: Tensor, dtype: torch.dtype) -> Tensor:
        flat = torch.cat([t.float().flatten(), torch.tensor([NAN])])
        return flat.to(dtype).to(device)[:-1].view(t.shape)

    rest = torch.float32 if fp8 else dtype
    return [guarded(w1, FLOAT8 if fp8 else dtype), guarded(b1, rest), guarded(w2, rest), guarded(b2, rest)]


def linear_head(H: int, dtype: torch.dtype, *, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
    """``w . f + b`` as the ops take it: ``relu(z) - relu(-z)``."""
    w, b, *_ = random_head(H, 1, dtype, seed=seed, device=device)
    return [torch.cat([w, -w]), torch.cat([b, -b]), w.new_tensor([[1, -1]]), w.new_zeros(1)]


def check_form(
    score_rows: Callable, logit_rows: Callable, H: int, K: int, dtype: torch.dtype, activation: int, most: int = 64,
    device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """A head of ``K`` units, linear if they are two, on ``most`` rows, of which one is not finite: the 2x rule, and a row's bits
    in a batch of one and of all."""
    make = linear_head if K == 2 and activation == layout.RELU else partial(random_head, K=K)
    head, rows = make(H, dtype=dtype, device=device), random_rows(most, H, dtype=dtype, device=device)
    rows[most // 2, H - 1] = -float("inf")
    double = [t.double() for t in (rows, *head)]
    for op, definition in ((score_rows, kernels.score_rows), (logit_rows, kernels.logit_rows)):
        ours = op(rows, *head, activation)
        assert ours.isnan().nonzero().flatten().tolist() == [most // 2]
        assert_2x(ours, definition(rows, *head, activation), definition(*double, activation))
        for row in (0, most // 2, most - 1):
            assert_identical(op(rows[row : row + 1], *head, activation), ours[row : row + 1])
        assert op(rows[:0], *head, activation).shape == (0,)


def random_rows(*shape: int, dtype: torch.dtype, seed: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """Contiguous in the last dimension only."""
    *outer, H = shape
    wide = torch.randn(*outer, H + 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wide[..., H:] = NAN
    return wide.to(device)[..., :H]


def random_ids(B: int, T: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """[B, T], transposed in memory."""
    return torch.randint(V, (T, B), generator=torch.Generator().manual_seed(seed)).to(device).t()


def random_automaton(seed: int = 0, step: float = 0.35, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """``token_class`` and ``transition`` that mean nothing: about ``step`` of the entries end a step."""
    g = torch.Generator().manual_seed(seed)
    transition = torch.randint(STATES, (CLASSES, STATES), generator=g, dtype=torch.int32)
    for flag, share in ((layout.STEP, step), (layout.THINK, 0.05), (layout.END, 0.05)):
        transition |= flag * (torch.rand(CLASSES, STATES, generator=g) < share).int()
    return torch.randint(CLASSES, (V,), generator=g, dtype=torch.int32).to(device), transition.to(device)


def random_scopes(T: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """``pad, length, start`` of 12 sequences of ``T`` columns: none and some of each, nothing but padding, and a scope that
    never begins."""
    bounds = [
        (0, T, 0), (0, T, T // 4), (T // 7, T, 0), (T // 3, T - 7, T // 2), (T, T, 0), (0, T, NEVER), (2, 5, 0), (0, 0, 0),
        (1, T, 1), (0, T // 2, T // 2), (3, T - 1, T), (T // 4, T, 2),
    ]  # fmt: skip
    return tuple(torch.tensor(column, device=device) for column in zip(*bounds, strict=True))


def check_step_mask(step_mask: Callable, T: int, seed: int, device: torch.device | str = "cpu") -> None:
    """Against the definition: random ids, every second row of a wider tensor, in every scope, and none at all."""
    automaton, scopes = random_automaton(seed, device=device), random_scopes(T, device)
    ids = random_ids(24, T, seed, device)[::2]
    expected = kernels.step_mask(ids, *automaton, *scopes)
    assert expected.any() and not expected.all()
    assert torch.equal(step_mask(ids, *automaton, *scopes), expected)
    assert step_mask(ids[:, :0], *automaton, *scopes).shape == (12, 0)
    assert step_mask(ids[:0], *automaton, *(bound[:0] for bound in scopes)).shape == (0, T)


def new_state(
    N: int, H: int, dtype: torch.dtype, *, units: int | None = None, slots: int = 5, log: int = 7,
    pad: Sequence[int] | None = None, start: Sequence[int] | None = None, device: torch.device | str = "cpu",
) -> State:  # fmt: skip
    """The state before the first token, in the order in which ``decode_step`` takes it."""
    units = 2 * H if units is None else units
    pad = [i % 3 * 4 for i in range(N)] if pad is None else pad
    start = [p + i % 2 * 6 for i, p in enumerate(pad)] if start is None else start
    state = {
        "seq": torch.zeros(N, layout.SEQ_FIELDS, dtype=torch.int64),
        "tally": torch.zeros(N, layout.N_REGIONS, layout.TALLY_FIELDS, dtype=torch.float64),
        "last_hidden": torch.full((N, 2, H), NAN, dtype=dtype),
        "step_column": torch.full((N, log), -7, dtype=torch.int32),
        "step_region": torch.full((N, log), -7, dtype=torch.int8),
        "step_score": torch.full((N, log), NAN, dtype=torch.promote_types(dtype, torch.float32)),
        "slots": torch.full((slots, H), NAN, dtype=dtype),
        "slot_owner": torch.full((slots, layout.OWNER_FIELDS), -7, dtype=torch.int32),
        "n_slots": torch.zeros(1, dtype=torch.int32),
        "workspace": torch.full((layout.workspace_size(slots + N, units),), NAN),
    }
    state["seq"][:, layout.PAD], state["seq"][:, layout.START] = torch.tensor(pad), torch.tensor(start)
    state["tally"][..., [layout.MIN, layout.LAST]] = NAN
    state["workspace"][: layout.WORKSPACE_HEADER] = 0
    return {name: state[name].to(device) for name in STATE}


def flush_arguments(state: State) -> list[Tensor]:
    return [state[name] for name in ("tally", "step_score", "slots", "slot_owner", "n_slots", "workspace")]


def newest_hidden(state: State) -> Tensor:
    """[N, H]: the half of ``last_hidden`` that is defined."""
    seen = state["seq"][:, layout.SEEN]
    return state["last_hidden"][torch.arange(len(seen), device=seen.device), seen & 1]


@dataclass(frozen=True)
class Call:
    """One ``decode_step`` of the next ``lengths[i]`` tokens of sequence ``sequences[i]``; -1 is one to be skipped."""

    sequences: list[int]
    lengths: list[int]
    packed: bool


def random_calls(B: int, T: int, seed: int = 0) -> list[Call]:
    """``B`` sequences of ``T`` tokens each, whatever its turn: dense and packed calls, some sequences resting or skipped, in any
    order, of none, one and many tokens each.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    left, calls = [T] * B, []
    while any(left):
        packed, order = draw(2) == 1, torch.randperm(B, generator=g).tolist()
        if draw(3) == 0:
            order = sorted(order)
        if packed:
            wanted = [min(left[s], (0, 1, 1, 2, 9)[draw(5)]) for s in order]
            at = draw(B + 1)
            order[at:at], wanted[at:at] = [-1, -1], [draw(4), 1]
        else:
            q = min([n for n in left if n] + [(1, 1, 3)[draw(3)]])
            order = [s if left[s] and draw(4) else -1 for s in order]
            wanted = [q] * B
        for s, n in zip(order, wanted, strict=True):
            if s >= 0:
                left[s] -= n
        calls.append(Call(order, wanted, packed))
    return calls


@dataclass
class Stream:
    """``T`` random tokens of ``B`` sequences, for a state that has room for ``N``."""

    B: int
    T: int
    H: int
    dtype: torch.dtype
    seed: int = 0
    fp8: bool = False
    step: float = 0.35
    units: int | None = None
    N: int | None = None
    device: torch.device | str = "cpu"
    sizes: dict = field(default_factory=dict)  # keywords of ``new_state``
    activation: int = layout.RELU

    def __post_init__(self) -> None:
        self.units = 2 * self.H if self.units is None else self.units
        self.ids = random_ids(self.B, self.T, self.seed, self.device)
        self.hidden = random_rows(self.B, self.T, self.H, dtype=self.dtype, seed=self.seed, device=self.device)
        self.automaton = random_automaton(self.seed, self.step, self.device)
        self.head = random_head(
            self.H, self.units, self.dtype, seed=self.seed, fp8=self.fp8, device=self.device
        )  # fmt: skip

    def state(self, dtype: torch.dtype | None = None) -> State:
        return new_state(
            self.N or self.B, self.H, dtype or self.dtype, units=self.units, device=self.device, **self.sizes
        )  # fmt: skip

    def feed(
        self, decode_step: Callable, state: State, chunks: Sequence[int], at_predict: bool, immediate: bool,
        dtype: torch.dtype | None = None,
    ) -> State:  # fmt: skip
        """The tokens in ``chunks``, which may be fewer than all of them; in ``dtype`` instead of the stream's own."""
        head = self.head_as(dtype, decode_step is kernels.decode_step)
        begin = 0
        for q in chunks:
            part = self.ids[:, begin : begin + q], self.hidden[:, begin : begin + q].to(dtype or self.dtype)
            decode_step(
                *part, *self.automaton, *head, *state.values(), at_predict, immediate, None, None, 0, self.activation
            )  # fmt: skip
            begin += q
        return state

    def run(
        self, decode_step: Callable, state: State, calls: Sequence[Call], at_predict: bool, immediate: bool,
        dtype: torch.dtype | None = None,
    ) -> State:  # fmt: skip
        """``calls``, sequence s in the state's row B - 1 - s; what is skipped or padding has NaN for hidden states."""
        head, at = self.head_as(dtype, decode_step is kernels.decode_step), [0] * self.B
        int32 = {"dtype": torch.int32, "device": self.device}
        for call in calls:
            padding = int(call.packed) * 3
            ids, hidden = [], []
            for s, n in (*zip(call.sequences, call.lengths, strict=True), (-1, padding)):
                ids.append(self.ids[s, at[s] : at[s] + n] if s >= 0 else self.ids.new_zeros(n))
                hidden.append(self.hidden[s, at[s] : at[s] + n] if s >= 0 else self.hidden.new_full((n, self.H), NAN))
                if s >= 0:
                    at[s] += n
            join = (lambda parts: torch.cat(parts)[None]) if call.packed else (lambda parts: torch.stack(parts[:-1]))
            rows: Tensor | None = torch.tensor([self.B - 1 - s if s >= 0 else -1 for s in call.sequences], **int32)
            if torch.equal(rows, torch.arange(self.B, **int32)):
                rows = None
            bounds = torch.tensor([0, *call.lengths], **int32).cumsum(0, dtype=torch.int32) if call.packed else None
            decode_step(
                join(ids), join(hidden).to(dtype or self.dtype), *self.automaton, *head, *state.values(), at_predict, immediate,
                rows, bounds, 0, self.activation,
            )  # fmt: skip
        assert at == [self.T] * self.B
        return state

    def check_calls(
        self, decode_step: Callable, flush: Callable, at_predict: bool, immediate: bool, seed: int = 0, same_bits: bool = True
    ) -> None:  # fmt: skip
        """Random calls against the definition, and against the same tokens in dense calls without ``rows``: bit for bit, but
        for the scores where ``same_bits`` is false.
        """
        calls, states = random_calls(self.B, self.T, seed), []
        for op, flush_op, dtype in (
            (decode_step, flush, None),
            (kernels.decode_step, kernels.flush, None),
            (kernels.decode_step, kernels.flush, torch.float64),
        ):
            state = self.run(op, self.state(dtype), calls, at_predict, immediate, dtype)
            states.append(state if immediate else self.flush(flush_op, state, dtype))
        assert_same_state(*states)
        assert states[0]["seq"][:, layout.N_STEPS].sum() > 0

        in_order = replace(self)
        in_order.ids, in_order.hidden = self.ids.flip(0), self.hidden.flip(0)
        alone = self.flush(flush, in_order.feed(decode_step, self.state(), [1] * self.T, at_predict, immediate))
        for name in ("seq", "step_column", "step_region"):
            assert_identical(states[0][name], alone[name])
        for name in ("tally", "step_score"):
            (assert_identical if same_bits else assert_close)(states[0][name], alone[name])
        assert_identical(newest_hidden(states[0]), newest_hidden(alone))

    def flush(self, flush: Callable, state: State, dtype: torch.dtype | None = None) -> State:
        flush(*self.head_as(dtype, flush is kernels.flush), *flush_arguments(state), self.activation)
        return state

    def head_as(self, dtype: torch.dtype | None, defined: bool) -> list[Tensor]:
        """In ``dtype``; else the head itself, or for a definition what PyTorch would use in the stream's dtype."""
        if dtype is not None:
            return [t.to(dtype) for t in self.head]
        return in_one_dtype(self.head, self.dtype) if defined else self.head

    def arguments(self) -> tuple:
        """Of one ``decode_step`` over all tokens, as far as ``workspace``: the state is the last ten."""
        return self.ids, self.hidden, *self.automaton, *self.head, *self.state().values()

    def check(
        self, decode_step: Callable, flush: Callable, chunks: Sequence[int], at_predict: bool, immediate: bool
    ) -> tuple[State, State, State]:  # fmt: skip
        """Compare ``decode_step`` and ``flush`` with the definitions. Returns the states: ours, the definition's, the truth."""
        states = []
        for ops, dtype in (
            ((decode_step, flush), None),
            ((kernels.decode_step, kernels.flush), None),
            ((kernels.decode_step, kernels.flush), torch.float64),
        ):
            state = self.feed(ops[0], self.state(dtype), chunks, at_predict, immediate, dtype)
            states.append(state if immediate else self.flush(ops[1], state, dtype))
        assert_same_state(*states)
        return tuple(states)


def assert_identical(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, equal_nan=True)


def assert_2x(ours: Tensor, definition: Tensor, truth: Tensor) -> None:
    """At most twice the error of the same-dtype definition, or a few float32 ulp where that has none; NaN where it has."""
    ours, definition, truth = (t.double() for t in (ours, definition, truth))
    assert_identical(ours.isnan(), truth.isnan())
    ours, definition, truth = (t.nan_to_num() for t in (ours, definition, truth))
    if not truth.numel():
        return
    error, allowed = (ours - truth).abs().max(), (definition - truth).abs().max()
    ulp = torch.finfo(torch.float32).eps * truth.abs().max().clamp_min(1)
    assert error <= torch.maximum(2 * allowed, 4 * ulp), f"error {error:.2e}, the definition's {allowed:.2e}"


def assert_same_state(ours: State, definition: State, truth: State) -> None:
    """Equal where the arithmetic is exact, the 2x rule elsewhere; rows that wait for a flush are left alone."""
    for name in ("seq", "step_column", "step_region", "n_slots"):
        assert torch.equal(ours[name], definition[name]), name
    assert_identical(newest_hidden(ours), newest_hidden(definition))
    assert not ours["workspace"][: layout.WORKSPACE_HEADER].any(), "the workspace's header is not zero"
    assert torch.equal(ours["tally"][..., layout.COUNT], truth["tally"][..., layout.COUNT])
    for sums in (layout.LOG_SUM, layout.MIN, layout.LAST):
        assert_2x(*(s["tally"][..., sums] for s in (ours, definition, truth)))
    assert_2x(*(s["step_score"] for s in (ours, definition, truth)))


def check_resting(decode_step: Callable, q: int, device: torch.device | str = "cpu", beyond: bool = False) -> None:
    """Of six states three rows of ids name two, in a dense call and, as q tokens, none and two columns of nobody, in a packed
    one: not one bit of the others is touched, whatever lies in them, nor of anything by a row outside the state (``beyond``).
    """
    case = Stream(
        3 + beyond, q, 16, torch.float32, step=1.1, N=6, device=device, sizes={"pad": [0] * 6, "start": [0] * 6}
    )
    int32 = {"dtype": torch.int32, "device": device}
    rows = torch.tensor([4, -1, 2, 6][: 3 + beyond], **int32)
    packed = torch.tensor([0, q, q, q, q][: 4 + beyond], **int32)
    for bounds in (None, packed):
        ids, hidden = (case.ids, case.hidden) if bounds is None else (case.ids[:1], case.hidden[:1])
        state = case.state()
        before = {name: t.clone() for name, t in state.items()}
        decode_step(ids, hidden, *case.automaton, *case.head, *state.values(), True, True, rows, bounds)
        for name in STATE[:6]:
            assert_identical(state[name][[0, 1, 3, 5]], before[name][[0, 1, 3, 5]])
        assert state["seq"][:, layout.SEEN].tolist() == [0, 0, q if bounds is None else 0, 0, q, 0]


def check_quiet(decode_step: Callable, flush: Callable, device: torch.device | str = "cpu") -> None:
    """Whatever part of the columns before the scope is said to be quiet, all bits are those of a call that says nothing (of the
    definition's scores, nearly); a step in scope of a column said to be quiet does not count, and takes no slot: dense and packed,
    of one column and many.
    """
    T, start = 16, 10
    defined = decode_step is kernels.decode_step
    sizes = {"slots": 7, "log": T, "pad": [0, 4, 0], "start": [start, start + 2, NEVER]}
    case = Stream(3, T, 16, torch.float32, step=1.1, device=device, sizes=sizes)
    head, bounds = case.head, torch.tensor([0, 5, 5, T], dtype=torch.int32, device=device)

    def run(
        op: Callable, quiet: Sequence[int], lengths: Sequence[int], immediate: bool, starts: Sequence[int]
    ) -> State:
        state, begin = case.state(), 0
        state["seq"][:, layout.START] = torch.tensor(starts, device=device)
        for n, q in zip(quiet, lengths, strict=True):
            part = case.ids[:, begin : begin + q], case.hidden[:, begin : begin + q]
            op(*part, *case.automaton, *head, *state.values(), True, immediate, None, None, n)
            begin += q
        (kernels.flush if op is kernels.decode_step else flush)(*head, *flush_arguments(state))
        return state

    def same(a: State, b: State) -> None:
        for state in (a, b):
            state["seq"][:, layout.START] = 0
        for name in ("seq", "step_column", "step_region"):
            assert_identical(a[name], b[name])
        for name in ("tally", "step_score"):
            (assert_close if defined else assert_identical)(a[name].float(), b[name].float())
        assert_identical(newest_hidden(a), newest_hidden(b))

    for immediate in (True, False):
        for lengths, most in (
            ([T], [start]),
            ([start, T - start], [start, 0]),
            ([1] * T, [1] * start + [0] * (T - start)),
        ):
            expected = run(decode_step, [0] * len(lengths), lengths, immediate, sizes["start"])
            assert expected["seq"][:, layout.N_STEPS].tolist() == [T - start, T - start - 2, 0]
            same(run(decode_step, most, lengths, immediate, sizes["start"]), expected)
            same(run(decode_step, [n // 2 for n in most], lengths, immediate, sizes["start"]), expected)
        # Beyond what is true, and beyond the columns there are: as if the scope began there. Nothing overflows.
        for said, counting in ((13, 13), (T, T), (T + 100, T), (2**40, T)):
            for op in (decode_step, kernels.decode_step):
                state = run(op, [said], [T], immediate, [0] * 3)
                assert state["seq"][:, layout.N_STEPS].tolist() == [T - counting] * 3
                assert (state["step_column"][:, : T - counting] >= counting).all()
            same(
                run(decode_step, [said], [T], immediate, [0] * 3), run(decode_step, [0], [T], immediate, [counting] * 3)
            )
        last = run(decode_step, [0] * (T - 1) + [9], [1] * T, immediate, [0] * 3)
        assert last["seq"][:, layout.N_STEPS].tolist() == [T - 3, T - 7, T - 3]

        states = []
        for quiet in (0, 7, 9, 12, 2**40):  # packed, columns are those of the buffer
            state = case.state()
            state["seq"][:, layout.PAD] = 0
            state["seq"][:, layout.START] = torch.tensor([2, 0, 7], device=device)
            packed = case.ids[:1], case.hidden[:1], *case.automaton, *head, *state.values(), True, immediate
            decode_step(*packed, None, bounds, quiet)
            flush(*head, *flush_arguments(state))
            states.append(state)
        found = [state["seq"][:, layout.N_STEPS].tolist() for state in states]
        assert found == [[3, 0, T - 12], [0, 0, T - 12], [0, 0, T - 12], [0, 0, T - 12], [0, 0, 0]]
        for state in states[1:4]:
            same(*({name: t[1:] for name, t in s.items()} for s in (state, states[0])))

    with pytest.raises((ValueError, RuntimeError), match="quiet.*-1.*0 or more"):
        run(decode_step, [-1], [T], True, [0] * 3)


def opcheck_arguments(
    device: torch.device | str = "cpu", fp8: bool = False, activation: int = layout.RELU
) -> dict[str, tuple]:
    """Arguments for every op by its name, as few as it can do with."""
    another = (activation,) if activation != layout.RELU else ()
    last = (None, None, 0, *another) if another else ()
    dtype = torch.bfloat16 if fp8 else torch.float32
    case = Stream(3, 9, 16, dtype, seed=5, fp8=fp8, device=device)
    state = case.feed(kernels.decode_step, case.state(), [9], True, False)
    columns = torch.zeros(3, dtype=torch.int64, device=device)
    logits = torch.zeros(len(state["slots"]), device=device)
    buffer = dict(zip(("tally", "step_score", "slots", "slot_owner", "n_slots", "workspace"), flush_arguments(state)))
    rest = [buffer[name] for name in ("tally", "step_score", "slot_owner", "n_slots")]
    return {
        "step_mask": (case.ids, *case.automaton, columns, columns + 9, columns),
        "score_rows": (case.hidden[0], *case.head, *another),
        "logit_rows": (case.hidden[0], *case.head[:3], *((None, *another) if another else ())),
        "decode_step": (case.ids, case.hidden, *case.automaton, *case.head, *state.values(), True, True, *last),
        "flush": (*case.head, *flush_arguments(state), *another),
        "tally_slots": (logits, case.head[3], *rest),
    }


def packed_arguments(device: torch.device | str = "cpu") -> tuple:
    """Arguments of a packed ``decode_step``: three sequences of 4, no and 3 tokens, one to be skipped, and padding."""
    case = Stream(3, 12, 16, torch.float32, seed=5, device=device, sizes={"pad": [0] * 3, "start": [0] * 3})
    rows = torch.tensor([2, 0, 1, -1], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 4, 4, 7, 9], dtype=torch.int32, device=device)
    state = case.state().values()
    return case.ids[:1], case.hidden[:1], *case.automaton, *case.head, *state, True, True, rows, bounds


def quiet_arguments(device: torch.device | str = "cpu") -> tuple:
    """Arguments of a dense ``decode_step`` that begins with four quiet columns."""
    return *opcheck_arguments(device)["decode_step"], None, None, 4
