"""What scores the policy's steps: heads from its rollouts, and whether an answer is ready, from answers that were asked for early."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reflective.model import ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.scoring.taps import Tap
from reflective.train.data import Rollouts
from reflective.train.head import fit
from reflective.train.layers import choose_layer
from reflective.train.rollout import View, recorded, roll_out_views

from . import policy
from .policy import questions

SAMPLING = {"temperature": 1.0, "top_p": 0.95}
MAX_NEW_TOKENS = 160
SAMPLES = 8
LAYERS = (-2, -10, -12, -16)  # among which one is chosen, on training questions
EPOCHS, LR, DROPOUT, SEEDS = 48, 1e-3, 0.1, 3


def rollouts(work: Path, model: ReflectiveModel, family: str) -> Rollouts:
    """Answers to the training questions, with the states of ``LAYERS`` at the step-tokens, kept under ``work``."""
    asked = questions(family, "train")
    settings: dict[str, Any] = {
        **SAMPLING, "max_new_tokens": MAX_NEW_TOKENS, "samples": SAMPLES, "seed": 0, "batch_rows": 256, "verify": "answer",
    }  # fmt: skip

    def make(first: int) -> Any:
        views = {"layers": View(model.steps, Tap(LAYERS))}
        return roll_out_views(model, asked, views, **settings, block=64, first=first, progress=lambda n: None)

    depends = settings | {"use": asdict(model.config), "dtype": str(model.model.dtype), "questions": [q.text for q in asked]}
    return recorded(work / family / "train", depends, make)["layers"]


def tap(work: Path, family: str, learnt: Rollouts) -> Tap:
    """Where the family's heads read: the layer whose head told right from wrong best within training questions held back."""
    file = work / family / "layer.json"
    if not file.is_file():
        found, metrics = choose_layer(learnt, epochs=EPOCHS // 2, lr=LR, width=288)
        said = {"layer": found.layers[0], "auc_within": {n: [m.value, m.low, m.high] for n, m in metrics.items()}}
        file.write_text(json.dumps(said))
    return Tap((json.loads(file.read_text())["layer"],))


def head_file(work: Path, family: str, seed: int, what: str = "head") -> Path:
    return work / family / f"{what}, seed {seed}.safetensors"


def head(work: Path, family: str, seed: int) -> SPRM:
    return SPRM.from_pretrained(head_file(work, family, seed))


def learn(work: Path, family: str) -> None:
    """Rollouts and heads."""
    model = policy.load(work)
    learnt = rollouts(work, model, family)
    print(f"learn: {family}, rollouts, pass@1 {float((learnt.outcome * learnt.count).sum() / learnt.count.sum()):.3f}", flush=True)
    at = tap(work, family, learnt)
    for seed in range(SEEDS):
        if not (file := head_file(work, family, seed)).is_file():
            fit(learnt.read(at), epochs=EPOCHS, lr=LR, dropout=DROPOUT, seed=seed).save_pretrained(file)
            print(f"learn: {family}, head, layer {at.layers[0]}, seed {seed}", flush=True)
