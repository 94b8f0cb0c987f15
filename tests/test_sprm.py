"""The head: files in both forms, and files that are no heads."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import reflective as rf


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
