"""The policy of the comparison: the embedded model, which as it comes answers none of these questions, after a lesson in their form.

As it comes, SmolLM2-135M-Instruct gets 0 to 3 % of chains of eight steps right, whether as sums, rewritten sums or stories, with two to six worked examples.
So a LoRA adapter learns from worked answers, and is stopped when the model is right about one time in four: where it errs, it errs by
itself. No question of the comparison is among them.
"""

import itertools
from pathlib import Path

import torch

from reflective.benchmarks.reproduction.joint import RANK
from reflective.benchmarks.reproduction.rollouts import dtype_of, untrained
from reflective.checkpoints.default import converted
from reflective.model import ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.tasks import split
from reflective.utils.outputs import json_text

from .families import CONFIG, FAMILIES, Worked

STEPS, BATCH, LR = 64, 16, 1e-3
# ``further`` questions of the evaluation: for strategies that decode nothing which best of n does not, so that one more costs little.
SIZES = {"lesson": STEPS * BATCH // len(FAMILIES), "calibration": 192, "eval": 200, "further": 100}
TRAIN = {"chains": 768, "crates": 1024}  # of crates most are answered right, or wrong, every time, and tell nothing


def sizes(family: str) -> dict[str, int]:
    """Questions by what is done with them."""
    return {"lesson": SIZES["lesson"], "train": TRAIN[family], **SIZES}


def questions(family: str, part: str) -> list[Worked]:
    """Those of one part of ``sizes``, which have no question in common."""
    parts = sizes(family)
    return dict(zip(parts, split(FAMILIES[family](0), *parts.values()), strict=True))[part]


def learn(work: Path) -> None:
    """Leave the adapter in ``work/policy``, unless it lies there."""
    place = work / "policy"
    if (place / "reflective.json").is_file():
        return
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model = untrained(torch.float32)
    lessons = [questions(family, "lesson") for family in FAMILIES]
    rows = [
        {"prompt": CONFIG.prompt.format(question=q.text), "completion": q.response}
        for q in itertools.chain.from_iterable(zip(*lessons, strict=True))
    ]
    args = SFTConfig(
        output_dir=str(place), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=LR, lr_scheduler_type="linear",
        warmup_steps=5, bf16=dtype_of(work) == torch.bfloat16, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, report_to="none", logging_steps=5,
        save_strategy="no", shuffle_dataset=False, seed=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model.model, args, train_dataset=Dataset.from_list(rows), processing_class=model.tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(place)
    (place / "reflective.json").write_text(json_text(vars(CONFIG), indent=2) + "\n")


def load(work: Path) -> ReflectiveModel:
    """The policy, with a head that was not trained."""
    return ReflectiveModel.from_pretrained(converted(), head=work / "policy", dtype=dtype_of(work), untrained=True)


def with_head(model: ReflectiveModel, head: SPRM) -> ReflectiveModel:
    """The same policy with a head of its own dtype."""
    return ReflectiveModel(model.model, model.tokenizer, head.to(model.model.dtype), model.config)
