"""Every CUDA kernel as compiled for GPUs that need not be there: registers, spills, shared memory, and the machine code of
the loops that stream W1.

Read from the installed extension if it holds code for all of them, else compiled by nvcc, once for as long as the sources
stay as they are.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import reflective
from reflective.scoring import ops

ROOT = Path(__file__).parents[1]
CAPABILITIES = [80, 90, 100]
TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}
HEADS = {  # types of the weights and of the features, mangled
    "float32": "ff",
    "bfloat16": "NS_8Bfloat16ES4_",
    "float16": "NS_7Float16ES4_",
    "e4m3 on bfloat16": "NS_4E4m3ENS_8Bfloat16E",
    "e4m3 on float16": "NS_4E4m3ENS_7Float16E",
}


CURVED = 3  # of these types that have other activations than ReLU: all but float8


@dataclass(frozen=True)
class Kernel:
    """What one kernel may use, by the name that is written in its source."""

    instances: int
    registers: int  # at most
    streams: bool = False  # W1 through a ring of asynchronous copies


# 255 registers at 256 threads is one block a multiprocessor, which is how the streaming kernels are launched.
KERNELS = {
    "partial_sums_kernel": Kernel(instances=10, registers=255, streams=True),
    "step_kernel": Kernel(instances=10, registers=255, streams=True),
    "finish_kernel": Kernel(instances=20, registers=40),
    "detect_kernel": Kernel(instances=10, registers=64),
    "tally_slots_kernel": Kernel(instances=3, registers=48),
    "step_mask_kernel": Kernel(instances=1, registers=40),
}
RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself in each block from sm_90 on
RING_DEPTH = 16  # stages, of which all but the one in use are in flight; head.cuh: MAX_STAGES
COPIES_PER_TURN = 4  # 16-byte copies that a thread starts before it looks at its loop's end
# In a row: in the largest tile 5 groups of 16 units, 8 tiles of 8 rows, 2 products each; where the activation is not ReLU, in one of 2
# groups, and the compiler may cut its two slices apart.
PRODUCTS_PER_BLOCK, CURVED_PRODUCTS_PER_BLOCK = 64, 32


@dataclass
class Code:
    """One kernel's machine code for one architecture."""

    capability: int
    mangled: str
    usage: dict[str, int] = field(default_factory=dict)
    instructions: list[tuple[int, str]] = field(default_factory=list)  # (address, text)

    @property
    def name(self) -> str:
        return next((name for name in KERNELS if f"{len(name)}{name}" in self.mangled), self.mangled)

    @property
    def head(self) -> str:
        """The types of the head that a streaming kernel is for: its weights' and its features'."""
        return next(types for types in HEADS if re.search(f"(Device|Curved)HeadI{HEADS[types]}E", self.mangled))

    @property
    def is_curved(self) -> bool:
        """Whether the kernel is one of other activations than ReLU."""
        return "CurvedHead" in self.mangled

    @property
    def is_hopper_s(self) -> bool:
        """Whether the kernel is one of head_sm90.cuh."""
        return "Sm90Head" in self.mangled

    def __str__(self) -> str:
        return f"sm_{self.capability} {self.mangled}"

    def texts(self, span: range | None = None) -> list[str]:
        """The instructions without their predicates, in all or within some addresses."""
        return [re.sub(r"^@\S+\s+", "", text) for at, text in self.instructions if span is None or at in span]

    def branches(self) -> list[tuple[int, int]]:
        """(address, target) of every branch."""
        found = ((at, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)$", text)) for at, text in self.instructions)
        return [(at, int(target[1], 16)) for at, target in found if target]

    def loops(self) -> list[list[str]]:
        """The innermost loops: from a branch's target to the branch back to it, with no other loop within."""
        spans = [range(target, at + 1) for at, target in self.branches() if target < at]
        inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[-1] <= s[-1] for o in spans)]
        return [self.texts(span) for span in inner]

    def blocks(self) -> list[list[str]]:
        """The basic blocks: runs of instructions with no way in or out but their ends."""
        ends = {at for at, _ in self.branches()}
        starts = {target for _, target in self.branches()}
        blocks: list[list[str]] = [[]]
        for (at, _), text in zip(self.instructions, self.texts(), strict=True):
            if at in starts:
                blocks.append([])
            blocks[-1].append(text)
            if at in ends:
                blocks.append([])
        return blocks


def tool(name: str) -> str:
    """The CUDA toolkit's, or the one that Triton brings along."""
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="cuobjdump and nvdisasm come with Triton")
    return shutil.which(name) or str(Path(next(iter(nvidia.__path__)), "bin", name))


def binaries() -> list[Path]:
    """Files with code for all of ``CAPABILITIES``."""
    if set(TARGETS.values()) <= set(ops.cuda_architectures()):
        return list(Path(reflective.__file__).parent.glob("_C.*.so"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["setup.py", "--version"])
        patch.setenv("MAX_JOBS", str(os.cpu_count()))
        build = runpy.run_path("setup.py")
        nvcc = build["Nvcc"]()
        if nvcc.path is None:
            pytest.skip("no nvcc, and the extension holds no CUDA kernels")
        return [Path(made) for made in nvcc.compile(list(TARGETS.values()), Path("build").resolve() / "aot")]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> list[Code]:
    folder = tmp_path_factory.mktemp("cubins")
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    for binary in binaries():
        subprocess.run([cuobjdump, "-xelf", "all", binary], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    found = []
    for cubin in sorted(folder.glob("*.cubin")):
        capability = int(re.search(r"\.sm_(\d+)a?\.", cubin.name)[1])
        usage = subprocess.check_output([cuobjdump, "--dump-resource-usage", cubin], text=True)
        used = {
            mangled: {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", numbers)}
            for mangled, numbers in re.findall(r"Function (\S+):\n(.*)", usage)
        }
        listing = subprocess.check_output([nvdisasm, "-c", cubin], text=True)
        for section in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
            mangled = re.match(r"[^,\s]+", section)[0]
            found.append(Code(capability, mangled, used[mangled], instructions(section)))
    return found


@pytest.fixture(scope="module")
def streaming(codes: list[Code]) -> list[Code]:
    """Those that stream W1 by threads. On sm_90 the heads in bfloat16 and float16 have kernels of their own."""
    found = [code for code in codes if KERNELS[code.name].streams and not code.is_hopper_s]
    kinds = {(code.capability, code.name, code.head, code.is_curved) for code in found}
    assert len(kinds) == 2 * len(CAPABILITIES) * (len(HEADS) + CURVED)
    return [
        code for code in found if code.capability != 90 or code.is_curved or code.head not in ("bfloat16", "float16")
    ]


def instructions(section: str) -> list[tuple[int, str]]:
    """Address and text of each instruction; labels are replaced by their addresses."""
    lines = re.findall(r"^(?:(\.L\w+):|\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;)", section, flags=re.MULTILINE)
    labels, waiting = {}, []
    for label, at, _ in lines:
        waiting += [label] if label else []
        if at:
            labels |= dict.fromkeys(waiting, at)
            waiting = []
    return [(int(at, 16), re.sub(r"`\((\.L\w+)\)", lambda m: f"0x{labels[m[1]]}", text)) for _, at, text in lines if at]


def test_every_kernel_for_every_target(codes):
    found = Counter((code.capability, code.name) for code in codes)
    assert found == {(capability, name): k.instances for capability in CAPABILITIES for name, k in KERNELS.items()}


def test_registers(codes):
    assert not [(str(code), code.usage) for code in codes if not 0 < code.usage["REG"] <= KERNELS[code.name].registers]


def test_no_spills(codes):
    """Neither a stack nor a single load or store of local memory."""
    assert not [(str(code), code.usage) for code in codes if code.usage["STACK"] or code.usage["LOCAL"]]
    assert not [(str(code), text) for code in codes for text in code.texts() if re.match("LDL|STL", text)]


def test_static_shared_memory(codes):
    """All of it is asked for at the launch, from what the device says that it has."""
    assert not [(str(c), c.usage) for c in codes if c.usage["SHARED"] > (RESERVED if c.capability >= 90 else 0)]


def test_w1_is_streamed_in_pieces_of_16_bytes_many_at_once(streaming):
    for code in streaming:
        copies = [text for text in code.texts() if text.startswith("LDGSTS")]
        assert copies and all(re.match(r"LDGSTS\.E\.BYPASS\.\S*\b128\b", copy) for copy in copies), str(code)
        turns = [sum(text.startswith("LDGSTS") for text in loop) for loop in code.loops()]
        assert max(turns) >= COPIES_PER_TURN, f"{code}: {turns}"
        left = [int(n, 16) for n in re.findall(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", "\n".join(code.texts()))]
        assert max(left) == RING_DEPTH - 2, f"{code}: a wait leaves at most {max(left)} stages in flight"


def test_products_are_the_tensor_cores_and_fed_16_bytes_at_a_time(streaming):
    for code in streaming:
        products = [text for text in code.texts() if text.startswith("HMMA")]
        if code.head == "float32":  # the tensor cores would round the inputs to ten bits
            assert not products, str(code)
            continue
        kind = r"HMMA\.16816\.F32\.BF16 " if code.head.endswith("bfloat16") else r"HMMA\.16816\.F32 "
        assert products and all(re.match(kind, product) for product in products), str(code)
        multiplying = [block for block in code.blocks() if any(text.startswith("HMMA") for text in block)]
        in_a_row = max(sum(text.startswith("HMMA") for text in block) for block in multiplying)
        assert in_a_row >= (CURVED_PRODUCTS_PER_BLOCK if code.is_curved else PRODUCTS_PER_BLOCK), str(code)
        memory = {
            text.split()[0] for block in multiplying for text in block if re.match(r"(LD|ST|ATOM|RED)(?!C)", text)
        }
        assert memory in ({"LDS.128"}, {"LDSM.16.M88.4"}), f"{code}: {memory}"


def test_hopper_s_own_kernels_use_its_copy_engine_and_warpgroup_products(codes):
    """Products of 64 rows by all of a tile's units, at all five sizes; boxes, also to the whole cluster."""
    own = [code for code in codes if code.is_hopper_s and KERNELS[code.name].streams]
    for code in own:
        texts = code.texts()
        if code.capability != 90:
            assert not [text for text in texts if text.startswith(("HGMMA", "UTMALDG"))], str(code)
            continue
        kind = ".BF16" if "Bfloat16" in code.mangled else ""
        for units in (16, 32, 48, 64, 80):
            assert any(re.match(rf"HGMMA\.64x{units}x16\.F32{kind}\b", text) for text in texts), f"{code}: {units}"
        copies = {re.sub(r"\s.*", "", text) for text in texts if text.startswith("UTMALDG")}
        assert {"UTMALDG.2D", "UTMALDG.3D", "UTMALDG.3D.MULTICAST"} <= copies, f"{code}: {copies}"
        assert not [text for text in texts if text.startswith(("HMMA", "LDGSTS"))], str(code)
        assert code.usage["REG"] <= 224, str(code)  # 288 threads
    assert len(own) == 4 * len(CAPABILITIES)


def test_the_extension_holds_what_it_says():
    if not ops.cuda_architectures():
        pytest.skip("the extension was built without CUDA")
    (extension,) = Path(reflective.__file__).parent.glob("_C.*.so")
    held = subprocess.check_output([tool("cuobjdump"), "-lelf", "-lptx", extension], text=True)
    kinds = {"cubin": "sm", "ptx": "compute"}
    assert {f"{kinds[kind]}_{number}" for number, kind in re.findall(r"\.sm_(\w+)\.(cubin|ptx)", held)} == set(
        ops.cuda_architectures()
    )
