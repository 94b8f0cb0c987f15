"""Batch work: files of any size, killed at any point, scored and answered as one row alone is."""

import bz2
import codecs
import dataclasses
import functools
import gzip
import io
import json
import lzma
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from forked import error_of
from test_model import byte_tokenizer, small  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, GPT2Config

import reflective as rf
from reflective import batch
from reflective.batch import score
from reflective.batch.journal import Journal
from reflective.batch.progress import Meter
from reflective.utils import records as files

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
    monkeypatch.setattr(files.json_file, "PIECE_ROWS", 2)
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
    monkeypatch.setattr(score, "WINDOW_ROWS", 64)
    model, source = Watched(small), write(tmp_path / "in.jsonl", rows(120))
    scored(model, source, tmp_path / "out.jsonl", batch_tokens=256)
    assert sum(map(len, model.given)) == 150
    assert all(len(given) * max(given) <= 256 for given in model.given)
    padding = sum(len(given) * max(given) - sum(given) for given in model.given)
    assert padding < 0.12 * sum(map(sum, model.given))
    assert max(len(window) for window in batch.windows(files.Json(source).records(score.TO_SCORE))) == 64
    monkeypatch.setattr(score, "WINDOW_TEXT", 500)
    for window in batch.windows(files.Json(source).records(score.TO_SCORE)):
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
            codecs.lookup("utf-8-sig")  # Python remembers it as unknown if its library is root's alone
            if root:  # who may write anywhere
                os.seteuid(65534)
            with pytest.raises(OSError, match=r"out\.jsonl cannot be written: the folder .* is read-only"):
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
    monkeypatch.setattr(score, "WINDOW_ROWS", 256)
    for module in (files.json_file, files.parquet_file):
        monkeypatch.setattr(module, "PIECE_BYTES", 1 << 20)

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


# -- forms -------------------------------------------------------------------------------------------------------------


RECORDS = [{"text": "nab", "id": 1}, {"text": "中 \u2028 e", "more": {"x": [1e300, None]}}, {"text": "zz"}]
packed = functools.partial(gzip.compress, mtime=0)  # also a test's name: the same in every worker
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, ensure_ascii=False).encode()
PRETTY = json.dumps(RECORDS, indent=1).encode()


def zstd(content):
    return pa.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.JSONL", LINES), ("in.Jsonl", LINES), ("in.ndjson", LINES), ("in", LINES), ("in.txt", LINES), ("in.json", LINES),
        ("in.jsonl", codecs.BOM_UTF8 + LINES), ("in.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("in.jsonl", b"\n \n" + LINES.replace(b"\n", b"\n\r\n\t\n")), ("in.jsonl", LINES.rstrip()),
        *(("in.jsonl", LINES.decode().encode(code)) for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        ("in.jsonl.gz", packed(LINES)), ("in.jsonl", packed(LINES)), ("in.jsonl.gz", LINES),
        ("in.jsonl.gz", packed(LINES[:20]) + packed(LINES[20:])), ("in.JSONL.BZ2", bz2.compress(LINES)),
        ("in.jsonl.xz", lzma.compress(LINES)), ("in.jsonl.zst", zstd(LINES)), ("in.jsonl.zst", zstd(LINES[:9]) + zstd(LINES[9:])),
        ("in.json", ARRAY), ("in.json", PRETTY), ("in.jsonl", ARRAY), ("in.jsonl", PRETTY), ("in", PRETTY),
        ("in.json.gz", packed(codecs.BOM_UTF8 + ARRAY)), ("in.json", PRETTY.decode().encode("utf-16")),
        ("in.jsonl", b"\n".join(json.dumps(record, indent=2).encode() for record in RECORDS)),  # as jq writes them
    ],
)  # fmt: skip
def test_forms_that_are_read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    file = batch.open_file(path)
    assert [r.fields for r in file.records()] == RECORDS and len(file) == 3
    assert [r.fields for r in file.records(["id"])] == [{"id": 1}, {"id": None}, {"id": None}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"text,score\nab,1\n", r"in\.csv holds no JSON, but begins with 'text,.*read_csv\('in\.csv'\)\.to_parquet"),
        ("in.tsv", b"text\tscore\n", "holds no JSON"), ("in.txt", b"Question one\n", "holds no JSON"),
        ("in.zip", b"PK\x03\x04\x14\0", "is a zip archive, or a workbook"), ("in.jsonl", b"ARROW1\0\0", "is an Arrow file"),
        ("in.jsonl.lz4", b"\x04\x22\x4d\x18aaaa", "is packed by lz4"), ("in.jsonl", b"\0" * 99, "holds no JSON"),
        ("in.jsonl", b"\xff\xfe\0\0\0", r"in\.jsonl: .*can't decode"), ("in.parquet", LINES, "is no parquet file"),
        ("in.jsonl", b"PAR1" + LINES, "is no parquet file"), ("in.parquet.gz", packed(b"PAR1aaaa"), "unpack it"),
        ("in.jsonl.gz", packed(packed(LINES)), "is packed twice"),
        ("in.jsonl.gz", packed(LINES)[:-9], "packed by gzip, is broken: Compressed file ended"),
        ("in.jsonl.gz", packed(LINES)[:-8] + b"12345678", "packed by gzip, is broken: CRC check failed"),
        ("in.jsonl.bz2", bz2.compress(LINES)[:-9], "packed by bz2, is broken"),
        ("in.jsonl.xz", lzma.compress(LINES)[:-9], "packed by xz, is broken"),
        ("in.jsonl.zst", zstd(LINES * 99)[:-9], "packed by zstd, is broken"),
        ("in.json", b'[{"text": "a"}, {"text" "b"}]', r"in\.json: item 2 is no JSON: Expecting ':'"),
        ("in.json", b'[{"text": "a"},\n', "item 2: the array has no end"), ("in.json", b'[{"text": "a"', "item 1 is no JSON"),
        ("in.json", b'[{"text": "a"}] []', "something stands behind the array"), ("in.json", b'[{"a": 1},]', "item 2 is no"),
        ("in.json", b'[{"a": 1} {"a": 2}]', "item 1: expected , or ]"), ("in.json", b"[" * 100_000, "item 1 is no JSON"),
        ("in.jsonl", b'{\n "text": "a"\n}\n{"text": \n', "item 2 is no JSON"),
    ],
)  # fmt: skip
def test_forms_that_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        batch.score_file(lambda: 1 / 0, tmp_path / name, tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_value_that_is_read_in_pieces(tmp_path, monkeypatch):
    """Wherever an array is cut while it is read, as long as it is, and what is broken in it is found before all is read."""
    records = [{"text": "a\\" + '"' * n, "x": [True, 12.5e3, "\U0001f600\ud7ff"], "n": n} for n in range(12)]
    text = json.dumps(records)
    for buffer in (1, 2, 3, 7, 50):
        monkeypatch.setattr(files.values, "BUFFER", buffer)
        assert [r.fields for r in files.values.read_values(io.StringIO(text))] == records
        assert [r.fields for r in files.values.read_values(io.StringIO("\n".join(map(json.dumps, records))))] == records
    stream = io.StringIO('[{"a": 1}, {"a" 2}, ' + " " * 1_000_000)
    with pytest.raises(ValueError, match="item 2"):
        list(files.values.read_values(stream))
    assert stream.tell() < 1000


def test_what_is_no_file_to_read(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(LINES)
    os.mkfifo(tmp_path / "pipe")
    for name, error, message in (
        (".", IsADirectoryError, "source: .* is a directory; give a file in it"),
        ("*.jsonl", FileNotFoundError, "does not exist, and patterns are not expanded here; give one file"),
        ("none.jsonl", FileNotFoundError, "does not exist$"),
        ("pipe", OSError, "is no regular file, and is to be read more than once; save it into a file first"),
    ):
        with pytest.raises(error, match=message):
            batch.score_file(lambda: 1 / 0, tmp_path / name, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="format='csv'; expected jsonl or parquet"):
        files.open_file(tmp_path / "in.jsonl", format="csv")


@pytest.mark.parametrize(
    ("content", "found"),
    [pytest.param(packed(LINES), "gzip", id="gzip"), (b"PAR1", "parquet"), (LINES.decode().encode("utf-16"), "UTF-16"), (PRETTY, "several lines"),
     (b"PK\x03\x04", "a zip archive")],
)  # fmt: skip
def test_a_pipe_of_another_form_is_refused(tmp_path, content, found):
    (tmp_path / "pipe").write_bytes(content)
    with pytest.raises(ValueError, match=rf"pipe: expected JSON lines in UTF-8, found .*{found}"):
        next(batch.arriving(str(tmp_path / "pipe")))
    (tmp_path / "pipe").write_bytes(codecs.BOM_UTF8 + b"\r\n" + LINES)
    assert [r.fields for window in batch.arriving(str(tmp_path / "pipe")) for r in window] == RECORDS


@pytest.mark.parametrize(
    ("name", "read_back"),
    [
        ("out.JSONL", lambda data: [json.loads(line) for line in data.splitlines()]), ("out.json", json.loads),
        ("out.jsonl.gz", lambda data: [json.loads(line) for line in gzip.decompress(data).splitlines()]),
        ("out.json.bz2", lambda data: json.loads(bz2.decompress(data))),
        ("out.jsonl.xz", lambda data: [json.loads(line) for line in lzma.decompress(data).splitlines()]),
        ("out.jsonl.zst", lambda data: [json.loads(line) for line in pa.CompressedInputStream(io.BytesIO(data), "zstd").read().splitlines()]),
        ("out.PARQUET", lambda data: pq.read_table(io.BytesIO(data)).to_pylist()),
    ],
)  # fmt: skip
def test_forms_that_are_written(small, tmp_path, name, read_back):  # noqa: F811
    source = write(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS[2:]])
    for output in (tmp_path / name, tmp_path / f"again.{name}"):
        scored(small, source, output)
    found = read_back((tmp_path / name).read_bytes())
    assert [row["text"] for row in found] == TEXTS[2:] and [row["n_steps"] for row in found] == [0, 0, 3, 3]
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again.{name}").read_bytes()
    assert [r.fields["n_steps"] for r in batch.open_file(tmp_path / name).records()] == [0, 0, 3, 3]
    if "parquet" not in name.lower():
        with batch.replacing(tmp_path / f"stream.{name}") as file:
            batch.score_stream(lambda: small, [list(batch.open_file(source).records())], file, output=name)
        assert read_back((tmp_path / f"stream.{name}").read_bytes()) == found
        with batch.replacing(tmp_path / f"none.{name}") as file:
            batch.score_stream(lambda: small, [], file, output=name)
        assert list(batch.open_file(tmp_path / f"none.{name}").records()) == []


@pytest.mark.parametrize("name", ["out.csv", "out.xlsx", "out.parquet.gz", "out.tar.gz", "out.zip", "out.jsonl.lz4"])
def test_names_that_promise_another_form_are_refused(tmp_path, name):
    source = write(tmp_path / "in.jsonl", RECORDS)
    with pytest.raises(ValueError, match=r"output: .*is not written; give \.jsonl"):
        batch.score_file(lambda: 1 / 0, source, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_columns_of_every_type_of_text(small, tmp_path):  # noqa: F811
    texts = ["nabe", "zz", None]
    kinds = {
        "large": pa.array(texts, pa.large_string()), "dictionary": pa.array(texts).dictionary_encode(),
        "large dictionary": pa.array(texts, pa.large_string()).dictionary_encode(),
    }  # fmt: skip
    for kind, column in kinds.items():
        pq.write_table(pa.table({"text": column}), tmp_path / "in.parquet")
        scored(small, tmp_path / "in.parquet", tmp_path / "out.jsonl", replace=True)
        assert [row["n_steps"] for row in read(tmp_path / "out.jsonl")] == [1, 0, None], kind
    lists = [["nabe", "zz"], ["e"]]
    for kind in (
        pa.large_list(pa.string()),
        pa.list_(pa.large_string()),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
    ):
        column = pa.array(lists, pa.list_(pa.string()))
        column = column.cast(kind) if not pa.types.is_dictionary(kind.value_type) else pa.ListArray.from_arrays(
            column.offsets, column.values.dictionary_encode()
        )  # fmt: skip
        pq.write_table(pa.table({"question": ["a", "b"], "responses": column}), tmp_path / "in.parquet")
        scored(small, tmp_path / "in.parquet", tmp_path / "out.jsonl", replace=True)
        assert [row["n_steps"] for row in read(tmp_path / "out.jsonl")] == [[2, 0], [1]], kind
    for column in (pa.array([b"nabe"]), pa.array([b"nabe"]).dictionary_encode()):
        pq.write_table(pa.table({"text": column}), tmp_path / "in.parquet")
        with pytest.raises(ValueError, match="column 'text' is binary, and no text; cast it to strings"):
            scored(small, tmp_path / "in.parquet", tmp_path / "out.parquet")
        pq.write_table(pa.table({"text": ["a"], "raw": column}), tmp_path / "in.parquet")
        with pytest.raises(ValueError, match="column 'raw' is binary, which JSON cannot say"):
            scored(small, tmp_path / "in.parquet", tmp_path / "out.jsonl", replace=True)


# -- numbers that JSON has not -----------------------------------------------------------------------------------------


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("given", ["in.jsonl", "in.parquet"])
def test_json_comes_out_valid_whatever_numbers_go_in(small, tmp_path, given):  # noqa: F811
    numbers = [math.inf, -math.inf, math.nan, 1.5, None]
    records = [{"text": "nabe", "x": x, "deep": [{"y": [x, 2.0]}]} for x in numbers]
    source = write(tmp_path / given, records)
    if given == "in.jsonl":
        text = source.read_text().replace("-Infinity", "-1e999").replace('"x": Infinity', '"x": 1e999')
        assert "1e999" in text and "NaN" in text and "Infinity" in text
        source.write_text(text)
    for output in ("out.jsonl", "out.json"):
        scored(small, source, tmp_path / output)
    lines = [strict(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert lines == strict((tmp_path / "out.json").read_text())
    assert [row["x"] for row in lines] == [None, None, None, 1.5, None]
    assert [row["deep"][0]["y"] for row in lines] == [[x, 2.0] for x in (None, None, None, 1.5, None)]
    scored(small, source, tmp_path / "out.parquet")  # which has them
    assert str([row["x"] for row in read(tmp_path / "out.parquet")]) == str(numbers)
    out = io.BytesIO()
    batch.score_stream(lambda: small, [list(batch.open_file(source).records())], out)
    assert [strict(line)["x"] for line in out.getvalue().splitlines()] == [None, None, None, 1.5, None]


def test_half_a_surrogate_pair_in_bytes_is_that_rows_error(small, tmp_path):  # noqa: F811
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "nabe"}\n{"text": "\xed\xa0\x80"}\n')
    (told,) = scored(small, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert told.startswith("line 2: UnicodeDecodeError") and read(tmp_path / "out.jsonl")[0]["n_steps"] == 1


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs the files of Unix")
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.json.gz"])
def test_a_link_is_written_through_and_a_device_refused(small, tmp_path, name):  # noqa: F811
    source, place = write(tmp_path / "in.jsonl", rows(4)), tmp_path / "elsewhere" / f"target.{name}"
    place.parent.mkdir()
    link = tmp_path / name
    link.symlink_to(place)
    scored(small, source, link)  # it dangles
    with pytest.raises(FileExistsError, match="is there already"):
        scored(small, source, link)
    scored(small, source, link, replace=True)
    assert link.is_symlink() and not place.is_symlink()
    assert [r.fields["id"] for r in batch.open_file(place).records()] == [row["id"] for row in rows(4)]
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    link.unlink()
    link.symlink_to("/dev/null")
    for replace in (False, True):
        with pytest.raises(OSError, match="a link to /dev/null, is a device; give the name of a file") as refused:
            scored(small, source, link, replace=replace)
        assert "--overwrite" not in str(refused.value)
    link.unlink()
    link.symlink_to(source)
    with pytest.raises(ValueError, match="is the input"):
        scored(small, source, link, replace=True)


def test_two_runs_on_one_output_by_two_names(small, tmp_path):  # noqa: F811
    source, output = write(tmp_path / "in.jsonl", rows(20)), tmp_path / "out.jsonl"
    (tmp_path / "link.jsonl").symlink_to(output)
    with Journal(output, False), pytest.raises(OSError, match=r"out\.jsonl\.unfinished: another process is at work"):
        scored(small, source, tmp_path / "link.jsonl")
    with (
        batch.replacing(output, keep=True),
        pytest.raises(OSError, match="another process is at work on this output"),
        batch.replacing(tmp_path / "link.jsonl", keep=True),
    ):
        pass
    output.unlink()
    unfinished(small, source, output)
    again = Watched(small)
    scored(again, source, tmp_path / "link.jsonl", batch_tokens=100)  # goes on, by whatever name
    assert [row["id"] for row in read(output)] == [row["id"] for row in rows(20)]
    assert 0 < sum(map(len, again.given)) < 25


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_full_disk_loses_nothing_that_is_done(small, tmp_path, name):  # noqa: F811
    """Full, by a limit of the size of files, when the journal grows, and when the output is written."""
    records = [{**record, "more": "x" * 2000 + str(i)} for i, record in enumerate(rows(40))]
    source, output, journal = write(tmp_path / "in.jsonl", records), tmp_path / name, tmp_path / f"{name}.unfinished"
    scored(small, source, tmp_path / f"whole.{name}", batch_tokens=200)
    if name == "out.parquet":  # small, as what it holds is alike: a limit that the journal keeps to, and this does not
        source = write(
            tmp_path / "in.jsonl",
            [{**r, "more": random.Random(i).randbytes(1000).hex()} for i, r in enumerate(rows(40))],
        )
        scored(small, source, tmp_path / f"whole.{name}", batch_tokens=200, replace=True)

    def limited(size):
        """The error of a run in a process whose files may have ``size`` bytes."""

        def run():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            batch.score_file(lambda: small, source, output, batch_tokens=200, report=lambda text: None)

        return error_of(run)

    said = limited(20_000)
    assert said.startswith(f"OSError: {journal} cannot be written: ") and "the same command goes on there" in said, said
    with Journal(output, False) as kept:
        done = kept.count()
    assert 0 < done < 50 and not output.exists()
    said = limited(50_000)
    assert said.startswith(
        f"OSError: output: {output} cannot be written: File too large; what is done is kept in {journal}"
    ), said
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.jsonl", journal.name, f"whole.{name}"])
    again = Watched(small)
    scored(again, source, output, batch_tokens=200)
    assert not again.given and output.read_bytes() == (tmp_path / f"whole.{name}").read_bytes()


def test_a_cell_of_a_million_characters_is_that_rows_error(small, tmp_path):  # noqa: F811
    """Of a text as of a question, and of one of many responses; the rest is done, in memory that is bounded."""
    long = "abcdefgh " * 111_112
    source = write(
        tmp_path / "in.jsonl",
        [{"text": "nabe"}, {"text": long}, {"prompt": "Q", "responses": ["e", long]}, {"text": "zz"}],
    )
    Path("/proc/self/clear_refs").write_text("5") if sys.platform == "linux" else None
    before = status("VmRSS") if sys.platform == "linux" else 0
    told = scored(small, source, tmp_path / "out.jsonl")
    assert [line.split(":")[0] for line in told] == ["line 2", "line 3, response 2"]
    assert told[0].endswith("with its prompt 1,000,008 tokens, more than the model's 512 positions")
    if sys.platform == "linux":
        assert (status("VmHWM") - before) >> 20 < 1000, "MiB, of which the tokenizer takes the most"
    assert [row["n_steps"] for row in read(tmp_path / "out.jsonl")] == [1, None, [0, None], 0]
    assert read(tmp_path / "out.jsonl")[1]["text"] == long
    source = write(tmp_path / "ask.jsonl", [{"question": "a?"}, {"question": long}, {"question": "b?"}])
    told = answered(small, source, tmp_path / "answers.jsonl")
    assert (
        len(told) == 1
        and told[0].startswith("line 2: the prompt has 1,000,0")
        and "the model's 512 positions" in told[0]
    )
    assert [row["text"] is None for row in read(tmp_path / "answers.jsonl")] == [False, True, False]


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
        assert row["candidates"][0].keys() == alone.best.record().keys()
    answered(small, source, tmp_path / "single.jsonl", together=1)
    assert [r["text"] for r in read(tmp_path / "single.jsonl")] == [r["text"] for r in found]


def test_settings_of_sampling_are_those_of_generate_and_belong_to_a_run(small, tmp_path):  # noqa: F811
    source, output = write(tmp_path / "in.jsonl", [{"question": f"{i}?"} for i in range(3)]), tmp_path / "out.jsonl"
    settings = {
        "temperature": [1.0, 0.0], "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.3, "presence_penalty": 0.5,
        "frequency_penalty": 0.2, "logit_bias": {7: 2.0}, "min_tokens": 3,
    }  # fmt: skip
    answered(small, source, output, **settings)
    for row in read(output):
        alone = small.generate(row["question"], **{**SETTINGS, **settings, "seed": row["seed"]})
        assert [c["token_ids"] for c in row["candidates"]] == [c.token_ids for c in alone.candidates]

    class Stopped(Watched):
        def generate(self, questions, **settings):
            if self.given:
                raise KeyboardInterrupt
            self.given.append(questions)
            return super().generate(questions, **settings)

    with pytest.raises(KeyboardInterrupt):
        answered(Stopped(small), source, tmp_path / "half.jsonl", together=1)
    with pytest.raises(ValueError, match=r"\(top_k was 0, is 9\)"):
        answered(small, source, tmp_path / "half.jsonl", together=1, top_k=9)


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
        ({"thinking_budget": 5}, "think_end"), ({"min_p": 2}, "min_p=2"), ({"logit_bias": {10**6: 1}}, "1000000 is no token"),
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
