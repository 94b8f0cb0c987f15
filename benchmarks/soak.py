"""Memory over a long generation: 32 sequences of 32,768 tokens, every step of them scored.

    python benchmarks/soak.py [--sequences 32] [--tokens 32768] [--out benchmarks/results]

A small random model with a sliding window of 64, so that its own cache does not grow. Generated first without a scorer, then with
one, in one process: resident memory is sampled 33 times in each, and what grows in the second run alone is the scorer's. (The ids
themselves take 8 bytes a token, and ``generate`` copies them at each one.) At the end the steps of the first 2,048 columns are compared with
``rf.score`` of those columns, which no later token can change.
"""

import argparse
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, StoppingCriteria, StoppingCriteriaList

import reflective as rf
from reflective.benchmarks.record import RESULTS, write

CHECKED = 2048  # columns
SAMPLES = 32


class Watch(StoppingCriteria):
    """Never stops; samples resident memory, less what the ids themselves take."""

    def __init__(self, every: int) -> None:
        self.every, self.tokens, self.samples = every, 0, list[tuple[int, float]]()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.tokens += 1
        if self.tokens % self.every == 1:
            self.samples.append((self.tokens, resident_mib()))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=64, max_position_embeddings=args.tokens + 64, eos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    head = rf.SPRM(64).requires_grad_(False).eval()
    steps = rf.StepTokens(step_ids=list(range(10, 18)))  # about one token in twelve
    ids = torch.randint(20, 96, (args.sequences, 8))
    scorer = rf.StreamScorer(model, head, steps)

    def generate(attached: AbstractContextManager) -> tuple[Tensor, list[tuple[int, float]], float]:
        watch, began = Watch(max(1, args.tokens // SAMPLES)), time.perf_counter()
        with attached:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=args.tokens, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([watch]),
            )  # fmt: skip
        return out, watch.samples, time.perf_counter() - began

    runs = {"plain": generate(nullcontext())[1:], "scored": (scored := generate(scorer))[1:]}
    out = scored[0]
    scores = scorer.result(out)

    finished = rf.score(model, head, steps, out[:, :CHECKED], prompt_lengths=ids.shape[1])
    worst = 0.0
    for i in range(args.sequences):
        positions = scores.step_positions[i]
        n = int((positions < min(CHECKED, out.shape[1])).sum())
        if positions[:n].tolist() != finished.step_positions[i].tolist():
            raise SystemExit(f"sequence {i}: the stream's steps are not those of the finished text")
        worst = max(worst, float((scores.step_scores[i][:n].log() - finished.step_scores[i].log()).abs().max()))
    if worst > 1e-3:
        raise SystemExit(f"log-scores differ by {worst:.1e} from those of the finished text")

    rows = [
        {
            "run": run, "sequences": args.sequences, "tokens": tokens, "resident_MiB": round(mib, 1),
            "ids_MiB": round(args.sequences * tokens * 8 / 2**20, 1), "seconds": round(seconds, 1),
            "steps": int(scores.n_steps.sum()) if run == "scored" else "",
            "scorer_seconds": round(scorer.host_seconds, 2) if run == "scored" else "",
            "max_error": f"{worst:.1e}" if run == "scored" else "",
        }
        for run, (samples, seconds) in runs.items()
        for tokens, mib in samples
    ]  # fmt: skip
    write("soak", rows, args.out)
    for run, (samples, seconds) in runs.items():
        # From the first quarter on: by then every allocator has what it needs.
        late = [mib for tokens, mib in samples if tokens >= args.tokens // 4]
        print(
            f"{run}: {late[0]:.1f} MiB at a quarter, {late[-1]:.1f} at the end, {max(late):.1f} at most; {seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
