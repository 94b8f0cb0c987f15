"""What training spends its time on: sampling answers, and the forward and backward of the loss.

    python benchmarks/training_speed.py [--questions 8] [--samples 32] [--repeats 3] [--out benchmarks/results]

SmolLM2-135M-Instruct in bfloat16, sums behind four worked examples (190 tokens), at most 48 new tokens, temperature 0.8. Sampling:
transformers' ``generate`` with ``num_return_sequences``, a question a call; the search loop of ``ReflectiveModel.generate``; and
``Sampler``, whose draws are checked against the search loop's first. Loss: forward and backward of 32 responses with LoRA layers of
rank 16, every row whole or what the prompts have in common once; gradients are compared first. Each line takes turns with the others
of its kind; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from reflective.benchmarks.record import RESULTS, write
from reflective.benchmarks.reproduction.families import FAMILIES
from reflective.benchmarks.reproduction.rollouts import MAX_NEW_TOKENS, TEMPERATURE, policy, questions, untrained
from reflective.engines.hf.backbone import Backbone
from reflective.engines.hf.ends import end_tokens
from reflective.model import ReflectiveModel
from reflective.train.sampler import Sampler


def in_turns(ways: dict[str, Callable[[int], int]], repeats: int) -> dict[str, tuple[float, int]]:
    """Median seconds of each way over seeds, and the tokens of its last run."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    for seed in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            tokens[name] = way(seed)
            seconds[name].append(time.perf_counter() - began)
    return {name: (statistics.median(s), tokens[name]) for name, s in seconds.items()}


def sampling(model: ReflectiveModel, asked: list[str], samples: int, repeats: int) -> list[dict[str, Any]]:
    prompts = [model.encode(model.format(q))[0].tolist() for q in asked]
    ends = end_tokens(model.model, model.tokenizer)

    def sampler(seed: int) -> list[list[tuple[int, ...]]]:
        made = Sampler(
            model.model, model.tokenizer, ends=ends, stop=model.config.stop, max_new_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE, top_p=1.0,
        )  # fmt: skip
        found: list[list[tuple[int, ...]]] = [[] for _ in asked]
        for q, draws in made.run(prompts, samples, seed):
            found[q] = sorted(tuple(t for t in d.token_ids if t not in ends) for d in draws for _ in range(d.count))
        return found

    def search(seed: int) -> list[list[tuple[int, ...]]]:
        found = model.generate(
            asked,
            n=samples,
            seed=seed,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            top_p=1.0,
            batch_rows=256,
        )
        return [sorted(tuple(c.token_ids) for c in g.candidates) for g in found]

    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        new = 0
        for prompt in prompts:
            out = model.model.generate(
                torch.tensor([prompt]), do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, tokenizer=model.tokenizer,
                num_return_sequences=samples, max_new_tokens=MAX_NEW_TOKENS, stop_strings=["Question"],
                pad_token_id=model.tokenizer.eos_token_id,
            )  # fmt: skip
            new += out[:, len(prompt) :].numel()
        return new

    same = sum(len(set(a) & set(b)) / len(set(b)) for a, b in zip(sampler(0), search(0), strict=True)) / len(asked)
    assert same > 0.5, (
        f"only {same:.0%} of the draws agree"
    )  # bfloat16: another batch, other roundings, some other draws
    counted = {
        "generate": generate,
        "search loop": lambda seed: sum(len(ids) for part in search(seed) for ids in part),
        "Sampler": lambda seed: sum(len(ids) for part in sampler(seed) for ids in part),
    }
    return [
        {"what": "sampling", "way": name, "seconds": round(s, 3), "tokens": n, "tokens_per_s": round(n / s, 1)}
        for name, (s, n) in in_turns(counted, repeats).items()
    ]


def loss(model: ReflectiveModel, asked: list[str], samples: int, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    net = get_peft_model(model.model, LoraConfig(r=16, target_modules="all-linear"))
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    backbone = Backbone.of(model.model)
    rows = [model.encode(model.format(q) + "4 + 5 = 9.\n\n9 + 11 = 20.\n\nThe answer is 20.\n\n")[0] for q in asked]
    width = min(map(len, rows))
    ids = torch.stack([row[:width] for row in rows]).repeat_interleave(samples // len(rows), 0)
    shared = int((ids == ids[0]).all(0).long().cumprod(0).sum())
    weights = [p for p in net.parameters() if p.requires_grad]

    def run(prefix: int) -> list[torch.Tensor | None]:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = backbone.hidden(ids, None, shared=prefix)
        return torch.autograd.grad(hidden[:, shared - prefix :].float().square().mean(), weights, allow_unused=True)

    whole, once = run(0), run(shared)
    error = max(
        float((a - b).norm() / a.norm()) for a, b in zip(whole, once, strict=True) if a is not None and a.norm()
    )
    assert error < 0.1, f"gradients differ by {error:.3f}"
    ways = {
        "rows whole": lambda seed: len(run(0)) and ids.numel(),
        "prefix once": lambda seed: len(run(shared)) and ids.numel(),
    }
    return [
        {"what": "loss", "way": name, "seconds": round(s, 3), "tokens": n, "tokens_per_s": round(n / s, 1)}
        for name, (s, n) in in_turns(ways, repeats).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    family = FAMILIES["sums"]
    model = policy(untrained(torch.bfloat16), family)
    asked = [q.text for q in questions(family)[1][: args.questions]]
    rows = sampling(model, asked, args.samples, args.repeats) + loss(model, asked, args.samples, args.repeats)
    write("training_speed", rows, args.out)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
