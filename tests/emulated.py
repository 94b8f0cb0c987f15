"""The CUDA kernels with their bindings, compiled for the processor, under a namespace of their own."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import cpp_extension

from reflective.scoring import ops

ROOT = Path(__file__).parents[1]
MULTIPROCESSORS = 5  # of the emulated GPU: several tiles a block, and blocks with one tile less than others
OPS = ("step_mask", "score_rows", "logit_rows", "decode_step", "flush", "tally_slots")
NAMESPACE = f"{ops.NAMESPACE}_emulation"
_library = torch.library.Library(NAMESPACE, "DEF")
for _name in OPS:
    _library.define(_name + ops.SCHEMAS[_name])


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    return None if shutil.which("g++") else "needs g++"


@functools.cache
def kernels() -> SimpleNamespace:
    """The ops by name, ``emulate(seed, resident_blocks, multiprocessors, shared_memory_limit)``, and ``launches()`` until now;
    compiles in seconds."""
    out = Path(tempfile.mkdtemp()) / "reflective_emulation.so"
    sources = [ROOT / "csrc" / "bind_cuda.cpp", *sorted((ROOT / "csrc").glob("*.cu"))]
    libraries = cpp_extension.library_paths()
    command: list[Any] = [
        "g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-o", out, "-x", "c++",
        f"-DREFLECTIVE_NAMESPACE={NAMESPACE}", "-DREFLECTIVE_EMULATION", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{ROOT / 'tests' / 'emulation'}", *(f"-I{path}" for path in cpp_extension.include_paths()),
        *sources, *(f"-L{path}" for path in libraries), *(f"-Wl,-rpath,{path}" for path in libraries),
        "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(out)
    library = ctypes.CDLL(str(out))
    emulate, launches = library.emulate, library.launches
    launches.restype = ctypes.c_uint64
    emulate.argtypes = ctypes.c_uint64, ctypes.c_uint, ctypes.c_int, ctypes.c_int
    emulate(0, 64, MULTIPROCESSORS, 227 * 1024)
    found = getattr(torch.ops, NAMESPACE)
    return SimpleNamespace(emulate=emulate, launches=launches, **{name: getattr(found, name) for name in OPS})
