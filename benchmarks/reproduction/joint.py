"""Joint training of the recipe: GRPO on the three families at once, the SPRM's loss riding along."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import torch

from reflective.engines.hf.internals import checkpointing_setting
from reflective.model import CONFIG_NAME, ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.tasks import Question
from reflective.train import verifier

from . import heads
from .families import FAMILIES
from .rollouts import MAX_NEW_TOKENS, TEMPERATURE, dtype_of, policy, questions, trained, untrained

STEPS, PROMPTS, GROUP = 30, 4, 8  # optimizer steps; of each: questions, answers to each
RANK, POLICY_LR, HEAD_LR, HEAD_UPDATES = 16, 2e-4, 3e-4, 10


def train(model: ReflectiveModel, head: SPRM, path: Path, seed: int, steps: int = STEPS) -> None:
    """Train a LoRA adapter of ``model`` and ``head`` from where they are; both, and the log, go into ``path``.

    Questions are those of training, the families taking turns: the prompts of one step share their worked examples. An interrupted run goes on from its newest
    checkpoint there.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_utils import get_last_checkpoint

    from reflective.train.grpo import ReflectiveGRPOConfig, ReflectiveGRPOTrainer, shared_rollouts

    asked: list[list[tuple[str, Question]]] = []
    for name, family in FAMILIES.items():
        chosen = questions(family)[0]
        random.Random(f"{seed} {name}").shuffle(chosen)
        asked.append([(name, q) for q in chosen])
    turns = [asked[step % len(FAMILIES)].pop() for step in range(steps) for _ in range(PROMPTS)]
    asking = {name: policy(model, family) for name, family in FAMILIES.items()}
    verify = {name: verifier("answer", m.answer) for name, m in asking.items()}
    data = Dataset.from_list(
        [{"prompt": asking[name].format(q.text), "family": name, "answer": q.answer} for name, q in turns]
    )

    def correct(completions: list[str], family: list[str], answer: list[str], **_: object) -> list[float | None]:
        return [verify[f](text, Question("", a)) for text, f, a in zip(completions, family, answer, strict=True)]

    stop = next(iter(asking.values())).config.stop
    args = ReflectiveGRPOConfig(
        output_dir=str(path), max_steps=steps, seed=seed, shuffle_dataset=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, max_completion_length=MAX_NEW_TOKENS,
        temperature=TEMPERATURE, top_p=1.0, learning_rate=POLICY_LR, lr_scheduler_type="constant_with_warmup",
        warmup_steps=3, beta=0.0, bf16=model.model.dtype == torch.bfloat16, use_cpu=not torch.cuda.is_available(), **checkpointing_setting(False),
        logging_steps=1, save_steps=max(1, steps // 4), save_total_limit=1, head_learning_rate=HEAD_LR,
        head_updates=HEAD_UPDATES,
        sprm_warmup_steps=None, within_questions=True, class_balance=False,
    )  # fmt: skip
    trainer = ReflectiveGRPOTrainer(
        model.model, correct, args, steps=model.steps, head=head, train_dataset=data, processing_class=model.tokenizer,
        rollout_func=shared_rollouts(stop=stop), peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(path)) if path.is_dir() else None)
    trainer.save_model(str(path))
    config = next(iter(asking.values())).config
    (path / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n")
    trainer.state.save_to_json(str(path / "trainer_state.json"))


def home(work: Path, seed: int) -> Path:
    """Where the policy of ``seed`` lies, and what it answers."""
    return work / "joint" / f"seed {seed}"


def train_seed(work: Path, seed: int) -> str:
    """Train the untrained policy, and the head of all families, from ``seed``."""
    if not (home(work, seed) / "trainer_state.json").is_file():
        train(untrained(dtype_of(work)), heads.head(work, heads.ALL, heads.MAIN, seed).float(), home(work, seed), seed)
    return f"trained, seed {seed}"


def merged(path: Path, dtype: torch.dtype = torch.bfloat16) -> ReflectiveModel:
    """The embedded model with the adapter that ``train`` left in ``path`` merged into it, and its head."""
    return trained(dtype, path)
