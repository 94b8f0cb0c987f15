"""The head: files in both forms, files that are no heads, and its first weights in float8."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import reflective as rf
from reflective import kernels
from reflective.scoring import sharded, sprm
from reflective.scoring.loss import sprm_loss_rows
from reflective.scoring.sprm import quantize


@pytest.mark.parametrize("name", ["score_module.pt", "score_module.safetensors", "."])
def test_round_trip(tmp_path, name):
    head = tiny.head()
    file = head.save_pretrained(tmp_path / name)
    for path in (file, tmp_path):
        again = rf.SPRM.from_pretrained(path)
        assert not again.training and again.hidden_size == tiny.HIDDEN
        for key, value in head.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)
    assert rf.SPRM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_published_form(tmp_path):
    """A state dict of the published module's keys and shapes, as its training code saves it."""
    published = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)
    ).eval()
    torch.save(published.state_dict(), tmp_path / "score_module.pt")
    x = torch.randn(5, 8)
    assert torch.equal(rf.SPRM.from_pretrained(tmp_path)(x), published(x))


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickled_code_is_never_run(tmp_path, capsys):
    torch.save({**tiny.head().state_dict(), "extra": Evil()}, tmp_path / "score_module.pt")
    with pytest.raises(ValueError, match="pickled code"):
        rf.SPRM.from_pretrained(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_files_that_are_no_heads(tmp_path):
    with pytest.raises(FileNotFoundError, match="nor a directory with one of"):
        rf.SPRM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        rf.SPRM.from_pretrained(tmp_path / "score_module.pt")
    for suffix in ("pt", "safetensors"):
        whole = tiny.head().save_pretrained(tmp_path / f"score_module.{suffix}").read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"\0" * 100):
            damaged = tmp_path / f"damaged.{suffix}"
            damaged.write_bytes(content)
            with pytest.raises(ValueError, match="damaged"):
                rf.SPRM.from_pretrained(damaged)
    state = load_file(tmp_path / "score_module.safetensors")
    save_file({k.replace("3.", "2."): v for k, v in state.items()}, tmp_path / "keys.safetensors")
    with pytest.raises(ValueError, match="expected tensors under"):
        rf.SPRM.from_pretrained(tmp_path / "keys.safetensors")
    save_file({**state, "0.bias": torch.zeros(3)}, tmp_path / "shapes.safetensors")
    with pytest.raises(ValueError, match="shapes do not fit"):
        rf.SPRM.from_pretrained(tmp_path / "shapes.safetensors")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_of_any_float_type(tmp_path, suffix):
    file = tmp_path / f"score_module.{suffix}"
    save = torch.save if suffix == "pt" else save_file
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        state = {key: value.to(dtype) for key, value in tiny.head().state_dict().items()}
        save(state, file)
        for asked in (None, torch.float32):
            head = rf.SPRM.from_pretrained(file, dtype=asked)
            assert head.dtype == (asked or dtype)
            assert all(torch.equal(head.state_dict()[key], value.to(head.dtype)) for key, value in state.items())
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        eight = {key: value.to(dtype if key == "0.weight" else torch.float32) for key, value in state.items()}
        save(eight, file)
        head = rf.SPRM.from_pretrained(file)
        assert head.dtype == torch.float32, "and the scales folded into the others are kept"
        assert all(torch.equal(head.state_dict()[key], value.float()) for key, value in eight.items())
        assert rf.SPRM.from_pretrained(file, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("key", ["0.weight", "3.bias"])
def test_weights_that_are_no_floats(tmp_path, dtype, key):
    state = tiny.head().state_dict()
    torch.save({**state, key: (state[key] * 100).to(dtype)}, tmp_path / "score_module.pt")
    with pytest.raises(ValueError, match=rf"score_module.pt: {key} is {dtype}, no plain float: .* as it was trained"):
        rf.SPRM.from_pretrained(tmp_path, dtype=torch.float32)


def test_quantised_heads(tmp_path):
    file, state = tmp_path / "score_module.pt", tiny.head().state_dict()
    torch.save({**state, "0.weight": state["0.weight"].to_sparse()}, file)
    with pytest.raises(ValueError, match=r"0.weight is torch.sparse_coo, no plain float"):
        rf.SPRM.from_pretrained(file)
    for scale in ("0.weight_scale", "0.SCB", "0.weight.absmax"):
        torch.save({**state, scale: torch.ones(1)}, file)
        with pytest.raises(ValueError, match=rf"found \[.*'{scale}'.*it looks quantised"):
            rf.SPRM.from_pretrained(file)
    for dtype in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(ValueError, match=f"dtype={dtype!r}: a head computes in one of torch.float32, .*w1_dtype"):
            rf.SPRM.from_pretrained(file, dtype=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    """Their scores would be NaN, and the hidden states get the blame."""
    head = tiny.head()
    head[3].weight[0, 3] = value
    with pytest.raises(ValueError, match=r"score_module.safetensors: 3.weight holds NaN or infinity"):
        rf.SPRM.from_pretrained(head.save_pretrained(tmp_path))
    head[3].weight[0, 3] = 1e5
    file = head.save_pretrained(tmp_path)
    assert rf.SPRM.from_pretrained(file, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"3.weight has no room in torch.float16; use torch.bfloat16"):
        rf.SPRM.from_pretrained(file, dtype=torch.float16)


def test_heads_in_memory_that_do_not_compute():
    def refused(head, message):
        with pytest.raises(ValueError, match=message):
            rf.StreamScorer(tiny.model(), head, tiny.steps())

    head = tiny.head()
    head[0].weight = torch.nn.Parameter((head[0].weight * 100).to(torch.int8), requires_grad=False)
    refused(head, r"head: 0.weight is torch.int8, no plain float: .*leave it out when the model is quantised")
    head = tiny.head()
    head[3].half()
    refused(head, r"head: 3.weight is torch.float16 and 0.weight torch.float32; use head.to\(torch.float32\)")

    class Packed(torch.Tensor):  # as torchao's and DTensor are
        def __tensor_flatten__(self):
            raise AssertionError("not asked for")

    head = tiny.head()
    head[0].weight = torch.nn.Parameter(head[0].weight.detach().as_subclass(Packed), requires_grad=False)
    refused(head, r"head: 0.weight is a Packed, no plain tensor; leave the head out of what quantises")


# -- float8 -----------------------------------------------------------------------------------------------------------


def wild_head(K=200, H=48):
    """Rows of magnitudes from 2**-40 to 2**40, one at either end of a scale's range, one of zeros."""
    torch.manual_seed(0)
    w1 = torch.randn(K, H) * 2.0 ** torch.randint(-40, 41, (K, 1))
    w1[0], w1[1] = 0, w1[1] * (448 / w1[1].abs().max())
    w1[2] = w1[2] * (torch.tensor(224.0).nextafter(torch.tensor(0.0)) / w1[2].abs().max())
    return w1, torch.randn(K), torch.randn(1, K)


def test_scales_are_powers_of_two_and_folded_exactly():
    w1, b1, w2 = wild_head()
    q, folded_b1, folded_w2 = quantize(w1, b1, w2)
    assert (q.dtype, folded_b1.dtype, folded_w2.dtype) == (torch.float8_e4m3fn, torch.float32, torch.float32)
    scale = folded_w2[0] / w2[0]
    assert (torch.frexp(scale).mantissa == 0.5).all() and scale[0] == 1
    assert torch.equal(folded_b1 * scale, b1)
    largest = (w1 / scale[:, None]).abs().amax(1)
    assert ((largest[1:] > 224) & (largest[1:] <= 448)).all()
    assert largest[1] == 448 and scale[1] == 1 and scale[2] == 0.5
    error = (q.double() * scale[:, None] - w1).abs()
    # Half of the last of 3 bits, and of the smallest step, 2**-9.
    assert (error <= torch.maximum(w1.abs() / 16, scale[:, None] * 2**-10)).all() and not q[0].float().any()


def test_a_row_too_small_for_its_scale_is_harmless():
    w1, b1, w2 = torch.full((3, 16), 1e-44), torch.tensor([0.5, -3e4, 0.0]), torch.ones(1, 3)
    weights = quantize(w1, b1, w2)
    logit = kernels.logit_rows(torch.ones(1, 16), *weights)
    assert torch.equal(logit, torch.tensor([0.5]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_weights_that_cannot_be_quantised(which, value):
    weights = [t.double() for t in wild_head()]
    weights[which].flatten()[5] = value
    with pytest.raises(ValueError, match="NaN or infinite, or too large"):
        quantize(*weights)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", sprm.ACTIVATIONS)
def test_another_activation(activation, bias):
    """The module itself, in float64, is what the ops compute with its weights; its file has the same keys."""
    head = rf.SPRM(16, 40, dtype=torch.float64, activation=activation, bias=bias)
    assert list(head.state_dict()) == (list(sprm.KEYS) if bias else ["0.weight", "3.weight"])
    weights, rows = head.weights(), torch.randn(9, 16, dtype=torch.float64)
    assert [tuple(t.shape) for t in weights] == [(40, 16), (40,), (1, 40), (1,)]
    assert bias or not (weights[1].any() or weights[3].any())
    logits = kernels.logit_rows(rows, *weights, sharded.ACTIVATIONS[activation])
    torch.testing.assert_close(logits, head.eval()(rows).squeeze(-1), rtol=1e-12, atol=1e-12)


def test_what_another_activation_cannot():
    assert list(sharded.ACTIVATIONS) == list(sprm.ACTIVATIONS)
    with pytest.raises(ValueError, match="activation='tanh'; expected one of 'relu', 'gelu', 'gelu_tanh', 'silu'"):
        rf.SPRM(16, activation="tanh")
    head = rf.SPRM(16, activation="silu")
    with pytest.raises(ValueError, match="scales that only relu lets through, and this head has silu; give None"):
        head.weights(torch.float8_e4m3fn)
    for untrainable, kind in ((head, "SPRM, silu"), (rf.SPRM(16, bias=False), "SPRM, relu")):
        labels = torch.zeros(3, dtype=torch.int64), torch.ones(1)
        with pytest.raises(ValueError, match=rf"a sprm head \({kind}\) scores, but is not trained here; trained are MLPs with ReLU and biases"):
            sprm_loss_rows(untrainable, torch.zeros(3, 16), *labels)


def test_weights_in_float8():
    head = tiny.head(torch.bfloat16)
    w1, b1, w2, b2 = head.weights(torch.float8_e4m3fn)
    assert [t.dtype for t in (w1, b1, w2, b2)] == [torch.float8_e4m3fn, *[torch.float32] * 3]
    for dtype in (None, torch.bfloat16):
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(head.weights(dtype), head.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"w1_dtype=torch.float16; expected None, the head's torch.bfloat16 or"):
        head.weights(torch.float16)

    scale = w2 / head[3].weight  # [1, K]
    rounded = torch.nn.functional.linear(torch.eye(tiny.HIDDEN).double(), w1.double() * scale.T.double()).T  # [K, H]
    features = torch.randn(7, tiny.HIDDEN, dtype=torch.float64)
    exact = [t.double() for t in head.weights()]
    truth = kernels.logit_rows(features, rounded, *exact[1:])
    torch.testing.assert_close(kernels.logit_rows(features, w1, b1, w2, b2), truth, rtol=1e-12, atol=1e-12)
    assert 0 < (truth - kernels.logit_rows(features, *exact)).abs().max() < 0.05
