"""Best of n, generated and scored, against the published way: SmolLM2-135M-Instruct, float32, on CPU.

    python benchmarks/best_of_n.py [--n 32] [--tokens 256] [--rounds 2] [--out benchmarks/results]

``reflective``: ``ReflectiveModel.generate``, the prompt prefilled once, every step scored as it is decoded. ``published``:
transformers' ``generate`` with ``num_return_sequences=n``, then a second forward for each text, alone, with all hidden states and
all logits. All candidates have the same number of tokens. Every run has a process of its own, and the ways take turns.

``generate_MiB`` is the high-water mark of the resident set in generation, less what was resident before. ``score_MiB`` is the memory
of scoring: the state, the step log, the buffer and the copy of them that a result takes; published, the high-water mark of the
second pass less what was resident before. No figure without scores equal to those of ``rf.score``.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import reflective as rf
from reflective.benchmarks.decode_modes import fixed_length
from reflective.benchmarks.finished_text import status
from reflective.benchmarks.record import RESULTS, write
from reflective.published import second_pass
from reflective.scoring.state import StreamState

WAYS = ("reflective", "published")
QUESTION = "8 + 13 + 6"


@dataclass
class Found:
    """What one way found: ids of each text, step scores of each, seconds and MiB of generating and of scoring them."""

    texts: list[Tensor]
    step_scores: list[Tensor]
    generate_s: float
    generate_MiB: float
    score_s: float
    score_MiB: float


def measured(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``run`` returns, its seconds, and the MiB that it took at its peak."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what was freed earlier is resident still, and would be taken again unnoticed
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    found = run()
    return found, time.perf_counter() - began, (status("VmHWM") - before) / 2**20


def reflective(model: rf.ReflectiveModel, prompt: Tensor, n: int, tokens: int) -> Found:
    model.config = replace(model.config, stop=None, answer=None)
    model.model.generation_config.eos_token_id = []  # no text ends before its last token
    found, seconds, mib = measured(lambda: model.generate(QUESTION, n=n, max_new_tokens=tokens, seed=0))
    state = StreamState.allocate(
        n + 1,
        model.head.hidden_size,
        model.head.width,
        buffer_rows=256,
        max_steps=tokens,
        dtype=model.head.dtype,
        device=prompt.device,
    )  # fmt: skip  (the prompt has a row too)
    scoring = sum(t.nbytes for part in (state, state.take(list(range(n)))) for t in part.tensors())
    return Found(
        [torch.cat([prompt[0], torch.tensor(c.token_ids)]) for c in found.candidates],
        [torch.tensor(c.step_scores) for c in found.candidates],
        seconds - found.scoring_seconds, mib, found.scoring_seconds, scoring / 2**20,
    )  # fmt: skip


def published(model: rf.ReflectiveModel, prompt: Tensor, n: int, tokens: int) -> Found:
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "num_return_sequences": n}
    torch.manual_seed(0)
    out, generate_s, generate_mib = measured(
        lambda: model.model.generate(prompt, **fixed_length(prompt, tokens), **sampling)
    )
    texts = out.split(1)
    scores, score_s, score_mib = measured(lambda: [second_pass(model, text, prompt.shape[1]) for text in texts])
    return Found(list(out), scores, generate_s, generate_mib, score_s, score_mib)


def measure(model: rf.ReflectiveModel, way: str, n: int, tokens: int) -> dict[str, Any]:
    """The figures of one run of ``way``, after a short one.

    Raises:
        RuntimeError, AssertionError: texts of other lengths, no step, or scores that are wrong.
    """
    prompt = model.encode(model.format(QUESTION))
    run = reflective if way == "reflective" else published
    run(model, prompt, 2, 4)  # warm up: allocate what stays
    found = run(model, prompt, n, tokens)
    truth = rf.score(
        model.model, model.head, model.steps, found.texts, at=model.config.at, prompt_lengths=prompt.shape[1]
    )
    if any(len(text) != prompt.shape[1] + tokens for text in found.texts) or not int(truth.n_steps.sum()):
        raise RuntimeError(
            f"{way}: texts of {[len(text) for text in found.texts]} tokens, {truth.n_steps.tolist()} steps"
        )
    for ours, theirs in zip(found.step_scores, truth.step_scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    figures = {name: value for name, value in vars(found).items() if isinstance(value, float)}
    return figures | {"steps": int(truth.n_steps.sum())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="of both ways")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--way", choices=WAYS, help="one run of one way, its figures as JSON")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(rf.ReflectiveModel.default(), args.way, args.n, args.tokens)))
        return
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for i in range(args.rounds):
        for way in WAYS if i % 2 else WAYS[::-1]:
            command = [sys.executable, __file__, "--way", way, "--n", str(args.n), "--tokens", str(args.tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, runs[way][-1], flush=True)
    rows = [
        {"way": way, "n": args.n, "tokens": args.tokens, "rounds": args.rounds}
        | {name: round(median(run[name] for run in found), 5) for name in found[0]}
        for way, found in runs.items()
    ]
    print(*rows, sep="\n")
    print(write("best_of_n", rows, args.out))


if __name__ == "__main__":
    main()
