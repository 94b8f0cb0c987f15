"""What the scorer adds to decoding: SmolLM2-135M-Instruct, float32, 8 sequences x 256 new tokens, paired runs.

    python benchmarks/decode_overhead.py [--pairs 5] [--tokens 256]

Every pair decodes the same sampled tokens without and with the scorer, the order alternating, so that drift of the
machine hits both alike. Beside the pairs' ratio stands the scorer's own host time, which needs no difference of two
large numbers, and the second pass of the published pipeline over the same texts.
"""

import argparse
import time

import torch
from torch import Tensor

import reflective as rf
from reflective.benchmarks.record import write
from reflective.published import second_pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()

    model = rf.ReflectiveModel.default()
    ids = model.encode(model.format("8 + 13 + 6")).expand(8, -1)
    P = ids.shape[1]

    def decode() -> tuple[Tensor, float]:
        torch.manual_seed(0)
        began = time.perf_counter()
        out = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=0,
            min_new_tokens=args.tokens, max_new_tokens=args.tokens, pad_token_id=model.tokenizer.pad_token_id,
        )  # fmt: skip
        return out, time.perf_counter() - began

    decode()  # warm up
    rows = []
    for schedule in ("deferred", "immediate"):
        for pair in range(args.pairs):
            scorer = rf.StreamScorer(model.model, model.head, model.steps, schedule, model.config.at)
            seconds = {}
            for scored in (False, True) if pair % 2 else (True, False):
                if scored:
                    with scorer:
                        out, seconds[True] = decode()
                    began = time.perf_counter()
                    scores = scorer.result(out)
                    seconds[True] += time.perf_counter() - began
                else:
                    plain, seconds[False] = decode()
            assert torch.equal(plain, out), "the scorer changed what was decoded"
            began = time.perf_counter()
            reference = [second_pass(model, text, P) for text in out.split(1)]
            again = time.perf_counter() - began
            for ours, theirs in zip(scores.step_scores, reference, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
            rows.append(
                {
                    "schedule": schedule,
                    "pair": pair,
                    "steps": int(scores.n_steps.sum()),
                    "plain_s": round(seconds[False], 4),
                    "scored_s": round(seconds[True], 4),
                    "throughput_kept": round(seconds[False] / seconds[True], 5),
                    "scorer_host_s": round(scorer.host_seconds, 5),
                    "scorer_share": round(scorer.host_seconds / seconds[True], 6),
                    "second_pass_s": round(again, 4),
                }
            )
            print(rows[-1], flush=True)
        these = [r for r in rows if r["schedule"] == schedule]
        for key in ("throughput_kept", "scorer_share", "scorer_host_s", "second_pass_s"):
            print(f"{schedule}: median {key} {sorted(r[key] for r in these)[len(these) // 2]}")
    print(write("decode_overhead", rows))


if __name__ == "__main__":
    main()
