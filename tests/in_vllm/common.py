"""What the tests in vLLM share; the environment that it is to find."""

import os
import sys
from pathlib import Path
from typing import Any

# A word is said by an error alone; a core is nobody's own.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
sys.path.insert(0, str(Path(__file__).parents[1]))

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
DELIMITER = "e"  # so that random tokens end many steps


def release() -> tuple[int, int]:
    """vLLM's."""
    from vllm import __version__

    return tuple(map(int, __version__.split(".")[:2]))


def settings(path: Path, **options: Any) -> dict[str, Any]:
    """For ``vllm.LLM`` and ``EngineArgs``: small, in float32."""
    import reflective.vllm

    scoring = {k: options.pop(k) for k in ("at", "prune", "max_steps", "rule", "head") if k in options}
    return {
        **reflective.vllm.settings(path, **{"delimiter": DELIMITER, **scoring}), "dtype": "float32", "max_model_len": 512,
        "max_num_seqs": 16, "enforce_eager": True, "block_size": 32, **options,
    }  # fmt: skip
