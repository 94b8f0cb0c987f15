"""Whether a transformers that the tests were not run with still is as scoring needs it, tried on a small model."""

import functools
from typing import Any

import torch
from torch import Tensor

from . import internals
from .backbone import Backbone
from .places import Places
from .tap import ModelTap


class _Notes:
    """A listener that keeps what it is told."""

    unheard = False

    def __init__(self, places: Places) -> None:
        self.places = places
        self.told: list[str] = []
        self.states: list[Tensor] = []

    def on_generate(self, arguments: dict[str, Any], batching: Any) -> None:
        self.told.append("generate")

    def on_generated(self, output: Any) -> None:
        self.told.append("generated")

    def on_forward(self, ids: Tensor | None, cache: Any, given: dict[str, Any]) -> None:
        self.told.append("forward")

    def on_features(self, hidden: Tensor) -> None:
        self.states.append(hidden)

    def on_trace(self, ids: Tensor, hidden: Tensor) -> None:
        pass

    def on_select(self, indices: Tensor, reorder: bool) -> None:
        self.told.append("select")

    def on_repeat(self, repeats: int) -> None:
        self.told.append("select")

    def on_crop(self, length: int) -> None:
        self.told.append("crop")


_WAYS: dict[str, dict[str, Any]] = {
    "decoding": {},
    "beams": {"num_beams": 2},
    "drafts": {"prompt_lookup_num_tokens": 2},
}


@functools.cache
def try_release(way: str) -> None:
    """Once a process for each way to decode: whether a small model's ``generate`` tells what it should, and the states that are
    heard are ``hidden_states[-2]``.

    Raises:
        RuntimeError: it does not.
    """
    model = internals.small_model()
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])
    backbone = Backbone.of(model)
    heard = _Notes(backbone.places)
    try:
        tap = ModelTap.add(backbone, heard)
        try:
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, **_WAYS[way]
                )
        finally:
            ModelTap.remove(backbone, heard)
        with torch.no_grad():
            truth = model(out[:, :-1], output_hidden_states=True).hidden_states[-2]
    except Exception as e:
        raise internals.unknown(f"tried on a small model, {way} failed ({type(e).__name__}: {e})") from e
    missing = {"generate", "forward", "generated"} | {"beams": {"select"}, "drafts": {"crop"}}.get(way, set())
    missing -= set(heard.told)
    if not tap.proved:
        missing.add("cache")
    if way == "decoding":
        states = torch.cat(heard.states, 1)
        if states.shape != truth.shape or not torch.allclose(states, truth, rtol=1e-3, atol=1e-4):
            missing.add("states")
    if missing:
        raise internals.unknown(
            f"tried on a small model, {way}: nothing, or the wrong thing, was heard of {', '.join(sorted(missing))}"
        )
    if way == "decoding":
        internals.warn_untested()
