"""A model, its tokenizer and its head, from wherever they lie."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..scoring.forms import Form, form_of, with_metadata
from ..scoring.heads import NAMES, Head
from ..scoring.loading import head_of
from ..scoring.sprm import SPRM
from ..scoring.taps import Tap
from ..utils.repository import directory
from .config import Config
from .files import ADAPTER, CONFIG_NAME
from .hub import HEAD, base_model, model_directory


class Loaded(NamedTuple):
    """Attributes: ``home``: the directory of the head."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    config: Config
    home: Path


def open_head(path: str | Path, *, output: int | None = None, **where: Any) -> tuple[Form, Config]:
    """A head as its file has it, and how it is used: by the ``reflective.json`` beside it; where there is none, as its form or its file
    says, so rule ``"exact"`` for a published ``score_module.pt``.

    Args:
        path: file, directory or repository; output: see ``load_head``.
        where: ``revision``, ``cache_dir``, ``local_files_only``: see ``utils.repository.directory``.

    Raises:
        FileNotFoundError, ValueError, PermissionError: see ``scoring.loading.load_head``; a broken ``reflective.json``.
    """
    place = directory(path, HEAD, **where)
    if (file := SPRM.found(place)) is None:
        raise FileNotFoundError(f"path={str(path)!r} is no file, nor a directory with one of {', '.join(NAMES)}")
    form, config = form_of(file, output=output), config_of(place)
    if config.head is not None:
        form = with_metadata(form, config.head)
    return form, config


def load_used(path: str | Path, model: Any, **where: Any) -> tuple[Head, Config]:
    """A head for ``model``, in its dtype, and how it is used; arguments and errors as for ``open_head``."""
    form, config = open_head(path, **where)
    head, config = used(head_of(form, model=model), config, (beside_head(directory(path, HEAD, **where)) / CONFIG_NAME).is_file())
    return head.to(model.dtype), config


def used(head: Head, config: Config, said: bool) -> tuple[Head, Config]:
    """Head and configuration, saying the same. ``said``: whether there is a ``reflective.json``."""
    if not said and head.step_rule is not None:
        config = replace(config, steps=head.step_rule)
    return agreed(head, config)


def agreed(head: Head, config: Config) -> tuple[Head, Config]:
    """The same where ``at`` was said by one of them: by the head, if both. A head that has to say something else than it did is another
    object around the same weights."""
    if head.tap.at == Tap().at != config.at:
        head = copy.copy(head).use(tap=replace(head.tap, at=config.at))
    return head, replace(config, at=head.tap.at)


def config_of(home: Path) -> Config:
    """How the head at ``home``, which may be yet to come, is used."""
    file, beside = SPRM.found(home), beside_head(home)
    if (beside / CONFIG_NAME).is_file():
        return Config.read(beside / CONFIG_NAME)
    return Config(rule="exact") if file is not None and file.suffix == ".pt" else Config()


def beside_head(home: Path) -> Path:
    """The directory in which a head lies."""
    return home if home.is_dir() else home.parent


def load(
    path: str | Path,
    *,
    head: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    untrained: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Loaded:
    """See ``ReflectiveModel.from_pretrained``."""
    where = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    place, home = places(path, head, revision, where)
    # First, as it fails fast.
    form, config = (None, config_of(home)) if untrained and SPRM.found(home) is None else open_head(home)
    name, files, adapters = model_files(path, place, home, revision, where)
    # Said: where nothing is, transformers asks on a terminal whether to run the checkpoint's code.
    model = AutoModelForCausalLM.from_pretrained(files, dtype=dtype, device_map=device_map, trust_remote_code=False).eval()
    # What the head belongs to, and not its place in the Hub's cache: an adapter trained from here names it as its base.
    model.name_or_path = model.config.name_or_path = str(path if head else name)
    for adapter in adapters:
        model = merged(model, adapter)
    if form is None:
        made: Head = SPRM(model.config.get_text_config(decoder=True).hidden_size).requires_grad_(False).eval()
    else:
        made = head_of(form, model=model)
    made, config = used(made, config, (beside_head(home) / CONFIG_NAME).is_file())
    made = made.to(model.dtype)
    made.check_finite()
    return Loaded(model, AutoTokenizer.from_pretrained(files, trust_remote_code=False), made, config, beside_head(home))


def places(path: str | Path, head: str | Path | None, revision: str | None, where: dict[str, Any]) -> tuple[Path, Path]:
    """Where ``path`` and the head lie: on this machine from now on."""
    place = directory(path, HEAD, revision=revision, **where)
    return place, directory(head, HEAD, **where) if head else place


def model_files(
    path: str | Path, place: Path, home: Path, revision: str | None, where: dict[str, Any]
) -> tuple[str | Path, Path, list[Path]]:
    """The model's name, the directory of its files, and those of the adapters that are to be merged into it.

    Raises:
        ValueError: an adapter beside a whole model.
    """
    adapters = [d for d in dict.fromkeys([place, beside_head(home)]) if (d / ADAPTER).is_file()]
    name = path
    if not (place / "config.json").is_file():
        name, revision = base_model(place)
    elif place in adapters:
        # Whether the weights have the adapter's change already cannot be told.
        raise ValueError(f"{path} holds a model and an adapter; keep the adapter elsewhere, and give that as head")
    return name, model_directory(name, revision=revision, **where), adapters


def merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """``model`` with the adapter's change added to its weights, in float32 and rounded once."""
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError(f"{adapter} holds an adapter, and loading one needs peft: pip install peft") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers 5.23 has renamed
        adapted = PeftModel.from_pretrained(model, str(adapter))
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(f"{adapter} holds an adapter that cannot be merged: it changes inputs, not weights")
    layers = [m.get_base_layer() for m in adapted.modules() if isinstance(m, BaseTunerLayer)]
    dtypes = [layer.weight.dtype for layer in layers]
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.to(torch.promote_types(dtype, torch.float32))
    plain = adapted.merge_and_unload()
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.to(dtype)
    return plain.requires_grad_(True).eval()
