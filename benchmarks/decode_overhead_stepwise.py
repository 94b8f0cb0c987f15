"""What the scorer adds to decoding, paired step by step: 8 sequences, 256 tokens, SmolLM2-135M-Instruct, float32.

    python benchmarks/decode_overhead_stepwise.py [--tokens 256]

Whole decodes of half a minute drift by several per cent on a shared machine (``decode_overhead.py``). Here two caches
decode the same tokens in lockstep, one forward without and one with the scorer attached, the order alternating, so each
pair is a tenth of a second apart. Sampling is left out, which makes the scorer's share larger, not smaller.
"""

import argparse
import time
from statistics import median

import torch
from torch import Tensor

import reflective as rf
from reflective.benchmarks.record import write


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    model = rf.ReflectiveModel.default()
    net, prompt = model.model, model.encode(model.format("8 + 13 + 6")).expand(8, -1)
    P = prompt.shape[1]
    torch.manual_seed(0)
    text: Tensor = net.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8, top_k=0,
        min_new_tokens=args.tokens, max_new_tokens=args.tokens, pad_token_id=model.tokenizer.pad_token_id,
    )  # fmt: skip

    rows = []
    for schedule in ("deferred", "immediate"):
        scorer = rf.StreamScorer(net, model.head, model.steps, schedule, model.config.at)
        with torch.no_grad():
            plain_cache = net(prompt, use_cache=True).past_key_values
            with scorer:
                scored_cache = net(prompt, use_cache=True).past_key_values
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for t in range(P, text.shape[1] - 1):
                token = text[:, t : t + 1]
                for scored in (False, True) if t % 2 else (True, False):
                    if scored:
                        scorer.__enter__()  # attached and detached outside the clock
                    began = time.perf_counter()
                    net(token, past_key_values=scored_cache if scored else plain_cache)
                    seconds[scored].append(time.perf_counter() - began)
                    if scored:
                        scorer.__exit__(None, None, None)
        began = time.perf_counter()
        scores = scorer.result(text)
        result = time.perf_counter() - began
        finished = rf.score(net, model.head, model.steps, text, at=model.config.at, prompt_lengths=P)
        torch.testing.assert_close(scores.score, finished.score, rtol=1e-3, atol=1e-5)
        per_step = result / len(seconds[True])
        kept = [a / (b + per_step) for a, b in zip(seconds[False], seconds[True], strict=True)]
        rows.append(
            {
                "schedule": schedule,
                "decode_steps": len(kept),
                "reasoning_steps": int(scores.n_steps.sum()),
                "plain_median_ms": round(1e3 * median(seconds[False]), 3),
                "scored_median_ms": round(1e3 * median(seconds[True]), 3),
                "result_ms": round(1e3 * result, 3),
                "throughput_kept_median": round(median(kept), 5),
                "throughput_kept_total": round(sum(seconds[False]) / (sum(seconds[True]) + result), 5),
            }
        )
        print(rows[-1], flush=True)
    print(write("decode_overhead_stepwise", rows))


if __name__ == "__main__":
    main()
