"""What a system is to the harness, and what the harness says of it.

A system is anything that decodes and scores. It answers ``run(world, case)`` with the tokens that it decoded and the scores of their steps; the
harness runs the same tokens through the model a second time, in float64, and compares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .cases import Case
from .run import Run
from .world import World


@runtime_checkable
class System(Protocol):
    """An adapter.

    Attributes:
        name: one word, by which it is asked for.
        about: what it is, and what it is modelled on where it is nobody's package.
        cannot: what it has no way to express, by the names of ``cases.NEEDS``, and why.
    """

    name: str
    about: str
    cannot: Mapping[str, str]

    def run(self, world: World, case: Case) -> Run:
        """Decode and score ``case``. Whatever it raises is a refusal, and is shown."""
        ...


@dataclass(frozen=True)
class Verdict:
    """How a system did in a case.

    Attributes:
        result: ``"right"``: every step is scored, within ``allowed`` of the second pass. ``"wrong"``: it is not. ``"refuses"``: it raised. ``"fails"``:
            it raised by accident, an index out of range for instance. ``"cannot"``: it has no way to express the case. ``"untested"``: it ran, but what
            the case is about did not come about.
        said: why, in words: which rows, the message, or what is missing.
        difference: the largest one between the logarithms of a score and of the second pass's; None: there was nothing to compare.
        allowed: twice the largest error of the same second pass in float32.
        steps, sequences: that were compared.
        same_bits: where a case decodes the same prompts in company and alone: whether the scores are the same to the bit. Nothing is made of it.
    """

    result: str
    said: str = ""
    difference: float | None = None
    allowed: float | None = None
    steps: int = 0
    sequences: int = 0
    same_bits: bool | None = None


RESULTS = ("right", "wrong", "refuses", "fails", "cannot", "untested")


def judge(world: World, system: System, case: Case) -> Verdict:
    """Run ``case`` in ``system`` and compare."""
    for need in case.needs:
        if need in system.cannot:
            return Verdict("cannot", system.cannot[need])
    try:
        run = system.run(world, case)
    except Exception as error:  # noqa: BLE001 - whatever it is, it was said and not hidden
        accident = isinstance(error, LookupError | AttributeError | AssertionError)
        return Verdict("fails" if accident else "refuses", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return compare(world, case, run)


def compare(world: World, case: Case, run: Run) -> Verdict:
    """``run`` against a second pass over its tokens."""
    truths = [world.truth(s.ids, s.prompt, case.rule) for s in run.sequences]
    allowed = max((t.allowed for t in truths), default=0.0)
    wrong, difference = [], None
    for number, (s, truth) in enumerate(zip(run.sequences, truths, strict=True)):
        if s.columns is not None and list(s.columns) != truth.columns:
            wrong.append(f"sequence {number}: steps at {_few(s.columns)}, and they are at {_few(truth.columns)}")
        if len(s.scores) != len(truth.columns):
            wrong.append(f"sequence {number}: {len(s.scores)} scores for {len(truth.columns)} steps")
            continue
        errors = [abs(world.log(score) - log) for score, log in zip(s.scores, truth.log_scores, strict=True)]
        difference = max([difference or 0.0, *errors])
        # A score that is no number is as wrong as can be.
        if bad := [i for i, error in enumerate(errors) if not error <= allowed]:
            wrong.append(f"sequence {number}: step{'s' * (len(bad) > 1)} {_few(bad)} of {len(errors)}")
    rest = {
        "difference": difference, "allowed": allowed, "steps": sum(len(t.columns) for t in truths), "sequences": len(truths),
        "same_bits": _same_bits(run) if case.alone else None,
    }  # fmt: skip
    if wrong:
        more = f"; and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        return Verdict("wrong", "; ".join(wrong[:2]) + more, **rest)
    if missing := case.missing(world, run):
        return Verdict("untested", missing, **rest)
    return Verdict("right", "", **rest)


def _same_bits(run: Run) -> bool | None:
    """Of sequences that were decoded in company and, in the same order, alone: whether the scores of those that came out alike are the same to the
    bit; None: none came out alike."""
    together, alone = run.sequences[: len(run.sequences) // 2], run.sequences[len(run.sequences) // 2 :]
    alike = [(a, b) for a, b in zip(together, alone, strict=True) if list(a.ids) == list(b.ids)]
    return all(list(a.scores) == list(b.scores) for a, b in alike) if alike else None


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(int(n)) for n in numbers[:6])
    return (shown + (", ..." if len(numbers) > 6 else "")) or "none"
