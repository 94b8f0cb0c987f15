"""Runs of the search on a small random model: every strategy, what it was shown and said, and what came of it.

``python tests/recorded.py`` writes ``recorded/search.json``. Do that only where sampling or a strategy changes on purpose, and say so.
"""

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from test_search import QUESTIONS, reflective_model

from reflective.model import Generation, ReflectiveModel
from reflective.search.strategies import HOLD, KEEP, NAMES, STOP, Strategy, by_name

FILE = Path(__file__).parent / "recorded" / "search.json"
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 28}


@dataclasses.dataclass
class Patient(Strategy):
    """Rests whoever has ended a step until another has, forks the first to end its second, stops those that fall behind."""

    name = "patient"
    n: int = 4

    def observe(self, step):
        actions, longest = [], max(len(c.step_scores) for c in step.candidates)
        resting = sum(not c.finished and not changed for c, changed in zip(step.candidates, step.changed, strict=True))
        for c, changed in zip(step.candidates, step.changed, strict=True):
            if c.finished:
                actions.append(KEEP)
            elif len(c.step_scores) == 2 and changed and len(step.candidates) < 6:
                actions.append(2)
            elif longest - len(c.step_scores) > 3:
                actions.append(STOP)
            else:
                actions.append(HOLD if changed and resting and len(c.step_scores) % 2 else KEEP)
        return actions


def runs() -> dict[str, tuple[dict[str, Any], Strategy, dict[str, Any]]]:
    """By name: settings of the checkpoint, a strategy and settings of ``generate``."""
    found = {}
    for name in NAMES:
        given = {"prune": {"threshold": 0.02, "min_steps": 1}, "select": {"exponent": 4.0, "growth": 0.25}, "replace": {"interval": 5, "warmup": 6}, "exit": {"threshold": 0.52}, "auto": {"exponent": 4.0, "enough": 0.6}}.get(name, {})
        for seed in (0, 1):
            found[f"{name}, seed {seed}"] = {}, by_name(name, n=5, **given), {"seed": seed, "batch_rows": 6}
    found["patient"] = {}, Patient(), {"seed": 5, "batch_rows": 5}
    found["patient, sliding window"] = {"kind": "gemma3"}, Patient(), {"seed": 6, "batch_rows": 7}
    found["greedy"] = {}, by_name("best_of_n", n=2), {"seed": 0, "temperature": 0}
    found["own seeds"] = {}, by_name("step_beam", n=4), {"seed": [3, 4, 5]}
    found["stop"] = {}, by_name("first_finish", n=4), {"seed": 1, "stop": ["AB", "C"]}
    found["thinking budget"] = {}, by_name("particles", n=4), {"seed": 2, "thinking_budget": 9}
    found["answers"] = {"answer": "[A-E]([F-Z])", "stop": "XY|[a-f]{2}"}, by_name("weighted_vote", n=6), {"seed": 3}
    return found


def listening(strategy: Strategy, told: dict[int, list[str]]) -> Strategy:
    """``strategy``, of which ``told`` gets every call, by the number of its question: each has a copy."""
    cls, places = type(strategy), itertools.count()

    def calls(self: Strategy) -> list[str]:
        return told.setdefault(self.place, [])

    def copied(self: Strategy, memo: dict) -> Strategy:
        new = object.__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        new.place = next(places)
        return new

    def observe(self: Strategy, step: Any) -> Any:
        shown = [
            f"{c.number}{'*' * changed}{'.' * bool(c.finished)}:{len(c.token_ids)}/{len(c.step_scores)}"
            for c, changed in zip(step.candidates, step.changed, strict=True)
        ]
        calls(self).append(" ".join(shown))
        actions = cls.observe(self, step)
        calls(self)[-1] += f" @{step.tokens} > {'keep' if actions is None else ' '.join(str(int(a)) for a in actions)}"
        return actions

    def choose(self: Strategy, candidates: Any) -> int:
        chosen = cls.choose(self, candidates)
        calls(self).append(f"choose {chosen} by {self.chosen_by}")
        return chosen

    methods = {"choose": choose, "__deepcopy__": copied} | (
        {"observe": observe} if cls.observe is not Strategy.observe else {}
    )
    heard = type(cls.__name__, (cls,), methods)
    strategy = dataclasses.replace(strategy)
    strategy.__class__ = heard
    return strategy


def record(model: ReflectiveModel, strategy: Strategy, settings: dict[str, Any], *, exact: bool = False) -> list[dict]:
    """What comes of it, a question each. ``exact``: scores to the bit."""
    told: dict[int, list[str]] = {}
    found = model.generate(QUESTIONS, strategy=listening(strategy, told), **SAMPLING | settings)
    return [_question(generation, told.get(q, []), exact) for q, generation in enumerate(found)]


def _question(generation: Generation, calls: list[str], exact: bool) -> dict:
    def number(x: float) -> str | float:
        return x.hex() if exact else float(f"{x:.6g}")

    return {
        "calls": calls,
        "best": generation.best.number,
        "tokens": generation.tokens,
        "alive": [n for _, n in generation.alive],
        "candidates": [
            {
                "text": "".join(chr(48 + t) for t in c.token_ids), "status": c.status, "parent": c.parent, "tokens": c.tokens,
                "answer": c.answer, "error": c.error, "log_prob": number(c.log_prob), "score": number(c.score),
                "steps": [number(s) for s in c.step_scores], "spans": [end for _, end in c.step_spans],
            }
            for c in generation.candidates
        ],
    }  # fmt: skip


def recording(*, exact: bool = False) -> dict[str, list[dict]]:
    """Of all runs."""
    models: dict[str, ReflectiveModel] = {}
    found = {}
    for name, (checkpoint, strategy, settings) in runs().items():
        model = models.setdefault(json.dumps(checkpoint), reflective_model(**checkpoint))
        found[name] = record(model, strategy, settings, exact=exact)
    return found


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    told = recording()
    lines = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, run)) + "\n]" for name, run in told.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
