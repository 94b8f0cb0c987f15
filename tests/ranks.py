"""Programs as the ranks of one group, all on this machine."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny
from torch.distributed import TCPStore


def run_ranks(
    command: Sequence[str | Path], world: int = 2, *, cwd: Path | None = None, meanwhile: Callable[[], Any] | None = None,
    **environment: str,
) -> list[tuple[str, str]]:  # fmt: skip
    """What ``command`` prints on stdout and stderr, rank by rank, run as ``world`` processes on CPU that ``init_process_group``
    brings together; ``meanwhile`` is called while they run.

    They meet in a store of this process, at whatever port is free, as those of ``torchrun`` do: a port looked up beforehand
    could be another's by then.

    Raises:
        AssertionError: one failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", **environment,
    }  # fmt: skip
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        subprocess.Popen(
            list(map(str, command)), env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, cwd=cwd,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        if meanwhile:
            meanwhile()
        said = [process.communicate(timeout=tiny.PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(err for _, err in said)
    return said
