"""The compiled part of the build. Everything else is in pyproject.toml.

The C++ backend is built wherever a C++ compiler is found; without one the package installs pure and runs on its Triton
or plain-PyTorch backend. Environment: ``REFLECTIVE_FORCE_BUILD=1`` (no compiler, or a failed compile, is an error),
``MAX_JOBS``, ``CXX``.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError as error:
    raise SystemExit(
        "reflective-kernels compiles against the torch that it will run with, and torch cannot be imported here. "
        "Install torch first, then: pip install --no-build-isolation reflective-kernels"
    ) from error

FORCE_BUILD = os.environ.get("REFLECTIVE_FORCE_BUILD", "0") == "1"
PURE = "reflective: {}; installing without the compiled CPU backend (REFLECTIVE_FORCE_BUILD=1 makes this an error)"


def extensions() -> list[CppExtension]:
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        if FORCE_BUILD:
            raise SystemExit(f"reflective: REFLECTIVE_FORCE_BUILD=1, but there is no C++ compiler {compiler!r}")
        print(PURE.format(f"no C++ compiler {compiler!r}"), file=sys.stderr)
        return []
    return [
        CppExtension(
            "reflective._C",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            # TORCH_TARGET_VERSION: the stable ABI as of torch 2.11; Py_LIMITED_API: Python 3.10's.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wno-maybe-uninitialized",  # gcc 12 has false ones in its own AVX-512 headers
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
                "-DPy_LIMITED_API=0x030A0000",
            ],
            py_limited_api=True,
        )
    ]


class Build(BuildExtension):
    """Falls back to a pure package if the compiler fails, unless the build is forced."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if FORCE_BUILD:
                raise
            print(PURE.format(f"the C++ compiler failed ({error})"), file=sys.stderr)
            self.extensions = []


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
