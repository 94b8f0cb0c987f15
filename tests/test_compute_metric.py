"""The published code's verdicts: against those that its own compute_metric.py gave, recorded in ``compute_metric.jsonl``."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny

from reflective.compute_metric import answer, find_task, mathematics, task, verdict

with Path(__file__).with_name("compute_metric.jsonl").open(encoding="utf-8") as file:
    PROMPTS, *TABLE = map(json.loads, file)


@pytest.mark.parametrize("name", ["aime24", "aime25", "ceval"])
def test_verdicts_are_those_of_the_script(name):
    told = [(text.replace("PROMPT", PROMPTS[task(name)]), right, bool(v)) for of, text, right, v in TABLE if of == name]
    assert [(text, right, verdict(task(name), text, right)) for text, right, _ in told] == told
    assert min(Counter(v for *_, v in told).values()) > 50, "both verdicts, often"


def test_by_hand():
    """One of each rule, with verdicts of the script."""
    box, prompt = r"\boxed{%s}", "Put it into \\boxed{}.\n"
    for text, right, expected in (
        (prompt + "The answer is 204", "204", True),  # no box, but the text's end
        ("204.01 apples", "204", False),  # close as numbers, but without any \box
        (box % "2.04", "204", True),  # as a percentage
        (box % "204.01", "204", True),
        (box % "204.1", "204", False),
        (box % r"\frac{408}{2}", "204", False),  # it reads no LaTeX as mathematics
        (box % "203+1", "204", True),
        ("2/4", "1/2", False),  # not reduced
        (box % "2/4", "1/2", True),  # but as a number
        (box % "1 or 2", "1,2", False),
        (box % "7" + box % "8", "8", True),
        (r"\boxed{7", "7", True),  # by what is left of the LaTeX
        (r"\boxed{7 and so on", "7", False),
        (r"\fbox{7}", "7", True),
    ):
        assert verdict("aime", text, right) is expected, (text, right)
    for text, right, expected in (
        ("<think>答案: B?</think>答案：A", "A", False),  # the first one, wherever it is
        ("ANSWER: b.", "B", True),
        ("答案是：A", "A", False),
        (r"\boxed{A}", "A", False),
    ):
        assert verdict("ceval", text, right) is expected, (text, right)


def test_answers_are_not_run(tmp_path, monkeypatch):
    """There they are: sympy's parser and eval see them."""
    monkeypatch.chdir(tmp_path)
    for text in (
        "open('made', 'w')", "sqrt(open('made', 'w'))", "__import__('os').mkdir('made')", "sqrt('open(\"made\", \"w\")')",
        "open('made', 'w')*2\\pi", "[open('made', 'w') for x in [1]]", "(lambda: open('made', 'w'))()", "Integer(5).__class__",
        "f'{open(\"made\", \"w\")}'", "Symbol('x', open('made', 'w'))",
        *(f"{name}('open(\"made\", \"w\")')" for name in ("Number", "Integer", "Rational", "Float", "Function('f')")), "max(1, key=open)", "Integer(4, *open('made', 'w'))",
    ):  # fmt: skip
        assert not verdict("aime", rf"\boxed{{{text}}}", "204")
        assert not verdict("aime", rf"\boxed{{{text}}}", "x+1")
    assert not [*tmp_path.iterdir()]


def test_large_answers_end():
    """As worked out, some of them would not before the stars go out."""
    for text in (
        "9**9**9**9", "9**9**9", "99999999!", "((9!)!)!", "binomial(10**9, 5*10**8)", "2**10**8\\pi", "9**9**9**9\\pi",
        "[1]*10**10\\pi", "log(e^1024)", "1e999999999", "(" * 400 + "1" + ")" * 400, "x" * 5000, "floor(1e99999999)",
        "exp(exp(exp(99)))", "1<<10**10",
    ):  # fmt: skip
        assert not verdict("aime", rf"\boxed{{{text}}}", "204"), text
        verdict("aime", rf"\boxed{{{text}}}", "x+1")


def test_the_right_answer_is_no_mathematics():
    for right in ("", "None", "{", r"\frac", r"\sqrt", "(", "x_1", "_", "\\", "Point(1,2)", "1,,2"):
        assert not verdict("aime", r"\boxed{5}", right)


def test_names_of_tasks():
    assert [task(name) for name in ("aime24", "aime25", "aime", "ceval")] == ["aime", "aime", "aime", "ceval"]
    for name in ("math500", "", "CEVAL", "my_aime"):
        with pytest.raises(ValueError, match=f"task='{name}'; compute_metric.py knows ceval, and aime24"):
            task(name)
    for name in ("livecodebench", "LiveCodeBench_v5", "lcb", "humaneval", "mbpp"):
        with pytest.raises(ValueError, match=f"{name}: its answers are programs, .* give outcome=COLUMN"):
            task(name)


def test_tasks_of_files():
    assert find_task("results/aime24_1.jsonl", ["A"]) == "aime", "the name first"
    assert find_task("x/C-Eval-0.jsonl", []) == find_task("ceval_low.jsonl", []) == "ceval"
    assert find_task("aime/results.jsonl", ["B", "c"]) == find_task("aime_or_ceval.jsonl", ["A"]) == "ceval"
    assert find_task("results.jsonl", ["204", "025", "7"]) == "aime"
    for answers in ([], ["204", "A"], ["1/2"], [""], ["1024"], ["E"]):
        assert find_task("results.jsonl", answers) is None


def test_answers_for_votes():
    assert answer("ceval", "答案: b, answer: C") == "B" and answer("ceval", "B") is None
    assert answer("aime", r"\boxed{x = 5}. Yes") == "5" and answer("aime", "The answer is 5") is None


def test_it_is_loaded_without_sympy():
    """What most files need is text alone, and sympy takes a second."""
    code = (
        "import sys; from reflective.compute_metric import verdict; assert verdict('aime', r'\\boxed{204}', '204');"
        "assert verdict('ceval', 'answer: A', 'A'); sys.exit(' '.join({'sympy', 'pylatexenc', 'torch'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=tiny.PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_function_of_mathematics_is_known():
    """A misspelt name would be refused in silence."""
    known = {*mathematics.FUNCTIONS, *mathematics.LITERALS, *mathematics.CONSTANTS}
    assert known <= {*mathematics.known()}
