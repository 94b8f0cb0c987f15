"""Way three from questions: the trainer of ``grpo``, set up, resumed and told of."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of rollout functions at every start

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..engines.hf.internals import checkpointing_setting
from ..model import ReflectiveModel
from ..search.verify import Verifier
from ..tasks import Question
from .backbone import Tuned
from .grpo import ReflectiveGRPOConfig, ReflectiveGRPOTrainer, shared_rollouts
from .settings import Settings

_TOKENS = 8192  # generated ones a forward: their logits are what fills the memory, 1.6 GB in float32 at 49,152 words
_TOLD = {"reward": "reward", "sprm/loss": "loss", "sprm/kept": "kept", "sprm/score_gap": "gap"}


def train_jointly(
    model: ReflectiveModel,
    questions: Sequence[Question],
    verify: Verifier,
    settings: Settings,
    path: Path,
    *,
    processes: int = 1,
    tell: Callable[..., None] = lambda step, **numbers: None,
) -> Tuned:
    """Train policy and ``model.head`` by GRPO and the SPRM loss of the same rollouts, both in place.

    Args:
        questions: in random order, as often as ``settings.steps`` take.
        path: of TRL's checkpoints; a run that was killed goes on from the newest.
        processes: among which a batch is divided; the trainer finds them itself.
        tell: called with the optimizer step, and by name with ``reward``, ``loss``, ``kept`` and ``gap`` if known.

    Raises:
        ValueError: a batch that cannot be divided, or full training of a model that is not float32.
    """
    s, net = settings, model.model
    if s.batch % processes:
        raise ValueError(f"batch={s.batch} cannot be divided among {processes} processes")
    if s.lora is None and net.dtype.itemsize < 4:
        raise ValueError(f"model: full training loses small updates in {net.dtype}; load it in float32, or use LoRA")
    share = s.batch // processes
    rows = max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * s.max_new_tokens <= _TOKENS))
    templated = model.config.prompt is None and model.tokenizer.chat_template is not None
    prompts = [[{"role": "user", "content": q.text}] if templated else model.format(q.text) for q in questions]
    # The whole run is one epoch: a resumed trainer knows where in an epoch it was, but deals the next ones anew.
    asked = s.steps * s.batch // s.group
    dealer = torch.Generator().manual_seed(s.seed)
    dealt = [torch.randperm(len(questions), generator=dealer) for _ in range(-(-asked // len(questions)))]
    numbers = torch.cat(dealt)[:asked].tolist()

    def correct(completions: list[Any], number: list[int], **_: object) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [verify(text, questions[i]) for text, i in zip(texts, number, strict=True)]

    args = ReflectiveGRPOConfig(
        output_dir=str(path), max_steps=s.steps, seed=s.seed, shuffle_dataset=False, report_to="none",
        disable_tqdm=True, logging_steps=1, save_strategy="steps", save_steps=max(1, s.steps // 10), save_total_limit=1,
        use_cpu=net.device.type == "cpu",
        bf16=s.dtype != "float32", **checkpointing_setting(s.gradient_checkpointing), per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows, num_generations=s.group, max_completion_length=s.max_new_tokens,
        temperature=s.temperature, top_p=s.top_p, beta=0.0, learning_rate=s.backbone_lr, warmup_steps=3,
        lr_scheduler_type="constant_with_warmup", head_learning_rate=s.lr, head_updates=s.head_updates, sprm_warmup_steps=s.warmup,
        within_questions=s.within_questions, class_balance=s.class_balance, at=model.config.at,
    )  # fmt: skip
    trainer = ReflectiveGRPOTrainer(
        net, correct, args, steps=model.steps, head=model.head, processing_class=model.tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [prompts[i] for i in numbers], "number": numbers}),
        rollout_func=shared_rollouts(stop=model.config.stop, batch_rows=s.batch_rows), callbacks=[_Tell(tell)],
        peft_config=LoraConfig(r=s.lora, lora_alpha=2 * s.lora, target_modules="all-linear") if s.lora else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(path)) if path.is_dir() else None)
    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False).eval()
    adapter = trained if isinstance(trained, PeftModel) else None
    model.model = trained if adapter is None else adapter.get_base_model()
    head = trainer.head.requires_grad_(False).eval()
    model.head = copy.deepcopy(head).to(model.model.dtype)
    return Tuned(model, head, adapter)


class _Tell(TrainerCallback):
    def __init__(self, tell: Callable[..., None]) -> None:
        self.tell = tell

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        self.tell(state.global_step, **{ours: logs[theirs] for theirs, ours in _TOLD.items() if theirs in logs})
