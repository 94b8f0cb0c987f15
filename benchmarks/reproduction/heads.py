"""Heads of the recipe: the main one of every family, the variants that the ablations compare, and what they score."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from reflective.scoring.sprm import SPRM
from reflective.scoring.taps import Tap
from reflective.train.data import Rollouts
from reflective.train.head import fit

from .families import FAMILIES
from .rollouts import LAYERS, RULES, SEEDS, TRAIN, TRAIN_SAMPLES

EPOCHS, LR = 16, 1e-3  # of ablations; the main heads learn four times as long, those of all families twice
WIDTHS = (72, 288, 2304)  # beside 2 H = 1152
ABLATED = 256  # questions that ablations learn from
QUESTIONS, SAMPLES = (64, 128, 512), (2, 4)  # beside these, and beside all draws
ALL = "all families"


@dataclass(frozen=True)
class Variant:
    """One way to train a head: which view of the rollouts, of it which layers, how many of them, which settings of ``fit``."""

    group: str
    name: str
    view: str = "steps"
    layers: tuple[int, ...] = (-2,)
    questions: int = ABLATED
    samples: int = TRAIN_SAMPLES
    epochs: int = EPOCHS
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return f"{self.group}, {self.name}".replace("/", " of ")


MAIN = Variant("main", "SPRM", questions=TRAIN, epochs=4 * EPOCHS)
BASELINE = Variant("rollouts", f"{ABLATED} questions x {TRAIN_SAMPLES}")  # ablations differ from it in one thing
OUTCOME = Variant("main", "outcome head", view="outcome", questions=TRAIN, epochs=4 * EPOCHS)


def variants() -> list[Variant]:
    """All; ``BASELINE`` stands for the default in every group of ablations."""
    dynamic = {
        "plain BCE, class balance": {"class_balance": True, "within_questions": False},
        "plain BCE, no balance": {"within_questions": False},
        f"dynamic after {EPOCHS // 4} epochs": {"warmup": EPOCHS // 4},
        f"dynamic after {EPOCHS // 2} epochs": {"warmup": EPOCHS // 2},
        "dynamic from the start": {"warmup": 0},
        "dynamic from the start, class balance (published)": {
            "warmup": 0, "class_balance": True, "within_questions": False,
        },
    }  # fmt: skip
    return [
        MAIN,
        OUTCOME,
        BASELINE,
        *(Variant("weights", name, settings=settings) for name, settings in dynamic.items()),
        Variant("at", "token", view="token"),
        *(Variant("layer", str(layer), view="layers", layers=(layer,)) for layer in LAYERS if layer != -2),
        *(Variant("width", str(width), settings={"width": width}) for width in WIDTHS),
        *(Variant("step rule", name, view=name) for name in RULES),
        *(Variant("rollouts", f"{q} questions x {TRAIN_SAMPLES}", questions=q) for q in QUESTIONS),
        *(Variant("rollouts", f"{ABLATED} questions x {s}", samples=s) for s in SAMPLES),
    ]


def thinned(rollouts: Rollouts, n: int, seed: int) -> Rollouts:
    """``n`` draws of every question, without replacement."""
    drawn = torch.arange(len(rollouts)).repeat_interleave(rollouts.count)
    drawn = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))]
    drawn = drawn[rollouts.question[drawn].sort(stable=True).indices]
    first = torch.cat([torch.ones(1, dtype=torch.bool), rollouts.question[drawn].diff() != 0])
    begins = first.nonzero().flatten()[first.cumsum(0) - 1]
    kept = drawn[torch.arange(len(drawn)) - begins < n]
    count = torch.bincount(kept, minlength=len(rollouts))
    return replace(rollouts, count=count).select(count > 0)


def part_of(rollouts: Rollouts, v: Variant, seed: int) -> Rollouts:
    """The questions and draws that ``v`` learns from with that seed."""
    if v.questions < TRAIN:
        chosen = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed))[: v.questions]
        rollouts = rollouts.select(torch.isin(rollouts.question, chosen))
    return thinned(rollouts, v.samples, seed) if v.samples < TRAIN_SAMPLES else rollouts


def train_rollouts(work: Path, family: str, view: str, layers: tuple[int, ...] = (-2,), more: bool = False) -> Rollouts:
    """Of the training questions, or of these and the further ones (``more``)."""
    rollouts = load(work / family / "train", view, layers)
    if more:
        others = load(work / family / "more", view, layers)
        others.question += TRAIN
        rollouts = Rollouts.join([rollouts, others])
    return rollouts


def load(path: Path, view: str, layers: tuple[int, ...] = (-2,)) -> Rollouts:
    """One view of recorded rollouts; of the view ``layers`` those of ``LAYERS`` that are asked for."""
    blocks = [Rollouts.load(block / f"{view}.safetensors") for block in sorted(path.iterdir()) if block.is_dir()]
    return Rollouts.join([block.read(Tap(layers)) for block in blocks] if view == "layers" else blocks)


def head_file(work: Path, family: str, variant: Variant, seed: int) -> Path:
    return work / "heads" / family / f"{variant.file}, seed {seed}.safetensors"


def head(work: Path, family: str, variant: Variant, seed: int) -> SPRM:
    return SPRM.from_pretrained(head_file(work, family, variant, seed))


def fit_all(work: Path) -> Iterator[str]:
    """Fit every variant with every seed on every family, and the main one on all families together; yields names as they
    are done. What lies there already is not fitted again."""
    tasks = [(work, ALL, MAIN, s) for s in range(SEEDS)]
    tasks += [(work, family, v, s) for v in variants() for s in range(SEEDS) for family in FAMILIES]
    yield from fit_tasks(tasks)


def fit_tasks(tasks: list[tuple[Path, str, Variant, int]]) -> Iterator[str]:
    """Those of ``tasks`` that are not done yet: work directory, family, variant and seed of each."""
    tasks = [t for t in tasks if not head_file(*t).is_file()]
    with processes() as pool:
        yield from pool.map(_fit, tasks)


def processes() -> ProcessPoolExecutor:
    """A process a thread of torch's, each with one: the matrices of heads, and of the recipe's model, are too small for two."""
    return ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn"), torch.set_num_threads, (1,))


def _fit(task: tuple[Path, str, Variant, int]) -> str:
    work, family, v, seed = task
    families = list(FAMILIES) if family == ALL else [family]
    epochs = v.epochs // 2 if family == ALL else v.epochs
    parts = [train_rollouts(work, f, v.view, v.layers, more=v.questions > TRAIN) for f in families]
    for i, part in enumerate(parts):
        part.question += i * TRAIN
    rollouts = Rollouts.join(parts)
    rollouts = part_of(rollouts, v, seed)
    file = head_file(*task)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"unfinished {file.name}")
    fit(rollouts, epochs=epochs, lr=LR, seed=seed, **v.settings).save_pretrained(unfinished)
    unfinished.replace(file)
    return f"{family}: {v.file}, seed {seed}"
