"""What the strategies are calibrated to, on questions that nothing else is done with; of each family and seed of its head."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from reflective.benchmarks.tree import TreeEngine
from reflective.model import ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.search.candidates import Ask
from reflective.search.loop import Search
from reflective.search.results import Candidate, Generation
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
from .replay import Drawn, drawn, replay

NS = (8, 16, 32)
AUTO = 8  # candidates of auto at the most: it is to be as right as best of so many
RISKS = (0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)  # of losing best of N's pick, the boldest first; another candidate may be as right
LOSS = 0.005  # of accuracy on the questions of calibration, at the most
THEN_SELECT = ", then select"
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


def right(candidate: Candidate, answer: str) -> bool:
    return candidate.answer is not None and same_answer(candidate.answer, answer)


def home(work: Path, family: str, seed: int, n: int, then: str = "") -> Path:
    """Where the rules for n candidates lie; with ``THEN_SELECT`` those of prune where select chooses among who is left."""
    return work / family / f"rules, seed {seed}, n {n}{then}"


def calibrate(work: Path, family: str) -> None:
    """Every rule that is missing."""
    model = policy.load(work)
    asked = policy.questions(family, "calibration")
    answers = [q.answer for q in asked]
    engine = None
    for seed in range(learn.SEEDS):
        if (home(work, family, seed, NS[-1], THEN_SELECT) / "prune.json").is_file():
            continue
        file = work / family / f"calibration, seed {seed}.jsonl"
        if not file.is_file():
            own = policy.with_head(model, learn.head(work, family, seed))
            engine = engine or engine_for(own)
            engine.head = own.head
            runs = decode(engine, own, asked, by_name("best_of_n", n=NS[-1]), 0)
            text = "\n".join(json.dumps([asdict(c) for c in drawn(own, run)]) for run in runs)
            file.with_suffix(".part").write_text(text)
            file.with_suffix(".part").rename(file)
        whole = [[Drawn(**c) for c in json.loads(line)] for line in file.read_text().splitlines()]
        vote = Select.calibrate(_generations(whole), answers)
        for n in NS:
            fewer = [there[:n] for there in whole]
            for then, chooser in (("", by_name("best_of_n")), (THEN_SELECT, vote)):
                place = home(work, family, seed, n, then)
                place.mkdir(parents=True, exist_ok=True)
                vote.save(place)
                _prune(fewer, answers, chooser).save(place)
            if n == AUTO:
                _auto(_generations(fewer), answers, vote).save(home(work, family, seed, n))
        print(f"rules: {family}, seed {seed}", flush=True)


def _generations(whole: Sequence[Sequence[Drawn]]) -> list[Generation]:
    made = [[c.candidate(i) for i, c in enumerate(there)] for there in whole]
    return [Generation("", there, there[0]) for there in made]


def _accuracy(found: Sequence[Sequence[Candidate]], answers: Sequence[str], chooser: Strategy) -> float:
    return float(np.mean([right(there[chooser.choose(there)], answer) for there, answer in zip(found, answers, strict=True)]))


def _auto(whole: Sequence[Generation], answers: Sequence[str], vote: Select) -> Auto:
    """With n at the most, the rule that spends least of those that are as right here as best of n."""
    found = [g.candidates for g in whole]
    best, selected = (_accuracy(found, answers, s) for s in (by_name("best_of_n"), vote))
    return Auto.calibrate(whole, answers, n=len(found[0]), loss=max(0.0, selected - best))


def _prune(whole: Sequence[Sequence[Drawn]], answers: Sequence[str], chooser: Strategy) -> Prune:
    """The boldest of the rules that, ``chooser`` choosing among who is left, lose hardly anything of best of N's accuracy here."""
    best = _accuracy([g.candidates for g in _generations(whole)], answers, by_name("best_of_n"))
    for risk in RISKS:
        rule = Prune.calibrate([[c.step_scores for c in there] for there in whole], risk=risk)
        found = [replay(rule, there) for there in whole]
        accuracy = _accuracy(found, answers, chooser)
        saved = 1 - sum(c.tokens for there in found for c in there) / sum(c.length for there in whole for c in there)
        print(
            f"prune, {chooser.name}, n {len(whole[0])}, risk {risk}: accuracy {accuracy:.3f} of {best:.3f}, {saved:.2f} of the tokens saved", flush=True
        )
        if accuracy >= best - LOSS:
            break
    return rule


def ready_head(work: Path, family: str, seed: int) -> SPRM:
    return SPRM.from_pretrained(learn.head_file(work, family, seed, "readiness"))


def learn_exit(work: Path, family: str) -> None:
    """Heads that say whether an answer is ready, and the rules by which they end thinking."""
    model = policy.load(work)
    if family not in EARLY or (home(work, family, learn.SEEDS - 1, 1) / "exit.json").is_file():
        return
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
