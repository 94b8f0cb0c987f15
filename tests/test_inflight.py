"""The harness that compares whatever scores in a stream: its truth, its verdicts, and that every mistake is found by the case that is about it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reflective.benchmarks.inflight import (
    CASES,
    NEEDS,
    Case,
    Run,
    Scored,
    System,
    Verdict,
    World,
    chosen,
    compare,
    hf,
    judge,
    systems,
    table,
)
from reflective.benchmarks.inflight import __main__ as command
from reflective.benchmarks.inflight.hf import Call, Generate, Hook, OutputHiddenStates, Published, SecondPass, Stream
from reflective.benchmarks.inflight.world import DELIMITER, END_THINK, LAYER, THINK
from reflective.benchmarks.record import RESULTS, read
from reflective.published import second_pass

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "inflight.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def case_of(name):
    return chosen([name])[0]


# -- the truth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["exact", "text"])
def test_the_prose_and_the_automaton_agree_on_steps(world, rule):
    """``World.columns`` knows nothing of this package; ``StepTokens`` is what its scorers use."""
    tokens = world.allowed(["X", " ", ".", "\n", "\n\n", DELIMITER, "<think>", "</think>", "<|end|>"])
    steps, found = world.steps(rule), 0
    generator = torch.Generator().manual_seed(5)
    for length in (1, 2, 3, 7, 20, 40) * 25:
        ids = torch.tensor(tokens)[torch.randint(len(tokens), (length,), generator=generator)].tolist()
        for prompt in (1, length // 2):
            columns = world.columns(ids, prompt, rule)
            mask = steps.mask(torch.tensor([ids]), prompt_lengths=prompt)[0]
            assert mask.nonzero().flatten().tolist() == columns, (ids, prompt)
            found += len(columns)
    assert found > 100


def test_the_truth_is_that_of_float64(world):
    """And float32 keeps the distance that is allowed, which is far below that of neighbouring rows."""
    ids = world.ids("So" + f"XY{DELIMITER}ZW{DELIMITER}" * 8 + "X")
    truth = world.truth(ids, 2)
    assert truth.columns == [t for t, i in enumerate(ids) if i == world.step_id] and len(truth.columns) == 16
    parts = SimpleNamespace(model=world.model, head=world.head, steps=world.steps())
    ours = second_pass(parts, torch.tensor([ids]), 2).log().tolist()
    errors = [abs(a - b) for a, b in zip(ours, truth.log_scores, strict=True)]
    assert 0 < max(errors) <= truth.allowed < 1e-4
    moved = torch.tensor(truth.log_scores).diff().abs()
    assert (moved > 100 * truth.allowed).sum() > 10


def test_tags(world):
    text = f"aa{DELIMITER}<think>{DELIMITER}bb{DELIMITER}</think>cc{DELIMITER}"
    once, twice = world.ids(text), [*world.ids(text), THINK, END_THINK]
    assert [once[t - 1] for t in world.columns(once, 0)] == world.ids("b")
    assert len(world.columns(twice, 0)) == 3


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(world):
    """A run of ``left-padding`` whose scores are right."""
    return SecondPass().run(world, case_of("left-padding"))


def changed(run, number, **what):
    return Run([replace(s, **what) if i == number else s for i, s in enumerate(run.sequences)], run.events)


def test_verdicts(world, right):
    case = case_of("left-padding")
    found = compare(world, case, right)
    assert found.result == "right" and found.steps > 10 and found.sequences == 4 and 0 < found.difference <= found.allowed
    s = next(s for s in right.sequences if len(s.scores) > 2)
    number, columns = right.sequences.index(s), world.columns(s.ids, s.prompt)
    assert compare(world, case, changed(right, number, columns=columns)).result == "right"
    for what, said in (
        ({"scores": [s.scores[0], s.scores[1] * 1.001, *s.scores[2:]]}, f"sequence {number}: step 1 of {len(columns)}"),
        ({"scores": [float("nan"), *s.scores[1:]]}, f"sequence {number}: step 0 of {len(columns)}"),
        ({"scores": s.scores[1:]}, f"sequence {number}: {len(columns) - 1} scores for {len(columns)} steps"),
        ({"columns": [c - 1 for c in columns]}, f"sequence {number}: steps at {columns[0] - 1}"),
        ({"prompt": columns[0] + 1}, f"sequence {number}: {len(columns)} scores for {len(columns) - 1} steps"),
    ):  # fmt: skip
        found = compare(world, case, changed(right, number, **what))
        assert found.result == "wrong" and found.said.startswith(said), found


def test_what_a_case_is_about_has_to_come_about(world, right):
    cached = case_of("prompt-cached")
    assert compare(world, cached, Run(right.sequences)) == Verdict(
        "untested", "nothing was cached", **{k: getattr(compare(world, case_of("left-padding"), right), k) for k in ("difference", "allowed", "steps", "sequences")}
    )  # fmt: skip
    assert compare(world, cached, Run(right.sequences, {"cached": 9})).result == "right"
    assert compare(world, case_of("delimiter-run"), Run([Scored(world.ids("So X"), 2, [])])).said == "no step was decoded"


class Raises(SecondPass):
    name = "raises"

    def __init__(self, error):
        self.error = error

    def run(self, world, case):
        raise self.error


def test_refusals(world):
    plain = case_of("plain")
    assert judge(world, Raises(ValueError("not\n  me")), plain) == Verdict("refuses", "ValueError: not me")
    assert judge(world, Raises(IndexError("9")), plain) == Verdict("fails", "IndexError: 9")
    assert judge(world, SecondPass(), case_of("preemption")) == Verdict("cannot", SecondPass.cannot["preemption"])


# -- systems -----------------------------------------------------------------------------------------------------------

EASY = ["plain", "left-padding", "ends-early"]
EXPECTED = [  # of the cases that are not easy
    *((Stream("immediate"), c.name, "right") for c in CASES if c.name not in ("right-padding", "preemption", *EASY)),
    (Stream("deferred"), "right-padding", "refuses"),
    (Stream("deferred"), "preemption", "cannot"),
    *((Generate(), name, "right") for name in ("last-token", "tags-twice", "split-delimiter", "several-of-one", "forks", "stopped")),
    *((Generate(), c.name, "cannot") for c in CASES if Generate.cannot.keys() & set(c.needs)),
    (SecondPass(), "forks", "right"),
    (Published(), "prompt-steps", "wrong"),
    (Published(), "split-delimiter", "cannot"),
    *((system, name, "wrong") for system in (OutputHiddenStates(), Hook()) for name in ("right-padding", "forks")),
    *((OutputHiddenStates(), name, "fails") for name in ("prompt-cached", "shared-prefix", "prefill-in-pieces")),
    (Hook(), "prompt-cached", "right"),
    (Hook(), "prefill-in-pieces", "wrong"),
    (Hook(), "lookup-rejected", "fails"),
    (Hook(), "draft-rejected", "fails"),
]


@pytest.mark.parametrize(("system", "case", "result"), EXPECTED, ids=[f"{s.name}-{c}" for s, c, _ in EXPECTED])
def test_systems_on_transformers(world, system, case, result):
    found = judge(world, system, case_of(case))
    assert found.result == result, found


@pytest.mark.parametrize("case", EASY)
def test_all_are_right_where_it_is_easy(world, case):
    for system in hf.SYSTEMS:
        assert judge(world, system, case_of(case)).result == "right", system.name


@pytest.mark.parametrize("case", ["plain", "prompt-cached", "lookup-rejected"])
def test_both_schedules_have_the_same_bits(world, case):
    runs = [Stream(schedule).run(world, case_of(case)) for schedule in ("immediate", "deferred")]
    for a, b in zip(*(run.sequences for run in runs), strict=True):
        assert a == b and a.scores


# -- mistakes ----------------------------------------------------------------------------------------------------------


class OffByOne(SecondPass):
    """Reads the step-token's own row."""

    def score(self, world, case, row):
        columns = world.columns(row.ids, row.prompt, case.rule)
        states = world.model(torch.tensor([[*row.ids, 0]]), output_hidden_states=True).hidden_states[LAYER][0]
        return world.head(states[columns]).sigmoid().flatten(), columns


class StaleRows(OutputHiddenStates):
    """Has one buffer for all requests, and writes what comes of a request from its beginning on."""

    def __init__(self):
        self.buffer = torch.zeros(64, 512, 128)

    def run(self, world, case):
        found, events = [], {}
        for part in Call.all(world, case):
            rows = part.generate(output_hidden_states=True, return_dict_in_generate=True)
            states = torch.cat([step[LAYER] for step in part.out.hidden_states], 1)
            self.buffer[: len(states), : states.shape[1]] = states
            for row in rows:
                columns = world.columns(row.ids, row.prompt, case.rule)
                found.append(row.scored(world.head(self.buffer[row.at, [row.pad + c - 1 for c in columns]]).sigmoid().flatten()))
            events |= part.events
        return Run(found, events)


class KeepsDrafts(Hook):
    """Appends all rows of every forward."""

    def run(self, world, case):
        found, events = [], {}
        for part in Call.all(world, case):
            kept = []
            handle = world.model.model.layers[LAYER].register_forward_hook(lambda _, __, out, to=kept: to.append(out.clone()))
            try:
                rows = part.generate()
            finally:
                handle.remove()
            states = torch.cat(kept, 1)
            for row in rows:
                columns = world.columns(row.ids, row.prompt, case.rule)
                found.append(row.scored(world.head(states[row.at, [row.pad + c - 1 for c in columns]]).sigmoid().flatten(), columns))
            events |= part.events
        return Run(found, events)


class LosesTheLast(SecondPass):
    """Waits for the next forward, which does not come."""

    def score(self, world, case, row):
        scores, _ = super().score(world, case, row)
        return (scores[:-1] if world.columns(row.ids, row.prompt)[-1:] == [len(row.ids) - 1] else scores), None


class CountsPadding(SecondPass):
    """Runs rows with their padding, and without a mask."""

    def score(self, world, case, row):
        scores, _ = super().score(world, case, replace(row, ids=[1] * row.pad + row.ids, prompt=row.prompt + row.pad))
        return scores, None


class CountsAllDelimiters(SecondPass):
    def score(self, world, case, row):
        columns = [t for t in range(row.prompt, len(row.ids)) if row.ids[t] == world.step_id]
        states = world.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[LAYER][0]
        return world.head(states[[c - 1 for c in columns]]).sigmoid().flatten(), columns


class ClosesAtTheFirstTag(CountsAllDelimiters):
    def score(self, world, case, row):
        end = row.ids.index(END_THINK) if END_THINK in row.ids else len(row.ids)
        columns = [c for c in world.columns(row.ids, row.prompt) if c < end]
        states = world.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[LAYER][0]
        return world.head(states[[c - 1 for c in columns]]).sigmoid().flatten(), columns


class ANeighboursRow(SecondPass):
    def run(self, world, case):
        run = super().run(world, case)
        n = len(case.prompts) * case.n  # that were decoded together
        return Run([replace(s, scores=run.sequences[i - 1].scores) if i < n else s for i, s in enumerate(run.sequences)], run.events)


class FeedsOnBehindTheEnd(SecondPass):
    """Takes what pads a row behind its end for tokens of it."""

    def score(self, world, case, row):
        behind = [*row.ids, *world.ids(f"X{DELIMITER}")] if row.ids[-1] == 0 else row.ids
        return super().score(world, case, replace(row, ids=behind))


MISTAKES = [
    (OffByOne, "plain"),
    (LosesTheLast, "last-token"),
    (CountsAllDelimiters, "delimiter-run"),
    (ClosesAtTheFirstTag, "tags-twice"),
    (ANeighboursRow, "batch"),
    (ANeighboursRow, "several-of-one"),
    (CountsPadding, "left-padding"),
    (FeedsOnBehindTheEnd, "ends-early"),
    (StaleRows, "prompt-cached"),
    (StaleRows, "shared-prefix"),
    (KeepsDrafts, "lookup-rejected"),
    (KeepsDrafts, "draft-rejected"),
    (KeepsDrafts, "forks"),
]


@pytest.mark.parametrize(("mistake", "case"), MISTAKES, ids=[f"{m.__name__}-{c}" for m, c in MISTAKES])
def test_a_mistake_is_found(world, mistake, case):
    found = judge(world, mistake(), case_of(case))
    assert found.result == "wrong", found


@pytest.mark.parametrize("mistake", [StaleRows, KeepsDrafts, LosesTheLast, CountsPadding, ClosesAtTheFirstTag, FeedsOnBehindTheEnd])
def test_and_not_by_the_plain_one(world, mistake):
    assert judge(world, mistake(), case_of("plain")).result == "right"


# -- the command, the table, the page ----------------------------------------------------------------------------------


def test_the_command(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "World", lambda: world)
    names = ["--case", "plain", "prompt-steps", "--out", str(tmp_path)]
    assert command.main(["--system", "published", "second-pass", *names]) == 0
    rows = read("inflight", tmp_path)
    assert [(r["system"], r["case"], r["result"]) for r in rows] == [
        ("second-pass", "plain", "right"), ("second-pass", "prompt-steps", "right"),
        ("published", "plain", "right"), ("published", "prompt-steps", "wrong"),
    ]  # fmt: skip
    assert all(r["torch"] and r["cpu"] and r["commit"] and r["about"] for r in rows)
    assert "8 scores for 5 steps" in rows[3]["said"] and float(rows[0]["difference"]) <= float(rows[0]["allowed"])
    # What ran before stays, what runs again is replaced.
    monkeypatch.setattr(command, "judge", lambda *_: Verdict("wrong", "on purpose"))
    assert command.main(["--system", "reflective-deferred", *names]) == 1
    assert command.main(["--system", "published", *names[:2], *names[3:]]) == 0
    rows = read("inflight", tmp_path)
    assert [r["said"] for r in rows if r["system"] == "published"] == ["on purpose", "sequence 0: 8 scores for 5 steps"]
    assert rows[0]["system"] == "reflective-deferred" and len(rows) == 6
    shown = table.page(tmp_path)
    assert "| [plain](#plain) | **✗** | ✓ | **✗** |" in shown and "| `published` | prompt-steps | no pairs |" in shown
    capsys.readouterr()
    for wrong, message in (
        (["--case", "no"], "case: no; expected some of plain"), (["--system", "no"], "system: no; expected some of reflective-immediate"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            command.main(wrong)
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(c.name in said and c.must in said for c in CASES) and all(name in said for name in systems.ORDER)


def test_systems_that_cannot_run_here_say_so(monkeypatch):
    monkeypatch.setattr(systems.importlib.util, "find_spec", lambda name: None)
    assert "reflective-vllm" not in [s.name for s in systems.chosen()]
    with pytest.raises(ImportError, match="reflective-vllm needs vllm"):
        systems.chosen(["reflective-vllm"])
    assert systems.known()["nnsight"] == "(needs nnsight)"


def test_cases_and_systems_are_whole():
    assert len({c.name for c in CASES}) == len(CASES) and len(set(systems.ORDER)) == len(systems.ORDER)
    for case in CASES:
        assert set(case.needs) <= set(NEEDS) and case.must.endswith(".") and case.why.endswith("."), case.name
    for system in systems.ALL:
        assert isinstance(system, System) and set(system.cannot) <= set(NEEDS), system.name
    assert {need for c in CASES for need in c.needs} == set(NEEDS)


def test_the_page_is_made_of_the_recorded_results():
    assert table.BEGIN + table.page() + table.END in PAGE, "run: python -m reflective.benchmarks.inflight.table --write"
    rows = read(table.NAME, RESULTS)
    assert {r["case"] for r in rows} == {c.name for c in CASES}
    assert {r["system"] for r in rows} == set(systems.ORDER)
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", PAGE) + re.findall(r"`((?:benchmarks|tests)/[\w/.]+)`", PAGE):
        assert (ROOT / "docs" / path).exists() or (ROOT / path).exists(), path


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert table.draw(tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_blocks_of_the_page_run_as_they_stand(capsys):
    names = {"__name__": "inflight"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)  # noqa: S102
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert said["plain"] == said["last-token"] == "right" and said["tags-twice"] == "wrong" and said["batch"] == "cannot"


def test_an_adapter_has_to_be_one():
    assert not isinstance(SimpleNamespace(name="x", about="y"), System)
    assert isinstance(Case("a", "b.", "c."), Case)
