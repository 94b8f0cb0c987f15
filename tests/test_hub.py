"""Repositories: downloaded from, and uploaded to, a server that speaks the Hub's protocol; offline; heads saved as such.

The client reads its environment when it is imported, so what talks to the server runs in a process of its own.
"""

import base64
import fcntl
import hashlib
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from test_checkpoints import XBAI, publish
from transformers import AutoModelForCausalLM

import reflective as rf
from reflective import hub
from reflective.checkpoints.default import HEAD as SHIPPED
from reflective.search.strategies.auto import Auto
from reflective.search.strategies.exit import Exit
from reflective.search.strategies.select import Select
from reflective.train.settings import Settings


class Hub(ThreadingHTTPServer):
    """Serves ``repositories[name][revision]``, directories, as huggingface.co does; ``log`` has every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.gated, self.private, self.log = {}, set(), set(), []
        self.url, self.cdn = (f"http://{host}:{self.server_address[1]}" for host in ("127.0.0.1", "localhost"))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, name, path, revision="main"):
        self.repositories.setdefault(name, {})[revision] = path

    def sha(self, name, revision):
        return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, code):
        self.answer(status, {"error": code}, X_Error_Code=code)

    def found(self, name, revision):
        """``(directory, commit)``, or None once the error is sent."""
        server = self.server
        if name not in server.repositories:
            return self.error(401, "RepoNotFound")
        if name in server.private and self.headers["Authorization"] != "Bearer good":
            return self.error(404, "RepoNotFound")
        revisions = server.repositories[name]
        for key, path in revisions.items():
            if revision in (key, server.sha(name, key)):
                return path, server.sha(name, key)
        return self.error(404, "RevisionNotFound")

    def do_GET(self):
        url = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, url))
        match url.strip("/").split("/"):
            case ["api", "models", org, name, "revision", revision]:
                if place := self.found(f"{org}/{name}", revision):
                    self.answer(body={"id": f"{org}/{name}", "sha": place[1], "siblings": []})
            case ["api", "models", org, name, "tree", revision]:
                if place := self.found(f"{org}/{name}", revision):
                    self.answer(body=[self.entry(f, place[0]) for f in sorted(place[0].rglob("*")) if f.is_file()])
            case [org, name, "resolve", revision, *file]:
                if place := self.found(f"{org}/{name}", revision):
                    self.resolve(f"{org}/{name}", place, "/".join(file))
            case [digest]:
                files = (f for r in self.server.repositories.values() for p in r.values() for f in p.rglob("*"))
                self.file(next(f for f in files if f.is_file() and sha256(f) == digest))
            case _:
                self.error(404, "EntryNotFound")

    do_HEAD = do_GET

    def entry(self, file, path):
        entry = {
            "type": "file",
            "oid": blob(file),
            "size": file.stat().st_size,
            "path": file.relative_to(path).as_posix(),
        }
        if large(file):
            entry["lfs"] = {"oid": sha256(file), "size": entry["size"], "pointerSize": 134}
        return entry

    def resolve(self, name, place, path):
        file, commit = place[0] / path, {"X_Repo_Commit": place[1]}
        if name in self.server.gated:
            self.error(403, "GatedRepo")
        elif not file.is_file():
            self.error(404, "EntryNotFound")
        elif large(file):
            linked = {"X_Linked_Etag": f'"{sha256(file)}"', "X_Linked_Size": file.stat().st_size}
            self.answer(302, Location=f"{self.server.cdn}/{sha256(file)}", **linked, **commit)
        else:
            self.file(file, ETag=f'"{blob(file)}"', **commit)

    def file(self, file, **headers):
        self.answer(body=file.read_bytes(), **{"ETag": f'"{sha256(file)}"', **headers})

    def do_POST(self):
        url = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, url))
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        match url.strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                self.server.add(name, Path(self.server.uploads, asked["name"]))
                self.answer(body={"url": f"{self.server.url}/{name}", "name": name})
            case ["api", "validate-yaml"]:
                head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
                wrong = [] if isinstance(head.get("license", ""), str) and head["library_name"] else ["front matter"]
                self.answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer(body={"files": files})
            case ["api", "models", org, name, "commit", revision]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        file = self.server.repositories[f"{org}/{name}"]["main"] / line["value"]["path"]
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(base64.b64decode(line["value"]["content"]))
                sha = self.server.sha(f"{org}/{name}", revision)
                self.answer(body={"commitUrl": f"{self.server.url}/{org}/{name}/commit/{sha}", "commitOid": sha})
            case _:
                self.error(404, "EntryNotFound")

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()


def large(file):
    return file.suffix in (".safetensors", ".bin", ".pt")


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def blob(file):
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Directory of a whole checkpoint in the published form."""
    return publish("xbai", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """Directory of another head with an adapter, both for ``acme/whole``."""
    peft = pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("tuned")
    model = rf.ReflectiveModel.from_pretrained(base)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model.model, lora).save_pretrained(path, save_embedding_layers=False)
    tiny.head(seed=1).save_pretrained(path)
    (path / "reflective.json").write_text(json.dumps(asdict(model.config)))
    return path


@pytest.fixture(scope="module")
def server(base, tuned, tmp_path_factory):
    """With a whole checkpoint and files that nobody needs, a bare model in pickled shards, heads for either."""
    server, root = Hub(), tmp_path_factory.mktemp("hub")
    server.uploads = root
    whole = shutil.copytree(base, root / "whole")
    for clutter in ("pytorch_model.bin", "onnx/model.safetensors", "figures/intro.jpg", "consolidated.safetensors"):
        (whole / clutter).parent.mkdir(exist_ok=True)
        (whole / clutter).write_bytes(b"not needed")
    server.add("acme/whole", whole)
    old = shutil.copytree(base, root / "old", ignore=shutil.ignore_patterns("score_module.pt"))
    torch.save(tiny.head(seed=2).state_dict(), old / "score_module.pt")
    server.add("acme/whole", old, "v1")
    bare = shutil.copytree(base, root / "bare", ignore=shutil.ignore_patterns("score_module.pt", "model*"))
    net = rf.ReflectiveModel.from_pretrained(base).model
    torch.save(net.state_dict(), bare / "pytorch_model.bin")
    server.add("acme/bare", bare)
    head = root / "head"
    tiny.head(seed=1).save_pretrained(head)
    (head / "reflective.json").write_text(json.dumps({"base_model": "acme/bare", "rule": "text"}))
    server.add("acme/head", head)
    tuned = shutil.copytree(tuned, root / "tuned")
    adapter = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "acme/whole"}))
    server.add("acme/tuned", tuned)
    for name in ("gated", "private"):
        server.add(f"acme/{name}", head)
        getattr(server, name).add(f"acme/{name}")
    yield server
    server.shutdown()


def run(server, cache, code, *, cwd=None, stderr=subprocess.PIPE, **env):
    """Runs ``code`` in Python, connected to ``server`` (None: to nothing); what it prints, as JSON, and its stderr."""
    url = server.url if server else "http://127.0.0.1:9"
    given = {
        "HF_HOME": str(cache),
        "HF_ENDPOINT": url,
        "NO_PROXY": "127.0.0.1,localhost",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "TRANSFORMERS_", "TQDM_")) and "token" not in k.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=tiny.PATIENCE, check=False, cwd=cwd,
        env={**kept, **given, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


LOAD = f"""
import json, reflective as rf
prompt, response = {XBAI["prompt"]!r}, {XBAI["response"]!r}
found = {{}}
for name, given in (
    ("whole", ("acme/whole",)), ("head", ("acme/head",)), ("tuned", ("acme/tuned",)),
):
    model = rf.ReflectiveModel.from_pretrained(*given)
    found[name] = model.score(prompt, [response])[0].step_scores, model.steps.rule, model.model.name_or_path
model = rf.ReflectiveModel.from_pretrained("acme/whole", head="acme/head")
found["both"] = model.score(prompt, [response])[0].step_scores, model.steps.rule, model.model.name_or_path
found["bias"] = [rf.SPRM.from_pretrained("acme/whole", revision=r)[0].bias.sum().item() for r in (None, "v1")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def downloaded(server, tmp_path_factory):
    """``(cache, what LOAD found, its requests)`` with a connection."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, run(server, cache, LOAD)[0], list(server.log)


def test_repositories_are_downloaded(server, downloaded, base, tuned, tmp_path):
    cache, found, log = downloaded
    bare = server.repositories["acme/bare"]["main"]
    head = server.repositories["acme/head"]["main"]
    for name, (path, other) in {
        "whole": (base, None), "head": (bare, head), "tuned": (base, tuned), "both": (base, head)
    }.items():  # fmt: skip
        model = rf.ReflectiveModel.from_pretrained(path, head=other)
        scores, rule, loaded = found[name]
        (expected,) = model.score(XBAI["prompt"], [XBAI["response"]])
        assert scores == pytest.approx(expected.step_scores, abs=1e-3) and len(scores) > 2
        assert rule == model.steps.rule == ("text" if other == head else "exact")
        assert loaded == ("acme/bare" if name == "head" else "acme/whole")
    assert found["bias"] == pytest.approx([tiny.head(seed=seed)[0].bias.sum().item() for seed in (0, 2)])

    got = {url.partition("/resolve/")[2].partition("/")[2] for _, url in log if url.startswith("/acme/whole/")}
    assert {"score_module.pt", "tokenizer.json", "config.json", *(f.name for f in base.glob("model-*"))} <= got
    assert not got & {"pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "figures/intro.jpg"}
    snapshot = cache / "hub/models--acme--whole/snapshots" / server.sha("acme/whole", "main")
    assert (snapshot / "score_module.pt").is_symlink()


def listing(path):
    return {str(f): f.lstat().st_mtime_ns for f in path.rglob("*")}


def protect(path, writable):
    for file in (path, *path.rglob("*")):
        if not file.is_symlink():
            file.chmod(0o755 if writable else 0o555)


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline mode", "no connection"])
def test_what_was_downloaded_needs_no_connection(downloaded, env):
    cache, found, _ = downloaded
    before = listing(cache)
    protect(cache, False)  # means nothing to root, hence the comparison
    try:
        assert run(None, cache, LOAD, **env)[0] == found
    finally:
        protect(cache, True)
    assert listing(cache) == before, "nothing is written into the cache"


ASK = """
import json, sys
from pathlib import Path
from reflective import hub
said = []
for path, given in {asked}:
    try:
        said.append(str(hub.directory(path, hub.HEAD, **given)))
    except OSError as error:
        said.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps(said))
"""


def ask(server, cache, *asked, **options):
    return run(server, cache, ASK.format(asked=f"[{', '.join(asked)}]"), **options)[0]


def test_repositories_that_cannot_be_had(server, tmp_path):
    requests = len(server.log)
    none, gated, private, revision, uncached = ask(
        server, tmp_path, '("acme/none", {})', '("acme/gated", {})', '("acme/private", {})',
        '("acme/head", {"revision": "v7"})', '("acme/head", {"local_files_only": True})',
    )  # fmt: skip
    assert len(server.log) > requests
    assert none.startswith("FileNotFoundError: acme/none is no directory here, and no repository at http://127.0.0.1")
    assert gated.startswith("PermissionError: acme/gated is gated: ask for access at http://127.0.0.1")
    assert private.startswith("FileNotFoundError") and "HF_TOKEN" in private
    assert revision == "FileNotFoundError: revision='v7': the repository acme/head has none of that name"
    assert "the Hub was not asked (offline mode); with a connection, 'hf download acme/head' gets it" in uncached
    (allowed,) = ask(server, tmp_path, '("acme/private", {})', HF_TOKEN="good")
    assert allowed.endswith(server.sha("acme/private", "main"))
    (unreachable,) = ask(None, tmp_path, '("acme/head", {})')
    assert "http://127.0.0.1:9 did not give it (ConnectError: " in unreachable
    cached = ask(server, tmp_path, '("acme/head", {})', '("acme/head", {"local_files_only": True})')
    assert cached[0] == cached[1] and cached[0].endswith(server.sha("acme/head", "main"))


def test_paths_are_no_names(server, tmp_path):
    """A directory wins over the Hub, and what looks like a path is not looked for there."""
    (tmp_path / "acme" / "whole").mkdir(parents=True)
    requests = len(server.log)
    found, *missing = ask(
        server, tmp_path, '("acme/whole", {})', '("none", {})', '("./none/none", {})', '("a/b/c", {})',
        '("/none", {})', '("~/none", {})', '(Path("acme/head"), {})', '("runs/score_module.pt", {})', cwd=tmp_path,
    )  # fmt: skip
    assert found == "acme/whole"
    assert len(missing) == 7 and all("is no file, nor a directory, nor ORG/NAME" in said for said in missing)
    assert len(server.log) == requests


def sharded(base, place):
    """A copy of ``base`` with its weights in several files, and their index."""
    shutil.copytree(base, place)
    for file in place.glob("model*"):
        file.unlink()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(place, max_shard_size="20KB")
    file = place / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    assert len(set(index["weight_map"].values())) > 3
    return file, index


def test_an_index_that_points_outside_its_directory_is_refused(base, tmp_path):
    file, index = sharded(base, tmp_path / "model")
    shard = min(index["weight_map"].values())
    before = rf.ReflectiveModel.from_pretrained(tmp_path / "model").model.state_dict()
    shutil.copytree(tmp_path / "model", tmp_path / "blobs")  # as in the Hub's cache, where files are links
    (tmp_path / "model" / shard).unlink()
    (tmp_path / "model" / shard).symlink_to(tmp_path / "blobs" / shard)
    after = rf.ReflectiveModel.from_pretrained(tmp_path / "model").model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    for name in (
        f"../blobs/{shard}", str(tmp_path / "blobs" / shard), f"sub/../../blobs/{shard}", f"..\\blobs\\{shard}",
        f"C:\\blobs\\{shard}", "",
    ):  # fmt: skip
        weights = {key: name if value == shard else value for key, value in index["weight_map"].items()}
        file.write_text(json.dumps(index | {"weight_map": weights}))
        with pytest.raises(ValueError, match=r"index\.json names .* which is outside its directory; refused"):
            rf.ReflectiveModel.from_pretrained(tmp_path / "model")


def test_an_index_whose_files_are_not_there(base, tmp_path):
    file, index = sharded(base, tmp_path / "model")
    first, second, *_ = sorted(set(index["weight_map"].values()))
    (tmp_path / "model" / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"index\.json names \d+ files of weights, and {first} is not there"):
        rf.ReflectiveModel.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"{first}, {second} are not there; download the model anew"):
        rf.ReflectiveModel.from_pretrained(tmp_path / "model")
    for text, message in (
        ("{", "is no JSON"), ("[]", "expected a JSON object, found list"), ("{}", "expected weight_map"),
        ('{"weight_map": ["a"]}', "expected weight_map"), ('{"weight_map": {"a": 5}}', "expected weight_map"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            rf.ReflectiveModel.from_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "one")
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "model")
    rf.ReflectiveModel.from_pretrained(tmp_path / "model")  # which transformers takes, and no index


def test_progress_is_shown_on_a_terminal(server, tmp_path):
    """And not where the command line has said that there is none."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(read_all(terminal)))
    reader.start()
    ask(server, tmp_path / "shown", '("acme/head", {})', stderr=end)
    os.close(end)
    reader.join(tiny.PATIENCE)
    # The second as huggingface_hub 1.5 says it.
    assert any(done in b"".join(shown).decode() for done in ("Fetching 2 files: 100%", "Fetching ... files: 2it"))
    _, stderr = run(server, tmp_path / "quiet", ASK.format(asked='[("acme/head", {})]'), TQDM_DISABLE="1")
    assert stderr == ""


def read_all(terminal):
    try:
        while data := os.read(terminal, 1 << 16):
            yield data
    except OSError:  # its other end was closed
        pass


# -- saved -------------------------------------------------------------------------------------------------------------

REPORT = {
    "run": asdict(Settings(task="sums", warmup=2)),
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "rollouts": {"train": {"questions": 640}, "eval": {"questions": 320}},
    "metrics": {
        "pass@1": {"value": 0.25, "low": 0.2, "high": 0.3},
        "best_of@2": {"value": 0.375, "low": 0.3, "high": 0.4375},
        "best_of@8": {"value": 0.5, "low": 0.4, "high": 0.6},
        "majority@2": {"value": 0.3, "low": 0.2, "high": 0.4},
        "majority@8": {"value": 0.333, "low": 0.2, "high": 0.4},
        "auc_within": {"value": None, "low": None, "high": None},
    },
}


def test_a_head_saved_as_a_repository(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "acme/copy")
    model = rf.ReflectiveModel.from_pretrained("acme/copy")  # a directory, whatever its name looks like
    with pytest.raises(ValueError, match=r"base=None: give the ORG/NAME .* loaded from 'acme/copy'"):
        model.save_head(tmp_path / "head")
    target = model.save_head(
        tmp_path / "head", base="acme/whole", report=REPORT, license="mit", sections={"Data": "Sums."}
    )
    assert {f.name for f in target.iterdir()} == {
        "score_module.safetensors",
        "reflective.json",
        "report.json",
        "README.md",
    }
    assert json.loads((target / "reflective.json").read_text()) == {"base_model": "acme/whole", **model.config.to_dict()}
    assert all(b"\r" not in f.read_bytes() for f in target.glob("*.[jm][sd]*"))
    again = rf.ReflectiveModel.from_pretrained(base, head=target)
    assert again.config == model.config
    for one, other in zip(again.head.parameters(), model.head.parameters(), strict=True):
        assert torch.equal(one, other)

    card = ModelCard.load(target / "README.md")
    assert card.data.to_dict() == {
        "base_model": "acme/whole", "library_name": "reflective", "license": "mit", "metrics": ["accuracy", "roc_auc"],
        "pipeline_tag": "text-generation", "base_model_relation": "adapter",
        "tags": ["reflective", "process-reward-model", "test-time-scaling", "best-of-n", "arxiv:2507.01951"],
    }  # fmt: skip
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == [
        "# SPRM head for acme/whole",
        *(f"## {h}" for h in ("Use", "Data", "Training", "Held out", "Limits")),
    ]
    assert "(64 → 128 → 1, bfloat16, 0.0 MB)" in card.text
    assert (
        "`sums`, 12 answers to each question at temperature 0.7" in card.text
        and "dynamic weights after 2 epochs without" in card.text
    )
    assert "On 320 questions that were not trained on, 12 answers each." in card.text
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line.startswith("| `")
    ]
    assert [row[:3] for row in rows] == [
        ["`pass@1`", "0.250", "0.200 – 0.300"],
        ["`majority@8`", "0.333", "0.200 – 0.400"],
        ["`best_of@2`", "0.375", "0.300 – 0.438"],
        ["`best_of@8`", "0.500", "0.400 – 0.600"],
        ["`auc_within`", "–", "– – –"],
    ]


def test_the_adapter_goes_with_the_head(base, tuned, tmp_path):
    """And what an earlier head left there does not stay."""
    model = rf.ReflectiveModel.from_pretrained(base, head=tuned)
    target = model.save_head(tmp_path, base="acme/whole")
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/whole"
    (expected,) = model.score(XBAI["prompt"], [XBAI["response"]])
    (found,) = rf.ReflectiveModel.from_pretrained(base, head=target).score(XBAI["prompt"], [XBAI["response"]])
    assert found.step_scores == expected.step_scores
    assert "an adapter of peft's (LORA, rank 4, " in (target / "README.md").read_text()

    again = rf.ReflectiveModel.from_pretrained(base, head=target).save_head(target, base="acme/other")
    assert (again / "adapter_model.safetensors").is_file(), "saved over itself"
    rf.ReflectiveModel.from_pretrained(base).save_head(target, base="acme/whole")
    assert not list(target.glob("adapter_*")) and "adapter" not in ModelCard.load(target / "README.md").text


def test_the_card_of_the_shipped_head(tmp_path):
    for file in SHIPPED.iterdir():
        shutil.copy(file, tmp_path)
    card = ModelCard.load(
        hub.write_card(tmp_path, title="The head", license="apache-2.0", sections={"Training": "By hand."})
    )
    report = json.loads((SHIPPED / "report.json").read_text())
    base_name = json.loads((SHIPPED / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (card.data.base_model, card.data.license) == (base_name, "apache-2.0")
    for name in ("pass@1", "majority@8", "best_of@32", "auc_within"):
        value, low, high = (f"{report['metrics'][name][k]:.3f}" for k in ("value", "low", "high"))
        assert f"| `{name}` | {value} | {low} – {high} |" in card.text
    for name, of in report["candidates"].items():
        assert f"| {name} | {of['pass@1']['value']:.3f} |" in card.text
    rule = json.loads((SHIPPED / "prune.json").read_text())
    assert f"Calibrated on {rule['questions']} questions, {rule['n']} candidates each" in card.text
    Select(exponent=4.0, growth=0.25, questions=256).save(tmp_path)
    Exit(threshold=0.9, risk=0.05, questions=200).save(tmp_path)
    Auto(n=32, exponent=4.0, enough=0.85, loss=0.01, questions=256).save(tmp_path)
    text = ModelCard.load(hub.write_card(tmp_path)).text
    assert "to the power of 4 n^0.25; calibrated on 256 questions" in text and "above 0.9, with a stated risk of 5%" in text
    assert "up to 32, until one scores 0.85, which gave up 1% of the accuracy of 32 at the most on the 256 questions" in text
    assert "By hand." in card.text and card.text.strip().startswith("# The head")


def test_a_card_needs_a_head_and_a_push_needs_a_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="nor a directory with one of"):
        hub.write_card(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no README\.md"):
        hub.push_to_hub(tmp_path, "acme/pushed")
    tiny.head().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds neither a model"):
        rf.ReflectiveModel.from_pretrained(tmp_path)


def test_a_head_is_uploaded_and_found_again(server, base, tmp_path):
    target = rf.ReflectiveModel.from_pretrained(base).save_head(tmp_path / "head", base="acme/whole", license="mit")
    (target / "rollouts").mkdir()
    (target / "rollouts" / "answers.json").write_text("{}")
    code = f"""
import json
from reflective import hub
print(json.dumps([hub.push_to_hub({str(target)!r}, "acme/pushed"), str(hub.directory("acme/pushed", hub.HEAD))]))
"""
    (commit, found), _ = run(server, tmp_path / "cache", code, HF_TOKEN="good")
    assert commit.startswith(f"{server.url}/acme/pushed/commit/")
    assert ("POST", "/api/validate-yaml") in server.log
    files = {f.name: f.read_bytes() for f in target.iterdir() if f.is_file()}
    assert {f.name: f.read_bytes() for f in (server.uploads / "pushed").rglob("*")} == files
    assert {f.name: f.read_bytes() for f in Path(found).iterdir()} == {
        k: v for k, v in files.items() if k != "README.md"
    }
