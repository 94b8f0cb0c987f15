"""Two builds of this package in turns: what a change costs where it should cost nothing.

    pip install --no-build-isolation --no-deps --target build/before "git+file://$PWD@COMMIT"
    python benchmarks/against.py build/before [--rounds 15]

A process a build, one thread each, asked by turns for the same runs of a small random model, whose forwards are so short that the
loop around them shows. Says the ratio of processor time, this build's by the other's: median, 20 and 80 % quantiles. Where tokens
or scores differ to the bit it ends with an error.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
LETTERS = "".join(map(chr, range(ord("A"), ord("A") + 56)))


def workloads() -> dict[str, Callable[[], Any]]:
    """By name: functions that run something and give what came of it, to be compared."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import reflective as rf
    from reflective.model import Config

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512, eos_token_id=2, pad_token_id=0, initializer_range=0.12,
        )
    ).eval()  # fmt: skip
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<think>", "</think>", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="Z"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    config = Config(rule="contains", delimiter=list(LETTERS[5:17]), prompt="{question}")
    model = rf.ReflectiveModel(net, tokenizer, rf.SPRM(64).requires_grad_(False).eval(), config)
    prompts = torch.randint(5, 61, (8, 12))

    def decode(schedule: str) -> Any:
        with rf.StreamScorer(net, model.head, model.steps, schedule) as scorer:
            out = net.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=200, eos_token_id=None
            )
        return out.tolist(), [s.tolist() for s in scorer.result(out).step_scores]

    def search(strategy: str, n: int) -> Any:
        found = model.generate(["ABC", "D"] * 2, strategy=strategy, n=n, temperature=1.0, max_new_tokens=120, seed=1)
        return [[(c.token_ids, c.step_scores, c.status) for c in g.candidates] for g in found]

    return {
        "decode step, deferred": lambda: decode("deferred"),
        "decode step, immediate": lambda: decode("immediate"),
        "search, best of 8": lambda: search("best_of_n", 8),
        "search, step beam of 8": lambda: search("step_beam", 8),
        "search, 16 particles": lambda: search("particles", 16),
    }


def answer() -> None:
    """Run what stdin names, a line each; tell seconds and a digest."""
    known = workloads()
    print(json.dumps(list(known)), flush=True)
    for line in sys.stdin:
        began = time.process_time()
        came = known[line.strip()]()
        seconds = time.process_time() - began
        print(json.dumps([seconds, hashlib.sha256(repr(came).encode()).hexdigest()]), flush=True)


class Build:
    """A process that imports the package from ``path``; None: the one that is installed."""

    def __init__(self, path: Path | None) -> None:
        where = {"PYTHONPATH": str(path.resolve())} if path else {}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--answer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **where, "OMP_NUM_THREADS": "1"}, cwd=HERE / "benchmarks",
        )  # fmt: skip
        self.names = json.loads(self.process.stdout.readline())

    def run(self, name: str) -> tuple[float, str]:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="a directory from which the other build is imported")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer()
        return
    if args.other is None or not (args.other / "reflective").is_dir():
        parser.error("other: give a directory that holds the other build's package, reflective")
    ours, other = Build(None), Build(args.other)
    for name in ours.names:
        if ours.run(name)[1] != other.run(name)[1]:
            sys.exit(f"{name}: tokens or scores differ")
        ratios = []
        for i in range(args.rounds):
            seconds = {build: build.run(name)[0] for build in ((ours, other) if i % 2 else (other, ours))}
            ratios.append(seconds[ours] / seconds[other])
        low, *_, high = statistics.quantiles(ratios, n=5)
        print(f"{name}: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) of the other's time", flush=True)


if __name__ == "__main__":
    main()
