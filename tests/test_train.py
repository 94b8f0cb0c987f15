"""Training: recorded rollouts, the fit, and the measures, each against a case whose answer is known."""

import copy
import json

import pytest
import torch
from rich.progress import Progress

import reflective as rf
from reflective import tasks, train
from reflective.model import Config


def synthetic(questions=60, samples=8, seed=0, signal=3.0):
    """Rollouts whose features carry correctness in dimension 0 and the question's difficulty, larger, in dimension 1."""
    g = torch.Generator().manual_seed(seed)
    question = torch.arange(questions).repeat_interleave(samples)
    hard = torch.rand(questions, generator=g)[question]
    outcome = (torch.rand(len(question), generator=g) > hard).float()
    trajectory = torch.arange(len(question)).repeat_interleave(3)
    features = torch.randn(len(trajectory), 16, generator=g)
    features[:, 0] += signal * (outcome[trajectory] - 0.5)
    features[:, 1] += 6 * (0.5 - hard[trajectory])
    answer = torch.where(outcome > 0, 0, torch.randint(1, 4, outcome.shape, generator=g))
    return train.Rollouts(features * 5 + 40, trajectory, outcome, question, answer, torch.full_like(question, 30))


def test_fit_finds_correctness_within_questions():
    head = train.fit(synthetic(300, seed=0), epochs=8, warmup=4)
    metrics = train.evaluate(synthetic(seed=1), head, resamples=200)
    assert metrics["auc_within"].value > 0.9
    assert metrics["best-of-n"].value > metrics["pass@1"].value + 0.2
    assert metrics["pass@1"].low < metrics["pass@1"].value < metrics["pass@1"].high
    # At random the same head knows nothing.
    blank = train.evaluate(synthetic(seed=1, signal=0.0), head, resamples=200)
    assert abs(blank["auc_within"].value - 0.5) < 0.1


def test_fit_is_repeatable_and_needs_both_outcomes():
    a, b = (train.fit(synthetic(20), epochs=2, warmup=1, seed=5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    rollouts = synthetic(20)
    rollouts.outcome[:] = 1
    with pytest.raises(ValueError, match="both outcomes are needed"):
        train.fit(rollouts)


def test_measures_on_a_case_done_by_hand():
    """Two questions, the score being sigmoid(feature): q0 has a right best, q1 a wrong one that the vote outweighs."""
    head = rf.SPRM(1, 2)
    with torch.no_grad():
        head[0].weight[:, 0], head[3].weight[0] = torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0])
        head[0].bias.zero_(), head[3].bias.zero_()
    rollouts = train.Rollouts(
        features=torch.tensor([2.0, -1.0, -2.0, 0.5, 1.0, 0.9]).unsqueeze(1),
        trajectory=torch.arange(6),
        outcome=torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0]),
        question=torch.tensor([0, 0, 0, 1, 1, 1]),
        answer=torch.tensor([0, 1, 1, 0, 1, 0]),
        tokens=torch.ones(6, dtype=torch.long),
    )
    m = {k: v.value for k, v in train.evaluate(rollouts, head.eval(), resamples=10).items()}
    assert m["pass@1"] == pytest.approx(0.5)
    assert m["any@n"] == 1
    assert m["best-of-n"] == 0.5
    assert m["majority@n"] == 0.5  # q0: the wrong answer has two votes; q1: the right one
    assert m["weighted-vote@n"] == 1.0
    assert m["auc_within"] == pytest.approx(2 / 4)


def test_questions_are_distinct_and_disjoint():
    first, second = tasks.split(tasks.sums(0), 300, 200)
    texts = [q.text for q in first + second]
    assert len(set(texts)) == 500
    assert all(eval(q.text) == int(q.answer) for q in first)
    with pytest.raises(ValueError, match="not enough different questions: 301 asked for, 300 found"):
        tasks.split(iter(first), 301)
    with pytest.raises(ValueError, match="not enough different questions: 9 asked for, 8 found"):
        tasks.split(tasks.sums(0, low=1, high=2), 9)  # the task itself never ends


def test_chain_sum():
    ours = tasks.split(tasks.chain_sum(3), 20)[0]
    assert all(eval(q.text) == int(q.answer) for q in ours)


def test_read_jsonl(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "1 + 1", "answer": 2}\n{"question": 3}\n')
    lines = tasks.read_jsonl(file)
    assert next(lines) == tasks.Question("1 + 1", "2")
    with pytest.raises(ValueError, match="line 2"):
        next(lines)


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [("14", "14", True), ("+14", "14", True), ("14", "-14", False), ("1/2", "0.5", True), ("x", "14", False)],
)
def test_same_answer(given, right, same):
    assert train.same_answer(given, right) is same


def test_a_run_end_to_end_and_resumed(tmp_path, default_model):
    """The embedded model on a handful of questions; a second run takes up the rollouts of the first."""
    settings = train.Settings(
        task="sums", questions=4, eval_questions=2, samples=4, temperature=0.8, max_new_tokens=40, epochs=2, warmup=1,
        batch=8, seed=0,
    )  # fmt: skip
    metrics = train.train(default_model, settings, tmp_path, Progress(disable=True))
    assert 0 <= metrics["pass@1"].value <= 1
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["settings"]["questions"] == 4 and written["metrics"]["any@n"]["value"] == metrics["any@n"].value
    assert written["rollouts"]["train"]["trajectories"] == 16 and written["rollouts"]["eval"]["trajectories"] == 8
    head = rf.SPRM.from_pretrained(tmp_path)
    assert head.hidden_size == 576
    assert Config(**json.loads((tmp_path / "reflective.json").read_text())) == default_model.config

    kept = train.Rollouts.join(
        [train.Rollouts.load(str(f)) for f in sorted((tmp_path / "train").glob("*.safetensors"))]
    )
    assert len(kept.outcome) == 16 and len(kept.features) == len(kept.trajectory) > 16
    last = max((tmp_path / "train").glob("*.safetensors"))
    before = train.Rollouts.load(str(last))
    last.unlink()
    train.train(default_model, settings, tmp_path, Progress(disable=True))
    again = train.Rollouts.load(str(last))
    assert torch.equal(before.tokens, again.tokens) and torch.allclose(before.features, again.features, atol=1e-4)
    with pytest.raises(ValueError, match="other settings"):
        train.train(
            default_model, train.Settings(**{**vars(settings), "temperature": 0.9}), tmp_path, Progress(disable=True)
        )
    unanswering = copy.copy(default_model)
    unanswering.config = Config(rule="text")
    with pytest.raises(ValueError, match="no answer pattern"):
        train.train(unanswering, settings, tmp_path, Progress(disable=True))
    with pytest.raises(ValueError, match="neither one of sums, chain_sum nor a JSONL file"):
        train.train(
            default_model, train.Settings(**{**vars(settings), "task": "maths"}), tmp_path, Progress(disable=True)
        )
