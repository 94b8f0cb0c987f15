"""Ways to install: what docs/install.md says of them, the Dockerfile, the wheels' settings, and the workflows that test and publish."""

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
OLDEST_TORCH = re.search(r"torch>=([\d.]+)", " ".join(PROJECT["dependencies"]))[1]
RELEASE, CI = (
    yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")) for name in ("release.yml", "ci.yml")
)
CUDA_TOOLKIT = "cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]==13.0.*"


def rows(after: str) -> list[list[str]]:
    """The cells of the first table behind ``after`` on the page."""
    table = re.search(r"(?:^\|.*\n)+", PAGE[PAGE.index(after) :], re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def names(requirements: list[str]) -> list[str]:
    return [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]


# -- docs/install.md -----------------------------------------------------------------------------------------------------


def test_the_table_of_extras_is_that_of_pyproject() -> None:
    said = {extra.strip("`"): packages.split(", ") for extra, _, packages in rows("## Extras")}
    assert said == {"none": names(PROJECT["dependencies"])} | {
        extra: names(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()
    }
    assert all(what for _, what, _ in rows("## Extras"))


def test_every_variable_is_on_the_page() -> None:
    read = set()
    sources = [ROOT / "setup.py", *(ROOT / "csrc").iterdir(), *(ROOT / "reflective").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r"""(?:environ(?:\.get)?[\[(]|getenv\(|envvar=)\s*["'](\w+)["']""", text))
        read |= {f for f in re.findall(r'"((?:REFLECTIVE|FORCE)_\w+)"', text) if path.name == "setup.py"}
    others = {"PATH", "TERM", "RANK", "WORLD_SIZE", "XDG_CACHE_HOME", "VLLM_ENABLE_V1_MULTIPROCESSING", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"}
    said = {name for table in ("Variables that the build", "And those that are read") for row in rows(table) for name in re.findall(r"[A-Z_0-9]{4,}|CXX", row[0])}
    assert read - others <= said
    assert said <= read | {"CXX", "NVCC_CCBIN", "REFLECTIVE_NAMESPACE"}


def test_the_tables_of_what_was_tested_are_those_of_the_results() -> None:
    compat = runpy.run_path(str(ROOT / "tests" / "compat.py"))
    assert compat["BEGIN"] + compat["block"]() + compat["END"] in PAGE, "run: python tests/compat.py --write"


def test_commands_and_files_exist() -> None:
    targets = set(re.findall(r"(?m)^(\w+):", MAKEFILE))
    assert set(re.findall(r"\bmake (\w+)\b", PAGE)) <= targets
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", PAGE):
        assert (ROOT / "docs" / path).exists(), path


# -- Docker --------------------------------------------------------------------------------------------------------------


def test_the_images_take_what_the_makefile_pins() -> None:
    assert re.search(r"^ARG TORCH=(.+)$", DOCKERFILE, re.MULTILINE)[1] == re.search(r"^TORCH := (.+)$", MAKEFILE, re.MULTILINE)[1]
    assert re.search(r"^ARG WEIGHTS=(.+)$", DOCKERFILE, re.MULTILINE)[1] == re.search(r"^WEIGHTS := (.+)$", MAKEFILE, re.MULTILINE)[1]
    assert f'"{CUDA_TOOLKIT}"' in DOCKERFILE
    default = re.search(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE)[1].split(",")
    assert set(default) <= set(PROJECT["optional-dependencies"]) and "serve" in default


def test_the_page_has_every_build_argument() -> None:
    assert {row[0].strip("`") for row in rows("| build argument")} == set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def test_the_last_stage_is_small_and_no_root() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.findall(r"^COPY (.+)$", last, re.MULTILINE) == ["--from=build /opt/venv /opt/venv"]
    assert re.search(r"^USER [1-9]\d*$", last, re.MULTILINE) and last.index("\nUSER") > last.rindex("\nRUN")
    check = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", last, re.MULTILINE)[1]
    assert "8000/health'" in check and '"--port", "8000"' in last and '["reflective"]' in last
    assert DOCKERFILE.count("apt-get install") == DOCKERFILE.count("rm -rf /var/lib/apt/lists/*") == DOCKERFILE.count("--no-install-recommends")
    assert "PIP_NO_CACHE_DIR=1" in DOCKERFILE[: DOCKERFILE.index("pip install")]


def test_the_image_is_built_from_all_that_a_build_needs() -> None:
    let = {line[1:].split("/")[0] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    needed = {folder.split("/")[0] for folder in PYPROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert let == needed | {"pyproject.toml", "setup.py", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}


# -- wheels --------------------------------------------------------------------------------------------------------------


def test_wheels_are_built_against_the_oldest_of_all_and_tested_as_at_home() -> None:
    settings = PYPROJECT["tool"]["cibuildwheel"]
    oldest = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    assert settings["build"] == f"cp{oldest}-manylinux_*" and settings["manylinux-x86_64-image"] == settings["manylinux-aarch64-image"] == "manylinux_2_28"
    assert f"torch=={OLDEST_TORCH}.0 " in settings["before-build"] and settings["before-test"].endswith(f"torch=={OLDEST_TORCH}.0")
    assert f'"{CUDA_TOOLKIT}"' in settings["before-build"] and settings["environment"]["FORCE_CUDA"] == "1"
    for command in (settings["repair-wheel-command"], settings["test-command"]):
        script = re.search(r"\{project\}/(\S+)", command)[1]
        assert (ROOT / script).is_file() and script in MAKEFILE
    target, limited = re.search(r"TORCH_TARGET_VERSION=0x(\w{4})", (ROOT / "setup.py").read_text())[1], int(OLDEST_TORCH.split(".")[1])
    assert target == f"02{limited:02x}"
    assert f"torch=={OLDEST_TORCH}.0" in re.search(r"^TORCHES \?= (.+)$", MAKEFILE, re.MULTILINE)[1]


def test_a_wheel_without_the_extension_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "reflective_kernels-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("reflective/__init__.py", "")
    done = subprocess.run([sys.executable, ROOT / "release" / "wheel.py", wheel, "--out", tmp_path], check=False, capture_output=True, text=True)
    assert done.returncode != 0 and "has no extension" in done.stderr and "REFLECTIVE_FORCE_BUILD=1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.whl", "--pair", "python9.99", "torch"], "there is no 'python9.99' on PATH"),
        (["x.whl"], "either a wheel and at least one --pair"),
        (["x.whl", "--here"], "either a wheel and at least one --pair"),
        (["--pair", "python3", "torch"], "either a wheel and at least one --pair"),
    ],
)
def test_what_cannot_be_tried_is_said_first(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "release" / "bare.py", *arguments, "--folder", tmp_path / "bare"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "bare").exists()


def test_results_of_the_same_pair_replace_each_other(tmp_path: Path) -> None:
    write = runpy.run_path(str(ROOT / "release" / "bare.py"))["write"]
    line = {"machine": "x86_64", "python": "3.10.1", "torch": "2.11.0+cpu", "passed": "1"}
    write(tmp_path / "w.csv", [line | {"python": "3.9.2"}, line])
    write(tmp_path / "w.csv", [line | {"python": "3.10.7", "passed": "2"}])
    assert (tmp_path / "w.csv").read_text().splitlines()[1:] == ["x86_64,3.9.2,2.11.0+cpu,1", "x86_64,3.10.7,2.11.0+cpu,2"]


def test_the_first_example_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("reflective._C")
    command = [sys.executable, ROOT / "release" / "first_example.py", ROOT / "README.md"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^scored [1-9]\d* steps of 8 candidates by (cpu|cuda); a second pass agrees", done.stdout, re.MULTILINE)


# -- what is published ---------------------------------------------------------------------------------------------------


def test_metadata() -> None:
    versions = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", c)}
    assert PROJECT["requires-python"].removeprefix(">=") == min(versions, key=lambda v: int(v.split(".")[1]))
    tested = {str(job["python"]) for job in [*RELEASE["jobs"]["test"]["strategy"]["matrix"]["include"], *CI["jobs"]["test"]["strategy"]["matrix"]["include"]]}
    assert tested <= versions
    assert {"name", "version", "description", "readme", "license", "keywords", "classifiers", "authors", "urls"} <= set(PROJECT)
    assert not [c for c in PROJECT["classifiers"] if c.startswith("License")]  # an SPDX expression says it
    assert PROJECT["version"] == re.search(r'__version__ = "(.+)"', (ROOT / "reflective" / "__init__.py").read_text())[1]


def steps(job: str) -> list[dict[str, object]]:
    return RELEASE["jobs"][job]["steps"]


def using(job: str, action: str) -> list[dict[str, object]]:
    return [step.get("with", {}) for step in steps(job) if str(step.get("uses", "")).startswith(f"{action}@")]


def test_only_publishing_may_do_anything_but_read() -> None:
    for workflow in (RELEASE, CI):
        assert workflow["permissions"] == {}
        for name, job in workflow["jobs"].items():
            allowed = {"id-token": "write"} if name == "publish" else {"contents": "read"}
            assert job["permissions"] == allowed, name
            assert job["timeout-minutes"] <= 120
    text = (ROOT / ".github/workflows/release.yml").read_text() + (ROOT / ".github/workflows/ci.yml").read_text()
    assert "secrets." not in text and "password" not in text and "pull_request_target" not in text


def test_actions_are_named_by_commit_and_release() -> None:
    for name in ("release.yml", "ci.yml"):
        for line in (ROOT / ".github" / "workflows" / name).read_text().splitlines():
            if "uses:" in line:
                assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line
    for workflow in (RELEASE, CI):
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                if "checkout@" in step.get("uses", ""):
                    assert step["with"]["persist-credentials"] is False


def test_what_is_published_is_what_was_tested() -> None:
    jobs = RELEASE["jobs"]
    publish = jobs["publish"]
    assert set(publish["needs"]) == {"sdist", "wheels", "test"} and publish["environment"] == "pypi"
    assert "refs/tags/v" in publish["if"] and "push" in publish["if"]
    # Nothing is built or fetched there but the artifacts of this run, and no command is run.
    assert [str(step["uses"]).split("@")[0] for step in publish["steps"]] == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]
    (given,) = using("publish", "actions/download-artifact")
    (published,) = using("publish", "pypa/gh-action-pypi-publish")
    assert given["path"] == published["packages-dir"] and given["merge-multiple"] and published["attestations"] is True

    uploaded = {job: using(job, "actions/upload-artifact") for job in jobs}
    assert {job for job, found in uploaded.items() if found} == {"sdist", "wheels"}, "the jobs that make a file"
    assert uploaded["sdist"][0]["name"] == "sdist" and uploaded["wheels"][0]["name"] == "wheel-${{ matrix.arch }}"
    assert given["pattern"] == "{sdist,wheel-*}"
    # Wheels are made of the sdist, and the tests take the wheels' artifacts.
    assert using("wheels", "actions/download-artifact")[0]["name"] == "sdist"
    assert any("cibuildwheel" in step.get("run", "") and "sdist/*.tar.gz" in step["run"] for step in steps("wheels"))
    assert using("test", "actions/download-artifact")[0] == {"name": "wheel-${{ matrix.arch }}", "path": "dist"}
    assert steps("test")[-1]["run"].startswith("python release/bare.py dist/*.whl --pair ")
    assert jobs["test"]["needs"] == "wheels" and jobs["wheels"]["needs"] == "sdist"

    made = {job["arch"] for job in jobs["wheels"]["strategy"]["matrix"]["include"]}
    tried = jobs["test"]["strategy"]["matrix"]["include"]
    assert made == {"x86_64", "aarch64"}
    for arch in made:
        pairs = [(job["python"], job["torch"]) for job in tried if job["arch"] == arch]
        assert len({python for python, _ in pairs}) >= 2 and {torch for _, torch in pairs} == {f"torch=={OLDEST_TORCH}.0", "torch"}
        assert all(("arm" in job["os"]) == (arch == "aarch64") for job in tried if job["arch"] == arch), "no emulation"


def test_ci_runs_the_two_commands() -> None:
    assert CI["permissions"] == {} and CI["jobs"]["test"]["steps"][-1]["run"] == "make test"
    assert "make lint" in [step.get("run") for step in CI["jobs"]["lint"]["steps"]]
    commands = [step["run"] for job in CI["jobs"].values() for step in job["steps"] if "run" in step]
    assert {command.split()[1] for command in commands if command.startswith("make")} <= set(re.findall(r"(?m)^(\w+):", MAKEFILE))


def test_workflows_have_no_known_weakness() -> None:
    zizmor = shutil.which("zizmor", path=str(Path(sys.executable).parent))
    if zizmor is None:
        pytest.skip("needs zizmor")
    done = subprocess.run([zizmor, "--offline", "--no-progress", "--persona=pedantic", ROOT / ".github"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
