"""Checkpoints as repositories: a path or a name on the Hugging Face Hub becomes a directory; a head becomes a repository.

No torch here, nor a connection until a name is asked for that is no path.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

from ..utils.outputs import folder
from ..utils.repository import directory, is_repository
from .card import write_card
from .config import told
from .files import ADAPTER, COMPANIONS, CONFIG_NAME, REPORT, read, write

HEAD = ("score_module.*", CONFIG_NAME, *COMPANIONS, "config.json")
MODEL = ("*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors")
_PICKLED = ("pytorch_model*.bin",)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


# -- found -------------------------------------------------------------------------------------------------------------


def model_directory(path: str | Path, **where: Any) -> Path:
    """``directory`` of a model and its tokenizer; pickled weights only where there are no safetensors.

    Raises:
        ValueError: the index of the weights is broken, or names files outside the directory; the configuration names kernels of the Hub.
        FileNotFoundError: files that it names are missing; others: see ``directory``.
    """
    place = directory(path, MODEL, **where)
    _check_kernels(place / "config.json")
    if not any(place.glob("model*.safetensors")):
        place = directory(path, _PICKLED, **where)
    for whole in _WEIGHTS:  # transformers takes the first that is there
        if (place / whole).is_file():
            break
        if (place / f"{whole}.index.json").is_file():
            _check_index(place / f"{whole}.index.json")
            break
    return place


def _check_kernels(config: Path) -> None:
    """That a model's configuration has transformers load no compiled kernels of the Hub, which is code: a name with a slash, of how to attend
    or how to run experts, would, where the ``kernels`` package is installed."""
    left: list[Any] = [read(config)]
    while left:
        for name, value in left.pop().items():
            if name.endswith(("attn_implementation", "experts_implementation")):
                for kernel in value.values() if isinstance(value, dict) else [value]:
                    if isinstance(kernel, str) and "/" in kernel:
                        raise ValueError(
                            f"{config}: {name} is {kernel!r}, compiled code from the Hub; refused. Take that line out if you trust the rest"
                        )
            elif isinstance(value, dict):
                left.append(value)


def _check_index(index: Path) -> None:
    """That every file of weights that ``index`` names lies beside it, as transformers takes for granted: it would open any file.

    By name: in the Hub's cache all files are links to elsewhere.
    """
    shards = read(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: expected weight_map, the file of every weight; download the model anew")
    names = sorted(set(shards.values()))
    for name in names:
        if not name or {"..", ""} & {*re.split(r"[/\\]", name)} or PureWindowsPath(name).drive:
            raise ValueError(
                f"{index} names {name!r}, which is outside its directory; refused, for it may read any file here"
            )
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index} names {len(names)} files of weights, and {', '.join(missing[:3])}{' and others' * (len(missing) > 3)} "
            f"{'are' if len(missing) > 1 else 'is'} not there; download the model anew"
        )


def base_model(place: Path) -> tuple[str, str | None]:
    """Which model the head or adapter in ``place`` was trained on, and which revision of it.

    Raises:
        ValueError: nothing there tells.
    """
    adapter, config = read(place / ADAPTER), read(place / CONFIG_NAME)
    if name := adapter.get("base_model_name_or_path") or config.get("base_model"):
        return name, adapter.get("revision")
    raise ValueError(
        f"{place} holds neither a model (config.json) nor the name of one (base_model in {CONFIG_NAME}, or {ADAPTER}); "
        "give the model as path and this as head"
    )





# -- saved -------------------------------------------------------------------------------------------------------------


class Trained(Protocol):
    """A head and what it belongs to, as ``ReflectiveModel`` holds them.

    Attributes:
        model: of transformers. head: an ``SPRM``. config: the ``Config`` of their use.
        home: the directory of the head that it was loaded with, or None.
    """

    model: Any
    head: Any
    config: Any
    home: Path | None


def save_head(
    model: Trained,
    path: str | Path,
    *,
    base: str | None = None,
    report: Mapping[str, Any] | None = None,
    **card: Any,
) -> Path:
    """Write a model's head into a directory that is a repository: ``from_pretrained(path)`` finds the model by itself.

    ===============================  =================================================================================
    ``score_module.safetensors``     the head, in its dtype
    ``reflective.json``              how it is used, and ``base_model``
    ``adapter_*``, rules in JSON     as they lie beside the head that the model was loaded with
    ``report.json``                  ``report``, or the one beside that head
    ``README.md``                    the model card, see ``write_card``
    ===============================  =================================================================================

    What an earlier head left there under these names is replaced.

    Args:
        path: made if need be.
        base: repository of the model that the head (and adapter) was trained on; None: the one it was loaded from.
        report: what was measured, as from ``train``.
        card: ``title``, ``license`` and ``sections`` of ``write_card``.

    Raises:
        ValueError: ``base`` is no name of a repository.
    """
    loaded = model.model.name_or_path
    if not is_repository(base or loaded) or (base is None and Path(loaded).exists()):
        raise ValueError(
            f"base={base!r}: give the ORG/NAME by which others find the model on the Hub; it was loaded from {loaded!r}"
        )
    target = folder(Path(path).expanduser(), "path")
    if model.home is None or model.home.resolve() != target.resolve():
        for name in COMPANIONS:
            (target / name).unlink(missing_ok=True)
            if model.home is not None and (model.home / name).is_file():
                shutil.copyfile(model.home / name, target / name)
    model.head.save_pretrained(target)
    write(target / CONFIG_NAME, {"base_model": base or loaded, **told(model.head, model.config)})
    if adapter := read(target / ADAPTER):
        write(target / ADAPTER, adapter | {"base_model_name_or_path": base or loaded})
    if report is not None:
        write(target / REPORT, report)
    write_card(target, **card)
    return target


def push_to_hub(path: str | Path, repository: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Upload the files of a directory, without those of its subdirectories, into a repository, made if need be.

    Args:
        path: as ``save_head`` wrote it.
        repository: ``ORG/NAME``.
        private: of a new repository; None: the owner's default.
        revision: branch; None: ``main``.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: no model card there; ``save_head`` or ``write_card`` writes it.
    """
    from huggingface_hub import HfApi

    path = Path(path).expanduser()
    if not (path / "README.md").is_file():
        raise FileNotFoundError(f"path={str(path)!r} holds no README.md; save_head or write_card writes it")
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    done = api.upload_folder(repo_id=repository, folder_path=path, revision=revision, ignore_patterns=["*/*"])
    return done.commit_url
