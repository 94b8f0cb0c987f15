"""Batch work: files of any size, killed at any point, scored and answered as one row alone is."""

import dataclasses
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from test_model import byte_tokenizer, small  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, GPT2Config

import reflective as rf
from reflective import batch
from reflective.batch import files
from reflective.batch.journal import Journal
from reflective.batch.progress import Meter

TEXTS = ["nabecod!", "naïve 中文 é a b — e\U0001f600o", "zzz", "a1", "same a same e", "same a same e"]


def rows(n, seed=0):
    """Responses of many lengths, several of them twice."""
    rng = random.Random(seed)
    made = [{"id": i, "prompt": f"Q: {i % 7}\n", "response": "".join(rng.choices("abcdefgh ", k=rng.randint(1, 60)))} for i in range(n)]  # fmt: skip
    return made + made[: n // 4]


def write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_bytes().splitlines()]


class Watched(rf.ReflectiveModel):
    """A model that tells which responses it was given together, and is interrupted after some ``calls``."""

    def __init__(self, model, calls=None):
        self.__dict__ |= vars(model)
        self.given, self.calls = [], calls

    def score_tokens(self, prompts, responses, **kwargs):
        if len(self.given) == self.calls:
            raise KeyboardInterrupt
        self.given.append([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        return super().score_tokens(prompts, responses, **kwargs)


def scored(model, source, output, **settings):
    told = []
    broken = batch.score_file(lambda: model, source, output, report=told.append, **settings)
    assert broken == len({line.split(":")[0].split(",")[0] for line in told})
    return told


@pytest.mark.parametrize("given", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("wanted", ["out.jsonl", "out.parquet"])
def test_rows_are_scored_as_one_text_alone_is(small, tmp_path, given, wanted):  # noqa: F811
    records = [{"prompt": "Q: x\n", "question": None, "response": text, "id": i, "more": {"é": [i]}} for i, text in enumerate(TEXTS)]  # fmt: skip
    records += [{**records[0], "prompt": None, "question": "x"}, records[0]]
    source = write(tmp_path / given, records)
    assert scored(small, source, tmp_path / wanted, batch_tokens=40) == []
    found = read(tmp_path / wanted)
    assert [{k: row[k] for k in records[0]} for row in found] == records
    for row in found:
        (alone,) = small.score(row["prompt"] or "Q: x\n", [row["response"]])
        assert row["score"] == pytest.approx(alone.score, rel=1e-5) and row["n_steps"] == len(alone.step_scores)
        assert row["step_scores"] == pytest.approx(alone.step_scores, rel=1e-5) and row["error"] is None
        assert [tuple(span) for span in row["step_spans"]] == alone.step_spans
    assert found[0]["score"] == pytest.approx(found[-1]["score"], rel=1e-5) and found[0]["n_steps"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([given, wanted])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_list_of_responses_gets_lists(small, tmp_path, suffix):  # noqa: F811
    lists = [["nabecod!", "zzz", ""], ["a" * 50], ["", "e1e"]]
    source = write(tmp_path / f"in{suffix}", [{"prompt": "Q: x\n", "responses": r} for r in lists])
    told = scored(small, source, tmp_path / f"out{suffix}", batch_tokens=64)
    word = "row" if suffix == ".parquet" else "line"
    assert told == [f"{word} 1, response 3: the response is empty", f"{word} 3, response 1: the response is empty"]
    found = read(tmp_path / f"out{suffix}")
    assert [[bool(e) for e in row["error"]] for row in found] == [[False, False, True], [False], [True, False]]
    for row, responses in zip(found, lists, strict=True):
        alone = small.score("Q: x\n", [r for r in responses if r])
        assert [s for s in row["score"] if s is not None] == pytest.approx([c.score for c in alone], rel=1e-5)
        assert [n for n in row["n_steps"] if n is not None] == [len(c.step_scores) for c in alone]
        assert len(row["step_scores"]) == len(row["step_spans"]) == len(responses)


def test_broken_rows_are_told_by_number_and_kept(small, tmp_path):  # noqa: F811
    lines = [
        '{"text": "nabe", "score": "old"}', "{broken", "", '{"text": 5}', "[1]", '{"text": ""}', '{"question": "x"}',
        '{"text": "lone \\ud800 surrogate"}', '{"prompt": "x", "responses": []}', '{"text": null}', "[" * 100_000,
        '{"prompt": "x", "response": "a", "responses": ["a"]}', '{"prompt": "x", "responses": ["a", 5]}',
        '{"text": "both \\ud83d\\ude00 halves a"}',
    ]  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_bytes("\r\n".join(lines).encode() + b'\n{"text": "\xff"}\n\n')
    told = scored(small, source, tmp_path / "out.jsonl")
    faults = dict(line.split(": ", 1) for line in told)
    assert list(faults) == [f"line {n}" for n in (2, 4, 5, 6, 7, 8, 9, 10, 11, 12)] + ["line 13, response 2", "line 15"]
    assert faults["line 4"] == "text: expected a string, found int"
    assert faults["line 5"] == "expected an object, found list"
    assert "half a surrogate pair" in faults["line 8"] and "empty" in faults["line 9"]
    found = read(tmp_path / "out.jsonl")
    assert len(found) == 14
    assert [row["error"] for row in found[1:3]] == [faults["line 2"], faults["line 4"]]
    assert found[0]["n_steps"] == 1 and found[0]["score"] > 0 and found[2]["text"] == 5
    assert found[-2]["n_steps"] == 3 and found[-2]["text"] == "both \U0001f600 halves a"
    assert found[-3]["error"] == [None, "expected a string, found 5"]


def test_columns_keep_their_types_whatever_the_first_rows_hold(small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(files, "PIECE_ROWS", 2)
    records = [{"text": "a", "x": None, "n": 1, "l": []} for _ in range(4)] + [
        {"text": "zz", "x": "late", "n": 2.5, "l": [{"a": 1}]}, {"text": "", "n": None, "new": True}
    ]  # fmt: skip
    source = write(tmp_path / "in.jsonl", records)
    scored(small, source, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert [str(table.schema.field(name).type) for name in ("text", "x", "n", "new", "score", "n_steps", "error")] == (
        ["string", "string", "double", "bool", "double", "int64", "string"]
    )
    assert table["n"].to_pylist() == [1, 1, 1, 1, 2.5, None] and table["x"].to_pylist()[4] == "late"
    assert table["l"].to_pylist()[3:] == [[], [{"a": 1}], None] and table["new"].to_pylist() == [None] * 5 + [True]
    for value in ("text", 2**60 + 1, 2**70, {}):
        write(source, [*records, {"text": "a", "n": value}])
        with pytest.raises(
            ValueError, match=r"in\.jsonl, lines 7 to 7: column 'n' fits no|lines 1 to 2: column 'n' fits no"
        ):
            scored(small, source, tmp_path / "other.parquet")
    write(source, [{"text": "a", "n": {}}])
    with pytest.raises(ValueError, match="column 'n' fits no parquet column"):
        scored(small, source, tmp_path / "other.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.parquet"]


def test_parquet_keeps_types_and_metadata_that_json_has_not(small, tmp_path):  # noqa: F811
    columns = {
        "text": pa.array(["nabe", None], pa.large_string()), "when": pa.array([1, 2], pa.timestamp("ns")),
        "kind": pa.array(["x", "y"]).dictionary_encode(), "raw": pa.array([b"\xff", None]), "score": pa.array(["old", "old"]),
    }  # fmt: skip
    table = pa.table(columns).replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, tmp_path / "in.parquet")
    scored(small, tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(["text", "when", "kind", "raw"]).equals(table.drop_columns(["score"]))
    assert found.schema.metadata[b"huggingface"] == b"{}" and found["n_steps"].to_pylist() == [1, None]
    with pytest.raises(ValueError, match=r"column 'raw' is binary.*give an output that ends in \.parquet"):
        scored(small, tmp_path / "in.parquet", tmp_path / "out.jsonl")


@pytest.mark.parametrize("given", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("wanted", ["out.jsonl", "out.parquet"])
def test_nothing_in_nothing_out(small, tmp_path, given, wanted):  # noqa: F811
    source = tmp_path / given
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), source) if "parquet" in given else source.touch()
    assert scored(small, source, tmp_path / wanted) == [] and read(tmp_path / wanted) == []


def test_all_broken(small, tmp_path):  # noqa: F811
    source = tmp_path / "in.jsonl"
    source.write_text("x\ny\n")
    assert len(scored(small, source, tmp_path / "out.parquet")) == 2
    assert [row["score"] for row in read(tmp_path / "out.parquet")] == [None, None]


def test_batches_are_of_similar_lengths_within_the_budget_and_windows_bounded(small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(batch, "WINDOW_ROWS", 64)
    model, source = Watched(small), write(tmp_path / "in.jsonl", rows(120))
    scored(model, source, tmp_path / "out.jsonl", batch_tokens=256)
    assert sum(map(len, model.given)) == 150
    assert all(len(given) * max(given) <= 256 for given in model.given)
    padding = sum(len(given) * max(given) - sum(given) for given in model.given)
    assert padding < 0.12 * sum(map(sum, model.given))
    assert max(len(window) for window in batch.windows(files.Jsonl(source).records(batch.TO_SCORE))) == 64
    monkeypatch.setattr(batch, "WINDOW_TEXT", 500)
    for window in batch.windows(files.Jsonl(source).records(batch.TO_SCORE)):
        assert sum(len(r.fields["prompt"] + r.fields["response"]) for r in window) <= 500


def test_goes_on_where_it_was_interrupted(small, tmp_path):  # noqa: F811
    source, output = write(tmp_path / "in.jsonl", rows(40)), tmp_path / "out.jsonl"
    scored(small, source, tmp_path / "whole.jsonl", batch_tokens=300)
    first, second = Watched(small, calls=3), Watched(small)
    with pytest.raises(KeyboardInterrupt):
        scored(first, source, output, batch_tokens=300)
    assert not output.exists()
    scored(second, source, output, batch_tokens=300)
    assert len(first.given) == 3 and sum(map(len, first.given + second.given)) == 50
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def unfinished(small, source, output):  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        scored(Watched(small, calls=1), source, output, batch_tokens=100)


def test_what_another_run_has_left_is_refused_by_name(small, tmp_path):  # noqa: F811
    source, output = write(tmp_path / "in.jsonl", rows(20)), tmp_path / "out.jsonl"
    unfinished(small, source, output)
    other = write(tmp_path / "other.jsonl", rows(20, seed=1))
    with pytest.raises(ValueError, match=r"out\.jsonl\.unfinished holds .* \(input hash was .*--overwrite"):
        scored(small, other, output)
    changed = rf.ReflectiveModel(small.model, small.tokenizer, tiny.head(seed=1), small.config)
    with pytest.raises(ValueError, match=r"\(model was "):
        scored(changed, source, output)
    with pytest.raises(ValueError, match='command was "score", is "generate"'):
        batch.generate_file(lambda: small, source, output)
    scored(small, source, output, batch_tokens=1000)  # how fast, not what
    assert [row["id"] for row in read(output)] == [row["id"] for row in rows(20)]
    with pytest.raises(FileExistsError, match="is there already"):
        scored(small, source, output)
    before = read(output)
    for model, given in ((small, other), (changed, other)):
        unfinished_again = Watched(model, calls=1)
        with pytest.raises(KeyboardInterrupt):
            scored(unfinished_again, given, output, batch_tokens=100, replace=True)
        assert read(output) == before
    scored(changed, other, output)  # that the output may be replaced was said when the run began
    assert [row["response"] for row in read(output)] == [row["response"] for row in read(other)]


def test_files_that_cannot_be_used_are_refused_before_the_model_is_loaded(tmp_path):
    source = write(tmp_path / "in.jsonl", rows(4))
    table = write(tmp_path / "in.parquet", [{"a": "x"}])
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "foreign.jsonl.unfinished").write_text("some text that is no database " * 100)
    for given, output, error, message in (
        (source, tmp_path, IsADirectoryError, "is a directory"),
        (source, tmp_path / "none" / "out.jsonl", OSError, "cannot be written"),
        (source, Path("/proc/out.jsonl"), OSError, "cannot be written"),
        (source, tmp_path / "foreign.jsonl", OSError, "cannot be written: file is not a database"),
        (source, source, ValueError, "is the input"),
        (table, tmp_path / "out.parquet", ValueError, r"expected one of the columns text, .*; found a"),
        (tmp_path / "bad.parquet", tmp_path / "out.parquet", ValueError, "is no parquet file"),
        (tmp_path / "none.jsonl", tmp_path / "out.jsonl", FileNotFoundError, "none.jsonl"),
    ):
        with pytest.raises(error, match=message):
            batch.score_file(lambda: 1 / 0, given, output, replace=True)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_directory_that_is_read_only(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "in.jsonl", rows(4))
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        try:
            if root:  # who may write anywhere
                os.seteuid(65534)
            with pytest.raises(OSError, match=r"out\.jsonl\.unfinished cannot be written"):
                batch.score_file(lambda: 1 / 0, source, Path(folder) / "out.jsonl")
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_two_processes_do_not_work_on_one_output(tmp_path):
    output = tmp_path / "out.jsonl"
    code = "import sys; from pathlib import Path; from reflective.batch.journal import Journal; Journal(Path(sys.argv[1]), False)"
    with Journal(output, False):
        done = subprocess.run([sys.executable, "-c", code, output], capture_output=True, text=True, check=False)
    assert "another process is at work" in done.stderr
    assert subprocess.run([sys.executable, "-c", code, output], check=False).returncode == 0


def test_an_input_that_changes_meanwhile(small, tmp_path):  # noqa: F811
    source, output = write(tmp_path / "in.jsonl", rows(20)), tmp_path / "out.jsonl"

    def load():
        write(source, rows(19))
        return small

    with pytest.raises(ValueError, match="was changed while"):
        batch.score_file(load, source, output)
    assert not output.exists()


def test_a_row_at_which_the_model_fails_does_not_spoil_its_batch(tmp_path):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=32, eos_token_id=1)
    settings = rf.model.Config(rule="text", delimiter=["a"], prompt="{question}")
    model = rf.ReflectiveModel(AutoModelForCausalLM.from_config(config).eval(), tokenizer, tiny.head(), settings)
    texts = ["ba" * (8 + i) for i in range(12)]  # 18 to 38 tokens, of which 32 have positions
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    told = scored(model, source, tmp_path / "out.jsonl", batch_tokens=10_000)
    assert [line.split(":")[0] for line in told] == ["line 10", "line 11", "line 12"]
    assert [row["n_steps"] for row in read(tmp_path / "out.jsonl")] == [7 + i for i in range(9)] + [None] * 3


def test_a_hidden_state_that_is_not_finite_is_that_rows_error(small, tmp_path):  # noqa: F811
    net = type(small.model)(small.model.config).eval()
    net.load_state_dict(small.model.state_dict())
    with torch.no_grad():
        net.get_input_embeddings().weight[small.tokenizer("X").input_ids[0]] = math.nan
    model = rf.ReflectiveModel(net, small.tokenizer, small.head, small.config)
    source = write(tmp_path / "in.jsonl", [{"text": t} for t in ("nabe", "naXe", "nice")])
    (told,) = scored(model, source, tmp_path / "out.jsonl")
    assert told.startswith("line 2: the hidden state at column")
    assert [row["score"] is None for row in read(tmp_path / "out.jsonl")] == [False, True, False]
    with pytest.raises(ValueError, match="hidden"):
        scored(rf.ReflectiveModel(net, small.tokenizer, rf.SPRM(32), small.config), source, tmp_path / "other.jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_input(small, tmp_path, monkeypatch, suffix):  # noqa: F811
    monkeypatch.setattr(batch, "WINDOW_ROWS", 256)
    monkeypatch.setattr(files, "PIECE_BYTES", 1 << 20)

    def peak(n):
        source = tmp_path / f"{n}{suffix}"
        records = [{"text": "nabe", "more": f"{i:08}" * 3000} for i in range(n)]
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(records), source, row_group_size=500, use_dictionary=False)
        else:
            write(source, records)
        del records
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        scored(small, source, tmp_path / f"out-{n}{suffix}")
        return (status("VmHWM") - before) >> 20

    peak(100)
    assert peak(4000) < 45, "MiB, of an input of 92 MiB"


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def test_a_pipe_is_scored_as_it_comes(small):  # noqa: F811
    reader, writer = os.pipe()
    os.write(writer, b'{"text": "nabe"}\n\n{"text": "na')
    arrivals = batch.arriving(f"/dev/fd/{reader}")
    assert [r.number for r in next(arrivals)] == [1]
    os.write(writer, b'de"}\nbroken\n{"text": "last"}')
    assert [(r.number, r.fault is None) for r in next(arrivals)] == [(3, True), (4, False)]
    os.close(writer)
    rest = list(arrivals)
    assert [r.fields for window in rest for r in window] == [{"text": "last"}] and rest[0][0].number == 5
    out, told = io.BytesIO(), []
    records = list(batch.read_lines([b'{"text": "nabe"}', b"[1]", b'{"text": "zzz"}']))
    assert batch.score_stream(lambda: small, [records[:2], records[2:]], out, report=told.append) == 1
    assert told == ["line 2: expected an object, found list"]
    assert [json.loads(line)["n_steps"] for line in out.getvalue().splitlines()] == [1, None, 0]


def test_the_time_left_is_told_from_tokens():
    with Meter("score", total=100, before=20) as meter:
        meter.expect(40, 4000)
        meter.advance(30, 1000)  # the shorter ones
        meter._began -= 10 - meter._seconds()
        assert str(meter).startswith("50 of 100 rows, 3.0 rows/s, 100 tokens/s, 0:01:10 left")


# -- generate ----------------------------------------------------------------------------------------------------------


SETTINGS = {"n": 3, "max_new_tokens": 12, "temperature": 1.0, "seed": 5}


def answered(model, source, output, **settings):
    told = []
    batch.generate_file(lambda: model, source, output, report=told.append, **{**SETTINGS, **settings})
    return told


@pytest.mark.parametrize("given", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("wanted", ["out.jsonl", "out.parquet"])
def test_questions_are_answered_as_each_is_alone(small, tmp_path, given, wanted):  # noqa: F811
    questions = [
        {"question": q, "answer": str(i), "level": i} for i, q in enumerate(["a?", "中文?", "a?", "long " * 9, "e"])
    ]
    source = write(tmp_path / given, questions)
    assert answered(small, source, tmp_path / wanted, together=3) == []
    found = read(tmp_path / wanted)
    assert [{k: row[k] for k in questions[0]} for row in found] == questions
    assert len({row["seed"] for row in found}) == 5 and found[0]["text"] != found[2]["text"]
    for number, row in enumerate(found, 1):
        assert row["seed"] == batch.seed_of(5, number)
        alone = small.generate(row["question"], **{**SETTINGS, "seed": row["seed"]})
        assert [c["token_ids"] for c in row["candidates"]] == [c.token_ids for c in alone.candidates]
        assert row["text"] == alone.text == row["candidates"][row["best"]]["text"]
        assert row["score"] == pytest.approx(alone.score, rel=1e-5) and row["tokens"] == alone.tokens
        assert row["candidates"][0].keys() == dataclasses.asdict(alone.best).keys()
    answered(small, source, tmp_path / "single.jsonl", together=1)
    assert [r["text"] for r in read(tmp_path / "single.jsonl")] == [r["text"] for r in found]


def test_rows_without_a_question(small, tmp_path):  # noqa: F811
    chat = [{"role": "user", "content": "a?"}]
    lines = [
        {"prompt": chat},
        {"question": " "},
        {"problem": "a?"},
        {"prompt": chat * 2},
        5,
        {"question": None, "prompt": "a?"},
    ]
    told = answered(small, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    assert [line.split(":")[0] for line in told] == ["line 2", "line 4", "line 5"]
    found = read(tmp_path / "out.jsonl")
    assert [row["text"] is None for row in found] == [False, True, False, True, True, False]
    assert found[1]["error"] == "expected a question, prompt or problem: a text, or one user message"


def test_answers_go_on_with_the_seed_that_was_drawn(small, tmp_path):  # noqa: F811
    source, output = write(tmp_path / "in.jsonl", [{"question": f"{i}?"} for i in range(6)]), tmp_path / "out.jsonl"

    class Stopped(Watched):
        def generate(self, questions, **settings):
            found = super().generate(questions, **settings)
            self.given.append(questions)
            return [dataclasses.replace(f, interrupted=len(self.given) == 2) for f in found]

    with pytest.raises(KeyboardInterrupt):
        answered(Stopped(small), source, output, together=2, seed=None)
    rest = Stopped(small)
    rest.given = [None, None]
    with pytest.raises(ValueError, match=r"\(seed was \d+, is 1\)"):
        answered(rest, source, output, together=2, seed=1)
    with pytest.raises(ValueError, match=r"\(strategy was .*n=3.* is .*n=2"):
        answered(rest, source, output, together=2, seed=None, n=2)
    answered(rest, source, output, together=2, seed=None)
    assert rest.given[2:] == [["2?", "3?"], ["4?", "5?"]]
    found = read(output)
    assert len({row["seed"] for row in found}) == 6
    for row in found:
        alone = small.generate(row["question"], **{**SETTINGS, "seed": row["seed"]})
        assert row["text"] == alone.text


def test_settings_are_judged_before_the_first_question(small, tmp_path):  # noqa: F811
    source = write(tmp_path / "in.jsonl", [{"question": "a?"}])
    for settings, message in (
        ({"n": 0}, "n=0"), ({"strategy": "none"}, "strategy='none'"), ({"top_p": 2.0}, "top_p"), ({"effort": "x"}, "effort"),
        ({"thinking_budget": 5}, "think_end"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            answered(small, source, tmp_path / "out.jsonl", **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    ("kind", "given", "wanted", "points"),
    [("score", "in.jsonl", "out.jsonl", 12), ("score", "in.parquet", "out.parquet", 8), ("generate", "in.jsonl", "out.parquet", 8)],
)  # fmt: skip
def test_killed_at_any_point(small, tmp_path, kind, given, wanted, points):  # noqa: F811
    small.save_pretrained(tmp_path / "model")
    records = rows(12) if kind == "score" else [{"question": f"{i}?"} for i in range(5)]
    if given == "in.jsonl":
        records.insert(3, {"nothing": "here"})
    source = write(tmp_path / given, records)
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, script, tmp_path / "model", kind, source, tmp_path / wanted, str(points)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=tiny.PATIENCE)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["killed"]) >= points + 10 and report["in a row"] > 1
