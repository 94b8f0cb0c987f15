"""Way three: policy and head together. One rollout and one forward feed TRL's policy loss and the SPRM's."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import trl
from accelerate.utils import broadcast, gather_object, is_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from ..engines.hf.backbone import Backbone
from ..engines.hf.finished import read_positions
from ..engines.hf.internals import with_cache
from ..engines.hf.parts import check_steps
from ..scoring.sprm import NAMES, SPRM
from ..scoring.steps import StepTokens
from ..scoring.taps import AT, At, Tap
from ..utils.arguments import one_of, whole
from .data import question_weights
from .head import check_trainable
from .objective import sprm_objective
from .processes import Processes
from .replay import Drawn, Replay
from .sampler import Sampler

_EXTENDED = (
    "_calculate_rewards", "_generate_and_score_completions", "_compute_loss", "_tokenize_prompts",
    "_get_per_token_logps_and_entropies",
    "_load_from_checkpoint", "_load_best_model",
)  # fmt: skip

_TEXT_ONLY = ("batch_size", "compute_entropy", "compute_aux_loss")  # what its forward is told without images
_WORTH_SHARING = 16  # tokens
_REPLAY = "head_replay.pt"  # in a checkpoint


@dataclass
class ReflectiveGRPOConfig(GRPOConfig):
    """TRL's settings and those of the SPRM; the defaults are the published ones.

    Attributes:
        sprm_weight: of the SPRM loss beside the policy loss. 0: GRPO alone, bit for bit; the head is only carried along.
        head_learning_rate: the head's own, under the policy's schedule, or constant with ``head_updates``. ``max_grad_norm`` is the
            policy's alone.
        head_updates: steps that the head takes by itself after each of the policy's, on batches of what was drawn last, see
            ``replay.Replay``; 0: it takes one with the policy, as published. A head that goes on so tells right from wrong better than one
            trained along, and than one left alone (``benchmarks/NOTES.md``, "Joint training and its head").
        head_batch, head_replay: of these steps, responses of a batch, and responses kept, the last ones.
        head_dropout: of these steps.
        head_float32: train, and save, the head in float32; else in the dtype that it has.
        feature_gradient_scale: factor on the gradient that the SPRM loss sends into the policy.
        sprm_warmup_steps: optimizer steps in plain BCE before the dynamic weights switch on; None: never. A head that
            starts at random needs some: dynamic weights lock in its noise.
        class_balance: see ``sprm_loss``.
        within_questions: only questions answered both ways, their two sides weighted equally, see ``question_weights``;
            a group of TRL is a question.
        outcome_reward: name of the reward function that tells right from wrong; None: the first. NaN or None is no verdict.
        outcome_threshold: rewards above it are right.
        share_prompts: run what the prompts of a micro-batch begin with in common once, in the forward of the loss too; with
            200 tokens of worked examples before a question that is most of it. Needs ``scope="response"``, text alone,
            keys and values as the only state, and no gradient checkpointing; else every row runs whole.
        at: which token's state is a step's, see ``Tap``; None: as the head says.
        scope: as for ``StreamScorer``.
        save_score_module_pt: write ``score_module.pt``, which the published code reads, beside the safetensors.
    """

    sprm_weight: float = 1.0
    head_learning_rate: float = 1e-5
    head_updates: int = 0
    head_batch: int = 64
    head_replay: int = 1024
    head_dropout: float = 0.1
    head_float32: bool = True
    feature_gradient_scale: float = 1e-4
    sprm_warmup_steps: int | None = 0
    class_balance: bool = True
    within_questions: bool = False
    outcome_reward: str | None = None
    outcome_threshold: float = 0.5
    share_prompts: bool = True
    at: At | None = None
    scope: Literal["response", "text"] = "response"
    save_score_module_pt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at is not None:
            one_of("at", self.at, AT)
        one_of("scope", self.scope, ("response", "text"))
        for name in ("sprm_weight", "head_learning_rate", "feature_gradient_scale", "head_updates"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.head_updates:
            whole("head_batch", self.head_batch, 1)
            whole("head_replay", self.head_replay, self.head_batch)
            if not 0 <= self.head_dropout < 1:
                raise ValueError(f"head_dropout={self.head_dropout}; expected a share of the hidden units, from 0 to less than 1")
            if not self.head_float32 or not self.sprm_weight:
                raise ValueError("head_updates: they are made in float32, and where there is an SPRM loss; leave head_float32 and sprm_weight on")


class ReflectiveGRPOTrainer(GRPOTrainer):
    """``L = L_policy + sprm_weight * L_sprm / gradient_accumulation_steps``, a micro-batch.

    ``L_sprm`` is ``sprm_objective`` on the states that the head reads (``head.tap``) in the forward that computed ``L_policy``: the mean over
    the judged trajectories of one micro-batch of all processes, which also share its class balance. Of an accumulated batch
    it is thus the mean of its micro-batches. With ``num_iterations > 1`` every pass over a rollout is a step of the head as
    well, from that pass's own hidden states; as outcomes do not depend on the policy, nothing is importance-weighted.

    The head is no part of the model: it is not merged, not sent to vLLM, not in the model's files. It lies as
    ``score_module.safetensors`` beside model or adapter in every checkpoint, and resumes with it. Completions that
    ``mask_truncated_completions`` takes out have no steps here either. Left padding reaches the model as TRL passes it, by
    the mask alone.

    Logged: ``sprm/loss``; ``sprm/kept``, share of judged steps that the dynamic weights keep; ``sprm/score_correct``,
    ``sprm/score_incorrect``, ``sprm/score_gap`` and ``sprm/auc`` of trajectory scores without dropout, over the micro-batch
    of all processes, left out where they are undefined; ``sprm/steps`` a trajectory; ``sprm/weight_correct`` and
    ``sprm/weight_incorrect``, the class balance.

    Args:
        model, reward_funcs, args, **kwargs: as for ``GRPOTrainer``.
        steps: the step-tokens, from the model's tokenizer.
        head: trained in place, for instance ``SPRM.from_pretrained(path)``, or one for two layers,
            ``SPRM(2 * hidden_size).use(tap=Tap((-9, -2)))``; None: a new one where the paper's reads.

    Attributes:
        head, steps, backbone: what is trained, what is scored, and where it is read.

    Raises:
        ImportError: this TRL lacks what is extended here.
        TypeError: ``args`` are not a ``ReflectiveGRPOConfig``.
        ValueError: FSDP, DeepSpeed or what else splits the model, an ``outcome_reward`` that is none of the reward functions,
            or head, steps and model that do not fit together.
    """

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: ReflectiveGRPOConfig | None = None,
        *,
        steps: StepTokens,
        head: SPRM | None = None,
        **kwargs: Any,
    ) -> None:
        missing = [name for name in _EXTENDED if not callable(getattr(GRPOTrainer, name, None))]
        if missing:
            raise ImportError(
                f"trl {trl.__version__}: GRPOTrainer has no {', '.join(missing)}, which joint training extends; "
                "it is written for trl 1.16"
            )
        if not isinstance(args, ReflectiveGRPOConfig):
            raise TypeError(f"args: expected a ReflectiveGRPOConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, **kwargs)
        self._processes = Processes(self.accelerator, self.accelerator.device)
        name = args.outcome_reward or self.reward_func_names[0]
        if name not in self.reward_func_names:
            raise ValueError(f"outcome_reward={name!r} is none of the rewards {', '.join(self.reward_func_names)}")
        self._outcome_column = self.reward_func_names.index(name)

        tap = replace(Tap() if head is None else head.tap, **({} if args.at is None else {"at": args.at}))
        self.backbone = Backbone.of(self.model, tap)
        self.steps = check_steps(self.backbone, steps)
        width = len(tap.layers) * self.backbone.hidden_size
        if head is None:
            with self._processes.seeded(args.seed):  # TRL's random numbers stay GRPO's own
                head = SPRM(width, dtype=self.backbone.dtype)
        check_trainable(head)
        head.use(tap=tap).check_model(width, head.dtype, type(self.model).__name__, tap)
        self.head = head.to(self.backbone.device, torch.float32 if args.head_float32 else None)
        self.head.requires_grad_(not args.head_updates)
        self._share_head()
        self._replay = Replay(
            self.head, lr=args.head_learning_rate, weight_decay=args.weight_decay, dropout=args.head_dropout, batch=args.head_batch,
            keep=args.head_replay, seed=args.seed,
        )  # fmt: skip
        self._heard: list[Tensor] = []
        self.add_callback(_Begin(self.head))
        self.add_callback(_Save(self._save_replay))

    # -- rollouts --------------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # [B of all processes, functions]
        reward = rewards[:, self._outcome_column]
        self._outcomes = torch.where(reward.isnan(), reward, (reward > self.args.outcome_threshold).float())
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        outcomes, first = self._outcomes, self._processes.index * len(inputs)
        group = self.num_generations if self.model.training else self.num_generations_eval
        rows = torch.arange(len(outcomes), device=outcomes.device)
        weights = question_weights(
            rows // group, outcomes, torch.ones_like(rows), within_questions=self.args.within_questions
        )
        # Of the batch's dimension, so that TRL shuffles and splits them with the rest.
        mine = slice(first, first + len(inputs))
        return {**batch, "sprm_outcomes": outcomes[mine], "sprm_weights": weights[mine]}

    # -- loss ------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if not self.args.sprm_weight:
            return super()._compute_loss(model, inputs)
        self._heard = []
        with self.backbone.listening(lambda hidden: self._heard.append(hidden)):
            loss = super()._compute_loss(model, inputs)
        hidden, self._heard = torch.cat(self._heard), []
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        return loss + self.args.sprm_weight / accumulated * self._sprm_loss(hidden, inputs).to(loss.device)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        shared = 0
        plain = not args and all(value is None for name, value in kwargs.items() if name not in _TEXT_ONLY)
        if self.args.share_prompts and self.args.scope == "response" and plain and not kwargs.get("compute_aux_loss"):
            # Perhaps of the reference model.
            backbone = Backbone.of(self.accelerator.unwrap_model(model), self.backbone.tap)
            shared = _common_prefix(input_ids, attention_mask, logits_to_keep) if backbone.can_share() else 0
        if shared < _WORTH_SHARING:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        size, found = kwargs.get("batch_size") or len(input_ids), []
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            found.append(self._behind_prefix(model, backbone, ids, mask, logits_to_keep, shared))
        log_probs, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
        return log_probs, entropy if kwargs.get("compute_entropy") else None, None

    def _behind_prefix(
        self, model: nn.Module, backbone: Backbone, ids: Tensor, mask: Tensor, keep: int, shared: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the last ``keep`` columns of ``ids`` [B, T], both [B, keep]; the first ``shared``
        tokens, which all rows have in common behind their padding, run once."""
        pad = mask.argmax(1)
        column = torch.arange(ids.shape[1] - shared, device=ids.device) + (pad + shared)[:, None]  # [B, S]
        real = column < pad[:, None] + mask.sum(1)[:, None]
        column = column.clamp_max(ids.shape[1] - 1)
        width = int(real.sum(1).max())
        column, real = column[:, :width], real[:, :width]
        rest = ids.gather(1, column).masked_fill(~real, 0)
        heard = len(self._heard)
        with self.accelerator.autocast():
            cache = backbone.prefill(ids[:1, pad[0] : pad[0] + shared], len(ids))
            out = model(
                input_ids=rest, **with_cache(model, cache), labels=rest.masked_fill(~real, -100), fused_lm_head=True,
                attention_mask=torch.cat([real.new_ones(len(ids), shared), real], 1).to(mask.dtype),
                position_ids=(shared + torch.arange(width, device=ids.device)).expand_as(rest),
            )  # fmt: skip
        if len(self._heard) > heard:
            hidden = self._heard[-1]
            row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(column)[real]
            del self._heard[heard:]
            whole = hidden.new_zeros(*ids.shape, hidden.shape[-1])
            self._heard.append(whole.index_put((row, column[real]), hidden[real]))
        # Of a completion's column: which token of the rest predicted it.
        source = torch.arange(ids.shape[1] - keep, ids.shape[1], device=ids.device) - (pad + shared)[:, None] - 1
        inside = source < out.log_probs.shape[1]
        source = source.clamp_max(out.log_probs.shape[1] - 1)
        return tuple(x.gather(1, source).masked_fill(~inside, 0) for x in (out.log_probs, out.entropy))

    def _sprm_loss(self, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        """``L_sprm`` times the number of processes, over which DDP averages gradients of shares that are to be summed."""
        args, training, kept = self.args, self.model.training, []
        ids, mask = (
            torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1).to(hidden.device)
            for part in ("ids", "mask")
        )
        if hidden.shape[:2] != ids.shape:
            raise RuntimeError(
                f"trl {trl.__version__}: the policy loss ran the model on {list(hidden.shape[:2])} tokens of the "
                f"{list(ids.shape)} in its batch; joint training is written for trl 1.16"
            )
        prompts = mask[:, : inputs["prompt_ids"].shape[1]].sum(1) if args.scope == "response" else None
        outcomes = inputs["sprm_outcomes"].to(hidden.device)
        warm = args.sprm_warmup_steps is not None and self.state.global_step >= args.sprm_warmup_steps

        def all_reduce(counts: Tensor) -> None:
            self._processes.add_up(counts)
            kept.append(counts)

        self.head.train(training)
        loss = self._processes.count * sprm_objective(
            self.head, self.steps, hidden, ids, mask, prompts, outcomes, dynamic=warm,
            class_balance=args.class_balance, trajectory_weight=inputs["sprm_weights"],
            feature_gradient_scale=args.feature_gradient_scale, all_reduce=all_reduce,
        )  # fmt: skip
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            row, _, read = read_positions(self.steps, ids, mask, prompts, self.backbone.tap.at)
            features = hidden[row, read][:, : self.head.hidden_size].to(self.head.dtype)
            log_scores = F.logsigmoid(self.head.eval()(features).float()).squeeze(-1)
        self._record(loss.detach(), kept[0], log_scores, row, outcomes, "train" if training else "eval")
        if training and args.head_updates:
            self._replay.add(self._drawn(features, row, outcomes, inputs["sprm_weights"].to(outcomes)))
        return loss

    def _drawn(self, features: Tensor, row: Tensor, outcomes: Tensor, weights: Tensor) -> Drawn:
        """What all processes drew: each learns from it the same."""
        chosen = (~outcomes.isnan() & (torch.bincount(row, minlength=len(outcomes)) > 0)).nonzero().flatten()
        drawn = Drawn(features.float(), row, outcomes.float(), weights.float()).of(chosen)
        if self._processes.count == 1:
            return drawn
        parts = gather_object([{k: v.cpu() for k, v in vars(drawn).items()}])
        return Drawn.join([Drawn(**{k: v.to(features.device) for k, v in part.items()}) for part in parts])

    def _record(self, loss: Tensor, kept: Tensor, log_scores: Tensor, row: Tensor, outcomes: Tensor, mode: str) -> None:
        steps = torch.zeros_like(outcomes).index_add(0, row, torch.ones_like(log_scores))
        log_sum = torch.zeros_like(outcomes).index_add(0, row, log_scores.clamp_min(math.log(1e-10)))
        # Trajectories without a step have no score: 0 / 0 is NaN, and in neither class.
        table = torch.stack([(log_sum / steps).exp(), steps, outcomes, loss.expand_as(outcomes)], 1)
        score, steps, outcomes, loss = self.accelerator.gather(table.to(self.accelerator.device)).unbind(1)
        right, wrong = (score[(outcomes == y) & (steps > 0)] for y in (1, 0))
        n_wrong, n_right, _ = kept.to(score) + torch.tensor([1, 1, 0]).to(score)
        ahead = right[:, None] - wrong
        values = {
            "loss": loss.mean(),
            "kept": (n_wrong + n_right - 2) / steps[~outcomes.isnan()].sum(),
            "score_correct": right.mean(),
            "score_incorrect": wrong.mean(),
            "score_gap": right.mean() - wrong.mean(),
            "auc": ((ahead > 0) + 0.5 * (ahead == 0)).mean(),
            "steps": steps.mean(),
        }
        if self.args.class_balance:
            values["weight_correct"] = 1.5 * n_wrong / (n_wrong + n_right)
            values["weight_incorrect"] = n_right / (n_wrong + n_right)
        for name, value in zip(values, torch.stack(list(values.values())).tolist(), strict=True):
            self._metrics[mode][f"sprm/{name}"].append(value)

    # -- the head beside the model ---------------------------------------------------------------------------------------

    def _share_head(self) -> None:
        for p in self.head.parameters():
            broadcast(p.data)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.head_updates:
            return optimizer
        head = list(self.head.parameters())
        if not any(p is head[0] for group in optimizer.param_groups for p in group["params"]):
            settings = {"lr": self.args.head_learning_rate, "weight_decay": self.args.weight_decay}
            optimizer.add_param_group({"params": head, **settings})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.args.head_updates:
            warm = self.args.sprm_warmup_steps is not None and self.state.global_step >= self.args.sprm_warmup_steps
            self._replay.learn(self.args.head_updates, self.state.global_step, dynamic=warm, class_balance=self.args.class_balance)
            self._share_head()
        elif self.accelerator.sync_gradients:
            gradients = [p.grad for p in self.head.parameters() if p.grad is not None]
            self._processes.add_up(*gradients)
            for gradient in gradients:
                gradient /= self._processes.count
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            for name in NAMES[: 1 + self.args.save_score_module_pt]:
                self.head.save_pretrained(Path(output_dir or self.args.output_dir) / name)
        super().save_model(output_dir, _internal_call)  # last: it may push the directory

    def _save_replay(self, path: Path) -> None:
        if self.args.head_updates and self.args.should_save:
            torch.save(self._replay.state_dict(), path / _REPLAY)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint)
        kept = Path(resume_from_checkpoint) / _REPLAY
        if self.args.head_updates and kept.is_file():
            self._replay.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint)

    def _load_head(self, path: str) -> None:
        self.head.load_state_dict(SPRM.from_pretrained(path).state_dict())


def _common_prefix(ids: Tensor, mask: Tensor, keep: int) -> int:
    """Tokens that all rows of ``ids`` [B, T] begin with behind their padding; each prompt keeps one token of its own."""
    pad = mask.argmax(1)
    most = int((ids.shape[1] - keep - pad).min()) - 1
    column = torch.arange(max(most, 0), device=ids.device) + pad[:, None]
    begins = ids.gather(1, column)
    return int((begins == begins[0]).all(0).long().cumprod(0).sum())


class _Begin(TrainerCallback):
    """The trainer zeroes the gradients of its model only."""

    def __init__(self, head: SPRM) -> None:
        self.head = head

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.head.zero_grad()


class _Save(TrainerCallback):
    """Beside the trainer's checkpoints."""

    def __init__(self, save: Callable[[Path], None]) -> None:
        self.save = save

    def on_save(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        place = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if place.is_dir():
            self.save(place)


def shared_rollouts(*, stop: str | None = None, batch_rows: int = 256) -> Callable[[list, GRPOTrainer], dict[str, Any]]:
    """A ``rollout_func`` for ``GRPOTrainer`` that decodes what the answers of a group have in common once, by ``Sampler``.

    Temperature, top-p, length and ends are the trainer's. TRL passes a prompt once an answer, and takes one answer for each;
    ``logprobs`` are None, which it accepts without vLLM's importance sampling. An answer that ``stop`` ended has no
    end-of-sequence token: TRL counts it in ``completions/clipped_ratio``, trains on it as on any other, and would drop it
    under ``mask_truncated_completions``, which is therefore refused.

    Args:
        stop, batch_rows: as for ``Sampler``.

    Raises:
        ValueError: in a rollout, a setting of the trainer that this sampler does not have.
    """

    def roll_out(prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        unsupported = {"top_k": (0, None), "min_p": (0, None), "repetition_penalty": (1,), "use_vllm": (False,)}
        for name, neutral in unsupported.items():
            if getattr(trainer, name) not in neutral:
                raise ValueError(f"{name}={getattr(trainer, name)}: shared rollouts know temperature and top_p only")
        if stop and trainer.mask_truncated_completions:
            raise ValueError("mask_truncated_completions would drop every answer that the stop pattern ends")
        ids = [list(p) for p in trainer._tokenize_prompts(prompts)[0]]
        places: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(ids):
            places.setdefault(tuple(prompt), []).append(i)
        answers: list[list[int]] = [[] for _ in ids]
        training = trainer.model.training
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            trainer.accelerator.autocast(),
        ):
            sampler = Sampler(
                model.get_base_model() if is_peft_model(model) else model, trainer.processing_class,
                ends=set(trainer.eos_token_ids), stop=stop, max_new_tokens=trainer.max_completion_length,
                temperature=trainer.temperature, top_p=trainer.top_p, batch_rows=batch_rows, layers=(),
            )  # fmt: skip
            model.eval()
            try:
                for samples in sorted({len(p) for p in places.values()}):  # a group may span processes unevenly
                    chosen = [prompt for prompt in places if len(places[prompt]) == samples]
                    for q, draws in sampler.run(chosen, samples, seed=int(torch.randint(2**31, ()))):
                        drawn = [draw.token_ids for draw in draws for _ in range(draw.count)]
                        for place, answer in zip(places[chosen[q]], drawn, strict=True):
                            answers[place] = answer
            finally:
                model.train(training)
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}

    return roll_out
