"""Every Triton kernel, compiled ahead of time for GPUs that need not be there: registers, spills, shared memory.

Run as a program, this file calls the launchers on meta tensors, compiles what they would launch for every target instead of
launching it, and prints what the assembler used as JSON. Meta tensors have no values: a launcher that read one back to the
host would raise.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import tiny
import torch

from reflective.kernels import layout

CAPABILITIES = [80, 90, 100]
HEADS = [
    (1536, torch.float32, torch.float32, 3072, layout.RELU),
    (576, torch.float16, torch.float16, 1152, layout.RELU),
    (5120, torch.bfloat16, torch.bfloat16, 10240, layout.RELU),
    (5120, torch.bfloat16, torch.float8_e4m3fn, 10240, layout.RELU),
    (4096, torch.bfloat16, torch.bfloat16, 512, layout.GELU),
    (3 * 4096, torch.float16, torch.float16, 1024, layout.SILU),
    (33 * 4096, torch.float32, torch.float32, 2, layout.GELU_TANH),
    (72, torch.bfloat16, torch.bfloat16, 144, layout.RELU),  # one step of the small tile's loop, two of the large one's
]  # width, dtype of the rows, dtype of w1, units, activation
KERNELS = ["_step_mask", "_partials", "_scores", "_logits", "_tally_slots", "_walk", "_step"]
COPY = r"cp\.async\.c[ga]\.shared\.global [^;]*, 0x10,"
SHARED_LIMIT = 99 * 1024  # what one program may have on sm_86 and sm_89, the smallest of the supported family


def launch_all(H: int, dtype: torch.dtype, w1_dtype: torch.dtype, K: int, activation: int) -> None:
    from reflective.kernels.decode_step_triton import decode_step
    from reflective.kernels.logit_rows_triton import logit_rows
    from reflective.kernels.score_rows_triton import score_rows
    from reflective.kernels.step_mask_triton import step_mask
    from reflective.kernels.tally_slots_triton import tally_slots

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    N, C, R = 32, 512, 256
    automaton = empty(151936, dtype=torch.int32), empty(40, 9, dtype=torch.int32)
    rest = torch.promote_types(dtype, torch.float32) if w1_dtype != dtype else dtype
    head = empty(K, H, dtype=w1_dtype), empty(K, dtype=rest), empty(1, K, dtype=rest), empty(1, dtype=rest)
    log = empty(N, C, dtype=torch.int32), empty(N, C, dtype=torch.int8), empty(N, C, dtype=torch.float32)
    owner, n_slots = empty(R, layout.OWNER_FIELDS, dtype=torch.int32), empty(1, dtype=torch.int32)
    workspace = empty(layout.workspace_size(R + N, K), dtype=torch.float32)
    seq = empty(N, layout.SEQ_FIELDS, dtype=torch.int64)
    tally = empty(N, layout.N_REGIONS, layout.TALLY_FIELDS, dtype=torch.float64)
    state = seq, tally, empty(N, 2, H), *log, empty(R, H), owner, n_slots, workspace
    calls = [(1, True, True, None), (2, True, True, None)]
    # Some of the states, and packed: that adds loads, whatever the head.
    rows = empty(N, dtype=torch.int32) if dtype == torch.float16 else None
    if dtype == w1_dtype != torch.float32:  # compiling takes seconds; the others' large tile is that of _partials
        calls.append((1, False, False, rows))
    for q, at_predict, immediate, some in calls:
        for pitch in (q, 16, 17):  # of a slice of all ids so far
            ids, hidden = empty(N, pitch, dtype=torch.int64)[:, -q:], empty(N, q, H)
            decode_step(ids, hidden, *automaton, *head, *state, at_predict, immediate, some, None, 0, activation)
    if rows is not None:
        bounds = empty(N + 1, dtype=torch.int32)
        packed = empty(1, 500, dtype=torch.int64), empty(1, 500, H)
        decode_step(*packed, *automaton, *head, *state, True, False, rows, bounds, 0, activation)
    for M in (16, 64):
        score_rows(empty(M, H), *head, activation)
    logit_rows(empty(R, H), *head[:3], None, activation)
    tally_slots(empty(R, dtype=torch.float32), head[3], tally, log[2], owner, n_slots)
    bounds = (empty(N, dtype=torch.int64) for _ in range(3))
    step_mask(empty(N, 1000, dtype=torch.int64), *automaton, *bounds)


def shuffled(ptx: str) -> list[str]:
    """How the numbers that threads pass one another for the sum over units are computed: of results ``z`` of the tensor cores
    and other operands ``w``.
    """
    made, products = {}, set()
    for line in ptx.splitlines():
        if product := re.match(r"\s*(?:mma\.sync|wgmma\.mma_async|tcgen05\.ld)\S*\s*{([^}]*)}", line):
            products.update(re.findall(r"%r\d+", product[1]))
        elif step := re.match(r"\s*(add|sub|mul|fma|max|shfl|mov)\.(\S*[fb](?:32|64)\S*)\s+(.*);", line):
            values = re.findall(r"{[^}]*}|[^\s,]+", step[3])
            pair = "f32x2" in step[2] or step[2] == "b64"
            for i in range(1 + pair):
                value, *of = [re.findall(r"[^{}\s,]+", v)[i] if "{" in v else f"{v}.{i}" if pair else v for v in values]
                made.setdefault(value, (step[1], of))

    def text(value, above=()):
        if value in products or value not in made or value in above:
            return "z" if value in products else "0" if value == "0f00000000" else "w"
        op, operands = made[value]
        if op == "shfl":
            operands, op = operands[:1], op + operands[1]
        operands = [text(operand, (*above, value)) for operand in operands]
        if op == "mov":
            return operands[0]
        return f"{op}({', '.join(operands if op in ('sub', 'fma') else sorted(operands))})"

    return sorted({t for op, (value, *_) in made.values() if op == "shfl" and "z" in (t := text(value))})


def compile_all(folder: str, capability: int) -> list[dict]:
    """What the assembler says of every kernel for one target, which this process can then compile for alone."""
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
    triton.runtime.driver.set_active(Driver(capability))
    for head in HEADS:
        found.clear()
        launch_all(*head)
        for name, kernel in found.values():
            cubin = Path(folder, f"{capability}.cubin")
            cubin.write_bytes(kernel.asm["cubin"])
            tool = Path(backend).parent / "bin" / "cuobjdump"
            usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
            used = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
            ptx = kernel.asm["ptx"]
            products = [kind for kind in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if kind in ptx]
            case = {"kernel": name, "capability": capability, "head": str(head), "products": products}
            metadata = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            rows.append(case | used | metadata | {"copies": len(re.findall(COPY, ptx)), "shuffled": shuffled(ptx)})
    return rows


def main() -> None:
    """Prints ``compile_all`` of every target: in forks, at the same time, so that PyTorch and Triton are loaded once."""
    import triton.backends.compiler  # noqa: F401

    with tempfile.TemporaryDirectory() as scratch:
        children = []
        for capability in CAPABILITIES:
            if not (child := os.fork()):
                failed = 1
                try:
                    Path(scratch, f"{capability}.json").write_text(json.dumps(compile_all(scratch, capability)))
                    failed = 0
                except BaseException:  # noqa: BLE001
                    traceback.print_exc()
                finally:
                    os._exit(failed)
            children.append(child)
        ends = [os.waitpid(child, 0)[1] for child in children]
        if any(ends):
            sys.exit(f"ends of the targets' processes: {ends}")
        files = (Path(scratch, f"{capability}.json") for capability in CAPABILITIES)
        print(json.dumps([row for file in files for row in json.loads(file.read_text())]))


def compile_for_every_target(program: str, scratch: Path, config: pytest.Config) -> list[dict]:
    """What ``program``, this file or one that borrows from it, prints.

    A minute's work, so pytest's cache keeps the answer until a kernel, the program, Triton or PyTorch is another.
    """
    import triton

    from reflective import kernels

    sources = *sorted(Path(kernels.__file__).parent.glob("*.py")), Path(__file__), Path(program)
    text = b"".join(path.read_bytes() for path in sources) + f"{triton.__version__} {torch.__version__}".encode()
    state, name = hashlib.sha256(text).hexdigest(), f"reflective/{Path(program).stem}"
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    known = cache and cache.get(name, None)
    if known and known["state"] == state:
        return known["rows"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(scratch)}
    command = [sys.executable, program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=tiny.PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    if cache:
        cache.set(name, {"state": state, "rows": rows})
    return rows


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, pytestconfig):
    pytest.importorskip("triton.backends.nvidia")
    return compile_for_every_target(__file__, tmp_path_factory.mktemp("triton"), pytestconfig)


def test_every_kernel_for_every_target(compiled):
    for capability in CAPABILITIES:
        for head in HEADS:
            here = {r["kernel"] for r in compiled if (r["capability"], r["head"]) == (capability, str(head))}
            assert here == set(KERNELS)


def test_the_pitch_of_ids_compiles_nothing(compiled):
    steps = {str(head): 1 + (head[1] == head[2] != torch.float32) for head in HEADS}
    for capability in CAPABILITIES:
        here = [(r["kernel"], r["head"]) for r in compiled if r["capability"] == capability]
        assert {head: here.count(("_step", head)) for head in steps} == steps


def test_no_spills(compiled):
    assert not [r for r in compiled if r["STACK"] or r["LOCAL"]]


def test_registers(compiled):
    """Programs of four warps find room for three on a multiprocessor; larger tiles have eight warps, and one is enough."""
    assert not [r for r in compiled if not 0 < r["REG"] <= {4: 168, 8: 255}[r["warps"]]]


def test_one_kind_of_product(compiled):
    """A row has the same bits in every tile only if all tiles of a head use the same instruction."""
    for capability in CAPABILITIES:
        for head in HEADS:
            kinds = {tuple(r["products"]) for r in compiled if (r["capability"], r["head"]) == (capability, str(head))}
            kinds.discard(())
            wide = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
            assert kinds == (set() if head[1] == torch.float32 else {(wide,)} if head[3] > 4096 else {("mma.sync",)})


def test_one_order_of_adding(compiled):
    """Tiles of a head add up the same: also where the loop of one has a single step, before which the compiler may move what
    is added after it, and without fused products, of which it may choose another in each.
    """
    for capability in CAPABILITIES:
        for head in HEADS:
            here = [r for r in compiled if (r["capability"], r["head"]) == (capability, str(head)) and r["products"]]
            orders = {tuple(r["shuffled"]) for r in here}
            assert len(orders) == (head[1] != torch.float32)
            assert all(orders)
            if head[4] == layout.RELU:  # of others the activation may have fused products of its own
                assert not [order for order in orders if "fma" in "".join(order)]


def test_rows_stream_16_bytes_at_a_time(compiled):
    """Neither the choice of a row (``decode_step._feature``) nor a mask may hide from the compiler that rows are aligned."""
    narrow = str(HEADS[-1])  # a loop of one step is no stream
    streams = [r for r in compiled if r["kernel"] in ("_step", "_partials") and r["head"] != narrow]
    assert not [r for r in streams if r["copies"] < 8]


def test_shared_memory(compiled):
    assert not [r for r in compiled if r["shared"] > SHARED_LIMIT]


if __name__ == "__main__":
    main()
