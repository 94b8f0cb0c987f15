"""``torch.ops.reflective.*``: the schemas, their fakes, and which code answers them. Other modules say ``op.<name>``.

The schemas are stated here, once. The compiled extension (``csrc/bind_*.cpp``) implements them for CPU tensors, and for
CUDA tensors if it was built with CUDA, through libtorch's stable ABI; otherwise Triton answers for CUDA tensors. Where
neither exists the plain-PyTorch definition answers, so the names are there on every machine. The Triton kernels of the
decode stream are ``torch.ops.reflective_triton.*`` as well, with the same schemas: there is no other way to them where
compiled ones exist.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import kernels

# Of torch.ops. A build under another name, which can be loaded beside this one, has it here and in its extension: see
# REFLECTIVE_NAMESPACE in setup.py, which reads and writes this line.
NAMESPACE = "reflective"
TRITON_NAMESPACE = f"{NAMESPACE}_triton"
op = getattr(torch.ops, NAMESPACE)
triton_op = getattr(torch.ops, TRITON_NAMESPACE)

_EXTENSION = f"{kernels.__name__.rpartition('.')[0]}._C"
_HEAD = "Tensor w1, Tensor b1, Tensor w2, Tensor b2"
SCHEMAS = {
    "step_mask": (
        "(Tensor ids, Tensor token_class, Tensor transition, Tensor pad, Tensor length, Tensor start) -> Tensor"
    ),
    "score_rows": f"(Tensor features, {_HEAD}, int activation=0) -> Tensor",
    "logit_rows": "(Tensor features, Tensor w1, Tensor b1, Tensor w2, Tensor? b2=None, int activation=0) -> Tensor",
    "decode_step": (
        f"(Tensor ids, Tensor hidden, Tensor token_class, Tensor transition, {_HEAD}, "
        "Tensor(a!) seq, Tensor(b!) tally, Tensor(c!) last_hidden, "
        "Tensor(d!) step_column, Tensor(e!) step_region, Tensor(f!) step_score, "
        "Tensor(g!) slots, Tensor(h!) slot_owner, Tensor(i!) n_slots, Tensor(j!) workspace, "
        "bool at_predict, bool immediate, Tensor? rows=None, Tensor? cu_seqlens=None, int quiet=0, "
        "int activation=0) -> ()"
    ),
    "flush": (
        f"({_HEAD}, Tensor(a!) tally, Tensor(b!) step_score, Tensor slots, Tensor slot_owner, Tensor(c!) n_slots, "
        "Tensor(d!) workspace, int activation=0) -> ()"
    ),
    "tally_slots": (
        "(Tensor logits, Tensor b2, Tensor(a!) tally, Tensor(b!) step_score, Tensor slot_owner, Tensor(c!) n_slots) -> ()"
    ),
    "sprm_loss": (
        f"(Tensor features, {_HEAD}, Tensor trajectory, Tensor outcome, Tensor? trajectory_weight, Tensor? seed, "
        "float dropout, float feature_scale, bool dynamic) -> (Tensor sums, Tensor counts, Tensor dlogit, Tensor alive)"
    ),
    "sprm_loss_backward": (
        "(Tensor grad, Tensor dlogit, Tensor alive, Tensor features, Tensor w1, Tensor b1, Tensor w2, float dropout, "
        "float feature_scale, bool features_too) -> (Tensor df, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)"
    ),
}
_library = torch.library.Library(NAMESPACE, "DEF")
_triton_library = torch.library.Library(TRITON_NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


@torch.library.register_fake(f"{NAMESPACE}::step_mask", lib=_library)
def _(ids: Tensor, token_class: Tensor, transition: Tensor, pad: Tensor, length: Tensor, start: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.bool)


@torch.library.register_fake(f"{NAMESPACE}::score_rows", lib=_library)
def _(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: int = 0) -> Tensor:
    return features.new_empty(features.shape[0], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::logit_rows", lib=_library)
def _(features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None = None, activation: int = 0) -> Tensor:
    return features.new_empty(features.shape[0], dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::sprm_loss", lib=_library)
def _(features: Tensor, w1: Tensor, *args: Any) -> tuple[Tensor, ...]:
    M, dtype = features.shape[0], torch.promote_types(features.dtype, torch.float32)
    sums, counts, dlogit = (features.new_empty(shape, dtype=dtype) for shape in ((2,), (3,), (2, M)))
    return sums, counts, dlogit, features.new_empty((M, w1.shape[0]), dtype=torch.bool)


@torch.library.register_fake(f"{NAMESPACE}::sprm_loss_backward", lib=_library)
def _(
    grad: Tensor, dlogit: Tensor, alive: Tensor, features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    dropout: float, feature_scale: float, features_too: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    df = features.new_empty(features.shape[0] if features_too else 0, features.shape[1])
    return df, *(w1.new_empty(t.shape) for t in (w1, b1, w2)), w1.new_empty(1)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, w1, b1, w2, *_, ctx.dropout, ctx.feature_scale, _ = inputs
    _, counts, dlogit, alive = output
    ctx.mark_non_differentiable(counts, dlogit, alive)
    ctx.save_for_backward(dlogit, alive, features, w1, b1, w2)


def _sprm_loss_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = op.sprm_loss_backward(grad, *ctx.saved_tensors, ctx.dropout, ctx.feature_scale, ctx.needs_input_grad[0])
    return *gradients, *[None] * 7


torch.library.register_autograd(
    f"{NAMESPACE}::sprm_loss", _sprm_loss_backward, setup_context=_save_for_backward, lib=_library
)

for _name in ("decode_step", "flush", "tally_slots"):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", lambda *args: None, lib=_library)


def _load_extension() -> str | None:
    """Load the compiled kernels. Returns why there are none, or None.

    Raises:
        ValueError: ``REFLECTIVE_CPU_CAPABILITY`` names what the processor lacks.
    """
    if importlib.util.find_spec(_EXTENSION) is None:
        return "not compiled: when reflective was installed there was no C++ compiler, or it failed"
    try:
        importlib.import_module(_EXTENSION)
        if not hasattr(op, "cpu_capability"):
            return f"compiled, but under another name than torch.ops.{NAMESPACE} (REFLECTIVE_NAMESPACE)"
    except (ImportError, OSError) as e:
        return f"compiled, but does not load: {e}"
    try:
        op.cpu_capability()
    except RuntimeError as e:  # what was asked for by name is not to be exchanged silently
        raise ValueError(f"REFLECTIVE_CPU_CAPABILITY: {e}") from e
    return None


def extension_detail() -> str:
    """What the loaded extension was compiled for."""
    return f"compiled for {op.compiled_cpu_capabilities()}; runs {op.cpu_capability()}"


def cuda_architectures() -> tuple[str, ...]:
    """What the extension's CUDA kernels were compiled for, as nvcc names it (``sm_80``, ``compute_100`` for PTX); empty
    without any."""
    compiled = getattr(op, "compiled_cuda_architectures", str)
    return tuple(compiled().split())


def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load_triton() -> str | None:
    """Define ``torch.ops.reflective_triton``, and answer for CUDA tensors where no compiled kernel does. Returns why that is
    impossible, or None.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    for name, schema in SCHEMAS.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA"):
            _library.impl(name, _triton(name), "CUDA")
        if not name.startswith("sprm_loss"):  # no part of the stream: Triton's is the only one
            _triton_library.define(name + schema)
            _triton_library.impl(name, _triton(name), "CompositeExplicitAutograd")  # CPU: where they are interpreted
            fake = getattr(op, name)
            torch.library.register_fake(f"{TRITON_NAMESPACE}::{name}", fake, lib=_triton_library)
    return None


def _triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # Imported on first use: importing triton takes a second, and most machines that score on CPU never need it.
        module = importlib.import_module(f"{kernels.__name__}.{name.removesuffix('_backward')}_triton")
        return getattr(module, name)(*args)

    return run


for _name in SCHEMAS:
    _library.impl(_name, getattr(kernels, _name), "CompositeExplicitAutograd")
WHY_NO_EXTENSION = _load_extension()
WHY_NO_TRITON = _load_triton()
