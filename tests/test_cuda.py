"""The compiled CUDA kernels against the definitions: on a GPU as they are, without one emulated (``emulation/``)."""

import dataclasses

import cases
import emulated
import pytest
import test_scorer
import tiny
import torch
from cases import (
    ACTIVATIONS,
    FORMS,
    NEVER,
    Stream,
    assert_2x,
    assert_identical,
    check_form,
    check_quiet,
    check_resting,
    check_step_mask,
    flush_arguments,
    new_state,
    random_head,
    random_rows,
)

import reflective as rf
from reflective import backends, kernels
from reflective.benchmarks.peers import in_one_dtype
from reflective.kernels import layout
from reflective.scoring.backend import Backend

ON_GPU = backends()["cuda"].available
WHY_NOT = None if ON_GPU else emulated.missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU and the compiled CUDA kernels")
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [
    pytest.param(torch.float32, False, id="float32"),
    pytest.param(torch.bfloat16, False, id="bfloat16"),
    pytest.param(torch.float16, False, id="float16"),
    pytest.param(torch.bfloat16, True, id="e4m3-bfloat16"),
    pytest.param(torch.float16, True, id="e4m3-float16"),
]
SEEDS = [1, 2, 3]  # of the emulated schedule


@pytest.fixture(scope="module")
def cuda():
    return torch.ops.reflective if ON_GPU else emulated.kernels()


@pytest.fixture
def schedule(cuda):
    """``schedule(seed)``: another order of warps and blocks."""

    def set_seed(seed):
        if not ON_GPU:
            cuda.emulate(seed, 64, emulated.MULTIPROCESSORS, 227 * 1024)

    yield set_seed
    set_seed(0)


def double(head):
    return [t.double() for t in head]


@pytest.mark.parametrize(("dtype", "fp8"), DTYPES)
@pytest.mark.parametrize(("H", "K"), [(64, 128), (16, 1), (80, 300), (336, 672), (16384, 20)])
def test_score_rows(cuda, dtype, fp8, H, K):
    """Every way of sharing a tile out, with units and rows left over."""
    head = random_head(H, K, dtype, fp8=fp8, device=DEVICE)
    for M in (0, 1, 8, 9, 16, 17, 64, 65, 128, 129, 300)[: 5 if H > 1000 and not ON_GPU else None]:
        rows = random_rows(M, H, dtype=dtype, seed=M, device=DEVICE)
        same, true, true_rows = in_one_dtype(head, dtype), double(head), rows.double()
        for op in ("score_rows", "logit_rows"):
            ours, definition = getattr(cuda, op), getattr(kernels, op)
            assert_2x(ours(rows, *head), definition(rows, *same), definition(true_rows, *true))
        without_b2 = kernels.logit_rows(rows, *same[:3]), kernels.logit_rows(true_rows, *true[:3])
        assert_2x(cuda.logit_rows(rows, *head[:3]), *without_b2)


@pytest.mark.parametrize(("dtype", "fp8"), DTYPES[:3])
@pytest.mark.parametrize(("H", "K"), [(64, 128), (16, 1), (24, 3), (80, 1000)])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_another_activation(cuda, activation, dtype, fp8, H, K):
    head = random_head(H, K, dtype, device=DEVICE)
    for M in (0, 1, 8, 9, 17, 64, 65, 129, 300):
        rows = random_rows(M, H, dtype=dtype, seed=M, device=DEVICE)
        for op in ("score_rows", "logit_rows"):
            ours, definition = getattr(cuda, op), getattr(kernels, op)
            truth = definition(rows.double(), *double(head), activation)
            assert_2x(ours(rows, *head, activation), definition(rows, *head, activation), truth)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_every_activation_is_that_of_pytorch(cuda, activation):
    """One unit, whose input is the row's first feature: within 3 ulp of the input, and of 1e-7 where they vanish."""
    z = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -1e30, 1e30, 1e-30, -88.5, -104.0])]).to(DEVICE)
    rows = torch.zeros(len(z), 4, device=DEVICE)
    rows[:, 0] = z
    w1, w2, zero = torch.ones(1, 4, device=DEVICE), torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    found = cuda.logit_rows(rows, w1, zero, w2, None, activation)
    truth = kernels.logit_rows(rows.double(), w1.double(), zero.double(), w2.double(), None, activation)
    limit = 3 * torch.finfo(torch.float32).eps * z.abs().double() * (z > -5) + 1e-7 * (z <= -5)
    assert ((found - truth).abs() <= limit).all()


@pytest.mark.parametrize(("dtype", "fp8"), DTYPES[:3])
@pytest.mark.parametrize(("H", "K"), FORMS)
@pytest.mark.parametrize("activation", [ACTIVATIONS[0], ACTIVATIONS[1]])
def test_published_forms(cuda, activation, dtype, fp8, H, K):
    """Emulated, which takes seconds, fewer units, and of the widest few rows."""
    if not ON_GPU:
        H, K = (H, 2) if K == 2 else (H, K // 16)
    most = (1, 8, 64) if ON_GPU else (3,)
    for M in most:
        check_form(cuda.score_rows, cuda.logit_rows, H, K, dtype, activation, M, DEVICE)


def test_float8_weights_go_with_relu_alone(cuda):
    head = random_head(64, 32, torch.bfloat16, fp8=True, device=DEVICE)
    with pytest.raises(RuntimeError, match="activation is 1; the scales of w1 in float8_e4m3fn"):
        cuda.score_rows(random_rows(3, 64, dtype=torch.bfloat16, device=DEVICE), *head, layout.GELU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_stream_of_another_activation(cuda, schedule, activation, dtype):
    """Of many units, and of two, where more blocks copy than have a tile."""
    for seed, (units, B, H) in enumerate([(66, 5, 64), (2, 9, 2048)]):
        sizes = {"slots": 2 * B}
        stream = Stream(B, 8, H, dtype, seed=seed, units=units, sizes=sizes, activation=activation, device=DEVICE)
        for immediate in (True, False):
            schedule(seed)
            stream.check(cuda.decode_step, cuda.flush, [1] * 5 + [3], True, immediate)


@pytest.mark.parametrize(
    ("dtype", "fp8", "activation"),
    [(*case.values, layout.RELU) for case in DTYPES]
    + [(*case.values, activation.values[0]) for case in DTYPES[:3] for activation in ACTIVATIONS[1:]],
)
def test_a_row_has_the_same_bits_in_any_company(cuda, schedule, dtype, fp8, activation):
    head = (*random_head(144, 288, dtype, fp8=fp8, device=DEVICE), activation)
    rows = random_rows(270, 144, dtype=dtype, device=DEVICE)
    alone = torch.cat([cuda.score_rows(row[None], *head) for row in rows[:20]])
    for M in (8, 13, 20, 50, 100, 270):
        for seed in SEEDS:
            schedule(seed)
            assert torch.equal(cuda.score_rows(rows[:M], *head)[:20], alone[:M])
    assert torch.equal(cuda.score_rows(rows.flip(0), *head).flip(0)[:20], alone)


def test_a_wide_head_of_many_tiles(cuda):
    """More stages than the ring holds, and more tiles than there are blocks."""
    head = random_head(1040, 1200, torch.bfloat16, device=DEVICE)
    for M in (3, 140):
        rows = random_rows(M, 1040, dtype=torch.bfloat16, device=DEVICE)
        truth = kernels.score_rows(rows.double(), *double(head))
        assert_2x(cuda.score_rows(rows, *head), kernels.score_rows(rows, *head), truth)


@pytest.mark.skipif(ON_GPU, reason="a property of other GPUs than this one")
@pytest.mark.parametrize(("multiprocessors", "shared"), [(1, 99 * 1024), (7, 163 * 1024), (132, 227 * 1024)])
def test_other_gpus(cuda, multiprocessors, shared):
    """Multiprocessors and shared memory choose the tiling and the depth of the ring."""
    cuda.emulate(0, 200, multiprocessors, shared)
    try:
        head = random_head(272, 544, torch.bfloat16)
        for M in (5, 40, 100, 257):
            rows = random_rows(M, 272, dtype=torch.bfloat16)
            truth = kernels.score_rows(rows.double(), *double(head))
            assert_2x(cuda.score_rows(rows, *head), kernels.score_rows(rows, *head), truth)
    finally:
        cuda.emulate(0, 64, emulated.MULTIPROCESSORS, 227 * 1024)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_that_is_not_finite_is_nan_and_alone(cuda, activation, dtype, value):
    """Also where the activation swallows it: the last column's weights send an infinity to below zero in every unit."""
    head = random_head(64, 128, dtype, device=DEVICE)
    head[0][:, 63] = -1 if value > 0 else 1
    head.append(activation)
    for M in (3, 80, 200):
        rows = random_rows(M, 64, dtype=dtype, device=DEVICE)
        expected = cuda.score_rows(rows, *head)
        rows[1, 63] = value
        expected[1] = float("nan")
        assert_identical(cuda.score_rows(rows, *head), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_weight_that_is_not_finite_is_not_swallowed(cuda, activation, dtype):
    head = random_head(64, 128, dtype, device=DEVICE)
    head[0][77, 5] = float("nan")
    head.append(activation)
    for M in (3, 80, 200):
        assert cuda.score_rows(random_rows(M, 64, dtype=dtype, device=DEVICE), *head).isnan().all()


def test_tiles_of_one_stage_follow_each_other(cuda, schedule):
    """At a width of one stage a tile ends at every barrier, while slower warps are still at the one before."""
    head = random_head(64, 2000, torch.bfloat16, device=DEVICE)
    rows = random_rows(40, 64, dtype=torch.bfloat16, device=DEVICE)
    truth, definition = kernels.score_rows(rows.double(), *double(head)), kernels.score_rows(rows, *head)
    for seed in range(6):
        schedule(seed)
        for M in (8, 40):
            assert_2x(cuda.score_rows(rows[:M], *head), definition[:M], truth[:M])


@pytest.mark.parametrize(("dtype", "fp8"), DTYPES)
@pytest.mark.parametrize("at_predict", [True, False], ids=["predict", "token"])
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "deferred"])
def test_stream(cuda, schedule, dtype, fp8, at_predict, immediate):
    for seed, (B, slots) in enumerate([(1, 1), (3, 5), (19, 64), (5, 5)]):
        stream = Stream(B, 14, 64, dtype, seed=seed, fp8=fp8, N=B + 1, sizes={"slots": slots}, device=DEVICE)
        for chunks in ([1] * 14, [5, 1, 1, 7]):
            schedule(seed)
            stream.check(cuda.decode_step, cuda.flush, chunks, at_predict, immediate)


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "deferred"])
@pytest.mark.parametrize("at_predict", [True, False], ids=["predict", "token"])
@pytest.mark.parametrize(("dtype", "fp8"), DTYPES)
def test_sequences_that_come_and_go(cuda, schedule, dtype, fp8, at_predict, immediate):
    """Sequences in other rows of the state, resting, skipped, packed in one piece and in several: as if each were alone."""
    for seed, slots in enumerate([4, 7, 64]):
        schedule(seed)
        stream = Stream(4, 16, 32, dtype, seed, fp8, sizes={"slots": slots, "log": 6}, device=DEVICE)
        stream.check_calls(cuda.decode_step, cuda.flush, at_predict, immediate, seed)


def test_packed_columns_of_nobody_want_no_room(cuda):
    """Rows wait for a full buffer, however long the buffer of ids is; all of a call's steps fit it all the same."""
    stream = Stream(1, 12, 32, torch.float32, step=1.1, sizes={"slots": 8, "pad": [0], "start": [0]}, device=DEVICE)
    state = stream.state()
    waiting = []
    for n in (4, 1, 2, 2, 9):
        bounds = torch.tensor([0, n], dtype=torch.int32, device=DEVICE)
        arguments = stream.ids, stream.hidden, *stream.automaton, *stream.head, *state.values(), True, False
        cuda.decode_step(*arguments, None, bounds)
        waiting.append(state["n_slots"].item())
    assert waiting == [2, 3, 5, 7, 1]  # of the last nine, eight are a piece of their own


@pytest.mark.parametrize("q", [1, 2])
def test_states_that_no_row_names_rest(cuda, q):
    check_resting(cuda.decode_step, q, DEVICE, beyond=True)


def test_quiet_columns(cuda, schedule):
    for seed in SEEDS:
        schedule(seed)
        check_quiet(cuda.decode_step, cuda.flush, DEVICE)


@pytest.mark.skipif(ON_GPU, reason="the emulator counts launches")
@pytest.mark.parametrize(("B", "before"), [(1, 64), (32, 2048)])
def test_a_prompt_before_the_scope_is_one_launch(cuda, B, before):
    q = 8192
    case = Stream(B, 1, 8, torch.float32, sizes={"slots": 256, "pad": [0] * B, "start": [q] * B})
    case.ids, case.hidden = case.ids.expand(-1, q), case.hidden.expand(-1, q, -1)
    for quiet, expected in ((0, before), (q - 8, 2), (q, 1)):
        launched, state = cuda.launches(), case.state()
        cuda.decode_step(
            case.ids, case.hidden, *case.automaton, *case.head, *state.values(), True, False, None, None, quiet
        )
        assert cuda.launches() - launched == expected
        assert state["seq"][:, layout.SEEN].tolist() == [q] * B


def test_many_sequences(cuda, schedule):
    """More than one look of the block's threads; many rows at once, or hardly one."""
    for B, step, T in ((600, 0.3, 3), (270, 0.004, 3), (4096, 0.1, 2)):
        sizes = {"slots": B + 40, "pad": [0] * B, "start": [0] * B}
        stream = Stream(B, T + 2, 16, torch.bfloat16, step=step, sizes=sizes, device=DEVICE)
        for immediate in (True, False):
            schedule(immediate)
            stream.check(cuda.decode_step, cuda.flush, [2] + [1] * T, True, immediate)


def test_long_prompts(cuda):
    """More tokens than the automaton looks up at once, in one piece and in many."""
    for slots in (5, 2000):
        stream = Stream(2, 300, 16, torch.float32, sizes={"slots": slots, "log": 200}, device=DEVICE)
        stream.check(cuda.decode_step, cuda.flush, [290, 1, 9], True, False)


def test_bits_do_not_depend_on_schedule_or_company(cuda, schedule):
    """Immediate and deferred, alone and in a batch, in any order of blocks: the same scores."""
    stream = Stream(6, 12, 64, torch.bfloat16, sizes={"slots": 20, "pad": [0] * 6, "start": [0] * 6}, device=DEVICE)
    first = stream.feed(cuda.decode_step, stream.state(), [1] * 12, True, True)
    for seed in SEEDS:
        schedule(seed)
        for immediate, chunks in ((True, [1] * 12), (False, [1] * 12), (False, [7, 5])):
            state = stream.feed(cuda.decode_step, stream.state(), chunks, True, immediate)
            stream.flush(cuda.flush, state)
            for name in ("tally", "step_score"):
                assert_identical(state[name], first[name])
    alone = Stream(1, 12, 64, torch.bfloat16, sizes={"pad": [0], "start": [0]}, device=DEVICE)
    alone.ids, alone.hidden, alone.head = stream.ids[3:4], stream.hidden[3:4], stream.head
    state = alone.feed(cuda.decode_step, alone.state(), [1] * 12, True, True)
    assert_identical(state["tally"], first["tally"][3:4])


def test_immediate_after_deferred_scores_the_waiting_rows_too(cuda):
    """Several rows of one sequence in one flush keep their order, also beside rows of the step itself."""
    stream = Stream(4, 12, 32, torch.float32, step=0.6, sizes={"slots": 64, "start": [0] * 4}, device=DEVICE)
    states = []
    for ops, dtype in ((cuda, None), (kernels, None), (kernels, torch.float64)):
        state = stream.feed(ops.decode_step, stream.state(dtype), [1] * 11, True, False, dtype)
        last = stream.ids[:, 11:], stream.hidden[:, 11:].to(dtype or stream.dtype)
        head = [t.to(dtype or t.dtype) for t in stream.head]
        ops.decode_step(*last, *stream.automaton, *head, *state.values(), True, True)
        states.append(state)
    assert states[0]["n_slots"].item() == 0
    cases.assert_same_state(*states)


def test_idle_steps_touch_nothing_but_the_position(cuda):
    stream = Stream(3, 4, 32, torch.bfloat16, sizes={"start": [NEVER] * 3}, device=DEVICE)
    state = stream.feed(cuda.decode_step, stream.state(), [1, 1, 1, 1], True, True)
    fresh = stream.state()
    for name in ("tally", "step_column", "step_region", "step_score", "slots", "slot_owner", "n_slots", "workspace"):
        assert_identical(state[name], fresh[name])
    assert state["seq"][:, layout.SEEN].tolist() == [4, 4, 4]
    assert_identical(cases.newest_hidden(state), stream.hidden[:, 3])


def test_an_id_outside_the_vocabulary_is_no_step(cuda):
    for q in (1, 3):
        stream = Stream(2, q, 32, torch.float32, sizes={"pad": [0, 0], "start": [0, 0]}, device=DEVICE)
        stream.ids[0, -1], stream.ids[1, -1] = -1, 10**12
        state = stream.feed(cuda.decode_step, stream.state(), [q], True, True)
        assert state["seq"][:, layout.SEEN].tolist() == [q, q]
        assert state["seq"][:, layout.AUTOMATON].tolist() == [0, 0]


def test_tally_slots(cuda):
    stream = Stream(4, 12, 32, torch.bfloat16, step=0.6, sizes={"slots": 64}, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        b2 = torch.tensor([0.25], dtype=dtype, device=DEVICE)
        states = []
        for ops, widen in ((cuda, False), (kernels, False), (kernels, True)):
            state = stream.feed(kernels.decode_step, stream.state(), [12], True, False)
            logits = cases.random_rows(1, 64, dtype=torch.float32, device=DEVICE)[0].contiguous() * 30
            rest = [state[name] for name in ("tally", "step_score", "slot_owner", "n_slots")]
            ops.tally_slots(logits.double() if widen else logits, b2, *rest)
            states.append(state)
        cases.assert_same_state(*states)


@pytest.mark.parametrize("T", [12, 40, 400])
def test_step_mask(cuda, T):
    for seed in range(3):
        check_step_mask(cuda.step_mask, T, seed, DEVICE)


def test_bad_arguments_are_named(cuda):
    stream = Stream(3, 1, 32, torch.bfloat16, sizes={"slots": 2}, device=DEVICE)
    with pytest.raises(RuntimeError, match="slots has 2 rows; 3 sequences need at least as many"):
        stream.feed(cuda.decode_step, stream.state(), [1], True, True)
    stream = Stream(3, 1, 32, torch.bfloat16, device=DEVICE)
    state = stream.state()
    state["workspace"] = state["workspace"][:100]
    with pytest.raises(RuntimeError, match=r"workspace must hold \d+ floats"):
        stream.feed(cuda.decode_step, state, [1], True, True)
    with pytest.raises(RuntimeError, match="w1 must have rows of a multiple of 16 bytes on a GPU"):
        cuda.score_rows(
            random_rows(2, 36, dtype=torch.bfloat16, device=DEVICE), *random_head(36, 72, torch.bfloat16, device=DEVICE)
        )
    with pytest.raises(RuntimeError, match="w1 must be float32, bfloat16, float16 or float8_e4m3fn"):
        cuda.score_rows(
            *(
                t.double()
                for t in (torch.ones(2, 32, device=DEVICE), *random_head(32, 64, torch.float32, device=DEVICE))
            )
        )
    for activation in (-1, 4):
        head = random_head(32, 64, torch.bfloat16, device=DEVICE)
        with pytest.raises(RuntimeError, match=rf"activation is {activation}; expected 0 \(relu\)"):
            cuda.score_rows(random_rows(2, 32, dtype=torch.bfloat16, device=DEVICE), *head, activation)
    with pytest.raises(RuntimeError, match="features must be bfloat16"):
        cuda.score_rows(torch.ones(2, 32, device=DEVICE), *random_head(32, 64, torch.bfloat16, device=DEVICE))


def test_more_rows_than_a_block_can_tally_are_refused(cuda):
    rows = 40_000
    state = new_state(1, 16, torch.float32, slots=rows, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"slots and sequences are 40000 rows; this GPU's blocks can tally \d+"):
        cuda.flush(*random_head(16, 32, torch.float32, device=DEVICE), *flush_arguments(state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule_of_scores", ["deferred", "immediate"])
def test_a_model_s_generation_is_scored(cuda, schedule_of_scores, dtype):
    """The kernels under the scorer, with left padding, sampling and a buffer that fills on the way."""
    net, head = tiny.model(dtype=dtype).to(DEVICE), tiny.head(dtype).to(DEVICE)
    ids, mask = test_scorer.prompts()
    name = "cuda" if ON_GPU else "torch"
    scorer = rf.StreamScorer(net, head, tiny.steps(), schedule_of_scores, backend=name, buffer_rows=8)
    if not ON_GPU:
        ours = {op.name: getattr(cuda, op.name) for op in dataclasses.fields(Backend) if op.name != "name"}
        scorer.stream.placed.backend = Backend("cuda", **ours)
    out = test_scorer.decode(scorer, net, ids, mask, num_return_sequences=2)
    test_scorer.assert_agrees(scorer.result(out), net, head, out, mask, "predict")


@needs_gpu
def test_opcheck_of_quiet_columns():
    torch.library.opcheck(torch.ops.reflective.decode_step, cases.quiet_arguments(DEVICE))


@needs_gpu
def test_opcheck_of_a_packed_call():
    torch.library.opcheck(torch.ops.reflective.decode_step, cases.packed_arguments(DEVICE))


@needs_gpu
@pytest.mark.parametrize("op", emulated.OPS)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.reflective, op), cases.opcheck_arguments(DEVICE)[op])


@needs_gpu
@pytest.mark.parametrize("op", ["score_rows", "logit_rows", "decode_step", "flush"])
def test_opcheck_of_another_activation(op):
    arguments = cases.opcheck_arguments(DEVICE, activation=layout.SILU)[op]
    torch.library.opcheck(getattr(torch.ops.reflective, op), arguments)


@needs_gpu
@pytest.mark.parametrize("immediate", [True, False])
def test_graph_replay_on_a_stream_of_its_own(immediate):
    """Captured once, replayed for every token: the same state as eager, bit for bit."""
    stream = Stream(5, 12, 64, torch.bfloat16, sizes={"slots": 7}, device="cuda")
    eager = stream.feed(torch.ops.reflective.decode_step, stream.state(), [1] * 12, True, immediate)
    state = stream.state()
    ids, hidden = stream.ids[:, :1].clone(), stream.hidden[:, :1].contiguous()
    args = ids, hidden, *stream.automaton, *stream.head, *state.values(), True, immediate
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.ops.reflective.decode_step(*args)  # sets what is set at a kernel's first launch
        for name, fresh in stream.state().items():
            state[name].copy_(fresh)
    side.synchronize()
    with torch.cuda.graph(graph, stream=side):
        torch.ops.reflective.decode_step(*args)
    for j in range(12):
        ids.copy_(stream.ids[:, j : j + 1])
        hidden.copy_(stream.hidden[:, j : j + 1])
        graph.replay()
    for name in ("seq", "tally", "step_column", "step_region", "step_score", "n_slots"):
        assert_identical(state[name], eager[name])


@needs_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_graph_replay_of_sequences_that_come_and_go(packed):
    """One graph for whatever rows and lengths its buffers say: the same state as eager."""
    stream = Stream(4, 12, 64, torch.bfloat16, N=6, sizes={"slots": 7, "pad": [0] * 6}, device="cuda")
    eager, state = stream.state(), stream.state()
    ids, hidden = stream.ids[:, :1], stream.hidden[:, :1].contiguous()
    if packed:
        ids, hidden = stream.ids.reshape(1, 48), stream.hidden.reshape(1, 48, 64)
    rows = torch.tensor([0, 1, 2, 3], dtype=torch.int32, device="cuda")
    bounds = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32, device="cuda") if packed else None
    call, rest = torch.ops.reflective.decode_step, (True, True, rows, bounds)
    tables = *stream.automaton, *stream.head
    call(ids, hidden, *tables, *stream.state().values(), *rest)  # sets what is set at a kernel's first launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(ids, hidden, *tables, *state.values(), *rest)
    for of_call, lengths in (
        ([5, 0, -1, 2], [1, 40, 2, 0]),
        ([2, -1, 5, 0], [0, 0, 3, 4]),
        ([1, 2, 0, 5], [9, 9, 9, 9]),
    ):
        rows.copy_(torch.tensor(of_call))
        if packed:
            bounds[1:].copy_(torch.tensor(lengths).cumsum(0))
        call(ids, hidden, *tables, *eager.values(), *rest)
        graph.replay()
    for name in ("seq", "tally", "step_column", "step_region", "step_score", "n_slots"):
        assert_identical(state[name], eager[name])


@needs_gpu
def test_nothing_is_allocated_and_nothing_waits():
    stream = Stream(5, 2, 64, torch.bfloat16, sizes={"slots": 7}, device="cuda")
    state = stream.state()
    args = stream.ids[:, :1], stream.hidden[:, :1].contiguous(), *stream.automaton, *stream.head, *state.values()
    torch.ops.reflective.decode_step(*args, True, True)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.reflective.decode_step(*args, True, True)
        torch.ops.reflective.decode_step(*args, True, False)
        torch.ops.reflective.flush(*stream.head, *flush_arguments(state))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    stream = Stream(3, 6, 64, torch.bfloat16, device="cuda:1")
    stream.check(torch.ops.reflective.decode_step, torch.ops.reflective.flush, [1] * 6, True, True)
    assert torch.cuda.current_device() == 0
