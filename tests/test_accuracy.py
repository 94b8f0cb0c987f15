"""The comparison of strategies on long chains: its questions, its engine, its controls and its tables."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from test_search import QUESTIONS, reflective_model

from reflective.benchmarks import record, report
from reflective.benchmarks.accuracy import compare, learn, policy, replay, rules, stages, tables
from reflective.benchmarks.accuracy.families import CONFIG, FAMILIES
from reflective.benchmarks.tree import TreeEngine
from reflective.scoring.taps import Tap
from reflective.search.candidates import Ask
from reflective.search.loop import Search
from reflective.search.strategies import KEEP, NAMES, STOP, Step, Strategy, by_name
from reflective.search.strategies.prune import Prune
from reflective.train import readiness, roll_out
from reflective.train.data import Rollouts


@pytest.mark.parametrize("family", FAMILIES)
def test_worked_answers_are_right_and_no_two_parts_have_a_question_in_common(family):
    parts = [policy.questions(family, part) for part in policy.sizes(family)]
    texts = [q.text for part in parts for q in part]
    assert len(set(texts)) == len(texts) == sum(policy.sizes(family).values())
    assert len(parts[-2]) >= 200 and list(policy.sizes(family)) == ["lesson", "train", "calibration", "eval", "further"]
    for q in parts[-2]:
        assert 8 <= len(q.steps) <= 20
        for step in q.steps:
            left, right = step.removeprefix("Check: ").split("=")
            assert eval(left, {}) == int(right)
        assert q.steps[-1].endswith(f"={q.answer}") and re.search(CONFIG.answer, q.response).group(1) == q.answer
        assert re.search(CONFIG.stop, q.response) and not re.search(CONFIG.stop, "".join(s + ".\n\n" for s in q.steps))


def test_crates_are_known_after_half_of_the_steps():
    for q in policy.questions("crates", "eval"):
        assert q.steps[len(q.steps) // 2 - 1].endswith(f"={q.answer}")


SAMPLING = {"temperature": 1.0, "top_p": 0.9}


# Not replace: transformers tells of a step a token later, when others have one more.
@pytest.mark.parametrize("strategy", [by_name("best_of_n", n=4), by_name("particles", n=4)], ids=lambda s: s.name)
def test_the_tree_gives_what_the_engine_gives_and_decodes_it_once(strategy):
    model = reflective_model()
    engine = TreeEngine(model, **SAMPLING)

    def by_tree():
        asks = [Ask(model.encode(q)[0].tolist(), strategy, max_new_tokens=28, seed=3, number=i, **SAMPLING) for i, q in enumerate(QUESTIONS)]
        return [model.generation(q, found) for q, found in zip(QUESTIONS, Search(engine, model.reader).run(asks), strict=True)]

    found, expected = by_tree(), model.generate(QUESTIONS, strategy=strategy, seed=3, max_new_tokens=28, **SAMPLING)
    for ours, theirs in zip(found, expected, strict=True):
        assert [(c.token_ids, c.status, c.parent, c.tokens) for c in ours.candidates] == [
            (c.token_ids, c.status, c.parent, c.tokens) for c in theirs.candidates
        ]
        for a, b in zip(ours.candidates, theirs.candidates, strict=True):
            assert a.step_scores == pytest.approx(b.step_scores, rel=1e-4) and a.log_prob == pytest.approx(b.log_prob, rel=1e-3)
        assert (ours.tokens, ours.best.number) == (theirs.tokens, theirs.best.number)
    fed = engine.fed
    assert [[c.token_ids for c in g.candidates] for g in by_tree()] == [[c.token_ids for c in g.candidates] for g in found]
    assert engine.fed == fed, "all of it was known"
    engine.forget()
    by_tree()
    assert engine.fed > fed


def test_a_control_does_as_much_to_whom_it_may_be():
    class Fixed(Strategy):
        def observe(self, step):
            return [KEEP, STOP, 3, KEEP, STOP, KEEP]

    class Live:
        def __init__(self, finished):
            self.finished = finished

    control, there = compare.AtRandom(n=6, inner=Fixed(n=6)), [Live(None) for _ in range(5)] + [Live("stop")]
    drawn = {tuple(control.observe(Step(there, np.random.default_rng(seed), 0, [True] * 6))) for seed in range(40)}
    assert len(drawn) > 10 and all(sorted(d) == [STOP, STOP, KEEP, KEEP, KEEP, 3] and d[5] == KEEP for d in drawn)
    assert compare.AtRandom(n=6, inner=by_name("particles", n=6)).by_step


def test_readiness_is_whether_an_answer_asked_for_early_is_the_one_of_the_whole():
    model = reflective_model(answer="[A-E]([F-Z])", think_end="A", prompt="{question}")
    drawn = Rollouts.join(list(roll_out(model, policy_questions(), samples=3, temperature=1.0, max_new_tokens=20, verify=lambda text, q: 1.0)))
    learnt = readiness(model, drawn)
    assert 0 < len(learnt) <= len(drawn.trajectory) and set(learnt.outcome.tolist()) <= {0.0, 1.0}
    assert torch.equal(learnt.trajectory, torch.arange(len(learnt))) and learnt.features.shape[0] == len(learnt)
    steps = {}
    for i in range(len(learnt)):
        ids = learnt.ids(i).tolist()
        assert len(ids) == int(learnt.position[i]) + 1
        steps.setdefault(int(learnt.question[i]), []).append(ids)
    whole = [drawn.ids(i).tolist() for i in range(len(drawn))]
    assert all(any(w[: len(ids)] == ids for w in whole) for found in steps.values() for ids in found)
    # What it says of the first one, done by hand.
    ids, cut = learnt.ids(0).tolist(), int(learnt.prompt_length[0])
    rest = model.generate(model.decode(ids, special=True), n=1, temperature=0, max_new_tokens=32, thinking_budget=0)
    full = next(w for w in whole if w[: len(ids)] == ids and model.answer(model.decode(w[cut:])) is not None)
    assert bool(learnt.outcome[0]) == (rest.best.answer == model.answer(model.decode(full[cut:])))
    with pytest.raises(ValueError, match="rollouts: no features"):
        readiness(model, Rollouts(**{k: v for k, v in drawn.tensors.items() if k not in ("features",)}))


def policy_questions():
    from reflective.tasks import Question

    return [Question(text, "?") for text in QUESTIONS]


def written(folder, family, questions=12):
    """Records as ``compare`` leaves them: prune as right as best of n for half of the tokens, exit for a quarter, its answer changed once."""
    lines, rng = [], np.random.default_rng(1)
    for seed in range(learn.SEEDS):
        for q in range(questions):
            right = rng.random(32) < 0.5
            for n in rules.NS:
                base = {"n": n, "seed": seed, "question": q, "answer": "1", "longest": 9, "candidates": n}
                whole = {"correct": bool(right[0]), "tokens": 10 * n}
                more = {
                    "scores": (0.2 + 0.6 * right).tolist(), "steps": [8] * 32, "lengths": rng.integers(8, 12, 32).tolist(), "answers": [0 if r else 1 for r in right],
                    "right": right.tolist(), "right_steps": [8 if r else 4 for r in right],
                }  # fmt: skip
                lines.append(base | whole | {"strategy": "best_of_n"} | (more if n == 32 else {}))
                lines += [base | whole | {"strategy": s, "tokens": t * n} for s, t in (("prune", 5), ("prune, at random", 5), ("replace", 8), ("select", 10), ("majority", 10))]
            base |= {"n": 1, "strategy": "exit", "tokens": 3, "correct": True, "answer": "2" if q == 3 else "1", "whole_answer": "1", "whole_tokens": 10}
            lines.append(base)
        for n in rules.NS:
            home = rules.home(folder, family, seed, n)
            home.mkdir(parents=True, exist_ok=True)
            (home / "select.json").write_text('{"exponent": 4.0, "growth": 0.0, "questions": 9}')
            (home / "auto.json").write_text(f'{{"exponent": 4.0, "growth": 0.0, "n": {n}, "enough": 0.7, "first": 2, "loss": 0.0, "questions": 9}}')
    (folder / family / "compared, from 0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    timed = [{"strategy": s, "n": 16, "seconds": t, "tokens": 9.0, "accuracy": 0.5} for s, t in (("best_of_n", 2.0), ("prune", 1.0))]
    (folder / family / "timed.jsonl").write_text("\n".join(map(json.dumps, timed)))


def test_tables_give_paired_differences_and_keep_what_exit_states(tmp_path):
    for family in FAMILIES:
        written(tmp_path, family)
        stages.timed(tmp_path, "heads", family, lambda: None)
    record.add_seconds(tmp_path / "crates", "heads", 40)
    stages.timed(tmp_path, "heads", "crates", lambda: None)
    tables.make(tmp_path, tmp_path)
    taken = {(r["stage"], r["family"]): float(r["seconds"]) for r in record.read("strategies_stages", tmp_path)}
    assert taken == {("heads", "chains"): pytest.approx(0, abs=30), ("heads", "crates"): pytest.approx(40, abs=30)} and taken["heads", "crates"] >= 40
    rows = record.read("strategies", tmp_path)
    for family in FAMILIES:
        of = {(r["strategy"], r["n"]): r for r in rows if r["family"] == family}
        assert float(of["prune", "16"]["tokens_kept"]) == 0.5 and float(of["replace", "8"]["tokens_kept"]) == 0.8
        assert [float(of["prune", "8"][k]) for k in ("difference", "difference_low", "difference_high")] == [0, 0, 0], "paired: the very same"
        assert float(of["best_of_n", "8"]["accuracy_low"]) < float(of["best_of_n", "8"]["accuracy"]) < float(of["best_of_n", "8"]["accuracy_high"])
        assert [r["family"] for r in record.read("strategies_exit", tmp_path)] == list(rules.EARLY)
        ended = record.read("strategies_exit", tmp_path)[0]
        assert float(ended["changed"]) == pytest.approx(1 / 12, abs=1e-3) and 0.25 < float(ended["tokens_kept"]) < 0.38
        assert float(of["auto", "8"]["accuracy"]) > float(of["best_of_n", "8"]["accuracy"]) and 0.2 < float(of["auto", "8"]["tokens_kept"]) < 0.7
        heads = {r["measure"]: float(r["value"]) for r in record.read("strategies_choosing", tmp_path) if r["family"] == family}
        assert heads["auc_within"] == 1.0 and heads["best_of@32"] == heads["any@32"] and heads["right to step 4"] == 1.0 > heads["right to step 5"]
        assert heads["within_beyond"] > 0.95, "length tells nothing here"
    assert (tmp_path / "strategies.png").stat().st_size > 10_000
    shown = {line[0]: line[1:] for line in report.strategies(tmp_path)}
    assert len(shown["`prune`"]) == 1 + 2 * len(FAMILIES) and "50%" in shown["`prune`"] and shown["`auto`"][0] == "best of 8"


def test_pictures_show_what_all_questions_would_give():
    """A strategy that was asked a part of the questions stands where the paired difference puts it."""
    row = {"accuracy_low": 0.0, "accuracy_high": 1.0, "n": 8}
    best, other, one = tables._beside([
        row | {"strategy": "best_of_n", "accuracy": 0.5, "difference": 0.0}, row | {"strategy": "replace", "accuracy": 0.7, "difference": 0.1},
        {**row, "strategy": "one", "accuracy": 0.3, "n": 1},
    ])  # fmt: skip
    assert (best["accuracy"], one["accuracy"]) == (0.5, 0.3)
    assert other["accuracy"] == pytest.approx(0.6) and other["accuracy_high"] == pytest.approx(0.9)


def test_every_strategy_is_compared(tmp_path):
    for name, text in {
        "prune.json": '{"threshold": 1.0, "n": 8, "min_steps": 1, "risk": 0.1, "questions": 9}',
        "select.json": '{"exponent": 4.0, "growth": 0.0, "questions": 9}',
    }.items():
        for home in (tmp_path / "home", tmp_path / f"home{rules.THEN_SELECT}"):
            home.mkdir(exist_ok=True)
            (home / name).write_text(text)
    tmp_path = tmp_path / "home"
    runs = compare.runs(tmp_path, 8)
    assert list(runs["best_of_n"]) == ["best_of_n", "majority", "weighted_vote", "select", "rpc"], "they are given one run"
    parts = [part for n in rules.NS for part in compare.runs(tmp_path, n).values()]
    named = {name for part in parts for name in part if not name.endswith(", then select")} - {"step_beam by mean"}
    assert named - {"prune, then select, at random"} == {*NAMES, *(f"{name}, at random" for name in compare.RANDOM if "select" not in name)} - {*compare.APART}
    assert [runs[name][name].chooser is not None for name in ("prune", "prune, then select", "prune, then select, at random")] == [False, True, True]
    assert list(runs["replace"]) == ["replace", "replace, then select"]
    assert all(s.n == 8 for part in runs.values() for s in part.values())


def test_heads_read_a_layer_that_was_recorded():
    assert set(learn.LAYERS) >= {-2} and Tap(learn.LAYERS).at == "predict"


@pytest.mark.parametrize("threshold", [0.02, 0.2])
def test_a_replay_stops_whom_the_search_stops(threshold):
    """Candidates that were decoded to their ends, and prune on them; beside prune while they decode."""
    model, rule = reflective_model(answer="([A-E])"), Prune(threshold=threshold, n=4)
    engine, questions = TreeEngine(model, **SAMPLING), [a + b for a in "ABC" for b in "DEFGHIJK"]

    def searched(strategy):
        asks = [Ask(model.encode(q)[0].tolist(), strategy, max_new_tokens=24, seed=3, number=i, **SAMPLING) for i, q in enumerate(questions)]
        return [model.generation(q, found) for q, found in zip(questions, Search(engine, model.reader).run(asks), strict=True)]

    stopped = []
    for run, expected in zip(searched(by_name("best_of_n", n=4)), searched(rule), strict=True):
        if {3, 4} & {token for c in run.candidates for token in c.token_ids}:
            continue  # tags within a response, before which nothing counts any more
        there = [replay.Drawn(**json.loads(json.dumps(asdict(c)))) for c in replay.drawn(model, run)]
        found = replay.replay(rule, there)
        assert [(c.status == "stopped", c.tokens, len(c.step_scores)) for c in found] == [
            (c.status == "stopped", c.tokens, len(c.step_scores)) for c in expected.candidates
        ]
        assert rule.choose(found) == expected.best.number
        stopped += [c.status == "stopped" for c in found]
    assert 0 < sum(stopped) < len(stopped) and len(stopped) >= 12
    with pytest.raises(ValueError, match="has to be decoded"):
        replay.replay(compare.AtRandom(n=4, inner=by_name("particles", n=4)), there)
