"""A model and its head as vLLM wants them: a directory of plain weights, and the settings that make it score."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..engines.vllm.options import NAME, Options
from ..engines.vllm.plugin import PREFIX
from .config import Config
from .default import cache_dir as own_cache
from .default import publish
from .loading import beside_head, config_of, merged, model_files, places


class ForVLLM(NamedTuple):
    """Attributes: ``model``: directory for ``LLM(...)``; ``options``: of the scoring; ``config``: how the checkpoint is used; ``home``: directory of
    the head."""

    model: Path
    options: Options
    config: Config
    home: Path

    def settings(self) -> dict[str, Any]:
        """Keywords for ``LLM`` and ``AsyncEngineArgs``.

        Raises:
            ValueError: a model whose ``config.json`` names no architecture.
        """
        file = self.model / "config.json"
        architectures = json.loads(file.read_text(encoding="utf-8")).get("architectures") or []
        if not architectures:
            raise ValueError(f"{file} names no architectures, so vLLM cannot tell what model this is")
        return {
            "hf_overrides": {"architectures": [PREFIX + name for name in architectures]},
            "worker_extension_cls": "reflective.engines.vllm.worker.ReflectiveWorker",
            "additional_config": {NAME: self.options.record()},
        }


def for_vllm(
    path: str | Path,
    *,
    head: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> ForVLLM:
    """Find model and head as ``loading.load`` does. An adapter is merged into the weights once, and the result is kept in the cache.

    Args:
        path, head, revision, cache_dir, local_files_only: as for ``ReflectiveModel.from_pretrained``.
        options: in place of what the checkpoint's ``reflective.json`` says, see ``engines.vllm.options.Options``.

    Raises:
        FileNotFoundError, ValueError, PermissionError, ImportError: as there; an option that does not exist.
    """
    where = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    place, home = places(path, head, revision, where)
    config = config_of(home)
    said = {"rule": config.rule, "delimiter": config.delimiter, "at": config.at} | options
    try:
        chosen = Options(head=str(home.absolute()), **said)
    except TypeError as error:
        raise ValueError(f"{error}; expected fields of reflective.engines.vllm.options.Options") from None
    chosen.load_head(torch.float32)  # it fails here, and not in another process
    _, files, adapters = model_files(path, place, home, revision, where)
    return ForVLLM(_plain(files, adapters) if adapters else files, chosen, config, beside_head(home))


def _plain(files: Path, adapters: list[Path]) -> Path:
    """Directory of the model at ``files`` with ``adapters`` merged into its weights."""
    digest = hashlib.sha256()
    for file in sorted(files.glob("*.safetensors")) + sorted(files.glob("*.bin")):
        digest.update(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for adapter in adapters:
        for file in sorted(adapter.glob("adapter_*")):
            digest.update(file.read_bytes())
    target = own_cache() / "merged" / digest.hexdigest()[:16]
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(files, dtype="auto").eval()
    for adapter in adapters:
        model = merged(model, adapter)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(files).save_pretrained(scratch)
        publish(Path(scratch), target)
    return target
