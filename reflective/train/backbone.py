"""Way two: head and backbone, whole or by LoRA, from recorded outcomes. Also for a process reward model of its own."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..engines.hf.backbone import Backbone
from ..engines.hf.finished import read_positions
from ..engines.hf.internals import Conv1D, checkpoints, set_checkpointing
from ..engines.hf.parts import check_steps
from ..model import CONFIG_NAME, ReflectiveModel
from ..scoring.loss import sprm_loss_rows
from ..scoring.sprm import SPRM
from ..utils.fingerprint import fingerprint
from ..utils.lengths import batches_by_length
from ..utils.outputs import json_text, write_text
from .checkpoint import Checkpoint
from .data import Rollouts
from .head import Batches, Standardised, check_trainable
from .processes import Processes

if TYPE_CHECKING:
    from accelerate import Accelerator

_PAD = 0  # the id under padding
_PLAN_TOKENS = 65_536  # looked through for steps at once


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all processes.

    Attributes:
        number, epoch: from 1, and from 0.
        done: share of the run, up to 1.
        loss: of the batch.
        kept: fraction of its judged steps that carry loss.
        right, wrong: mean score of the steps of correct and of incorrect trajectories; NaN without any.
    """

    number: int
    epoch: int
    done: float
    loss: float
    kept: float
    right: float
    wrong: float

    @property
    def gap(self) -> float:
        """By how much correct trajectories' steps score higher."""
        return self.right - self.wrong


@dataclass(frozen=True)
class Tuned:
    """What ``tune`` trained.

    Attributes:
        model: with the trained backbone and head, the head in the model's dtype.
        head: in float32.
        adapter: the LoRA layers within ``model.model``, None where the whole backbone was trained.
    """

    model: ReflectiveModel
    head: SPRM
    adapter: peft.PeftModel | None

    def save(self, path: str | Path, *, published: bool = False) -> None:
        """Write the head as ``score_module.safetensors`` (if ``published`` as ``score_module.pt`` too) and the adapter, as
        peft keeps it, or the whole model and its tokenizer. The main process's task where there are several."""
        path = Path(path).expanduser()
        if self.adapter is None:
            self.model.save_pretrained(path)
        else:
            # "auto" would ask the hub whether the vocabulary was resized.
            self.adapter.save_pretrained(path, save_embedding_layers=False)
            write_text(path / CONFIG_NAME, json_text(asdict(self.model.config), indent=2) + "\n")
        self.head.save_pretrained(path)
        if published:
            self.head.save_pretrained(path / "score_module.pt")


def tune(
    model: ReflectiveModel,
    rollouts: Rollouts,
    *,
    lora: "peft.LoraConfig | peft.PeftModel | int | None" = 8,
    epochs: int = 1,
    warmup: int | None = None,
    backbone_lr: float = 1e-4,
    head_lr: float = 3e-4,
    lr_warmup: int = 10,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    batch: int = 64,
    batch_tokens: int = 16_384,
    autocast: torch.dtype | None = torch.bfloat16,
    gradient_checkpointing: bool = False,
    feature_gradient_scale: float = 1.0,
    standardise: bool = True,
    within_questions: bool = True,
    class_balance: bool = False,
    seed: int = 0,
    on_step: Callable[[Step], object] | None = None,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    accelerator: "Accelerator | None" = None,
) -> Tuned:
    """Train ``model.head`` and ``model.model`` together by the self-supervised loss on finished trajectories.

    The backbone runs up to the input of its last layer, as in ``rf.score``; only token ids, prompt lengths and outcomes
    of the rollouts are read, so they may stem from another model and another prompt. What prompts of a batch begin with in
    common runs once. ``model`` is trained in place; after an exception its head is the old one, LoRA layers added here are
    gone, and no others have changed than those it trained.

    Args:
        lora: rank of LoRA layers on all matrices below the last layer (scaled by 2), or their configuration; a
            ``PeftModel`` whose adapter lies in ``model.model`` goes on training that; None: all weights, held in float32.
        epochs: passes over the questions.
        warmup: steps of plain BCE before the dynamic weights; 0: none, as published; None: plain BCE throughout.
        backbone_lr, head_lr: of AdamW, reached linearly within ``lr_warmup`` steps. Published heads were trained with 1e-5.
        max_grad_norm: to which head and backbone are clipped, each by itself, as their gradients differ in size.
        batch: different trajectories an optimizer step, all of a question's together; over all processes.
        batch_tokens: padded tokens a forward; a batch is as many forwards as it takes.
        autocast: dtype of the forward's matrix products; None: the model's.
        gradient_checkpointing: keep only the layers' inputs of a forward, and run each layer twice.
        feature_gradient_scale: factor on the gradient that enters the backbone.
        standardise: train the head on features standardised by the statistics of the first batch, folded out again at the
            end. The function that it computes is the same; AdamW's steps are not.
        within_questions: as for ``fit``.
        class_balance: weigh the two outcomes of a batch against each other, see ``sprm_loss``. As a batch may be several
            forwards, the share of steps that dynamic weights keep is taken from the batch before.
        on_step: called after every optimizer step, in the main process only.
        checkpoint: directory for the state every ``save_every`` steps and at the end. A run that was killed goes on there,
            and on a CPU ends with the bits of one that was not.
        accelerator: shares every batch between its processes, each with the whole model and the same rollouts.

    Raises:
        ValueError: nothing to learn from; a head or a vocabulary that does not fit; full training of a model that is not
            float32; an adapter that was not named; ``checkpoint`` holds a run with other settings.
    """
    processes, net = Processes(accelerator, model.model.device), model.model
    settings = {
        "lora": _described(lora), "epochs": epochs, "warmup": warmup, "backbone_lr": backbone_lr, "head_lr": head_lr,
        "lr_warmup": lr_warmup, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "batch": batch,
        "batch_tokens": batch_tokens, "autocast": str(autocast),
        "gradient_checkpointing": gradient_checkpointing, "feature_gradient_scale": feature_gradient_scale,
        "standardise": standardise, "within_questions": within_questions, "class_balance": class_balance, "seed": seed,
        "processes": processes.count, "model": fingerprint(net.parameters()), "head": fingerprint(model.head.parameters()),
        "rollouts": fingerprint(rollouts.tensors.values()),
    }  # fmt: skip
    kept = Checkpoint(checkpoint, settings)
    state = kept.load()
    if accelerator is not None:
        net.to(processes.device)
    reader = _Reader(model, rollouts, autocast, batch_tokens)
    batches = Batches(rollouts, reader.n_steps, batch, within_questions)
    with _in_training(
        net, reader.backbone, lora, autocast, gradient_checkpointing, processes.seeded(seed)
    ) as (adapter, weights):  # fmt: skip
        if state:
            scale = Standardised(*state["scale"])
        elif standardise:
            with torch.no_grad(), processes.seeded(seed):
                scale = Standardised.of(torch.cat([reader(f)[0] for f in reader.forwards(batches.epoch(seed, 0)[0])]))
        else:
            scale = Standardised.none(model.head.hidden_size)
        scale = scale.to(processes.device)
        head = scale.unfolded(model.head.to(processes.device)).requires_grad_(True).train()
        trained = (list(head.parameters()), head_lr), (weights, backbone_lr)
        groups = [{"params": part, "full_lr": lr} for part, lr in trained]
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        learner = _Learner(reader, batches, rollouts, head, scale, optimizer, processes)
        if state:
            learner.load(state)
        number = done = 0
        for epoch in range(epochs):
            for trajectories in batches.epoch(seed, epoch):
                number, done = number + 1, done + len(trajectories)
                if number <= learner.steps:
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = group["full_lr"] * min(1, number / max(1, lr_warmup))
                with processes.seeded(seed, number, processes.index):
                    loss, share, right, wrong = learner.learn(
                        trajectories, max_grad_norm, dynamic=warmup is not None and number > warmup,
                        class_balance=class_balance, feature_gradient_scale=feature_gradient_scale,
                    )  # fmt: skip
                done_share = done / (epochs * len(batches.used))
                if processes.main and (number % save_every == 0 or done_share == 1):
                    kept.save(learner.state())
                if processes.main and on_step is not None:
                    on_step(Step(number, epoch, done_share, loss, share, right, wrong))
    model.head = scale.folded(head).to(reader.backbone.dtype)
    return Tuned(model, scale.folded(head), adapter)


class _Learner:
    """Head, backbone and optimizer, and one step of these."""

    def __init__(
        self, reader: "_Reader", batches: Batches, rollouts: Rollouts, head: SPRM, scale: Standardised,
        optimizer: torch.optim.Optimizer, processes: Processes,
    ) -> None:  # fmt: skip
        self.reader, self.batches, self.rollouts, self.head, self.scale = reader, batches, rollouts, head, scale
        self.optimizer, self.processes, self.steps = optimizer, processes, 0
        self.parts = [group["params"] for group in optimizer.param_groups]
        self.share = torch.ones(2)  # of the steps with y = 0 and with y = 1: how many the batch before kept

    def learn(
        self, trajectories: Tensor, max_grad_norm: float, *, dynamic: bool, class_balance: bool, feature_gradient_scale: float
    ) -> tuple[float, float, float, float]:  # fmt: skip
        """One optimizer step on ``trajectories``. Returns what ``Step`` tells of it: loss, kept, right, wrong."""
        outcome, device = self.rollouts.outcome[trajectories], self.processes.device
        n_steps = torch.bincount((outcome > 0.5).long(), self.reader.n_steps[trajectories].float(), minlength=2)  # [2]
        whole = torch.cat([n_steps * self.share, torch.tensor([len(trajectories)])]).to(device, torch.float32)
        told = torch.zeros(5, device=device)  # loss; steps kept, and sum of scores, where y = 0 and y = 1

        def all_reduce(counts: Tensor) -> None:
            told[1:3] += counts[:2]
            counts.copy_(whole)  # every forward's loss is its share of the batch's

        self.optimizer.zero_grad()
        for rows in self.reader.forwards(trajectories, self.processes):
            features, owner = self.reader(rows)
            features, outcome = self.scale(features), self.rollouts.outcome[rows].to(device)
            loss = sprm_loss_rows(
                self.head, features, owner, outcome, dynamic=dynamic, class_balance=class_balance,
                trajectory_weight=self.batches.weight[rows], feature_gradient_scale=feature_gradient_scale,
                all_reduce=all_reduce,
            )  # fmt: skip
            loss.backward()
            with torch.no_grad():
                scores = self.head.eval()(features).sigmoid().squeeze(-1)
                self.head.train()
                told[0] += loss
                told[3:].index_add_(0, (outcome[owner] > 0.5).long(), scores)
        for weight in (weight for part in self.parts for weight in part):
            if weight.grad is None:  # experts that no token went to, or a process without a share
                weight.grad = torch.zeros_like(weight)
        self.processes.add_up(told, *(weight.grad for part in self.parts for weight in part))
        for part in self.parts:
            nn.utils.clip_grad_norm_(part, max_grad_norm)
        self.optimizer.step()
        self.steps += 1
        loss, *sums = told.tolist()
        kept, scores = torch.tensor(sums).view(2, 2)
        if dynamic:
            self.share = torch.where(n_steps > 0, kept / n_steps.clamp_min(1), self.share)
        wrong, right = (scores / n_steps).tolist()
        return loss, float(kept.sum() / n_steps.sum()), right, wrong

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "share": self.share, "scale": [self.scale.mean, self.scale.sd],
            "weights": [w.detach() for part in self.parts for w in part], "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for weight, saved in zip((w for part in self.parts for w in part), state["weights"], strict=True):
                weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.share = state["steps"], state["share"]


class _Reader:
    """Runs the backbone over trajectories, as far as their last step.

    Attributes:
        n_steps, length: [N] steps of each, and tokens that have to run.
    """

    def __init__(
        self, model: ReflectiveModel, rollouts: Rollouts, autocast: torch.dtype | None, batch_tokens: int
    ) -> None:
        check_trainable(model.head)
        self.backbone, self.inputs = Backbone.of(model.model, model.tap), model.head.hidden_size
        width, name = len(model.tap.layers) * self.backbone.hidden_size, type(model.model).__name__
        model.head.check_model(width, model.head.dtype, name, model.tap)
        self.steps = check_steps(self.backbone, model.steps).to("cpu")
        self.rollouts, self.autocast, self.batch_tokens = rollouts, autocast, batch_tokens
        self.n_steps, self.length = (torch.zeros(len(rollouts), dtype=torch.int64) for _ in range(2))
        for rows in map(torch.tensor, batches_by_length(rollouts.length.tolist(), _PLAN_TOKENS)):
            *_, row, read = self._positions(rows)
            self.n_steps[rows] = torch.bincount(row, minlength=len(rows))
            self.length[rows] = torch.zeros_like(rows).scatter_reduce(0, row, read + 1, "amax")

    def forwards(self, trajectories: Tensor, processes: Processes | None = None) -> list[Tensor]:
        """``trajectories`` (of these the process's share) by length, in batches of ``batch_tokens``."""
        mine = trajectories[self.length[trajectories].argsort(stable=True)]
        if processes is not None:
            mine = mine[processes.index :: processes.count]
        return [mine[group] for group in batches_by_length(self.length[mine].tolist(), self.batch_tokens)]

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(features, owner)`` [M, H], [M] of the steps of trajectories ``rows`` [n], with their autograd graph."""
        ids, row, read = self._positions(rows)
        end, shared = int(read.max()) + 1, 0
        if len(rows) > 1 and self.backbone.can_share():
            alike = (ids[:, :end] == ids[0, :end]).all(0)
            shared = min(int(alike.long().cumprod(0).sum()), int(read.min()))
        with _autocast(self.backbone, self.autocast):
            hidden = self.backbone.hidden(ids[:, :end], None, shared)  # padding lies on the right
        row, read = row.to(hidden.device), read.to(hidden.device)
        return hidden[row, read - shared][:, : self.inputs], row

    def _positions(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask, prompt_lengths = self.rollouts.padded(rows, _PAD)
        row, _, read = read_positions(self.steps, ids, mask, prompt_lengths, self.backbone.tap.at)
        return ids, row, read


def _autocast(backbone: Backbone, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(backbone.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def _in_training(
    net: nn.Module, backbone: Backbone, lora: "peft.LoraConfig | peft.PeftModel | int | None", autocast: torch.dtype | None,
    gradient_checkpointing: bool, seeded: AbstractContextManager,
) -> Iterator[tuple[peft.PeftModel | None, list[nn.Parameter]]]:  # fmt: skip
    """Yields the adapter and the weights to train; leaves ``net`` in its modes, and after an exception without new layers."""
    adapted = any(isinstance(m, BaseTunerLayer) for m in net.modules())
    if adapted and not isinstance(lora, peft.PeftModel):
        raise ValueError(
            "model: there is an adapter in it; pass its PeftModel as lora to train that, or merge it first"
        )
    wide = all(p.dtype in (torch.float32, torch.float64) for p in net.parameters())
    if lora is None and not wide:
        raise ValueError("model: full training loses small updates in its dtype; load it in float32, or use LoRA")
    flags = {p: p.requires_grad for p in net.parameters()}
    modes = {m: m.training for m in net.modules()}
    adapter, before = lora if isinstance(lora, peft.PeftModel) else None, checkpoints(net)
    try:
        if isinstance(lora, (int, peft.LoraConfig)):
            if isinstance(lora, int):
                below = {
                    m for layer in backbone.below for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))
                }
                names = [name for name, m in net.named_modules() if m in below]
                if not names:
                    raise ValueError(_nothing(backbone))
                lora = peft.LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=names, task_type="CAUSAL_LM")
            with seeded:
                adapter = peft.get_peft_model(net, lora)
        for name, p in net.named_parameters():
            p.requires_grad_(adapter is None or "lora_" in name)
        net.train()
        if gradient_checkpointing and not before:
            set_checkpointing(net, True)
        # Autocast casts what enters a matrix product anyway; peft would cast to float32 before.
        with disable_input_dtype_casting(net, autocast is not None):
            with _autocast(backbone, autocast):
                weights = _trained(net, backbone)
            yield adapter, weights
    except BaseException:
        if adapter is not None and not adapted:
            adapter.unload()
        raise
    finally:
        for p in net.parameters():
            p.requires_grad_(flags.get(p, False))
            p.grad = None
        for m in net.modules():
            m.training = modes.get(m, False)
        if gradient_checkpointing and not before:
            set_checkpointing(net, False)


def _trained(net: nn.Module, backbone: Backbone) -> list[nn.Parameter]:
    """The weights among those that require a gradient which the states that are read depend on; the others then require none."""
    within = {p for layer in backbone.below for p in layer.parameters()}  # experts: not all in every forward
    others = [p for p in net.parameters() if p.requires_grad and p not in within]
    hidden = backbone.hidden(torch.zeros(1, 2, dtype=torch.int64), None)
    if not hidden.requires_grad:
        raise ValueError(_nothing(backbone))
    gradients = torch.autograd.grad(hidden.float().sum(), others, allow_unused=True) if others else ()
    for p, gradient in zip(others, gradients, strict=True):
        p.requires_grad_(gradient is not None)
    return [p for p in net.parameters() if p.requires_grad]


def _nothing(backbone: Backbone) -> str:
    deepest = backbone.places.deepest
    return f"lora: no layer below hidden_states[{deepest}], the deepest that is read, has one, so nothing of the backbone is to be trained"


def _described(lora: "peft.LoraConfig | peft.PeftModel | int | None") -> Any:
    """``lora`` as JSON can say it, the same in every run."""
    if isinstance(lora, peft.PeftModel):
        lora = lora.peft_config[lora.active_adapter]
    if isinstance(lora, peft.LoraConfig):
        return {k: sorted(v) if isinstance(v, set) else str(v) for k, v in lora.to_dict().items()}
    return lora
