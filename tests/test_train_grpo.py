"""Joint training: TRL's GRPO with the SPRM loss of the same forward, against TRL alone and a forward of its own."""

import copy
import os
import pickle
import random
import sys
from pathlib import Path

os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import tiny
import torch
from ranks import run_ranks
from test_model import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import reflective as rf

pytest.importorskip("trl", minversion="1.16")
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from reflective.engines.hf.internals import checkpointing_setting
from reflective.scoring.taps import Tap
from reflective.train.data import question_weights
from reflective.train.grpo import ReflectiveGRPOConfig, ReflectiveGRPOTrainer, shared_rollouts
from reflective.train.objective import sprm_objective
from reflective.train.replay import Drawn, Replay

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL, transformers and torch announce what they will deprecate
RIGHT, WRONG, STEP, THINK, END_THINK, EOS = 30, 31, 40, 50, 51, 1
PROMPTS = ["ab", "a longer prompt", "x G y G z", "q G", "1 + 2", "one more", "why?", "the last"]  # "G" is STEP
STEPS = rf.StepTokens([STEP], THINK, END_THINK)
OFTEN = rf.StepTokens(range(10, 60))  # what a random model samples
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def judged(completion_ids, **kwargs):
    return [float(c[0] == RIGHT) for c in completion_ids]


def even(completion_ids, **kwargs):
    return [float(c[0] % 2) for c in completion_ids]


def canned(prompts, trainer):
    """Completions of several lengths, steps and verdicts: a function of the step and of the place in the global batch."""
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for place in range(first, first + len(prompts)):
        r = random.Random(1000 * trainer.state.global_step + place)
        ids = [RIGHT if r.random() < 0.5 else WRONG]
        for _ in range(r.randrange(1, 4)):
            ids += [*(r.randrange(60, 250) for _ in range(r.randrange(3))), ids[0], STEP]
        completions.append([*ids, r.choice([7, END_THINK]), STEP, EOS])
    return {
        "prompt_ids": [trainer.processing_class(text=p)["input_ids"] for p in prompts],
        "completion_ids": completions,
        "logprobs": None,
    }


def model():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny._SIZES, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "eos_token_id": EOS})
    net = LlamaForCausalLM(config)
    with torch.no_grad():
        net.get_input_embeddings().weight *= 20  # or the head could hardly tell one hidden state from another
    return net, tokenizer


def head(layers=(-2,)):
    sprm = tiny.head(hidden=len(layers) * tiny.HIDDEN).use(tap=Tap(layers))
    sprm[2].p = 0.0  # comparable between forwards
    return sprm


def trainer_of(
    folder, kind=ReflectiveGRPOTrainer, rewards=judged, rollout=canned, steps=STEPS, sprm=None, peft=None, **changes
):
    net, tokenizer = model()
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 1,
        "logging_steps": 1, "save_strategy": "no", **checkpointing_setting(False), "learning_rate": 1e-3,
        "lr_scheduler_type": "linear", "loss_type": "grpo",
    } | changes  # fmt: skip
    ours = kind is not GRPOTrainer
    return kind(
        net, rewards, (ReflectiveGRPOConfig if ours else GRPOConfig)(**settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer, rollout_func=rollout,
        peft_config=peft, **({"steps": steps, "head": sprm} if ours else {}),
    )  # fmt: skip


def weights(trainer):
    return {n: p.detach().clone() for n, p in [*trainer.model.named_parameters(), *trainer.head.named_parameters()]}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


def whole(inputs):
    """Ids, mask and prompt lengths of TRL's batch."""
    ids, mask = (torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    return ids, mask, inputs["prompt_mask"].sum(1)


class Watched(ReflectiveGRPOTrainer):
    """Keeps every micro-batch with the loss beside TRL's own, and the gradients of every optimizer step."""

    def _compute_loss(self, net, inputs):
        self.seen = getattr(self, "seen", [])
        both = super()._compute_loss(net, inputs)
        alone = GRPOTrainer._compute_loss(self, net, inputs)
        ids, mask, prompts = whole(inputs)
        prompts = prompts if self.args.scope == "response" else None
        with torch.no_grad():
            states = net(ids, attention_mask=mask, output_hidden_states=True).hidden_states
            hidden = torch.cat([states[layer] for layer in self.head.tap.layers], -1)
            warm = self.args.sprm_warmup_steps is not None and self.state.global_step >= self.args.sprm_warmup_steps
            expected = sprm_objective(
                self.head.train(), self.steps, hidden, ids, mask, prompts, inputs["sprm_outcomes"], at=self.args.at,
                dynamic=warm, trajectory_weight=inputs["sprm_weights"],
            )  # fmt: skip
            scores = rf.score(self.model, self.head.eval(), self.steps, ids, mask, self.args.at, prompts)
        self.seen.append((inputs, float(both - alone), float(expected), scores))
        return both


class Gradients(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "layers", "scope", "checkpointing", "peft"),
    [
        ("predict", (-2,), "response", False, None), ("token", (-2,), "text", False, None),
        ("predict", (-2,), "response", True, LORA), ("every", (1, -1), "response", False, LORA),
        ("token", (-3, -1), "response", True, None),
    ],
)  # fmt: skip
def test_the_loss_is_that_of_a_forward_of_its_own(tmp_path, at, layers, scope, checkpointing, peft):
    """Of shuffled micro-batches, padded on both sides, twice a rollout; masks, steps and scores are those of rf.score."""
    trainer = trainer_of(
        tmp_path, Watched, at=at, scope=scope, sprm=head(layers), **checkpointing_setting(checkpointing), peft=peft, sprm_weight=0.5,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, num_iterations=2, max_steps=2, sprm_warmup_steps=1,
        head_learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.seen) == 4
    rollouts = [inputs["completion_ids"].tolist() for inputs, *_ in trainer.seen]
    assert rollouts[:2] == rollouts[2:], "two passes over one rollout"
    for inputs, found, expected, _ in trainer.seen:
        assert expected > 0 and found == pytest.approx(0.5 * expected / 2, rel=1e-4), "sprm_weight, 2 micro-batches"
        assert inputs["prompt_mask"].min() == 0 or inputs["completion_mask"].min() == 0
        assert torch.equal(inputs["sprm_outcomes"], (inputs["completion_ids"][:, 0] == RIGHT).float())
    losses, scores = [e for _, _, e, _ in trainer.seen], [s for *_, s in trainer.seen]
    assert logged(trainer, "sprm/loss") == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)
    steps = [s.n_steps.float().mean().item() for s in scores]
    assert logged(trainer, "sprm/steps") == pytest.approx([sum(steps[:2]) / 2, sum(steps[2:]) / 2])
    right = [s.score[i["sprm_outcomes"] == 1].mean().item() for (i, *_), s in zip(trainer.seen, scores, strict=True)]
    assert logged(trainer, "sprm/score_correct")[0] == pytest.approx(sum(right[:2]) / 2, rel=1e-4)
    kept = logged(trainer, "sprm/kept")
    assert kept[0] == 1 and kept[1] < 1, "all steps in the warm-up, then those on which the head agrees"


@pytest.mark.parametrize(("peft", "layers"), [(None, (-2,)), (LORA, (-2,)), (LORA, (1, -1))])
def test_prompts_that_begin_alike_run_once(tmp_path, monkeypatch, peft, layers):
    """Losses, measures and gradients are those of whole rows; the shared tokens go through the model in a single row."""
    prompts = ["Twenty letters, shared G " + p for p in PROMPTS]
    monkeypatch.setattr(sys.modules[__name__], "PROMPTS", prompts)
    found = []
    for share in (True, False):
        watch, fed = Gradients(), []
        trainer = trainer_of(
            tmp_path, rewards=judged, sprm=head(layers), peft=peft, share_prompts=share, feature_gradient_scale=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.add_callback(watch)
        embed = trainer.backbone.model.get_input_embeddings()
        embed.register_forward_pre_hook(lambda module, args, fed=fed: fed.append(tuple(args[0].shape)))
        trainer.train()
        found.append((watch.found[0], trainer.state.log_history[0]))
        assert len(fed) == (2 if share else 1), "no forward but that of the loss"
        if share:
            assert fed[0][0] == 1 and fed[0][1] >= len("Twenty letters, shared G ") and fed[1][0] == 8
    (shared, log), (alone, plain) = found
    for name in ("loss", "sprm/loss", "sprm/score_gap", "sprm/steps", "entropy", "sprm/kept"):
        assert log[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6), name
    assert shared.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_without_weight_it_is_grpo_bit_for_bit(tmp_path):
    settings = {"rollout": None, "rewards": even, "max_steps": 3, **checkpointing_setting(True)}
    ours = trainer_of(tmp_path, steps=OFTEN, sprm_weight=0.0, **settings)
    ours.train()
    theirs = trainer_of(tmp_path, GRPOTrainer, **settings)
    start = copy.deepcopy(theirs.model.state_dict())
    theirs.train()
    state = theirs.model.state_dict()
    assert all(torch.equal(p, state[n]) for n, p in ours.model.state_dict().items())
    assert not all(torch.equal(p, start[n]) for n, p in state.items())
    assert logged(ours, "grad_norm") == logged(theirs, "grad_norm") and logged(ours, "loss") == logged(theirs, "loss")
    assert not logged(ours, "sprm/loss")


def test_the_backbone_gets_the_scaled_gradient(tmp_path):
    def found(scale, layers=(-2,)):
        watch = Gradients()
        trainer = trainer_of(
            tmp_path, rewards=[judged, lambda completion_ids, **kw: [1.0] * len(completion_ids)], sprm=head(layers),
            reward_weights=[0.0, 1.0], feature_gradient_scale=scale, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.add_callback(watch)  # rewards are all equal: the policy loss has no gradient
        trainer.train()
        return watch.found[0]

    whole, scaled = found(1.0), found(1e-4)
    below, last = "model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"
    assert whole[below].abs().max() > 0
    torch.testing.assert_close(
        1e4 * scaled[below], whole[below], rtol=1e-4, atol=1e-6 * float(whole[below].abs().max())
    )
    assert not whole[last].any(), "the last layer has no part in the score"
    deep, shallow = found(1.0, (1, -1)), found(1.0, (1,))
    assert deep[last].any() and not shallow[below].any(), "but where the head reads what comes of it"
    assert shallow["model.layers.0.mlp.down_proj.weight"].any()


def test_the_head_learns(tmp_path):
    settings = {"max_steps": 12, "head_learning_rate": 1e-2, "sprm_warmup_steps": None, "learning_rate": 0.0}
    trainer = trainer_of(tmp_path, sprm=tiny.head(), **settings)
    trainer.train()
    auc, gap = logged(trainer, "sprm/auc"), logged(trainer, "sprm/score_gap")
    assert auc[0] < 0.5 and min(auc[-3:]) > 0.95 and gap[-1] > 0.5 > abs(gap[0])
    measured = trainer.evaluate(trainer.train_dataset)
    assert {"eval_loss", "eval_sprm/auc", "eval_sprm/loss"} <= {*measured, *trainer.state.log_history[-1]}
    assert logged(trainer, "eval_sprm/auc") == [1.0]
    optimizer = trainer.optimizer.param_groups
    assert [g["initial_lr"] for g in optimizer] == [0.0, 0.0, 1e-2] and all(g["lr"] == 0 for g in optimizer)


def test_the_head_learns_by_itself_between_two_steps_of_the_policy(tmp_path):
    """From what was drawn last; six times as often it learns sooner, and the policy's optimizer knows nothing of it."""
    settings = {"max_steps": 3, "sprm_warmup_steps": None, "learning_rate": 0.0, "head_learning_rate": 1e-2}
    often = trainer_of(tmp_path / "often", sprm=tiny.head(), head_updates=8, head_batch=6, **settings)
    often.train()
    with_it = trainer_of(tmp_path / "with", sprm=tiny.head(), **settings)
    with_it.train()
    assert logged(often, "sprm/auc")[-1] > 0.95 and logged(often, "sprm/loss")[-1] < 0.5 * logged(with_it, "sprm/loss")[-1]
    assert len(often.optimizer.param_groups) == 2 and len(with_it.optimizer.param_groups) == 3
    assert not any(p.requires_grad for p in often.head.parameters())
    kept = often._replay._kept
    assert sum(len(d.outcome) for d in kept) > 8 and all(d.features.shape[1] == tiny.HIDDEN for d in kept)
    for wrong, message in (
        ({"head_replay": 3}, "head_replay=3"), ({"head_batch": 0}, "head_batch=0"), ({"head_dropout": 1.0}, "head_dropout=1.0"),
        ({"head_float32": False}, "head_updates"), ({"head_updates": -1}, "head_updates=-1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ReflectiveGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{"head_updates": 4} | wrong)


def test_replay_keeps_the_last_and_learns_in_standardised_coordinates():
    g = torch.Generator().manual_seed(0)

    def drawn(n):
        outcome = (torch.rand(n, generator=g) < 0.5).float()
        owner = torch.arange(n).repeat_interleave(2)
        features = torch.randn(2 * n, 16, generator=g)
        features[:, 3] += 2 * outcome[owner]
        return Drawn(features * torch.logspace(-2, 2, 16) + 5, owner, outcome, torch.ones(n))

    sprm = rf.SPRM(16)
    replay = Replay(sprm, lr=1e-2, weight_decay=0.0, dropout=0.1, batch=32, keep=100, seed=0)
    replay.learn(5, 0, dynamic=False, class_balance=False)  # nothing there yet
    for number in range(6):
        replay.add(drawn(40))
        assert sum(len(d.outcome) for d in replay._kept) <= 139
        replay.learn(60, number, dynamic=False, class_balance=False)
    fresh = drawn(200)
    with torch.no_grad():
        right = (sprm.eval()(fresh.features).squeeze(-1) > 0) == (fresh.outcome[fresh.owner] > 0.5)
    assert right.float().mean() > 0.75, "features from 0.01 to 100 in size"
    part = fresh.of(torch.tensor([3, 7]))
    assert torch.equal(part.features, fresh.features[[6, 7, 14, 15]]) and part.owner.tolist() == [0, 0, 1, 1]


# -- outcomes ----------------------------------------------------------------------------------------------------------


def test_outcomes_of_a_named_reward_balanced_within_questions(tmp_path):
    def graded(completions, **kwargs):
        return [[0.9, 0.6, 0.1, None, 0.9, 0.8, 0.7, 0.95][i] for i in range(len(completions))]

    trainer = trainer_of(
        tmp_path, rewards=[judged, graded], outcome_reward="graded", outcome_threshold=0.7, within_questions=True,
        steps_per_generation=1,
    )  # fmt: skip
    trainer.train()
    y, w = (trainer._buffered_inputs[0][k] for k in ("sprm_outcomes", "sprm_weights"))
    outcome = torch.tensor([1, 0, 0, float("nan"), 1, 1, 0, 1])
    expected = question_weights(torch.arange(8) // 4, outcome, torch.ones(8, dtype=torch.int64), within_questions=True)
    assert expected.tolist() == pytest.approx([1.5, 0.75, 0.75, 0, 2 / 3, 2 / 3, 2, 2 / 3])

    def pairs(y, w):
        return sorted(zip(y.nan_to_num(-1).tolist(), w.tolist(), strict=True))

    assert pairs(y, w) == pairs(outcome, expected)
    with pytest.raises(ValueError, match="outcome_reward='other' is none of the rewards judged, graded"):
        trainer_of(tmp_path, rewards=[judged, graded], outcome_reward="other")


def test_what_cannot_be_trained_is_refused(tmp_path, monkeypatch):
    for wrong, message in (({"at": "after"}, "at='after'"), ({"sprm_weight": -1.0}, "sprm_weight=-1.0")):
        with pytest.raises(ValueError, match=message):
            ReflectiveGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **wrong)
    with pytest.raises(ValueError, match="hidden size 8 differs"):
        trainer_of(tmp_path, sprm=rf.SPRM(8))
    with pytest.raises(TypeError, match="expected a ReflectiveGRPOConfig"):
        ReflectiveGRPOTrainer(*model()[:1], judged, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), steps=STEPS)
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(ImportError, match="has no _calculate_rewards"):
        trainer_of(tmp_path)


def test_nothing_is_left_on_the_model(tmp_path):
    def failing(completions, **kwargs):
        raise OSError("no verifier")

    trained = trainer_of(tmp_path)
    trained.train()
    broken = trainer_of(tmp_path, rewards=failing)
    with pytest.raises(OSError, match="no verifier"):
        broken.train()
    fresh = model()[0]
    for trainer in (trained, broken):
        last, untouched = trainer.model.model.layers[-1], fresh.model.layers[-1]
        assert type(last) is type(untouched) and not last._forward_pre_hooks
        assert vars(last).keys() == vars(untouched).keys()
        assert not any("head" in n and "lm_head" not in n for n, _ in trainer.model.named_modules())


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peft", "updates"), [(None, 0), (LORA, 0), (LORA, 3)], ids=["full", "lora", "replay"])
def test_killed_and_continued(tmp_path, peft, updates):
    """Four steps are two, a new trainer from the checkpoint, and two more: sampling, dropout and both optimizers go on."""
    settings = {
        "rollout": None, "rewards": even, "steps": OFTEN, "peft": peft, "max_steps": 4, "save_strategy": "steps",
        "save_steps": 2, "head_learning_rate": 1e-3, "sprm_warmup_steps": 3, "save_score_module_pt": True,
        "head_updates": updates, "head_batch": 6,
    }  # fmt: skip
    through = trainer_of(tmp_path / "through", **settings)
    through.train()
    checkpoint = tmp_path / "through" / "checkpoint-2"
    continued = trainer_of(tmp_path / "continued", sprm=rf.SPRM(tiny.HIDDEN), **settings)
    continued.train(resume_from_checkpoint=str(checkpoint))
    a, b = weights(through), weights(continued)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert logged(through, "sprm/loss")[2:] == pytest.approx(logged(continued, "sprm/loss")[-2:], rel=1e-4)

    files = {f.name for f in checkpoint.iterdir()}
    assert ("head_replay.pt" in files) == bool(updates)
    assert {"score_module.safetensors", "score_module.pt"} < files
    assert ("adapter_model.safetensors" if peft else "model.safetensors") in files
    last = tmp_path / "through" / "checkpoint-4"
    for name in ("score_module.safetensors", "score_module.pt"):
        kept = rf.SPRM.from_pretrained(last / name).state_dict()
        assert all(torch.equal(kept[k], p) for k, p in through.head.state_dict().items())
    through.state.best_model_checkpoint = str(checkpoint)
    through._load_best_model()
    best = rf.SPRM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(best[k], p) for k, p in through.head.state_dict().items())
    if not peft:
        plain, loading = LlamaForCausalLM.from_pretrained(last, output_loading_info=True)
        assert not any(loading.values()) and torch.equal(plain.lm_head.weight, continued.model.lm_head.weight)


# -- shared rollouts ---------------------------------------------------------------------------------------------------


def test_shared_rollouts(tmp_path):
    settings = {"rollout": shared_rollouts(), "rewards": even, "steps": OFTEN, "peft": LORA, "sprm": head()}
    trainer = trainer_of(tmp_path, Watched, max_steps=2, **settings)
    trainer.train()
    for inputs, found, expected, _ in trainer.seen:
        groups = {}
        for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True):
            key = tuple(ids[mask.bool()].tolist())
            groups[key] = groups.get(key, 0) + 1
        assert set(groups.values()) == {4} and len(groups) == 2
        assert len({tuple(c) for c in inputs["completion_ids"].tolist()}) > 4, "draws differ"
        assert expected > 0 and found == pytest.approx(expected, rel=1e-4)
    for wrong, message in (
        ({"top_k": 5}, "top_k=5"),
        ({"mask_truncated_completions": True, "rollout": shared_rollouts(stop="x")}, "drop every answer"),
    ):
        refused = trainer_of(tmp_path, **settings | wrong)
        with pytest.raises(ValueError, match=message):
            refused.train()


# -- two processes -----------------------------------------------------------------------------------------------------


def train_for(folder, batch, **changes):
    """Two steps of an even share of the same global batch; the heads begin as that of rank 0."""
    sprm = head()
    sprm[0].bias += float(os.environ.get("RANK", "0"))
    trainer = trainer_of(
        folder, sprm=sprm, per_device_train_batch_size=batch, max_steps=2, head_learning_rate=1e-3,
        feature_gradient_scale=1.0, within_questions=True, **changes,
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "sprm/loss" in entry]
    return weights(trainer), log, trainer.accelerator.num_processes


REPLAY = {"head_updates": 3, "head_batch": 64, "head_dropout": 0.0, "sprm_warmup_steps": None}  # all there is in each batch


@pytest.mark.parametrize("how", ["together", "replay"])
def test_two_processes_are_one(tmp_path, how):
    found = []
    changes = REPLAY if how == "replay" else {}
    run_ranks([sys.executable, __file__, tmp_path, how], meanwhile=lambda: found.append(train_for(tmp_path, 8, **changes)))
    ((one, log, _),) = found
    first, second = (pickle.loads((tmp_path / f"{r}.pickle").read_bytes()) for r in range(2))
    assert first[2] == second[2] == 2
    for name, expected in one.items():
        assert torch.equal(first[0][name], second[0][name]), name
        torch.testing.assert_close(first[0][name], expected, rtol=1e-4, atol=2e-5)
    names = [n for n in log[0] if n.startswith("sprm/")]
    assert len(names) == 9
    for ours, theirs in zip(log, first[1], strict=True):
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3, abs=1e-5)


if __name__ == "__main__":
    home = Path(sys.argv[1])
    result = train_for(home, 4, **(REPLAY if sys.argv[2] == "replay" else {}))
    (home / f"{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))
