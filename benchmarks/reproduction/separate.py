"""A separate PRM, which the SPRM is compared with: a second copy of the backbone, all of it trained, and a head."""

import json
import time
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from reflective.model import ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.tasks import Question
from reflective.train.backbone import tune
from reflective.train.data import Rollouts
from reflective.train.metrics import log_scores
from reflective.train.record import record_features

from . import rollouts as recorded
from .families import FAMILIES
from .heads import BASELINE, head, load, part_of, thinned, train_rollouts

FAMILY = "sums"
EVAL_SAMPLES = 8  # of the 32: scoring them all by a second model takes as long as decoding them
BATCH_TOKENS = 8192


def reprompted(model: ReflectiveModel, rollouts: Rollouts, asked: list[Question]) -> Rollouts:
    """The same responses behind the question alone: a PRM needs no worked examples."""
    prompts = [model.encode(f"Question: {q.text}\n")[0] for q in asked]
    parts, length = [], []
    for i, q in enumerate(rollouts.question.tolist()):
        ids = torch.cat([prompts[q].int(), rollouts.ids(i)[int(rollouts.prompt_length[i]) :]])
        parts.append(ids)
        length.append(len(ids))
    prompt_length = torch.tensor([len(prompts[q]) for q in rollouts.question.tolist()])
    return replace(
        rollouts, tokens=torch.cat(parts), length=torch.tensor(length), prompt_length=prompt_length,
        features=None, trajectory=None, position=None,
    )  # fmt: skip


def scored(model: ReflectiveModel, rollouts: Rollouts) -> tuple[Rollouts, Tensor, float]:
    """``rollouts`` with their steps, these steps' log-scores by a second pass, and the seconds that pass took."""
    began = time.perf_counter()
    read = record_features(model, rollouts, batch_tokens=BATCH_TOKENS)
    scores = log_scores(read, model.head)
    return replace(read, features=None), scores, time.perf_counter() - began


def compare(work: Path, family: str, seed: int) -> None:
    """Train one on the rollouts that the SPRM ``heads.BASELINE`` learnt from, score held-out responses; both into ``work``."""
    out = work / "separate" / f"{family}, seed {seed}.json"
    if out.is_file():
        return
    train, held_out = recorded.questions(FAMILIES[family])
    began = time.perf_counter()
    model = recorded.policy(recorded.untrained(torch.float32), FAMILIES[family])
    torch.manual_seed(seed)
    model.head = SPRM(model.head.hidden_size).requires_grad_(False).eval()
    learnt = reprompted(model, part_of(train_rollouts(work, family, "steps"), BASELINE, seed), train)
    tuned = tune(model, learnt, lora=None, backbone_lr=1e-4, head_lr=1e-3, seed=seed)
    training = time.perf_counter() - began
    for p in tuned.model.model.parameters():  # not model.to, which would round the rotary embedding's frequencies too
        p.data = p.data.to(torch.bfloat16)
    tuned.model.head = tuned.head.to(torch.bfloat16)
    judged = thinned(load(work / family / "eval", "steps"), EVAL_SAMPLES, 0)
    rollouts, scores, seconds = scored(tuned.model, reprompted(model, judged, held_out))
    out.parent.mkdir(parents=True, exist_ok=True)
    rollouts.save(out.with_suffix(".rollouts.safetensors"))
    safetensors.torch.save_file({"log_scores": scores}, out.with_suffix(".scores.safetensors"))
    began = time.perf_counter()
    small = head(work, family, BASELINE, seed)
    log_scores(judged, small)
    own = time.perf_counter() - began
    counts = {
        "parameters": sum(p.numel() for p in (*tuned.model.model.parameters(), *tuned.head.parameters())),
        "sprm_parameters": sum(p.numel() for p in small.parameters()),
        "trajectories": len(judged), "steps": len(scores), "training_s": training, "scoring_s": seconds, "sprm_scoring_s": own,
    }  # fmt: skip
    out.write_text(json.dumps(counts, indent=2) + "\n")
