"""What people see of scores: fragments of notebooks, whole pages, and the page of ``reflective view`` in Chromium."""

import gzip
import json
import math
import random
import re
import shlex
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_cli import run
from test_evaluate import write

import reflective as rf
from reflective import view
from reflective.evaluate import evaluate
from reflective.evaluate.shown import show
from reflective.scoring.scores import AGGREGATIONS, aggregate
from reflective.search.results import Candidate, Generation
from reflective.search.stopped import STOPPED
from reflective.search.strategies import NAMES
from reflective.view import escape, fragments

pytest_plugins = ["browser"]

# What a trace may hold, and no page may mistake for its own.
NASTY = [
    "<script>window.hacked = 1; document.title = 'hacked'</script>",
    "</script><script>window.hacked = 2</script>",
    "</script\n><img src=x onerror='window.hacked = 3'>",
    "<!-- <script> --><!--",
    "]]> </textarea></title></style><b onmouseover=window.hacked=4>bold</b>",
    "\"' onfocus=window.hacked=5 autofocus x='",
    "& &amp; &lt;script&gt; &#60;",
    "a\u2028b\u2029c",
    "\u202edesrever\u202c \u2066isolate\u2069 \u200fmark",
    "{{title}} ${window.hacked = 6} $& $1 \\u003c",
    "𝒳 = 👩‍👩‍👧 é e\u0301 中文",
    "javascript:window.hacked=7",
]
UNSEEN = ["null\0null", "bell\a esc\x1b[31m del\x7f", "half \ud800 pair", "tail \udfff", "\ud83d\ude00 whole"]
SEEN = ["null␀null", "bell␇ esc␛[31m del␡", "half \ufffd pair", "tail \ufffd", "😀 whole"]


class Parsed(HTMLParser):
    """Tags and text as a browser has them."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "hr", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def of(self, kind):
        return [a for _, a in self.tags if kind in (a.get("class") or "").split()]


def candidate(steps, scores, rest="", how="geometric_mean", **more):
    """Of the texts of its steps and what follows the last."""
    spans, at = [], 0
    for step in steps:
        spans.append((at, at + len(step)))
        at += len(step)
    return Candidate("".join(steps) + rest, aggregate(scores, how), list(scores), spans, [7] * 5, **more)


def generation(candidates, best=0, **more):
    return Generation("Question: 1 + 1\n", candidates, candidates[best], **{"strategy": "best_of_n", "tokens": 30, **more})


# -- Numbers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_running_score_is_that_of_the_steps_so_far(how):
    scores = [0.9, 0.0, 0.31, 1.0, 0.5]
    expected = [aggregate(scores[:k], how) for k in range(1, 6)]
    assert view.running(scores, how) == pytest.approx(expected, rel=1e-12)
    broken = view.running([0.5, math.nan, 0.7], how)
    assert broken[0] == pytest.approx(0.5) and all(map(math.isnan, broken[1:]))
    assert view.running([], how) == []


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_aggregation_is_told_from_the_scores(how):
    rng = random.Random(3)
    drawn = [[rng.uniform(0.1, 0.9) for _ in range(rng.randint(1, 6))] for _ in range(20)]
    found = [(round(aggregate(s, how), 6), s) for s in drawn] + [(math.nan, [0.5]), (0.0, []), (0.3, [math.nan])]
    assert view.aggregation_of(found) == how
    assert view.aggregation_of([*found, (0.99, [0.1, 0.2])]) is None
    assert view.aggregation_of([(0.0, [])]) is None


# -- Text is data ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY + UNSEEN)
def test_text_stays_text(text):
    """In HTML, in attributes, and in JSON within a script element."""
    expected = dict(zip(UNSEEN, SEEN, strict=True)).get(text, text)
    parsed = Parsed(f'<p title="{escape.text(text)}">{escape.text(text)}</p>')
    assert parsed.tags == [("p", {"title": expected})] and "".join(parsed.text) == expected
    given = escape.in_script({"t": escape.plain(text), escape.plain(text): 1})
    assert not set(given) & set("<>&\u2028\u2029") and given.encode()
    assert json.loads(given) == {"t": expected, expected: 1}


def test_everything_that_can_hold_text_stays_text(tmp_path):
    everything = "".join(NASTY + UNSEEN)
    c = candidate([t + ".\n\n" for t in NASTY + UNSEEN], [0.5] * 17, everything, answer=everything, error=everything, status="stopped")
    c.further = {everything: candidate([everything], [0.4])}
    g = generation([c], strategy=everything, chosen_by=everything)
    g.prompt = everything
    scores = rf.TrajectoryScores(torch.tensor([0.5]), torch.tensor([1]), [torch.tensor([0.5])], [torch.tensor([3])], {0: everything})
    for source in (g._repr_html_(), g.html(right=everything), c._repr_html_(), scores.html(texts=[everything])):
        parsed = Parsed(source)
        assert {tag for tag, _ in parsed.tags} <= {
            "div", "style", "article", "span", "svg", "title", "line", "text", "circle", "polyline", "small", "details", "summary", "p", "i", "section",
            "table", "thead", "tbody", "tr", "th", "td", "code",
        }  # fmt: skip
        assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on") or name in ("src", "href")]
        assert "".join("".join(NASTY + SEEN).split()) in "".join("".join(parsed.text).split())
    g.html(tmp_path / "page.html")
    parsed = Parsed((tmp_path / "page.html").read_text(encoding="utf-8").removeprefix("<!doctype html>"))
    assert sum(tag == "title" for tag, _ in parsed.tags) == 1 + len(parsed.of("line")) and not any(tag == "script" for tag, _ in parsed.tags)


def test_fragments_say_nothing_of_the_page_around_them():
    """Every selector is of what lies within .rf, and nothing is fetched."""
    style = re.sub(r"/\*.*?\*/", "", fragments.styles(), flags=re.DOTALL)
    selectors = re.findall(r"(?:^|[{}])\s*([^{}@;]+?)\s*\{", style)
    assert len(selectors) > 40
    for selector in selectors:
        assert re.search(r"\.rf(-view)?\b", selector), selector
        for one in re.split(r",\s*(?=\.)", re.sub(r":is\(.*\)", "", selector)):
            assert re.search(r"\.rf(-view)?\b", one), one
    assert "url(" not in style and "@import" not in style and "<" not in style


# -- Fragments -------------------------------------------------------------------------------------------------------------------------


def test_a_response():
    c = candidate(["One.\n\n", "Two\n.\n\n"], [0.25, 0.81], "So 3.", answer="3", status="length")
    source = c._repr_html_()
    parsed = Parsed(source)
    steps = parsed.of("step")
    assert [s["style"] for s in steps] == ["--score:0.250", "--score:0.810"]
    assert steps[1]["title"] == "step 2 of 2: 0.810, 0.450 so far"
    assert '>One.<small>0.250</small></span>\n\n<span class="step"' in source, "the number stands behind the step's words"
    assert "".join(parsed.text).count("cut at its token limit") == 1 and "0.450" in "".join(parsed.text)
    assert '<span class="rest">So 3.</span>' in source
    assert [s["aria-label"] for s in parsed.of("line")] == ["Score after each of 2 steps: 0.250 after the first, 0.450 after the last"]
    assert not parsed.of("right") and not parsed.of("wrong") and "right" not in "".join(parsed.text)
    assert Parsed(c.html(right="3.0")).of("right") and Parsed(c.html(right="4")).of("wrong")
    assert Parsed(candidate(["a.\n\n"], [0.5]).html(right="3")).of("wrong"), "none is a wrong one"


@pytest.mark.parametrize(
    ("c", "said", "steps"),
    [
        (candidate([], [], "no step at all"), "0 steps", 0),
        (candidate(["a.\n\n", "b.\n\n"], [math.nan, 0.5], error="not finite"), "No score: not finite", 2),
        (Candidate("spans are unknown", 0.5, [0.5], [], []), "spans are unknown", 0),
        (Candidate("spans beyond it", 0.5, [0.5], [(0, 99)], []), "spans beyond it", 0),
        (Candidate("", math.nan, [], [], [], error="out of memory"), "No score: out of memory", 0),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(c, said, steps):
    for source in (c._repr_html_(), generation([c])._repr_html_()):
        parsed = Parsed(source)
        assert said in "".join(parsed.text) and len(parsed.of("step")) == steps
        assert "nan" not in source.replace(' title="nan"', "").lower().replace("finance", "")


def test_scores_beyond_one_are_tinted_between_their_least_and_greatest():
    parsed = Parsed(candidate(["a\n\n", "b\n\n", "c\n\n"], [-3.0, 1.0, 5.0], how="mean", aggregation="mean")._repr_html_())
    assert [s["style"] for s in parsed.of("step")] == ["--score:0.000", "--score:0.500", "--score:1.000"]
    assert "-3.000" in "".join(parsed.text) and "line: mean so far" in "".join(parsed.text)


def test_further_heads_and_risk():
    c = candidate(["a\n\n"], [0.9])
    c.further = {"step": candidate(["a\n\n"], [0.9], higher_is_better=False, aggregation="mean")}
    parsed = Parsed(c._repr_html_())
    assert [s["style"] for s in parsed.of("step")] == ["--score:0.900", "--score:0.100"], "a high risk is poor"
    assert "by step: 0.900" in "".join(parsed.text) and "low is good" in "".join(parsed.text)


def test_candidates_side_by_side():
    """The chosen one first, then by score; those that were stopped last, and why."""
    c = [
        candidate(["a.\n\n"], [0.4], number=0, answer="1"),
        candidate(["b.\n\n"], [0.9], number=1, status="stopped"),
        candidate(["c.\n\n"], [0.6], number=2, answer="2"),
        candidate(["d.\n\n"], [0.5], number=3, answer="2", status="interrupted"),
    ]
    g = generation(c, strategy="prune", chosen_by="majority", interrupted=True)
    parsed = Parsed(g.html(right="1"))
    said = "".join(parsed.text)
    assert re.findall(r"Candidate (\d)", said) == ["0", "2", "1", "3"]
    assert [a["class"] for a in parsed.of("card")] == ["card is-chosen", "card", "card is-cut", "card is-cut"]
    assert len(parsed.of("picked")) == 1 and "chosen by majority: most give its answer" in said
    assert f"stopped by prune: {STOPPED['prune']}" in said and "4 candidates, 1 stopped, 30 tokens, interrupted" in said
    assert len(parsed.of("right")) == 1 and len(parsed.of("wrong")) == 3
    assert not parsed.of("tree"), "nobody forked"
    assert "Question: 1 + 1" in said


@pytest.mark.parametrize("how", ["score", "majority", "likelihood", "strategy", "only", "abstained", "luck"])
def test_what_it_was_chosen_by_is_said_in_words(how):
    said = "".join(Parsed(generation([candidate(["a.\n\n"], [0.4])], strategy="exit", chosen_by=how)._repr_html_()).text)
    expected = {
        "score": "by score (exit)", "strategy": "by the rule of exit", "only": "as the only one", "abstained": "exit promises nothing of it", "luck": "by luck",
    }  # fmt: skip
    assert expected.get(how, f"by {how}: ") in said


def test_why_a_candidate_was_stopped_is_known_for_every_strategy_that_stops():
    home = Path(rf.__file__).parent / "search" / "strategies"
    assert set(STOPPED) <= set(NAMES)
    for name in NAMES:
        file = home / f"{name}.py"
        stops = file.exists() and re.search(r"\bSTOP\b", file.read_text(encoding="utf-8"))
        assert not stops or name in STOPPED, name


def test_forks_are_a_tree():
    first, second = ["a.\n\n", "b.\n\n", "c.\n\n"], ["a.\n\n", "b.\n\n", "x.\n\n", "y.\n\n"]
    c = [
        candidate(first, [0.9, 0.8, 0.7], number=0),
        candidate(["z.\n\n"], [0.2], number=1),
        candidate(second, [0.9, 0.8, 0.1, 0.2], number=2, parent=0),
        candidate([*second[:3], "w.\n\n"], [0.9, 0.8, 0.1, 0.3], number=3, parent=2, status="stopped"),
    ]
    source = generation(c)._repr_html_()
    tree = Parsed(source[source.index('<svg class="tree"') : source.index("</svg>") + 6])
    shown = [t[1].get("style") for t in tree.tags if t[0] == "rect"]
    assert shown == [f"--score:{x:.3f}" for x in (0.9, 0.8, 0.7, 0.1, 0.2, 0.3, 0.2)], "a fork shows its own steps alone, below its parent"
    assert len(tree.of("fork")) == 2
    assert "Tree of 4 candidates, 2 of them forks" in tree.tags[0][1]["aria-label"]
    assert "forked from candidate 2" in source
    lost = generation([candidate(["a\n\n"], [0.5], number=4, parent=2), candidate(["a\n\n"], [0.5], number=5, parent=9)])._repr_html_()
    assert lost.count("<rect") == 2, "whose parent is not there is shown as a root"


def test_a_notebook_is_not_filled():
    """Thousands of steps: the notebook says what it leaves out, and ``html`` has all of it."""
    long = [candidate([f"step {k} of many words.\n\n" for k in range(3000)], [0.5] * 3000, number=i) for i in range(4)]
    g = generation(long)
    short, whole = g._repr_html_(), g.html()
    assert len(short) < view.NOTEBOOK + 50_000 and short.count("step 900 of many") == 1 and "more steps: <code>" in short
    assert short.count("<article") == 4
    assert whole.count("step 2999 of many") == 4 and "writes all of it" not in whole
    points = re.search(r'polyline points="([^"]+)"', whole).group(1)
    assert len(points.split()) <= 242
    crowd = generation([candidate(["a.\n\n"], [0.5], number=i) for i in range(2000)])
    assert len(crowd._repr_html_()) < view.NOTEBOOK + 50_000 and re.search(r"\d more candidates: ", crowd._repr_html_())
    alone = candidate([], [], "x" * 500_000)
    assert len(alone._repr_html_()) < view.NOTEBOOK + 50_000 and len(alone.html()) > 500_000
    assert "more characters: " in alone._repr_html_()


def scores(**more):
    return rf.TrajectoryScores(
        torch.tensor([0.6, 0.0, math.nan]), torch.tensor([2, 0, 1]), [torch.tensor([0.9, 0.4]), torch.tensor([]), torch.tensor([math.nan])],
        [torch.tensor([3, 6]), torch.tensor([], dtype=torch.int64), torch.tensor([2])], {2: "not finite"}, **more,
    )  # fmt: skip


def test_scores_without_texts_are_a_table():
    parsed = Parsed(scores()._repr_html_())
    said = " ".join(parsed.text)
    assert len([t for t in parsed.tags if t[0] == "tr"]) == 2 + 2 + 1, "two heads, three steps"
    assert "1 3 0.900 0.900 2 6 0.400 0.600" in said and "No score: not finite" in said and "0 steps" in said
    assert len(parsed.of("picked")) == 1
    gated = Parsed(scores(gates=[torch.tensor([0.25, 0.75]), torch.tensor([]), torch.tensor([0.5])])._repr_html_())
    assert "gate" in gated.text and "0.750" in gated.text
    risk = Parsed(scores(higher_is_better=False)._repr_html_())
    assert risk.of("step")[0]["style"] == "--score:0.100"
    empty = rf.TrajectoryScores(torch.zeros(0), torch.zeros(0, dtype=torch.int64), [], [])
    assert Parsed(empty._repr_html_()).tags
    many = rf.TrajectoryScores(torch.full((2,), 0.5), torch.full((2,), 9000), [torch.full((9000,), 0.5)] * 2, [torch.arange(9000)] * 2)
    assert "8,800 more steps" in many._repr_html_() and len(many._repr_html_()) < view.NOTEBOOK and many.html().count("<tr>") == 18_002


def test_scores_with_ids_have_texts():
    from test_model import byte_tokenizer

    tokenizer = byte_tokenizer()
    rows = [tokenizer("ab.\n\ncd é.\n\nrest").input_ids, tokenizer("none").input_ids]
    ends = [i for i, t in enumerate(rows[0]) if tokenizer.decode(rows[0][: i + 1]).endswith(".\n\n")]
    found = rf.TrajectoryScores(torch.tensor([0.6, 0.0]), torch.tensor([2, 0]), [torch.tensor([0.9, 0.4]), torch.tensor([])], [torch.tensor(ends), torch.tensor([])])
    source = found.html(ids=rows, tokenizer=tokenizer)
    assert ">ab.<small>0.900</small>" in source and ">cd é.<small>0.400</small>" in source and '<span class="rest">rest</span>' in source
    assert "plain &lt;b&gt;" in found.html(texts=["plain <b>", "none"])
    for wrong, said in [
        ({"ids": rows}, "ids and tokenizer go together"),
        ({"tokenizer": tokenizer}, "ids and tokenizer go together"),
        ({"ids": rows, "tokenizer": tokenizer, "texts": ["", ""]}, "give one or the other"),
        ({"texts": ["one"]}, "texts: 1 for 2 trajectories"),
        ({"ids": [rows[0][:3], rows[1]], "tokenizer": tokenizer}, r"ids\[0\]: 3 ids"),
    ]:
        with pytest.raises(ValueError, match=said):
            found.html(**wrong)


def test_a_page_is_one_file_without_script(tmp_path):
    for shown in (candidate(["a.\n\n"], [0.5]), generation([candidate(["a.\n\n"], [0.5])]), scores()):
        assert shown.html(tmp_path / "page.html") is None
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert shown.html() in text and "<script" not in text
        assert "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'" in text
    with pytest.raises(OSError, match="path: .* is a directory"):
        scores().html(tmp_path)


def test_files_hold_what_they_held():
    assert set(candidate(["a.\n\n"], [0.5]).record()) == {
        "text", "score", "step_scores", "step_spans", "token_ids", "answer", "error", "status", "log_prob", "number", "parent", "tokens",
    }  # fmt: skip


def test_the_floor_needs_neither_torch_nor_numpy():
    code = "import sys, reflective.view; print(sorted({'torch', 'numpy', 'transformers', 'rich'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# -- reflective view -------------------------------------------------------------------------------------------------------------------


def drawn(answer, score, steps=("One.\n\n", "Two.\n\n"), number=0, **more):
    """As ``reflective generate`` writes it."""
    c = candidate(list(steps), [score] * len(steps), f"It is {answer}.", answer=answer, number=number)
    return c.record() | more


def rows():
    return [
        {"question": "1 + 1", "answer": "2", "best": 1, "strategy": "prune", "error": None, "candidates": [
            drawn("2", 0.7, number=0), drawn("2", 0.9, number=1), drawn("3", 0.95, number=2), drawn("4", 0.1, number=3, parent=2, status="stopped")]},
        {"question": "2 + 2", "answer": "4", "best": 0, "strategy": "prune", "error": None, "candidates": [drawn("5", 0.3, ["𝒳 é.\n\n", "<b>.\r\n\n"])]},
        {"question": "3 + 3", "answer": "6", "best": None, "candidates": None, "text": None, "score": None, "error": "the prompt is too long"},
    ]  # fmt: skip


def data_of(path):
    """What a page holds, and the page."""
    text = path.read_text(encoding="utf-8")
    ((found),) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found), text


def test_what_generate_writes_is_shown(tmp_path):
    told = show(write(tmp_path / "a.jsonl", rows()), tmp_path / "a.html")
    data, text = data_of(tmp_path / "a.html")
    assert told == {"questions": 3, "candidates": 6, "right": 2, "wrong": 3, "bytes": (tmp_path / "a.html").stat().st_size}
    assert data["questions"] == [{"t": "1 + 1", "a": "2"}, {"t": "2 + 2", "a": "4"}, {"t": "3 + 3", "a": "6"}]
    assert [r.get("r") for r in data["rows"]] == [1, 1, 0, 0, 0, None]
    assert [r.get("c") for r in data["rows"]] == [None, "by prune", None, None, "by prune", None]
    assert data["rows"][3]["p"] == 2 and data["rows"][3]["w"] == f"stopped by prune: {STOPPED['prune']}"
    assert data["rows"][5]["er"] == "the prompt is too long" and data["rows"][5]["x"] is None
    assert data["judge"] == "answer" and data["aggregation"] == "geometric_mean" and (data["low"], data["high"]) == (0, 1)
    odd = data["rows"][4]
    units = odd["t"].encode("utf-16-le")
    pieces = [units[2 * a : 2 * b].decode("utf-16-le") for a, b in zip([0, *odd["e"]], odd["e"], strict=False)]
    assert pieces == ["𝒳 é.\n\n", "<b>.\n\n"], "ends count as JavaScript does, also behind characters of two units"
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy


def test_verdicts_are_those_of_eval(tmp_path):
    source = write(tmp_path / "a.jsonl", rows())
    only = [{"question": r["question"], "answer": "4"} for r in rows()]
    answers = write(tmp_path / "answers.jsonl", only)
    for given in ({}, {"answers": answers}, {"verifier": "exact", "pattern": r"It is (\d)"}, {"verifier": lambda text, question: float("3" in text)}):
        told = show(source, tmp_path / "a.html", **given)
        report = evaluate([source], **given)
        counts = report.counts["a"]
        assert told["candidates"] - 1 == counts["candidates"]  # the row of which nothing came has none
        assert told["right"] + told["wrong"] == counts["candidates"] - counts["candidates_without_verdict"] == 5
        chosen = [r.value for r in report.rows if r.metric == "chosen"]
        data, _ = data_of(tmp_path / "a.html")
        best = [r["r"] for r in data["rows"] if "c" in r]
        assert chosen == [pytest.approx(sum(best) / len(best))]
    without = [{k: v for k, v in r.items() if k != "answer"} for r in rows()]
    told = show(write(tmp_path / "b.jsonl", without), tmp_path / "b.html")
    assert (told["right"], told["wrong"]) == (0, 0)
    assert data_of(tmp_path / "b.html")[0]["judge"] == ""


def test_what_score_writes_is_shown(tmp_path):
    scored = {"score": 0.6, "n_steps": 2, "step_scores": [0.9, 0.4], "step_spans": [[0, 4], [4, 8]], "error": None}
    second = {"score_other": -2.0, "n_steps_other": 1, "step_scores_other": [-2.0], "step_spans_other": [[0, 8]]}
    lists = {k: [v, None] for k, v in scored.items() if k != "error"} | {"error": [None, "the response is empty"]}
    given = [
        {"text": "a.\n\nb.\n\nc"} | scored,
        {"prompt": "P", "response": "a.\n\nb.\n\nc"} | scored | second,
        {"question": "Q", "responses": ["a.\n\nb.\n\nc", ""]} | lists,
        {"nonsense": 1, "score": None, "n_steps": None, "step_scores": None, "step_spans": None, "error": "expected text, or response"},
    ]
    told = show(write(tmp_path / "s.jsonl", given), tmp_path / "s.html")
    assert (told["questions"], told["candidates"]) == (4, 5)
    data, _ = data_of(tmp_path / "s.html")
    assert [q["t"] for q in data["questions"]] == ["line 1", "P", "Q", "line 4"] and data["questions"][0]["none"] == 1
    assert [r.get("e") for r in data["rows"]] == [[4, 8], [4, 8], [4, 8], None, None]
    assert data["rows"][1]["f"] == {"other": {"x": -2.0, "s": [-2.0], "e": [8]}}
    assert data["rows"][3]["er"] == "the response is empty" and data["rows"][4]["er"] == "expected text, or response"


def test_files_in_all_forms(tmp_path):
    """Parquet, an array, packed, and the published code's."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    plain = rows()[:2]
    write(tmp_path / "a.jsonl", plain)
    (tmp_path / "a.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in plain)
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "a.parquet")
    found = []
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"):
        show(tmp_path / name, tmp_path / "a.html")
        data, _ = data_of(tmp_path / "a.html")
        found.append([{k: v for k, v in r.items() if k not in ("i", "f")} for r in data["rows"]])
    assert found[0] == found[1] == found[2] == found[3]
    published = {"prompt": "P", "answer": {"target": "2"}, "output": {"content": "P<think>\n", "solution_lst": ["P<think>\nIt is \\boxed{2}", "P<think>\nno"], "score_lst": [0.7, 0.2]}}
    told = show(write(tmp_path / "p.jsonl", [published]), tmp_path / "p.html", verifier="answer")
    assert (told["right"], told["wrong"]) == (1, 1)
    assert [r["t"] for r in data_of(tmp_path / "p.html")[0]["rows"]] == ["It is \\boxed{2}", "no"]


def test_the_command(tmp_path, monkeypatch):
    source = write(tmp_path / "answers.jsonl", rows())
    done = run("view", source)
    assert done.stdout.strip() == str(tmp_path / "answers.view.html")
    assert done.stderr.startswith("view: 3 questions, 6 candidates, 2 right, 3 wrong, ")
    first = (tmp_path / "answers.view.html").read_bytes()
    run("view", source)
    assert (tmp_path / "answers.view.html").read_bytes() == first, "the same page of the same file"
    assert run("view", source, "-o", tmp_path / "page.htm").stdout.strip() == str(tmp_path / "page.htm")
    piped = run("view", "-", "-o", tmp_path / "piped.html", stdin=source.read_text(encoding="utf-8"))
    assert data_of(tmp_path / "piped.html")[0]["name"] == "stdin" and "6 candidates" in piped.stderr
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    run("view", source, "--open")
    assert opened == [(tmp_path / "answers.view.html").as_uri()]
    risk = run("view", source, "--risk", "-o", tmp_path / "risk.html")
    assert risk and data_of(tmp_path / "risk.html")[0]["risk"] is True


def test_what_cannot_be_shown_is_said(tmp_path):
    source = write(tmp_path / "a.jsonl", rows())
    (tmp_path / "page.html").symlink_to(source)
    for given, said in [
        (("nowhere.jsonl",), "'nowhere.jsonl' does not exist"),
        ((source, "-o", tmp_path / "a.jsonl"), "give a name that ends in .html"),
        ((source, "-o", tmp_path / "page.html"), "is the input"),
        ((source, "-o", tmp_path / "no" / "page.html"), "there is no folder"),
        ((source, "--answers", tmp_path / "none.jsonl"), "none.jsonl"),
        ((source, "--verifier", "luck"), "verifier='luck'"),
        ((source, "--outcome", "right"), "outcome='right' is neither a field"),
        ((write(tmp_path / "empty.jsonl", []),), "has no row"),
        ((write(tmp_path / "other.jsonl", [{"question": "Q", "reply": "x"}]),), "expected candidates, output"),
        ((write(tmp_path / "no.jsonl", [{"reply": "x"}]),), "expected a question, prompt or problem"),
    ]:
        assert said in " ".join(run("view", *given, code=2).stderr.split()), given
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "Q", "candidates": []}\n{"question"\n', encoding="utf-8")
    assert "broken.jsonl, line 2: JSONDecodeError" in run("view", broken, code=2).stderr


# -- In Chromium -----------------------------------------------------------------------------------------------------------------------


def opened(page, tmp_path, given, **more):
    """The page of ``given`` rows, open."""
    show(write(tmp_path / "given.jsonl", given), tmp_path / "given.html", **more)
    page.goto((tmp_path / "given.html").as_uri())
    page.wait_for_selector(".row, .empty")


def until(page, condition):
    """Waits; ``page.wait_for_function`` evaluates a string, which the page's policy forbids."""
    end = time.monotonic() + 120  # s; no measure of how fast a machine is
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(30)


def many(n, each=40):
    """Of n candidates, with scores that tell their places."""
    rng = random.Random(1)
    order = list(range(n))
    rng.shuffle(order)
    questions = []
    for begin in range(0, n, each):
        candidates = [drawn(str(k % 7), (order[k] + 1) / (n + 1), [f"word{k} one.\n\n", "two.\n\n"], number=k - begin) for k in range(begin, min(begin + each, n))]
        questions.append({"question": f"Q{begin // each}", "answer": "3", "best": 0, "strategy": "best_of_n", "candidates": candidates})
    return questions


def listed(page):
    return page.eval_on_selector_all(".row", "all => all.map(row => row.innerText.split('\\n').map(t => t.trim()))")


def test_a_trace_full_of_markup_is_text_in_the_page(page, tmp_path):
    everything = "".join(NASTY + UNSEEN[:2])
    nasty = [{"question": everything, "answer": everything, "strategy": everything, "best": 0, "chosen_by": everything, "candidates": [
        candidate([t + ".\n\n" for t in NASTY], [0.5] * len(NASTY), everything, answer=everything, status=everything, error=everything).record(),
        candidate([everything], [0.4], everything, answer="1").record()]}]  # fmt: skip
    opened(page, tmp_path, nasty)
    shown = "".join(NASTY + SEEN[:2])
    for keys in ("", "c", "a"):
        page.keyboard.press(keys) if keys else None
        assert shown in page.inner_text("#detail") or "".join(shown.split()) in "".join(page.inner_text("#detail").split())
    page.mouse.move(600, 400)
    page.fill("#find", "</script><script>")
    until(page, "document.querySelector('#count').textContent.startsWith('2 of 2')")
    assert page.title() == "given.jsonl"
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("[...document.scripts].map(script => script.id || script.type)") == ["data", ""]
    assert page.locator("img, iframe, object, link, b").count() == 0


def test_a_file_named_by_markup_keeps_its_name(page, tmp_path):
    name = "<img src=x onerror=alert(1)>&lt;.jsonl"
    show(write(tmp_path / name, rows()), tmp_path / "page.html")
    page.goto((tmp_path / "page.html").as_uri())
    assert page.title() == page.inner_text("h1") == name


def test_a_fragment_full_of_markup_is_text_in_a_page(page, tmp_path):
    everything = "".join(NASTY)
    c = candidate([t + ".\n\n" for t in NASTY], [0.5] * len(NASTY), everything, answer=everything)
    generation([c], strategy=everything).html(tmp_path / "page.html")
    page.goto((tmp_path / "page.html").as_uri())
    assert page.title().startswith("<script>window.hacked")
    assert page.evaluate("typeof window.hacked") == "undefined" and page.evaluate("document.scripts.length") == 0
    assert page.eval_on_selector(".text", "e => [...e.childNodes].map(n => n.className === 'step' ? n.firstChild.data : n.textContent).join('')") == c.text


def test_the_policy_of_the_page_lets_nothing_else_run(page, errors, tmp_path):
    """Were a text to get out of its place, which the tests above deny."""
    opened(page, tmp_path, rows())
    page.evaluate("""() => {
        const box = document.createElement('div');
        box.innerHTML = '<img src="data:," onerror="window.hacked = 1"><b onclick="window.hacked = 2" style="color: red">x</b>';
        document.body.append(box);
        box.querySelector('b').click();
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 3';
        document.body.append(script);
    }""")
    page.evaluate("() => fetch('http://127.0.0.1:9/').catch(() => null)")
    assert page.evaluate("typeof window.hacked") == "undefined"
    refused = [error for error in errors if "Content Security Policy" in error]
    assert len(refused) >= 4, errors
    errors.clear()


def test_ten_thousand_candidates(page, tmp_path):
    """Only those on screen are in the document; filters and orders give the right ones."""
    opened(page, tmp_path, many(10_000))
    assert page.inner_text("#count") == "10,000 candidates · 1,429 right, 8,571 wrong"
    nodes, last = [], 0
    for k in range(21):
        page.evaluate("part => new Promise(done => { const l = document.getElementById('list'); l.scrollTop = (l.scrollHeight - l.clientHeight) * part; requestAnimationFrame(() => requestAnimationFrame(done)); })", k / 20)
        nodes.append(page.evaluate("document.querySelectorAll('*').length"))
        last = max(page.eval_on_selector_all(".row", "all => all.map(row => Number(row.ariaPosInSet))"))
    assert last == 10_000 and max(nodes) < 500, nodes
    page.check("[name=verdict][value=right]", force=True)
    assert page.inner_text("#count").startswith("1,429 of 10,000") and {row[1] for row in listed(page)} == {"3"}
    page.select_option("#sort", "score")
    found = [float(row[0]) for row in listed(page)]
    assert found == sorted(found, reverse=True) and len(found) > 5
    page.click("#direction")
    found = [float(row[0]) for row in listed(page)]
    assert found == sorted(found)
    page.click("#clear")
    page.fill("#find", "WORD777 ")
    until(page, "document.querySelector('#count').textContent.startsWith('1 of')")
    assert listed(page)[0][1] == str(777 % 7) and "word777 one." in page.inner_text("#detail")
    page.fill("#find", "")
    until(page, "document.querySelector('#count').textContent.startsWith('10,000 c')")
    page.click("#more summary")
    page.fill("#answer", "5")
    page.fill("#score-from", "0.5")
    expected = sum(r["answer"] == "5" and r["score"] >= 0.5 for q in many(10_000) for r in q["candidates"])
    assert page.inner_text("#count").startswith(f"{expected:,} of 10,000")
    page.fill("#score-from", "2")
    assert page.inner_text("#count").startswith("0 of 10,000") and "Nothing matches." in page.inner_text("#list")


def test_more_candidates_than_an_element_is_high(page, tmp_path):
    opened(page, tmp_path, [{"question": "Q", "responses": ["x"] * 126_000, "score": [k / 126_000 for k in range(126_000)]}])
    page.focus("#list")
    page.keyboard.press("End")
    until(page, "document.querySelector('.row:last-child')?.ariaPosInSet === '126000'")
    assert page.get_attribute("#row-125999", "aria-selected") == "true"
    box, room = page.locator("#row-125999").bounding_box(), page.locator("#list").bounding_box()
    assert box["y"] + box["height"] <= room["y"] + room["height"] + 1 and box["y"] >= room["y"]
    page.keyboard.press("k")
    assert page.get_attribute("#row-125998", "aria-selected") == "true"
    page.keyboard.press("Home")
    page.wait_for_selector("#row-0")


def test_right_and_wrong_side_by_side(page, tmp_path):
    """The best right one beside the best wrong one, and on from there."""
    opened(page, tmp_path, rows())
    page.click("text=Right and wrong")
    assert page.eval_on_selector_all(".panels.two .score", "all => all.map(e => e.textContent)") == ["0.900", "0.950"]
    page.click("[aria-label='✓ Right: after']")
    assert page.eval_on_selector_all(".panels.two .score", "all => all.map(e => e.textContent)") == ["0.700", "0.950"]
    assert page.evaluate("document.activeElement.ariaLabel") == "✓ Right: after" or page.is_disabled("[aria-label='✓ Right: after']")
    page.click("text=All of this question")
    assert page.eval_on_selector_all(".panels.several .score", "all => all.map(e => e.textContent)") == ["0.900", "0.950", "0.700", "0.100"]
    assert page.locator("svg.tree .fork").count() == 1
    page.click("text=List only these")
    assert page.inner_text("#count").startswith("4 of 6")
    page.click("#only")
    page.click("#row-4")
    assert page.is_disabled("text=Right and wrong"), "this question has no right one"


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_page_counts_as_the_package_does(page, tmp_path, how):
    rng = random.Random(5)
    steps = [[rng.uniform(0.05, 0.95) for _ in range(4)] for _ in range(6)]
    made = [candidate([f"{k}.\n\n" for k in range(4)], s, how=how).record() for s in steps]
    opened(page, tmp_path, [{"question": "Q", "candidates": made}])
    titles = page.eval_on_selector_all("#detail .text .step", "all => all.map(e => e.title)")
    expected = [f"step {k} of 4: {steps[0][k - 1]:.3f}, {aggregate(steps[0][:k], how):.3f} so far" for k in range(1, 5)]
    assert titles == expected
    assert how.replace("_", " ") in page.inner_text("#summary")


def test_by_keyboard_alone(page, tmp_path):
    opened(page, tmp_path, many(200))
    chosen = lambda: page.get_attribute("[aria-selected=true]", "id")
    assert page.evaluate("document.activeElement.id") == "list" and chosen() == "row-0"
    for key, where in [("j", "row-1"), ("ArrowDown", "row-2"), ("k", "row-1"), ("End", "row-199"), ("Home", "row-0"), ("ArrowUp", "row-0")]:
        page.keyboard.press(key)
        assert chosen() == where and page.get_attribute("#list", "aria-activedescendant") == where
    page.keyboard.press("PageDown")
    assert 5 < int(chosen().removeprefix("row-")) < 20
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("c")
    assert page.locator(".panels.two").count() == 1
    page.keyboard.press("t")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.type("jk word5 ")
    assert page.input_value("#find") == "jk word5 ", "letters are letters where they are typed"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.keyboard.press("Escape")
    assert not page.is_visible("#keys")


def test_on_a_narrow_screen(page, tmp_path):
    page.set_viewport_size({"width": 390, "height": 800})
    opened(page, tmp_path, rows())
    wide = "document.documentElement.scrollWidth"
    assert page.is_visible("#list") and not page.is_visible("#detail") and page.evaluate(wide) <= 390
    page.click("#row-2")
    assert page.is_visible("#detail") and not page.is_visible("#list") and page.evaluate(wide) <= 390
    for mode in ("Right and wrong", "All of this question"):
        page.click(f"text={mode}")
        assert page.evaluate(wide) <= 390
    page.click(".back")
    assert page.is_visible("#list") and page.evaluate("document.activeElement.id") == "list"


def test_a_long_text_comes_as_it_is_read(page, tmp_path):
    made = candidate([f"step {k}.\n\n" for k in range(5000)], [0.5] * 5000, "the end").record()
    opened(page, tmp_path, [{"question": "Q", "candidates": [made]}])
    assert page.locator("#detail .step").count() < 1500 and "the end" not in page.inner_text("#detail")
    for _ in range(80):
        page.evaluate("() => new Promise(done => { const d = document.getElementById('detail'); d.scrollTop = d.scrollHeight; requestAnimationFrame(() => requestAnimationFrame(done)); })")
    until(page, "document.querySelectorAll('#detail .step').length === 5000")
    assert "the end" in page.inner_text("#detail")


def test_a_notebook_stays_as_it_was(page):
    """Its own elements look the same beside our cells, and a second cell with the same style changes nothing of the first."""
    own = "<h1>Title</h1><p class=note>text</p><table><tr><td class=score>1</td></tr></table><div class=text>a</div><details open><summary>x</summary></details>"
    cell = generation([candidate(["a.\n\n", "b.\n\n"], [0.2, 0.9], number=0), candidate(["a.\n\n"], [0.2], number=1, parent=0)])._repr_html_()
    look = """() => [...document.querySelectorAll('#own *')].map(e => { const s = getComputedStyle(e); return [...s].map(n => n + s.getPropertyValue(n)).join() })"""
    page.set_content(f"<div id=own>{own}</div>")
    before = page.evaluate(look)
    page.set_content(f"<div id=own>{own}</div>{cell}")
    assert page.evaluate(look) == before
    mine = "() => [...document.querySelector('.rf-view').querySelectorAll('*')].map(e => e.getBoundingClientRect().width + getComputedStyle(e).backgroundColor)"
    once = page.evaluate(mine)
    page.set_content(f"<div id=own>{own}</div>{cell}{cell}")
    assert page.evaluate(mine) == once and page.evaluate(look) == before


@pytest.mark.parametrize(
    ("body", "scheme", "dark"),
    [
        ("", "light", False), ("", "dark", True), ('data-jp-theme-light="false"', "light", True), ('data-jp-theme-light="true"', "dark", False),
        ('class="vscode-dark"', "light", True), ('class="vscode-light"', "dark", False), ('class="vscode-high-contrast"', "light", True),
        ('class="vscode-high-contrast vscode-high-contrast-light"', "dark", None), ('data-theme="dark"', "light", True),
    ],
)  # fmt: skip
def test_light_and_dark_are_the_notebooks(page, body, scheme, dark):
    page.emulate_media(color_scheme=scheme)
    page.set_content(f"<body {body}>{candidate(['a.'], [0.9])._repr_html_()}")
    ground = page.evaluate("getComputedStyle(document.querySelector('.rf')).backgroundColor")
    assert ground == ("rgb(22, 22, 22)" if dark or dark is None else "rgb(255, 255, 255)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_every_tint(page, scheme):
    """Contrast of 4.5 at the least (WCAG 2.2, 1.4.3), of the text and of the small numbers; and blue and vermilion stay apart."""
    page.emulate_media(color_scheme=scheme)
    c = candidate([f"step {k}.\n\n" for k in range(11)], [k / 10 for k in range(11)], "rest", answer="1")
    page.set_content(f"<body style='margin:0'>{c.html(right='2')}")
    found = page.evaluate("""() => {
        const canvas = document.createElement('canvas'), pen = canvas.getContext('2d', { willReadFrequently: true });
        const over = (...colours) => { for (const c of colours) { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); } return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3); };
        const light = rgb => { const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
        const ground = getComputedStyle(document.querySelector('.rf')).backgroundColor;
        const all = [];
        for (const e of document.querySelectorAll('.step, .step small, .rest, .note, .wrong, summary')) {
            const style = getComputedStyle(e), under = e.closest('.step'), back = over(ground, under ? getComputedStyle(under).backgroundColor : 'transparent');
            pen.globalAlpha = 1; over(ground, under ? getComputedStyle(under).backgroundColor : 'transparent');
            pen.globalAlpha = Number(style.opacity); pen.fillStyle = style.color; pen.fillRect(0, 0, 1, 1); pen.globalAlpha = 1;
            all.push([e.className || e.tagName, ratio([...pen.getImageData(0, 0, 1, 1).data].slice(0, 3), back), back]);
        }
        return all;
    }""")
    assert len(found) > 24
    assert not [f for f in found if f[1] < 4.5], [f for f in found if f[1] < 4.5]
    tints = [back for name, _, back in found if name == "step"]
    assert tints[0][0] > tints[0][2] + 40 and tints[10][2] > tints[10][0] + 40 and max(tints[5]) - min(tints[5]) < 8


# -- docs/view.md ----------------------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs" / "view.md"


@pytest.mark.skipif(not DOCS.is_file(), reason="tests that lie beside no documentation")
def test_every_block_of_the_page_runs(default_model, monkeypatch, tmp_path):
    """As it stands there, on the embedded model, which is loaded once."""
    monkeypatch.setattr(type(default_model), "default", lambda **given: default_model)
    monkeypatch.chdir(tmp_path)
    names, ran = {"__name__": "view"}, 0
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    for kind, code in blocks:
        if kind == "python":
            exec(code, names)  # noqa: S102
            continue
        assert kind == "bash"
        for file, content in re.findall(r"cat > (\S+) <<'END'\n(.*?)END\n", code, re.DOTALL):
            Path(file).write_text(content, encoding="utf-8")
        for line in re.sub(r"cat > .*?\nEND\n", "", code, flags=re.DOTALL).splitlines():
            piped = ""
            for command in line.split(" | "):
                program, *arguments = shlex.split(command)
                assert program == "reflective"
                piped = run(*arguments, stdin=piped).stdout
                ran += 1
    assert ran == 5
    assert {"answer.html", "scores.html", "answers.view.html", "two.html", "by_key.html"} <= {p.name for p in tmp_path.iterdir()}
    assert "mark wrong" in Path("answer.html").read_text(encoding="utf-8") or "mark right" in Path("answer.html").read_text(encoding="utf-8")
    assert '<small>' in Path("scores.html").read_text(encoding="utf-8")
    for picture in re.findall(r"[\w-]+\.png", DOCS.read_text(encoding="utf-8")):
        assert (DOCS.parent / picture).stat().st_size < 200_000
