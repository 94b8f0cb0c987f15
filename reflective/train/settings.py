"""What a training run depends on beside the model. No torch here: the command line has its defaults from this."""

from dataclasses import dataclass
from typing import Literal

Way = Literal["head", "backbone", "joint"]


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        way: what is trained: the head on recorded features; the backbone too, from outcomes; policy and head together.
        task: ``sums``, ``chain_sum``, ``reasoning-gym:<dataset>``, or a JSONL or parquet file, see ``read_questions``.
        verifier: see ``reflective.train.verifier``; None: that of the reasoning-gym dataset, else ``answer``.
        data: JSONL or parquet file of judged responses, in place of a task, see ``read_rollouts``.
        questions, eval_questions: to learn from, and others to measure on. Of ``data`` at most a third is measured on,
            and the rest is learnt from.
        samples: responses to each question.
        temperature, top_p, max_new_tokens: of responses.
        batch_rows: responses decoded together.
        epochs: passes of the head alone over the rollouts.
        warmup: epochs (``head``) or optimizer steps in plain BCE before the dynamic weights; None: never dynamic; 0:
            from the start, as published. The head that other ways begin with is always fitted in plain BCE.
        lr: of the head; published ones were trained with 1e-5.
        batch: different trajectories an optimizer step (``joint``: answers), over all processes.
        within_questions: only questions answered both ways, their two sides weighted equally.
        class_balance: weigh the two outcomes of a batch against each other.
        width: hidden units of a new head; None: twice the hidden size.
        continue_head: published head to go on from; None: a new one.
        lora: rank of LoRA layers (``backbone``, ``joint``); None: all weights.
        backbone_lr: of LoRA layers or backbone.
        backbone_epochs: passes over the rollouts (``backbone``).
        steps, group: optimizer steps, and answers to each of their questions (``joint``).
        gradient_checkpointing: run layers twice and keep less (``backbone``, ``joint``).
        dtype: of rollouts and of the matrix products in training: ``bfloat16``, ``float32``, or ``auto``: rollouts in
            the model's own, training in bfloat16. A head alone is always fitted in float32.
        seed: of everything that is random.
        published: write ``score_module.pt`` too.
    """

    way: Way = "head"
    task: str = "sums"
    verifier: str | None = None
    data: str | None = None
    questions: int = 640
    eval_questions: int = 320
    samples: int = 12
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 64
    batch_rows: int = 256
    epochs: int = 32
    warmup: int | None = None
    lr: float = 3e-4
    batch: int = 64
    within_questions: bool = True
    class_balance: bool = False
    width: int | None = None
    continue_head: str | None = None
    lora: int | None = 8
    backbone_lr: float = 1e-4
    backbone_epochs: int = 1
    steps: int = 100
    group: int = 8
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    seed: int = 0
    published: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("way", ("head", "backbone", "joint")), ("dtype", ("auto", "bfloat16", "float32"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        if self.way == "joint" and self.data is not None:
            raise ValueError("data: way joint learns from answers of its own; give a task and a verifier")
        if self.way == "joint" and self.batch % self.group:
            raise ValueError(f"batch={self.batch} is no multiple of group={self.group}")
