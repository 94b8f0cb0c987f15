"""What SECURITY.md promises of checkpoints, files and requests of somebody else's, where no other test holds it; and that it names tests
that there are."""

import json
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
from test_model import small  # noqa: F401 (a fixture)

import reflective as rf
from reflective.checkpoints.config import Config
from reflective.checkpoints.hub import model_directory
from reflective.search.text import Reader, Watch
from reflective.utils import patterns

ROOT = Path(__file__).parents[1]
ENDLESS = r"(a|aa)+$"  # on 60 a and one b there are 10^12 ways to try
TEXT = "a" * 60 + "b"


@pytest.fixture
def checkpoint(small, tmp_path):  # noqa: F811
    small.save_pretrained(tmp_path)
    return tmp_path


def change(file, **given):
    said = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**said, **given}), encoding="utf-8")


@pytest.mark.parametrize("which", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_for(checkpoint, monkeypatch, tmp_path, which):
    """Also on a terminal, where transformers would ask, and somebody would say yes."""
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change(checkpoint / which, auto_map=auto, model_type="evil", tokenizer_class="Evil")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    try:
        rf.ReflectiveModel.from_pretrained(checkpoint)
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "evil" in str(error)
    assert not asked and not (tmp_path / "ran").exists() and "evil" not in sys.modules


@pytest.mark.parametrize(
    "given",
    [
        {"attn_implementation": "org/kernel"},
        {"_" + "attn_implementation": "org/kernel:fast"},
        {"text_config": {"attn_implementation": "org/kernel"}},
        {"attn_implementation": {"text": "org/kernel"}},
        {"experts_implementation": "org/kernel"},
    ],
)
def test_kernels_of_the_hub_are_refused(checkpoint, given):
    """transformers would load them by a configuration's word, where the kernels package is installed."""
    change(checkpoint / "config.json", **given)
    for open_ in (rf.ReflectiveModel.from_pretrained, model_directory):
        with pytest.raises(ValueError, match=r"config\.json: \w+_implementation is 'org/kernel.*compiled code from the Hub"):
            open_(checkpoint)
    name = next(iter(given))
    if name != "text_config":
        change(checkpoint / "config.json", **{name: "eager"})
        rf.ReflectiveModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"answer": "no group"}, "has no group"),
        ({"answer": "(unclosed"}, "is no regular expression"),
        ({"answer": "(" * 50_000}, "answer: an expression of 50000 characters"),
        ({"stop": "a{99999999999999999999}b"}, "is no regular expression"),
        ({"stop": 5}, "stop: expected a text"),
        ({"prompt": ["{question}"]}, "prompt: expected a text"),
        ({"delimiter": {"a": 1}}, "delimiter: expected"),
        ({"delimiter": [1]}, "delimiter: expected"),
        ({"steps": "all"}, "steps: expected an object"),
        ({"head": 1}, "head: expected an object"),
        ({"rule": None}, "rule: expected a text"),
        ({"__class__": "os.system"}, "unexpected keyword argument"),
        ("[" * 100_000, "not a valid"),
        ([], "not a valid"),
    ],
)
def test_a_hostile_reflective_json_is_refused_by_name(tmp_path, given, why):
    file = tmp_path / "reflective.json"
    file.write_text(given if isinstance(given, str) else json.dumps(given))
    with pytest.raises(ValueError, match="not a valid") as error:
        Config.read(file)
    assert why in str(error.value) and str(file) in str(error.value)


def test_a_question_cannot_reach_into_the_prompt(tmp_path):
    """The prompt is no format string: neither of them is evaluated."""
    file = tmp_path / "reflective.json"
    file.write_text(json.dumps({"prompt": "{question.__class__} {0} {question}"}))
    model = rf.ReflectiveModel.__new__(rf.ReflectiveModel)
    model.config, model.tokenizer = Config.read(file), None
    assert model.format("{question} {0.__class__}") == "{question.__class__} {0} {question} {0.__class__}"


def test_a_long_stop_of_ones_own_is_no_checkpoint_s_pattern(small):  # noqa: F811
    ends, began = "x" * 5000, time.process_time()
    assert not Watch(Reader(small.tokenizer), [ends]).complete(small.tokenizer("x" * 4999).input_ids, None)
    assert Watch(Reader(small.tokenizer), [ends]).complete(small.tokenizer(ends).input_ids, None)
    assert time.process_time() - began < 5, "28 s as a pattern"


@pytest.mark.parametrize("which", ["answer", "stop"])
def test_a_pattern_that_backtracks_without_end_is_given_up(small, which, monkeypatch):  # noqa: F811
    monkeypatch.setattr(patterns, "_given_up", set())
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    tokens = small.tokenizer(TEXT, add_special_tokens=False).input_ids
    watch = Watch(Reader(small.tokenizer, stop=ENDLESS))
    monkeypatch.setattr(watch, "_tail", 100)
    began = time.monotonic()
    with pytest.warns(UserWarning, match=r"\(a\|aa\)\+\$.*is not used any more"):
        found = Reader(small.tokenizer, pattern=ENDLESS).answer(TEXT) if which == "answer" else watch.complete(tokens, 0)
    assert not found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1000):  # not tried again
            assert patterns.search(ENDLESS, TEXT) is None
    assert time.monotonic() - began < tiny.PATIENCE
    assert patterns.search(r"(a+)b", TEXT).group(1) == "a" * 60, "others are"


def test_patterns_are_read_as_before(small):  # noqa: F811
    reader = Reader(small.tokenizer, pattern=r"(?s)answer is ([^\n]*?)\.?\s*(?:\n|$)|x(y)?")
    assert reader.answer("The answer is 22.\n\n") == "22" and reader.answer("nothing") is None
    assert Reader(small.tokenizer, pattern="x(y)?").answer("x") is None, "a group that took no part"


def test_head_and_optimizer_states_are_unpickled_as_tensors_alone():
    """Every torch.load in the package says weights_only=True, and nothing else unpickles but what Ray carries between its own processes."""
    for file in (ROOT / "reflective").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call, file
        assert "pickle.load" not in text or file.name == "cluster.py", file
        assert "trust_remote_code=True" not in text and "allow_all_kernels" not in text, file
        assert not re.search(r"\bos\.system\(|shell=True|\bmarshal\b|\bshelve\b|yaml\.(?:unsafe_)?load\(", text), file


def test_a_file_of_rows_is_data(tmp_path, small, capsys):  # noqa: F811
    """Names of columns and values that look like code, markup or paths stay texts."""
    from reflective import batch

    rows = [{"text": "a e n", "__reduce__": "os.system", "../x": "<script>"}, {"text": "__import__('os').mkdir('ran') a e"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch.score_file(lambda: small, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found[0]["../x"] == "<script>" and found[0]["__reduce__"] == "os.system"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_a_strategy_beside_a_head_may_hold(checkpoint):
    """Rules are numbers in JSON; another type is refused by name."""
    model = rf.ReflectiveModel.from_pretrained(checkpoint)
    for content, why in (
        ('{"threshold": "__import__"}', "threshold: expected a number"),
        ('{"threshold": 0.5, "n": 1000000000}', "n=1000000000: expected 1 to 4096"),
        ('{"threshold": 0.5, "chooser": "rpc"}', "unknown chooser"),
        ("[" * 100_000, "not a valid"),
        ("[]", "expected an object"),
    ):
        (checkpoint / "prune.json").write_text(content)
        with pytest.raises(ValueError, match=r"prune\.json is not a valid") as error:
            model.generate("x", n=2, max_new_tokens=4, strategy="prune")
        assert why in str(error.value)


# -- the server ------------------------------------------------------------------------------------------------------------

PAGE = {"User-Agent": "Mozilla/5.0"}


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({}, "/score", 200),  # a program
        ({"Host": "proxy.example.org"}, "/score", 200),  # a program behind a proxy
        ({"Origin": "{url}"}, "/score", 200),  # the server's own page
        ({"Origin": "https://evil.example"}, "/score", 403),  # another page
        ({"Origin": "null"}, "/score", 403),  # a file, or a sandbox
        ({"Origin": "http://evil.example", "Host": "evil.example"}, "/score", 403),  # whose name was pointed at this machine
        ({**PAGE, "Host": "evil.example"}, "/v1/models", 403),
        ({**PAGE}, "/v1/models", 200),
        ({**PAGE, "Host": "localhost:8000"}, "/v1/models", 200),
        ({"Sec-Fetch-Site": "same-origin", "Host": "evil.example:8000"}, "/metrics", 403),
        ({"Content-Type": "text/plain"}, "/score", 400),  # what a page may send without being asked
    ],
)
def test_pages_of_others_cannot_use_a_server_without_a_key(headers, path, status):
    from test_search import reflective_model
    from test_serve import live

    with live(reflective_model()) as server:
        given = {name: value.format(url=server.url) for name, value in headers.items()}
        if path == "/score":
            answer = server.http.post(path, content=b'{"text": "A"}', headers={"Content-Type": "application/json", **given})
        else:
            answer = server.http.get(path, headers=given)
        assert answer.status_code == status or (status == 400 and answer.status_code in (400, 415, 422)), answer.text
        assert "access-control-allow-origin" not in answer.headers
        if status == 403:
            assert "api_key" in answer.json()["error"]["message"]


def test_with_a_key_it_is_the_key_that_counts():
    from test_search import reflective_model
    from test_serve import live

    with live(reflective_model(), api_key="secret") as server:
        headers = {"Origin": "https://mine.example", "Authorization": "Bearer secret"}
        assert server.http.post("/score", json={"text": "A"}, headers=headers).status_code == 200
        assert server.http.post("/score", json={"text": "A"}, headers={"Origin": server.url}).status_code == 401


def test_a_failure_tells_no_code(monkeypatch):
    """The type and the message, and neither a traceback nor a path of the source."""
    from test_search import reflective_model
    from test_serve import live

    with live(reflective_model()) as server:
        answer = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "A"}], "max_tokens": -1})
        assert answer.status_code == 400 and "Traceback" not in answer.text and ".py" not in answer.text


# -- the document ----------------------------------------------------------------------------------------------------------


def test_every_claim_names_a_test_that_there_is():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    known = {
        f"{file.name}::{name}"
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"(?m)^(?:async )?def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    named = re.findall(r"`(test_\w+\.py::test_\w+)`", text)
    assert len(named) > 15 and set(named) <= known, set(named) - known
    for path in re.findall(r"`((?:reflective|docs)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path


def test_the_citation_is_valid_and_says_what_the_package_says():
    cffconvert = pytest.importorskip("cffconvert")
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    citation = cffconvert.Citation(text, src="CITATION.cff")
    citation.validate()
    assert f"version: {rf.__version__}" in text and "2507.01951" in text


