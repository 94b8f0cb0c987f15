"""The head of a trained policy, fitted again: to answers that the policy gives when it does not change any more, of the layer that they tell.

What is learnt while the policy moves is of policies that are no more. Each family has a head of its own, as each has its policy's mistakes. It learns from more
answers than a head of the untrained policy: of a policy that is mostly right few are wrong, and from few best of 32 falls below best of 8 (``NOTES.md``).
"""

from dataclasses import replace
from pathlib import Path

from reflective.scoring.sprm import SPRM
from reflective.train.head import fit
from reflective.train.layers import choose_layer

from . import joint, rollouts
from .families import FAMILIES
from .heads import LR

SAMPLES = {"sums": 12, "products": 24, "boxes": 24}  # products are hardest to tell right from wrong; of boxes four in five are right, and few are wrong
EPOCHS, DROPOUT = 48, 0.1
LAYERS = (-2, -10, -12)  # among which one is chosen, on training questions


def answer(work: Path, seed: int, family: str) -> str:
    """Rollouts of the policy of ``seed`` on its share of the held-out questions of ``family``."""
    place, asked = joint.home(work, seed), FAMILIES[family]
    held_out, model = rollouts.questions(asked)[1][seed :: rollouts.SEEDS], joint.merged(place, rollouts.dtype_of(work))
    rollouts.rollouts(model, asked, held_out, place / family, samples=rollouts.EVAL_SAMPLES, seed=2 + seed, all_views=False)
    return f"rollouts, seed {seed}, {family}"


def settle(work: Path, seed: int, family: str) -> str:
    """Answers of the policy of ``seed`` to all training questions of ``family``, the further ones too, and a head from them."""
    file = head_file(work, seed, family)
    if file.is_file():
        return f"settled, seed {seed}, {family}"
    place, asked = joint.home(work, seed), FAMILIES[family]
    drawn = rollouts.rollouts(
        joint.merged(place, rollouts.dtype_of(work)), asked, rollouts.questions(asked)[0] + rollouts.further(asked)[0], place / f"{family}, train",
        samples=SAMPLES[family], seed=8 + seed, all_views=False,
    )["layers"]  # fmt: skip
    tap, _ = choose_layer(drawn.read(replace(drawn.tap, layers=LAYERS)), epochs=EPOCHS // 2, lr=LR, width=288)
    fit(drawn.read(tap), epochs=EPOCHS, lr=LR, dropout=DROPOUT, seed=seed).save_pretrained(file)
    return f"settled, seed {seed}, {family}, layer {tap.layers[0]}"


def head_file(work: Path, seed: int, family: str) -> Path:
    return joint.home(work, seed) / f"{family}, settled.safetensors"


def head(work: Path, seed: int, family: str) -> SPRM | None:
    """That head, if it was fitted."""
    file = head_file(work, seed, family)
    return SPRM.from_pretrained(file) if file.is_file() else None
