"""The worked example of docs/training.md, run as it stands there, and what it came to: ``results/train_a_head.csv``.

python benchmarks/train_a_head.py    # minutes on two CPU cores
"""

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from reflective.benchmarks import record
from reflective.checkpoints import default

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHOWN = ("pass@1", "majority@8", "weighted_vote@8", "best_of@2", "best_of@8", "best_of@16", "any@8", "auc_within")


def blocks() -> list[str]:
    """The page's blocks of Python, up to where the head is in use."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return found[: 1 + next(i for i, block in enumerate(found) if "Select" in block)]


def run(smaller: dict[str, str] | None = None) -> tuple[dict[str, Any], list[float]]:
    """Run the page in the current directory, the weights from the package that ships them.

    Args:
        smaller: what to write in place of what, so that it takes seconds.

    Returns:
        Its names, and the seconds of each block.
    """
    names, seconds = {"__name__": "training"}, []
    for block in blocks():
        code = block.replace(f'path = "{MODEL}"', f"path = {str(default.converted())!r}")
        for there, here in (smaller or {}).items():
            code = code.replace(there, here)
        begun = time.perf_counter()
        exec(code, names)  # noqa: S102
        seconds.append(time.perf_counter() - begun)
    return names, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names, seconds = run()
        os.chdir(out.parent)
    _, _, answers, fit, *_ = seconds
    same = {
        "questions": len(names["measure"]), "learnt_from": len(names["learn"]), "samples": names["settings"]["samples"],
        "answers_s": round(answers, 1), "fit_s": round(fit, 1),
    }  # fmt: skip
    found = names["found"]
    rows = [{"measure": m, "value": found[m].value, "low": found[m].low, "high": found[m].high} | same for m in SHOWN]
    record.write("train_a_head", [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows], out)


if __name__ == "__main__":
    main()
