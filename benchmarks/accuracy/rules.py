"""What the strategies are calibrated to, on questions that nothing else is done with; of each family and seed of its head."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from reflective.benchmarks.tree import TreeEngine
from reflective.model import ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.search.candidates import Ask
from reflective.search.loop import Search
from reflective.search.results import Generation
from reflective.search.strategies import Strategy, by_name
from reflective.search.strategies.auto import Auto
from reflective.search.strategies.exit import Exit
from reflective.search.strategies.prune import Prune
from reflective.search.strategies.select import Select
from reflective.search.strategies.votes import same_answer
from reflective.tasks import Question
from reflective.train.head import fit
from reflective.train.ready import readiness

from . import learn, policy
from .families import FAMILIES

NS = (8, 16, 32)
AUTO = 8  # candidates of auto at the most: it is to be as right as best of so many
RISKS = (0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)  # of losing best of N's pick, the boldest first; another candidate may be as right
LOSS = 0.005  # of accuracy on the questions of calibration, at the most
EARLY = ("crates",)  # whose answer may be there before the last step: in a chain it never is, and there is nothing for exit to save
EXIT_RISK, READY = 0.05, 256  # stated; questions from an answer to each of which readiness is learnt


def engine_for(model: ReflectiveModel) -> TreeEngine:
    return TreeEngine(model, **learn.SAMPLING)


def decode(
    engine: TreeEngine, model: ReflectiveModel, asked: Sequence[Question], strategy: Strategy, seed: int, first: int = 0
) -> list[Generation]:
    """As ``model.generate`` would, by ``engine``; question ``i`` has number ``first + i``."""
    prompts = [model.format(q.text) for q in asked]
    asks = [
        Ask(
            model.encode(prompt)[0].tolist(), strategy, max_new_tokens=learn.MAX_NEW_TOKENS, seed=seed, number=first + i,
            again=lambda text, q=q: model.encode(model.format(q.text + text))[0].tolist(), **learn.SAMPLING,
        )
        for i, (q, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]
    done = Search(engine, model.reader).run(asks)
    return [model.generation(prompt, q) for prompt, q in zip(prompts, done, strict=True)]


def right(generation: Generation, question: Question) -> bool:
    answer = generation.best.answer
    return answer is not None and same_answer(answer, question.answer)


def home(work: Path, family: str, seed: int, n: int) -> Path:
    """Where the rules for n candidates lie."""
    return work / family / f"rules, seed {seed}, n {n}"


def calibrate(work: Path, families: Sequence[str] = tuple(FAMILIES)) -> None:
    """Every rule that is missing."""
    model = policy.load(work)
    for family in families:
        asked = policy.questions(family, "calibration")
        answers = [q.answer for q in asked]
        engine = None
        for seed in range(learn.SEEDS):
            if (home(work, family, seed, NS[-1]) / "prune.json").is_file():
                continue
            own = policy.with_head(model, learn.head(work, family, seed))
            engine = engine or engine_for(own)
            engine.head = own.head
            drawn = decode(engine, own, asked, by_name("best_of_n", n=NS[-1]), 0)
            vote = Select.calibrate(drawn, answers)
            for n in NS:
                place, fewer = home(work, family, seed, n), [_first(g, n) for g in drawn]
                place.mkdir(parents=True, exist_ok=True)
                vote.save(place)
                if n == AUTO:
                    _auto(fewer, answers, vote).save(place)
                _prune(engine, own, asked, fewer).save(place)
            print(f"rules: {family}, seed {seed}", flush=True)


def _first(run: Generation, n: int) -> Generation:
    there = run.candidates[:n]
    return Generation(run.prompt, there, there[0], tokens=sum(c.tokens for c in there))


def _auto(whole: Sequence[Generation], answers: Sequence[str], vote: Select) -> Auto:
    """With n at the most, the rule that spends least of those that are as right here as best of n."""
    n = len(whole[0].candidates)
    best, selected = (
        float(np.mean([same_answer(g.candidates[s.choose(g.candidates)].answer or "", a) for g, a in zip(whole, answers, strict=True)]))
        for s in (by_name("best_of_n"), vote)
    )
    return Auto.calibrate(whole, answers, n=n, loss=max(0.0, selected - best))


def _prune(engine: TreeEngine, model: ReflectiveModel, asked: Sequence[Question], whole: Sequence[Generation]) -> Prune:
    """The boldest of the rules that lose hardly anything of best of N's accuracy here."""
    n, chooser = len(whole[0].candidates), by_name("best_of_n")
    best = np.mean([
        same_answer(g.candidates[chooser.choose(g.candidates)].answer or "", q.answer) for g, q in zip(whole, asked, strict=True)
    ])  # fmt: skip
    for risk in RISKS:
        rule = Prune.calibrate(whole, risk=risk)
        found = decode(engine, model, asked, rule, 0)
        accuracy = np.mean([right(g, q) for g, q in zip(found, asked, strict=True)])
        saved = 1 - sum(g.tokens for g in found) / sum(g.tokens for g in whole)
        print(f"prune, n {n}, risk {risk}: accuracy {accuracy:.3f} of {best:.3f}, {saved:.2f} of the tokens saved", flush=True)
        if accuracy >= best - LOSS:
            break
    return rule


def ready_head(work: Path, family: str, seed: int) -> SPRM:
    return SPRM.from_pretrained(learn.head_file(work, family, seed, "readiness"))


def learn_exit(work: Path, families: Sequence[str] = tuple(FAMILIES)) -> None:
    """Heads that say whether an answer is ready, and the rules by which they end thinking."""
    model = policy.load(work)
    for family in families:
        if family not in EARLY or (home(work, family, learn.SEEDS - 1, 1) / "exit.json").is_file():
            continue
        drawn = learn.rollouts(work, model, family)
        one = torch.searchsorted(drawn.question, torch.arange(READY))
        learnt = readiness(model, drawn.select(torch.isin(torch.arange(len(drawn)), one)), batch_rows=128)
        print(f"readiness: {family}, {len(learnt)} steps, {float(learnt.outcome.mean()):.3f} ready", flush=True)
        asked, forced = policy.questions(family, "calibration"), None
        for seed in range(learn.SEEDS):
            own = fit(learnt.read(learn.tap(work, family, drawn)), epochs=learn.EPOCHS, lr=learn.LR, dropout=learn.DROPOUT, seed=seed)
            own.save_pretrained(learn.head_file(work, family, seed, "readiness"))
            judge = policy.with_head(model, own)
            alone = decode(engine_for(judge), judge, asked, by_name("best_of_n", n=1), seed=0)
            forced = forced or judge.forced_answers(alone, batch_rows=128)  # the same answers, whoever judges them
            place = home(work, family, seed, 1)
            place.mkdir(parents=True, exist_ok=True)
            rule = Exit.calibrate(alone, forced, risk=EXIT_RISK)
            rule.save(place)
            print(f"exit: {family}, seed {seed}, {json.dumps({'threshold': rule.threshold})}", flush=True)
