"""The GPU emulator under the kernels' tests, on small kernels of its own: what is right runs, what is wrong shows."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent / "emulation"
SEEDS = range(16)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Emulated:
    """A library of emulated kernels; each of its functions returns None or why the launch failed."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulate.argtypes = ctypes.c_uint64, ctypes.c_uint, ctypes.c_int, ctypes.c_int
        self.seed(0)

    def seed(self, seed: int, resident_blocks: int = 64) -> None:
        self.library.emulate(seed, resident_blocks, 4, 227 << 10)

    def __call__(self, name: str, *arguments: object) -> str | None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(*(ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments))
        return error and error.decode()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    library = tmp_path_factory.mktemp("emulation") / "kernels.so"
    compiler = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    subprocess.run([*compiler, "-I", FOLDER, "-x", "c++", FOLDER / "kernels.cu", "-o", library], check=True)
    return Emulated(library)


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 16 bytes."""
    memory = np.zeros(x.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    memory[start : start + x.nbytes] = np.ascontiguousarray(x).view(np.uint8).reshape(-1)
    return memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)


def test_collectives(emulated):
    t = np.arange(64)
    lane, warp = t % 32, t // 32 * 32
    ballots = [sum(1 << i for i in range(32) if (w + i) % 3 == 0) for w in (0, 32)]
    expected = [
        warp + 5,
        t ^ 9,
        np.where(lane < 3, t, t - 3),
        t // 8 * 8 + 1,
        np.repeat(np.array(ballots, np.uint32).view(np.int32), 32),
        np.full(64, 13),
        np.full(64, 1),
        np.full(64, 0),
        [int(i).bit_count() for i in t],
        np.where(lane < 16, 0xAAAA, np.array(0xAAAA0000, np.uint32).view(np.int32)),
        t ^ 1,
        np.where(lane < 1, t, t - 1),
    ]
    for seed in SEEDS:
        emulated.seed(seed)
        out, total = np.zeros((12, 64), np.int32), np.zeros(1, np.uint32)
        assert emulated("collectives", out, total) is None
        np.testing.assert_array_equal(out, expected)
        assert total == 64


@pytest.mark.parametrize("resident", [64, 3])
def test_the_last_block_to_arrive_sums_what_all_wrote(emulated, resident):
    x = np.random.default_rng(0).standard_normal(10_000, np.float32)
    results = set()
    for seed in SEEDS:
        emulated.seed(seed, resident)
        partial, counter, out = np.full(8, np.nan), np.zeros(1, np.uint32), np.zeros(1)
        assert emulated("grid_sum", x, x.size, partial, counter, out, 8) is None
        assert counter == 0
        results.add(out.item())
    assert len(results) == 1, "the order of the sum does not depend on the order of the blocks"
    assert results.pop() == pytest.approx(x.sum(dtype=np.float64), rel=1e-12)


def test_an_asynchronous_copy_lands_when_it_is_waited_for(emulated):
    stages = 7
    x = aligned(np.random.default_rng(1).standard_normal((2, stages * 256), np.float32))

    def wrong(which: int) -> list[bool]:
        results = []
        for seed in SEEDS:
            emulated.seed(seed)
            out = np.zeros(2)
            assert emulated("ring", x, stages, out, which) is None
            results.append(not np.allclose(out, x.sum(1, dtype=np.float64), rtol=1e-12))
        return results

    assert not any(wrong(0))
    assert all(wrong(1)), "one group too few is waited for"
    assert all(wrong(2)), "a copy starts into what other threads are still to read"
    assert any(wrong(3)), "no barrier between a thread's copies and another's reads"


def test_a_missing_barrier_shows(emulated):
    def neighbours(guarded: bool) -> list[bytes]:
        results = []
        for seed in SEEDS:
            emulated.seed(seed)
            out = np.zeros(128, np.float32)
            assert emulated("neighbours", out, guarded) is None
            results.append(out.tobytes())
        return results

    right = np.roll(np.arange(128, dtype=np.float32), -32).tobytes()
    assert set(neighbours(True)) == {right}
    unguarded = neighbours(False)
    assert right not in unguarded
    assert len(set(unguarded)) > 2, "another seed is another order"
    assert unguarded == neighbours(False), "the same seed is the same order"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_is_a_matrix_product(emulated, dtype):
    torch.manual_seed(0)
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    expected = (d.double() + a.double() @ b.double()).float()
    bits = [aligned(x.contiguous().view(torch.uint16).numpy()) for x in (a, b.T)]
    out = d.numpy().copy()
    assert emulated("mma", *bits, out, dtype == torch.bfloat16) is None
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_read_exactly(emulated, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    out = np.zeros(256, np.float32)
    assert emulated("e4m3", codes.numpy(), out, dtype == torch.bfloat16) is None
    expected = codes.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(out, expected)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(out[finite]), np.signbit(expected[finite]))

    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    out = np.zeros(1 << 16, np.float32)
    assert emulated("floats", bits.numpy(), out, dtype == torch.bfloat16) is None
    np.testing.assert_array_equal(out, bits.view(dtype).float().numpy())


UNDEFINED = [
    "the warp diverged: lane",
    "is stuck: 54 threads at __syncthreads, 10 threads at __syncwarp, 0 ended",
    "while other threads of the block wait at __syncthreads",
    "__shfl_sync by a lane that its own mask does not name",
    "a shuffle from lane 9, which takes no part",
    "cp.async to shared memory that is not aligned to 16 bytes",
    "cp.async to byte 1024 of 1024 of shared memory",
    "cp.async from global memory that is not aligned to 16 bytes",
    "wrote past its shared memory, at byte 1024 of 1024",
    "mma by a warp of which threads are missing",
]


@pytest.mark.parametrize("which", range(len(UNDEFINED)))
def test_what_hardware_leaves_undefined_is_an_error(emulated, which):
    source = aligned(np.zeros(64, np.float32))
    for seed in SEEDS:
        emulated.seed(seed)
        error = emulated("undefined", which, source)
        assert error is not None
        assert error.startswith("block (")
        assert UNDEFINED[which] in error
    assert emulated("undefined", -1, source) is None, "one failed launch leaves nothing behind"


def test_threads_that_have_ended_count_as_arrived(emulated):
    for seed in SEEDS:
        emulated.seed(seed)
        out = np.zeros(64, np.int32)
        assert emulated("early_exit", out) is None
        left = np.arange(64) % 3 != 0
        ballot = np.array(sum(1 << i for i in range(32) if i % 3), np.uint32).view(np.int32)
        np.testing.assert_array_equal(out[:32], np.where(left[:32], ballot, 0))
        np.testing.assert_array_equal(out[32:], np.where(left[32:], left.sum(), 0))


def test_shared_memory_is_asked_for_as_on_a_device(emulated):
    assert emulated("shared_bytes", 48 << 10, False) is None
    assert emulated("shared_bytes", 64 << 10, False) == "invalid argument"
    assert emulated("shared_bytes", 64 << 10, True) is None
    assert emulated("shared_bytes", 228 << 10, True) == "refused"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_nvcc_compiles_the_same_kernels(architecture, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    flags = ["-cubin", f"-arch={architecture}", "-std=c++17", "-Werror", "all-warnings"]
    subprocess.run(["nvcc", *flags, FOLDER / "kernels.cu", "-o", cubin], check=True)
    kernels = cubin.read_bytes()
    for name in (b"grid_sum", b"collectives", b"ring", b"mma", b"e4m3", b"to_float"):
        assert name + b"_kernel" in kernels
