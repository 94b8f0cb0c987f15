"""Scoring finished text: peak extra memory and time of ``rf.score`` against the published way and the plain forward.

    python benchmarks/finished_text.py [--tokens 4096]

SmolLM2-135M-Instruct, float32, one text. Each way runs in a process of its own: the peak is the resident set's high-water
mark, reset before the call (Linux), less what was resident then.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import reflective as rf
from reflective.benchmarks.record import write
from reflective.published import second_pass

WAYS = ("published", "forward", "score")


def text(model: rf.ReflectiveModel, tokens: int) -> torch.Tensor:
    """A long text full of steps: worked sums, one after the other."""
    worked = "".join(f"{i} + {i + 3} = {2 * i + 3}.\n\n" for i in range(1, tokens))
    return model.encode(worked)[:, :tokens]


def run(model: rf.ReflectiveModel, way: str, ids: torch.Tensor) -> list[float]:
    """The step scores of ``ids`` (none for the bare forward, whose time is the yardstick)."""
    if way == "score":
        return rf.score(model.model, model.head, model.steps, ids, at=model.config.at).step_scores[0].tolist()
    if way == "published":
        return second_pass(model, ids, None).tolist()
    with torch.no_grad():
        model.model(ids)
    return []


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(way: str, tokens: int, repeats: int) -> None:
    model = rf.ReflectiveModel.default()
    ids = text(model, tokens)
    run(model, way, ids[:, :64])  # warm up: allocate what stays
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    scores = run(model, way, ids)
    peak = status("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run(model, way, ids)
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"peak_extra_bytes": peak, "seconds": sorted(seconds), "scores": scores}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        return measure(args.way, args.tokens, args.repeats)
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--tokens", str(args.tokens), "--repeats", str(args.repeats)]
        found[way] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
    torch.testing.assert_close(
        torch.tensor(found["score"]["scores"]), torch.tensor(found["published"]["scores"]), rtol=1e-3, atol=1e-5
    )
    rows = [
        {
            "way": way,
            "tokens": args.tokens,
            "steps": len(found["score"]["scores"]),
            "peak_extra_MiB": round(f["peak_extra_bytes"] / 2**20, 1),
            "median_s": round(f["seconds"][len(f["seconds"]) // 2], 4),
            "min_s": round(f["seconds"][0], 4),
        }
        for way, f in found.items()
    ]
    for row in rows:
        print(row)
    print(write("finished_text", rows))


if __name__ == "__main__":
    main()
