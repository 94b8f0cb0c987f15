"""Which code does the work: chosen once, by name or by device, and never exchanged silently."""

import functools
import importlib.metadata
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from .. import kernels
from . import ops

NAMES = ("cuda", "triton", "cpu", "torch")  # the first that runs is chosen


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops in the decode stream; the signatures are those of the definitions in ``reflective.kernels``."""

    name: str
    score_rows: Callable[..., Any]
    logit_rows: Callable[..., Any]
    decode_step: Callable[..., Any]
    flush: Callable[..., Any]
    tally_slots: Callable[..., Any]


@dataclass(frozen=True)
class BackendInfo:
    """Attributes: ``available``: whether it can run on this machine; ``detail``: what it was compiled for, or why not."""

    available: bool
    detail: str


def backends() -> dict[str, BackendInfo]:
    """Every backend's name, whether it can run here, and what was compiled, or why it cannot."""
    cpu_off, triton_off, cuda_off = ops.WHY_NO_EXTENSION, ops.WHY_NO_TRITON, _why_no_cuda()
    if triton_off is None and not (torch.cuda.is_available() or ops.triton_interpreted()):
        triton_off = "no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on CPU, slowly, for tests)"
    return {
        "cuda": BackendInfo(cuda_off is None, cuda_off or f"compiled for {' '.join(ops.cuda_architectures())}"),
        "triton": BackendInfo(triton_off is None, triton_off or _triton_detail()),
        "cpu": BackendInfo(cpu_off is None, cpu_off or ops.extension_detail()),
        "torch": BackendInfo(True, f"the plain-PyTorch definition, torch {torch.__version__}, any device and dtype"),
    }


def choose_backend(
    name: str | None, device: torch.device, dtype: torch.dtype, w1_dtype: torch.dtype | None = None
) -> Backend:
    """The backend ``name``, or, for None, the first of ``NAMES`` that runs features of ``dtype``, and a head whose first
    weights are of ``w1_dtype`` (None: the same), on ``device``.

    It is not measured which is faster: noise would then decide whose last bits a score has. ``reflective bench`` measures.

    Raises:
        ValueError: there is no such backend, or it cannot run here; says why.
    """
    infos = backends()
    weights = w1_dtype or dtype
    if name is None:
        usable = [n for n in NAMES if infos[n].available and _why_not(n, device, dtype, weights) is None]
        # An interpreted kernel is for tests: on CPU tensors it runs only where asked for by name.
        usable = [n for n in usable if not (n == "triton" and device.type == "cpu")]
        if usable == ["torch"]:
            wanted = "cpu" if device.type == "cpu" else "triton"
            _say_once(_why_not(wanted, device, dtype, weights) or infos[wanted].detail)
        return _backend(usable[0])
    if name not in infos:
        raise ValueError(f"backend={name!r}; expected one of {', '.join(map(repr, NAMES))}")
    if not infos[name].available:
        raise ValueError(f"backend={name!r} is unavailable: {infos[name].detail}")
    if why := _why_not(name, device, dtype, weights):
        raise ValueError(f"backend={name!r} cannot be used here: {why}")
    return _backend(name)


def _backend(name: str) -> Backend:
    source: Any = kernels if name == "torch" else ops.triton_op if name == "triton" else ops.op
    return Backend(name, *(getattr(source, field.name) for field in fields(Backend)[1:]))


def _why_not(name: str, device: torch.device, dtype: torch.dtype, weights: torch.dtype) -> str | None:
    if name == "torch":
        return None
    if device.type != ("cpu" if name == "cpu" else "cuda") and not (name == "triton" and ops.triton_interpreted()):
        return f"the model is on {device}"
    heads: list[torch.dtype] = [torch.float32, torch.bfloat16]
    if name != "cpu":
        heads += [torch.float16] + [torch.float8_e4m3fn] * (dtype != torch.float32)
    for given in (dtype, weights):
        if given not in heads:
            return f"its heads are {' or '.join(str(d).removeprefix('torch.') for d in heads)}, not {given}"
    return _why_not_gpu(device) if name == "cuda" else None


def _why_no_cuda() -> str | None:
    if ops.WHY_NO_EXTENSION is not None:
        return ops.WHY_NO_EXTENSION
    if not ops.cuda_architectures():
        return (
            "built without CUDA: when reflective was installed REFLECTIVE_SKIP_CUDA_BUILD was set, or there was no nvcc, or "
            "it failed (FORCE_CUDA=1 makes that an error)"
        )
    if not torch.cuda.is_available():
        return f"compiled for {' '.join(ops.cuda_architectures())}; no GPU that torch can use"
    reasons = [_why_not_gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def _why_not_gpu(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if any(_runs_on(capability, code) for code in ops.cuda_architectures()):
        return None
    return f"compiled for {' '.join(ops.cuda_architectures())}, this GPU is sm_{capability[0]}{capability[1]}"


def _runs_on(capability: tuple[int, int], code: str) -> bool:
    """Whether a GPU runs what was compiled for ``code``: its own generation's older code, and all older PTX."""
    kind, major, minor, variant = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code).groups()
    compiled = int(major), int(minor)
    if variant == "a":
        return capability == compiled
    return capability >= compiled and (capability[0] == compiled[0] or (kind == "compute" and not variant))


@functools.cache
def _say_once(why: str) -> None:
    warnings.warn(f"reflective runs on its plain-PyTorch definition, its slowest backend: {why}", stacklevel=5)


def _triton_detail() -> str:
    version = importlib.metadata.version("triton")
    if not torch.cuda.is_available():
        return f"triton {version}, interpreted on CPU"
    major, minor = torch.cuda.get_device_capability()
    return f"triton {version}, compiled at first use for sm_{major}{minor}"
