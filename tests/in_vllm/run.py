"""All tests in vLLM, every file in a process of its own, two at a time: ``python tests/in_vllm/run.py [FILE ...]``.

What a stream is scored by is tried on both of vLLM's model runners, ``BOTH``: on a CPU the second one's kernels are interpreted.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BOTH = ("test_stream.py", "test_engine.py", "test_heads.py")
LIMIT = 3600  # seconds after which a file hangs: no measure of how fast a machine is


def run(file: str, second: bool) -> tuple[str, int, str, float]:
    """``(name, exit code, output, seconds)``."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_USE_V2_MODEL_RUNNER": "1" if second else "0"}
    if second:
        path = [str(HERE / "interpreted"), *filter(None, [env.get("PYTHONPATH")])]
        env |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:warnings", "--durations=3", str(HERE / file)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
        code, said = done.returncode, done.stdout + (done.stderr[-4000:] if done.returncode else "")
    except subprocess.TimeoutExpired as error:
        code, said = 1, f"{error}"
    return f"{file}, {'second' if second else 'first'} runner", code, said, time.perf_counter() - began


def main() -> int:
    wanted = [Path(name).name for name in sys.argv[1:]]
    files = sorted(
        (f.name for f in HERE.glob("test_*.py") if not wanted or f.name in wanted), key=lambda f: f not in BOTH
    )
    jobs = [(f, True) for f in files if f in BOTH] + [(f, False) for f in files]  # the longest first
    totals = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    with ThreadPoolExecutor(2) as pool:
        for name, code, said, seconds in pool.map(lambda job: run(*job), jobs):
            print(f"== {name}: {seconds:.0f} s\n{said}", flush=True)
            for count, what in re.findall(
                r"(\d+) (passed|failed|skipped|error)", said.strip().splitlines()[-1] if said.strip() else ""
            ):
                totals[what] += int(count)
            if code not in (0, 1, 5):
                totals["error"] += 1
            elif code == 1 and not totals["failed"]:
                totals["failed"] += 1
    failed = totals["failed"] + totals["error"]
    print(f"{totals['passed']} passed, {failed} failed, {totals['skipped']} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
