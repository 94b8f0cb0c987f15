"""What the scorer costs in every way of decoding: SmolLM2-135M-Instruct, float32, on CPU.

    python benchmarks/decode_modes.py [--seconds 440] [--tokens 96] [--mode NAME] [--at AT] [--quick] [--out benchmarks/results]

Whole decodes drift by several per cent on a shared machine, so forwards are paired instead. A ``generate`` call is recorded:
with which arguments transformers calls the model, and what it then does to the cache (a beam reorder, a rejected draft).
Copies of the model that share its weights, one without a scorer and one for each schedule, play the record in lockstep, every
one on a cache of its own, in an order drawn anew for each forward. Sampling is left out, which makes the scorer's share
larger, not smaller; the time of ``scorer.result`` is spread over the forwards. Continuous batching decides by itself what a
forward holds: there whole ``generate_batch`` calls take turns, and a forward stands for a token of each request.

``throughput_kept`` is the median of plain over scored time, ``kept_q20`` and ``kept_q80`` are its quantiles, ``kept_total`` is the
ratio of the sums, flushes of the deferred buffer in full. ``scorer_us`` is the host time a forward that is spent in the scorer,
result included; where forwards are compiled and the op is a part of them, the op's own time under torch's profiler. There is no
figure without scores equal to those of ``rf.score``.

``--at every`` scores every token that is decoded instead of those that end a step, ``--at every --at predict`` one after the other: into
``decode_modes_every.csv``.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from transformers import (
    AutoModelForCausalLM,
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)

import reflective as rf
from reflective.benchmarks.record import RESULTS, write
from reflective.engines.hf.internals import with_cache
from reflective.engines.hf.scorer import Schedule
from reflective.scoring.ops import NAMESPACE
from reflective.scoring.taps import At

SCHEDULES: tuple[Schedule, ...] = ("deferred", "immediate")
WARM_UP = 4  # forwards: the prompt's, and what compilation and CUDA graphs need
PROFILED = 24
STEP_EVERY = 25  # one of so many ids of a random model ends a step
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0}
STATIC = SAMPLED | {"cache_implementation": "static", "disable_compile": True}  # compiled or not when it is played
MODES: dict[str, dict[str, Any]] = {
    "dynamic": SAMPLED,
    "static": STATIC,
    "compiled": STATIC,
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 6},
    "beams": {"do_sample": False, "num_beams": 4},
    "batching": {},
}

Call = tuple[dict[str, Any], list[Callable[[Cache], None]]]  # a forward's arguments, and what its cache undergoes then
Run = Callable[[PreTrainedModel], tuple[Any, Sequence[Tensor]]]  # what ``scorer.result`` takes, and the texts in it


@dataclass
class Subject:
    """A model to decode with, and what scores it. ``prompts``: ids [B, P]; ``rtol``: of equal step scores."""

    net: PreTrainedModel
    head: rf.SPRM
    steps: rf.StepTokens
    at: At
    prompts: Tensor
    rtol: float = 1e-3
    truths: dict[tuple, rf.TrajectoryScores] = field(default_factory=dict)

    @classmethod
    def default(cls) -> "Subject":
        """The embedded model and eight sums, each behind one worked example, in prompts of one length."""
        model = rf.ReflectiveModel.default()
        texts = [model.format(f"{i + 2} + {9 - i} + {3 * i % 8 + 2}") for i in range(8)]
        prompts = [model.encode("Question:" + "Question:".join(text.split("Question:")[-2:])) for text in texts]
        return cls(model.model, model.head, model.steps, model.config.at, torch.cat(prompts))

    @classmethod
    def random(
        cls, config: PreTrainedConfig, batch: int, past: int, device: torch.device, dtype: torch.dtype, rtol: float
    ) -> "Subject":
        """Random weights, which sample every id alike, and prompts of ``past`` tokens."""
        torch.manual_seed(0)
        with torch.device(device):
            net = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            head = rf.SPRM(config.hidden_size).to(dtype).requires_grad_(False).eval()
            prompts = torch.randint(2, config.vocab_size, (batch, past))
        steps = rf.StepTokens(step_ids=range(1, config.vocab_size, STEP_EVERY)).resized(config.vocab_size).to(device)
        return cls(net, head, steps, "predict", prompts, rtol)

    def wrong(self, scores: rf.TrajectoryScores, texts: Sequence[Tensor]) -> str:
        """In what ``scores`` differ from ``rf.score`` of the same texts; empty if they do not."""
        key = self.at, *(tuple(text.tolist()) for text in texts)
        if key not in self.truths:
            # But for "predict" what was decoded last was never fed back, and has no state.
            fed = [text if self.at == "predict" else text[:-1] for text in texts]
            self.truths[key] = rf.score(
                self.net, self.head, self.steps, fed, at=self.at, prompt_lengths=self.prompts.shape[1]
            )
        truth = self.truths[key]
        if not int(truth.n_steps.sum()):
            return "no step was decoded"
        try:
            torch.testing.assert_close(scores.n_steps.cpu(), truth.n_steps.cpu())
            for ours, theirs in zip(scores.step_scores, truth.step_scores, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=self.rtol, atol=1e-5)
        except AssertionError as error:
            return " ".join(str(error).split())
        return ""


class Recorder(rf.StreamScorer):
    """A scorer that keeps what it hears of: ``calls``, and the ``length`` of a static cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[Call] = []
        self.length: int | None = None

    def on_forward(self, ids: Tensor | None, cache: Any, given: dict[str, Any]) -> None:
        super().on_forward(ids, cache, given)
        self.length = cache.get_max_length() if isinstance(cache, StaticCache) else None
        rest = {name: value for name, value in given.items() if value is not cache}
        self.calls.append((tree_map_only(Tensor, Tensor.clone, rest), []))

    def on_select(self, indices: Tensor, reorder: bool) -> None:
        super().on_select(indices, reorder)
        self.calls[-1][1].append(methodcaller("reorder_cache", indices.clone()))

    def on_crop(self, length: int) -> None:
        if removed := self.stream.seen - length:
            self.calls[-1][1].append(methodcaller("crop", -removed))
        super().on_crop(length)


@dataclass
class Tape:
    """A generation to be played: prompts [B, P], sequences [B, P + tokens], calls, length of a static cache."""

    prompts: Tensor
    sequences: Tensor
    calls: list[Call]
    length: int | None

    @classmethod
    def of(cls, subject: Subject, prompts: Tensor, tokens: int, **settings: Any) -> "Tape":
        recorder = Recorder(subject.net, subject.head, subject.steps, at=subject.at)
        torch.manual_seed(0)
        with recorder:
            sequences = subject.net.generate(prompts, **fixed_length(prompts, tokens), **settings)
        return cls(prompts, sequences, recorder.calls, recorder.length)

    def cache(self, config: PreTrainedConfig) -> Cache:
        return StaticCache(config=config, max_cache_len=self.length) if self.length else DynamicCache(config=config)


def fixed_length(prompts: Tensor, tokens: int) -> dict[str, Any]:
    """Arguments of a ``generate`` call that ends after ``tokens``."""
    mask = torch.ones_like(prompts)
    return {"attention_mask": mask, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}


@dataclass
class Player:
    """A copy of the subject's model, of the same weights, with a scorer if there is a schedule.

    Attributes: ``seconds``: of every timed forward, with its part of the result's; ``scorer_us``, see the module; ``wrong``: what
    is, with its scores.
    """

    subject: Subject
    schedule: Schedule | None
    seconds: list[float] = field(default_factory=list)
    scorer_us: float = 0.0
    wrong: str = ""

    @cached_property
    def net(self) -> PreTrainedModel:
        net = self.subject.net
        return copy.deepcopy(net, {id(t): t for t in (*net.parameters(), *net.buffers())})

    @cached_property
    def scorer(self) -> rf.StreamScorer | None:
        s = self.subject
        return rf.StreamScorer(self.net, s.head, s.steps, self.schedule, s.at) if self.schedule else None

    @property
    def attached(self) -> contextlib.AbstractContextManager:
        return self.scorer or contextlib.nullcontext()

    @property
    def host_seconds(self) -> float:
        return self.scorer.host_seconds if self.scorer else 0.0

    def add(self, seconds: list[float], forwards: int, decoded: Any, texts: Sequence[Tensor]) -> None:
        """Count the ``seconds`` of a forward, or of each, when ``forwards`` of them have decoded something."""
        if self.scorer:
            began = time.perf_counter()
            scores = self.scorer.result(decoded)
            share = (time.perf_counter() - began) / forwards
            seconds = [s + share for s in seconds]
            self.wrong = self.wrong or self.subject.wrong(scores, texts)
        self.seconds += seconds


class Lockstep:
    """Players of one tape. ``compiled``: arguments of ``torch.compile`` for every forward but the prompt's, as in transformers."""

    def __init__(self, tape: Tape, players: Sequence[Player], compiled: dict[str, Any] | None = None) -> None:
        self.tape, self.players, self.compiled, self.order = tape, list(players), compiled, random.Random(0)
        self.caches: dict[str | None, Cache] = {}
        self.steps: dict[str | None, Callable] = {}
        self.device = tape.prompts.device

    @torch.no_grad()
    def run(self, until: float) -> None:
        """Play the tape once, and again as long as the clock says so."""
        with contextlib.ExitStack() as stack:
            for p in self.players:
                stack.enter_context(p.attached)
                self.steps[p.schedule] = torch.compile(p.net.__call__, **self.compiled) if self.compiled else p.net
            self.play(self.players, WARM_UP)
            rounds, began, spent = 0, time.monotonic(), [p.host_seconds for p in self.players]
            while not rounds or another(rounds, began, until):
                for p, seconds in zip(self.players, self.play(self.players), strict=True):
                    p.add(seconds, len(seconds), self.tape.sequences, self.tape.sequences)
                rounds += 1
            for p, before in zip(self.players, spent, strict=True):
                if not self.compiled:
                    p.scorer_us = 1e6 * (p.host_seconds - before) / len(p.seconds)
                elif p.scorer and self.device.type == "cpu":
                    p.scorer_us = self.profiled(p)

    def play(self, players: list[Player], forwards: int | None = None) -> list[list[float]]:
        """For each player, seconds of every forward after the prompt's."""
        for p in players:
            if self.tape.length and p.schedule in self.caches:
                self.caches[p.schedule].reset()  # compiled code may know the place of its tensors
            else:
                self.caches[p.schedule] = self.tape.cache(p.net.config)
            if p.scorer:
                p.scorer.on_generate({"input_ids": self.tape.prompts}, None)
        seconds: dict[str | None, list[float]] = {p.schedule: [] for p in players}
        for i, call in enumerate(self.tape.calls[:forwards]):
            for p in self.order.sample(players, len(players)):
                step = self.steps[p.schedule] if i else p.net
                seconds[p.schedule].append(self.timed(step, with_cache(p.net, self.caches[p.schedule]), *call))
        for p in players:
            if p.scorer:
                p.scorer.on_generated(None)
        return [seconds[p.schedule][1:] for p in players]

    def timed(
        self, step: Callable, cache: dict[str, Cache], given: dict[str, Any], then: list[Callable[[Cache], None]]
    ) -> float:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        wait(self.device)
        began = time.perf_counter()
        step(**given, **cache)
        for change in then:
            change(*cache.values())
        wait(self.device)
        return time.perf_counter() - began

    def profiled(self, p: Player) -> float:
        """Mean microseconds of the op in decode steps."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self.play([p], PROFILED)
        steps = sorted(
            (e for e in found.events() if e.name == f"{NAMESPACE}::decode_step"), key=lambda e: e.time_range.start
        )
        return sum(e.cpu_time_total for e in steps[1:]) / len(steps[1:])  # the first is the prompt's


def turns(players: Sequence[Player], run: Run, forwards: int, until: float) -> None:
    """Whole generations take turns, after one of each that is not timed."""
    order, rounds, began = random.Random(0), 0, time.monotonic()
    while rounds < 2 or another(rounds, began, until):
        for p in order.sample(list(players), len(players)):
            with p.attached:
                before, start = p.host_seconds, time.perf_counter()
                decoded, texts = run(p.net)
                seconds = (time.perf_counter() - start) / forwards
                if rounds:
                    p.add([seconds], forwards, decoded, texts)
                    p.scorer_us += (1e6 * (p.host_seconds - before) / forwards - p.scorer_us) / rounds
        rounds += 1


def batching(prompts: Tensor, tokens: int) -> Run:
    """Continuous batching of ``tokens`` after each prompt."""
    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    config = ContinuousBatchingConfig(
        use_cuda_graph=False, use_async_batching=False, num_blocks=4 * len(prompts), max_batch_tokens=prompts.numel()
    )

    def run(net: PreTrainedModel) -> tuple[Any, Sequence[Tensor]]:
        out = net.generate_batch(prompts.tolist(), generation_config=generation, continuous_batching_config=config)
        return out, [torch.tensor([*o.prompt_ids, *o.generated_tokens]) for o in out.values()]

    return run


def another(rounds: int, began: float, until: float) -> bool:
    """Whether a further round, as long as those since ``began``, ends before ``until``."""
    now = time.monotonic()
    return now + (now - began) / rounds < until


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def row(mode: str, plain: Player, scored: Player, batch: int, tokens: int) -> dict[str, Any]:
    """A line of the file, without figures if scores are wrong."""
    pairs = torch.tensor([plain.seconds, scored.seconds], dtype=torch.float64)
    kept, total, middle = pairs[0] / pairs[1], pairs.sum(1), 1e3 * pairs.quantile(0.5, 1)
    figures = {
        "plain_ms": round(float(middle[0]), 4),
        "scored_ms": round(float(middle[1]), 4),
        "throughput_kept": round(float(kept.quantile(0.5)), 5),
        "kept_q20": round(float(kept.quantile(0.2)), 5),
        "kept_q80": round(float(kept.quantile(0.8)), 5),
        "kept_total": round(float(total[0] / total[1]), 5),
        "scorer_us": round(scored.scorer_us, 2),
    }
    where = {"mode": mode, "schedule": scored.schedule, "batch": batch, "tokens": tokens, "pairs": pairs.shape[1]}
    return where | (dict.fromkeys(figures, "") if scored.wrong else figures) | {"check": scored.wrong or "scores equal"}


def measure(subject: Subject, mode: str, tokens: int, until: float) -> list[dict[str, Any]]:
    """The rows of ``mode``, one a schedule."""
    plain, *scored = players = [Player(subject, schedule) for schedule in (None, *SCHEDULES)]
    prompts = subject.prompts[: {"lookup": 1, "beams": 2}.get(mode)]
    batch = len(prompts) * MODES[mode].get("num_beams", 1)
    if mode == "batching":
        turns(players, batching(prompts, tokens), tokens, until)
    else:
        tape = Tape.of(subject, prompts, tokens, **MODES[mode])
        Lockstep(tape, players, {"fullgraph": True} if mode == "compiled" else None).run(until)
    return [row(mode, plain, p, batch, tokens) for p in scored]


def tiny() -> Subject:
    """For a trial: two layers, prompts that repeat themselves."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=63,
    )  # fmt: skip
    subject = Subject.random(config, 4, 6, torch.device("cpu"), torch.float32, rtol=1e-3)
    steps = rf.StepTokens(step_ids=range(1, config.vocab_size, 3)).resized(config.vocab_size)
    return dataclasses.replace(subject, prompts=subject.prompts.repeat(1, 3), steps=steps)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=440, help="in all; each mode has its turn at least once")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--mode", choices=MODES, action="append", help="one or several; by default all")
    parser.add_argument("--at", choices=("predict", "every"), action="append", help="the tokens that are scored, by default predict")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    end, subject = time.monotonic() + args.seconds, tiny() if args.quick else Subject.default()
    turns_left = list(itertools.product(args.at or ["predict"], args.mode or MODES))
    name, rows = "decode_modes_every" if "every" in (args.at or ()) else "decode_modes", []
    while turns_left:
        now = time.monotonic()
        until = now + (end - now) / len(turns_left)
        at, mode = turns_left.pop(0)
        found = measure(dataclasses.replace(subject, at=at), mode, args.tokens, until)
        rows += [{"at": at} | row for row in found]
        print(*rows[-len(found) :], sep="\n", flush=True)
        path = write(name, rows, args.out)
    print(path)
    return int(any(r["check"] != "scores equal" for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
