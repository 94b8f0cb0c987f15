"""A model and its head as vLLM wants them: a directory of plain weights, and the settings that make it score."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..engines.vllm.options import NAME, SCORING, Options
from ..engines.vllm.plugin import PREFIX
from ..scoring.heads import Head, Heads
from ..scoring.loading import head_of
from ..scoring.sprm import SPRM
from ..scoring.taps import Tap
from .config import Config
from .default import cache_dir as own_cache
from .default import publish
from .files import CONFIG_NAME
from .loading import beside_head, config_of, merged, model_files, open_head, places, used

SAID = ("rule", "delimiter", "consecutive", "think_start_id", "think_end_id", "at", *SCORING)  # options that a caller may give


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
    head: str | Path | Heads | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> ForVLLM:
    """Find model and head as ``loading.load`` does. An adapter is merged into the weights once, and the result is kept in the cache; so are the
    weights of a head that is no file of the paper's form.

    Args:
        path, revision, cache_dir, local_files_only: as for ``ReflectiveModel.from_pretrained``.
        head: as there, or a head itself.
        options: those of ``SAID``, in place of what head and checkpoint say, see ``engines.vllm.options.Options``.

    Raises:
        FileNotFoundError, ValueError, PermissionError, ImportError: as there; an option that does not exist; several heads, or one of two logits.
    """
    if unknown := sorted(set(options) - set(SAID)):
        raise ValueError(
            f"unknown {', '.join(unknown)}; expected {', '.join(SAID)}, see reflective.engines.vllm.options.Options; all else the head says"
        )
    where = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    given = None if head is None or isinstance(head, str | Path) else _one(head)
    place, home = places(path, head if given is None else None, revision, where)
    form, config = (None, config_of(home)) if given is not None else open_head(home)  # first, as it fails fast
    _, files, adapters = model_files(path, place, home, revision, where)
    if form is None:
        found, rule = given, given.step_rule or config.step_rule
    else:
        found = _one(head_of(form, model=AutoConfig.from_pretrained(files)))
        found, config = used(found, config, (beside_head(home) / CONFIG_NAME).is_file())
        rule = config.step_rule
    if head is not None:  # else it lies with the model
        found.check_trained_on(str(path))
    # SPRM.from_pretrained, by which vLLM's processes read it, takes a file of the paper's form as it is.
    at_home = form is not None and form.name == "metastone" and found.activation == "relu"
    place_of_head = home if at_home else _plain_head(found)
    try:
        chosen = Options(head=str(place_of_head.absolute()), **{**rule, **_said(found, config), **options})
    except TypeError as error:
        raise ValueError(f"{error}; expected fields of reflective.engines.vllm.options.Options") from None
    return ForVLLM(_plain(files, adapters) if adapters else files, chosen, config, beside_head(home))


def _one(head: Heads) -> Head:
    """Raise ValueError unless ``head`` is one, of one logit."""
    if not isinstance(head, Head):
        raise ValueError("head: several; in vLLM a request has one log of steps, so give one; the Hugging Face engine takes several")  # noqa: TRY004
    if len(head.parts()) > 1:
        raise ValueError(
            f"head: {head.form} has {len(head.parts())} logits a step ({', '.join(head.parts())}), and in vLLM a request has one log of steps; the "
            "Hugging Face engine can score it"
        )
    return head


def _said(head: Head, config: Config) -> dict[str, Any]:
    """How a head is used, as options; ``at`` was said by it or by ``config``."""
    return {
        "at": config.at if head.tap.at == Tap().at else head.tap.at, "layers": head.tap.layers, "norm": head.tap.norm,
        "aggregation": head.aggregation, "sigmoid": head.sigmoid, "higher_is_better": head.higher_is_better,
    }  # fmt: skip


def _plain_head(head: Head) -> Path:
    """Directory of the weights that the ops take of ``head``, as an MLP of the paper's form; a linear head is one of two units."""
    w1, b1, w2, b2 = (w.cpu() for w in head.weights())
    plain = SPRM(head.hidden_size, head.width, dtype=head.dtype, activation=head.activation)
    plain.load_state_dict({"0.weight": w1, "0.bias": b1, "3.weight": w2, "3.bias": b2})
    digest = hashlib.sha256(f"{head.dtype} {head.activation}".encode())
    for weight in plain.state_dict().values():
        digest.update(f"{tuple(weight.shape)}".encode() + weight.view(torch.uint8).numpy().tobytes())
    target = own_cache() / "heads" / digest.hexdigest()[:16]
    if SPRM.found(target) is None:
        plain.save_pretrained(target)
    return target


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
