"""The model card of a head: written from the files beside it, and nothing else. No torch until one is written."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.outputs import write_text
from ..utils.repository import is_repository
from .files import ADAPTER, CONFIG_NAME, REPORT, read

if TYPE_CHECKING:
    from ..scoring.forms import Form

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


def write_card(
    path: str | Path,
    *,
    title: str | None = None,
    license: str | None = None,
    sections: Mapping[str, str] | None = None,
) -> Path:
    """Write ``README.md``: what lies in the directory, how it is used, how it was trained, what was measured.

    Everything is read from the files there: the head, ``reflective.json``, the adapter, ``select.json``, ``auto.json``, ``prune.json``, ``exit.json``, and
    ``report.json``
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
    config, adapter, report = (read(path / name) for name in (CONFIG_NAME, ADAPTER, REPORT))
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
        "Choosing": _choosing(read(path / "select.json")), "As many as it takes": _as_many(read(path / "auto.json")),
        "Pruning": _pruning(read(path / "prune.json")),
        "Ending early": _exiting(read(path / "exit.json")), "Limits": limits,
    }  # fmt: skip
    text = [f"# {title or (f'SPRM head for {base}' if base else 'SPRM head')}", _contents(path, base, adapter)]
    text += [f"## {heading}\n\n{part}" for heading, part in parts.items() if part]
    card = ModelCard("\n".join(["---", data.to_yaml(line_break="\n"), "---", "", "\n\n".join(text), ""]))
    write_text(path / "README.md", str(card))
    return path / "README.md"


def _contents(path: Path, base: str | None, adapter: Mapping[str, Any]) -> str:
    from ..scoring.forms import form_of  # not above: with torch it takes seconds
    from ..scoring.heads import NAMES
    from ..scoring.sprm import SPRM

    file, weights = SPRM.found(path), path / "adapter_model.safetensors"
    if file is None:
        raise FileNotFoundError(f"path={str(path)!r} is no file, nor a directory with one of {', '.join(NAMES)}")
    form = form_of(file)
    units = f"{len(form.tensors[0])} → " if form.kind == "mlp" else ""
    kind = {"mlp": "an SPRM head", "linear": "a linear head", "gated_linear": "a gated linear head"}[form.kind]
    states = f" of [{base}](https://huggingface.co/{base})" if base and is_repository(base) else ""
    text = (
        f"`{file.name}` is {kind} ({form.width} → {units}1, {str(form.tensors[0].dtype).removeprefix('torch.')}, "
        f"{_megabytes(file)}). It reads the hidden states{states}{_layers(form)} at every step of a reasoning while that is decoded, and "
        f"gives the step a score{' in (0, 1)' * form.sigmoid}; the {_AGGREGATED.get(form.aggregation, form.aggregation)} of the step scores "
        "ranks candidates ([arXiv 2507.01951](https://arxiv.org/abs/2507.01951))."
    )
    if weights.is_file():
        rank = f"rank {adapter['r']}, " if "r" in adapter else ""
        text += (
            f" `{weights.name}` is an adapter of peft's ({adapter.get('peft_type')}, {rank}{_megabytes(weights)}), "
            "merged into the model's weights when it is loaded."
        )
    return text


_AGGREGATED = {"geometric_mean": "geometric mean", "mean": "arithmetic mean", "gated": "mean, weighted by a gate,"}


def _layers(form: "Form") -> str:
    """Which of ``hidden_states``, where these are not the paper's."""
    if form.layers in (None, (-2,)) and not form.norm:
        return ""
    return f" (`hidden_states` {', '.join(map(str, form.layers or ()))}{', normed' if form.norm else ''})"


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
    if config["at"] == "every":
        return f"{text}\n\nEvery token of a response is a step."
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


def _choosing(rule: Mapping[str, Any]) -> str:
    if not rule:
        return ""
    power = f"{rule['exponent']:g}" + (f" n^{rule['growth']:g}" if rule["growth"] else "")
    calibrated = f"calibrated on {rule['questions']} questions that measured nothing else" if rule["questions"] else "set by hand"
    return (
        f'`select.json` is the rule of `strategy="select"`, which `effort=` uses: each of n candidates votes for its answer with its score to the power '
        f"of {power}; {calibrated}."
    )


def _as_many(rule: Mapping[str, Any]) -> str:
    if not rule:
        return ""
    text = (
        f'`auto.json` is the rule of `effort="auto"`: it begins with {rule["first"]} candidates and starts half as many again, up to {rule["n"]}, until '
        f"one scores {rule['enough']:g}"
    )
    if not rule["questions"]:
        return text + "; set by hand."
    return f"{text}, which gave up {rule['loss']:.0%} of the accuracy of {rule['n']} at the most on the {rule['questions']} questions it was calibrated on."


def _exiting(rule: Mapping[str, Any]) -> str:
    if not rule:
        return ""
    text = f'`exit.json` is the rule of `strategy="exit"`: a response answers at its first step whose readiness is above {rule["threshold"]:g}'
    if not rule["questions"]:
        return text + "; set by hand."
    return (
        f"{text}, with a stated risk of {rule['risk']:.0%} that this changes its answer. Calibrated on {rule['questions']} questions; it holds for "
        "questions like these, sampled like these."
    )


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
