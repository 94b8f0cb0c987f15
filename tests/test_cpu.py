"""The compiled CPU ops against their definitions, on every instruction set that this processor has."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import (
    ACTIVATIONS,
    FORMS,
    STATE,
    STATES,
    Stream,
    V,
    assert_2x,
    assert_identical,
    check_form,
    check_quiet,
    check_resting,
    check_step_mask,
    flush_arguments,
    opcheck_arguments,
    packed_arguments,
    quiet_arguments,
    random_head,
    random_rows,
)
from torch import Tensor

from reflective import kernels
from reflective.kernels import layout
from reflective.scoring import ops

extension = pytest.importorskip("reflective._C", reason=ops.WHY_NO_EXTENSION)
cpu = torch.ops.reflective

CAPABILITIES = ["portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 2), (7, 14), (64, 128), (576, 1152), (577, 1154), (65, 1), (100, 37), (33, 64)]  # width, units


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.cpu_capability()
    try:
        cpu.set_cpu_capability(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.set_cpu_capability(before)


def stream_case(H: int, dtype: torch.dtype, T: int = 9, **sizes: int) -> tuple:
    """Arguments of one ``decode_step`` over ``T`` tokens of 3 sequences."""
    return Stream(3, T, H, dtype, seed=5, sizes=sizes).arguments()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K"), SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_score_rows(capability: str, activation: int, H: int, K: int, dtype: torch.dtype) -> None:
    head, rows = (*random_head(H, K, dtype), activation), random_rows(300, H, dtype=dtype)
    scores = cpu.score_rows(rows, *head)
    assert scores.dtype == torch.float32
    truth = kernels.score_rows(rows.double(), *(t.double() for t in head[:4]), activation)
    assert_2x(scores, kernels.score_rows(rows, *head), truth)

    # A row's bits do not depend on the company it keeps, its place or the number of threads.
    for M in (0, 1, 3, 17):
        assert_identical(cpu.score_rows(rows[40 : 40 + M], *head), scores[40 : 40 + M])
    assert_identical(cpu.score_rows(rows.flip(0), *head).flip(0), scores)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert_identical(cpu.score_rows(rows, *head), scores)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K"), FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
def test_published_forms(capability: str, activation: int, H: int, K: int, dtype: torch.dtype) -> None:
    check_form(cpu.score_rows, cpu.logit_rows, H, K, dtype, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_every_activation_is_that_of_pytorch(capability: str, activation: int) -> None:
    """One unit, whose input is the row's only feature: within 2 ulp of the input, and of 1e-7 where they vanish."""
    z = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -1e30, 1e30, 1e-30, -88.5, -104.0])])
    one, zero = torch.ones(1, 1), torch.zeros(1)
    found = cpu.logit_rows(z[:, None], one, zero, one, None, activation)
    truth = kernels.logit_rows(z[:, None].double(), one.double(), zero.double(), one.double(), None, activation)
    limit = 2 * torch.finfo(torch.float32).eps * z.abs().double() * (z > -5) + 1e-7 * (z <= -5)
    assert ((found - truth).abs() <= limit).all()


@pytest.mark.parametrize("activation", [-1, 4])
def test_an_activation_that_there_is_not(activation: int) -> None:
    case, message = stream_case(16, torch.float32), rf"activation\b.*{activation}.*expected 0 \(relu\)"
    head, before = case[4:8], [t.clone() for t in case]
    buffer = flush_arguments(dict(zip(STATE, case[8:], strict=True)))
    for name, arguments in (
        ("score_rows", (case[1][0], *head, activation)),
        ("logit_rows", (case[1][0], *head, activation)),
        ("decode_step", (*case, True, True, None, None, 0, activation)),
        ("flush", (*head, *buffer, activation)),
    ):
        for ops_of in (cpu, kernels):
            with pytest.raises((ValueError, RuntimeError), match=message):
                getattr(ops_of, name)(*arguments)
    for ours, expected in zip(case, before, strict=True):
        assert_identical(ours, expected)


def test_float8_weights_go_with_relu_alone() -> None:
    head, rows = random_head(16, 32, torch.bfloat16, fp8=True), random_rows(3, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="activation=3: the scales of w1 in float8_e4m3fn"):
        kernels.score_rows(rows, *head, layout.SILU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_that_is_not_finite_harms_no_other(capability: str, activation: int, dtype: torch.dtype) -> None:
    head, rows = random_head(577, 70, dtype), random_rows(20, 577, dtype=dtype)
    head[0].copy_(-head[0].abs())  # every unit's activation swallows +inf
    head.append(activation)
    broken = rows.clone()
    broken[3, 576], broken[5, 0], broken[19, 300] = float("nan"), float("inf"), float("-inf")
    expected = cpu.score_rows(rows, *head)
    expected[[3, 5, 19]] = float("nan")
    assert_identical(cpu.score_rows(broken, *head), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_logits(capability: str, activation: int, dtype: torch.dtype) -> None:
    w1, b1, w2, _ = random_head(40, 80, dtype)
    rows = random_rows(5, 40, dtype=dtype)
    for b2 in (1e4, -1e4, -20.0, float("nan")):
        head = w1, b1, w2, torch.tensor([b2], dtype=dtype)
        truth = kernels.score_rows(*(t.double() for t in (rows, *head)), activation)
        torch.testing.assert_close(cpu.score_rows(rows, *head, activation), truth.float(), equal_nan=True)
    b1[7] = float("nan")  # an activation that swallowed it would hide a broken head
    assert cpu.score_rows(rows, w1, b1, w2, b1[:1], activation).isnan().all()


@pytest.mark.parametrize("seed", range(3))
def test_step_mask(seed: int) -> None:
    check_step_mask(cpu.step_mask, 40, seed)


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("at_predict", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(2))
def test_stream(seed: int, dtype: torch.dtype, at_predict: bool, immediate: bool) -> None:
    """Random tables, random ids in random chunks: one row of the state is not used, and both buffers overflow."""
    case = Stream(3, 50, 33, dtype, seed, N=4, sizes={"slots": 3})
    chunks, g = [], torch.Generator().manual_seed(seed)
    while sum(chunks) < case.T:
        chunks.append(int(torch.randint(1, 16, (), generator=g)))
    ours, definition, _ = case.check(cpu.decode_step, cpu.flush, chunks, at_predict, immediate)
    assert (ours["seq"][:, layout.N_STEPS] > ours["step_score"].shape[1]).any()  # steps past the log's capacity
    for name in ("slot_owner", "slots"):
        assert_identical(ours[name], definition[name])


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_stream_of_another_activation(activation: int, dtype: torch.dtype, immediate: bool) -> None:
    """Also with buffers that overflow, and of two units."""
    for units in (2, 66):
        case = Stream(3, 24, 33, dtype, units=units, sizes={"slots": 3}, activation=activation)
        case.check(cpu.decode_step, cpu.flush, [1, 9, 1, 13], True, immediate)


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("at_predict", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_that_come_and_go(dtype: torch.dtype, at_predict: bool, immediate: bool) -> None:
    """Sequences in other rows of the state, resting, skipped, packed: as if each were alone."""
    for seed in range(4):
        case = Stream(4, 30, 33, dtype, seed, sizes={"slots": 5, "log": 12})
        case.check_calls(cpu.decode_step, cpu.flush, at_predict, immediate, seed)


def test_the_definition_of_rows_and_segments() -> None:
    """In float64 the definition itself: packed and scattered over the state, or dense and in order."""
    for seed in range(4):
        case = Stream(4, 30, 8, torch.float64, seed, sizes={"slots": 5, "log": 12})
        case.check_calls(kernels.decode_step, kernels.flush, True, True, seed, same_bits=False)


@pytest.mark.parametrize("q", [1, 4])
def test_states_that_no_row_names_rest(q: int) -> None:
    check_resting(cpu.decode_step, q)


@pytest.mark.parametrize("ops", [cpu, kernels], ids=["cpu", "definition"])
def test_quiet_columns(ops) -> None:
    check_quiet(ops.decode_step, ops.flush)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ops_give_a_row_the_same_bits(capability: str, dtype: torch.dtype) -> None:
    ids, hidden, *rest = stream_case(100, dtype, T=40, slots=40, log=40)
    tables_and_head, names = rest[:6], STATE
    deferred, immediate = (dict(zip(names, (t.clone() for t in rest[6:]), strict=True)) for _ in range(2))
    cpu.decode_step(ids, hidden, *tables_and_head, *deferred.values(), True, False)
    n = int(deferred["n_slots"])
    assert n > 9
    owner = deferred["slot_owner"][:n].long()
    expected = cpu.score_rows(deferred["slots"][:n], *tables_and_head[2:])
    cpu.flush(*tables_and_head[2:], *flush_arguments(deferred))
    for j in range(ids.shape[1]):
        column = slice(j, j + 1)
        cpu.decode_step(ids[:, column], hidden[:, column], *tables_and_head, *immediate.values(), True, True)
    for state in (deferred, immediate):
        scores = state["step_score"][owner[:, layout.OWNER_SEQUENCE], owner[:, layout.OWNER_STEP]]
        assert_identical(scores, expected)


def test_a_step_that_is_not_finite_marks_its_own_sequence_only() -> None:
    ids, hidden, *rest = stream_case(16, torch.float32, T=40, slots=40, log=40)
    hidden[1, 20:30] = float("nan")
    expected = [t.clone() for t in rest]
    cpu.decode_step(ids, hidden, *rest, False, True)
    kernels.decode_step(ids, hidden, *expected, False, True)
    tally = rest[7]
    assert_identical(tally.isnan(), expected[7].isnan())
    counted = tally[..., layout.COUNT] > 0
    assert tally[1][counted[1]].isnan().any()
    assert not tally[[0, 2]][counted[[0, 2]]].isnan().any()


@pytest.mark.parametrize("token", [-1, V])
def test_an_id_outside_the_vocabulary_changes_nothing(token: int) -> None:
    ids, *rest = stream_case(16, torch.float32)
    ids[2, 8] = token
    before = [t.clone() for t in rest]
    with pytest.raises(IndexError, match=rf"ids\[2, 8\] is {token}, outside the vocabulary of {V}"):
        cpu.decode_step(ids, *rest, True, True)
    for ours, expected in zip(rest, before, strict=True):
        assert_identical(ours, expected)
    columns = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(IndexError, match="outside the vocabulary"):
        cpu.step_mask(ids, *rest[1:3], columns, columns + 9, columns)


def test_bad_arguments_are_named() -> None:
    names = [a.name for a in cpu.decode_step.default._schema.arguments]
    case = dict(zip(names, (*stream_case(16, torch.float32, slots=3), True, True, None, None, 0, 0), strict=True))
    wrong = {
        "hidden": [case["hidden"].bfloat16(), case["hidden"].mT.contiguous().mT, case["hidden"][:, :4]],
        "ids": [case["ids"].int(), case["ids"].repeat(2, 1)],
        "w1": [case["w1"].half(), case["w1"].t().contiguous().t(), case["w1"][:0]],
        "b1": [case["b1"][1:], case["b1"].bfloat16()],
        "seq": [case["seq"].int(), case["seq"][:, :7]],
        "tally": [case["tally"].float()],
        "last_hidden": [case["last_hidden"][:1]],
        "slots": [case["slots"][:0], case["slots"][:, 1:]],
        "slot_owner": [case["slot_owner"].t().contiguous().t()],
        "n_slots": [torch.tensor([4], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)],
        "transition": [case["transition"][:1], case["transition"].long()],
        "rows": [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)],
        "quiet": [-1],
        "activation": [-1, 4],
        "cu_seqlens": [torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)],  # ids have three rows
    }
    for name, values in wrong.items():
        for value in values:
            arguments = case | {name: value}
            if name == "ids" and value.shape[0] > 3:
                arguments["hidden"] = case["hidden"].repeat(2, 1, 1)
            with pytest.raises((RuntimeError, IndexError), match=rf"\b{name}\b"):
                cpu.decode_step(*arguments.values())
    with pytest.raises(RuntimeError, match="features must have shape"):
        cpu.score_rows(torch.zeros(3, 15), case["w1"], case["b1"], case["w2"], case["b2"])
    case["seq"][0, layout.AUTOMATON] = STATES
    with pytest.raises(IndexError, match="automaton is in state"):
        cpu.decode_step(*case.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", [0, 3, 1, -1], r"rows\[1\] is 3, the state holds 3"),
        ("rows", [0, -2, 1, -1], r"rows\[1\] is -2"),
        ("rows", [0, 1], r"rows must have shape \[4\]"),
        ("cu_seqlens", [0, 4, 3, 7, 9], r"cu_seqlens\[2\] is 3"),
        ("cu_seqlens", [0, 4, 4, 7, 13], r"cu_seqlens\[4\] is 13"),
        ("cu_seqlens", [-1, 4, 4, 7, 9], r"cu_seqlens\[0\] is -1"),
        ("cu_seqlens", [], "cu_seqlens must have at least one entry"),
    ],
)
def test_bad_segments_change_nothing(name: str, value: list[int], message: str) -> None:
    arguments = list(packed_arguments())
    arguments[20 if name == "rows" else 21] = torch.tensor(value, dtype=torch.int32)
    before = [t.clone() for t in arguments[8:18]]
    with pytest.raises((RuntimeError, IndexError), match=message):
        cpu.decode_step(*arguments)
    for ours, expected in zip(arguments[8:18], before, strict=True):
        assert_identical(ours, expected)


def test_columns_behind_the_last_sequence_are_not_looked_at() -> None:
    arguments = packed_arguments()
    arguments[0][0, 9:] = -100
    cpu.decode_step(*arguments)
    arguments[0][0, 8] = -100
    with pytest.raises(IndexError, match=r"ids\[0, 8\] is -100"):
        cpu.decode_step(*arguments)


def test_opcheck_of_quiet_columns() -> None:
    torch.library.opcheck(cpu.decode_step.default, quiet_arguments())


def test_opcheck_of_a_packed_call() -> None:
    torch.library.opcheck(cpu.decode_step.default, packed_arguments())


@pytest.mark.parametrize(("op", "arguments"), opcheck_arguments().items())
def test_opcheck(op: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(cpu, op).default, arguments)


@pytest.mark.parametrize("op", ["score_rows", "logit_rows", "decode_step", "flush"])
def test_opcheck_of_another_activation(op: str) -> None:
    torch.library.opcheck(getattr(cpu, op).default, opcheck_arguments(activation=layout.SILU)[op])


def test_compiles_as_one_graph() -> None:
    eager, compiled = stream_case(16, torch.float32), stream_case(16, torch.float32)

    @torch.compile(fullgraph=True)
    def step(ids: Tensor, *rest: Tensor) -> Tensor:
        cpu.decode_step(ids, *rest, True, True)
        return ids

    for _ in range(2):
        step(*compiled)
        cpu.decode_step(*eager, True, True)
    for ours, expected in zip(compiled, eager, strict=True):
        assert_identical(ours, expected)


def test_a_packed_buffer_compiles_once() -> None:
    """Other sequences, rows and lengths in buffers of the same shapes: one graph, without a recompilation."""
    eager, compiled = packed_arguments(), packed_arguments()

    @torch.compile(fullgraph=True)
    def step(*arguments: Tensor) -> None:
        cpu.decode_step(*arguments[:-2], True, True, *arguments[-2:])

    def tensors(arguments: tuple) -> tuple[Tensor, ...]:
        return *arguments[:18], *arguments[20:]

    step(*tensors(compiled))
    cpu.decode_step(*eager)
    for rows, bounds in (([0, 1, 2, -1], [0, 1, 2, 3, 3]), ([-1, 1, 0, 2], [0, 5, 6, 12, 12])):
        for arguments in (eager, compiled):
            arguments[20].copy_(torch.tensor(rows))
            arguments[21].copy_(torch.tensor(bounds))
        with torch.compiler.set_stance("fail_on_recompile"):
            step(*tensors(compiled))
        cpu.decode_step(*eager)
    for ours, expected in zip(tensors(compiled), tensors(eager), strict=True):
        assert_identical(ours, expected)


def test_capability_can_be_lowered_by_name() -> None:
    """``REFLECTIVE_CPU_CAPABILITY`` is read at the first call; a name that cannot be had is an error."""
    program = (
        f"import torch; torch.ops.load_library({extension.__file__!r}); print(torch.ops.reflective.cpu_capability())"
    )

    def run(name: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"REFLECTIVE_CPU_CAPABILITY": name}
        return subprocess.run(
            [sys.executable, "-c", program], check=False, env=environment, capture_output=True, text=True
        )

    assert run("portable").stdout == "portable\n"
    assert "there is no CPU capability 'sse'; this processor has" in run("sse").stderr
    with pytest.raises(RuntimeError, match="there is no CPU capability 'mmx'"):
        cpu.set_cpu_capability("mmx")
