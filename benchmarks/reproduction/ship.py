"""What the package ships: head, adapter if joint training helped, pruning rule and report of the embedded model."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from reflective.default import HEAD
from reflective.model import CONFIG_NAME, ReflectiveModel
from reflective.strategies.prune import Prune
from reflective.train.metrics import Metric, evaluate

from . import heads, rollouts
from .families import FAMILIES

FAMILY, SEED, CALIBRATED = "sums", 0, 40  # the family that `reflective demo` asks; questions of the pruning rule
ADAPTER_DTYPE = torch.bfloat16  # of the adapter's file: half of the trained float32


def candidates(work: Path) -> dict[str, tuple[Path | None, dict[str, Metric], int]]:
    """What could be shipped: where its adapter lies, what it is worth on held-out questions, how many these are."""
    held_out = heads.load(work / FAMILY / "eval", "steps")
    found = {"frozen backbone": (None, evaluate(held_out, heads.head(work, FAMILY, heads.MAIN, SEED)), rollouts.EVAL)}
    place = work / "joint" / f"seed {SEED}"
    if (place / FAMILY).is_dir():
        from reflective.sprm import SPRM

        own = heads.load(place / FAMILY, "steps")
        found["joint training"] = (place, evaluate(own, SPRM.from_pretrained(place)), len(own.question.unique()))
    return found


def ship(work: Path, target: Path = HEAD) -> None:
    """Write the better of the two, by best of 8, into ``target``."""
    found = candidates(work)
    name = max(found, key=lambda k: found[k][1]["best_of@8"].value)
    adapter, metrics, questions = found[name]
    for file in ("adapter_model.safetensors", "adapter_config.json", "prune.json"):
        (target / file).unlink(missing_ok=True)
    source = adapter or heads.head_file(work, FAMILY, heads.MAIN, SEED)
    from reflective.sprm import SPRM

    SPRM.from_pretrained(source).float().save_pretrained(target)
    if adapter:
        weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
        safetensors.torch.save_file(
            {k: v.to(ADAPTER_DTYPE) for k, v in weights.items()}, target / "adapter_model.safetensors"
        )
        shutil.copy(adapter / "adapter_config.json", target)
    (target / CONFIG_NAME).write_text(json.dumps(asdict(FAMILIES[FAMILY].config), indent=2) + "\n")
    report = {
        "family": FAMILY, "trained": name, "seed": SEED, "questions": questions, "samples": rollouts.EVAL_SAMPLES,
        "temperature": rollouts.TEMPERATURE, "metrics": {k: asdict(m) for k, m in metrics.items()},
        "frozen backbone": {k: asdict(m) for k, m in found["frozen backbone"][1].items()},
    }  # fmt: skip
    (target / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    asked = rollouts.questions(FAMILIES[FAMILY])[1][:CALIBRATED]
    model = ReflectiveModel.default(head=target)
    found = model.generate([q.text for q in asked], n=8, seed=0, max_new_tokens=64, batch_rows=128)
    Prune.calibrate(found, risk=0.05).save(target)
