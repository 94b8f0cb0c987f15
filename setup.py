"""The compiled part of the build, ``reflective._C``: C++ always, CUDA too where a toolkit is found. The rest is in
pyproject.toml.

Without a C++ compiler the package installs pure and runs on its Triton or plain-PyTorch backend; without nvcc it has the
C++ kernels alone. Nothing is downloaded, and no GPU is looked for: what is built depends on the tools and these variables.

============================== =======================================================================================
``CUDA_HOME``, ``CUDA_PATH``   the CUDA toolkit; else the ``nvcc`` on ``PATH``, else ``/usr/local/cuda``
``TORCH_CUDA_ARCH_LIST``       as for torch; default ``8.0;9.0;10.0+PTX``, of which 9.0 is compiled as 9.0a, for Hopper's own
                               instructions. GPUs between run the code of the next lower one of
                               their generation (8.6 and 8.9 that of 8.0), later ones (12.0) compile the PTX when first used
``REFLECTIVE_SKIP_CUDA_BUILD`` 1: C++ only, whatever else is set
``FORCE_CUDA``                 1: no nvcc, or one that fails, is an error
``REFLECTIVE_NAMESPACE``       the ops' name in ``torch.ops``, for a build that lives beside another one in a process; written
                               into the built ``reflective/scoring/ops.py``, which says the default. Not for editable installs
``REFLECTIVE_FORCE_BUILD``     1: no C++ compiler, or a compiler that fails, is an error; so is an nvcc that fails
``MAX_JOBS``                   compilers at once; default: one a processor, but one for each 2 GiB of memory at most
``NVCC_THREADS``               architectures that each nvcc compiles at once; default: ``MAX_JOBS`` shared out among them
``CXX``, ``NVCC_CCBIN``        the C++ compiler; the one that nvcc calls
============================== =======================================================================================
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError as error:
    raise SystemExit(
        "reflective-kernels compiles against the torch that it will run with, and torch cannot be imported here. "
        "Install torch first, then: pip install --no-build-isolation reflective-kernels"
    ) from error

FORCE_BUILD, FORCE_CUDA, SKIP_CUDA = (
    os.environ.get(name, "0") == "1" for name in ("REFLECTIVE_FORCE_BUILD", "FORCE_CUDA", "REFLECTIVE_SKIP_CUDA_BUILD")
)
OPS = Path(__file__).resolve().parent / "reflective" / "scoring" / "ops.py"
NAMESPACE_LINE = re.compile(r'^NAMESPACE = "(\w+)"', re.MULTILINE)
DEFAULT_NAMESPACE = NAMESPACE_LINE.search(OPS.read_text(encoding="utf-8"))[1]
NAMESPACE = os.environ.get("REFLECTIVE_NAMESPACE") or DEFAULT_NAMESPACE
PURE = "reflective: {}; installing without the compiled CPU backend (REFLECTIVE_FORCE_BUILD=1 makes this an error)"
NO_CUDA = "reflective: {}; installing without the compiled CUDA backend (FORCE_CUDA=1 makes this an error)"
OLDEST = 80  # the first architecture with what the kernels are made of: cp.async and bfloat16 tensor cores
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")  # those that nvcc knows, and PTX of the last one
CUDA_SOURCES = sorted(Path("csrc").glob("*.cu"))
CUDA_BINDINGS = "csrc/bind_cuda.cpp"
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden"]
JOB_BYTES = 2 << 30


def extensions() -> list[Extension]:
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        if FORCE_BUILD or FORCE_CUDA:
            raise SystemExit(f"reflective: {forcing()}, but there is no C++ compiler {compiler!r}")
        print(PURE.format(f"no C++ compiler {compiler!r}"), file=sys.stderr)
        return []
    return [
        CppExtension(
            "reflective._C",
            sorted({str(path) for path in Path("csrc").glob("*.cpp")} - {CUDA_BINDINGS}),
            # TORCH_TARGET_VERSION: the stable ABI as of torch 2.11; Py_LIMITED_API: Python 3.10's.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wno-maybe-uninitialized",  # gcc 12 has false ones in its own AVX-512 headers
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
                "-DPy_LIMITED_API=0x030A0000",
                f"-DREFLECTIVE_NAMESPACE={NAMESPACE}",
            ],
            py_limited_api=True,
        )
    ]


def forcing() -> str:
    return "FORCE_CUDA=1" if FORCE_CUDA else "REFLECTIVE_FORCE_BUILD=1"


def memory() -> int:
    """Bytes of memory of this machine, or of the container that the build runs in."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return machine


class NoCuda(Exception):
    """Why the CUDA kernels cannot be compiled here."""


class Nvcc:
    """The CUDA compiler; ``path`` is None where there is none."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        places = [f"{home}/bin"] if home else [os.environ.get("PATH"), "/usr/local/cuda/bin"]
        self.path = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
        self.missing = (
            f"no nvcc in {home}/bin" if home else "no nvcc on PATH, and neither CUDA_HOME nor CUDA_PATH is set"
        )

    def __str__(self) -> str:
        version = re.search(r"release ([\d.]+)", self.run("--version"))
        return f"nvcc {version[1]} ({self.path})"

    def run(self, *arguments: object) -> str:
        """What nvcc prints. Raises NoCuda, having shown all of it, if nvcc fails or there is none."""
        if self.path is None:
            raise NoCuda(self.missing)
        command = [self.path, *map(str, arguments)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            if unsupported := re.search(r"unsupported \w+ version.*", done.stdout):
                raise NoCuda(f"{self} refuses the C++ compiler ({unsupported[0]}); name another one in NVCC_CCBIN")
            told = re.search(r".*\b(error|fatal)\b.*", done.stdout)
            raise NoCuda(f"{self.path} failed{f' ({told[0].strip()})' if told else ''}")
        return done.stdout

    def architectures(self) -> list[str]:
        """``TORCH_CUDA_ARCH_LIST`` in nvcc's words: ``["sm_80", "sm_90", "sm_100", "compute_100"]``.

        Those below ``OLDEST`` are left out, as such lists are often set for everything that a machine builds.
        """
        known = set(re.findall(r"compute_(\d+)", self.run("--list-gpu-arch")))
        default = [architecture for architecture in DEFAULT_ARCHITECTURES if architecture.replace(".", "") in known]
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        codes = []
        for architecture in re.findall(r"[^;\s]+", asked) or [*default, *(f"{last}+PTX" for last in default[-1:])]:
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
            if match is None:
                raise SystemExit(
                    f"reflective: TORCH_CUDA_ARCH_LIST={asked!r}: {architecture!r} is no architecture; "
                    "expected a list such as '8.0;9.0;10.0+PTX'"
                )
            number, variant, ptx = match[1] + match[2], match[3], match[4]
            if int(number) < OLDEST:
                print(f"reflective: no CUDA kernels for {architecture}: the oldest is {OLDEST / 10}", file=sys.stderr)
                continue
            if number not in known:
                raise SystemExit(
                    f"reflective: TORCH_CUDA_ARCH_LIST={asked!r}: {self} is too old to compile for {architecture}"
                )
            # Hopper's own instructions need the variant, which the only GPUs of this number run.
            native = "a" if number == "90" else variant
            codes += [f"sm_{number}{native}"] + [f"compute_{number}{variant}"] * bool(ptx)
        if not codes:
            raise NoCuda(f"nothing to compile for: TORCH_CUDA_ARCH_LIST={asked!r}, {self}")
        return list(dict.fromkeys(codes))

    def compile(self, codes: list[str], folder: Path) -> list[str]:
        """One object for each ``csrc/*.cu``, several at once; those that are up to date are kept."""
        jobs = int(os.environ["MAX_JOBS"])
        threads = os.environ.get("NVCC_THREADS") or str(max(1, jobs // len(CUDA_SOURCES)))
        targets = [f"-gencode=arch=compute_{code.partition('_')[2]},code={code}" for code in codes]
        flags = [*NVCC_FLAGS, *["-DREFLECTIVE_SM90A"] * ("sm_90a" in codes), *targets]
        # Other flags or another nvcc: another folder. nvcc's own variables change what it makes, too.
        own = [f"{name}={os.environ.get(name)}" for name in ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
        digest = hashlib.sha256("\0".join([str(self), *flags, *own]).encode()).hexdigest()[:16]
        folder = folder / f"cuda-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        headers = [*Path("csrc").glob("*.h"), *Path("csrc").glob("*.cuh")]

        def compile_one(source: Path) -> str:
            made = folder / f"{source.stem}.o"
            newest = max(path.stat().st_mtime for path in (source, *headers))
            if not made.exists() or made.stat().st_mtime <= newest:
                partial, began = made.with_suffix(".partial.o"), time.time()
                print(self.run(*flags, "--threads", threads, "-c", source, "-o", partial), end="")
                os.utime(partial, (began, began))  # what is edited meanwhile is newer
                partial.rename(made)  # an interrupted compile leaves nothing that looks finished
            return str(made)

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compile_one, CUDA_SOURCES))

    def runtime(self) -> list[str]:
        """Linker arguments for the static CUDA runtime, which finds the driver when it is first used, or none."""
        told = self.run("--dryrun", "-x", "cu", os.devnull)
        folders = re.findall(r'"-L([^"]+)"', told) + [f"{top}/lib" for top in re.findall(r"TOP=(.+)", told)]
        return [
            *(f"-L{folder}" for folder in folders),
            "-lcudart_static",
            "-lrt",
            "-ldl",
            "-lpthread",
            # torch has loaded a runtime of its own for everyone to see: ours must not be resolved to half of each.
            "-Wl,--exclude-libs,libcudart_static.a",
        ]


def add_cuda(extension: Extension, nvcc: Nvcc, folder: Path) -> None:
    """Give the extension its compiled CUDA kernels, and say so to the bindings."""
    codes = nvcc.architectures()
    extension.extra_objects += nvcc.compile(codes, folder)
    extension.extra_link_args += nvcc.runtime()
    extension.sources.append(CUDA_BINDINGS)
    extension.extra_compile_args.append(f'-DREFLECTIVE_CUDA_ARCHITECTURES="{" ".join(codes)}"')


class Build(BuildExtension):
    """Builds what it can: without CUDA if nvcc fails, nothing if the C++ compiler fails; unless the build is forced."""

    def run(self) -> None:
        if not os.environ.get("MAX_JOBS", "").isdigit():  # torch's build reads it, too
            os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, memory() // JOB_BYTES)))
        if self.inplace and NAMESPACE != DEFAULT_NAMESPACE:
            raise SystemExit(
                f"reflective: REFLECTIVE_NAMESPACE={NAMESPACE}, but an editable install takes {OPS.name} as it is"
            )
        self.force = True  # ninja, not distutils, knows what is up to date: it looks at macros, too
        try:
            super().run()
        except Exception as error:
            if FORCE_BUILD or FORCE_CUDA:
                raise
            print(PURE.format(f"the C++ compiler failed ({error})"), file=sys.stderr)
            self.extensions = []

    def build_extensions(self) -> None:
        nvcc = Nvcc()
        try:
            if not SKIP_CUDA:
                add_cuda(self.extensions[0], nvcc, Path(self.build_temp))
        except NoCuda as why:
            if FORCE_CUDA or (FORCE_BUILD and nvcc.path):
                raise SystemExit(f"reflective: {forcing()}, but {why}") from why
            print(NO_CUDA.format(why), file=sys.stderr)
        super().build_extensions()


class BuildPython(build_py):
    """Writes the namespace into the one module that says it."""

    def build_module(self, module: str, module_file: str, package: str) -> object:
        built = super().build_module(module, module_file, package)
        if Path(module_file).resolve() == OPS:
            text = OPS.read_text(encoding="utf-8")
            Path(built[0]).write_text(NAMESPACE_LINE.sub(f'NAMESPACE = "{NAMESPACE}"', text), encoding="utf-8")
        return built


if not re.fullmatch(r"[A-Za-z_]\w*", NAMESPACE, re.ASCII):
    raise SystemExit(f"reflective: REFLECTIVE_NAMESPACE={NAMESPACE!r} is no name")
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
