"""``reflective doctor``: what is right is called right, and what is wrong is found, named, and survived."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from like_vllm import LikeVLLM
from test_cli import no_bars, run  # noqa: F401 (a fixture)

import reflective as rf
from reflective import doctor
from reflective.doctor import apart, checks, facts, known, report
from reflective.doctor.known import Known
from reflective.engines.vllm.engine import VLLMEngine
from reflective.scoring import backend as chosen
from reflective.scoring import ops

ROOT = Path(__file__).parents[1]
HERE = [name for name, info in rf.backends().items() if info.available]
WITHOUT_INTERPRETER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # 20 seconds less a run; the page's block that asks for it has it
GROUPS = ["import torch", "import transformers", "import reflective", "cuda", "triton", "cpu", "torch", "hf", "vllm", "default model"]


# -- what is recorded ------------------------------------------------------------------------------------------------------


def test_the_record_is_what_float64_says():
    """Computed anew here, by another way than the package's: every state of the whole text, and the oracle of the tests."""
    said = Known.read()
    net, head = known.model(torch.float64), known.head(torch.float64)
    with torch.no_grad():
        outputs = net(torch.tensor([said.ids]), output_hidden_states=True)
    assert said.ids[: len(known.PROMPT)] == list(known.PROMPT) and len(said.ids) == len(known.PROMPT) + known.LENGTH
    decoded = outputs.logits[0, len(known.PROMPT) - 1 : -1]
    assert decoded.argmax(-1).tolist() == said.ids[len(known.PROMPT) :], "greedy"
    best = decoded.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) == pytest.approx(said.margin) and said.margin > 50 * said.tolerance
    steps = known.steps().resized(known.VOCAB)
    assert steps.mask(torch.tensor([said.ids]), None, [len(known.PROMPT)])[0].nonzero().flatten().tolist() == said.positions
    assert len(said.positions) >= 8 and known.PROMPT[2] in known.STEP_IDS, "a step of the prompt, which does not count"
    features = outputs.hidden_states[-2][0, [t - 1 for t in said.positions]]
    truth = F.logsigmoid(head(features).squeeze(-1))
    torch.testing.assert_close(torch.tensor(said.log_scores, dtype=torch.float64), truth, rtol=1e-9, atol=1e-9)
    assert said.score == pytest.approx(tiny.geometric_mean(truth), rel=1e-9)
    rows = F.logsigmoid(head(known.rows(torch.float64)).squeeze(-1))
    torch.testing.assert_close(torch.tensor(said.rows, dtype=torch.float64), rows, rtol=1e-9, atol=1e-9)


def test_the_tolerance_comes_from_the_model(monkeypatch):
    """It is what weights that are off by rounding change; TF32 and bfloat16 are beyond it, float32 is within."""
    said = Known.read()
    net, head = known.model(torch.float64).requires_grad_(False), known.head(torch.float64)
    assert known.conditioned(net, head, said.ids, said.positions, 8) == pytest.approx(said.condition, rel=0.8)
    truth = torch.tensor(said.log_scores, dtype=torch.float64)
    for dtype, within in ((torch.float32, True), (torch.bfloat16, False)):
        found = known.exact(known.model(dtype), known.head(dtype), said.ids, said.positions).double()
        assert bool((found - truth).abs().max() <= said.tolerance) is within

    def tf32(t):
        """Rounded to 10 bits, as tensor cores take factors."""
        return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    whole = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: whole(tf32(x), tf32(w), b))
    found = known.exact(known.model(), known.head(), said.ids, said.positions).double()
    assert float((found - truth).abs().max()) > 10 * said.tolerance


def test_the_default_model_is_as_recorded(default_model):
    said = Known.read()
    ids = default_model.encode(default_model.format(known.QUESTION))[0].tolist()
    assert said.default_ids[: said.default_prompt] == ids
    assert default_model.tokenizer.decode(said.default_ids[said.default_prompt :]) == known.SAYS
    with torch.no_grad():
        found = known.exact(default_model.model, default_model.head, said.default_ids, said.default_positions)
    truth = torch.tensor(said.default_log_scores)
    assert float((found - truth).abs().max()) <= said.default_tolerance < 0.01


def test_weights_are_made_by_arithmetic():
    """So that no generator has a say: the first of them, by hand."""
    source = known.fractions(20, 12)
    x = (1664525 * 20 + 1013904223) % 2**32
    assert next(source) == (x >> 20) / 2048 - 1
    head = known.head(torch.bfloat16)
    assert torch.equal(head[0].weight.double() if hasattr(head, "__getitem__") else next(head.parameters()).double(), next(known.head(torch.float64).parameters()))


# -- what is right ---------------------------------------------------------------------------------------------------------


def results(steps):
    return [check for _, check, _, _ in checks.carried_out(steps, set()) if check]


@pytest.mark.parametrize("name", [name for name in HERE if name != "triton" or torch.cuda.is_available()])  # interpreted it is the page's block that asks for it
def test_backends_agree(name):
    found = results([step for step in checks.plan() if step.group == name])
    assert [check.status for check in found] == ["ok"] * 3, found
    for check in found:
        assert 0 < check.measured <= check.allowed and f"{check.measured:.1e}" in check.detail and not check.advice
    tells_of_bits(name, " ".join(check.detail for check in found))


def tells_of_bits(name, details):
    assert "the same bits again" in details
    assert ("batches of 1, 17 and 64" in details and "immediate and deferred" in details) is (name != "torch")


@pytest.mark.parametrize("name", ["hf: generate", "hf: engine, batch", "hf: engine, seats"])
def test_the_engine_for_transformers_agrees(name):
    (check,) = results([step for step in checks.plan() if step.name == name])
    assert check.status == "ok" and f"{len(Known.read().positions)} steps" in check.detail and "56 tokens" in check.detail, check


def test_the_engine_for_vllm_agrees_on_what_is_like_it(tmp_path):
    """And on the checkpoint that vLLM would be started on."""
    checks.checkpoint(tmp_path)
    model = rf.ReflectiveModel.from_pretrained(tmp_path)
    assert model.steps.mask(torch.tensor([Known.read().ids]), None, [len(known.PROMPT)])[0].nonzero().flatten().tolist() == Known.read().positions
    made = VLLMEngine(LikeVLLM(model).core(), model.steps, at="predict", ends=[], batch_rows=4)
    assert checks.driven(made).check("vllm", "").status == "ok"


def test_all_of_it_as_json(default_model, monkeypatch):
    monkeypatch.setenv("REFLECTIVE_API_KEY", "not to be told")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = run("doctor", "--json")
    said = json.loads(done.stdout)
    assert said["ok"] and said["facts"]["versions"]["transformers"] and said["facts"]["machine"]["cpu"]
    assert said["facts"]["environment"]["REFLECTIVE_API_KEY"] == "set" and "not to be told" not in done.stdout
    statuses = {check["name"]: check["status"] for check in said["checks"]}
    assert statuses["default model"] == "ok"
    assert (statuses["vllm: engine"] == "not here") is (importlib.util.find_spec("vllm") is None)


# -- what is wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("wrong", ["values", "again", "alone"])
def test_a_wrong_kernel_is_found(name, wrong, monkeypatch):
    """Values that are off by 2e-5; bits that differ from run to run, or in batches, by as little as can be."""
    made, calls = chosen._backend, []

    def broken(which):
        right = made(which)

        def score_rows(rows, *rest):
            scores = right.score_rows(rows, *rest)
            calls.append(rows)
            if wrong == "values":
                return scores - 2e-5 * (1 + (len(rows) > 1))
            if wrong == "again" and len(calls) % 2 or wrong == "alone" and len(rows) == 1:
                return torch.nextafter(scores, torch.zeros_like(scores))
            return scores

        return dataclasses.replace(right, score_rows=score_rows) if which == name else right

    monkeypatch.setattr(chosen, "_backend", broken)
    check = results([step for step in checks.plan() if step.name == f"{name}: head alone"])[0]
    if name == "torch" and wrong == "alone":
        assert check.status == "ok", "which leaves that to BLAS"
        return
    assert check.status == "differs" and check.advice
    if wrong == "values":
        assert check.measured > check.allowed and re.search(r"off by [24]\.\de-05, rounding allows", check.detail)
    else:
        assert "the bits differ" in check.detail


def test_a_stream_that_misses_a_step_is_found(monkeypatch):
    said = Known.read()
    fewer = [i for i in known.STEP_IDS if i != said.ids[said.positions[3]]]
    monkeypatch.setattr(known, "steps", lambda: rf.StepTokens(step_ids=fewer, think_start_id=known.THINK, think_end_id=known.END_THINK))
    found = results([step for step in checks.plan() if step.name in ("torch: stream", "torch: finished text")])
    assert [check.status for check in found] == ["differs"] * 2 and "expected at" in found[0].detail


def test_schedules_that_differ_by_a_bit_are_found(monkeypatch):
    if "cpu" not in HERE:
        pytest.skip("needs the compiled backend")
    whole = checks._streamed

    def streamed(*args):
        now, later = whole(*args)
        now.step_scores[0][3] = torch.nextafter(now.step_scores[0][3], torch.tensor(1.0))
        return now, later

    monkeypatch.setattr(checks, "_streamed", streamed)
    (check,) = results([step for step in checks.plan() if step.name == "cpu: stream"])
    assert check.status == "differs" and "immediate and deferred: the bits differ" in check.detail


def test_an_engine_that_takes_another_token_is_found(monkeypatch):
    right = Known.read()
    other = dataclasses.replace(right, ids=[*right.ids[:20], right.ids[20] ^ 1, *right.ids[21:]])
    monkeypatch.setattr(checks.Known, "read", lambda: other)
    (check,) = results([step for step in checks.plan() if step.name == "hf: engine, batch"])
    assert check.status == "differs" and f"token 13 is {right.ids[20]}, expected {right.ids[20] ^ 1}" in check.detail


def package(folder, **edits):
    """A copy of the package, as it would be installed, with edits: ``kernels__logit_rows=(old, new)``."""
    keep = shutil.ignore_patterns("__pycache__", "*.cu", "*.cpp")
    shutil.copytree(ROOT / "reflective", folder / "reflective", ignore=keep)
    shutil.copytree(ROOT / "kernels", folder / "reflective" / "kernels", ignore=keep)
    for name, (old, new) in edits.items():
        file = folder / "reflective" / f"{name.replace('__', '/')}.py"
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def apart_from(folder, *args, code, **env):
    """The command in a process that imports what lies in ``folder`` first."""
    start = "import sys; sys.argv[0] = 'reflective'; from reflective.cli import main; main()"
    given = {**WITHOUT_INTERPRETER, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, "-c", start, "doctor", "--quick", "--json", *args], capture_output=True, text=True, env=given, cwd=folder,
        timeout=tiny.PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    said = json.loads(done.stdout)
    return said, {check["name"]: check for check in said["checks"]}


def test_another_build_with_a_wrong_kernel_is_found(tmp_path):
    """A whole package whose definition of the head is wrong by a thousandth: exit code 1, the backend named, others judged for themselves."""
    edit = ("F.linear(features, w1, b1)), w2, b2)", "F.linear(features, w1, b1)), w2 * 1.001, b2)")
    said, found = apart_from(package(tmp_path, kernels__logit_rows=edit), code=1)
    assert not said["ok"] and found["torch: head alone"]["status"] == "differs", found
    assert found["torch: head alone"]["measured"] > found["torch: head alone"]["allowed"] and "BLAS" in found["torch: head alone"]["advice"]
    assert found["hf: generate"]["status"] == ("ok" if "cpu" in HERE else "differs")


@pytest.mark.parametrize("module", ["transformers", "torch"])
def test_an_import_that_raises_is_told_and_survived(tmp_path, module):
    (tmp_path / f"{module}.py").write_text("raise RuntimeError('broken on purpose')")
    said, found = apart_from(tmp_path, code=1)
    assert said["facts"]["versions"]["python"] and said["facts"]["machine"]["cpu"]
    assert found[f"import {module}"]["status"] == "broken" and "broken on purpose" in found[f"import {module}"]["detail"]
    assert found[f"import {module}"]["advice"].startswith(("install torch", "pip install"))
    assert found["hf"]["status"] == "not here" and f"'import {module}' failed" in found["hf"]["detail"]
    if module == "transformers":  # the kernels do not need it
        assert found["torch: head alone"]["status"] == "ok"


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        (b"no library at all", "does not load"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL (an instruction that this processor lacks)"),
        ("import os; os._exit(7)", "exit code 7"),
    ],
    ids=["damaged", "crashes", "exits"],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_broken_extension_is_told_and_survived(tmp_path, extension, said):
    package(tmp_path)
    for file in (tmp_path / "reflective").glob("_C*"):
        file.unlink()
    if isinstance(extension, bytes):
        (tmp_path / "reflective" / "_C.abi3.so").write_bytes(extension)
    else:
        (tmp_path / "reflective" / "_C.py").write_text(extension)
    _, found = apart_from(tmp_path, code=1)
    broken = found["import reflective"]
    assert broken["status"] == "broken" and said in broken["detail"] and "--force-reinstall" in broken["advice"]
    assert found["torch"]["status"] == "not here" and "'import reflective' failed" in found["torch"]["detail"]


def test_a_capability_that_there_is_not_is_told(tmp_path):
    if ops.WHY_NO_EXTENSION:
        pytest.skip(ops.WHY_NO_EXTENSION)
    said, found = apart_from(tmp_path, code=1, REFLECTIVE_CPU_CAPABILITY="nonsense")
    assert "there is no CPU capability 'nonsense'" in found["import reflective"]["detail"]
    assert said["facts"]["environment"]["REFLECTIVE_CPU_CAPABILITY"] == "nonsense"


def test_a_check_that_hangs_or_dies_is_ended_and_the_next_begins(tmp_path, monkeypatch):
    """Of three, of which the first hangs and the second dies."""
    (tmp_path / "hanging.py").write_text(
        textwrap.dedent(
            """
            import os, time
            from reflective.doctor import checks
            from reflective.doctor.checks import Finding, Step

            def plan(quick=False):
                return [
                    Step("hangs", lambda: time.sleep(10_000), "do this"),
                    Step("dies", lambda: (print("on its way", flush=True), os.abort()), "do that"),
                    Step("needs it", Finding, "", ("dies",)),
                    Step("runs", lambda: (print("noise on stdout"), Finding())[1], ""),
                ]
            checks.plan = plan
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(checks, "plan", checks.plan)  # put back what the import changes
    import hanging

    monkeypatch.setattr(apart, "plan", hanging.plan)
    monkeypatch.setattr(apart, "_START", "import sys; sys.path[:] = {path!r}; import hanging; from reflective.doctor.checks import main; main(sys.argv[1])")
    begun = []
    found = [check for check in apart.examined(False, lambda *told: begun.append(told), patience=20.0) if isinstance(check, report.Check)]
    assert [(check.name, check.status) for check in found] == [("hangs", "broken"), ("dies", "broken"), ("needs it", "not here"), ("runs", "ok")]
    assert "no answer within 20 seconds" in found[0].detail and "SIGABRT" in found[1].detail and "report it" in found[1].advice
    assert begun == [("hangs", 0, 4), ("dies", 1, 4), ("needs it", 2, 4), ("runs", 3, 4)]
    assert "not tried, as 'dies' failed" in found[2].detail


# -- what is told ----------------------------------------------------------------------------------------------------------


def test_nothing_private_is_told(monkeypatch, tmp_path):
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(report.getpass, "getuser", lambda: "alice")
    for text, expected in (
        (f"{home}/models/x", "~/models/x"),
        ("/scratch/alice/x and /scratch/alicent", "/scratch/USER/x and /scratch/alicent"),
        ("/home/bob/x", "/home/USER/x"),
        (r"C:\Users\Bob\x", r"C:\Users\USER\x"),
        ("token hf_abcdefghijkl, sk-abcdefghijkl", "token ***, ***"),
        ("https://bob:pass@host/x", "https://***@host/x"),
        (sys.prefix + "/lib", "ENV/lib"),
        (str(ROOT / "reflective" / "x.py"), "PACKAGE/reflective/x.py"),
    ):
        assert report.clean(text) == expected
    check = report.Check("a", "broken", f"cannot open {home}/secret hf_abcdefghijkl")
    told = report.Report({"environment": {"HF_HOME": f"{home}/hub"}}, [check])
    for text in (told.paste(), json.dumps(told.json())):
        assert "alice" not in text and "hf_abc" not in text and "~/secret" in text and "~/hub" in text


def test_environment_is_that_which_the_package_reads(monkeypatch):
    """Every variable by name, in Python, in C++ and in the build."""
    read = set()
    for folder, pattern in (("reflective", "*.py"), ("kernels", "*.py"), ("csrc", "*"), ("benchmarks", "record.py"), (".", "setup.py")):
        for file in (ROOT / folder).rglob(pattern) if folder != "." else [ROOT / "setup.py"]:
            if file.suffix in (".py", ".cpp", ".cu", ".h", ".cuh") and "doctor" not in file.parts:
                text = file.read_text(encoding="utf-8")
                read |= set(re.findall(r"""(?:environ(?:\.get|\.setdefault)?[\[(]|getenv\(|envvar=)["']([A-Z_]+)["']""", text))
    read |= {"REFLECTIVE_FORCE_BUILD", "FORCE_CUDA", "REFLECTIVE_SKIP_CUDA_BUILD"}  # read in a loop
    assert len(read) > 15 and read - {"TERM", "COLUMNS", "PATH"} <= set(facts.OURS), read - set(facts.OURS)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("REFLECTIVE_CACHE", "")
    said = facts.environment()
    assert said["HF_TOKEN"] == "set" and said["REFLECTIVE_CACHE"] == "(empty)"


def test_a_section_that_cannot_be_read_is_a_hole(monkeypatch):
    monkeypatch.setattr(facts, "machine", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "examined", lambda quick, begun: iter(()))
    assert doctor.examine().facts["machine"] == {"could not be read": "ZeroDivisionError: division by zero"}


def test_doctor_needs_no_torch_to_begin():
    code = "import sys; from reflective.doctor import facts, apart; facts.versions(), facts.machine(), facts.places(); print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# -- the page --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_every_block_of_the_page_runs(tmp_path):
    """Those of a shell with what each says in the page, and the Python between them, in one directory."""
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    start = "import sys; sys.argv[0] = 'reflective'; from reflective.cli import main; main()"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "reflective").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(start)} "$@"\n')
    (tmp_path / "bin" / "reflective").chmod(0o755)
    env = {**WITHOUT_INTERPRETER, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    blocks, said = re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL), []
    for kind, block in blocks:
        command = ["bash", "-c", block] if kind == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=tiny.PATIENCE, check=False)
        assert done.returncode == 0 and (not done.stderr or "eval" in block), done.stdout + done.stderr
        said.append(done.stdout)
    assert len(blocks) == 5 and "All that is here agrees" in said[0] and torch.__version__ in said[2]
    assert said[-1].strip() == "exit code 2"
    tells_all_that_is_here(said[3])
    shown = {line[10:31].strip() for line in said[0].splitlines()}
    for name in re.findall(r"(?m)^(?:ok|not here) +(\S.{19})  ", text):
        assert name.strip() in shown | {"cpu", "cuda", "triton"} or "cpu" not in HERE, name


def tells_all_that_is_here(said):
    """With Triton's interpreter: a line a check, a block to paste."""
    lines = said.splitlines()
    assert "All that is here agrees" in said
    statuses = {line[10:31].strip(): line[:8].strip() for line in lines[: lines.index("")]}
    assert {name.partition(": ")[0] for name in statuses} == set(GROUPS) - {"vllm", "default model"}
    assert all((statuses.get(f"{name}: stream") == "ok") is (name in HERE) for name in checks.BACKENDS)
    for name in HERE:
        told = [line for line in lines if line[10:].startswith(f"{name}: ")]
        assert [line[:8].strip() for line in told] == ["ok"] * 3, told
        for line in told:
            measured, allowed = map(float, re.search(r"off by (\S+), rounding allows (\S+);", line).groups())
            assert 0 < measured <= allowed, line
        tells_of_bits(name, " ".join(told))
    block = said[said.index("<details>") :]
    assert f"reflective: {rf.__version__}" in block and f"torch: {torch.__version__}" in block and block.rstrip().endswith("</details>")
    for name, info in rf.backends().items():
        assert f"{name}: {'yes' if info.available else 'no'}: {info.detail}" in report.clean(block) or report.clean(info.detail) in block
