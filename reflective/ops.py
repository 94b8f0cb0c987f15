"""``torch.ops.reflective.*``: the schemas, their fakes, and which code answers them.

The schemas are stated here, once. The compiled extension (``csrc/bindings.cpp``) implements them for CPU tensors through
libtorch's stable ABI; Triton answers for CUDA tensors. Where neither exists the plain-PyTorch definition answers, so the
names are there on every machine.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import kernels

_HEAD = "Tensor w1, Tensor b1, Tensor w2, Tensor b2"
SCHEMAS = {
    "step_mask": (
        "(Tensor ids, Tensor token_class, Tensor transition, Tensor pad, Tensor length, Tensor start) -> Tensor"
    ),
    "score_rows": f"(Tensor features, {_HEAD}) -> Tensor",
    "decode_step": (
        f"(Tensor ids, Tensor hidden, Tensor token_class, Tensor transition, {_HEAD}, "
        "Tensor(a!) seq, Tensor(b!) tally, Tensor(c!) last_hidden, "
        "Tensor(d!) step_column, Tensor(e!) step_region, Tensor(f!) step_score, "
        "Tensor(g!) slots, Tensor(h!) slot_owner, Tensor(i!) n_slots, bool at_predict, bool immediate) -> ()"
    ),
    "flush": (
        f"({_HEAD}, Tensor(a!) tally, Tensor(b!) step_score, Tensor slots, Tensor slot_owner, Tensor(c!) n_slots) -> ()"
    ),
}
_library = torch.library.Library("reflective", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


@torch.library.register_fake("reflective::step_mask", lib=_library)
def _(ids: Tensor, token_class: Tensor, transition: Tensor, pad: Tensor, length: Tensor, start: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.bool)


@torch.library.register_fake("reflective::score_rows", lib=_library)
def _(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], dtype=torch.float32)


for _name in ("decode_step", "flush"):
    torch.library.register_fake(f"reflective::{_name}", lambda *args: None, lib=_library)


def _load_extension() -> str | None:
    """Load the compiled CPU kernels. Returns why there are none, or None."""
    if importlib.util.find_spec("reflective._C") is None:
        return "not compiled: when reflective was installed there was no C++ compiler, or it failed"
    try:
        importlib.import_module("reflective._C")
        torch.ops.reflective.cpu_capability()  # raises where REFLECTIVE_CPU_CAPABILITY names what the processor lacks
    except (ImportError, OSError) as e:
        return f"compiled, but does not load: {e}"
    return None


def extension_detail() -> str:
    """What the loaded extension was compiled for."""
    op = torch.ops.reflective
    return f"compiled for {op.compiled_cpu_capabilities()}; runs {op.cpu_capability()}"


def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_kernels() -> SimpleNamespace:
    """The Triton kernels by the name of their op."""
    return SimpleNamespace(**{name: _triton(name) for name in SCHEMAS})


def _load_triton() -> str | None:
    """Answer for CUDA tensors with the Triton kernels. Returns why that is impossible, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    for name in SCHEMAS:
        _library.impl(name, _triton(name), "CUDA")
    return None


def _triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # Imported on first use: importing triton takes a second, and most machines that score on CPU never need it.
        return getattr(importlib.import_module(f"reflective.kernels.{name}_triton"), name)(*args)

    return run


for _name in SCHEMAS:
    _library.impl(_name, getattr(kernels, _name), "CompositeExplicitAutograd")
WHY_NO_EXTENSION = _load_extension()
WHY_NO_TRITON = _load_triton()
