"""The paper's result in miniature.

    python -m reflective.benchmarks.reproduction WORK [--stage NAME ...] [--family NAME ...] [--out benchmarks/results]

Stages, each of which goes on where it was interrupted; without ``--stage`` all of the first list, then the tables and pictures (``tables``):

    rollouts    of the embedded model on three families of questions
    heads       from their features
    layers      heads of other layers, one chosen for each family
    choosing    heads that learn better, and rules for choosing
    joint       training of policy and head together, and rollouts afterwards
    settle      heads fitted again to these policies
    separate    a second model as PRM

Only where they are asked for by name:

    after       the table of joint training alone, where the data of the others are not at hand
    ship        the best head, with its policy, becomes that which the package comes with
    refit       heads fitted anew to rollouts of the policy that the package comes with; the best of them replaces its head
    rule        how that head's scores choose, calibrated anew (``select.json``, ``auto.json``)
    shipped     what that head and these rules are worth on held-out questions that chose nothing

``--family`` is for the stages ``rollouts``, ``layers`` and ``choosing``.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from reflective.benchmarks.record import RESULTS, add_seconds, seconds_of, write

from . import choosing, heads, joint, layers, rollouts, separate, settle, ship, tables
from .families import FAMILIES

OF_POLICIES = [(seed, name) for seed in range(rollouts.SEEDS) for name in FAMILIES]  # after joint training


def decode(work: Path, families: Sequence[str] = tuple(FAMILIES)) -> None:
    """Rollouts of the policy as it comes."""
    model = rollouts.untrained(rollouts.dtype_of(work))
    for name in families:
        family = FAMILIES[name]
        train, held_out = rollouts.questions(family)
        for part, asked, samples in (
            ("train", train, rollouts.TRAIN_SAMPLES),
            ("eval", held_out, rollouts.EVAL_SAMPLES),
        ):
            rollouts.rollouts(
                model, family, asked, work / name / part, samples=samples, seed=int(part == "eval"), all_views=True
            )
            print(f"rollouts: {name}, {part}", flush=True)
        choosing.decode(model, work, family)
        print(f"rollouts: {name}, further", flush=True)


def fit(work: Path) -> None:
    """Every head that a table asks for."""
    for number, name in enumerate(heads.fit_all(work), 1):
        print(f"heads: {number}, {name}", flush=True)


def read_layers(work: Path, families: Sequence[str] = tuple(FAMILIES)) -> None:
    """A layer for every family, and its heads."""
    for name in layers.fit_all(work, families):
        print(f"layers: {name}", flush=True)


def choose(work: Path, families: Sequence[str] = tuple(FAMILIES)) -> None:
    """Heads that learn better."""
    for name in choosing.fit_all(work, families):
        print(f"choosing: {name}", flush=True)


def train_jointly(work: Path) -> None:
    """Policy and head together, and rollouts of what came of it, each seed on its share of the held-out questions."""
    _side_by_side(joint.train_seed, work, [(seed,) for seed in range(rollouts.SEEDS)])
    _side_by_side(settle.answer, work, OF_POLICIES)


def fit_again(work: Path) -> None:
    """A head for each family and each policy that joint training has led to."""
    _side_by_side(settle.settle, work, OF_POLICIES)


def _side_by_side(act: Callable[..., str], work: Path, tasks: Sequence[tuple[object, ...]]) -> None:
    with heads.processes() as pool:
        for done in [pool.submit(act, work, *task) for task in tasks]:
            print(f"joint: {done.result()}", flush=True)


def compare(work: Path) -> None:
    """A second model as PRM."""
    for seed in range(rollouts.SEEDS):
        separate.compare(work, separate.FAMILY, seed)
        print(f"separate PRM: seed {seed}", flush=True)


STAGES: dict[str, Callable[..., None]] = {
    "rollouts": decode, "heads": fit, "layers": read_layers, "choosing": choose, "joint": train_jointly, "settle": fit_again, "separate": compare,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for everything in between")
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "tables", "after", "ship", "refit", "rule", "shipped"], help="only these")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, help="only these, in this order (rollouts, layers, choosing)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.stage or (*STAGES, "tables"):
        began = time.perf_counter()
        if name == "tables":
            tables.make(args.work, args.out)
        elif name == "after":
            tables.make_joint(args.work, args.out)
        elif name == "ship":
            ship.ship(args.work)
        elif name == "refit":
            ship.refit(args.work)
        elif name == "shipped":
            ship.measure(args.work, args.out)
        elif name == "rule":
            ship.choose()
            ship.describe()
        else:
            STAGES[name](args.work, *([args.family] if args.family else []))
        if name in ("layers", "choosing"):
            {"layers": layers, "choosing": choosing}[name].make(args.work, args.out)
        add_seconds(args.work, name, time.perf_counter() - began)
    if "tables" in (args.stage or ["tables"]):  # with less than the whole recipe they are not what it takes
        write(
            "reproduction_stages", [{"stage": k, "seconds": round(v, 1)} for k, v in seconds_of(args.work).items()], args.out
        )


if __name__ == "__main__":
    main()
