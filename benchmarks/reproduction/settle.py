"""The head of a trained policy, fitted again: to answers that the policy gives when it does not change any more, of the layer that they tell.

What is learnt while the policy moves is of policies that are no more. Each family has a head of its own, as each has its policy's mistakes.
"""

from pathlib import Path

from reflective.scoring.sprm import SPRM
from reflective.scoring.taps import Tap
from reflective.train.head import fit
from reflective.train.layers import choose_layer

from . import joint, rollouts
from .families import FAMILIES
from .heads import LR

QUESTIONS, SAMPLES, EPOCHS, DROPOUT = 512, 8, 48, 0.1
LAYERS = (-2, -10, -12)  # among which one is chosen, on training questions


def settle(work: Path, seed: int) -> None:
    """Rollouts of the policy of ``seed`` on training questions of every family, and a head from each."""
    place, model = work / "joint" / f"seed {seed}", None
    for name, family in FAMILIES.items():
        file = head_file(work, seed, name)
        if file.is_file():
            continue
        model = model or joint.merged(place, rollouts.dtype_of(work))
        drawn = rollouts.rollouts(
            model, family, rollouts.questions(family)[0][:QUESTIONS], place / f"{name}, train", samples=SAMPLES, seed=8 + seed, all_views=False
        )["layers"]
        tap, _ = choose_layer(drawn.read(Tap(LAYERS)), epochs=EPOCHS // 2, lr=LR, width=288)
        fit(drawn.read(tap), epochs=EPOCHS, lr=LR, dropout=DROPOUT, seed=seed).save_pretrained(file)
        print(f"settled: seed {seed}, {name}, layer {tap.layers[0]}", flush=True)


def head_file(work: Path, seed: int, family: str) -> Path:
    return work / "joint" / f"seed {seed}" / f"{family}, settled.safetensors"


def head(work: Path, seed: int, family: str) -> SPRM | None:
    """That head, if it was fitted."""
    file = head_file(work, seed, family)
    return SPRM.from_pretrained(file) if file.is_file() else None
