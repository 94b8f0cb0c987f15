"""Rollouts of the recipe: per family and policy, with every view of the states that a table asks for."""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reflective.checkpoints.default import HEAD, converted
from reflective.model import Config, ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.scoring.steps import StepTokens
from reflective.scoring.taps import Tap
from reflective.tasks import Question, split
from reflective.train.data import Rollouts
from reflective.train.rollout import View, recorded, roll_out_views

from .families import FAMILIES, Family

TRAIN, FIRST, EVAL, SEEDS = 1024, 512, 510, 3  # questions; those of evaluation are dealt to the seeds of joint training
MORE, CALIBRATION = 1024, 256  # further ones to learn from, and those that rules are calibrated on
TRAIN_SAMPLES, EVAL_SAMPLES, TEMPERATURE, MAX_NEW_TOKENS = 12, 32, 0.8, 48
LAYERS = (*range(-1, -11, -1), -12, -14, -16, -20)  # of the model's 30
RULES = {"blank line": "\n\n", "full stop": ".", "equals sign": "="}  # delimiters beside ".\n\n"


def questions(family: Family) -> tuple[list[Question], list[Question]]:
    """For training and for evaluation, without a common question."""
    train, held_out, *_ = _split(family)
    return train, held_out


def further(family: Family) -> tuple[list[Question], list[Question]]:
    """More for training, and those on which rules are calibrated: none of ``questions``, and none of both."""
    *_, more, calibration = _split(family)
    return more, calibration


def _split(family: Family) -> tuple[list[Question], ...]:
    # Held out between two parts of the others: what is trained on can grow without changing what is held out.
    first, held_out, rest, more, calibration = split(family.questions(0), FIRST, EVAL, TRAIN - FIRST, MORE, CALIBRATION)
    seen = {q.text for q in (*first, *rest, *more)} | {question for question, *_ in family.examples}
    assert not seen & {q.text for q in (*held_out, *calibration)}
    return first + rest, held_out, more, calibration


def policy(model: ReflectiveModel, family: Family) -> ReflectiveModel:
    """``model`` asked as the family is."""
    return ReflectiveModel(model.model, model.tokenizer, model.head, family.config)


def views(model: ReflectiveModel, *, all_of_them: bool) -> dict[str, View]:
    """The published one, ``steps``, and ``layers``, all of ``LAYERS``; beside these ``at="token"``, an outcome head's and other step
    rules'."""
    found = {"steps": View(model.steps), "layers": View(model.steps, Tap(LAYERS))}
    if all_of_them:
        found |= {"token": View(model.steps, Tap(at="token")), "outcome": View(None)}
        for name, delimiter in RULES.items():
            found[name] = View(StepTokens.from_tokenizer(model.tokenizer, rule="text", delimiter=delimiter))
    return found


def rollouts(
    model: ReflectiveModel,
    family: Family,
    asked: list[Question],
    path: Path,
    *,
    samples: int,
    seed: int,
    all_views: bool,
    batch_rows: int = 256,
) -> dict[str, Rollouts]:
    """Answers to ``asked``, kept under ``path``."""
    model = policy(model, family)
    settings: dict[str, Any] = {
        "temperature": TEMPERATURE, "top_p": 1.0, "max_new_tokens": MAX_NEW_TOKENS, "samples": samples, "seed": seed,
        "batch_rows": batch_rows, "verify": "answer",
    }  # fmt: skip

    def make(first: int) -> Iterator[dict[str, Rollouts]]:
        return roll_out_views(
            model, asked, views(model, all_of_them=all_views), **settings, block=256, first=first,
            progress=lambda n: None,
        )  # fmt: skip

    use = {"use": asdict(model.config), "dtype": str(model.model.dtype)}
    depends = settings | use | {"questions": [q.text for q in asked]}
    return recorded(path, depends, make)


def dtype_of(work: Path) -> torch.dtype:
    """In which the recipe's models decode: what is faster on the machine that began it, and kept with ``work``, as rollouts of two dtypes do not
    go together.

    bfloat16 is four times as fast where the CPU has it in hardware.
    """
    kept = work / "dtype.json"
    if not kept.is_file():
        seconds = {name: _seconds(getattr(torch, name)) for name in ("bfloat16", "float32")}
        found = {"dtype": min(seconds, key=seconds.__getitem__), "seconds": {name: round(s, 6) for name, s in seconds.items()}}
        if any((work / name).is_dir() for name in FAMILIES):  # begun when nothing was measured
            found["dtype"] = "bfloat16"
        kept.write_text(json.dumps(found))
    return getattr(torch, json.loads(kept.read_text())["dtype"])


def _seconds(dtype: torch.dtype) -> float:
    """Of a product of the size of those in decoding 256 rows, the median of many."""
    x, w = torch.randn(256, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    taken = []
    for _ in range(30):
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def untrained(dtype: torch.dtype) -> ReflectiveModel:
    """The embedded model before any training of ours: what the package ships has an adapter, which came of this recipe."""
    model = AutoModelForCausalLM.from_pretrained(converted(), dtype=dtype).eval()
    head = SPRM(model.config.hidden_size).requires_grad_(False).eval().to(dtype)
    return ReflectiveModel(model, AutoTokenizer.from_pretrained(converted()), head, Config(rule="text"))


def trained(dtype: torch.dtype, place: Path = HEAD) -> ReflectiveModel:
    """The embedded model with the head and the adapter in ``place``, by default those that are shipped.

    Models are loaded so: ``model.to(bfloat16)`` would round the frequencies of the rotary embedding too.
    """
    return ReflectiveModel.from_pretrained(converted(), head=place, dtype=dtype)
