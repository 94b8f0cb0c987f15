"""Which backend is chosen, and what is said where one cannot be had."""

import warnings

import pytest
import tiny
import torch

import reflective as rf
from reflective.scoring import backend, ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
compiled_for_cpu = pytest.mark.skipif(ops.WHY_NO_EXTENSION is not None, reason=str(ops.WHY_NO_EXTENSION))


def test_every_backend_is_told_of():
    infos = rf.backends()
    assert list(infos) == ["cuda", "triton", "cpu", "torch"]
    assert infos["torch"].available and all(info.detail for info in infos.values())
    if infos["cpu"].available:
        assert "portable" in infos["cpu"].detail and torch.ops.reflective.cpu_capability() in infos["cpu"].detail


def test_the_compiled_one_is_chosen_and_named_ones_are_kept():
    compiled = "cpu" if rf.backends()["cpu"].available else "torch"
    with warnings.catch_warnings(record=True):
        assert rf.StreamScorer(tiny.model(), tiny.head(), tiny.steps()).backend.name == compiled
    for name, info in rf.backends().items():
        if info.available and name not in ("cuda", "triton"):
            assert backend.choose_backend(name, CPU, torch.float32).name == name


def test_falling_back_is_said_once_with_the_reason(monkeypatch):
    backend._say_once.cache_clear()
    monkeypatch.setattr(ops, "WHY_NO_EXTENSION", "no compiler that day")
    with pytest.warns(UserWarning, match="slowest backend: no compiler that day"):
        assert backend.choose_backend(None, CPU, torch.float32).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.choose_backend(None, CPU, torch.float32)
    for name in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"backend='{name}' is unavailable: no compiler that day"):
            backend.choose_backend(name, CPU, torch.float32)


@compiled_for_cpu
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float8_e4m3fn), (torch.float32, torch.float8_e4m3fn)],
)
def test_heads_that_the_cpu_backend_has_not_take_the_definition(dtype, weights):
    with pytest.raises(ValueError, match=f"backend='cpu' cannot be used here: .*not {weights}"):
        backend.choose_backend("cpu", CPU, dtype, weights)
    backend._say_once.cache_clear()
    with pytest.warns(UserWarning, match=f"not {weights}"):
        assert backend.choose_backend(None, CPU, dtype, weights).name == "torch"


@compiled_for_cpu
def test_half_precision_on_cpu_is_scored():
    net, head = tiny.model(dtype=torch.float16), tiny.head(torch.float16)
    with warnings.catch_warnings(record=True):
        scores = rf.score(net, head, tiny.steps(), [[5, 6, 7, tiny.STEP_IDS[0], 9]])
    assert 0 < float(scores.score[0]) < 1


# -- GPUs that are not there ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch and the extension tell of GPUs of these compute capabilities, with CUDA kernels compiled for ``codes``."""

    def pretend(*capabilities: tuple[int, int], codes: str = "sm_80 sm_90 sm_100 compute_100") -> None:
        monkeypatch.setattr(ops, "WHY_NO_EXTENSION", None)
        monkeypatch.setattr(ops, "WHY_NO_TRITON", None)
        monkeypatch.setattr(ops, "cuda_architectures", lambda: tuple(codes.split()))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None: capabilities[getattr(device, "index", 0) or 0]
        )

    return pretend


def test_why_there_are_no_compiled_cuda_kernels(gpu):
    gpu((9, 0), codes="")
    assert "built without CUDA" in rf.backends()["cuda"].detail
    gpu()
    assert rf.backends()["cuda"].detail.endswith("no GPU that torch can use")
    gpu((7, 5))
    assert rf.backends()["cuda"].detail == "compiled for sm_80 sm_90 sm_100 compute_100, this GPU is sm_75"
    assert not rf.backends()["cuda"].available
    gpu((9, 0))
    assert rf.backends()["cuda"] == backend.BackendInfo(True, "compiled for sm_80 sm_90 sm_100 compute_100")


def test_each_gpu_of_several_is_asked(gpu):
    gpu((7, 5), (9, 0))
    assert rf.backends()["cuda"].available
    assert backend.choose_backend(None, torch.device("cuda", 0), torch.bfloat16).name == "triton"
    assert backend.choose_backend(None, torch.device("cuda", 1), torch.bfloat16).name == "cuda"
    with pytest.raises(ValueError, match="this GPU is sm_75"):
        backend.choose_backend("cuda", torch.device("cuda", 0), torch.bfloat16)


@pytest.mark.parametrize(
    ("code", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_100a", [(10, 0)], [(9, 0), (10, 3)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("sm_121", [(12, 1)], [(12, 0)]),
        ("compute_100", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
        ("compute_100a", [(10, 0)], [(10, 3), (12, 0)]),
    ],
)
def test_what_runs_where(code, runs, does_not):
    assert [c for c in runs + does_not if backend._runs_on(c, code)] == runs


@pytest.mark.parametrize(
    ("dtype", "weights", "runs"),
    [
        (torch.float16, torch.float16, True),
        (torch.bfloat16, torch.float8_e4m3fn, True),
        (torch.float16, torch.float8_e4m3fn, True),
        (torch.float32, torch.float8_e4m3fn, False),
        (torch.float64, torch.float64, False),
    ],
)
def test_heads_on_a_gpu(gpu, dtype, weights, runs):
    gpu((9, 0))
    for name in ("cuda", "triton"):
        if runs:
            assert backend.choose_backend(name, CUDA, dtype, weights).name == name
        else:
            with pytest.raises(ValueError, match=f"cannot be used here: its heads are .*not {weights}"):
                backend.choose_backend(name, CUDA, dtype, weights)


def test_compiled_kernels_are_taken_wherever_they_run(gpu, monkeypatch):
    """Unmeasured, and so always the same: attaching compiles nothing, and the clock does not choose a score's last bits."""
    monkeypatch.setattr(torch.cuda, "Event", None)
    gpu((9, 0))
    for weights in (None, torch.bfloat16):
        assert backend.choose_backend(None, CUDA, torch.bfloat16, weights).name == "cuda"
    gpu((7, 5))
    assert backend.choose_backend(None, CUDA, torch.bfloat16, weights).name == "triton"


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_ops_are_traced_without_a_break(name):
    if name == "triton" and (ops.WHY_NO_TRITON or not ops.triton_interpreted()):
        pytest.skip("needs Triton's interpreter")
    ops_of, head = backend._backend(name), tiny.head()
    rows = torch.randn(3, head.hidden_size)

    def double(rows):
        return 2 * ops_of.score_rows(rows, *head.weights())

    torch.testing.assert_close(torch.compile(double, fullgraph=True, backend="aot_eager")(rows), double(rows))
