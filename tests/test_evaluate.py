"""What candidates in files are worth: against cases done by hand, and against all groups of candidates formed one by one."""

import csv
import io
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter

import pytest
import tiny
from rich.console import Console
from rich.progress import Progress

from reflective.evaluate import CHOICES, Report, evaluate
from reflective.scoring.scores import aggregate
from reflective.search.selection import any_of, best_of, saturation, select, subsets


def candidate(answer, score, *, steps=None, tokens=10, **more):
    text = "no idea" if answer is None else f"It is {answer}."
    return {"text": text, "score": score, "step_scores": steps or [score], "answer": answer, "tokens": tokens} | more


def row(question, right, *candidates, **more):
    return {"question": question, "answer": right, "candidates": list(candidates)} | more


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def values(report, result=None, aggregation=None):
    rows = [r for r in report.rows if r.result == (result or next(iter(report.counts)))]
    return {r.name: r.value for r in rows if aggregation in (None, r.aggregation)}


def forms(tmp_path, rows):
    """The same rows as JSONL and as parquet."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    return write(tmp_path / "rows.jsonl", rows), tmp_path / "rows.parquet"


def one_by_one(group, metric):
    """Outcome of ``metric`` for a group of ``(score, right, answer)``; ties shared."""
    best = max(score for score, _, _ in group)
    by_score = [right for score, right, _ in group if score == best]
    parties = {a: [c for c in group if c[2] == a] for _, _, a in group if a is not None}
    if metric == "any":
        return max(right for _, right, _ in group)
    if metric == "best_of" or (metric == "weighted_vote" and not parties):
        return sum(by_score) / len(by_score)
    if metric == "weighted_vote":
        votes = {a: sum(score for score, _, _ in party) for a, party in parties.items()}
        parties = {a: [c for c in party if c[0] == max(party)[0]] for a, party in parties.items()}
    else:
        parties = parties or {None: group}
        votes = {a: len(party) for a, party in parties.items()}
    elected = [party for a, party in parties.items() if votes[a] == max(votes.values())]
    return sum(sum(right for _, right, _ in party) / len(party) for party in elected) / len(elected)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_means_over_all_groups(tmp_path, seed):
    """Ties of scores and votes, no answers, answers judged both ways, questions of different sizes. Scores are eighths."""
    rng = random.Random(seed)
    questions = {}
    for q in range(6):
        size = rng.choice([1, 5, 8])
        questions[f"q{q}"] = [
            (rng.randrange(5) / 8, rng.randrange(2), rng.choice([None, "1", "2", "3"])) for _ in range(size)
        ]
    rows = [
        row(q, "-", *(candidate(a, s, right=r, tokens=k) for k, (s, r, a) in enumerate(drawn)))
        for q, drawn in questions.items()
    ]
    report = evaluate([write(tmp_path / "a.jsonl", rows)], outcome="right", n=[1, 2, 3, 5], resamples=2)
    assert {r.name for r in report.rows if r.n} == {"pass@1"} | {f"{m}@{n}" for m in CHOICES for n in (2, 3, 5)}
    for r in report.rows:
        if r.n:
            metric = "any" if r.metric == "pass" else r.metric
            means = []
            for drawn in questions.values():
                groups = list(itertools.combinations(drawn, r.n))
                means += [sum(one_by_one(g, metric) for g in groups) / len(groups)] if groups else []
            assert r.value == pytest.approx(sum(means) / len(means), abs=1e-12), r.name
            sizes = [len(drawn) for drawn in questions.values() if len(drawn) >= r.n]
            assert (r.questions, r.of) == (len(sizes), 6)
            assert r.tokens == pytest.approx(r.n * sum((m - 1) / 2 for m in sizes) / len(sizes)), "mean tokens, n times"


def test_by_hand(tmp_path):
    """Right, wrong, right, wrong, with 0.9, 0.8, 0.1, 0.7: of six pairs 0.9 wins three, 0.8 two (wrong), 0.7 one (wrong)."""
    rows = [row("q", "4", candidate("4", 0.9), candidate("5", 0.8), candidate("4.0", 0.1), candidate("6", 0.7))]
    found = values(evaluate([write(tmp_path / "a.jsonl", rows)]))
    assert found["pass@1"] == 0.5
    assert found["best_of@2"] == pytest.approx(3 / 6)
    assert found["any@2"] == pytest.approx(5 / 6), "all pairs but that of the two wrong ones"
    assert found["majority@2"] == pytest.approx((1 + 4 / 2) / 6), "4 and 4.0 are one answer; four pairs are split"
    assert found["majority@4"] == found["weighted_vote@4"] == found["best_of@4"] == found["any@4"] == 1
    assert "majority@8" not in found


def test_votes_of_many_candidates_rest_on_a_sample_of_the_groups():
    rng = random.Random(0)
    drawn = [(rng.randrange(1, 99) / 100, rng.randrange(2), rng.randrange(4)) for _ in range(14)]
    score, right, answer = (list(column) for column in zip(*drawn, strict=True))
    groups = subsets(14, 7)
    assert groups.shape == (512, 7) and (groups == subsets(14, 7)).all()
    assert all(len(set(g)) == 7 for g in groups.tolist())
    found = select(*([column[i] for i in groups.ravel()] for column in (score, right, answer)), 7)
    every = list(itertools.combinations(drawn, 7))
    for metric in CHOICES:
        exact = sum(one_by_one(g, metric) for g in every) / len(every)
        assert found[metric].mean() == pytest.approx(exact, abs=0.07), metric
    exact = {m: sum(one_by_one(g, m) for g in every) / len(every) for m in ("best_of", "any")}
    assert best_of(score, right, 7) == pytest.approx(exact["best_of"], abs=1e-12)
    assert any_of(right, 7) == pytest.approx(exact["any"], abs=1e-12)


def test_intervals_are_over_questions(tmp_path):
    """100 questions, each always right or always wrong: the interval is that of 100 throws of a coin, not of 800."""
    rows = [row(f"q{q}", "1", *[candidate(str(q % 2), 0.5)] * 8) for q in range(100)]
    report = evaluate([write(tmp_path / "a.jsonl", rows)])
    for r in report.rows:
        if r.n:
            assert r.value == 0.5 and r.questions == 100
            assert r.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015), r.name
            assert r.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015), r.name


def test_differences_are_paired(tmp_path):
    """Half the questions are always right in the one file, and so are the others' quarter in the other: wide intervals each,
    a narrow one for what is common to both."""
    one = [row(f"q{q}", "1", *[candidate(str(int(q < 50)), 0.5)] * 4) for q in range(100)]
    share = [candidate(str(int(k == 0)), 0.5) for k in range(4)]
    two = [row(f"q{q}", "1", *([candidate("1", 0.5)] * 4 if q < 50 else share)) for q in range(100)]
    three = [row(f"other {q}", "1", candidate("1", 0.5)) for q in range(3)]
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("one", one), ("two", two), ("three", three))]
    report = evaluate(paths)
    first, second, third = ({r.name: r for r in report.rows if r.result == name} for name in ("one", "two", "three"))
    better = second["pass@1"]
    assert better.difference == pytest.approx(0.125) and better.shared == 100
    assert better.difference_low == pytest.approx(0.125 - 1.96 * 0.0125, abs=0.004)
    assert better.difference_high == pytest.approx(0.125 + 1.96 * 0.0125, abs=0.004)
    assert better.high - better.low > 2 * (better.difference_high - better.difference_low)
    assert first["pass@1"].shared == third["pass@1"].shared == 0 and math.isnan(third["pass@1"].difference)
    alone = evaluate(paths[1:2])
    assert [(r.value, r.low, r.high) for r in alone.rows if r.n] == [
        (r.value, r.low, r.high) for r in report.rows if r.n and r.result == "two"
    ], "the company of other files changes nothing"


def test_aggregations(tmp_path):
    rng = random.Random(1)
    rows = [
        row(
            f"q{q}",
            "1",
            *(candidate(str(rng.randrange(2)), 0.5, steps=[rng.random() for _ in range(3)]) for _ in range(4)),
        )
        for q in range(20)
    ]
    for r in rows:
        for c in r["candidates"]:
            c["score"] = aggregate(c["step_scores"])
    names = ("geometric_mean", "mean", "min", "last", "product")
    report = evaluate([write(tmp_path / "a.jsonl", rows)], aggregations=names, n=[2], resamples=2)
    for name in names:
        pairs = []
        for r in rows:
            drawn = [(aggregate(c["step_scores"], name), int(c["answer"]), c["answer"]) for c in r["candidates"]]
            pairs += itertools.combinations(drawn, 2)
        expected = sum(one_by_one(g, "best_of") for g in pairs) / len(pairs)
        assert values(report, aggregation=name)["best_of@2"] == pytest.approx(expected, abs=1e-12), name
    assert len({r.value for r in report.rows if r.name == "best_of@2"}) > 1
    assert sum(r.name == "majority@2" for r in report.rows) == 1, "votes without scores know no aggregation"


def test_what_is_missing_is_counted(tmp_path):
    rows = [
        row("whole", "1", candidate("1", None), candidate("2", 0.1), candidate(None, 0.2)),
        row("whole", "1", candidate("1", 0.9)),  # more of the same question
        {"question": "failed", "answer": "1", "candidates": None, "error": "why"},
        row("unknown", None, candidate("1", 0.5), candidate("1", 0.5)),
        row("cut", "1", candidate("1", 0.5), candidate("1", 0.5, status="interrupted")),
    ]
    for path in forms(tmp_path, rows):
        report = evaluate([path], n=[2, 4])
        assert report.counts["rows"] == {
            "questions": 4, "without_candidates": 2, "without_verdict": 1, "candidates": 6, "candidates_without_verdict": 2,
            "candidates_without_score": 1, "candidates_without_answer": 1, "interrupted_rows": 1, "steered": False,
            "verdict": "answer", "task": None,
        }  # fmt: skip
        pass_1, *others = report.rows
        assert (pass_1.value, pass_1.questions, pass_1.of) == (0.5, 1, 4)
        assert {r.name: r.value for r in others}["best_of@4"] == 1, "no score counts as 0"
        assert {r.name: r.value for r in others}["best_of@2"] == pytest.approx(3 / 6), (
            "only 0.9 beats another's 0.1 or 0.2"
        )


def test_what_a_strategy_chose(tmp_path):
    """A run that stopped candidates: what it chose, at what it decoded, and no numbers of draws that were none."""

    def steered(q, best, **how):
        return row(q, "1", candidate("1", 0.3), candidate("2", 0.4, **how), best=best, tokens=14)  # fmt: skip

    report = evaluate([
        write(tmp_path / "all.jsonl", [steered("a", 1), steered("b", 1)]),
        write(tmp_path / "prune.jsonl", [steered("a", 0, status="stopped"), steered("b", 1)]),
        write(tmp_path / "beam.jsonl", [steered("a", 0, parent=0), steered("b", 0)]),
    ])  # fmt: skip
    assert values(report, "all")["chosen"] == 0 and values(report, "all")["best_of@2"] == 0
    for name, value in (("prune", 0.5), ("beam", 1)):
        (only,) = (r for r in report.rows if r.result == name)
        assert (only.name, only.value, only.tokens, only.difference, only.shared) == ("chosen", value, 14, value, 2)
        assert report.counts[name]["steered"]
    with pytest.raises(ValueError, match="no question has so many independent candidates with a verdict; 0 at most"):
        evaluate([tmp_path / "prune.jsonl"], n=[2])


def published(question, right, *solutions):
    """A line of the published ``inference.py``."""
    prompt = f"<|user|>{question} Put it into \\boxed{{7}}.<|assistant|>"
    texts = [
        prompt + ("<think>Hm.\n\n" if a is None else f"<think>Well.\n\n</think>\\boxed{{{a}}}") for a, _ in solutions
    ]
    output = {"content": prompt, "time": 1.5, "solution_lst": texts, "score_lst": [score for _, score in solutions]}
    return {"prompt": question, "answer": right, "output": output}


@pytest.fixture
def published_files(tmp_path):
    """Three runs of two questions, cut short in the last; in two files."""
    write(tmp_path / "aime_0.jsonl", [
        published("One?", {"target": "7"}, (7, 0.9), (8, 0.4)),
        published("Two?", "1/2", (r"\frac{1}{3}", 0.5), (r"\frac{1}{2}", 0.5)),
        published("One?", {"target": "7"}, (7, 0.2), (9, 0.3)),
    ])  # fmt: skip
    write(tmp_path / "aime_1.jsonl", [
        published("Two?", "1/2", ("0.5", 0.8), (None, 0.1)),
        published("One?", {"target": "7"}, (None, 0.95), (7, 0.1)),
    ])  # fmt: skip
    return tmp_path


def test_published_files(published_files):
    """The numbers of compute_metric.py are those that it prints for these files."""
    report = evaluate([published_files / "aime_*.jsonl"])
    assert report.counts["aime_*"]["questions"] == 2 and report.counts["aime_*"]["candidates"] == 10
    assert report.counts["aime_*"]["candidates_without_answer"] == 2, "what stands in the prompt is no answer"
    found = values(report)
    # One: 7 8 | 7 9 | - 7; Two: 1/3 1/2 | 0.5 -. What has no box is read in the prompt, where one holds 7.
    assert found["pass@1"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    # Pairs: 0.9 right, then 0.2 right against 0.3 wrong; of equals the first, 1/3; 0.8 right. The third pair of One has none.
    assert found["compute_metric.py@2"] == (1 + 0 + 0 + 1) / 4
    assert found["compute_metric.py@4"] == (1 + 1) / 2
    assert found["compute_metric.py@1"] == pytest.approx((1 + 0 + 1 + 0 + 0 + 1 + 1 + 0) / 8)
    # Fours of One: 0.95 is in ten of 15, 0.9 in four of the others, and the last has 8 at 0.4; the four of Two: 0.8.
    assert found["best_of@4"] == pytest.approx((14 / 15 + 1) / 2)
    ours = evaluate([published_files / "aime_*.jsonl"], verifier="answer")
    assert values(ours)["pass@1"] == pytest.approx((3 / 6 + 2 / 4) / 2), "the response alone"
    assert values(ours)["compute_metric.py@1"] == found["compute_metric.py@1"], "whatever judges the rest"
    assert {(r.metric == "compute_metric.py", r.verdict) for r in ours.rows} == {
        (False, "answer"), (True, "aime of compute_metric.py"),
    }  # fmt: skip
    part = values(evaluate([published_files / "aime_0.jsonl"]))
    assert part["compute_metric.py@2"] == (1 + 0) / 2 and "compute_metric.py@4" not in part
    assert not any(name.startswith("compute") for name in values(evaluate([
        write(published_files / "ours.jsonl", [row("q", "1", candidate("1", 0.5))])
    ])))  # fmt: skip


def choices(question, right, *letters, prompt="ANSWER: $LETTER"):
    output = {"content": prompt, "time": 1.0, "score_lst": [1 - k / 10 for k in range(len(letters))],
              "solution_lst": [f"{prompt}<think>\nx.\n\n</think>答案：{letter}" for letter in letters]}  # fmt: skip
    return {"prompt": question, "answer": right, "output": output}


@pytest.mark.parametrize("name", ["ceval_1", "a"])
def test_published_choices(tmp_path, name):
    """Their answers are letters behind a word, without any box."""
    path = write(tmp_path / f"{name}.jsonl", [choices(f"题{a}", a, a, "b", "x") for a in "ABCD"])
    report = evaluate([path], n=[2])
    found = values(report)
    assert report.counts[name] | {"verdict": "ceval of compute_metric.py", "task": "ceval"} == report.counts[name]
    assert (found["compute_metric.py@1"], found["compute_metric.py@2"]) == (pytest.approx((4 + 1) / 12), 1)
    assert found["best_of@2"] == pytest.approx((3 * 2 / 3 + 1) / 4)
    assert report.counts[name]["candidates_without_answer"] == 4, "x"
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.table())
    assert "ceval of compute_metric.py" in console.export_text()
    assert values(evaluate([path], task="aime24"))["compute_metric.py@1"] == 0, "as there, given the wrong task"


def test_what_judges_published_files(tmp_path):
    rows = [choices("one", "A", "A", "B"), choices("two", "B", "B", "A")]
    path = write(tmp_path / "ceval.jsonl", rows)
    for settings, verdict, pass_1 in (
        ({}, "ceval of compute_metric.py", 0.5), ({"verifier": "answer"}, "answer", 0), ({"pattern": "：(.)"}, "answer", 0.5),
        ({"outcome": "ok"}, "column ok", 1), ({"verifier": lambda text, question: 1}, "<lambda>", 1),
    ):  # fmt: skip
        write(path, [row | {"ok": [1, 1]} for row in rows])
        report = evaluate([path], n=[], **settings)
        assert (report.counts["ceval"]["verdict"], values(report)["pass@1"]) == (verdict, pass_1)
        assert values(report)["compute_metric.py@1"] == 0.5, "always by its own"
    right = write(tmp_path / "right.jsonl", [{"question": "one", "answer": "B"}, {"question": "two", "answer": "x"}])
    other = values(evaluate([path], answers=right))
    assert (other["pass@1"], other["compute_metric.py@1"]) == (0.25, 0.5), "there the file's own answers count"
    own = write(tmp_path / "aime.jsonl", [row("q", "204", candidate(None, 0.5) | {"text": "The answer is 204"})])
    assert evaluate([own]).counts["aime"] | {"verdict": "answer", "task": None} == evaluate([own]).counts["aime"]
    judged = evaluate([own], task="aime24")
    assert values(judged) == {"pass@1": 1}, "the question may have the box, but compute_metric.py reads other files"


def test_tasks_that_compute_metric_cannot_have(tmp_path):
    letters, numbers = choices("one", "A", "A"), published("two", "7", (7, 0.5))
    mixed = [write(tmp_path / "1.jsonl", [letters]), write(tmp_path / "2.jsonl", [numbers])]
    report = evaluate([tmp_path / "*.jsonl"])
    assert report.counts["*"]["verdict"] == "aime of compute_metric.py, ceval of compute_metric.py"
    assert report.counts["*"]["task"] == "none: several tasks" and values(report) == {"pass@1": 1}
    assert {r.verdict for r in evaluate(mixed).rows} == {"aime of compute_metric.py", "ceval of compute_metric.py"}
    other = write(tmp_path / "other.jsonl", [letters, numbers])
    report = evaluate([other], verifier="exact")
    assert report.counts["other"]["task"] == "none: unknown task, give task="
    assert not any(name.startswith("compute") for name in values(report))
    programs = write(tmp_path / "livecodebench.jsonl", [letters | {"answer": "print(1)", "ok": [1]}])
    with pytest.raises(ValueError, match="livecodebench.jsonl: its answers are programs, .* give outcome=COLUMN"):
        evaluate([programs])
    assert values(evaluate([programs], outcome="ok")) == {"pass@1": 1}
    with pytest.raises(ValueError, match="task='math500'; compute_metric.py knows"):
        evaluate([other], task="math500")


def test_groups_of_compute_metric(tmp_path):
    """Prompts as they stand, the first row's answer, the first of equal scores, NaN where max leaves it."""
    rows = [choices("q", "A", "A", "B"), choices("q ", "B", *"BBBB"), choices("q", "B", "B", "B")]
    rows[0]["output"]["score_lst"] = [math.nan, 0.9]
    path = write(tmp_path / "ceval.jsonl", rows)
    found = values(evaluate([path], n=[2], verifier=lambda text, question: 1))
    assert found["compute_metric.py@1"] == (1 + 0 + 0 + 0 + 4) / 8
    assert found["compute_metric.py@2"] == (1 + 0 + 1 + 1) / 4, "NaN in front stays the largest"


def test_tokens_by_a_tokenizer(published_files):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(published_files / "tokenizer.json"))
    path = published_files / "aime_0.jsonl"
    assert math.isnan(evaluate([path]).rows[0].tokens)
    for place in (published_files, published_files / "tokenizer.json"):
        assert evaluate([path], tokenizer=place).rows[0].tokens == 2, "'<think>Well.' and the rest, without the prompt"
    rows = [row("q", "1", candidate("1", 0.5, tokens=5), candidate("1", 0.5, tokens=None))]
    mixed = evaluate([write(published_files / "a.jsonl", rows)], tokenizer=published_files)
    assert mixed.rows[0].tokens == (5 + 3) / 2, "recorded ones are believed"


def test_scored_responses(tmp_path):
    one = [{"question": "q", "answer": "7", "response": r"so \boxed{7}", "score": 0.9, "step_scores": [0.9]},
           {"question": "q", "answer": "7", "response": "so <answer>8</answer>", "score": 0.1, "step_scores": [0.1]}]  # fmt: skip
    several = [{"prompt": " q", "answer": 7, "responses": [r"so \boxed{7}", "so <answer>8</answer>"], "score": [0.9, 0.1],
                "step_scores": [[0.9], [0.1]]}]  # fmt: skip
    found = [values(evaluate([path], aggregations=["last"])) for path in (
        *forms(tmp_path, one), write(tmp_path / "several.jsonl", several)
    )]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert (found[0]["pass@1"], found[0]["best_of@2"], found[0]["majority@2"]) == (0.5, 1, 0.5)
    failed = write(
        tmp_path / "failed.jsonl", [*several, {"question": "x", "answer": 1, "responses": ["a"], "score": None}]
    )
    for how in ("geometric_mean", "min"):
        assert evaluate([failed], aggregations=[how]).counts["failed"]["candidates_without_score"] == 1


def test_ways_to_judge(tmp_path, monkeypatch):
    rows = [
        row("q", None, candidate("x", 0.5) | {"text": "answer: (9)</think>answer: (4)"}, candidate("4", 0.5)),
        row("p", None),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    right = write(tmp_path / "right.jsonl", [{"problem": "q", "answer": 4}, {"question": "p", "answer": "5"}])
    assert values(evaluate([path], answers=right))["pass@1"] == 0.5, "what was recorded"
    assert values(evaluate([path], answers=right, verifier="exact"))["pass@1"] == 0.5
    assert values(evaluate([path], answers=right, pattern=r"answer: \((.)\)"))["majority@2"] == 1, "the other has none"
    (tmp_path / "judges.py").write_text("def short(response, question):\n    return len(response) > 12\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert values(evaluate([path], verifier="judges:short"))["pass@1"] == 0.5, "the text, without any right answer"
    rows[0] |= {"correct": [True, None], "candidates": rows[0]["candidates"]}
    told = evaluate([write(tmp_path / "b.jsonl", [rows[0]])], outcome="correct")
    assert (values(told)["pass@1"], told.counts["b"]["candidates_without_verdict"]) == (1, 1)


def test_math(tmp_path):
    pytest.importorskip("math_verify")
    rows = [row("q", r"\frac{1}{2}", *(candidate(None, 0.5) | {"text": t} for t in ("It is $0.5$", "It is $2$")))]
    assert values(evaluate([write(tmp_path / "a.jsonl", rows)], verifier="math"))["pass@1"] == 0.5


@pytest.fixture
def pair(tmp_path):
    """Two results of 12 questions, 8 candidates, one with tokens and a choice; in one question only 4."""
    rng = random.Random(2)
    paths = []
    for name, tokens in (("one", 10), ("two [b]", None)):
        rows = []
        for q in range(12):
            drawn = [candidate(str(rng.randrange(3)), rng.random(), tokens=tokens) for _ in range(4 if q == 0 else 8)]
            rows.append(row(f"q{q}", "1", *drawn, best=0, tokens=tokens and tokens * len(drawn)))
        paths.append(write(tmp_path / f"{name}.jsonl", rows))
    return paths


def test_the_csv_file_holds_every_number(pair, tmp_path):
    report = evaluate(pair)
    report.write_csv(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for line, r in zip(lines, report.rows, strict=True):
        for name, value in vars(r).items():
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            assert line[name] == ("" if missing else str(value))
    assert json.loads(json.dumps(report.json()))["results"].keys() == {"one", "two [b]"}


def test_what_it_tends_to(pair):
    found = values(evaluate(pair[:1], n=[2, 3, 4, 8]))
    for metric in CHOICES:  # at 8 one question is missing
        fit = saturation([1, 2, 3, 4], [found["pass@1"], *(found[f"{metric}@{n}"] for n in (2, 3, 4))])
        assert (found[f"{metric} limit"], found[f"{metric} n95"]) == pytest.approx((fit.limit, fit.n95), rel=1e-6)
    assert not any("limit" in name for name in values(evaluate(pair[:1]))), "three numbers fit any curve"


def test_the_picture_shows_numbers_of_the_csv_file(pair, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    for paths, panels in ((pair[:1], 2), (pair[1:], 1), (pair, 2)):
        report = evaluate(paths, n=[2, 3, 4, 8])
        report.plot(tmp_path / "out.png")
        assert (tmp_path / "out.png").stat().st_size > 10_000
        axes = drawn.pop().axes
        known = {round(v, 9) for r in report.rows for v in vars(r).values() if isinstance(v, int | float)} | {0, 1}
        assert len(axes) == panels and all(line.get_ydata().size for ax in axes for line in ax.lines[:1])
        for line in itertools.chain.from_iterable(ax.lines for ax in axes):
            assert {round(float(v), 9) for v in (*line.get_xdata(), *line.get_ydata())} <= known
        plt.figure().clear()
    plt.close("all")


def test_table(pair):
    console = Console(width=140, record=True, file=io.StringIO())
    with Progress(console=console, disable=True) as bars:
        console.print(evaluate(pair, aggregations=["geometric_mean", "min"], bars=bars).table())
    assert [task.completed for task in bars.tasks] == [12, 12]
    text = console.export_text()
    assert "two [b]" in text and "best_of@4 (min)" in text and "11 questions" in text and "without verdict" in text
    counted = Counter(word for line in text.splitlines() for word in line.split()[:1])
    assert counted["majority@2"] == 1 and counted["best_of@2"] == 2


def test_files_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.jsonl", [row("q", "1", candidate("1", 0.5))])
    paths = [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"]
    assert list(evaluate(paths).counts) == list(map(str, paths))
    assert list(evaluate(paths[:1] * 2).counts) == ["x"], "a file given twice is one"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"question": "q", "text": "x"}], {}, r"line 1: expected candidates, output .* found question, text"),
        ([{"candidates": []}], {}, "line 1: expected a question, prompt or problem"),
        ([[1]], {}, "line 1: expected an object"),
        ([row("q", "1", {"text": None})], {}, "line 1, candidate 0: text=None; expected a text"),
        ([row("q", "1", candidate("1", "high"))], {}, "candidate 0: score='high'; expected a number or null"),
        ([row("q", "1") | {"candidates": ["x"]}], {}, "candidates: expected a list of objects"),
        ([published("q", "1", (1, 0.5)) | {"output": {"solution_lst": ["a"], "score_lst": []}}], {}, "1 of text, 0 of score"),
        ([published("q", "1", (1, 0.5))], {"aggregations": ["min"]}, "no step_scores to aggregate by min"),
        ([row("q", "1", candidate("1", 0.5))], {"aggregations": ["median"]}, "aggregation='median'"),
        ([row("q", "1", candidate("1", 0.5))], {"aggregations": []}, "aggregations: expected at least one"),
        ([row("q", None, candidate("1", 0.5))], {}, "no candidate has a verdict; its rows need an answer"),
        ([row("q", "1", candidate("1", 0.5))], {"n": [4]}, r"n=\[4\]: no question has so many .* 1 at most"),
        ([row("q", "1", candidate("1", 0.5))], {"n": [0, 1]}, r"n=\[0\]"),
        ([row("q", "1", candidate("1", 0.5))], {"outcome": "right"}, "outcome='right' is neither a field of it nor a column"),
        ([row("q", "1", candidate("1", 0.5, right=2))], {"outcome": "right"}, "right=2.0; expected 1, 0 or null"),
        ([row("q", "1", candidate("1", 0.5), told=1)], {"outcome": "told"}, "told: expected a verdict for each candidate"),
        ([row("q", "1", candidate("1", 0.5), told=[])], {"outcome": "told"}, "told: expected a verdict for each candidate"),
        ([row("q", "1", candidate("1", 0.5))], {"pattern": "x"}, "pattern='x': expected a group"),
        ([row("q", "1", candidate("1", 0.5))], {"pattern": "("}, r"pattern='\(' is no regular expression"),
        ([row("q", "1", candidate("1", 0.5))], {"verifier": "sense"}, "verifier='sense'"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate([write(tmp_path / "a.jsonl", rows)], **settings)


def test_other_files_that_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("q", "1", candidate("1", 0.5))])
    twice = write(tmp_path / "twice.jsonl", [{"question": "q", "answer": 1}, {"question": "q", "answer": 2}])
    with pytest.raises(ValueError, match="line 2: another answer to the same question"):
        evaluate([path], answers=twice)
    with pytest.raises(ValueError, match="line 1: no answer"):
        evaluate([path], answers=write(tmp_path / "none.jsonl", [{"question": "q"}]))
    with pytest.raises(FileNotFoundError, match="as a pattern it matches nothing"):
        evaluate([tmp_path / "none_*.jsonl"])
    with pytest.raises(FileNotFoundError, match="tokenizer: .* does not exist"):
        evaluate([path], tokenizer=tmp_path)
    with pytest.raises(ValueError, match="at least one file"):
        evaluate([])


def test_it_needs_neither_torch_nor_transformers(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("q", "1", candidate("1", 0.5), candidate("2", 0.2))])
    code = (
        "import sys; from reflective.evaluate import evaluate; report = evaluate(sys.argv[1:]); report.table();"
        "sys.exit(' '.join({'torch', 'transformers', 'matplotlib'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=tiny.PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_report_is_plain():
    assert Report({}, []).json() == {"results": {}, "metrics": []}
