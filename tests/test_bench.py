"""The microbenchmark suite: its gates can turn red, its files hold what they should, ``reflective bench`` runs it."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from reflective import kernels
from reflective.benchmarks import (
    best_of_n,
    cases,
    clocks,
    command,
    decode_modes,
    decode_overhead_gpu,
    gpu_vllm,
    in_vllm,
    peers,
    plots,
    record,
    report,
    sanitize,
    soak,
    suite,
    targets,
)
from reflective.benchmarks.cases import CASES, FLOAT8, Cell
from reflective.benchmarks.suite import Item, Settings
from reflective.scoring import ops
from reflective.scoring.steps import StepTokens

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(ops.WHY_NO_EXTENSION is not None, reason=str(ops.WHY_NO_EXTENSION))


def run(cell: Cell, *implementations: str) -> list[suite.Row]:
    settings = Settings.quick(CPU)
    return suite.run(settings, items=[Item(cell, implementations)])


@pytest.fixture
def spoiled(monkeypatch):
    """Makes one of our ops do something else afterwards."""

    def spoil(op, afterwards):
        ours = getattr(torch.ops.reflective, op)

        def wrong(*args):
            out = ours(*args)
            return afterwards(out, args)

        fakes = {name: getattr(torch.ops.reflective, name) for name in ops.SCHEMAS} | {op: wrong}
        monkeypatch.setattr(cases.Case, "ours", lambda self, name: SimpleNamespace(**fakes) if name == "cpu" else None)

    return spoil


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_every_op_and_peer_passes_its_gate(rows, dtype):
    for cell in cases.cells(tuple(CASES), (40,), (rows,), (dtype,)):
        case = cases.make(cell, CPU)
        for name in set(case.names()) - {"compile", "triton"}:
            gate = case.check(name)
            assert gate.passed, (cell, name, gate)
            subject = case.bind(name, case.weights(0), 0)
            for _ in range(min(3, subject.calls or 3)):
                subject.call()
            subject.reset()


@pytest.mark.parametrize("op", CASES)
def test_triton_passes_its_gate(op, device):
    pytest.importorskip("triton")
    cell = Cell(
        op, CASES[op].variants[0], 0 if op in cases.WITHOUT_WIDTH else 40, 2, cases.WITHOUT_WIDTH.get(op, torch.float32)
    )
    case = cases.make(cell, device)
    case.gate_rows = 2  # interpreted where there is no GPU
    assert case.check("triton").passed


@pytest.mark.parametrize("op", ["score_rows", "logit_rows"])
def test_a_wrong_implementation_turns_the_gate_red(op, spoiled, tmp_path, capsys):
    spoiled(op, lambda out, args: out * 1.01)
    rows = run(Cell(op, "", 40, 4, torch.float32), "cpu", "expression")
    ours, expression = rows
    assert ours["status"] == "red" and float(ours["error"]) > 0.005 > float(ours["definition_error"])
    assert expression["status"] == "ok" and expression["host_q50_us"] > 0
    assert not any(ours[c] for c in suite.COLUMNS if c.endswith(("_us", "_per_s")))
    assert suite.speedups(ours, rows) == {} and suite.red(rows) == [ours]
    printed = " ".join(suite.line(ours, rows))
    assert "RED error" in printed and "x expression" not in printed


@pytest.mark.parametrize(
    ("op", "variant", "afterwards"),
    [
        ("decode_step", "immediate", lambda out, args: args[8][0, 7].add_(1)),  # a step too many
        ("decode_step", "deferred", lambda out, args: args[11].add_(1)),  # a column of the step log
        ("decode_step", "immediate", lambda out, args: args[9][..., 1].mul_(1.001)),  # a sum
        ("decode_step", "immediate", lambda out, args: args[10].mul_(2)),  # the state left for the next step
        ("flush", "", lambda out, args: args[8].add_(1)),  # a buffer that is not emptied
        ("tally_slots", "", lambda out, args: args[3].mul_(1.001)),
        ("step_mask", "", lambda out, args: out.roll(1, 1)),
    ],
)
def test_every_part_of_the_state_is_looked_at(op, variant, afterwards, spoiled):
    spoiled(op, afterwards)
    H, dtype = (0, cases.WITHOUT_WIDTH[op]) if op in cases.WITHOUT_WIDTH else (40, torch.float32)
    (row,) = run(Cell(op, variant, H, 3, dtype), "cpu")
    assert row["status"] == "red", row


def test_nan_and_exceptions_fail_and_the_run_goes_on(spoiled):
    spoiled("score_rows", lambda out, args: out * math.nan)
    cells = [Cell(op, "", 40, 2, torch.float32) for op in ("score_rows", "logit_rows")]
    rows = suite.run(Settings.quick(CPU), items=[Item(cell, ("cpu",)) for cell in cells])
    assert [r["status"] for r in rows] == ["red", "ok"] and rows[0]["error"] == "nan"

    def explode(out, args):
        raise ValueError("no such tile")

    spoiled("logit_rows", explode)
    rows = suite.run(Settings.quick(CPU), items=[Item(cell, ("cpu",)) for cell in cells])
    assert [r["status"] for r in rows] == ["ok", "failed"] and "no such tile" in rows[1]["detail"]


def test_a_red_gate_ends_in_exit_code_1_after_everything_ran(spoiled, tmp_path, monkeypatch):
    from reflective import cli

    spoiled("logit_rows", lambda out, args: -out)
    args = ["bench", "--quick", "--op", "logit_rows", "--op", "score_rows", "--out", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        cli.app(args)
    assert end.value.code == 1
    rows = record.read("suite_cpu", tmp_path)
    assert {r["status"] for r in rows if r["op"] == "logit_rows" and r["implementation"] == "cpu"} == {"red"}
    assert {r["status"] for r in rows if r["op"] == "score_rows"} == {"ok"}


def test_quick_command(tmp_path):
    """The installed command, in a process of its own: table, CSV with hardware, versions and commit, plots."""
    done = subprocess.run(
        [sys.executable, "-c", "from reflective.cli import main; main()", "bench", "--quick", "--device", "cpu",
         "--out", str(tmp_path)],
        check=False, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decode_step immediate" in done.stdout and "x expression" in done.stdout
    with open(tmp_path / "suite_cpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["op"], r["variant"]) for r in rows} == {
        *(("decode_step", v) for v in ("immediate", "deferred", *cases.FORMS)),
        *((op, "") for op in CASES if op not in ("decode_step", "sprm_loss")),  # the loss has no compiled CPU kernel
    }
    for row in rows:
        assert row["status"] == "ok" and row["cpu"] and row["torch"] == torch.__version__ and row["commit"]
        assert 0 < float(row["host_q20_us"]) <= float(row["host_q50_us"]) <= float(row["host_q80_us"])
    if plots_can_be_drawn():
        assert {p.name for p in tmp_path.glob("*.png")} == {"suite_cpu_roofline.png", "suite_cpu_latency.png"}


def plots_can_be_drawn() -> bool:
    try:
        plots.pyplot()
    except ImportError:
        return False
    return True


def test_bad_arguments_are_named(tmp_path):
    for given, message in (
        ({"ops": ("decode",)}, "ops: decode; expected some of decode_step"),
        ({"dtypes": ("int8",)}, "dtypes: int8"),
        ({"implementations": ("cuda",)}, "nothing to measure"),
    ):
        with pytest.raises(ValueError, match=message):
            command.run("cpu", True, given, tmp_path, SimpleNamespace())
    with pytest.raises(ValueError, match="device='tpu'"):
        command.run("tpu", True, {}, tmp_path, SimpleNamespace())


def test_a_budget_ends_the_run_with_what_was_measured():
    settings = Settings.quick(CPU, budget=0.0)
    assert suite.run(settings) == []
    whole = suite.plan(Settings(CPU))
    assert suite._tier(whole[0].cell) == 0 and suite._tier(whole[-1].cell) == 4


@pytest.mark.parametrize("rows", [256, 1024])
def test_gates_of_many_rows_have_room(rows):
    """Whatever waits in a buffer: a gate's steps are more than one buffer of 256 rows takes."""
    for cell in cases.cells(("decode_step", "flush", "score_rows", "tally_slots"), (16,), (rows,), (torch.float32,)):
        case = cases.make(cell, CPU)
        for name in set(case.names()) - {"compile", "triton"}:
            assert case.check(name).passed, (cell, name)


@pytest.mark.parametrize("op", ["score_rows", "logit_rows", "flush"])
def test_the_peer_by_cublas_is_the_expression_with_epilogues(op):
    """It is one of a GPU's alone, but runs on CPU."""
    cell = Cell(op, "", 40, 6, torch.bfloat16)
    assert "cublas" not in cases.make(cell, CPU).names()
    if torch.cuda.is_available():
        assert "cublas" in cases.make(cell, torch.device("cuda")).names()
    assert cases.make(cell, CPU).check("cublas").passed


def test_on_a_gpu_what_is_compiled_already_comes_first(monkeypatch):
    """A run that its time ends has all CUDA cells before the first that waits for a compiler."""
    names = ["cuda", "triton", "expression", "cublas", "compile", "published"]
    monkeypatch.setattr(cases.Case, "names", lambda self: names)
    plan = suite.plan(Settings(torch.device("cuda"), ops=("decode_step", "score_rows"), rows=(0, 1, 1024)))
    late = [max(suite.LATE.get(name, 0) for name in item.implementations) for item in plan]
    assert late == sorted(late) and set(late) == {0, 1, 2}
    assert plan[0].implementations == ("cuda", "expression", "cublas", "published")
    assert suite._tier(plan[0].cell) == 0 and {suite._tier(i.cell) for i in plan} == {0, 1, 2, 4}


def test_sanitized_ops_are_checked_cell_by_cell(capsys, monkeypatch, spoiled):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["", "--backend", "cpu", "--dtype", "bfloat16"])
    with pytest.raises(SystemExit) as end:
        sanitize.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and last == f"{len(lines)} cells ran, 0 wrong" and len(lines) > 15
    assert lines[0].startswith("cpu decode_step immediate H=208 rows=40 bfloat16: right")
    spoiled("logit_rows", lambda out, args: -out)
    with pytest.raises(SystemExit) as end:
        sanitize.main()
    found = capsys.readouterr().out
    assert end.value.code == 1 and found.count("WRONG") == 2 and "cpu logit_rows H=208 rows=3 bfloat16: WRONG" in found


def test_every_combination_is_planned():
    """Of the issue's grid; float8 for the head's ops, no width where there is none."""
    planned = set(cases.cells(tuple(CASES), suite.WIDTHS, suite.ROWS, tuple(suite.DTYPES.values())))
    assert Cell("decode_step", "immediate", 8192, 1024, FLOAT8) in planned
    assert Cell("flush", "", 5120, 256, torch.bfloat16) in planned
    assert Cell("tally_slots", "", 0, 64, torch.float32) in planned
    assert not [c for c in planned if c.op == "sprm_loss" and c.dtype == FLOAT8]
    assert len([c for c in planned if c.op == "score_rows"]) == 5 * 8 * 4  # no rows are no case of it


def test_a_float8_head_is_the_same_in_any_one_dtype():
    head = cases.make(Cell("score_rows", "", 64, 64, FLOAT8), CPU).weights(0)
    rows = torch.randn(9, 64, dtype=torch.float64)
    moved = peers.in_one_dtype(head, torch.float64)
    assert not torch.equal(moved[2], head[2].double()) and {w.dtype for w in moved} == {torch.float64}
    assert torch.equal(kernels.logit_rows(rows, *moved), kernels.logit_rows(rows, *(w.double() for w in head)))


def test_float8_is_checked_against_its_own_weights_and_its_error_told():
    case = cases.make(Cell("score_rows", "", 64, 64, FLOAT8), CPU)
    w1, b1, w2, b2 = case.weights(0)
    assert w1.dtype == FLOAT8 and {b1.dtype, w2.dtype, b2.dtype} == {torch.float32}
    assert case.check("expression").passed
    exact = cases.make(Cell("score_rows", "", 64, 64, torch.bfloat16), CPU).dtype_error()
    assert exact < case.dtype_error() < 0.1


def test_a_compiled_peer_is_the_peer():
    case = cases.make(Cell("score_rows", "", 40, 4, torch.float32), CPU)
    assert case.check("compile").passed
    assert case.peer("compile") is cases.make(Cell("score_rows", "", 40, 8, torch.float32), CPU).peer("compile")


def test_on_a_gpu_weights_rotate_through_more_than_the_cache(monkeypatch):
    """The device side of the suite with its clock replaced: what would be captured, and how often."""
    captured = []

    class Graph:
        def __init__(self, subjects, rounds):
            for subject in subjects:
                subject.reset()
                subject.call()
            captured.append((len(subjects), rounds))

        def time(self, seconds):
            return clocks.Quantiles(1.0, 2.0, 3.0, 5)

        def replay_to_end(self, n):
            return clocks.Quantiles(4.0, 5.0, 6.0, n)

    monkeypatch.setattr(suite, "Graph", Graph)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 20))
    case = cases.make(Cell("decode_step", "immediate", 64, 2, torch.float32), CPU)
    weights = case.weights(0)
    found = suite._on_device(case, "cpu", weights, 0.0)
    (warm, once, cold), size = captured, sum(w.nbytes for w in weights)
    assert warm[0] * warm[1] >= clocks.GRAPH_CALLS and once == (1, 1)
    assert cold[0] * size > 3 << 20 and cold[0] >= clocks.GRAPH_CALLS
    numbers = suite._numbers(case, found, suite.Ceilings(1000.0, {torch.float32: 50.0}))
    assert numbers["cold_q50_us"] == 2.0 and numbers["replay_q50_us"] == 5.0
    assert numbers["GB_per_s"] == pytest.approx(case.bytes / 2e3, rel=1e-3)
    idle = cases.make(Cell("decode_step", "deferred", 64, 0, torch.float32), CPU)
    captured.clear()
    assert "cold" not in suite._on_device(idle, "cpu", weights, 0.0) and captured[0] == (1, suite.IDLE_NODES)
    deferred = cases.make(Cell("decode_step", "deferred", 64, 100, torch.float32), CPU)
    assert deferred.bind("cpu", weights, 0).calls == 2  # then the buffer of 256 rows has no room for 100 more


def gpu_rows(tmp_path, cold: float = 26.0) -> None:
    """Invented figures, to read and judge."""
    base = dict.fromkeys(suite.COLUMNS, "") | {
        "dtype": "bfloat16",
        "status": "ok",
        "device": "cuda",
        "bytes": 10,
        "flops": 10,
    }
    rows = []
    for implementation, slower in (("cuda", 1), ("triton", 1.5), ("compile", 3)):
        mine = base | {"implementation": implementation, "copy_GB_per_s": 4300, "matmul_TFLOP_per_s": 790}
        for H in (1536, 3584, 5120, 8192):
            step = mine | {"op": "decode_step", "variant": "immediate", "H": H}
            rows.append(step | {"rows": 0, "warm_q50_us": 2.0 * slower})
            for n in (1, 8):
                times = {"cold_q50_us": cold * slower, "percent_of_copy": 94 / slower, "TFLOP_per_s": 1.0}
                rows.append(step | {"rows": n} | times)
        rows.append(mine | {"op": "flush", "H": 5120, "rows": 256, "cold_q50_us": 55.0 * slower})
    for implementation, us in (("expression", 61.0), ("cublas", 54.0)):
        peer = base | {"implementation": implementation, "op": "flush", "H": 5120, "rows": 256, "cold_q50_us": us}
        rows.append(peer)
    environment = {"gpu": "GPU X", "driver": "1", "cuda": "13.0", "torch": "2", "triton": "3"}
    with open(tmp_path / "gpu_suite.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*suite.COLUMNS, *environment])
        writer.writeheader()
        writer.writerows(row | environment for row in rows)


def test_targets_are_read_off_the_files(tmp_path):
    assert {v.met for v in targets.verdicts(tmp_path)} == {"-"}
    gpu_rows(tmp_path)
    met = {v.case: (v.measured, v.met) for v in targets.verdicts(tmp_path)}
    assert met["GPU, a decode step with no step-token, replayed"] == ("2 us", "yes")
    assert met["GPU, immediate, 1-16 rows, H = 5120, cold"] == ("94 %", "yes")
    assert met["GPU, immediate, 1-16 rows, H = 1536, cold"] == ("26 us", "no")
    assert met["GPU, immediate, 1-16 rows, H = 8192, cold"] == ("94 %", "yes")
    assert met["GPU, flush of 256 rows, H = 5120"] == ("55 us", "yes")
    assert met["GPU, the same against cuBLAS"] == ("0.982 x", "no")
    assert met["CPU, a decode step with no step-token"] == ("not measured", "-")
    text = targets.markdown(targets.verdicts(tmp_path))
    assert text.count("\n") == 2 + len(met) and "| 26 us | no |" in text


def gpu_decode_rows(tmp_path, kept: float, scoring_s: float = 0.01, ours: float = 950.0) -> None:
    """Invented figures of decoding, best of 32 and generating."""
    figures = {"plain_ms": 1.25, "kept_least": kept, "kept_most": 1.0, "added_us": 2.5, "tokens": 512}
    decode = [
        {"model": model, "schedule": s, "batch": batch, "throughput_kept": 0.9999} | figures
        for model in ("1.5B", "7B") for batch in (1, 64) for s in decode_modes.SCHEDULES
    ]  # fmt: skip
    decode[-1]["throughput_kept"] = kept
    decode.append(decode[-1] | {"throughput_kept": ""})  # wrong scores have no figure
    record.write("gpu_decode_overhead", decode, tmp_path)
    best = {
        "model": "1.5B",
        "n": 32,
        "tokens": 2048,
        "second_pass_s": 0.6,
        "second_pass_MiB": 900.0,
        "scoring_MiB": 6.0,
        "gpu": "GPU X",
    }
    rows = [best | {"schedule": s, "scoring_s": scoring_s * (1 + i)} for i, s in enumerate(decode_modes.SCHEDULES)]
    record.write("gpu_best_of_n", rows, tmp_path)
    rates = {"reflective": ours, "eager": 900.0, "compiled": 1000.0}
    same = {"model": "1.5B", "n": 32, "layers": 28, "tokens": 96, "seconds": 3.0, "warm_up_s": 2.0}
    ways = [{"way": w, "tokens_per_s": rate} | same for w, rate in rates.items()]
    record.write("gpu_generate", ways, tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"kept": 0.9971}, {"decoding": ("99.7 %", "yes"), "time": ("60 x", "yes"), "generate": ("95 %", "yes")}),
        ({"kept": 0.9969}, {"decoding": ("99.7 %", "no"), "memory": ("0.667 %", "yes")}),
        ({"kept": 1.0, "scoring_s": 0.0125, "ours": 940.0}, {"time": ("48 x", "no"), "generate": ("94 %", "no")}),
    ],
)
def test_targets_of_decoding_are_read_off_the_files(given, expected, tmp_path):
    cases_of = {
        "decoding": "GPU, decoding in CUDA graphs, 1.5B and 7B, 1, 8 and 64 sequences",
        "generate": "GPU, ReflectiveModel.generate, 32 candidates",
        "time": "GPU, time against the second pass, best of 32",
        "memory": "GPU, memory against the second pass, best of 32",
    }
    gpu_decode_rows(tmp_path, **given)
    met = {v.case: (v.measured, v.met) for v in targets.verdicts(tmp_path)}
    assert {name: met[cases_of[name]] for name in expected} == expected


def test_a_limit_that_may_not_be_reached_is_not():
    assert targets._verdict("", "< 1 %", 1.0, 1, "%").met == "no"
    assert targets._verdict("", "<= 1 us", 1.0, 1, "us").met == "yes"
    assert targets._verdict("", ">= 1 x", 1.0, 1, "x").met == "yes"


def test_the_pages_show_what_is_measured_on_a_gpu(tmp_path):
    for shown in (report.gpu, report.gpu_decode, report.gpu_generate, report.second_pass):
        assert shown(tmp_path) == []
    gpu_rows(tmp_path)
    of = {line[0]: line[1:] for line in report.gpu(tmp_path)}
    assert of["H = 5120"] == ("2.00", "26.0 (94 %)", "26.0 (94 %)", "", "55.0", "3.0x torch.compile")
    gpu_decode_rows(tmp_path, kept=0.997)
    decode = {line[0]: line[1:] for line in report.gpu_decode(tmp_path)}
    assert decode["7B shape, batch 64"][:2] == ("99.99 % (99.70 % to 100.00 %), +2.5 µs", "99.70 % (99.70 % to 100.00 %), +2.5 µs")
    deferred, _ = report.second_pass(tmp_path)
    assert deferred[1:] == ("10.0 ms", "6.0 MiB", "0.60 s", "900 MiB", "60")
    assert [line[1] for line in report.gpu_generate(tmp_path)] == ["950", "900", "1,000"]


def test_entries_of_pytest_benchmark():
    """Once through, without timing, as CI runs them."""
    pytest.importorskip("pytest_benchmark")
    command_line = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_decode_step.py",
        "--benchmark-disable", "-k", "576 and not compile",
    ]  # fmt: skip
    done = subprocess.run(command_line, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "20 passed" in done.stdout, done.stdout + done.stderr


def test_definitions_are_what_is_compared_with():
    """Peers that compute another function would make every ratio meaningless; these are independent of the definitions."""
    torch.manual_seed(0)
    features, head = torch.randn(5, 8), (torch.randn(16, 8), torch.randn(16), torch.randn(1, 16), torch.randn(1))
    torch.testing.assert_close(peers.score_rows(features, *head), kernels.score_rows(features, *head))
    is_step = torch.tensor([True, False, True, True, False])
    scores = peers.published_score_rows(features, is_step, *head)
    torch.testing.assert_close(scores.log(), kernels.score_rows(features[is_step], *head))


def test_bars_and_json(tmp_path, capsys):
    from reflective import cli

    args = ["bench", "--quick", "--op", "score_rows", "--dtype", "float32", "--rows", "2", "--json"]
    with pytest.raises(SystemExit) as end:
        cli.app([*args, "--device", "cpu", "--out", str(tmp_path)])
    assert end.value.code == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["implementation"] for r in rows} == {"cpu", "expression", "published"}


@pytest.mark.parametrize(
    ("mode", "batch", "method"), [("lookup", 1, "crop"), ("beams", 8, "reorder_cache"), ("static", 4, "")]
)
def test_a_recorded_generation_is_played_with_its_scores(mode, batch, method):
    subject = decode_modes.tiny()
    tape = decode_modes.Tape.of(subject, subject.prompts[: {1: 1, 8: 2}.get(batch)], 24, **decode_modes.MODES[mode])
    assert {str(then) for _, calls in tape.calls for then in calls if method not in str(then)} == set()
    assert any(calls for _, calls in tape.calls) == bool(method) and bool(tape.length) == (mode == "static")
    for row in decode_modes.measure(subject, mode, 24, until=0):
        assert row["check"] == "scores equal" and row["batch"] == batch and row["pairs"] == len(tape.calls) - 1
        assert row["kept_q20"] <= row["throughput_kept"] <= row["kept_q80"] and row["scorer_us"] > 0


def test_compiled_forwards_take_turns_and_their_op_is_timed():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    subject = decode_modes.tiny()
    tape = decode_modes.Tape.of(subject, subject.prompts, 24, **decode_modes.STATIC)
    players = [decode_modes.Player(subject, schedule) for schedule in (None, *decode_modes.SCHEDULES)]
    decode_modes.Lockstep(tape, players, {"fullgraph": True, "backend": "eager"}).run(until=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    for player in players:
        assert len(player.seconds) == 23 and not player.wrong and bool(player.scorer_us) == bool(player.schedule)
        assert type(player.net) is type(subject.net)
        assert next(player.net.parameters()).data_ptr() == next(subject.net.parameters()).data_ptr()


def test_whole_generations_take_turns_in_continuous_batching():
    subject = decode_modes.tiny()
    players = [decode_modes.Player(subject, schedule) for schedule in (None, "deferred")]
    decode_modes.turns(players, decode_modes.batching(subject.prompts, 12), 12, until=0)
    row = decode_modes.row("batching", *players, batch=4, tokens=12)
    assert row["check"] == "scores equal" and row["pairs"] == 1 and row["scorer_us"] > 0


def test_no_figure_of_decoding_on_wrong_scores(tmp_path, monkeypatch, capsys):
    """A head that answers otherwise than the one that ``rf.score`` is asked with."""
    truth = decode_modes.rf.score
    monkeypatch.setattr(
        decode_modes.rf, "score", lambda net, head, *args, **kwargs: truth(net, type(head)(32), *args, **kwargs)
    )
    monkeypatch.setattr(
        sys, "argv", ["", "--quick", "--mode", "dynamic", "--tokens", "16", "--seconds", "0", "--out", str(tmp_path)]
    )
    assert decode_modes.main() == 1
    for row in record.read("decode_modes", tmp_path):
        assert "not close" in row["check"] and not row["throughput_kept"] and not row["scorer_us"]
    assert report.decode_modes(tmp_path) == []


@pytest.fixture
def small_subject() -> decode_modes.Subject:
    return decode_overhead_gpu.made("quick", 3, CPU)


def test_whole_rounds_of_decoding_have_their_result_and_its_scores(small_subject, monkeypatch):
    began = time.monotonic()
    for row in decode_overhead_gpu.decode(small_subject, 24, until=began):
        assert row["check"] == "scores equal" and row["rounds"] == 2 and row["batch"] == 3 and row["tokens"] == 24
        assert row["kept_least"] <= row["throughput_kept"] <= row["kept_most"] and row["result_ms"] > 0
        added = 1e3 * (row["scored_ms"] - row["plain_ms"])
        assert row["added_us"] == pytest.approx(added, abs=0.02)
    truth = decode_modes.rf.score
    monkeypatch.setattr(
        decode_modes.rf,
        "score",
        lambda net, head, *args, **kwargs: truth(net, type(head)(64).bfloat16(), *args, **kwargs),
    )
    small_subject.truths.clear()
    for row in decode_overhead_gpu.decode(small_subject, 24, until=began):
        assert "not close" in row["check"] and row["throughput_kept"] == row["added_us"] == ""


def test_a_round_feeds_every_column_but_the_last(small_subject):
    player = decode_modes.Player(small_subject, "deferred")
    ids = torch.randint(2, 512, (3, 25))
    with player.attached:
        captured = decode_overhead_gpu.Captured(player, ids)
        for _ in range(2):  # each from a fresh cache and state
            captured.round()
            assert captured.count.item() == 24 and captured.cache.get_seq_length() == 16 + 24
            assert player.scorer.stream.state.seen()[:3].tolist() == [16 + 24] * 3
    assert not player.wrong and len(captured.seconds) == 2 and 0 < captured.result_seconds < sum(captured.seconds)


def test_scoring_alone_and_the_second_pass(small_subject):
    rows = decode_overhead_gpu.best_of_n(small_subject, 128)
    assert [r["schedule"] for r in rows] == list(decode_modes.SCHEDULES)
    for row in rows:
        assert row["scoring_s"] > 0 and 0 < row["scoring_MiB"] < 2 and row["second_pass_s"] > 0


def test_ways_of_generating_decode_as_many_tokens(small_subject):
    rows = {row["way"]: row for row in decode_overhead_gpu.generate(small_subject, 2, 6, CPU)}
    assert list(rows) == ["reflective", "reflective, prune", "reflective, batch", "eager", "compiled"]
    assert all(row["check"] == "" and row["tokens_per_s"] > 0 and row["layers"] == 3 for row in rows.values())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of the resident set is Linux's")
@pytest.mark.parametrize("way", best_of_n.WAYS)
def test_best_of_n_both_ways(way, default_model, monkeypatch):
    for owner, name in ((default_model, "config"), (default_model.model.generation_config, "eos_token_id")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    found = best_of_n.measure(default_model, way, 2, 16)
    assert found["steps"] >= 2 and found["generate_s"] > 0 and found["score_s"] > 0
    assert (found["score_MiB"] > 10) == (way == "published")


def test_the_pages_show_decoding_and_best_of_n_once_they_are_measured(tmp_path):
    assert report.decode_modes(tmp_path) == report.best_of_n(tmp_path) == report.second_pass(tmp_path) == []
    measured = {"plain_ms": 40, "throughput_kept": 0.9991, "kept_q20": 0.99, "kept_q80": 1.01, "scorer_us": 12.3}
    row = {"mode": "compiled", "batch": 8, "pairs": 95} | measured
    record.write("decode_modes", [row | {"schedule": s} for s in decode_modes.SCHEDULES], tmp_path)
    ((what, deferred, immediate, spent),) = report.decode_modes(tmp_path)
    assert what == "torch.compile, static cache, batch 8" and spent == "12 / 12 µs of 40.0 ms"
    assert deferred == immediate == "99.9 % (99.0 % to 101.0 %)"
    record.write("decode_modes", [row | {"schedule": s, "pairs": 1} for s in decode_modes.SCHEDULES], tmp_path)
    assert "too few" in report.decode_modes(tmp_path)[0][1]
    ways = {"reflective": (40.0, 0.05, 1.5), "published": (60.0, 25.0, 150.0)}
    rows = [{"way": w, "n": 32, "tokens": 256, "generate_s": g, "score_s": s, "score_MiB": m} for w, (g, s, m) in ways.items()]
    record.write("best_of_n", rows, tmp_path)
    ours, theirs = report.best_of_n(tmp_path)
    assert ours[1:] == ("40.0 s", "50.0 ms", "40.0 s", "1.5 MiB") and theirs[1:] == ("60.0 s", "25.0 s", "85.0 s", "150 MiB")
    assert report.second_pass(tmp_path)[0][-1] == "500"


def test_a_long_generation_and_what_it_leaves(tmp_path, monkeypatch, capsys):
    arguments = ["", "--sequences", "2", "--tokens", "64", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    soak.main()
    rows = record.read("soak", tmp_path)
    assert [r["run"] for r in rows] == ["plain"] * 32 + ["scored"] * 32
    assert int(rows[-1]["steps"]) > 0 and float(rows[-1]["max_error"]) < 1e-5
    ((what, scored, plain, _, _),) = report.soak(tmp_path)
    assert what.startswith("2 sequences of 63 tokens") and scored.endswith(" MiB") and plain.endswith(" MiB")
    monkeypatch.setattr(
        soak.rf, "score", lambda model, head, *rest, **k: FALSE_SCORE(model, type(head)(64), *rest, **k)
    )
    with pytest.raises(SystemExit, match="log-scores differ"):
        soak.main()


FALSE_SCORE = soak.rf.score


def test_every_mode_has_a_name_on_the_pages():
    assert list(report.MODES) == list(decode_modes.MODES)


def test_medians_have_an_interval_that_holds_them():
    ratios = [0.99 + 0.001 * i for i in range(21)]
    middle, low, high = in_vllm.interval(ratios)
    assert middle == pytest.approx(1.0) and 0.99 < low < middle < high < 1.01
    assert in_vllm.interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert in_vllm.figures("kept", ratios)["kept"] == 1.0


@pytest.mark.skipif(not os.access("/proc/stat", os.R_OK), reason="Linux tells of others")
def test_what_this_process_does_is_not_others_work():
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    helper = subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    without, within = in_vllm.Others([helper.pid]), in_vllm.Others()
    helper.stdout.readline()  # it has had its half a second
    others, all_of_them = without.cores(), within.cores()
    helper.communicate(b"\n")
    assert all_of_them > others


def test_a_watch_sees_what_the_host_is_given():
    watch = gpu_vllm.Watch()
    watch.begin()
    (torch.ones(3) * 2).cumsum(0)
    watch.end()
    assert watch.reads == []
    watch.begin()
    torch.ones(3).sum().item()
    torch.ones(3).nonzero()
    watch.end()
    assert watch.reads == ["_local_scalar_dense", "nonzero"]


def test_a_random_model_for_vllm_is_scored_as_it_lies_there(tmp_path):
    place = gpu_vllm.Place(tmp_path, "quick", CPU, weights=True)
    text = place.prompts([64])[0]["prompt_token_ids"]
    text[40] = 1  # ends a step
    (scores,) = place.truth("float32")([text], [0])
    assert scores and all(0 < s < 1 for s in scores) and len(set(scores)) == len(scores)
    assert in_vllm.differ([scores], [scores], 1e-6) == ""
    assert in_vllm.differ([[s * 1.01 for s in scores]], [scores], 1e-3) and in_vllm.differ([[]], [scores], 1e-3)
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    assert tokenizer.decode(tokenizer("8 and 13").input_ids) == "8 and 13"
    steps = StepTokens.from_tokenizer(tokenizer)
    assert steps.mask(torch.arange(2, 104)[None], None, [0]).nonzero()[:, 1].tolist() == [24, 49, 74, 99]
    settings = place.settings(gpu_vllm.WATCHED)
    assert settings["model"] == str(place.model) and settings["worker_extension_cls"] == gpu_vllm.WATCHED
    gpu_vllm.Place(tmp_path / "dummy", "quick", CPU, weights=False).settings()  # the head is read


def test_the_pages_show_vllm_once_it_is_measured(tmp_path):
    assert report.in_vllm_overhead(tmp_path) == report.in_vllm_best_of_n(tmp_path) == report.gpu_vllm(tmp_path) == []
    kept = {
        f"{name}{end}": v
        for name in ("kept", "steps_kept")
        for end, v in (("", 0.998), ("_low", 0.99), ("_high", 1.01))
    }
    spent = {"step_ms": 61.2, "scorer_us": 44.4, "scorer_share": 0.00073, "wrapper_us": 102.0}
    record.write("in_vllm_overhead", [{"sequences": n, "dtype": "float32"} | kept | spent for n in (1, 8)], tmp_path)
    rows = [
        {
            "way": way,
            "n": 32,
            "tokens": 128,
            "generate_s": 15,
            "score_s": 5,
            "total_s": 20 + i,
            "peak_MiB": 700,
            "times_ours": 1 + i / 10,
            "least": 1,
            "most": 2,
        }
        for i, way in enumerate(in_vllm.PROCESSES)
    ]
    record.write("in_vllm_best_of_n", rows, tmp_path)
    first, _ = report.in_vllm_overhead(tmp_path)
    assert first[2] == "99.8 % (99.0 % to 101.0 %)" and first[3:] == ("44 µs of 61.2 ms (0.07 %)", "102 µs")
    best = {line[0]: line[1:] for line in report.in_vllm_best_of_n(tmp_path)}
    assert best["stock vLLM, then the published way"][2:] == ("22.0 s", "700 MiB", "1.20 (1 to 2)")
    row = {"model": "7B", "sequences": 64, "step_ms": 8.1, "added_us": 6.2} | kept
    record.write("gpu_vllm_overhead", [row], tmp_path)
    assert report.gpu_vllm(tmp_path)[0][0] == "7B shape, 64 sequences"
