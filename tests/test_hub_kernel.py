"""The ops as a kernel of the Hub: laid out, loaded as Hugging Face's ``kernels`` loads it, and built as its kernel-builder builds it.

What needs the package ``kernels`` is skipped where that is missing (``make hub`` brings it). All is loaded in processes of their own, away
from this checkout, whose folder kernels/ has the same name.
"""

import importlib.metadata
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = ROOT / "release" / "hub" / "layout.py"
pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")

# kernel: the module; the tree's own ops lie beside it in the same process.
COMPARE = """
import torch, reflective.scoring.ops as ours
name = kernel.__name__
packet = lambda op: op._qualified_op_name
assert packet(kernel.score_rows) == f"{name}::score_rows" and packet(ours.op.score_rows) == "reflective::score_rows"
assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{name}::score_rows", "CPU"), "the compiled kernel is not there"

torch.manual_seed(0)
for M, H, D in ((1, 8, 3), (7, 64, 48), (33, 200, 17)):
    rows, head = torch.randn(M, H), (torch.randn(D, H) / H**0.5, torch.randn(D), torch.randn(1, D), torch.randn(1))
    exact = kernel.definition.score_rows(rows.double(), *(t.double() for t in head))
    error = (kernel.score_rows(rows, *head) - exact).abs().max()
    allowed = 2 * (kernel.definition.score_rows(rows, *head) - exact).abs().max() + 1e-6
    assert error <= allowed, (error, allowed)
    assert torch.equal(kernel.score_rows(rows, *head), ours.op.score_rows(rows, *head))

L = kernel.layout
ids = torch.tensor([[0, 1, 0, 1, 1]])
tables = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([[0], [L.STEP]], dtype=torch.int32)
column = torch.zeros(1, dtype=torch.int64)
mask = kernel.step_mask(ids, *tables, column, column + 5, column)
assert torch.equal(mask, kernel.definition.step_mask(ids, *tables, column, column + 5, column)) and mask.any()
assert kernel.score_rows(rows.to("meta"), *(t.to("meta") for t in head)).shape == (33,)
assert torch.equal(torch.compile(lambda x: kernel.score_rows(x, *head) + 0, fullgraph=True, backend="eager")(rows), kernel.score_rows(rows, *head))
print("equal", name)
"""
LIKE_KERNELS = """
import importlib.util, json, sys
from pathlib import Path
variant = Path({variant!r})
name = json.loads((variant / "metadata.json").read_text())["id"] if (variant / "metadata.json").exists() else {name!r}
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""


def away(code: str, folder: Path) -> str:
    """What ``code`` prints in a process that has the tree's ``reflective`` and no other part of the checkout."""
    (folder / "paths").mkdir(exist_ok=True)
    link = folder / "paths" / "reflective"
    if not link.exists():  # with kernels/ within it, as it is installed
        shutil.copytree(ROOT / "reflective", link, ignore=shutil.ignore_patterns("__pycache__", "data"))
        shutil.copytree(ROOT / "kernels", link / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    paths = [str(folder / "paths"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in paths), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def with_kernels(code: str, folder: Path) -> str:
    if "kernels" not in {d.metadata["Name"] for d in importlib.metadata.distributions()}:
        pytest.skip("needs the package kernels: make hub")
    return away(code, folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out, with the variant for CPUs; the CUDA kernels take minutes of their own."""
    out = tmp_path_factory.mktemp("hub") / "out"
    command = [sys.executable, str(LAYOUT), str(out), "--cpu", "--temp", str(out.parent / "temp")]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return out


@pytest.fixture(scope="module")
def variant(hub: Path) -> Path:
    (made,) = (hub / "build").iterdir()
    return made


def test_the_variant_is_a_package_with_all_ops_under_a_name_of_its_own(variant: Path, tmp_path: Path) -> None:
    assert variant.name == f"torch-stable-abi211-cpu-{platform.machine()}-linux"
    told = away(LIKE_KERNELS.format(variant=str(variant), name="") + COMPARE, tmp_path)
    assert re.search(r"^equal _reflective_kernels_cpu_[0-9a-f]{7}(_dirty)?$", told, re.MULTILINE), told


def test_its_metadata(variant: Path) -> None:
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "reflective-kernels" and metadata["backend"] == {"type": "cpu"} and metadata["license"] == "Apache-2.0"
    assert set(metadata["digest"]["files"]) == {
        p.relative_to(variant).as_posix() for p in variant.rglob("*") if p.is_file() and p.name != "metadata.json"
    }


def test_its_python_imports_torch_and_itself_alone(variant: Path) -> None:
    for path in variant.rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        roots = {name.split(".")[0] for name in imported if not name.startswith(".")} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "triton"}, path


def test_kernels_loads_it(hub: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from kernels import get_local_kernel, get_loaded_kernels
from kernels._rust import Digest, DigestAlgorithm
kernel = get_local_kernel(Path({str(hub)!r}), backend="cpu")
loaded, = get_loaded_kernels()
(variant,) = (Path({str(hub)!r}) / "build").iterdir()
loaded.metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
"""
    assert "equal _reflective_kernels_cpu_" in with_kernels(code + COMPARE, tmp_path)


def test_kernels_reads_build_toml(hub: Path, tmp_path: Path) -> None:
    told = with_kernels(f"from kernels._rust import Build; print(Build.open({str(hub)!r}).general)", tmp_path)
    assert "Cpu" in told and "Cuda" in told


def test_build_toml_names_every_source_once(hub: Path) -> None:
    layout = runpy.run_path(str(LAYOUT))
    build = layout["tomllib"].loads((hub / "build.toml").read_text())
    listed = [*build["torch"]["src"], *build["kernel"]["reflective_cuda"]["src"]]
    assert sorted(listed) == sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir())
    assert all((hub / file).is_file() for file in listed)
    assert "csrc/bind_cuda.cpp" not in build["torch"]["src"] and not [f for f in build["torch"]["src"] if ".cu" in f]


def test_it_asks_for_the_architectures_and_the_torch_of_setup_py(hub: Path) -> None:
    layout, text = runpy.run_path(str(LAYOUT)), (ROOT / "setup.py").read_text()
    build = layout["tomllib"].loads((hub / "build.toml").read_text())
    default = re.search(r"default ``([\d.;+PTX]+)``", text)[1].split(";")
    assert [c.replace("9.0a", "9.0") for c in build["kernel"]["reflective_cuda"]["cuda-capabilities"]] == default
    major, minor = (int(n) for n in build["torch"]["stable-abi"]["cuda"].split("."))
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in text
    assert [layout["architecture"](c, ["sm_80", "sm_90a", "sm_100", "compute_100"]) for c in ("sm_80", "sm_90a", "sm_100")] == [
        "8.0", "9.0a", "10.0+PTX",
    ]  # fmt: skip


def test_what_kernel_builder_compiles(hub: Path, tmp_path: Path) -> None:
    """Its rules, followed by hand: sources and flags of build.toml, the extension named like the namespace, and ``_ops.py`` beside it."""
    name = "_reflective_kernels_cpu_0a1b2c3"
    build = runpy.run_path(str(LAYOUT))["tomllib"].loads((hub / "build.toml").read_text())["torch"]
    package = tmp_path / "package"
    shutil.copytree(hub / "torch-ext" / "reflective_kernels", package)
    (package / "_ops.py").write_text(f"import torch\nfrom . import {name}\nops = torch.ops.{name}\n")
    torch_home = Path(torch.__file__).parent
    includes = [torch_home / "include", sysconfig.get_path("include"), *(hub / folder for folder in build["include"])]
    command = [
        os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-fvisibility=hidden", f"-DTORCH_EXTENSION_NAME={name}",
        "-DCPU_KERNEL", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000", *build["cxx-flags"],
        *(f"-I{folder}" for folder in includes), *(f for f in build["src"] if f.endswith(".cpp")),
        f"-L{torch_home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(package / f"{name}.abi3.so"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=hub, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert f"equal {name}" in away(LIKE_KERNELS.format(variant=str(package), name=name) + COMPARE, tmp_path)


def test_card_and_folder(hub: Path, tmp_path: Path) -> None:
    card = (hub / "CARD.md").read_text()
    ops = set(re.findall(r"`(\w+)`", re.search(r"\| op \|.*?\n\n", card, re.DOTALL)[0]))
    exported = set(re.findall(r"^(\w+) = op\.", (hub / "torch-ext" / "reflective_kernels" / "__init__.py").read_text(), re.MULTILINE))
    assert ops == exported
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done = subprocess.run([sys.executable, str(LAYOUT), str(tmp_path / "mine")], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "holds something else" in done.stderr and (tmp_path / "mine" / "thesis.tex").exists()
