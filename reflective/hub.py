"""Checkpoints as repositories: a path or a name on the Hugging Face Hub becomes a directory; a head becomes a repository.

No torch here, nor a connection until a name is asked for that is no path.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .outputs import folder, json_text, write_text

if TYPE_CHECKING:
    from .model import ReflectiveModel

CONFIG_NAME = "reflective.json"
ADAPTER = "adapter_config.json"
REPORT = "report.json"
_COMPANIONS = (ADAPTER, "adapter_model.safetensors", REPORT, "prune.json")  # of a head, beside it
SCORE_MODULE = ("score_module.*",)
HEAD = (*SCORE_MODULE, CONFIG_NAME, *_COMPANIONS, "config.json")
MODEL = ("*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors")
_PICKLED = ("pytorch_model*.bin",)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

_TAGS = ("reflective", "process-reward-model", "test-time-scaling", "best-of-n", "arxiv:2507.01951")
_MEASURES = {
    "pass@1": "chance that one answer is right",
    "majority": "the answer given most often among n is right",
    "weighted_vote": "the same, answers weighted by their scores",
    "best_of": "the answer with the best score among n is right",
    "any": "one among n is right",
    "auc_within": "chance that a right answer outscores a wrong one to the same question",
    "score_gap": "mean score of right answers less that of wrong ones",
    "ece": "expected calibration error of the scores",
}
_WAYS = {
    "head": "the head alone, the model as it was",
    "backbone": "head and model",
    "joint": "model and head together, the model by GRPO",
}
_LIMITS = (
    "Made for this model, this prompt and questions like those that it was trained on. Other models, prompts and kinds of "
    "questions need a head of their own."
)


# -- found -------------------------------------------------------------------------------------------------------------


def is_repository(path: str | Path) -> bool:
    """Whether ``path`` can name a repository of the Hub: a text ``ORG/NAME``, no ``Path``, no file of weights."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(path, str) or path.count("/") != 1 or path.endswith((".pt", ".safetensors")):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def directory(
    path: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """``path`` if there is such a file or directory, else the snapshot of the Hub repository of that name.

    What the cache lacks is downloaded, with ``huggingface_hub``'s progress bars. Token, cache, endpoint and offline mode are
    those of ``huggingface_hub`` (``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``).

    Args:
        path: a path, or ``ORG/NAME``.
        files: patterns of the files that are wanted, in the repository's top directory.
        revision: branch, tag or commit of the repository; None: ``main``.
        cache_dir: instead of the Hub's own.
        local_files_only: take what the cache has, without a connection.

    Raises:
        FileNotFoundError: no such path; no such repository or revision; it is not in the cache and there is no connection.
        PermissionError: a gated repository.
    """
    place = Path(path).expanduser()
    if place.exists():
        return place
    if not is_repository(path):
        raise FileNotFoundError(
            f"path={str(path)!r} is no file, nor a directory, nor ORG/NAME, which would be a repository of the Hub"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = snapshot_download(
            str(path), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
            allow_patterns=list(files), ignore_patterns=["*/*"],
        )  # fmt: skip
    except GatedRepoError as error:
        raise PermissionError(
            f"{path} is gated: ask for access at {constants.ENDPOINT}/{path}, then log in ('hf auth login', or HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is no directory here, and no repository at {constants.ENDPOINT}, or a private one: "
            "log in for these ('hf auth login', or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"revision={revision!r}: the repository {path} has none of that name") from error
    except LocalEntryNotFoundError as error:
        offline, cause = local_files_only or constants.HF_HUB_OFFLINE, error.__cause__ or error
        failed = f"{constants.ENDPOINT} did not give it ({type(cause).__name__}: {cause})"
        why = "the Hub was not asked (offline mode)" if offline else failed
        raise FileNotFoundError(
            f"{path} is no directory here, the cache {cache_dir or constants.HF_HUB_CACHE} does not have all of it, "
            f"and {why}; with a connection, 'hf download {path}' gets it"
        ) from error
    return Path(found)


def model_directory(path: str | Path, **where: Any) -> Path:
    """``directory`` of a model and its tokenizer; pickled weights only where there are no safetensors.

    Raises:
        ValueError: the index of the weights is broken, or names files outside the directory.
        FileNotFoundError: files that it names are missing; others: see ``directory``.
    """
    place = directory(path, MODEL, **where)
    if not any(place.glob("model*.safetensors")):
        place = directory(path, _PICKLED, **where)
    for whole in _WEIGHTS:  # transformers takes the first that is there
        if (place / whole).is_file():
            break
        if (place / f"{whole}.index.json").is_file():
            _check_index(place / f"{whole}.index.json")
            break
    return place


def _check_index(index: Path) -> None:
    """That every file of weights that ``index`` names lies beside it, as transformers takes for granted: it would open any file.

    By name: in the Hub's cache all files are links to elsewhere.
    """
    shards = _read(index).get("weight_map")
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
    adapter, config = _read(place / ADAPTER), _read(place / CONFIG_NAME)
    if name := adapter.get("base_model_name_or_path") or config.get("base_model"):
        return name, adapter.get("revision")
    raise ValueError(
        f"{place} holds neither a model (config.json) nor the name of one (base_model in {CONFIG_NAME}, or {ADAPTER}); "
        "give the model as path and this as head"
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")  # noqa: TRY004
    return value


def _write(file: Path, value: Mapping[str, Any]) -> None:
    write_text(file, json_text(value, indent=2) + "\n")


# -- saved -------------------------------------------------------------------------------------------------------------


def save_head(
    model: "ReflectiveModel",
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
    ``adapter_*``, ``prune.json``    as they lie beside the head that the model was loaded with
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
        for name in _COMPANIONS:
            (target / name).unlink(missing_ok=True)
            if model.home is not None and (model.home / name).is_file():
                shutil.copyfile(model.home / name, target / name)
    model.head.save_pretrained(target)
    _write(target / CONFIG_NAME, {"base_model": base or loaded, **asdict(model.config)})
    if adapter := _read(target / ADAPTER):
        _write(target / ADAPTER, adapter | {"base_model_name_or_path": base or loaded})
    if report is not None:
        _write(target / REPORT, report)
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


# -- the model card ----------------------------------------------------------------------------------------------------


def write_card(
    path: str | Path,
    *,
    title: str | None = None,
    license: str | None = None,
    sections: Mapping[str, str] | None = None,
) -> Path:
    """Write ``README.md``: what lies in the directory, how it is used, how it was trained, what was measured.

    Everything is read from the files there: the head, ``reflective.json``, the adapter, ``prune.json``, and ``report.json``
    as ``train`` writes it: ``metrics`` has ``value``, ``low`` and ``high`` by name, and so has, beside ``before`` or each
    of ``candidates`` (heads among which this one was chosen), whatever is there of them.

    Args:
        path: a directory with a head.
        title: default: that of a head for its model.
        license: identifier of the Hub's list, like ``"apache-2.0"``.
        sections: further Markdown by heading; ``"Training"`` and ``"Limits"`` stand in place of what would be there.

    Returns:
        The file.

    Raises:
        FileNotFoundError, ValueError: no head, see ``SPRM.from_pretrained``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(path).expanduser()
    config, adapter, report = (_read(path / name) for name in (CONFIG_NAME, ADAPTER, REPORT))
    base = adapter.get("base_model_name_or_path") or config.get("base_model")
    metrics = report.get("metrics", {})
    data = ModelCardData(
        library_name="reflective", license=license, base_model=base,
        base_model_relation=base and ("finetune" if (path / "config.json").is_file() else "adapter"),
        pipeline_tag="text-generation", tags=list(_TAGS),
        metrics=[name for name, measure in (("accuracy", "pass@1"), ("roc_auc", "auc_within")) if measure in metrics] or None,
    )  # fmt: skip
    own = dict(sections or {})
    training, limits = own.pop("Training", _training(report)), own.pop("Limits", _LIMITS)
    parts = {
        "Use": _use(config), **own, "Training": training, "Held out": _held_out(report),
        "Pruning": _pruning(_read(path / "prune.json")), "Limits": limits,
    }  # fmt: skip
    text = [f"# {title or (f'SPRM head for {base}' if base else 'SPRM head')}", _contents(path, base, adapter)]
    text += [f"## {heading}\n\n{part}" for heading, part in parts.items() if part]
    card = ModelCard("\n".join(["---", data.to_yaml(line_break="\n"), "---", "", "\n\n".join(text), ""]))
    write_text(path / "README.md", str(card))
    return path / "README.md"


def _contents(path: Path, base: str | None, adapter: Mapping[str, Any]) -> str:
    from .sprm import SPRM

    head, file, weights = SPRM.from_pretrained(path), SPRM.found(path), path / "adapter_model.safetensors"
    states = f" of [{base}](https://huggingface.co/{base})" if base and is_repository(base) else ""
    text = (
        f"`{file.name}` is an SPRM head ({head.hidden_size} → {head.width} → 1, {str(head.dtype).removeprefix('torch.')}, "
        f"{_megabytes(file)}). It reads the hidden states{states} at every step of a reasoning while that is decoded, and "
        "gives the step a score in (0, 1); the geometric mean of the step scores ranks candidates "
        "([arXiv 2507.01951](https://arxiv.org/abs/2507.01951))."
    )
    if weights.is_file():
        rank = f"rank {adapter['r']}, " if "r" in adapter else ""
        text += (
            f" `{weights.name}` is an adapter of peft's ({adapter.get('peft_type')}, {rank}{_megabytes(weights)}), "
            "merged into the model's weights when it is loaded."
        )
    return text


def _use(config: Mapping[str, Any]) -> str:
    text = """```python
import reflective as rf

model = rf.ReflectiveModel.from_pretrained(path)  # this directory, or the ORG/NAME of this repository
best = model.generate("a question", effort="medium")  # of 8 candidates
best.text, best.score
```"""
    if not config:
        return text
    feature = "predicts" if config["at"] == "predict" else "belongs to"
    prompt = "the tokenizer's chat template" if config["prompt"] is None else f"given in `{CONFIG_NAME}`"
    return (
        f"{text}\n\nSteps end at `{json.dumps(config['delimiter'])}` (rule `{config['rule']}`), the feature of a step is the "
        f"state that {feature} its last token, and the prompt is {prompt}."
    )


def _training(report: Mapping[str, Any]) -> str:
    run = report.get("run")
    if run is None:
        return ""
    source = Path(run["data"] or run["task"]).name
    unit = "epochs" if run["way"] == "head" else "steps"
    loss = "plain BCE" if run["warmup"] is None else f"BCE with dynamic weights after {run['warmup']} {unit} without"
    loss += ", on questions answered both ways, their two sides weighted equally" * run["within_questions"]
    loss += ", outcomes weighted against each other" * run["class_balance"]
    answers = (
        "" if run["data"] else f", {run['samples']} answers to each question at temperature {run['temperature']:g}"
    )
    made = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    return (
        f"By `reflective train`, {_WAYS[run['way']]}, from outcomes alone: `{source}`{answers}. Loss: {loss}. "
        f"Seed {run['seed']}{made and f'; {made}'}."
    )


def _held_out(report: Mapping[str, Any]) -> str:
    metrics, before = report.get("metrics"), report.get("before")
    if not metrics:
        return ""
    counts = report.get("rollouts", {})
    questions = report.get("questions") or (counts.get("after") or counts.get("eval", {})).get("questions")
    samples = report.get("samples") or report.get("run", {}).get("samples")
    columns = ["", *(["before"] if before else []), "value", "95 % interval", ""]
    rows = [
        [
            f"`{name}`", *([_number(before[name]["value"])] if before else []), _number(metrics[name]["value"]),
            f"{_number(metrics[name]['low'])} – {_number(metrics[name]['high'])}", meaning,
        ]
        for name, meaning in _shown(metrics)
    ]  # fmt: skip
    measured = f"On {questions} questions that were not trained on, {samples} answers each. " if questions else ""
    text = [f"{measured}`{REPORT}` has all measures.", _table(columns, rows)]
    if candidates := report.get("candidates"):
        names = [name for name, _ in _shown(metrics) if name.startswith(("pass", "best_of", "auc"))]
        others = [[label, *(_number(of[n]["value"]) for n in names)] for label, of in candidates.items()]
        text += ["Chosen among these, on other questions:", _table(["", *(f"`{n}`" for n in names)], others)]
    return "\n\n".join(text)


def _shown(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and meaning of the measures of a card; of those that depend on n, best of every n and the others at 8."""
    sizes = sorted(int(name.partition("@")[2]) for name in metrics if name.startswith("best_of@"))
    at = {"best_of": sizes}
    some = [8] if 8 in sizes else sizes[-1:]
    return [
        (name, meaning)
        for measure, meaning in _MEASURES.items()
        for name in (measure, *(f"{measure}@{n}" for n in at.get(measure, some)))
        if name in metrics
    ]


def _pruning(rule: Mapping[str, Any]) -> str:
    if not rule:
        return ""
    text = (
        f'`prune.json` is the rule of `strategy="prune"`: a candidate that lags {rule["threshold"]:g} nats behind the leader '
        "is stopped"
    )
    if not rule["questions"]:
        return text + "; set by hand."
    return (
        f"{text}, with a stated risk of {rule['risk']:.0%} that the pick of best-of-{rule['n']} is among them. Calibrated on "
        f"{rule['questions']} questions, {rule['n']} candidates each; it holds for questions like these, sampled like these."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _megabytes(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.1f} MB"
