"""Which code does the work: chosen once, by name or by device, and never exchanged silently."""

import functools
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels, ops

NAMES = ("cuda", "triton", "cpu", "torch")


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops in the decode stream; the signatures are those of the definitions in ``reflective.kernels``."""

    name: str
    score_rows: Callable[..., Any]
    decode_step: Callable[..., Any]
    flush: Callable[..., Any]


@dataclass(frozen=True)
class BackendInfo:
    """Attributes: ``available``: whether it can run on this machine; ``detail``: what it was compiled for, or why not."""

    available: bool
    detail: str


def backends() -> dict[str, BackendInfo]:
    """Every backend's name, whether it can run here, and what was compiled or why it cannot."""
    cpu_off, triton_off = ops.WHY_NO_EXTENSION, ops.WHY_NO_TRITON
    if triton_off is None and not (torch.cuda.is_available() or ops.triton_interpreted()):
        triton_off = "no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on CPU, slowly, for tests)"
    return {
        "cuda": BackendInfo(False, "this version has no compiled CUDA kernels; GPUs use Triton"),
        "triton": BackendInfo(triton_off is None, triton_off or _triton_detail()),
        "cpu": BackendInfo(cpu_off is None, cpu_off or ops.extension_detail()),
        "torch": BackendInfo(True, f"the plain-PyTorch definition, torch {torch.__version__}, any device and dtype"),
    }


def choose_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend ``name``, or, for None, the fastest that runs tensors of ``dtype`` on ``device``.

    Raises:
        ValueError: there is no such backend, or it cannot run here; says why.
    """
    infos = backends()
    if name is None:
        usable = (n for n in NAMES if infos[n].available and _why_not(n, device, dtype) is None)
        # An interpreted kernel is for tests: on CPU tensors it runs only where asked for by name.
        name = next(n for n in usable if not (n == "triton" and device.type == "cpu"))
        if name == "torch":
            wanted = "cpu" if device.type == "cpu" else "triton"
            _say_once(_why_not(wanted, device, dtype) or infos[wanted].detail)
    elif name not in infos:
        raise ValueError(f"backend={name!r}; expected one of {', '.join(map(repr, NAMES))}")
    elif not infos[name].available:
        raise ValueError(f"backend={name!r} is unavailable: {infos[name].detail}")
    elif why := _why_not(name, device, dtype):
        raise ValueError(f"backend={name!r} cannot be used here: {why}")
    if name == "torch":
        source: Any = kernels
    elif name == "triton" and device.type == "cpu":
        source = ops.triton_kernels()
    else:
        source = torch.ops.reflective
    return Backend(name, *(getattr(source, op) for op in ("score_rows", "decode_step", "flush")))


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "cpu" and device.type != "cpu":
        return f"the model is on {device}"
    if name == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        return f"its heads are float32 or bfloat16, not {dtype}"
    if name in ("cuda", "triton") and device.type != "cuda" and not (name == "triton" and ops.triton_interpreted()):
        return f"the model is on {device}"
    return None


@functools.cache
def _say_once(why: str) -> None:
    warnings.warn(f"reflective runs on its plain-PyTorch definition, its slowest backend: {why}", stacklevel=4)


def _triton_detail() -> str:
    version = importlib.metadata.version("triton")
    if not torch.cuda.is_available():
        return f"triton {version}, interpreted on CPU"
    major, minor = torch.cuda.get_device_capability()
    return f"triton {version}, compiled at first use for sm_{major}{minor}"
