"""Strategies against a scripted world: decisions checked by hand, guarantees by simulation."""

import dataclasses
import itertools
import json
import math
import string
import sys
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny
import torch
from test_model import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import reflective as rf
from reflective.model import Config
from reflective.scoring.scores import AGGREGATIONS, TrajectoryScores, aggregate
from reflective.search.answers import same_answer, same_text
from reflective.search.candidates import Ask
from reflective.search.selection import EXPONENTS, GROWTHS, VoteRule, fit_vote_rule, select
from reflective.search.strategies import ANSWER, HOLD, KEEP, NAMES, STOP, Step, Strategy, by_name
from reflective.search.strategies.auto import Auto, sizes
from reflective.search.strategies.exit import Exit
from reflective.search.strategies.particles import systematic
from reflective.search.strategies.prune import Prune
from reflective.search.strategies.rpc import RPC, fit_mixture, unlikely
from reflective.search.strategies.select import Select
from reflective.search.strategies.votes import classes

_OTHERS = itertools.count(2)


@dataclass
class Fake:
    """A candidate, alive or at the end."""

    step_scores: list[float] = field(default_factory=list)
    finished: str | None = None
    number: int = 0
    parent: int | None = None
    answer: str | None = None
    status: str = "stop"
    token_ids: list[int] = field(default_factory=lambda: [1, next(_OTHERS)])
    log_prob: float = -1.0
    text: str = ""
    asked: str = ""

    @property
    def score(self) -> float:
        return aggregate(self.step_scores)


def step(*candidates: Fake, seed: int = 0) -> Step:
    for i, c in enumerate(candidates):
        c.number = c.number or i
    return Step(list(candidates), np.random.default_rng(seed), 0, [True] * len(candidates))


def decide(strategy: Strategy, *candidates: Fake) -> list[int] | None:
    return strategy.observe(step(*candidates))


def runs(*scores: float) -> list[Fake]:
    return [Fake([s]) for s in scores]


def search(strategy: Strategy, seed: int, *, steps: int = 4) -> list[Fake]:
    """Run a strategy that waits for steps on candidates whose every step gets a random score; the results."""
    world, rng = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    alive, held, results, born = [Fake(number=i) for i in range(strategy.n)], set(), [], strategy.n
    for _ in range(1000):
        running = [c for c in alive if not c.finished and c.number not in held]
        if not running:
            assert not any(c.number in held for c in alive), "nothing runs, and the strategy keeps holding"
            return results + alive
        for c in running:
            c.step_scores = [*c.step_scores, float(world.uniform(0.05, 0.95))]
            c.finished = "stop" if len(c.step_scores) >= steps - c.number % 2 else None
        actions = strategy.observe(Step(alive, rng, 0, [True] * len(alive))) or [KEEP] * len(alive)
        assert len(actions) == len(alive)
        grown = []
        for c, action in zip(alive, actions, strict=True):
            held.discard(c.number)
            if action == HOLD:
                assert not c.finished
                held.add(c.number)
            if action == STOP:
                c.status = "stopped"
                results.append(c)
                continue
            grown.append(c)
            for _ in range(action - 1):
                grown.append(Fake(list(c.step_scores), c.finished, born, c.number))
                born += 1
        alive = grown
    raise AssertionError("the search did not end")


def settings(name: str) -> dict[str, float]:
    return {"prune": {"threshold": 0.5}, "select": {"exponent": 3.0}, "replace": {"interval": 6, "warmup": 6}, "exit": {"threshold": 2.0}, "auto": {"exponent": 3.0, "first": 8}}.get(name, {})


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    strategy = by_name(name, n=5, **settings(name))
    assert (strategy.name, strategy.n) == (name, 5)


def test_refusals():
    with pytest.raises(ValueError, match=r"strategy='best'.*best_of_n"):
        by_name("best")
    with pytest.raises(ValueError, match="n=0"):
        by_name("best_of_n", n=0)
    with pytest.raises(ValueError, match="aggregation='median'"):
        by_name("best_of_n", aggregation="median")
    with pytest.raises(ValueError, match=r"Prune\.calibrate"):
        by_name("prune")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 3, 8])
def test_every_search_ends_with_a_finished_answer_and_repeats_with_its_seed(name, n):
    found = search(by_name(name, n=n, **settings(name)), seed=7)
    pick = by_name(name, n=n, **settings(name)).choose(found)
    assert found[pick].finished and found[pick].status == "stop"
    again = search(by_name(name, n=n, **settings(name)), seed=7)
    assert [(c.number, c.parent, c.step_scores, c.status) for c in found] == [
        (c.number, c.parent, c.step_scores, c.status) for c in again
    ]


def test_the_answer_is_the_best_that_was_not_stopped():
    found = [Fake([0.3]), Fake([0.9], status="stopped"), Fake([0.5, 0.5]), Fake([0.5]), Fake([math.nan])]
    best = by_name("best_of_n")
    assert best.choose(found) == 2, "of equals the first"
    assert best.choose([found[1], found[4]]) == 1 and best.choose([found[4], found[0]]) == 1
    assert best.choose([found[1]]) == 0, "nothing else is there"
    spread = [Fake([0.9, 0.4]), Fake([0.5, 0.6])]
    assert [by_name("best_of_n", aggregation=a).choose(spread) for a in ("mean", "min", "last")] == [0, 1, 1]


HALVES = ["0.5", "1/2", r"\frac12", r"\frac{1}{2}", "$0.50$"]


def test_equal_answers():
    pytest.importorskip("math_verify")
    for a in HALVES:
        for b in HALVES:
            assert same_answer(a, b), (a, b)
    assert classes(["7", *HALVES, "7.0", "8"]) == [[0, 6], [1, 2, 3, 4, 5], [7]]
    assert same_answer("x+1", "1 + x") and same_answer(r"2\sqrt{2}", r"\sqrt{8}")
    assert not same_answer("x+1", "x+2") and not same_answer("0.5", "0.51")


def test_answers_that_are_no_mathematics_are_texts():
    assert same_answer("Yes", " yes ") and same_answer("New York", "new york")
    assert not same_answer("no", "on"), "as products of variables they would be equal"
    assert same_answer("1,000", "1000") and same_answer("+7", "7.0") and not same_answer("", "7")
    assert not same_answer("1/0", "2/0"), "no number"
    assert not same_answer("1,2", "12") and not same_answer("1,000", "1,00"), "two numbers"


def test_answers_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert same_answer("0.5", "1/2") and same_answer("x+1", "x+1") and not same_answer("x+1", "1+x")
    assert same_text("A", "B") is False and same_text("A", "a") is same_text("x+1", "1+x") is None


def test_answers_in_a_thread():
    found = []
    worker = threading.Thread(target=lambda: found.append((same_answer("1/2", "0.5"), same_answer("x+1", "1+x"))))
    worker.start()
    worker.join()
    assert found == [(True, False)]


def test_votes():
    found = [
        Fake([0.9], answer="3"), Fake([0.2], answer="5"), Fake([0.3], answer="5.0"), Fake([0.1], answer="5"),
        Fake([0.99], answer=None), Fake([0.98], answer="3", status="stopped"),
    ]  # fmt: skip
    assert by_name("majority").choose(found) == 2, "the most frequent answer, by its best candidate"
    assert by_name("weighted_vote").choose(found) == 0, "0.9 against 0.6"
    assert by_name("majority").choose([found[1], found[0]]) == 1, "one vote each: the higher score"
    assert by_name("majority").choose([found[1], found[4]]) == 0, "no answer, no vote"
    assert by_name("majority").choose([found[4], Fake([0.995])]) == 1, "no answer at all: the highest score"
    assert by_name("weighted_vote").choose([Fake([math.nan], answer="1"), Fake([0.1], answer="2")]) == 1


def says(text: str, p: float, answer: str | None = None, **given) -> Fake:
    """A response without a step, of two tokens, each of probability ``p``."""
    return Fake(text=text, answer=answer, log_prob=2 * math.log(p), **given)


def chosen(strategy: Strategy, *found: Fake) -> tuple[int, str]:
    return strategy.choose(found), strategy.chosen_by


SCORING = ["best_of_n", "prune", "step_beam", "dvts", "particles", "astar"]


@pytest.mark.parametrize("name", SCORING)
def test_without_a_step_the_majority_decides_and_then_the_likeliest(name):
    best = by_name(name, **settings(name))
    empty = "<think>\n\n</think>\n\n"
    texts = [says(empty + t, p) for t, p in (("Lyon.", 0.9), ("Paris.", 0.2), ("Paris. ", 0.4), ("", 0.99), ("", 0.99))]
    assert chosen(best, *texts) == (2, "majority"), "the likelier of two that say the same; an empty one does not vote"
    assert chosen(best, *texts[:2]) == (0, "likelihood")
    assert chosen(best, *texts[1:2], *texts[:1]) == (1, "likelihood")
    answers = [says("x", 0.9, "1/2"), says("y", 0.3, "0.5"), says("z", 0.8, "7"), says("w", 0.99), says("w", 0.99)]
    assert chosen(best, *answers) == (0, "majority"), "answers vote where there are any, and equal ones together"
    assert chosen(best, *answers[1:3]) == (1, "likelihood")
    assert chosen(best, says("a", 0.3), says("b", 0.3)) == (0, "likelihood"), "of equals the first"
    assert chosen(best, says("", 0.3), says("", 0.4)) == (1, "likelihood")
    assert chosen(best, says("a", math.nan), says("b", 0.1)) == (1, "likelihood")
    assert chosen(best, Fake(token_ids=[]), says("b", 0.1)) == (1, "majority"), "the other ended at once"
    stopped = Fake([0.9], status="stopped")
    assert chosen(best, stopped, *texts[:3]) == (3, "majority")
    for more in ({"log_prob": -0.7 + 1e-9}, {"log_prob": -0.7, "step_scores": [0.5 + 1e-9]}):
        same = Fake([0.5] if "step_scores" in more else [], text="a", token_ids=[7], log_prob=-0.7)
        assert chosen(best, same, dataclasses.replace(same, **more))[0] == 0, "of the same tokens the first"


@pytest.mark.parametrize("name", [name for name in SCORING if name != "prune"])  # which knows one aggregation
@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_a_candidate_without_a_step_never_beats_one_that_has_some(name, aggregation):
    best = by_name(name, aggregation=aggregation, **settings(name))
    for scores in ([0.3], [0.0], [0.9, 0.1, 0.9, 0.0], [1e-9] * 40):
        assert chosen(best, says("a", 0.9), Fake(scores), says("a", 0.9)) == (1, "score")
    assert chosen(best, Fake([0.5]), says("a", 0.9), Fake([0.5])) == (0, "score"), "of equals the first"
    assert chosen(best, Fake([math.nan, 0.9]), says("a", 0.9)) == (1, "score"), "but a step without a score is worse"
    assert chosen(best, Fake([math.nan]), Fake([0.9, math.nan], log_prob=-0.5)) == (1, "likelihood")


def test_votes_without_a_step():
    for name, alone in (("majority", "majority"), ("weighted_vote", "score"), ("select", "score")):
        vote = by_name(name, **settings(name))
        few = [says("", 0.2, "3"), says("", 0.3, "3"), says("", 0.9, "5")]
        assert chosen(vote, *few) == (1, "majority"), "the likelier of two with one answer"
        assert chosen(vote, *few[:2]) == (1, "majority") and chosen(vote, *few[1:]) == (1, "likelihood")
        assert chosen(vote, says("b", 0.2), says("a", 0.1), says("a", 0.15)) == (2, "majority"), "no answer at all"
        assert chosen(vote, *few[:2], Fake([0.1], answer="5")) == (1 if name == "majority" else 2, alone)
        assert chosen(vote, Fake([0.2], answer="1"), Fake([0.3], answer="2")) == (1, "score"), "one vote each"
        assert chosen(vote, says("", 0.9, "1"), Fake([0.3], answer="1"))[0] == 1, "of one answer that with a step"
    assert chosen(by_name("rpc"), Fake(answer="1", log_prob=-0.5), Fake(answer="2", log_prob=-4.0)) == (0, "strategy")
    assert by_name("rpc").choose([Fake(answer="1", token_ids=[])]) == 0, "ended at once"
    assert chosen(by_name("first_finish"), says("", 0.2), says("", 0.4)) == (1, "strategy")


def test_searches_keep_what_finished_without_a_step():
    done = [says("a", 0.2, finished="stop"), says("b", 0.9, finished="stop")]
    assert decide(by_name("dvts", n=2, width=2), *done) == [KEEP, KEEP], "nothing tells which of them to stop"
    assert decide(by_name("dvts", n=2, width=2), done[0], Fake([0.0])) == [STOP, 2]
    star = by_name("astar", branch=2, expansions=1)
    falls = Fake([0.9, 0.1, 0.9, 0.1])  # f = 2.5, and of one without a step 1
    assert decide(star, done[0], falls) == [KEEP, 2]
    assert decide(star, done[0], falls) == [KEEP, KEEP], "the expansions are spent: it is decoded to its end"
    assert decide(by_name("astar"), *done) == [KEEP, KEEP]


@dataclass
class Last(Strategy):
    pick: object = None

    def choose(self, candidates):
        return len(candidates) - 1 if self.pick is None else self.pick


@pytest.mark.parametrize("name", NAMES)
def test_a_run_says_how_its_answer_was_chosen(model, name):
    """Nothing ends a step, and a random digit is the answer."""
    model = rf.ReflectiveModel(
        model.model, model.tokenizer, model.head, dataclasses.replace(model.config, delimiter="\u2603\u2603")
    )
    strategy = by_name(name, n=6, **settings(name))
    run = model.generate("why?", strategy=strategy, max_new_tokens=60, temperature=1.0, top_p=1.0, seed=2)
    assert all(c.step_scores == [] and c.score == 0 for c in run.candidates) and run.score == 0
    there = [c for c in run.candidates if c.status != "stopped"]
    votes = [sum(c.answer == other.answer for other in there) for c in there if c.answer is not None]
    assert 1 < len(votes), "some answer"
    if name in ("rpc", "first_finish"):
        assert run.chosen_by == "strategy"
        return
    assert run.chosen_by == ("majority" if votes.count(max(votes)) == max(votes) else "likelihood")
    assert sum(c.answer == run.best.answer for c in there) == max(votes)
    rivals = [c for c in there if c.answer and sum(c.answer == d.answer for d in there) == max(votes)]
    assert run.best.log_prob / len(run.best.token_ids) == max(c.log_prob / len(c.token_ids) for c in rivals)


def test_what_else_may_choose(model):
    assert model.generate("why?", n=1, max_new_tokens=4).chosen_by == "only"
    assert model.generate("why?", n=4, max_new_tokens=40, temperature=1.0, top_p=1.0, seed=3).chosen_by == "score"
    run = model.generate("why?", strategy=Last(n=3), max_new_tokens=4)
    assert run.chosen_by == "strategy" and run.best is run.candidates[2]
    for wrong in (3, -1, "best"):
        with pytest.raises(RuntimeError, match=f"strategy Last: choose gave {wrong!r}, no index of its 3 candidates"):
            model.generate("why?", strategy=Last(n=3, pick=wrong), max_new_tokens=2)


def test_first_finish():
    first = by_name("first_finish")
    assert decide(first, Fake(), Fake(finished="length"), Fake()) is None, "what was cut has not finished"
    assert decide(first, Fake(), Fake(finished="stop"), Fake(finished="length"), Fake()) == [STOP, KEEP, KEEP, STOP]
    cut, long = Fake([0.9], token_ids=[1] * 5, status="length"), Fake([0.8], token_ids=[1] * 8)
    short, better = Fake([0.1], token_ids=[1] * 7), Fake([0.2], token_ids=[1] * 7)
    assert (
        first.choose([cut, long, short]) == 2 and first.choose([long, short, better]) == 2 and first.choose([cut]) == 0
    )


def test_prune_by_hand():
    rule = Prune(threshold=math.log(2))
    assert decide(rule, *runs(0.8, 0.41, 0.39)) == [KEEP, KEEP, STOP]
    rule = Prune(threshold=math.log(2))
    assert decide(rule, Fake([0.8]), Fake([0.1, 0.1]), Fake([])) == [KEEP] * 3, (
        "alone at its second step, so no one leads it"
    )
    assert decide(rule, Fake([0.8, 0.8]), Fake([0.1, 0.1]), Fake([])) == [KEEP, STOP, KEEP]
    rule = Prune(threshold=math.log(2))
    assert decide(rule, Fake([0.8], finished="stop"), Fake([0.9, 0.01]), Fake([0.1], finished="stop")) == [
        KEEP,
        STOP,
        KEEP,
    ]
    assert decide(Prune(threshold=math.log(2), min_steps=2), *runs(0.8, 0.1)) == [KEEP, KEEP]
    assert decide(Prune(threshold=0.1), *runs(math.nan, 0.1, 0.1)) == [STOP, KEEP, KEEP], "no score, no chance"
    assert decide(Prune(threshold=0.1), *runs(math.nan, math.nan)) == [KEEP, KEEP]


def test_prune_takes_each_new_step_in():
    rule, found = Prune(threshold=0.5), runs(0.9, 0.9)
    for scores, action in (((0.9, 0.5), KEEP), ((0.9, 0.2), STOP)):
        for c, s in zip(found, scores, strict=True):
            c.step_scores.append(s)
        assert decide(rule, *found) == [KEEP, action]
    # ln 0.9 - (ln 0.9 + ln 0.5) / 2 = 0.29; with 0.2 after it 0.70


def test_prune_forgets_steps_that_do_not_count_any_more():
    """As where a response has steps before its ``<think>``."""
    rule, (leader, other) = Prune(threshold=0.5), runs(0.9, 0.8)
    assert decide(rule, leader, other) == [KEEP, KEEP]
    other.step_scores[:] = [0.5]
    assert decide(rule, leader, other) == [KEEP, STOP], "ln 0.9 - ln 0.5 = 0.59"
    rule = Prune(threshold=0.5)
    other.step_scores[:] = [0.9, 0.9]
    assert decide(rule, leader, other) == [KEEP, KEEP]
    other.step_scores[:] = []
    assert decide(rule, leader, other) == [KEEP, KEEP]
    other.step_scores[:] = [0.5]
    assert decide(rule, leader, other) == [KEEP, STOP]


def test_prune_calibration_by_hand():
    winner = [0.4, 1.0, 1.0]  # S: ln 0.4, ln 0.4 / 2, ln 0.4 / 3; the other: ln 0.6, ln 0.6
    lag = math.log(0.6) - math.log(0.4)
    questions = [[winner, [0.6, 0.6]]] + [[[0.9], [0.5]]] * 18
    assert Prune.calibrate(questions).threshold == pytest.approx(lag), "19 questions at 5 %: the largest lag"
    assert Prune.calibrate(questions, risk=0.1).threshold == 0.0
    late = math.log(0.6) - math.log(0.4) / 2
    assert Prune.calibrate(questions, min_steps=2).threshold == pytest.approx(max(late, 0.0))
    rule = Prune.calibrate(questions)
    assert (rule.n, rule.risk, rule.questions, rule.min_steps) == (2, 0.05, 19, 1)
    with pytest.raises(ValueError, match="risk=0.05 needs at least 19 questions, not 18"):
        Prune.calibrate(questions[1:])
    with pytest.raises(ValueError, match="risk=0;"):
        Prune.calibrate(questions, risk=0)
    with pytest.raises(ValueError, match="number of candidates"):
        Prune.calibrate([*questions, [[0.5]]])


def test_prune_is_calibrated_on_what_generation_returns():
    lists = [[[0.4, 0.9], [0.6, 0.5]]] * 19
    scores = [TrajectoryScores(torch.zeros(2), torch.zeros(2), [torch.tensor(s) for s in q], []) for q in lists]
    expected = Prune.calibrate(lists).threshold
    assert expected > 0.1 and Prune.calibrate(scores).threshold == pytest.approx(expected, rel=1e-6)

    @dataclass
    class Question:
        candidates: list[Fake]

    assert Prune.calibrate([Question([Fake(s) for s in q]) for q in lists]).threshold == expected
    with pytest.raises(ValueError, match="were stopped"):
        Prune.calibrate([Question([Fake([0.5], status="stopped")])] * 19)


def test_the_embedded_head_comes_with_a_rule():
    from reflective.checkpoints.default import HEAD

    rule = by_name("prune", HEAD)
    assert rule.risk == 0.05 and rule.questions >= 19 and rule.n == 8 and 0 <= rule.threshold < 5


def test_select_weighs_votes_by_a_power_of_the_score():
    found = [Fake([0.9], answer="3"), *(Fake([0.5 + i / 100], answer="5") for i in range(3))]
    pick = {e: by_name("select", exponent=e).choose(found) for e in (0.0, 1.0, 2.0, 4.0, 500.0)}
    assert pick == {0.0: 3, 1.0: 3, 2.0: 0, 4.0: 0, 500.0: 0}, "0.9 ** 2 against 3 * 0.51 ** 2"
    assert by_name("select", exponent=2.0, growth=-1.0).choose(found) == 3, "0.5 of four voters"
    tiny = [Fake([0.9 * 1e-9], answer="3"), *(Fake([(0.5 + i / 100) * 1e-9], answer="5") for i in range(3))]
    assert chosen(by_name("select", exponent=60.0), *tiny) == (0, "score"), "powers that would all be 0"
    assert chosen(by_name("select", exponent=2.0), *runs(0.2, 0.7, 0.1)) == (1, "score"), "nothing to compare: best of n"
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="exponent"):
            by_name("select", exponent=wrong)
    with pytest.raises(ValueError, match=r"select: no exponent; use Select\.calibrate"):
        by_name("select")


def judged(seed: int, questions: int, n: int) -> tuple[np.ndarray, ...]:
    """``(score, right, answer, question)`` of candidates of which one in four is right; wrong ones spread over eleven answers, and
    one in twelve of these scores as a right one does."""
    rng = np.random.default_rng(seed)
    right = rng.random(questions * n) < 0.25
    answer = np.where(right, 0, rng.integers(1, 12, questions * n))
    score = np.where(right | (rng.random(questions * n) < 1 / 12), rng.beta(8, 2, questions * n), rng.beta(2, 4, questions * n))
    return score, right.astype(float), answer, np.repeat(np.arange(questions), n)


def test_the_vote_rule_is_between_voting_and_choosing():
    rule, fresh = fit_vote_rule(*judged(0, 200, 32)), judged(1, 300, 32)
    assert rule.exponent in EXPONENTS[1:-1]
    for n in (8, 32):
        found = {k: v.mean() for k, v in select(*fresh[:3], n, rule).items()}
        assert found["select"] > max(found["majority"], found["best_of"]) + 0.02, found
        assert found["select"] >= found["weighted_vote"], found
    assert fit_vote_rule(*judged(0, 200, 32)) == rule, "repeatable"
    score, right, answer, question = judged(2, 200, 8)
    assert fit_vote_rule(np.random.default_rng(0).random(len(score)), right, answer, question).exponent < 1, "of no use: nearly majority"
    assert select(score, right, answer, 8, VoteRule(1.0))["select"].tolist() == select(score, right, answer, 8)["weighted_vote"].tolist()
    with pytest.raises(ValueError, match="no question has as many candidates"):
        fit_vote_rule([0.5], [1.0], [0], [0])


def test_the_strategy_chooses_as_the_estimator_does():
    rule = VoteRule(2.0, 0.25)
    score, right, answer, _ = judged(3, 60, 9)
    answer[::5] = -1
    by_estimator = select(score, right, answer, 9, rule)["select"]
    strategy = by_name("select", exponent=rule.exponent, growth=rule.growth)
    for g, expected in enumerate(by_estimator):
        part = range(9 * g, 9 * g + 9)
        there = [Fake([score[i]], answer=None if answer[i] < 0 else str(answer[i])) for i in part]
        assert right[part[strategy.choose(there)]] == expected


def test_select_is_calibrated_on_what_generation_returns(model):
    found = model.generate(["why?", "how much?", "when?"], n=6, max_new_tokens=40, temperature=1.0, top_p=1.0, seed=1)
    right = [max((c.answer for c in one.candidates if c.answer), default="0") for one in found]
    rule = Select.calibrate(found, right, n=4)
    assert rule.exponent in EXPONENTS and rule.growth in GROWTHS and (rule.n, rule.questions) == (4, 3)
    with pytest.raises(ValueError, match="right: 1 answers to 3 questions"):
        Select.calibrate(found, right[:1])
    for one in found:
        for c in one.candidates:
            c.answer = None
    with pytest.raises(ValueError, match="no candidate has an answer"):
        Select.calibrate(found, right)
    found[0].candidates[0].status = "stopped"
    with pytest.raises(ValueError, match="ran to their end"):
        Select.calibrate(found, right)


def test_select_is_what_effort_uses_where_the_checkpoint_has_it(tmp_path, model):
    rule = Select(exponent=3.0, growth=0.25, questions=40)
    rule.save(tmp_path)
    assert by_name("select", tmp_path) == rule == Select.load(tmp_path / "select.json")
    assert by_name("select", tmp_path, exponent=1.0) == Select(exponent=1.0)
    model = rf.ReflectiveModel(model.model, model.tokenizer, model.head, model.config, home=tmp_path)
    assert model.strategy(None, "high") == dataclasses.replace(rule, n=32)
    assert model.strategy().name == model.strategy(n=4).name == model.strategy("best_of_n", "high").name == "best_of_n"
    (tmp_path / "select.json").unlink()
    assert model.strategy(None, "high").name == "best_of_n"
    with pytest.raises(ValueError, match=r"exponent=nan: select\.json holds numbers alone"):
        rule.exponent = math.nan
        rule.save(tmp_path)


def test_prune_is_kept_as_json(tmp_path):
    rule = Prune(n=3, threshold=0.25, min_steps=2, risk=0.1, questions=30)
    rule.save(tmp_path)
    rule.save(tmp_path / "other.json")
    assert Prune.load(tmp_path) == Prune.load(tmp_path / "other.json") == rule == by_name("prune", tmp_path)
    assert by_name("prune", tmp_path, n=7).n == 7 and by_name("prune", tmp_path, threshold=1.0).threshold == 1.0
    (tmp_path / "prune.json").write_text(json.dumps({"limit": 1}))
    with pytest.raises(ValueError, match=r"prune\.json is not a valid"):
        Prune.load(tmp_path)


def question(rng: np.random.Generator, n: int = 6) -> list[list[float]]:
    """Step scores of candidates of unlike lengths whose quality drifts, so that leads change hands."""
    scores = []
    for _ in range(n):
        walk = rng.normal(0, 0.7) + np.cumsum(rng.normal(0, 1.0, int(rng.integers(2, 8))))
        scores.append((1 / (1 + np.exp(-walk))).tolist())
    return scores


def dropped(rule: Prune, scores: list[list[float]], rng: np.random.Generator) -> tuple[bool, int]:
    """Whether pruning loses best of N's pick when candidates step in any order; the steps that it decodes."""
    rule = Prune(threshold=rule.threshold, min_steps=rule.min_steps)
    alive = [Fake(number=i) for i in range(len(scores))]
    steps = 0
    while any(not c.finished for c in alive):
        c = alive[rng.choice([i for i, c in enumerate(alive) if not c.finished])]
        c.step_scores.append(scores[c.number][len(c.step_scores)])
        c.finished = "stop" if len(c.step_scores) == len(scores[c.number]) else None
        steps += 1
        actions = rule.observe(Step(alive, rng, 0, [True] * len(alive)))
        alive = [c for c, action in zip(alive, actions, strict=True) if action]
    best = max(range(len(scores)), key=lambda i: aggregate(scores[i]))
    return best not in [c.number for c in alive], steps


@pytest.mark.parametrize(("risk", "m"), [(0.2, 9), (0.1, 19)])
def test_prune_keeps_its_promise(risk, m):
    rng = np.random.default_rng(0)
    trials = []
    for _ in range(600):
        rule = Prune.calibrate([question(rng) for _ in range(m)], risk=risk)
        fresh = question(rng)
        trials.append((*dropped(rule, fresh, rng), sum(map(len, fresh))))
    losses, steps, all_steps = (np.array(column) for column in zip(*trials, strict=True))
    assert losses.mean() <= risk + 3 * math.sqrt(risk * (1 - risk) / len(trials))
    assert steps.sum() < 0.95 * all_steps.sum(), "it does prune"


def long(score: float, tokens: int, **given) -> Fake:
    return Fake([score], token_ids=list(range(tokens)), **given)


def test_replace_by_hand():
    strategy = by_name("replace", n=4, swap=1, interval=10, warmup=20)
    some = [long(0.2, 12), long(0.9, 15), long(0.5, 8), Fake([], token_ids=[0] * 19)]
    assert decide(strategy, *some) == [KEEP] * 4, "still warming up"
    some[3].token_ids = [0] * 25
    assert decide(strategy, *some) == [STOP, 2, KEEP, KEEP], "the worst for a fork of the best; who has no step is left alone"
    assert decide(strategy, *some) == [KEEP] * 4, "not again at once"
    some[1].token_ids = [0] * 35
    assert decide(strategy, some[1], some[2], some[3]) == [2, KEEP, KEEP], "one place is free: nobody has to go"
    strategy = by_name("replace", n=4, swap=4, interval=1, warmup=0)
    assert decide(strategy, *some[:3], long(0.1, 9)) == [STOP, 2, 2, STOP], "at most half of them"
    strategy = by_name("replace", n=4, swap=0, interval=1, warmup=0, floor=0.4)
    assert decide(strategy, *some[:3], long(0.8, 9, finished="stop")) == [STOP, 2, KEEP, KEEP], "below the floor"
    assert decide(strategy, long(0.1, 99), long(0.2, 50)) == [STOP, 4], "but never all"
    assert decide(strategy, long(0.9, 120, finished="stop")) is None
    assert by_name("replace").swap is None and by_name("replace", n=32)._checked == 0


def test_replace_keeps_within_memory():
    step_rule = by_name("replace", n=4, swap=0, interval=10**6, warmup=10**6, memory=40)
    some = [long(0.2, 12), long(0.9, 15), long(0.5, 8), Fake([], token_ids=[0] * 9)]
    assert decide(step_rule, *some) == [STOP, KEEP, KEEP, KEEP], "44 tokens: the worst goes"
    assert decide(step_rule, *some[1:]) == [KEEP] * 3
    step_rule.memory = 3
    assert decide(step_rule, *some) == [STOP, KEEP, STOP, KEEP], "the best stays, and who was not yet scored"
    both = by_name("replace", n=3, swap=1, interval=1, warmup=0, memory=40)
    assert decide(both, *some[:3]) == [STOP, 2, KEEP] and decide(by_name("replace", n=3, swap=1, interval=1, warmup=0, memory=37), *some[:3]) == [
        STOP, 2, STOP,
    ], "38 tokens with the fork"  # fmt: skip
    for wrong in ({"swap": -1}, {"interval": 0}, {"memory": 0}, {"floor": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            by_name("replace", **wrong)


def test_exit_by_hand():
    rule = Exit(threshold=0.8, min_steps=2, n=3)
    assert decide(rule, Fake([0.9]), Fake([0.1, 0.81]), Fake([0.9, 0.8])) == [KEEP, ANSWER, KEEP], "at step 2 and above the threshold"
    assert decide(rule, Fake([0.9, 0.95]), Fake([0.1, 0.81, 0.9]), Fake([0.9, 0.9], finished="stop")) == [ANSWER, KEEP, KEEP], "once each"
    assert decide(Exit(threshold=0.5, aggregation="min"), Fake([0.4, 0.9])) == [KEEP]
    with pytest.raises(ValueError, match=r"exit: no threshold; use Exit\.calibrate"):
        by_name("exit")
    with pytest.raises(ValueError, match="min_steps=0"):
        Exit(threshold=0.5, min_steps=0)


@dataclass
class Ran:
    candidates: list[Fake]


def early(changed: list[float], kept: list[float], answer: str | None = "7") -> tuple[Ran, list[list[str | None]]]:
    """A response whose answer would be another at steps that score ``changed``, and no other at ``kept``."""
    return Ran([Fake([*changed, *kept], answer=answer)]), [["1"] * len(changed) + [answer] * len(kept)]


def test_exit_calibration_by_hand():
    runs = [early([0.1 * i], [0.9]) for i in range(1, 10)]
    rule = Exit.calibrate(*zip(*runs, strict=True), risk=0.2)
    assert (rule.threshold, rule.questions, rule.risk, rule.n) == (pytest.approx(0.8), 9, 0.2, 1), "the 8th of 9"
    assert Exit.calibrate(*zip(*runs, strict=True), risk=0.2, min_steps=2).threshold == 0.0, "never wrong behind the first step"
    none = [early([0.1], [0.95], answer=None)] * 9
    assert Exit.calibrate(*zip(*none, strict=True), risk=0.1).threshold == 0.95, "no answer at all: nothing was kept"
    for wrong, message in (({"risk": 0.05}, "needs at least 19 questions"), ({"risk": 1.0}, "risk=1.0")):
        with pytest.raises(ValueError, match=message):
            Exit.calibrate(*zip(*runs, strict=True), **wrong)
    right = ["7"] * 8 + ["8"]  # of the last, whose readiness comes to 0.95
    runs[-1] = early([0.9], [0.95])
    rule = Exit.calibrate(*zip(*runs, strict=True), risk=0.2, right=right, wrong=0.1)
    assert (rule.abstain, rule.wrong, rule.threshold) == (0.95, 0.1, 0.95), "who answers is above both"
    assert Exit.calibrate(*zip(*runs, strict=True), risk=0.2, right=right, wrong=0.2).abstain == 0.0, "the 8th of 9 is right"
    picks = {}
    for scores in ([0.3, 0.96, 0.2], [0.3, 0.95]):
        picks[scores[1]] = (one := dataclasses.replace(rule)).choose([Fake(scores)]), one.chosen_by
    assert picks == {0.96: (0, "score"), 0.95: (0, "abstained")}
    for wrong, message in (({"right": right, "wrong": 0.05}, "wrong=0.05 needs at least 19 questions"), ({"right": right[1:]}, "right: 8 answers to 9")):
        with pytest.raises(ValueError, match=message):
            Exit.calibrate(*zip(*runs, strict=True), risk=0.2, **wrong)
    with pytest.raises(ValueError, match="forced: 1 answers for 2 steps"):
        Exit.calibrate([runs[0][0]], [[["1"]]], risk=0.5)


@pytest.mark.parametrize(("risk", "m"), [(0.2, 9), (0.05, 39)])
def test_exit_keeps_its_promise(risk, m):
    """Readiness that says little: responses whose answer is settled at a step drawn at random."""
    rng = np.random.default_rng(1)

    def response():
        steps = int(rng.integers(2, 9))
        settled = int(rng.integers(0, steps))
        ready = 1 / (1 + np.exp(-rng.normal(0, 1, steps) - np.where(np.arange(steps) >= settled, 1.5, -0.5)))
        return early(ready[:settled].tolist(), ready[settled:].tolist())

    premature, saved = [], []
    for _ in range(600):
        rule = Exit.calibrate(*zip(*(response() for _ in range(m)), strict=True), risk=risk)
        (fresh,), (answers,) = (part[:1] if isinstance(part, list) else part.candidates for part in response())
        at = next((k for k in range(len(answers)) if fresh.step_scores[k] > rule.threshold), len(answers) - 1)
        premature.append(answers[at] != "7")
        saved.append(len(answers) - 1 - at)
    assert np.mean(premature) <= risk + 3 * math.sqrt(risk * (1 - risk) / 600) and sum(saved) > 0


def test_answers_are_forced_where_steps_end(model):
    model = rf.ReflectiveModel(model.model, model.tokenizer, model.head, dataclasses.replace(model.config, think_end="\n= "))
    found = model.generate(["why?", "how much?"], n=2, max_new_tokens=30, temperature=1.0, top_p=1.0, seed=4)
    forced = model.forced_answers(found, max_new_tokens=12)
    assert [[len(c) for c in q] for q in forced] == [[len(c.step_scores) for c in one.candidates] for one in found]
    one, k = found[0].candidates[0], 1
    cut = one.text[: one.step_spans[k][1]]
    alone = model.generate("why?", n=1, temperature=0.0, max_new_tokens=1, seed=0)  # another question must not disturb it
    ids = model.encode(found[0].prompt + cut + "\n= ")
    with torch.no_grad():
        out = model.model.generate(ids, do_sample=False, max_new_tokens=12 - 3, pad_token_id=0)
    text = model.decode(out[0, ids.shape[1] :].tolist())
    assert forced[0][0][k] == model.answer("\n= " + text.split("z")[0] + "z" * ("z" in text)) and alone.candidates
    rule = Exit.calibrate(found, forced, risk=0.5)
    again = model.generate("why?", strategy=dataclasses.replace(rule, threshold=0.0), max_new_tokens=30, temperature=1.0, top_p=1.0, seed=4)
    assert again.best.text.startswith(one.text[: one.step_spans[0][1]] + "\n= "), "after the first step"
    with pytest.raises(ValueError, match="no pattern for answers"):
        rf.ReflectiveModel(model.model, model.tokenizer, model.head, dataclasses.replace(model.config, answer=None)).forced_answers(found)


def test_auto_by_hand():
    rule = by_name("auto", n=7, exponent=4.0, enough=0.7)
    assert rule.begins_with == 2 and by_name("auto", n=1, exponent=1.0).begins_with == 1
    done = [Fake([s], finished="stop") for s in (0.2, 0.4, 0.6, 0.5, 0.3, 0.1, 0.1)]

    def more(*candidates):
        seen = step(*candidates)
        assert rule.observe(seen) is None
        return seen.fresh

    assert more(done[0], Fake([0.3])) == 0, "one runs"
    assert [more(*done[:k]) for k in (2, 3, 5, 7)] == [1, 2, 2, 0], "2, 3, 5, and 7 are all"
    assert more(done[0], Fake([0.7], finished="stop")) == 0, "one is good enough"
    assert more(Fake([math.nan], finished="stop"), Fake([], finished="stop")) == 1
    with pytest.raises(ValueError, match="first=0"):
        by_name("auto", exponent=1.0, first=0)


def test_auto_is_calibrated_to_lose_little():
    """Right answers that score high: half of the questions are easy, and two candidates do for them."""
    rng = np.random.default_rng(0)

    def made(number):
        found, right = [], []
        for q in range(number):
            easy = q % 2 == 0
            ok = rng.random(16) < (0.8 if easy else 0.15)
            scores = np.where(ok, rng.beta(12, 2, 16), rng.beta(2, 4, 16))
            found.append(Ran([Fake([float(s)], answer="0" if y else str(rng.integers(1, 9))) for s, y in zip(scores, ok, strict=True)]))
            right.append("0")
        return found, right

    rule = Auto.calibrate(*made(120), n=16, loss=0.02)
    assert 0.3 < rule.enough < 1 and (rule.n, rule.questions, rule.loss) == (16, 120, 0.02)
    hits, whole, drawn = [], [], 0
    for question, _ in zip(*made(200), strict=True):
        k = next(k for k in sizes(2, 16) if k == 16 or max(c.score for c in question.candidates[:k]) >= rule.enough)
        hits.append(question.candidates[rule.choose(question.candidates[:k])].answer == "0")
        whole.append(question.candidates[rule.choose(question.candidates)].answer == "0")
        drawn += k
    assert np.mean(hits) > np.mean(whole) - 0.06 and drawn < 0.6 * 200 * 16
    with pytest.raises(ValueError, match="n=32: a question has fewer candidates"):
        Auto.calibrate(*made(4), n=32)


def test_what_auto_spends():
    """By hand: of every order of the candidates the same comes, as each question's are alike."""
    score, right, answer, question = [0.9] * 8 + [0.3] * 8, [1.0] * 8 + [0.0] * 8, [5] * 8 + [7] * 8, [0] * 8 + [1] * 8
    accuracy, candidates = Auto(n=8, exponent=2.0, enough=0.5).spends(score, right, answer, question)
    assert accuracy.tolist() == [1.0, 0.0] and candidates.tolist() == [2.0, 8.0]
    one = Auto.fit(score, right, answer, question, VoteRule(2.0, 0.25), n=8, loss=0.0)
    assert (one.exponent, one.growth, one.questions) == (2.0, 0.25, 2) and one.spends(score, right, answer, question)[1].tolist() == [2.0, 2.0]


def test_effort_auto(tmp_path, model):
    model = rf.ReflectiveModel(model.model, model.tokenizer, model.head, model.config, home=tmp_path)
    with pytest.raises(ValueError, match=r"auto: no exponent; use Auto\.calibrate"):
        model.generate("why?", effort="auto")
    Auto(n=9, exponent=3.0, enough=0.99, questions=40).save(tmp_path)
    assert model.strategy(effort="auto") == Auto.load(tmp_path) and model.strategy(effort="auto", n=5).n == 5
    with pytest.raises(ValueError, match="effort='auto' is a strategy of its own"):
        model.strategy("prune", "auto")
    sampling = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    run = model.generate("why?", effort="auto", **sampling)
    full = model.generate("why?", strategy=model.strategy("auto"), n=len(run.candidates), **sampling)
    assert len(run.candidates) in (2, 3, 5, 8, 9) and [c.token_ids for c in run.candidates] == [c.token_ids for c in full.candidates]
    assert (max(c.score for c in run.candidates) >= 0.99) == (len(run.candidates) < 9), "no more than are needed"
    lazy = model.generate("why?", strategy=Auto(exponent=3.0, enough=0.0), **sampling)
    assert [c.token_ids for c in lazy.candidates] == [c.token_ids for c in full.candidates[:2]]


def test_step_beam_by_hand():
    beam = by_name("step_beam", n=4, width=2)
    assert decide(beam, *runs(0.1, 0.9, 0.5, 0.2)) == [STOP, 2, 2, STOP]
    assert decide(beam, Fake([0.99], "stop"), *runs(0.3, 0.4, 0.2)) == [KEEP, 2, 2, STOP]
    assert decide(beam, Fake([0.9, 0.1]), Fake([0.1, 0.8]), Fake([0.5])) == [STOP, 2, 2], "the last step's score"
    assert decide(beam, Fake([0.9], "stop"), Fake([0.8], "length"), Fake([0.1])) == [KEEP, KEEP, 4]
    full = [Fake([0.1 * i], "stop") for i in range(4)]
    assert decide(beam, *full, *runs(0.9)) == [KEEP] * 4 + [STOP]
    assert decide(by_name("step_beam", n=3, width=2), *runs(0.1, 0.5, 0.2)) == [STOP, 3, STOP]
    assert decide(by_name("step_beam", n=5, width=2), *runs(0.1, 0.5, 0.2, 0.3, 0.1)) == [STOP, 3, STOP, 2, STOP]
    last = by_name("step_beam", n=4, width=2, rounds=1)
    assert decide(last, *runs(0.1, 0.9, 0.5, 0.2)) is not None and decide(last, *runs(0.9, 0.9, 0.5, 0.5)) is None


def test_dvts_by_hand():
    trees = by_name("dvts", n=4, width=2)
    assert decide(trees, *runs(0.8, 0.9, 0.2, 0.1)) == [STOP, 2, 2, STOP], "the best of each subtree, not of all"
    second = [
        Fake([0.9, 0.3], number=1),
        Fake([0.1, 0.4], None, 4, 1),
        Fake([0.2, 0.7], "stop", 2),
        Fake([0.2, 0.6], None, 5, 2),
    ]
    assert decide(trees, *second) == [STOP, 2, KEEP, STOP], "a subtree whose best has finished is done"
    third = [Fake([0.1, 0.4, 0.1], None, 4, 1), Fake([0.1, 0.4, 0.2], None, 6, 4), second[2]]
    assert decide(trees, *third) == [STOP, 2, KEEP]
    uneven = by_name("dvts", n=5, width=2)
    assert sorted(a for a in decide(uneven, *runs(0.1, 0.2, 0.3, 0.4, 0.5)) if a) == [2, 3]
    assert decide(by_name("dvts", n=4, width=2, rounds=0), *runs(0.1, 0.2, 0.3, 0.4)) is None


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_systematic_resampling_counts(n):
    rng = np.random.default_rng(n)
    total = np.zeros(n)
    for _ in range(400):
        weights = rng.exponential(size=n) * (rng.random(n) < 0.8) + 1e-12
        counts = np.array(systematic(weights, n, rng.random()))
        expected = n * weights / weights.sum()
        assert counts.sum() == n and (np.abs(counts - expected) < 1).all()
        total += counts - expected
    assert np.abs(total / 400).max() < 0.15, "unbiased"
    assert systematic(np.array([0.0, 1.0, 0.0]), n, 0.0) == [0, n, 0]


def test_particles_by_hand():
    # logits 0 and ln 3: weights 1/4 and 3/4, so of four particles 1 and 3, wherever the grid lies
    found = [Fake([0.5]), Fake([0.1, 0.75])]
    particles = by_name("particles", n=2)
    for seed in range(20):
        offset = np.random.default_rng(seed).random()
        assert particles.observe(step(*found, seed=seed)) == [int(offset < 0.5), 2 - int(offset < 0.5)]
    flat = by_name("particles", temperature=1e9)
    assert decide(flat, *runs(0.01, 0.99, 0.5)) == [KEEP] * 3
    assert decide(particles, Fake([1.0], "stop"), Fake([0.0])) == [2, STOP], "a finished particle is drawn again"
    assert decide(particles, Fake([0.9], "stop"), Fake([0.1], "stop")) is None


def test_astar_by_hand():
    star = by_name("astar", n=3, branch=2, frontier=3)
    falls = Fake([0.9, 0.5, 0.8])  # g = 0.4, h = 0.2
    assert (
        star.cost(falls) == pytest.approx(0.6) and star.cost(Fake()) == 1.0 and star.cost(Fake([math.nan])) == math.inf
    )
    assert decide(star, *runs(0.5, 0.7, 0.2)) == [HOLD, 2, HOLD]
    assert decide(star, Fake([0.5]), Fake([0.7, 0.4]), Fake([0.2]), Fake([0.7, 0.3])) == [2, HOLD, HOLD, STOP], (
        "0.5, 0.9, 0.8, 1.1"
    )
    assert decide(star, Fake([0.5], "stop"), Fake([0.7]), Fake([0.6])) == [KEEP, 2, HOLD], (
        "a goal that is not the best waits"
    )
    assert decide(star, Fake([0.8], "stop"), Fake([0.7]), Fake([0.3], "stop")) == [KEEP, STOP, KEEP]
    assert decide(by_name("astar", branch=3, expand=2), *runs(0.5, 0.7, 0.2)) == [3, 3, HOLD]
    assert star.choose([Fake([0.9, 0.5, 0.8]), Fake([0.5]), Fake([0.9], status="stopped")]) == 1


def test_astar_stops_expanding():
    star = by_name("astar", branch=2, expansions=1)
    assert decide(star, *runs(0.5, 0.7)) == [HOLD, 2]
    assert decide(star, Fake([0.5]), Fake([0.7, 0.6]), Fake([0.7, 0.7])) == [STOP, STOP, KEEP]
    assert decide(star, Fake([0.7, 0.7, 0.1])) == [KEEP]
    star = by_name("astar", branch=2, expansions=1)
    decide(star, *runs(0.5, 0.7))
    assert decide(star, Fake([0.5]), Fake([0.1], "stop")) == [STOP, KEEP]


def mixture_loss(x: np.ndarray, w: float, k: tuple[float, float], scale: tuple[float, float]) -> float:
    z = x[:, None] / np.array(scale)
    return -np.log(
        (np.array([w, 1 - w]) * np.array(k) / scale * z ** (np.array(k) - 1) * np.exp(-(z ** np.array(k)))).sum(1)
    ).sum()


def test_weibull_mixture_is_fitted():
    rng = np.random.default_rng(3)
    truth = 0.4, (8.0, 20.0), (0.3, 0.8)
    low = rng.random(300) < truth[0]
    x = np.where(low, 0.3 * rng.weibull(8.0, 300), 0.8 * rng.weibull(20.0, 300)).clip(1e-6, 1.0)
    joint, means = fit_mixture(torch.tensor(x))
    assert -joint.logsumexp(0).sum() <= mixture_loss(x, *truth), "at least as likely as the truth"
    expected = [scale * math.gamma(1 + 1 / k) for k, scale in zip(truth[1], truth[2], strict=True)]
    assert sorted(means.tolist()) == pytest.approx(expected, rel=0.03)
    assert np.mean(np.array(unlikely(x.tolist())) == low) > 0.98


def of_probability(p: float, answer: str | None, token: int, length: int = 4, **kwargs: object) -> Fake:
    return Fake([0.5], answer=answer, token_ids=[token] * length, log_prob=length * math.log(p), **kwargs)


def test_rpc_by_hand():
    p = [0.9, 0.91, *(0.3 + 0.01 * i for i in range(8))]
    assert unlikely(p) == [False, False] + [True] * 8
    many = [of_probability(x, "1" if x > 0.8 else "2", i) for i, x in enumerate(p)]
    assert by_name("majority").choose(many) == 2 and RPC().choose(many) == 0, "1.81 against 2.68 that is pruned"
    assert RPC().choose([of_probability(0.6, "2", 0, 2), of_probability(0.8, "1", 1, 8)]) == 1, "the mean over tokens"
    twice = [of_probability(0.5, *of) for of in (("1", 0), ("1", 0), ("2", 1), ("2", 2))]
    assert by_name("majority").choose(twice) == 0 and RPC().choose(twice) == 2, "a response sampled twice counts once"
    assert RPC().choose([of_probability(0.5, None, 0), Fake([0.9])]) == 1, "no answers: the highest score"
    assert RPC().choose([of_probability(0.5, "1", 0, status="stopped"), of_probability(0.4, "2", 1)]) == 1
    with pytest.raises(ValueError, match="log-probability"):
        RPC().choose([of_probability(math.nan, "1", 0)])
    assert unlikely([0.2, 0.3, 0.4, 0.5, 0.6, 0.9, 0.91, 0.9]) == [True] * 4 + [False] * 4, (
        "0.6 is low, yet above the mean"
    )
    assert unlikely([0.5]) == [False] and unlikely([0.5] * 8) == [False] * 8


@pytest.fixture(scope="module")
def model() -> rf.ReflectiveModel:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    net = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**tiny._SIZES, "vocab_size": len(tokenizer), "eos_token_id": 1})
    )
    head = tiny.head()
    head[3].weight.mul_(100)  # else all scores would be close to one another
    head[3].bias.sub_(2)
    use = Config(
        rule="text", delimiter=list(string.ascii_letters), prompt="Q: {question}\n", stop="z", answer="([0-9])"
    )
    return rf.ReflectiveModel(net.eval(), tokenizer, head, use)


@pytest.mark.parametrize("name", NAMES)
def test_generation(model, name):
    def run(seed: int) -> list[rf.model.Generation]:
        strategy = by_name(name, n=4, **settings(name) | ({"threshold": 0.4} if name == "prune" else {}))
        sampling = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0}
        return model.generate(["why?", "how much?"], strategy=strategy, seed=seed, **sampling)

    found = run(3)
    for one, again in zip(found, run(3), strict=True):
        assert one == dataclasses.replace(
            again, seconds=one.seconds, scoring_seconds=one.scoring_seconds, alive=one.alive
        )
    assert [c.token_ids for c in run(4)[0].candidates] != [c.token_ids for c in found[0].candidates]
    for one in found:
        assert one.strategy == name and one.best.status in ("stop", "length")
        prompts = [model.encode(one.prompt.replace("?", "?" + c.asked))[0] for c in one.candidates]
        ids = [torch.cat([p, torch.tensor(c.token_ids, dtype=torch.int64)]) for p, c in zip(prompts, one.candidates, strict=True)]
        expected = rf.score(model.model, model.head, model.steps, ids, prompt_lengths=list(map(len, prompts)))
        assert [bool(c.asked) for c in one.candidates] == [name == "refine" and c.number == 4 for c in one.candidates]
        for i, c in enumerate(one.candidates):
            assert c.step_scores == pytest.approx(expected.step_scores[i].tolist(), rel=1e-4), (i, c.status)
            assert c.score == pytest.approx(float(expected.score[i]), rel=1e-4)
    forks = [c for one in found for c in one.candidates if c.parent is not None]
    assert bool(forks) == (name in ("step_beam", "dvts", "particles", "astar", "replace"))
    stopped = [c for one in found for c in one.candidates if c.status == "stopped"]
    assert bool(stopped) == (name not in ("best_of_n", "majority", "weighted_vote", "select", "rpc", "exit", "auto", "refine"))


def test_refine_shows_the_best_of_different_drafts_and_takes_the_best_that_saw_them(model):
    drafts = [
        Fake([s], "stop", i, answer=a, text=t)
        for i, (s, a, t) in enumerate([(0.3, "1", "c"), (0.9, "2", "x</think>a"), (0.8, "2", "b"), (0.2, None, "d")])
    ]
    rule = by_name("refine", n=4, drafts=3, answers=2)
    seen = step(*drafts)
    assert rule.observe(seen) is None and seen.fresh == 2
    shown = seen.asked.split("Attempt ")
    assert [part[:4].strip() for part in shown[1:]] == ["1:\na", "2:\nc", "3:\nd"] and seen.asked.startswith("\n\n"), "not b, which says what a does"
    fewer = step(*drafts)
    by_name("refine", drafts=1).observe(fewer)
    assert "Attempt 1:\na" in fewer.asked and "Attempt 2" not in fewer.asked
    refined = [Fake([0.1], "stop", 4, asked=seen.asked), Fake([0.4], "stop", 5, asked=seen.asked)]
    late = step(*drafts, *refined)
    assert rule.observe(late) is None and late.fresh == 0 and rule.choose(drafts + refined) == 5 and rule.choose(drafts) == 1
    unfinished = step(*drafts[:2], Fake([0.5]))
    assert rule.observe(unfinished) is None and unfinished.fresh == 0
    with pytest.raises(ValueError, match="drafts=0"):
        by_name("refine", drafts=0)
    # Where the model has no room for drafts the best of these is the answer.
    sampling = {"temperature": 1.0, "seed": 5, "n": 3}
    without = model.generate("why? " * 60, strategy="refine", max_new_tokens=150, **sampling)
    assert len(without.candidates) == 3 and without.best.score == max(c.score for c in without.candidates)
    with pytest.raises(ValueError, match="strategy='refine' has the question asked anew"):
        Ask([1, 2], by_name("refine"))


def test_the_choice_may_be_left_to_another(model, tmp_path):
    (tmp_path / "select.json").write_text('{"exponent": 2.0, "growth": 0.0, "questions": 9}')
    strategy = by_name("prune", tmp_path, threshold=0.3, n=6, chooser="select")
    assert strategy.chooser == Select(exponent=2.0, questions=9)
    sampling = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "seed": 5}
    own, left = (model.generate("why?", strategy=s, **sampling) for s in (dataclasses.replace(strategy, chooser=None), strategy))
    assert [c.token_ids for c in own.candidates] == [c.token_ids for c in left.candidates] and left.strategy == "prune"
    assert left.best is left.candidates[strategy.chooser.choose(left.candidates)] and left.best.status != "stopped"
    majority = model.generate("why?", strategy=by_name("best_of_n", n=6, chooser="majority"), **sampling)
    assert majority.best.text == model.generate("why?", strategy="majority", n=6, **sampling).best.text
    with pytest.raises(ValueError, match="chooser='select'"):
        Prune(threshold=0.3, chooser="select")


def test_pruned_candidates_are_those_of_best_of_n_up_to_their_end(model):
    sampling = {"n": 6, "max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "seed": 5}
    full = model.generate("why?", **sampling)
    pruned = model.generate("why?", strategy=Prune(threshold=0.3), **sampling)
    assert pruned.tokens < full.tokens
    for a, b in zip(full.candidates, pruned.candidates, strict=True):
        assert b.token_ids == (a.token_ids if b.status != "stopped" else a.token_ids[: len(b.token_ids)])
    # The lag of the pick, known here in hindsight, is just enough for it to survive.
    lag = max(Prune.calibrate([full], risk=0.5).threshold, 0.0)
    assert model.generate("why?", strategy=Prune(threshold=lag), **sampling).best.number == full.best.number
