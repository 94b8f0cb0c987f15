"""Every strategy on the same held-out questions: what it gets right, and what it decodes and how long it takes for that."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from reflective.model import ReflectiveModel
from reflective.search.results import Candidate, Generation
from reflective.search.strategies import NAMES, Step, Strategy, by_name, observes
from reflective.search.strategies.votes import answer_numbers
from reflective.tasks import Question

from . import learn, policy, rules

GROUP = 50  # questions whose trees are in memory together
# Strategies that are tried on the first group alone: they take longest, refine by prompts ten times as long as the others'.
FEW = ("refine", "astar", "dvts", "step_beam by mean", "step_beam, at random")
PRUNE_SELECT = f"prune{rules.THEN_SELECT}"
# They decode nothing that best of n does not: the further questions are for them.
STOPPING = ("best_of_n", "prune", PRUNE_SELECT, "prune, at random", f"{PRUNE_SELECT}, at random")
NS = rules.NS
APART = ("exit", "auto")  # who have a head of their own; or draw what best of n has drawn, and are replayed
RANDOM = ("prune", PRUNE_SELECT, "replace", "step_beam")  # that have a control which does as much to whom it may be
ONLY = {"refine": (8,), "dvts": (8,), "astar": (8,), "first_finish": (8,)}  # of the sizes
ONLY |= dict.fromkeys(("step_beam", "step_beam by mean", "step_beam, at random", "particles", "replace, at random"), (16,))
TIMED = {16: ("best_of_n", "prune", PRUNE_SELECT, "prune, at random", "replace"), 8: ("best_of_n", "auto")}
KV_TOKENS, TIMED_QUESTIONS = 3072, 8


@dataclass
class AtRandom(Strategy):
    """A control: as many are stopped and forked as ``inner`` says, and who they are is drawn among those that run."""

    name: ClassVar[str] = "random"
    inner: Strategy | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.by_step = self.inner.by_step

    def observe(self, step: Step) -> Sequence[int] | None:
        actions = self.inner.observe(step)
        if actions is None:
            return None
        actions, running = list(actions), [i for i, c in enumerate(step.candidates) if not c.finished]
        drawn = [actions[i] for i in step.rng.permutation(running)]
        for i, action in zip(running, drawn, strict=True):
            actions[i] = action
        return actions

    def choose(self, candidates: "Sequence[Candidate]") -> int:
        return self.inner.choose(candidates)


def runs(home: Path, n: int) -> dict[str, dict[str, Strategy]]:
    """Strategies with n candidates, by their names and by the name of the run that they share: those that only choose are given the candidates of
    one."""
    made = {name: by_name(name, home, n=n) for name in NAMES if name not in APART}
    made[PRUNE_SELECT] = by_name("prune", f"{home}{rules.THEN_SELECT}", n=n, chooser="select")
    made["step_beam by mean"] = by_name("step_beam", n=n, aggregation="geometric_mean")
    made |= {f"{name}, at random": AtRandom(n=n, inner=made[name], chooser=made[name].chooser) for name in RANDOM}
    made = {name: s for name, s in made.items() if n in ONLY.get(name, NS)}
    choosers = {name: s for name, s in made.items() if not observes(s)}
    # Whoever steers may leave the choice to select; who prunes for it has a rule of its own.
    steered = {name: {name: s} for name, s in made.items() if name not in choosers}
    for name, both in steered.items():
        if not name.startswith("prune"):
            both[name + rules.THEN_SELECT] = made["select"]
    return {"best_of_n": choosers} | steered


def told(run: Generation, question: Question, n: int, strategy: Strategy) -> dict[str, Any]:
    """What comes of a run if ``strategy`` chooses; of best of n's, among its first n candidates."""
    there = run.candidates[:n] if run.strategy == "best_of_n" else run.candidates
    pick = there[(strategy.chooser or strategy).choose(there)]
    return {
        "correct": rules.right(pick, question.answer), "answer": pick.answer,
        "tokens": sum(c.tokens for c in there), "longest": max(len(c.token_ids) for c in there), "candidates": len(there),
    }  # fmt: skip


def drawn(run: Generation, question: Question) -> dict[str, Any]:
    """What each candidate of ``run`` came to."""
    there = run.candidates
    return {
        "scores": [c.score for c in there], "steps": [len(c.step_scores) for c in there], "lengths": [len(c.token_ids) for c in there],
        "answers": answer_numbers([0] * len(there), [c.answer for c in there]),
        "right": [rules.right(c, question.answer) for c in there],
        "right_steps": [_right_steps(c.text, question) for c in there],
    }  # fmt: skip


def _right_steps(text: str, question: Question) -> int:
    """With how many steps of the worked answer ``text`` begins."""
    given = text.split(".\n\n")
    return next((k for k, (a, b) in enumerate(zip(given, question.steps, strict=False)) if a != b), min(len(given), len(question.steps)))


def compare(work: Path, family: str) -> None:
    """Records of every strategy, seed and question, a file a group of questions."""
    model = policy.load(work)
    asked = policy.questions(family, "eval") + policy.questions(family, "further")
    for first in range(0, len(asked), GROUP):
        file = work / family / f"compared, from {first}.jsonl"
        if file.is_file():
            continue
        began, lines = time.perf_counter(), []
        for record in _group(work, model, family, asked[first : first + GROUP], first):
            lines.append(json.dumps(record))
        file.with_suffix(".part").write_text("\n".join(lines))
        file.with_suffix(".part").rename(file)
        print(f"compare: {family}, from {first}, {time.perf_counter() - began:.0f} s", flush=True)


def _group(work: Path, model: ReflectiveModel, family: str, asked: Sequence[Question], first: int) -> Iterator[dict[str, Any]]:
    heads = [policy.with_head(model, learn.head(work, family, seed)) for seed in range(learn.SEEDS)]
    engine = rules.engine_for(heads[0])
    for seed, own in enumerate(heads):
        engine.head = own.head
        # One and the same draws for all heads: their seeds are those of what is learnt.
        whole = rules.decode(engine, own, asked, by_name("best_of_n", n=max(NS)), 0, first)
        for n in NS:
            for run, choosers in runs(rules.home(work, family, seed, n), n).items():
                if (run in FEW and first) or (run not in STOPPING and first >= policy.SIZES["eval"]):
                    continue
                began, fed = time.perf_counter(), engine.fed
                found = whole if run == "best_of_n" else rules.decode(engine, own, asked, choosers[run], 0, first)
                for name, strategy in choosers.items():
                    for i, (question, generation) in enumerate(zip(asked, found, strict=True)):
                        record = {"strategy": name, "n": n, "seed": seed, "question": first + i} | told(generation, question, n, strategy)
                        yield record | (drawn(generation, question) if name == "best_of_n" and n == max(NS) else {})
                print(f"  {run}, n {n}, seed {seed}: {engine.fed - fed} tokens fed, {time.perf_counter() - began:.0f} s", flush=True)
        if family in rules.EARLY:
            judge = policy.with_head(model, rules.ready_head(work, family, seed))
            engine.head, strategy = judge.head, by_name("exit", rules.home(work, family, seed, 1))
            found = rules.decode(engine, judge, asked, strategy, 0, first)
            for i, (question, generation, run) in enumerate(zip(asked, found, whole, strict=True)):
                one = {"whole_answer": run.candidates[0].answer, "whole_tokens": run.candidates[0].tokens}
                yield {"strategy": "exit", "n": 1, "seed": seed, "question": first + i} | told(generation, question, 1, strategy) | one


def timed(work: Path, family: str) -> None:
    """Seconds of the strategies by the package's own engine, with room for ``KV_TOKENS``, each question's candidates waiting for the others'."""
    model = policy.load(work)
    file = work / family / "timed.jsonl"
    there = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    own = policy.with_head(model, learn.head(work, family, 0))
    asked = policy.questions(family, "eval")[:TIMED_QUESTIONS]
    for n, name in ((n, name) for n, names in TIMED.items() for name in names):
        if any((record["strategy"], record["n"]) == (name, n) for record in there):
            continue
        home = rules.home(work, family, 0, n)
        made = {k: s for choosers in runs(home, n).values() for k, s in choosers.items()}
        if n == rules.AUTO:
            made["auto"] = by_name("auto", home, n=n)
        began = time.perf_counter()
        found = own.generate(
            [q.text for q in asked], strategy=made[name], seed=0, max_new_tokens=learn.MAX_NEW_TOKENS, kv_tokens=KV_TOKENS,
            batch_rows=n * TIMED_QUESTIONS, **learn.SAMPLING,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        correct = [rules.right(g.best, q.answer) for g, q in zip(found, asked, strict=True)]
        record = {
            "strategy": name, "n": n, "seconds": seconds / len(asked), "tokens": sum(g.tokens for g in found) / len(asked),
            "accuracy": sum(correct) / len(asked), "questions": len(asked), "kv_tokens": KV_TOKENS, "engine": found[0].engine,
        }  # fmt: skip
        there.append(record)
        file.write_text("\n".join(map(json.dumps, there)) + "\n")
        print(f"timed: {family}, {name}: {record}", flush=True)
