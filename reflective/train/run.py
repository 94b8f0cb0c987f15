"""Train a head from outcomes alone: roll out with the scorer recording features, fit, measure on unseen questions."""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from .generation import sample
from .loss import sprm_loss
from .model import CONFIG_NAME, ReflectiveModel
from .scorer import StreamScorer
from .sprm import SPRM, geometric_mean
from .tasks import TASKS, Question, read_jsonl, split


@dataclass
class Rollouts:
    """Sampled trajectories and the features of their steps.

    Attributes:
        features: [M, H] float32; trajectory: [M] int64, the owner of each step, ascending.
        outcome: [N] float32, 1 correct, 0 incorrect; question: [N] int64, the question that was answered.
        answer: [N] int64, equal numbers for equal answers to one question, -1 where none was given.
        tokens: [N] int64, length of each response.
    """

    features: Tensor
    trajectory: Tensor
    outcome: Tensor
    question: Tensor
    answer: Tensor
    tokens: Tensor

    def save(self, path: str) -> None:
        safetensors.torch.save_file(vars(self), path)

    @classmethod
    def load(cls, path: str) -> "Rollouts":
        return cls(**safetensors.torch.load_file(path))

    @classmethod
    def join(cls, parts: Sequence["Rollouts"]) -> "Rollouts":
        shift = torch.tensor([0, *(len(p.outcome) for p in parts)]).cumsum(0).tolist()
        joined = {k: torch.cat([getattr(p, k) for p in parts]) for k in vars(parts[0])}
        joined["trajectory"] = torch.cat([p.trajectory + s for p, s in zip(parts, shift, strict=False)])
        return cls(**joined)


def roll_out(
    model: ReflectiveModel,
    questions: Sequence[Question],
    *,
    samples: int = 8,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    batch: int = 64,
    seed: int = 0,
    first: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[Rollouts]:
    """Answer every question ``samples`` times; yields one batch of about ``batch`` trajectories at a time.

    Every batch is seeded by itself, so starting at batch ``first`` yields what a whole run would from there.

    Features are those that the scorer gathers while decoding: no forward is run for them. Questions are batched by the
    length of their prompt, and what the prompts of a batch begin with in common is prefilled once.
    """
    prompts = [model.encode(model.format(q.text))[0] for q in questions]
    for number, group in enumerate(_groups([len(p) for p in prompts], max(1, batch // samples))):
        if number >= first:
            torch.manual_seed(seed * 1_000_003 + number)
            ids = torch.stack([prompts[g] for g in group]).repeat_interleave(samples, 0)
            same = (ids == ids[0]).all(0)
            shared = min(int(same.long().cumprod(0).sum()), ids.shape[1] - 1)
            scorer = StreamScorer(model.model, model.head, model.steps, at=model.config.at, record_features=True)
            sequences = sample(
                model.model, model.tokenizer, scorer, ids, shared=shared, max_new_tokens=max_new_tokens,
                temperature=temperature, top_p=top_p, stop=model.config.stop,
            )  # fmt: skip
            yield _judge(model, scorer, sequences, ids.shape[1], [questions[g] for g in group], group, samples)
        progress(len(group) * samples)


def _groups(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of equal length, at most ``size`` together."""
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for _, same in itertools.groupby(by_length, key=lambda i: lengths[i]):
        while group := list(itertools.islice(same, size)):
            yield group


def _judge(
    model: ReflectiveModel, scorer: StreamScorer, sequences: Tensor, prompt_length: int,
    questions: list[Question], numbers: list[int], samples: int,
) -> Rollouts:  # fmt: skip
    candidates = model.candidates(sequences, prompt_length, scorer.result(sequences))
    features, owner = scorer.features()
    outcome, answers = [], []
    for q, question in enumerate(questions):
        kinds: dict[str, int] = {}
        for candidate in candidates[q * samples : (q + 1) * samples]:
            given = candidate.answer
            outcome.append(float(given is not None and same_answer(given, question.answer)))
            answers.append(-1 if given is None else kinds.setdefault(given, len(kinds)))
    return Rollouts(
        features=features.float().cpu(),
        trajectory=owner.cpu(),
        outcome=torch.tensor(outcome),
        question=torch.tensor(numbers).repeat_interleave(samples),
        answer=torch.tensor(answers),
        tokens=torch.tensor([len(c.token_ids) for c in candidates]),
    )


def same_answer(given: str, right: str) -> bool:
    """Equal as text, or else in math-verify's judgement."""
    if given.strip() == right.strip():
        return True
    if _is_integer(given) and _is_integer(right):
        return int(given) == int(right)
    from math_verify import parse, verify

    return bool(verify(parse(right), parse(given)))


def _is_integer(text: str) -> bool:
    return text.strip().lstrip("+-").isdecimal()


def recorded(path: Path, settings: dict[str, Any], make: Callable[[int], Iterator[Rollouts]]) -> Rollouts:
    """All rollouts of ``make``, kept in directory ``path`` batch by batch, so that an interrupted run goes on there.

    Args:
        settings: what the rollouts depend on; kept beside them.
        make: yields the batches from a given one on.

    Raises:
        ValueError: ``path`` holds rollouts of other settings.
    """
    path.mkdir(parents=True, exist_ok=True)
    stamp, text = path / "settings.json", json.dumps(settings, sort_keys=True, indent=2)
    if stamp.is_file() and stamp.read_text() != text:
        raise ValueError(f"{path} holds rollouts made with other settings; choose another directory or remove it")
    stamp.write_text(text)
    files = sorted(path.glob("*.safetensors"))
    parts = [Rollouts.load(str(file)) for file in files]
    for number, part in enumerate(make(len(parts)), len(parts)):
        part.save(str(path / "unfinished"))
        (path / "unfinished").rename(path / f"{number:05d}.safetensors")
        parts.append(part)
    return Rollouts.join(parts)


def fingerprint(model: ReflectiveModel) -> str:
    """A hash of every 997th weight of the backbone: which model made the rollouts, wherever its files lie."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.model.state_dict().items()):
        digest.update(name.encode() + weight.flatten()[::997].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def fit(
    rollouts: Rollouts,
    *,
    epochs: int = 24,
    warmup: int = 24,
    lr: float = 3e-4,
    batch: int = 64,
    weight_decay: float = 0.01,
    within_questions: bool = True,
    class_balance: bool = False,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda epoch, loss: None,
) -> SPRM:
    """Fit a head to recorded features by the self-supervised loss, backbone untouched.

    Features are standardised per dimension while fitting, and that is folded into the first layer at the end, so the
    head reads raw hidden states.

    Args:
        epochs: passes over the questions; of these ``warmup`` in plain BCE before the dynamic weights switch on, all of
            them by default: on questions held back, plain BCE ranked best and the weights cost accuracy even after a
            warm-up (``benchmarks/results/head_schedules.csv``).
        batch: trajectories a step, all samples of a question together.
        within_questions: use only questions with both outcomes and weigh the two sides of each equally, so that nothing
            can be learnt from how hard a question is.
        class_balance: weigh the two outcomes of a batch against each other, see ``sprm_loss``; adds nothing to the
            balance within questions.
        progress: called with epoch and its mean loss.

    Raises:
        ValueError: nothing to learn from: no step, or one outcome only.
    """
    x, owner, y = rollouts.features, rollouts.trajectory, rollouts.outcome
    if not len(x) or y.min() == y.max():
        raise ValueError(f"rollouts: {len(x)} steps, {int(y.sum())} of {len(y)} correct; both outcomes are needed")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    mean, sd = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / sd
    weight = _question_weights(rollouts) if within_questions else torch.ones_like(y)
    used = torch.unique(rollouts.question[weight > 0])

    head = SPRM(x.shape[1]).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    per_step = max(1, batch // int(torch.bincount(rollouts.question).max()))
    of_question = {int(q): (rollouts.question == q).nonzero().flatten() for q in used}
    steps_of = torch.bincount(owner, minlength=len(y))
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), steps_of.cumsum(0)])
    for epoch in range(epochs):
        losses = []
        for chunk in used[torch.randperm(len(used), generator=generator)].split(per_step):
            trajectories = torch.cat([of_question[int(q)] for q in chunk])
            rows = torch.cat([torch.arange(begins[t], begins[t + 1]) for t in trajectories.tolist()])
            index = torch.arange(len(trajectories)).repeat_interleave(steps_of[trajectories])
            loss = sprm_loss(
                head(x[rows]).squeeze(-1), index, y[trajectories], dynamic=epoch >= warmup,
                class_balance=class_balance, trajectory_weight=weight[trajectories],
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        progress(epoch, sum(losses) / len(losses))
    with torch.no_grad():
        head[0].weight /= sd
        head[0].bias -= head[0].weight @ mean
    return head.requires_grad_(False).eval()


def _question_weights(rollouts: Rollouts) -> Tensor:
    """[N]: per question, each outcome's trajectories share a weight of half the question's; 0 with one outcome only."""
    n = int(rollouts.question.max()) + 1
    right = torch.zeros(n).index_add(0, rollouts.question, rollouts.outcome)
    wrong = torch.zeros(n).index_add(0, rollouts.question, 1 - rollouts.outcome)
    side = torch.where(rollouts.outcome > 0, right[rollouts.question], wrong[rollouts.question])
    both = ((right > 0) & (wrong > 0))[rollouts.question]
    return torch.where(both, (right + wrong)[rollouts.question] / (2 * side), 0.0)


@dataclass(frozen=True)
class Metric:
    """Attributes: ``value``; ``low``, ``high``: 95 % bootstrap interval over questions."""

    value: float
    low: float
    high: float


def evaluate(rollouts: Rollouts, head: SPRM, *, resamples: int = 2000, seed: int = 0) -> dict[str, Metric]:
    """Selection by score on rollouts of unseen questions, against what needs no score.

    ``pass@1`` is the mean outcome, ``random-of-n`` one seeded pick, ``any@n`` the ceiling, ``auc_within`` the chance that a
    correct trajectory outscores an incorrect one of the same question. Of equal votes the mean outcome counts.
    """
    with torch.no_grad():
        log_scores = F.logsigmoid(head.float()(rollouts.features).squeeze(-1)).clamp_min(math.log(1e-10)).double()
    n = len(rollouts.outcome)
    log_sum = torch.zeros(n, dtype=torch.float64).index_add(0, rollouts.trajectory, log_scores)
    steps = torch.bincount(rollouts.trajectory, minlength=n)
    score = [geometric_mean(s, k) for s, k in zip(log_sum.tolist(), steps.tolist(), strict=True)]
    outcome, answer = rollouts.outcome.tolist(), rollouts.answer.tolist()

    rng = random.Random(seed)
    rows: list[dict[str, float]] = []
    for q in torch.unique(rollouts.question).tolist():
        group = (rollouts.question == q).nonzero().flatten().tolist()
        best = max(score[i] for i in group)
        right = [score[i] for i in group if outcome[i]]
        wrong = [score[i] for i in group if not outcome[i]]
        rows.append(
            {
                "pass@1": _mean([outcome[i] for i in group]),
                "random-of-n": outcome[rng.choice(group)],
                "majority@n": _vote(group, answer, outcome, dict.fromkeys(group, 1.0)),
                "weighted-vote@n": _vote(group, answer, outcome, {i: score[i] for i in group}),
                "best-of-n": _mean([outcome[i] for i in group if score[i] == best]),
                "any@n": max(outcome[i] for i in group),
                "pairs": len(right) * len(wrong),
                "won": sum((r > w) + 0.5 * (r == w) for r in right for w in wrong),
            }
        )
    table = {k: torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in rows[0]}
    draws = torch.randint(len(rows), (resamples, len(rows)), generator=torch.Generator().manual_seed(seed))
    pairs, won = table.pop("pairs"), table.pop("won")
    metrics = {k: _interval(float(v.mean()), v[draws].mean(1)) for k, v in table.items()}
    metrics["auc_within"] = _interval(float(won.sum() / pairs.sum()), won[draws].sum(1) / pairs[draws].sum(1))
    return metrics


def _vote(group: list[int], answer: list[int], outcome: list[float], weight: dict[int, float]) -> float:
    totals: dict[int, float] = {}
    for i in group:
        if answer[i] >= 0:
            totals[answer[i]] = totals.get(answer[i], 0.0) + weight[i]
    if not totals:
        return 0.0
    top = max(totals.values())
    return _mean([_mean([outcome[i] for i in group if answer[i] == a]) for a, total in totals.items() if total == top])


def _interval(value: float, draws: Tensor) -> Metric:
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Metric(value, low, high)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Settings:
    """Everything a training run depends on. Attributes: see ``reflective train --help``."""

    task: str
    questions: int
    eval_questions: int
    samples: int
    temperature: float
    max_new_tokens: int
    epochs: int
    warmup: int
    batch: int
    seed: int


def train(model: ReflectiveModel, settings: Settings, output: Path, bars: Any) -> dict[str, Metric]:
    """Roll out, fit, evaluate; writes ``score_module.safetensors``, ``reflective.json`` and ``report.json`` to ``output``.

    Training and evaluation questions are disjoint.

    Args:
        bars: a ``rich.progress.Progress``.

    Raises:
        ValueError: an unknown task, too few questions, no answer pattern, or nothing to learn from.
    """
    s = settings
    if model.config.answer is None:
        raise ValueError(f"model: its {CONFIG_NAME} has no answer pattern, so no answer can be judged")
    if s.task in TASKS:
        questions = TASKS[s.task](s.seed)
    elif Path(s.task).is_file():
        questions = read_jsonl(s.task)
    else:
        raise ValueError(f"task={s.task!r}: neither one of {', '.join(TASKS)} nor a JSONL file")
    parts = dict(zip(("train", "eval"), split(questions, s.questions, s.eval_questions), strict=True))
    rollouts = {}
    for number, (name, chosen) in enumerate(parts.items()):
        bar = bars.add_task(f"roll out {name}", total=len(chosen) * s.samples)

        def make(first: int, chosen=chosen, number=number, bar=bar) -> Iterator[Rollouts]:
            return roll_out(
                model, chosen, samples=s.samples, temperature=s.temperature, max_new_tokens=s.max_new_tokens,
                batch=s.batch, seed=2 * s.seed + number, first=first, progress=lambda n: bars.advance(bar, n),
            )  # fmt: skip

        depends = {k: getattr(s, k) for k in ("task", "samples", "temperature", "max_new_tokens", "batch", "seed")}
        depends |= {"model": fingerprint(model), "use": asdict(model.config), "questions": [q.text for q in chosen]}
        rollouts[name] = recorded(output / name, depends, make)
    bar = bars.add_task("fit", total=s.epochs)
    head = fit(
        rollouts["train"], epochs=s.epochs, warmup=s.warmup, seed=s.seed, progress=lambda epoch, loss: bars.advance(bar)
    )
    metrics = evaluate(rollouts["eval"], head)
    head.to(model.model.dtype).save_pretrained(output)
    (output / CONFIG_NAME).write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    counts = {
        name: {"trajectories": len(r.outcome), "steps": len(r.features), "correct": float(r.outcome.mean())}
        for name, r in rollouts.items()
    }
    report = {"settings": asdict(s), "rollouts": counts, "metrics": {k: asdict(m) for k, m in metrics.items()}}
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return metrics


def table(metrics: dict[str, Metric]) -> Table:
    """The metrics for a terminal."""
    table = Table("held-out questions", "value", "95 % interval")
    for name, m in metrics.items():
        table.add_row(name, f"{m.value:.3f}", f"{m.low:.3f} – {m.high:.3f}")
    return table
