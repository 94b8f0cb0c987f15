"""Candidates for one prompt: this package's own loop, and transformers' ways to decode as many.

    python benchmarks/search_loop.py [--n 8 32] [--tokens 256] [--prompt P] [--rounds 3] [--device cuda] [--way NAME] [--quick]
                                     [--out benchmarks/results]

On CPU SmolLM2-135M-Instruct in float32; with ``--device cuda`` a Qwen2 of random weights and of the shape of 1.5B, in bfloat16. Temperature
0.6, top-p 0.95, every candidate ``tokens`` long. ``reflective`` is ``ReflectiveModel.generate``, scorer, answer and likelihoods included; no
other way scores anything. On a CPU that is ``reflective, batch``; with a ``whole sort`` it draws as it did before. The ways share the
weights, each has a model of its own around them, and they take turns in an order drawn anew for each round, after a few tokens of each
for all that it compiles and captures (``warm_up_s``). With ``--prompt`` the prompt has about so many tokens; our own loop keeps a long
one once for all candidates, all others a copy for each. That goes into ``search_loop_prompt.csv``.

``seconds``, with ``q20`` and ``q80``, is the median of the rounds; ``of_reflective`` the median, over the rounds, of this way's seconds by
those of ``reflective`` in the same round: below 1 it is the faster one. ``first_s`` is the median until every candidate has its first
token; ``MiB`` the most memory that a round took beyond what was there: of the resident set, on a GPU of what is allocated.
``recompiled`` counts the graphs that were compiled after the warm-up. ``host_ms``, on a GPU, is how long a step has no kernel
running, as the host is not there yet: ``seconds`` less the kernels' own time in a further run under torch's profiler.

A way that cannot run has a row that says why in ``check``; the exit code is 1 if one that can gave other than the tokens asked for.
"""

import argparse
import copy
import functools
import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

import reflective as rf
from reflective.benchmarks.best_of_n import QUESTION, measured
from reflective.benchmarks.decode_modes import STEP_EVERY, Subject, fixed_length, tiny, wait
from reflective.benchmarks.decode_overhead_gpu import made, memory, word_tokenizer
from reflective.benchmarks.record import RESULTS, write
from reflective.engines.hf import sampling
from reflective.engines.hf.internals import compiled_everywhere

SAMPLING = {"temperature": 0.6, "top_p": 0.95}
PAGE = 256  # tokens of a page of continuous batching
QUICK = 12  # tokens of a trial
WARM_UP = 8  # tokens


@dataclass(frozen=True)
class Decoded:
    """``tokens`` of all candidates together, and seconds until each had its first."""

    tokens: int
    first_s: float


Run = Callable[[int], Decoded]  # of so many tokens a candidate


@dataclass
class Task:
    """What is to be decoded: ``n`` candidates of ``tokens`` for ``question``, which is ``prompt`` [1, P] for the model."""

    model: rf.ReflectiveModel
    question: str
    n: int
    tokens: int

    @property
    def prompt(self) -> Tensor:
        return self.model.encode(self.model.format(self.question))

    @property
    def device(self) -> torch.device:
        return self.model.model.device

    def net(self) -> PreTrainedModel:
        """A model of the same weights, with nothing that ends a text."""
        net = self.model.model
        net = copy.deepcopy(net, {id(t): t for t in (*net.parameters(), *net.buffers())})
        net.generation_config = GenerationConfig(pad_token_id=0)
        return net


class First(StoppingCriteria):
    """Stops nothing, and notes when every candidate has its first token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.at is None:
            wait(input_ids.device)
            self.at = time.perf_counter()
            self.going = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.going


def reflective(task: Task, decoding: str = "auto", whole_sort: bool = False) -> Run:
    """``whole_sort``: tokens are drawn by a sort of the vocabulary, as they were before the likeliest alone were looked at."""
    own, config = task.net(), replace(task.model.config, stop=None, answer=None)
    own.generation_config.eos_token_id = []
    model = rf.ReflectiveModel(own, task.model.tokenizer, task.model.head, config)

    def run(tokens: int) -> Decoded:
        before, sampling.pick = sampling.pick, functools.partial(_sorting, sampling.pick) if whole_sort else sampling.pick
        try:
            found = model.generate(task.question, n=task.n, max_new_tokens=tokens, seed=0, decoding=decoding, **SAMPLING)
        finally:
            sampling.pick = before
        if tokens >= 4 * STEP_EVERY and not any(c.step_scores for c in found.candidates):
            raise RuntimeError("no candidate has a score")
        return Decoded(sum(len(c.token_ids) for c in found.candidates), found.alive[0][0])

    return run


def _sorting(pick: Callable[..., Tensor], *arguments: Any, head_first: bool = False) -> Tensor:
    return pick(*arguments)


def generate(task: Task, **more: Any) -> Run:
    """transformers' ``generate``, with ``more`` arguments."""
    net, prompt = task.net(), task.prompt
    given = SAMPLING | {"do_sample": True, "top_k": 0, "num_return_sequences": task.n} | more

    def run(tokens: int) -> Decoded:
        first, began = First(), time.perf_counter()
        out = net.generate(
            prompt, **fixed_length(prompt, tokens), **given, stopping_criteria=StoppingCriteriaList([first])
        )
        return Decoded(out[:, prompt.shape[1] :].numel(), first.at - began)

    return run


def static(task: Task) -> Run:
    # By default generate compiles on GPUs alone, and so does on a CPU what it would do on one.
    longest = task.prompt.shape[1] + task.tokens  # of the cache, in the warm-up too
    compiled = compiled_everywhere(CompileConfig())
    return generate(task, cache_implementation="static", max_cache_len=longest, compile_config=compiled)


def generate_batch(task: Task) -> Run:
    net, prompt = task.net(), task.prompt
    settings = SAMPLING | {"do_sample": True, "top_k": 0, "num_return_sequences": task.n}
    here: dict[str, Any] = {}
    if task.device.type == "cpu":  # what it would find out on a GPU by itself
        pages = -(-(prompt.shape[1] + task.tokens) // PAGE) + 1
        here = {
            "use_cuda_graph": False, "use_async_batching": False, "page_size": PAGE, "num_blocks": task.n * pages,
            "max_batch_tokens": max(task.n, prompt.shape[1]),
        }  # fmt: skip
    config = ContinuousBatchingConfig(**here)

    def run(tokens: int) -> Decoded:
        began = time.perf_counter()
        generation = GenerationConfig(max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0, **settings)
        out = net.generate_batch(
            prompt.tolist(), generation_config=generation, continuous_batching_config=config, record_timestamps=True
        )
        if failed := [o.error for o in out.values() if o.error] or ([] if out else ["no result"]):
            raise RuntimeError(failed[0])
        # A fork begins with its parent's timestamps or with none of its first token's; the parent has it.
        firsts = [o.timestamps[0] for o in out.values() if o.timestamps]
        return Decoded(sum(len(o.generated_tokens) for o in out.values()), max(firsts, default=began) - began)

    return run


WAYS: dict[str, Callable[[Task], Run]] = {
    "reflective": reflective,
    "reflective, whole sort": functools.partial(reflective, whole_sort=True),
    "reflective, batch": functools.partial(reflective, decoding="batch"),
    "reflective, seats": functools.partial(reflective, decoding="seats"),
    "reflective, compiled": functools.partial(reflective, decoding="compiled"),
    "transformers dynamic": generate,
    "transformers static compiled": static,
    "transformers generate_batch": generate_batch,
}


@dataclass
class Found:
    """One way, and what was seen of it. ``why``: it cannot run, or its tokens are not those asked for."""

    run: Run | None = None
    why: str = ""
    warm_up_s: float = 0.0
    mib: float = 0.0
    recompiled: int = 0
    seconds: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)


def timed(run: Run, tokens: int, device: torch.device) -> tuple[Decoded, float, float]:
    """What ``run`` decoded, its seconds, and the MiB that it took at its highest."""
    gc.collect()

    def all_of_it() -> Decoded:
        decoded = run(tokens)
        wait(device)
        return decoded

    if device.type == "cpu":
        return measured(all_of_it)
    with memory(device) as peak:
        began = time.perf_counter()
        decoded = all_of_it()
        return decoded, time.perf_counter() - began, peak()


def graphs() -> int:
    """Compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def prepared(way: str, task: Task) -> Found:
    """``way``, warm."""
    found = Found()
    try:
        found.run = WAYS[way](task)
        _, found.warm_up_s, _ = timed(found.run, min(WARM_UP, task.tokens), task.device)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from running is what its row says
        found.run, found.why = None, f"cannot run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


def kernel_seconds(run: Run, tokens: int) -> float:
    """That kernels run for ``tokens``."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(tokens)
        torch.cuda.synchronize()
    return sum(e.time_range.elapsed_us() for e in seen.events() if e.device_type == DeviceType.CUDA) / 1e6


def measure(task: Task, ways: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """A row a way."""
    torch.compiler.reset()
    torch.manual_seed(0)
    found = {way: prepared(way, task) for way in ways}
    running, order = [way for way in ways if found[way].run], random.Random(0)
    for _ in range(rounds):
        for way in order.sample(running, len(running)):
            f, before = found[way], graphs()
            decoded, seconds, mib = timed(f.run, task.tokens, task.device)
            print(f"{way}, {task.n} x {task.tokens}: {seconds:.2f} s", flush=True)
            f.recompiled += graphs() - before
            f.mib = max(f.mib, mib)
            f.seconds.append(seconds)
            f.firsts.append(decoded.first_s)
            if decoded.tokens != task.n * task.tokens:
                f.why = f"{decoded.tokens} tokens instead of {task.n * task.tokens}"
    for way, f in found.items():
        yield {"way": way, "n": task.n, "prompt": task.prompt.shape[1], "tokens": task.tokens} | figures(f, found.get("reflective"), task)


def figures(f: Found, ours: Found | None, task: Task) -> dict[str, Any]:
    names = (
        "rounds", "seconds", "q20", "q80", "of_reflective", "tokens_per_s", "first_s", "MiB", "recompiled", "host_ms", "warm_up_s",
    )  # fmt: skip
    row: dict[str, Any] = dict.fromkeys(names, "") | {"check": f.why}
    if f.run is None:
        return row
    seconds, at = torch.tensor(f.seconds, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    q20, middle, q80 = seconds.quantile(at).tolist()
    row |= {
        "rounds": len(f.seconds), "seconds": round(middle, 4), "q20": round(q20, 4), "q80": round(q80, 4),
        "tokens_per_s": round(task.n * task.tokens / middle, 1), "first_s": round(median(f.firsts), 4), "MiB": round(f.mib, 1),
        "recompiled": f.recompiled, "warm_up_s": round(f.warm_up_s, 2),
    }  # fmt: skip
    if ours and ours.run:
        row["of_reflective"] = round(median(a / b for a, b in zip(f.seconds, ours.seconds, strict=True)), 4)
    if task.device.type == "cuda":
        row["host_ms"] = round(1e3 * (middle - kernel_seconds(f.run, task.tokens)) / task.tokens, 4)
    return row


def random_task(subject: Subject, n: int, tokens: int) -> Task:
    """Behind the first of the subject's prompts; a word for each id."""
    net = subject.net
    config = rf.model.Config(rule="contains", stop=None, answer=None)
    model = rf.ReflectiveModel(net, word_tokenizer(net.config.vocab_size), subject.head, config)
    question = " ".join(f"w{i}" for i in subject.prompts[0].tolist() if i % STEP_EVERY != 1)
    return Task(model, question, n, tokens)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, nargs="+", default=[8, 32], help="candidates")
    parser.add_argument("--tokens", type=int, default=256, help="of each")
    parser.add_argument("--prompt", type=int, help="tokens of it; by default those of a short question")
    parser.add_argument("--rounds", type=int, default=3, help="timed, of all ways")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, help="of the random model; by default all of its shape")
    parser.add_argument("--way", choices=WAYS, action="append", help="one or several; by default all")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, a few tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device, ways = torch.device(args.device), args.way or list(WAYS)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU")
    if args.quick:
        args.n, args.tokens, args.rounds = [4], QUICK, 2
    with torch.no_grad():
        if device.type == "cuda":
            changes = {"num_hidden_layers": args.layers} if args.layers else {}
            subject = made("quick" if args.quick else "1.5B", 1, device, **changes)
        else:
            subject = tiny() if args.quick else None
    model = None if subject else rf.ReflectiveModel.default()
    rows: list[dict[str, Any]] = []
    for n in args.n:
        task = random_task(subject, n, args.tokens) if subject else Task(model, QUESTION, n, args.tokens)
        if args.prompt:
            task.question = "\n".join([task.question] * max(1, args.prompt // len(task.model.encode(task.question)[0])))
        for row in measure(task, ways, args.rounds):
            rows.append({"model": "random" if subject else "SmolLM2", "device": device.type} | row)
            print(rows[-1], flush=True)
            path = write("search_loop_prompt" if args.prompt else "search_loop", rows, args.out, device)
    print(path)
    return int(any(row["check"] and row["seconds"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
