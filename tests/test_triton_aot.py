"""Every Triton kernel, compiled ahead of time for GPUs that need not be there: registers, spills, shared memory.

Run as a program, this file calls the launchers on meta tensors, compiles what they would launch for each target instead of
launching it, and prints what the assembler used as JSON. Meta tensors have no values: a launcher that read one back to the
host would raise.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

CAPABILITIES = [80, 90, 100]
HEADS = [(1536, torch.float32), (576, torch.bfloat16), (5120, torch.bfloat16)]
KERNELS = ["_step_mask", "_partials", "_scores", "_flush", "_detect"]
SHARED_LIMIT = 99 * 1024  # what one program may have on sm_86 and sm_89, the smallest of the supported family


def launch_all(H: int, dtype: torch.dtype) -> None:
    from reflective.kernels import layout
    from reflective.kernels.decode_step_triton import decode_step
    from reflective.kernels.score_rows_triton import score_rows
    from reflective.kernels.step_mask_triton import step_mask

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    N, C, R, K = 32, 512, 256, 2 * H
    automaton = empty(151936, dtype=torch.int32), empty(40, 9, dtype=torch.int32)
    head = empty(K, H), empty(K), empty(1, K), empty(1)
    log = empty(N, C, dtype=torch.int32), empty(N, C, dtype=torch.int8), empty(N, C, dtype=torch.float32)
    slots = empty(R, H), empty(R, layout.OWNER_FIELDS, dtype=torch.int32), empty(1, dtype=torch.int32)
    seq = empty(N, layout.SEQ_FIELDS, dtype=torch.int64)
    tally = empty(N, layout.N_REGIONS, layout.TALLY_FIELDS, dtype=torch.float64)
    for at_predict in (True, False):
        ids, hidden = empty(N, 1, dtype=torch.int64), empty(N, 1, H)
        decode_step(ids, hidden, *automaton, *head, seq, tally, empty(N, H), *log, *slots, at_predict, True)
    score_rows(empty(R, H), *head)
    bounds = (empty(N, dtype=torch.int64) for _ in range(3))
    step_mask(empty(N, 1000, dtype=torch.int64), *automaton, *bounds)


def compile_all(folder: str) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import __file__ as backend
    from triton.runtime.jit import JITFunction

    class Driver:
        """Stands for a GPU of one compute capability; Triton keeps compiled kernels apart by device index."""

        def __init__(self, capability):
            self.get_current_device = lambda: capability
            self.get_current_stream = lambda device: 0
            self.get_current_target = lambda: GPUTarget("cuda", capability, 32)

    run, found = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[kernel.hash] = self.__name__, kernel

    JITFunction.run = compile_only
    rows = []
    for capability in CAPABILITIES:
        triton.runtime.driver.set_active(Driver(capability))
        for H, dtype in HEADS:
            found.clear()
            launch_all(H, dtype)
            for name, kernel in found.values():
                cubin = Path(folder, "cubin")
                cubin.write_bytes(kernel.asm["cubin"])
                tool = Path(backend).parent / "bin" / "cuobjdump"
                usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
                used = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
                case = {"kernel": name, "capability": capability, "H": H, "dtype": str(dtype)}
                rows.append(case | used | {"shared": kernel.metadata.shared})
    return rows


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("triton.backends.nvidia")
    cache = tmp_path_factory.mktemp("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_for_every_target(compiled):
    for capability in CAPABILITIES:
        for H, dtype in HEADS:
            here = [
                r["kernel"] for r in compiled if (r["capability"], r["H"], r["dtype"]) == (capability, H, str(dtype))
            ]
            assert sorted(set(here)) == sorted(KERNELS)


def test_no_spills(compiled):
    assert not [(r["kernel"], r["capability"], r["H"]) for r in compiled if r["STACK"] or r["LOCAL"]]


def test_registers(compiled):
    """A program of four warps and at most 128 registers a thread leaves room for four on a multiprocessor."""
    assert not [(r["kernel"], r["capability"], r["H"], r["REG"]) for r in compiled if not 0 < r["REG"] <= 128]


def test_shared_memory(compiled):
    assert not [(r["kernel"], r["capability"], r["H"], r["shared"]) for r in compiled if r["shared"] > SHARED_LIMIT]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(compile_all(scratch)))
