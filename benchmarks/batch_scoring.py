"""Rows a second of ``reflective score``: batches of similar lengths, against batches in the input's order and one text a call.

    python benchmarks/batch_scoring.py [--texts 96] [--batch-tokens 4096] [--rounds 5] [--out benchmarks/results]

SmolLM2-135M-Instruct, float32, worked sums of 24 to 640 tokens, most of them short. ``sorted`` is what the command runs between
loading the model and its end: reading JSONL, tokenizing, scoring, the journal, writing. The others are given token ids:
``unsorted``, ``rf.score`` of batches within the same budget of padded tokens; ``single``, ``rf.score`` of one text a call;
``published``, a second forward of the whole model with all hidden states and logits, one text a call. The ways take turns; no time
is told before all step scores agree with the published ones.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import reflective as rf
from reflective.batch import score_file
from reflective.benchmarks.record import RESULTS, write
from reflective.published import second_pass
from reflective.utils.lengths import batches_by_length

Scores = list[list[float]]  # of the steps of each text


def texts(model: rf.ReflectiveModel, n: int) -> list[str]:
    """Worked sums, log-uniform in length, in random order."""
    rng = random.Random(0)
    ids = model.encode("".join(f"{i} + {i + 3} = {2 * i + 3}.\n\n" for i in range(1, 200)))[0].tolist()
    lengths = [round(math.exp(rng.uniform(math.log(24), math.log(640)))) for _ in range(n)]
    return [model.decode(ids[start : start + k]) for k in lengths for start in [rng.randrange(len(ids) - k)]]


def in_order(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Rows in their order, each batch's padded size within ``batch_tokens``."""
    batches: list[list[int]] = []
    for row, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in batches[-1])]) if batches else length
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def ways(
    model: rf.ReflectiveModel, rows: list[str], batch_tokens: int, folder: Path
) -> tuple[dict[str, Callable[[], Scores]], dict[str, int]]:
    """Each way of scoring all ``rows``, and the tokens that it feeds, padding included."""
    ids = [model.tokenizer(row).input_ids for row in rows]
    lengths = [len(x) for x in ids]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    def score(some: list[list[int]]) -> Scores:
        found = rf.score(model.model, model.head, model.steps, some, at=model.config.at, batch_tokens=1 << 40)
        return [scores.tolist() for scores in found.step_scores]

    def command() -> Scores:
        output = folder / "scored.jsonl"
        if score_file(lambda: model, source, output, batch_tokens=batch_tokens, replace=True):
            raise RuntimeError("not all texts could be scored")
        return [json.loads(line)["step_scores"] for line in output.read_text().splitlines()]

    unsorted = in_order(lengths, batch_tokens)
    run = {
        "published": lambda: [second_pass(model, torch.tensor([x]), None).tolist() for x in ids],
        "single": lambda: [score([x])[0] for x in ids],
        "unsorted": lambda: [scores for batch in unsorted for scores in score([ids[i] for i in batch])],
        "sorted": command,
    }
    padded = {
        name: sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        for name, batches in (("unsorted", unsorted), ("sorted", batches_by_length(lengths, batch_tokens)))
    }
    return run, dict.fromkeys(run, sum(lengths)) | padded


def measure(n: int, batch_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each way.

    Raises:
        AssertionError: scores that are wrong, or none.
    """
    model = rf.ReflectiveModel.default()
    rows = texts(model, n)
    with tempfile.TemporaryDirectory() as folder:
        run, fed = ways(model, rows, batch_tokens, Path(folder))
        truth = run["published"]()
        steps = sum(map(len, truth))
        assert steps > n, "texts without steps prove nothing"
        for way, found in ((name, way()) for name, way in run.items() if name != "published"):
            assert [len(x) for x in found] == [len(x) for x in truth], way
            for ours, theirs in zip(found, truth, strict=True):
                torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-5, msg=way)
        seconds: dict[str, list[float]] = {name: [] for name in run}
        for _ in range(rounds):
            for name, way in run.items():
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
    tokens = fed["single"]
    found = []
    for name, times in seconds.items():
        low, high = statistics.quantiles(times, n=5)[::3] if len(times) > 1 else times * 2
        median = statistics.median(times)
        found.append(
            {
                "way": name, "texts": n, "tokens": tokens, "steps": steps, "batch_tokens": batch_tokens,
                "padding": round(fed[name] / tokens - 1, 3), "rows_per_s": round(n / median, 3),
                "tokens_per_s": round(tokens / median, 1), "median_s": round(median, 4), "q20_s": round(low, 4),
                "q80_s": round(high, 4), "rounds": rounds,
            }
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = measure(args.texts, args.batch_tokens, args.rounds)
    for row in rows:
        print(row)
    print(write("batch_scoring", rows, args.out))


if __name__ == "__main__":
    main()
