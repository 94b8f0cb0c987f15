"""The Triton kernels against the definitions: interpreted on a machine without a GPU, compiled on one with."""

import pytest
import torch

from reflective import kernels

pytest.importorskip("triton")
from reflective.kernels import layout
from reflective.kernels.decode_step_triton import decode_step
from reflective.kernels.flush_triton import flush
from reflective.kernels.score_rows_triton import score_rows
from reflective.kernels.step_mask_triton import step_mask

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, on the NaN of a test
V, CLASSES, STATES = 24, 5, 7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE = ["seq", "tally", "last_hidden", "step_column", "step_region", "step_score", "slots", "slot_owner", "n_slots"]


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
            return interpreter.TensorHandle((a.data[:, :, None] * b.data).sum(1) + d.data, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def random_automaton(device, seed=0, step=0.4):
    """``token_class``, ``transition`` with no meaning at all: about ``step`` of the entries end a step."""
    g = torch.Generator().manual_seed(seed)
    flags = torch.zeros(CLASSES, STATES, dtype=torch.int32)
    for flag, share in ((layout.STEP, step), (layout.THINK, 0.1), (layout.END, 0.1)):
        flags += flag * (torch.rand(flags.shape, generator=g) < share).int()
    transition = torch.randint(STATES, flags.shape, generator=g, dtype=torch.int32) | flags
    return torch.randint(CLASSES, (V,), generator=g, dtype=torch.int32).to(device), transition.to(device)


def random_head(device, H, K, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((K, H), H**-0.5), ((K,), 0.1), ((1, K), 4 * K**-0.5), ((1,), 0.1)
    return [(torch.randn(shape, generator=g) * scale).to(device, dtype) for shape, scale in shapes]


def random_rows(device, shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def new_state(device, N, C, R, H, dtype, pad, start):
    """The state before the first token; every entry that has yet to be written is poisoned."""
    seq = torch.zeros(N, layout.SEQ_FIELDS, dtype=torch.int64)
    seq[:, layout.PAD], seq[:, layout.START] = torch.tensor(pad), torch.tensor(start)
    tally = torch.zeros(N, layout.N_REGIONS, layout.TALLY_FIELDS, dtype=torch.float64)
    tally[..., layout.MIN] = tally[..., layout.LAST] = float("nan")
    state = [
        seq,
        tally,
        torch.full((N, H), float("nan"), dtype=dtype),
        torch.full((N, C), -7, dtype=torch.int32),
        torch.full((N, C), -7, dtype=torch.int8),
        torch.full((N, C), float("nan"), dtype=torch.promote_types(dtype, torch.float32)),
        torch.full((R, H), float("nan"), dtype=dtype),
        torch.full((R, layout.OWNER_FIELDS), -7, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
    ]
    return {name: t.to(device) for name, t in zip(STATE, state, strict=True)}


def rows_of(state):
    return [state[name] for name in ("tally", "step_score", "slots", "slot_owner", "n_slots")]


def apart(chunk, fill):
    """A strided copy with ``fill`` before each sequence and between elements: nothing else of the stream lies near."""
    wide = chunk.new_full((chunk.shape[0], chunk.shape[1] + 1, *chunk.shape[2:], 2), fill)
    wide[:, 1:, ..., 0] = chunk
    return wide[:, 1:, ..., 0]


def stream(op, flush_op, state, ids, hidden, automaton, head, chunks, at_predict, immediate):
    """Feed the tokens in ``chunks``; score what still waits at the end."""
    for ids_chunk, hidden_chunk in zip(ids.split(chunks, 1), hidden.split(chunks, 1), strict=True):
        op(
            apart(ids_chunk, 0),
            apart(hidden_chunk, float("nan")),
            *automaton,
            *head,
            *state.values(),
            at_predict,
            immediate,
        )
    if not immediate:
        flush_op(*head, *rows_of(state))
    return state


def assert_2x(ours, definition, truth):
    """As close to float64 as twice the definition's error; NaN at the same places."""
    ours, definition, truth = (t.double() for t in (ours, definition, truth))
    assert torch.equal(ours.isnan(), truth.isnan())
    seen = ~truth.isnan()
    if seen.any():
        scale = truth[seen].abs().max().item()
        error, allowed = (ours - truth)[seen].abs().max().item(), (definition - truth)[seen].abs().max().item()
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * scale, (error, allowed)


def assert_same_state(ours, definition, truth):
    for name in ("seq", "last_hidden", "step_column", "step_region", "n_slots"):
        assert torch.equal(ours[name].nan_to_num(), definition[name].nan_to_num()), name
    assert torch.equal(ours["tally"][..., layout.COUNT], truth["tally"][..., layout.COUNT])
    for field in (layout.LOG_SUM, layout.MIN, layout.LAST):
        assert_2x(*(s["tally"][..., field] for s in (ours, definition, truth)))
    assert_2x(*(s["step_score"] for s in (ours, definition, truth)))


def all_three(device, ids, hidden, automaton, head, shape, pad, start, chunks, at_predict, immediate):
    """The stream by the kernels, by the definition, and by the definition in float64."""
    N, C, R = shape
    states = []
    for op, flush_op, dtype in (
        (decode_step, flush, hidden.dtype),
        (kernels.decode_step, kernels.flush, hidden.dtype),
        (kernels.decode_step, kernels.flush, torch.float64),
    ):
        state = new_state(device, N, C, R, hidden.shape[2], dtype, pad, start)
        cast = [t.to(dtype) for t in head]
        states.append(
            stream(op, flush_op, state, ids, hidden.to(dtype), automaton, cast, chunks, at_predict, immediate)
        )
    return states


def random_ids(device, B, T, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("seed", range(3))
def test_step_mask(device, seed):
    B, T = 6, 37
    automaton = random_automaton(device, seed)
    # Columns of a wider tensor: neither stride is the one of a fresh tensor.
    ids = random_ids(device, T, 2 * B, seed).t()[::2]
    pad = torch.tensor([0, 0, 5, 11, T, 0], device=device)
    length = torch.tensor([T, T, T, 30, T, T], device=device)
    start = torch.tensor([0, 9, 0, 14, 0, 2**63 - 1], device=device)
    expected = kernels.step_mask(ids, *automaton, pad, length, start)
    assert expected.any()
    assert torch.equal(step_mask(ids, *automaton, pad, length, start), expected)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, H, K", [(1, 1, 2), (5, 40, 80), (17, 64, 128), (70, 65, 130), (0, 40, 80)])
def test_score_rows(device, dtype, M, H, K):
    head = random_head(device, H, K, dtype)
    features = random_rows(device, (M, 2 * H), dtype)[:, ::2]
    ours, definition = score_rows(features, *head), kernels.score_rows(features, *head)
    assert ours.dtype == torch.float32 and ours.shape == (M,)
    assert_2x(ours, definition, kernels.score_rows(features.double(), *(t.double() for t in head)))


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite(device, dtype, bad):
    M, H, K = 20, 40, 80
    head = random_head(device, H, K, dtype)
    head[0][:, 0] = -0.1 if bad > 0 else 0.1  # a product of minus infinity, which ReLU turns into an innocent 0
    features = random_rows(device, (M, H), dtype)
    clean = score_rows(features, *head)
    features[[3, 19], [0, H - 1]] = bad
    scores = score_rows(features, *head)
    assert scores.isnan().nonzero().flatten().tolist() == [3, 19]
    others = torch.ones(M, dtype=torch.bool, device=device)
    others[[3, 19]] = False
    assert torch.equal(scores[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_company(device, dtype, fixed_order_dot):
    M, H, K = 70, 72, 150
    head = random_head(device, H, K, dtype)
    features = random_rows(device, (M, H), dtype)
    scores = score_rows(features, *head)
    assert torch.equal(score_rows(features, *head), scores)
    assert torch.equal(score_rows(features.flip(0), *head), scores.flip(0))
    for i in (0, 7, 15, 16, 63, 69):
        assert torch.equal(score_rows(features[i : i + 1], *head), scores[i : i + 1])


def test_flush(device):
    """One sequence of many steps, some past the log's capacity, a sequence without any, and a buffer not quite full."""
    N, C, R, H, K = 70, 3, 24, 24, 48
    n = R - 1
    head = random_head(device, H, K, torch.float32)
    owner = torch.stack([torch.tensor([2, 0, 69])[torch.arange(R) % 3], torch.arange(R) // 3, torch.arange(R) % 4], 1)
    states = []
    for op, dtype in ((flush, torch.float32), (kernels.flush, torch.float32), (kernels.flush, torch.float64)):
        state = new_state(device, N, C, R, H, dtype, [0] * N, [0] * N)
        state["slots"][:n] = random_rows(device, (n, H), torch.float32)
        state["slot_owner"].copy_(owner)
        state["n_slots"].fill_(n)
        for _ in range(2):  # the second finds an empty buffer
            op(*(t.to(dtype) for t in head), *rows_of(state))
        states.append(state)
    assert_same_state(*states)
    scores = score_rows(states[0]["slots"][:n], *head)
    assert torch.equal(states[0]["step_score"][69], scores[2::3][:C])
    for s in (0, 2, 69):  # added up in slot order: not merely close to the definition
        for region in range(layout.N_REGIONS):
            mine = scores[((owner[:n, 0] == s) & (owner[:n, 2] == region)).to(device)].double().tolist()
            assert states[0]["tally"][s, region, layout.LOG_SUM].item() == sum(mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("at_predict", [True, False])
def test_stream(device, at_predict, immediate, dtype):
    """Random automata, left padding, a late scope and an empty one, B < N, chunks of every length, fewer log entries than steps."""
    N, B, T, H, C, R = 5, 4, 23, 24, 6, 5
    seed = 2 * at_predict + immediate
    ids = random_ids(device, B, T, seed)
    hidden = random_rows(device, (B, T, H), dtype, seed)
    args = random_automaton(device, seed), random_head(device, H, 2 * H, dtype)
    pad, start = [0, 4, 0, 0, 0], [0, 0, 9, 2**63 - 1, 0]
    ours, definition, truth = all_three(
        device, ids, hidden, *args, (N, C, R), pad, start, [1, 1, 9, 1, 4, 7], at_predict, immediate
    )
    assert truth["seq"][:B, layout.N_STEPS].max() > C and truth["seq"][3, layout.N_STEPS] == 0
    assert truth["seq"][B].equal(torch.zeros_like(truth["seq"][B]))
    assert_same_state(ours, definition, truth)


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("R", [2, 3, 64])
def test_prefill_overflows_the_slots(device, R, immediate):
    """Every token but the first two ends a step: many times the buffer in one call."""
    B, T, H = 2, 15, 16
    args = random_automaton(device, step=1.1), random_head(device, H, 2 * H, torch.float32)
    ids, hidden = random_ids(device, B, T), random_rows(device, (B, T, H), torch.float32)
    states = all_three(device, ids, hidden, *args, (B, T, R), [0, 0], [0, 0], [T], True, immediate)
    assert states[0]["seq"][:, layout.N_STEPS].tolist() == [T - 2] * B
    assert_same_state(*states)


def test_full_buffer_left_by_the_definition(device):
    """The definition flushes only when a row finds no slot; the kernels take over its full buffer."""
    B, T, H = 2, 8, 16
    automaton, head = random_automaton(device, step=1.1), random_head(device, H, 2 * H, torch.float32)
    ids, hidden = random_ids(device, B, T), random_rows(device, (B, T, H), torch.float32)
    ours, definition = (new_state(device, B, T, 4, H, torch.float32, [0, 0], [0, 0]) for _ in range(2))
    for state in (ours, definition):
        kernels.decode_step(ids[:, :4], hidden[:, :4], *automaton, *head, *state.values(), True, False)
        assert state["n_slots"].item() == 4
    for op, flush_op, state in ((decode_step, flush, ours), (kernels.decode_step, kernels.flush, definition)):
        stream(op, flush_op, state, ids[:, 4:], hidden[:, 4:], automaton, head, [1, 3], True, False)
    torch.testing.assert_close(ours["step_score"], definition["step_score"], equal_nan=True)
    assert torch.equal(ours["tally"][..., layout.COUNT], definition["tally"][..., layout.COUNT])


def test_deferred_rows_wait(device):
    """With room in the buffer nothing is scored before it is asked for."""
    B, T, H = 2, 6, 16
    automaton, head = random_automaton(device, step=1.1), random_head(device, H, 2 * H, torch.float32)
    state = new_state(device, B, T, 16, H, torch.float32, [0, 0], [0, 0])
    ids, hidden = random_ids(device, B, T), random_rows(device, (B, T, H), torch.float32)
    for chunk in (slice(0, 3), slice(3, T)):
        decode_step(ids[:, chunk], hidden[:, chunk], *automaton, *head, *state.values(), True, False)
    assert state["n_slots"].item() == B * (T - 2) and state["step_score"].isnan().all()
    flush(*head, *rows_of(state))
    assert state["n_slots"].item() == 0 and not state["step_score"][:, : T - 2].isnan().any()


def test_bits_of_a_stream_do_not_depend_on_batch_or_schedule(device, fixed_order_dot):
    B, T, H, R = 3, 14, 40, 7
    automaton, head = random_automaton(device), random_head(device, H, 2 * H, torch.bfloat16)
    ids, hidden = random_ids(device, B, T), random_rows(device, (B, T, H), torch.bfloat16)

    def run(rows, chunks, immediate):
        n = len(rows)
        state = new_state(device, n, T, R, H, torch.bfloat16, [0] * n, [0] * n)
        stream(decode_step, flush, state, ids[rows], hidden[rows], automaton, head, chunks, True, immediate)
        return state["tally"].nan_to_num(), state["step_score"].nan_to_num()

    tally, scores = run([0, 1, 2], [1] * T, True)
    assert tally[..., layout.COUNT].sum() > R
    for rows, chunks, immediate in (([0, 1, 2], [T], False), ([2, 0], [5, 1, 8], False), ([1], [3, 11], True)):
        alone_tally, alone_scores = run(rows, chunks, immediate)
        assert torch.equal(alone_tally, tally[rows]) and torch.equal(alone_scores, scores[rows])


@pytest.mark.parametrize("immediate", [False, True])
def test_a_bad_state_harms_one_sequence(device, immediate):
    B, T, H = 3, 10, 16
    args = random_automaton(device, step=1.1), random_head(device, H, 2 * H, torch.float32)
    ids, hidden = random_ids(device, B, T), random_rows(device, (B, T, H), torch.float32)
    hidden[1, 5, 3] = float("inf")
    states = all_three(device, ids, hidden, *args, (B, T, 4), [0] * B, [0] * B, [4, 6], True, immediate)
    assert_same_state(*states)
    assert states[0]["tally"][:, :, layout.LOG_SUM].isnan().any(1).tolist() == [False, True, False]


def test_hash_wraps(device):
    B, T, H = 1, 9, 8
    automaton, head = random_automaton(device), random_head(device, H, 2 * H, torch.float32)
    state = new_state(device, B, T, 4, H, torch.float32, [0], [0])
    ids = random_ids(device, B, T)
    decode_step(ids, torch.zeros(B, T, H, device=device), *automaton, *head, *state.values(), True, True)
    expected = 0
    for token in ids[0].tolist():
        expected = (expected * layout.HASH_FACTOR + token + 1) % 2**64
    assert state["seq"][0, layout.HASH].item() % 2**64 == expected


def test_too_few_slots(device):
    automaton, head = random_automaton(device), random_head(device, 8, 16, torch.float32)
    state = new_state(device, 3, 4, 2, 8, torch.float32, [0] * 3, [0] * 3)
    with pytest.raises(ValueError, match="slots has 2 rows; 3 sequences"):
        decode_step(
            random_ids(device, 3, 1),
            torch.zeros(3, 1, 8, device=device),
            *automaton,
            *head,
            *state.values(),
            True,
            True,
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("immediate", [False, True])
def test_cuda_graph(device, immediate):
    """A captured step replayed over a stream leaves the state that eager calls leave."""
    B, T, H, R = 3, 20, 64, 5
    automaton, head = random_automaton(device), random_head(device, H, 2 * H, torch.bfloat16)
    ids, hidden = random_ids(device, B, T), random_rows(device, (B, T, H), torch.bfloat16)
    eager, replayed = (new_state(device, B, T, R, H, torch.bfloat16, [0] * B, [0] * B) for _ in range(2))
    stream(decode_step, flush, eager, ids, hidden, automaton, head, [1] * T, True, immediate)

    fresh = {name: t.clone() for name, t in replayed.items()}
    token, row = ids[:, :1].clone(), hidden[:, :1].clone()
    args = token, row, *automaton, *head, *replayed.values(), True, immediate
    decode_step(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_step(*args)
    for name, t in fresh.items():
        replayed[name].copy_(t)
    for j in range(T):
        token.copy_(ids[:, j : j + 1])
        row.copy_(hidden[:, j : j + 1])
        graph.replay()
    flush(*head, *rows_of(replayed))
    for name in ("seq", "tally", "step_column", "step_region", "step_score"):
        assert torch.equal(eager[name].nan_to_num(), replayed[name].nan_to_num()), name
