"""The head: files in both forms, files that are no heads, and its first weights in float8."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import reflective as rf
from reflective import kernels
from reflective.sprm import quantize


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
