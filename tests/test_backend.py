"""Which backend is chosen, and what is said where one cannot be had."""

import warnings

import pytest
import tiny
import torch

import reflective as rf
from reflective import backend, ops

CPU = torch.device("cpu")


def test_every_backend_is_told_of():
    infos = rf.backends()
    assert list(infos) == ["cuda", "triton", "cpu", "torch"]
    assert infos["torch"].available and all(info.detail for info in infos.values())
    if infos["cpu"].available:
        assert "portable" in infos["cpu"].detail and torch.ops.reflective.cpu_capability() in infos["cpu"].detail


def test_the_fastest_is_chosen_and_named_ones_are_kept():
    fastest = "cpu" if rf.backends()["cpu"].available else "torch"
    with warnings.catch_warnings(record=True):
        assert rf.StreamScorer(tiny.model(), tiny.head(), tiny.steps()).backend.name == fastest
    for name, info in rf.backends().items():
        if info.available and name != "triton":
            assert backend.choose_backend(name, CPU, torch.float32).name == name


def test_falling_back_is_said_once_with_the_reason(monkeypatch):
    backend._say_once.cache_clear()
    monkeypatch.setattr(ops, "WHY_NO_EXTENSION", "no compiler that day")
    with pytest.warns(UserWarning, match="slowest backend: no compiler that day"):
        assert backend.choose_backend(None, CPU, torch.float32).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.choose_backend(None, CPU, torch.float32)
    with pytest.raises(ValueError, match="backend='cpu' is unavailable: no compiler that day"):
        backend.choose_backend("cpu", CPU, torch.float32)


@pytest.mark.skipif(ops.WHY_NO_EXTENSION is not None, reason=str(ops.WHY_NO_EXTENSION))
def test_half_precision_on_cpu_takes_the_definition():
    with pytest.raises(ValueError, match=r"backend='cpu' cannot be used here: .*not torch.float16"):
        backend.choose_backend("cpu", CPU, torch.float16)
    backend._say_once.cache_clear()
    with pytest.warns(UserWarning, match=r"not torch.float16"):
        assert backend.choose_backend(None, CPU, torch.float16).name == "torch"
    net, head = tiny.model(dtype=torch.float16), tiny.head(torch.float16)
    scores = rf.score(net, head, tiny.steps(), [[5, 6, 7, tiny.STEP_IDS[0], 9]])
    assert 0 < float(scores.score[0]) < 1
