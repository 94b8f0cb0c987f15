"""Our server and the command line on a stock vLLM, over real sockets and in processes."""

import gc
import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import tiny as shared
from common import DELIMITER
from served import live, until
from test_cli import run
from transformers import AutoTokenizer

from reflective.cli.common import load_model

VLLM = json.dumps(
    {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True, "block_size": 32}
)
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 40}
OURS = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 40}
PROMPT = "First add 3 and 4.\n\nThen"
KILLED = """
import os, signal
from reflective.batch.journal import Journal
from reflective.cli import main

def keep(journal, results, whole=Journal.keep):
    whole(journal, results)
    os.kill(os.getpid(), signal.SIGKILL)

Journal.keep = keep
main()
"""


@pytest.fixture(scope="module")
def checkpoint(tiny):
    (tiny / "reflective.json").write_text(json.dumps({"delimiter": DELIMITER}))
    (tiny / "prune.json").write_text(
        json.dumps({"n": 4, "threshold": 0.05, "min_steps": 1, "risk": 0.5, "questions": 0})
    )
    return tiny


@pytest.fixture(scope="module")
def model(checkpoint):
    model = load_model(str(checkpoint), None, False, engine="vllm", vllm=VLLM)
    yield model
    model.close()


@pytest.fixture(scope="module")
def server(model):
    with live(model, batch_rows=None, max_queue=128) as server:
        yield server
        stats = server.engine.submit(model.host.core.stats).result(shared.PATIENCE)
        assert stats["rows"] == stats["kept"] == 0 and not model.host.core.under_way


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def near(truth):
    """``near(prompt ids, response ids, step scores)``: these are the truth."""

    def check(prompt, response, scores):
        expected, _ = truth(prompt, response)
        assert len(scores) == len(expected) and scores == pytest.approx(expected, abs=1e-5)
        return len(expected)

    return check


def command(*args):
    """What ``run`` tells; its vLLM is gone, for two in a process end each other."""
    done = run(*args)
    gc.collect()
    return done


def test_the_command_line_and_killed_runs(checkpoint, tmp_path, near):
    """A run that was killed goes on, to the bytes of one that nobody killed. First, for the server's vLLM is in this process too."""
    source, cut, whole = (tmp_path / name for name in ("in.jsonl", "cut.jsonl", "whole.jsonl"))
    source.write_text("".join(json.dumps({"question": f"{i} add 3.\n\nThen"}) + "\n" for i in range(6)))
    engine = ("--engine", "vllm", "--vllm", VLLM, "--model", str(checkpoint))
    args = ("generate", *engine, "--together", 2, "-n", 2, "--seed", 4, "--max-new-tokens", 24, "--input", source)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, args), "-o", str(cut)], check=False, timeout=shared.PATIENCE
    )
    assert killed.returncode == -signal.SIGKILL and not cut.exists() and cut.with_name("cut.jsonl.unfinished").exists()
    done = command(*args, "-o", cut)
    assert "6 of 6 rows" in done.stderr
    command(*args, "-o", whole)
    assert cut.read_bytes() == whole.read_bytes()

    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"prompt": r["question"], "response": r["text"]}) + "\n" for r in rows if r["text"])
    )
    scored = command("score", *engine, texts)
    found = [json.loads(line) for line in scored.stdout.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(found) > 3 and {"score", "n_steps", "step_scores", "step_spans", "error"} < found[0].keys()
    for row in found:
        near(tokenizer.encode(row["prompt"]), tokenizer.encode(row["response"]), row["step_scores"])


def test_completions_and_a_streamed_chat_beside_texts_that_are_scored(server, client, near):
    """Every choice is that of the same seed alone, and its scores are the truth."""
    engine, ids = server.engine, server.engine.encode(PROMPT)
    alone = engine.generate(ids, n=8, seed=1, **OURS).result(shared.PATIENCE)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(client.completions.create, model="tiny", prompt=PROMPT, n=8, seed=1, **SAMPLING)
        texts = pool.submit(_score_all, server, [f"e {i} add e" * (1 + i % 7) for i in range(24)], near)
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": PROMPT}], n=8, seed=1, stream=True, logprobs=True,
            stream_options={"include_usage": True}, **SAMPLING,
        )  # fmt: skip
        chunks = list(stream)
        made = whole.result(shared.PATIENCE)
        assert texts.result(shared.PATIENCE) == 24
    assert chunks[-1].usage.completion_tokens == alone.tokens == made.usage.completion_tokens
    steps = 0
    for c, choice in zip(alone.candidates, made.choices, strict=True):
        steps += near(ids, c.token_ids, c.step_scores)
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == choice.index]
        said = "".join(part.delta.content or "" for part in parts)
        assert c.text == choice.text == said
        told = [s for p in parts[:-1] if getattr(p, "reflective", None) for s in p.reflective["step_scores"]]
        for scores in (choice.reflective["step_scores"], parts[-1].reflective["step_scores"], told):
            assert scores == pytest.approx(c.step_scores, abs=1e-5)
        assert sum(len(p.logprobs.content) for p in parts if p.logprobs) >= len(c.token_ids)
    assert steps > 8


def _score_all(server, texts, near):
    """MetaStone-S1's route, each text in a request; how many were right."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda t: server.http.post("/score", json={"text": t, "return_all_scores": True}), texts)
        )
    for text, answer in zip(texts, answers, strict=True):
        assert answer.json()["token_ids"] == server.engine.encode(text)
        near([], answer.json()["token_ids"], answer.json()["all_scores"])
    return len(answers)


def test_the_published_routes_and_those_of_reward_models(server, near):
    engine, http = server.engine, server.http
    alone = engine.generate(PROMPT, n=3, seed=5, **OURS).result(shared.PATIENCE)
    body = {"prefix_prompt": PROMPT, "max_tokens": 40, "response_num": 3, "seed": 5, "temperature": 1.0}
    found = http.post("/generate", json=body).json()["results"]
    assert len(found) == 3 and found != [c.text for c in alone.candidates], "top_p is 0.95 there"
    again = engine.generate(PROMPT, n=3, seed=5, **{**OURS, "top_p": 0.95}).result(shared.PATIENCE)
    assert found == [c.text for c in again.candidates]
    texts = [c.text for c in alone.candidates]
    scored = http.post("/v1/score", json={"text_1": PROMPT, "text_2": texts}).json()
    for text, row in zip(texts, scored["data"], strict=True):
        (c,) = engine.score([PROMPT], [text]).result(shared.PATIENCE)
        near(engine.encode(PROMPT), c.token_ids, c.step_scores)
        assert row["score"] == pytest.approx(c.score, abs=1e-5)
    pooled = http.post("/pooling", json={"input": texts}).json()
    assert [len(row["data"]) for row in pooled["data"]] == [
        len(engine.score([""], [text]).result(shared.PATIENCE)[0].step_scores) for text in texts
    ]
    assert http.post("/score", json={"text": "e" * 512}).json()["error"].endswith("one below max_model_len")
    assert http.get("/health").json() == {"status": "ok"}
    assert "reflective_scored_texts_total" in http.get("/metrics").text


@pytest.mark.parametrize("strategy", ["prune", "step_beam"])
def test_strategies(server, near, strategy):
    body = {"prompt": PROMPT, "strategy": strategy, "best_of": 4, "seed": 3, **SAMPLING}
    made = server.http.post("/v1/completions", json=body).json()
    alone = server.engine.generate(PROMPT, strategy=strategy, n=4, seed=3, **OURS).result(shared.PATIENCE)
    assert made["reflective"]["strategy"] == strategy and made["choices"][0]["text"] == alone.best.text
    ids = server.engine.encode(PROMPT)
    for c, score in zip(alone.candidates, made["reflective"]["scores"], strict=True):
        near(ids, c.token_ids, c.step_scores)
        assert score == pytest.approx(c.score, abs=1e-5)
    if strategy == "prune":
        assert any(c.status == "stopped" for c in alone.candidates)
    else:
        assert any(c.parent is not None for c in alone.candidates)


def test_a_third_of_many_clients_hangs_up(server):
    """64 at once, for longer texts than there are places; what is left is answered, and nothing is left behind."""
    gone = []

    def ask(i):
        body = {
            "prompt": f"{i} add",
            "n": 2,
            "stream": True,
            "seed": i,
            **SAMPLING,
            "max_tokens": 30 + 200 * (i % 3 == 0),
        }
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=shared.PATIENCE) as answer:
            lines = answer.iter_lines()
            if i % 3 == 0:
                gone.append(next(lines))
                return None
            return [line for line in lines if line][-1]

    with ThreadPoolExecutor(64) as pool:
        ends = list(pool.map(ask, range(64)))
    assert len(gone) == 22 and [end for end in ends if end] == ["data: [DONE]"] * 42
    until(lambda: server.engine.stats()["running"] == server.engine.stats()["queued"] == 0)
    stats = server.engine.submit(server.model.host.core.stats).result(shared.PATIENCE)
    assert stats["rows"] == stats["kept"] == 0 and not server.model.host.core.under_way
    assert server.http.post("/score", json={"text": "a e b"}).json()["value"] > 0


def test_a_server_process_finishes_what_is_under_way(checkpoint):
    command = [
        sys.executable,
        "-m",
        "reflective",
        "serve",
        "--engine",
        "vllm",
        "--vllm",
        VLLM,
        "--model",
        str(checkpoint),
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = next(
            found[1] for line in process.stderr if (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line))
        )
        body = {"prompt": "a", "n": 4, "max_tokens": 300, "temperature": 1.0, "seed": 1}
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=shared.PATIENCE)
            until(lambda: "reflective_rows 4.0" in httpx.get(f"{url}/metrics").text or last.done())
            process.send_signal(signal.SIGTERM)
            assert last.result().status_code == 200 and len(last.result().json()["choices"]) == 4
        rest = process.stderr.read()
        assert process.wait(shared.PATIENCE) in (0, -signal.SIGTERM) and "Traceback" not in rest, rest
    finally:
        process.kill()
        process.wait()


def test_what_vllm_does_not_have_is_named(checkpoint):
    wrong = run(
        "score", "--engine", "vllm", "--vllm", '{"max_modle_len": 4}', "--model", checkpoint, "--text", "x", code=2
    )
    assert "max_modle_len" in wrong.stderr
