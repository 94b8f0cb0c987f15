"""The Triton kernels against the definitions: interpreted on a machine without a GPU, compiled on one with."""

import pytest
import torch
from cases import (
    ACTIVATIONS,
    FLOAT8,
    NAN,
    NEVER,
    Stream,
    V,
    assert_2x,
    assert_identical,
    assert_same_state,
    check_form,
    check_quiet,
    check_resting,
    check_step_mask,
    flush_arguments,
    new_state,
    random_head,
    random_rows,
)

from reflective import kernels

pytest.importorskip("triton")
from reflective.kernels import layout
from reflective.kernels.decode_step_triton import decode_step
from reflective.kernels.flush_triton import flush
from reflective.kernels.logit_rows_triton import logit_rows
from reflective.kernels.score_rows_triton import score_rows
from reflective.kernels.step_mask_triton import step_mask
from reflective.kernels.tally_slots_triton import tally_slots

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, on the NaN of a test
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [
    *((dtype, False) for dtype in DTYPES),
    (torch.bfloat16, True),
    (torch.float16, True),
]  # of rows; whether w1 is fp8


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` returns NaN, True and huge integers: outputs and workspaces are read only where written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fixed_order_dot(monkeypatch):
    """A GPU's dot sums every column alike; the interpreter's is a BLAS product, whose order depends on a column's place."""
    if not torch.cuda.is_available():
        from triton.runtime import interpreter

        def create_dot(self, a, b, d, *_):
            z = d.data.copy()
            for k in range(a.data.shape[1]):
                z += a.data[:, k, None] * b.data[k]
            return interpreter.TensorHandle(z, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def apart(op):
    """``op`` on a strided copy of its ids and rows: nothing else of the stream lies near."""

    def run(ids, hidden, *rest):
        def copy(t, fill):
            wide = t.new_full((t.shape[0], t.shape[1] + 1, *t.shape[2:], 2), fill)
            wide[:, 1:, ..., 0] = t
            return wide[:, 1:, ..., 0]

        op(copy(ids, 0), copy(hidden, NAN), *rest)

    return run


def truth_of(op, rows, head):
    return op(rows.double(), *(t.double() for t in head))


@pytest.mark.parametrize("seed", range(3))
def test_step_mask(device, seed):
    check_step_mask(step_mask, 40, seed, device)


@pytest.mark.parametrize("tags", [0, 1, 2])
def test_step_mask_tags(device, tags):
    """Ids 0 .. 3 are a word, a step, think-start and think-end, each of the tags ``tags`` times."""
    token_class = torch.arange(4, dtype=torch.int32, device=device)
    transition = torch.tensor([[0], [layout.STEP], [layout.THINK], [layout.END]], dtype=torch.int32, device=device)
    ids = torch.ones(1, 20, dtype=torch.int64, device=device)
    ids[0, torch.tensor([4, 7][:tags], dtype=torch.int64)] = 2
    ids[0, torch.tensor([12, 15][:tags], dtype=torch.int64)] = 3
    bounds = [torch.tensor([n], device=device) for n in (0, 20, 0)]
    mask = step_mask(ids, token_class, transition, *bounds)
    assert torch.equal(mask, kernels.step_mask(ids, token_class, transition, *bounds))
    assert mask.sum().item() == {0: 18, 1: 6, 2: 14}[tags]


@pytest.mark.parametrize(("dtype", "fp8"), HEADS)
@pytest.mark.parametrize(("M", "H", "K"), [(1, 1, 2), (5, 40, 80), (17, 64, 128), (70, 65, 130), (0, 40, 80)])
def test_score_rows(device, M, H, K, dtype, fp8):
    head = random_head(H, K, dtype, fp8=fp8, device=device)
    features = random_rows(M, H, dtype=dtype, device=device)
    for op, definition, arguments in (
        (score_rows, kernels.score_rows, head),
        (logit_rows, kernels.logit_rows, head),
        (logit_rows, kernels.logit_rows, head[:3]),
    ):
        ours = op(features, *arguments)
        assert ours.dtype == torch.float32 and ours.shape == (M,)
        assert_2x(ours, definition(features, *arguments), truth_of(definition, features, arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "H", "K"), [(1, 1, 1), (5, 40, 3), (17, 64, 128), (3, 24, 1000)])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_another_activation(device, activation, M, H, K, dtype):
    head = random_head(H, K, dtype, device=device)
    features = random_rows(M, H, dtype=dtype, device=device)
    for op, definition in ((score_rows, kernels.score_rows), (logit_rows, kernels.logit_rows)):
        truth = definition(features.double(), *(t.double() for t in head), activation)
        assert_2x(op(features, *head, activation), definition(features, *head, activation), truth)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_every_activation_is_that_of_pytorch(device, activation):
    """One unit, whose input is the row's only feature: within 3 ulp of the input, and of 1e-7 where they vanish."""
    z = torch.cat([torch.linspace(-12, 12, 801), torch.tensor([0.0, -1e30, 1e30, 1e-30, -88.5, -104.0])]).to(device)
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    found = logit_rows(z[:, None], one, zero, one, None, activation)
    truth = kernels.logit_rows(z[:, None].double(), one.double(), zero.double(), one.double(), None, activation)
    limit = 3 * torch.finfo(torch.float32).eps * z.abs().double() * (z > -5) + 1e-7 * (z <= -5)
    assert ((found - truth).abs() <= limit).all()


@pytest.mark.parametrize(
    ("H", "K", "dtype"),
    [
        (2560, 512, torch.bfloat16),
        (3 * 4096, 40, torch.bfloat16),
        (4096, 2, torch.float16),  # in float32 three rows are too few: the definition's error is nearly 0 by luck
        (33 * 4096, 2, torch.float16),
        (5 * 4096, 2, torch.float32),  # longer than one chain
    ],
)
@pytest.mark.parametrize("activation", [ACTIVATIONS[0], ACTIVATIONS[1]])
def test_published_forms(device, activation, H, K, dtype, fixed_order_dot):
    check_form(score_rows, logit_rows, H, K, dtype, activation, 3, device)


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_stream_of_another_activation(device, activation, dtype, immediate):
    sizes = {"slots": 5, "pad": [0] * 3, "start": [0] * 3}
    for units in (2, 48):
        case = Stream(3, 9, 24, dtype, units=units, device=device, sizes=sizes, activation=activation)
        case.check(apart(decode_step), flush, [1] * 3 + [4, 2], True, immediate)


@pytest.mark.parametrize("activation", [-1, 4])
def test_an_activation_that_there_is_not(device, activation):
    case, message = Stream(3, 1, 16, torch.float32, device=device), rf"activation={activation}: expected 0 \(relu\)"
    state = case.state()
    for call in (
        lambda: score_rows(case.hidden[0], *case.head, activation),
        lambda: logit_rows(case.hidden[0, :0], *case.head, activation),
        lambda: decode_step(*case.arguments(), True, True, None, None, 0, activation),
        lambda: flush(*case.head, *flush_arguments(state), activation),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    head = random_head(16, 32, torch.bfloat16, fp8=True, device=device)
    with pytest.raises(ValueError, match="activation=1: the scales of w1 in float8_e4m3fn"):
        score_rows(case.hidden[0].bfloat16(), *head, layout.GELU)


def test_logits_of_a_split_head_add_up(device):
    M, H, K = 9, 40, 86
    w1, b1, w2, b2 = random_head(H, K, torch.float32, device=device)
    features = random_rows(M, H, dtype=torch.float32, device=device)
    parts = [logit_rows(features, w1[u], b1[u], w2[:, u].contiguous()) for u in (slice(40), slice(40, K))]
    truth = truth_of(kernels.logit_rows, features, (w1, b1, w2, b2))
    assert_2x(sum(parts) + b2, kernels.logit_rows(features, w1, b1, w2, b2), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_float8(device, dtype):
    """``relu(w) - relu(-w)`` for each of its 256 values but NaN, picked by rows of the identity; and NaN is not lost."""
    weight = torch.arange(256, dtype=torch.uint8, device=device).view(FLOAT8).float().nan_to_num()
    w1 = torch.stack([weight, -weight]).to(FLOAT8)
    b1, w2 = torch.zeros(2, device=device), torch.tensor([[1.0, -1.0]], device=device)
    assert torch.equal(logit_rows(torch.eye(256, dtype=dtype, device=device), w1, b1, w2), weight)
    w1.view(torch.uint8)[1, 3] = 0xFF
    assert logit_rows(torch.ones(3, 256, dtype=dtype, device=device), w1, b1, w2).isnan().all()


@pytest.mark.parametrize("logit", [-200.0, -23.5, -20.0, -1e-3, 0.0, 1e-3, 3.0, 16.0, 25.0, 80.0, 200.0])
def test_log_sigmoid(device, logit):
    """Full relative precision at both ends, and the floor."""
    head = [torch.zeros(16, 8), torch.zeros(16), torch.zeros(1, 16), torch.tensor([logit])]
    head, features = [t.to(device) for t in head], torch.ones(1, 8, device=device)
    truth = kernels.score_rows(features.double(), *(t.double() for t in head))
    # exp is allowed the rounding of its argument, whose weight is |logit|.
    torch.testing.assert_close(
        score_rows(features, *head).double(), truth, rtol=(3 + abs(logit)) * 2**-23, atol=2**-126
    )


@pytest.mark.parametrize(
    ("dtype", "fp8", "activation"),
    [(*head, layout.RELU) for head in HEADS] + [(torch.bfloat16, False, *case.values) for case in ACTIVATIONS[1:]],
)
@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_rows_that_are_not_finite(device, dtype, fp8, activation, bad, fixed_order_dot):
    """Also where every unit's activation is an innocent 0, as ReLU makes it of minus infinity, and where every one is infinite
    and the logit might be; nothing else changes.
    """
    M, H, K = 20, 40, 80
    head = random_head(H, K, dtype, fp8=fp8, device=device)
    sign = -0.1 if bad > 0 else 0.1
    for column, weight in ((0, sign), (1, 0.0), (H - 1, -sign)):
        head[0][:, column] = torch.full((K,), weight, device=device).to(head[0].dtype)
    head[2].abs_()
    features = random_rows(M, H, dtype=dtype, device=device)
    head.append(activation)
    clean = score_rows(features, *head)
    features[[3, 8, 19], [0, 1, H - 1]] = bad
    scores = score_rows(features, *head)
    assert scores.isnan().nonzero().flatten().tolist() == [3, 8, 19]
    assert_identical(kernels.score_rows(features, *head).isnan(), scores.isnan())
    others = torch.ones(M, dtype=torch.bool, device=device)
    others[[3, 8, 19]] = False
    assert_identical(scores[others], clean[others])


@pytest.mark.parametrize(
    ("dtype", "fp8", "H", "K", "activation"),
    [(*head, 72, 150, layout.RELU) for head in HEADS]
    + [(torch.bfloat16, fp8, 8, 4100, layout.RELU) for fp8 in (False, True)]
    + [(dtype, False, 72, 150, layout.GELU) for dtype in DTYPES],
)
def test_bits_do_not_depend_on_the_company(device, dtype, fp8, H, K, activation, fixed_order_dot):
    """Heads on both sides of 4,096 units; numbers of rows that every tile is chosen for."""
    M = 132
    head = (*random_head(H, K, dtype, fp8=fp8, device=device), activation)
    features = random_rows(M, H, dtype=dtype, device=device)
    scores = score_rows(features, *head)
    assert torch.equal(score_rows(features, *head), scores)
    assert torch.equal(score_rows(features.flip(0), *head), scores.flip(0))
    for rows in (slice(131, 132), slice(7, 23), slice(60, 80)):
        assert torch.equal(score_rows(features[rows], *head), scores[rows])


@pytest.mark.parametrize("split", [False, True])
def test_flush(device, split):
    """One sequence of many steps, some past the log's capacity, a sequence without any, and a buffer not quite full; more
    rows than are tallied at once.
    """
    N, C, R, H, K = 70, 3, 150, 24, 48
    n = R - 1
    head = random_head(H, K, torch.float32, device=device)
    owner = torch.stack([torch.tensor([2, 0, 69])[torch.arange(R) % 3], torch.arange(R) // 3, torch.arange(R) % 4], 1)

    def split_flush(w1, b1, w2, b2, tally, step_score, slots, slot_owner, n_slots, workspace):
        tally_slots(logit_rows(slots, w1, b1, w2), b2, tally, step_score, slot_owner, n_slots)

    ours = split_flush if split else flush
    states = []
    for op, dtype in ((ours, torch.float32), (kernels.flush, torch.float32), (kernels.flush, torch.float64)):
        state = new_state(N, H, dtype, slots=R, log=C, device=device)
        state["slots"][:n] = random_rows(n, H, dtype=torch.float32, device=device)
        state["slot_owner"].copy_(owner)
        state["n_slots"].fill_(n)
        for _ in range(2):  # the second finds an empty buffer
            op(*(t.to(dtype) for t in head), *flush_arguments(state))
        states.append(state)
    assert_same_state(*states)
    logged, sums = states[0]["step_score"], states[0]["tally"][..., layout.LOG_SUM]
    assert not logged[[0, 2, 69]].isnan().any()
    scores = score_rows(states[0]["slots"][:n], *head)
    torch.testing.assert_close(logged[69], scores[2::3][:C])
    for s in (0, 2, 69):  # added up in slot order: not merely close to the definition
        for region in range(layout.N_REGIONS):
            mine = scores[((owner[:n, 0] == s) & (owner[:n, 2] == region)).to(device)].double().tolist()
            torch.testing.assert_close(sums[s, region].item(), sum(mine), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("dtype", "fp8"), HEADS)
@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("at_predict", [True, False])
def test_stream(device, at_predict, immediate, dtype, fp8):
    """Random automata, left padding, a late scope and an empty one, B < N, chunks of every length, fewer log entries than steps."""
    seed = 2 * at_predict + immediate
    sizes = {"pad": [0, 4, 0, 0, 0], "start": [0, 0, 7, NEVER, 0], "slots": 5, "log": 4}
    case = Stream(4, 16, 24, dtype, seed, fp8, 0.8, N=5, device=device, sizes=sizes)
    states = case.check(apart(decode_step), flush, [1] * 7 + [6, 1, 2], at_predict, immediate)
    steps = states[0]["seq"][:, layout.N_STEPS]
    assert steps.max() > 4 and steps[3] == 0
    assert states[0]["seq"][4, [layout.SEEN, layout.HASH]].tolist() == [0, 0]


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("at_predict", [True, False])
@pytest.mark.parametrize(("dtype", "slots"), [(torch.float32, 4), (torch.bfloat16, 7), (torch.float16, 64)])
def test_sequences_that_come_and_go(device, dtype, slots, at_predict, immediate, fixed_order_dot):
    """Sequences in other rows of the state, resting, skipped, packed in one piece and in several: as if each were alone."""
    case = Stream(4, 12, 16, dtype, slots, device=device, sizes={"slots": slots, "log": 6, "pad": [0, 0, 4, 0]})
    case.check_calls(decode_step, flush, at_predict, immediate, seed=slots)


@pytest.mark.parametrize("q", [1, 2])
def test_states_that_no_row_names_rest(device, q):
    check_resting(decode_step, q, device, beyond=True)


def test_quiet_columns(device, fixed_order_dot):
    check_quiet(decode_step, flush, device)


def outside_the_vocabulary(case):
    """Some of ``case``'s ids become none; beside the table of classes lie such as end a step. Returns the ids and the automaton
    of the definition for which they are no step, and where they are.
    """
    token_class, transition = case.automaton
    wide = torch.zeros(V + 8, dtype=torch.int32, device=case.device)
    wide[4:-4] = token_class
    case.automaton = wide[4:-4], transition
    ids, case.ids = case.ids.clone(), case.ids.clone()
    outside = torch.zeros_like(ids, dtype=torch.bool)
    for column, strangers in ((3, [-1, V, 10**12]), (6, [V + 3, -4, -(2**63)])):
        case.ids[:, column] = torch.tensor(strangers, device=case.device)
        ids[:, column], outside[:, column] = V, True
    no_step = len(transition)
    known = torch.cat([token_class, token_class.new_tensor([no_step])])
    return ids, (known, torch.cat([transition, torch.zeros_like(transition[:1])])), outside


@pytest.mark.parametrize("chunks", [[1] * 9, [5, 4]])
def test_an_id_outside_the_vocabulary_is_no_step(device, chunks):
    sizes = {"pad": [0] * 3, "start": [0] * 3, "log": 9}
    case = Stream(3, 9, 16, torch.float32, step=1.1, device=device, sizes=sizes)
    case_ids, automaton, _ = outside_the_vocabulary(case)
    ours = case.feed(decode_step, case.state(), chunks, True, True)
    case.ids, case.automaton = case_ids, automaton
    expected = case.feed(kernels.decode_step, case.state(), chunks, True, True)
    assert ours["step_column"][:, :6].tolist() == [[2, 4, 5, 7, 8, -7]] * 3
    fields = [layout.AUTOMATON, layout.SEEN, layout.N_THINK, layout.N_END, layout.N_STEPS]
    assert_identical(ours["seq"][:, fields], expected["seq"][:, fields])
    for name in ("step_column", "step_region"):
        assert_identical(ours[name], expected[name])


def test_step_mask_of_ids_outside_the_vocabulary(device):
    case = Stream(3, 9, 16, torch.float32, step=1.1, device=device)
    ids, automaton, outside = outside_the_vocabulary(case)
    bounds = [torch.full((3,), n, device=device) for n in (0, 9, 0)]
    mask = step_mask(case.ids, *case.automaton, *bounds)
    assert mask.any() and not (mask & outside).any()
    assert torch.equal(mask, kernels.step_mask(ids, *automaton, *bounds))


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("R", [2, 3, 64])
def test_prefill_overflows_the_slots(device, R, immediate):
    """Every token but the first two ends a step: many times the buffer in one call."""
    case = Stream(
        2, 15, 16, torch.float32, step=1.1, device=device, sizes={"slots": R, "log": 15, "pad": [0, 0], "start": [0, 0]}
    )
    ours, *_ = case.check(apart(decode_step), flush, [15], True, immediate)
    assert ours["seq"][:, layout.N_STEPS].tolist() == [13, 13]


@pytest.mark.parametrize("immediate", [False, True])
def test_rows_left_by_the_definition(device, immediate):
    """The definition flushes only when a row finds no slot; the kernels take over its full buffer, in whichever schedule."""
    sizes = {"slots": 4, "log": 9, "pad": [0, 0, 0], "start": [0, 0, 0]}
    case = Stream(3, 9, 16, torch.float32, step=1.1, device=device, sizes=sizes)
    states = []
    for op, flush_op, dtype in (
        (decode_step, flush, None),
        (kernels.decode_step, kernels.flush, None),
        (kernels.decode_step, kernels.flush, torch.float64),
    ):
        state = case.feed(kernels.decode_step, case.state(dtype), [4], True, False, dtype)
        waiting = state["n_slots"].item()
        case.feed(op, state, [1] * 5, True, immediate, dtype)
        states.append(state if immediate else case.flush(flush_op, state, dtype))
    assert waiting == 2
    assert_same_state(*states)


def test_deferred_rows_wait(device):
    """With room in the buffer nothing is scored before it is asked for; without, all of it is, and the new rows with it."""
    sizes = {"slots": 8, "log": 6, "pad": [0, 0], "start": [0, 0]}
    case = Stream(2, 7, 16, torch.float32, step=1.1, device=device, sizes=sizes)
    state = case.feed(decode_step, case.state(), [3, 1, 1, 1], True, False)
    assert state["n_slots"].item() == 8 and state["step_score"].isnan().all()
    assert_identical(state["slots"][-2:], case.hidden[:, 4])
    assert state["slot_owner"][-2:].tolist() == [[b, 3, state["slot_owner"][6 + b, 2].item()] for b in range(2)]
    case.feed(decode_step, state, [1], True, False)
    assert state["n_slots"].item() == 0 and not state["step_score"][:, :5].isnan().any()


@pytest.mark.parametrize("immediate", [False, True])
def test_many_sequences(device, immediate):
    """More than one program detects at once, and more active rows than one tile scores."""
    B = 600
    case = Stream(
        B, 4, 8, torch.bfloat16, step=0.3, units=40, device=device, sizes={"slots": B, "log": 3, "pad": [0] * B}
    )
    ours, *_ = case.check(decode_step, flush, [1] * 4, True, immediate)
    assert ours["seq"][:, layout.N_STEPS].sum() > 100


def test_bits_of_a_stream_do_not_depend_on_batch_or_schedule(device, fixed_order_dot):
    sizes = {"slots": 7, "log": 14, "pad": [0] * 3, "start": [0] * 3}
    case = Stream(3, 14, 40, torch.bfloat16, step=0.6, device=device, sizes=sizes)
    ids, hidden = case.ids, case.hidden

    def run(rows, chunks, immediate):
        case.ids, case.hidden = ids[rows], hidden[rows]
        state = case.feed(decode_step, case.state(), chunks, True, immediate)
        if not immediate:
            case.flush(flush, state)
        return [state[name][: len(rows)] for name in ("tally", "step_score")]

    tally, scores = run([0, 1, 2], [1] * 14, True)
    assert tally[..., layout.COUNT].sum() > 7
    for rows, chunks, immediate in (
        ([0, 1, 2], [14], False),
        ([2, 0], [5, 1, 8], False),
        ([1], [3, 11], True),
        ([0, 2], [1] * 14, False),
    ):
        alone_tally, alone_scores = run(rows, chunks, immediate)
        assert_identical(alone_tally, tally[rows])
        assert_identical(alone_scores, scores[rows])


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("chunks", [[4, 6], [1] * 10])
def test_a_bad_state_harms_one_sequence(device, chunks, immediate):
    sizes = {"slots": 4, "log": 10, "pad": [0] * 3, "start": [0] * 3}
    case = Stream(3, 10, 16, torch.float32, step=1.1, device=device, sizes=sizes)
    case.hidden[1, 5, 3] = float("inf")
    ours, *_ = case.check(decode_step, flush, chunks, True, immediate)
    counted = ours["tally"][..., layout.COUNT] > 0
    assert (ours["tally"][..., layout.LOG_SUM].isnan() & counted).any(1).tolist() == [False, True, False]


def test_hash_wraps(device):
    case = Stream(1, 12, 8, torch.float32, device=device)
    state = case.feed(decode_step, case.state(), [9, 1, 1, 1], True, True)
    expected = 0
    for token in case.ids[0].tolist():
        expected = (expected * layout.HASH_FACTOR + token + 1) % 2**64
    assert state["seq"][0, layout.HASH].item() % 2**64 == expected


@pytest.fixture
def launches(monkeypatch):
    """Kernels as they are launched."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches = []
    for cls in (InterpretedFunction, JITFunction):
        run = cls.run
        monkeypatch.setattr(
            cls, "run", lambda self, *args, run=run, **kw: (launches.append(self), run(self, *args, **kw))
        )
    return launches


@pytest.mark.parametrize("immediate", [False, True])
def test_a_token_is_one_launch(device, immediate, launches):
    case = Stream(3, 1, 16, torch.bfloat16, device=device)
    case.feed(decode_step, case.state(), [1], True, immediate)
    assert len(launches) == 1
    rows = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    decode_step(case.ids, case.hidden, *case.automaton, *case.head, *case.state().values(), True, immediate, rows)
    assert len(launches) == 2


@pytest.mark.parametrize(("q", "quiet", "expected"), [(12, 0, 9), (12, 8, 3), (12, 12, 1), (1, 1, 1)])
def test_quiet_columns_are_one_launch(device, launches, q, quiet, expected):
    """Five columns a piece, each of two launches that make room and one that looks for steps."""
    case = Stream(1, q, 16, torch.float32, device=device, sizes={"slots": 5})
    decode_step(*case.arguments(), True, False, None, None, quiet)
    assert len(launches) == expected


def test_too_few_slots(device):
    case = Stream(3, 1, 8, torch.float32, device=device, sizes={"slots": 2})
    with pytest.raises(ValueError, match="slots has 2 rows; 3 sequences"):
        case.feed(decode_step, case.state(), [1], True, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("immediate", [False, True])
def test_cuda_graph(device, immediate):
    """A captured step replayed over a stream leaves the state that eager calls leave."""
    case = Stream(3, 20, 64, torch.bfloat16, device=device)
    eager = case.flush(flush, case.feed(decode_step, case.state(), [1] * case.T, True, immediate))

    replayed, fresh = case.state(), case.state()
    token, row = case.ids[:, :1].clone(), case.hidden[:, :1].clone()
    args = token, row, *case.automaton, *case.head, *replayed.values(), True, immediate
    decode_step(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_step(*args)
    for name, t in fresh.items():
        replayed[name].copy_(t)
    for j in range(case.T):
        token.copy_(case.ids[:, j : j + 1])
        row.copy_(case.hidden[:, j : j + 1])
        graph.replay()
    case.flush(flush, replayed)
    for name in ("seq", "tally", "step_column", "step_region", "step_score"):
        assert_identical(replayed[name], eager[name])
