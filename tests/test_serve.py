"""The HTTP server, over real sockets: what the clients of MetaStone-S1, OpenAI and vLLM send, and what they read."""

import asyncio
import contextlib
import json
import math
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from test_model import small  # noqa: F401 (a fixture)
from test_search import STEPS, reflective_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

import reflective as rf

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from served import live, until

from reflective.benchmarks.serve_load import load
from reflective.serve import schemas
from reflective.serve.service import Limits, Service
from reflective.serve.text import Incoming, before

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|><think>\n"
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 40}


def endless(**config):
    """A model whose responses go on until something else ends them."""
    model = reflective_model(**config)
    model.model.generation_config.eos_token_id = -1
    return model


@contextlib.contextmanager
def slowed(model, seconds=0.02):
    """Every forward takes so much longer."""
    handle = model.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    yield
    handle.remove()


def hold(server, tokens, event):
    """No forward begins, from so many tokens on, before ``event``."""

    def wait(*_):
        if server.engine.stats()["tokens"] >= tokens:
            assert event.wait(tiny.PATIENCE)

    return server.model.model.model.register_forward_pre_hook(wait)


def held(server, tokens=0):
    """Lets nothing more be decoded, from so many tokens on, until a request to ``server`` is cancelled: however long that
    takes. Returns the event of that, and the list of what the engine was asked for.
    """
    cancelled, asked, engine = threading.Event(), [], server.engine

    def ask(real, *args, **given):
        future = real(*args, **given)

        def cancel(really=future.cancel):
            done = really()
            cancelled.set()
            return done

        future.cancel = cancel
        asked.append(future)
        return future

    for name in ("generate", "generate_all", "score"):
        setattr(engine, name, partial(ask, getattr(engine, name)))
    hold(server, tokens, cancelled)
    return cancelled, asked


@pytest.fixture(scope="module")
def client(letters):
    return openai.OpenAI(base_url=f"{letters.url}/v1", api_key="none", max_retries=0)


# -- MetaStone-S1 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A directory in the published form: a Qwen2 and its tokenizer, score_module.pt, and nothing of ours."""
    path = tmp_path_factory.mktemp("published")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = ["<|endoftext|>", "<think>", "</think>", *alphabet, "ĊĊ", ".ĊĊ"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(entries)}, [("Ċ", "Ċ"), (".", "ĊĊ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(**{**tiny._SIZES, "vocab_size": len(entries), "eos_token_id": 0, "bos_token_id": 0})
    net = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
        net.lm_head.weight[0] = 0  # so that responses do not end early
        net.lm_head.weight[-1] = net.lm_head.weight[50:60].sum(0)  # the separator is likely enough to be drawn
    net.save_pretrained(path)
    torch.save(published_head().state_dict(), path / "score_module.pt")
    return path


def published_head():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 1)).eval()


def definition(path, text):
    """Score, step scores and the positions that they are read at, in plain PyTorch: the whole model, every hidden state."""
    tokenizer, net = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    (separator,) = tokenizer.encode(".\n\n", add_special_tokens=False)
    tags = [
        (ids[0] == tokenizer.convert_tokens_to_ids(tag)).nonzero().flatten().tolist() for tag in ("<think>", "</think>")
    ]
    step = ids[0] == separator
    step[1:] &= ~(step[:-1] | (ids[0, :-1] == tokenizer.convert_tokens_to_ids("<think>")))
    read = torch.zeros_like(step)
    read[:-1] = step[1:]
    begin = tags[0][0] if len(tags[0]) == 1 else 0
    end = tags[1][0] if len(tags[1]) == 1 else len(step)
    read[: begin + 1] = read[end:] = False
    with torch.no_grad():
        hidden = net(ids, output_hidden_states=True).hidden_states[-2][0]
        head = published_head()
        head.load_state_dict(torch.load(path / "score_module.pt"))
        scores = head(hidden[read])[:, 0].sigmoid().double()
    value = scores.clamp_min(1e-10).log().mean().exp().item() if len(scores) else 0.0
    return value, scores.tolist(), ids[0].tolist(), read.nonzero().flatten().tolist()


@contextlib.contextmanager
def process(path, *, seconds=0.0, **settings):
    """``serve`` in a process of its own, every forward slowed by ``seconds``."""
    command = (
        "import sys, time; import reflective as rf; from reflective.serve.app import serve\n"
        f"model = rf.ReflectiveModel.from_pretrained({str(path)!r})\n"
        f"model.model.register_forward_pre_hook(lambda *_: time.sleep({seconds}))\n"
        f"serve(model, port=0, **{settings!r})"
    )
    server = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        for line in server.stderr:
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                break
        yield server, found[1]
    finally:
        server.kill()
        server.wait()


def test_the_published_pipeline_runs_against_a_server_process(published):
    """Candidates from several policy servers, each scored by a call of its own, kept as lines and read for best of N."""
    tokenizer = AutoTokenizer.from_pretrained(published)

    def call(url, body):
        try:
            answer = httpx.post(url, json=body, timeout=tiny.PATIENCE)
            answer.raise_for_status()
            return answer.json()
        except httpx.HTTPError as error:
            return {"error": str(error)}

    def infer(question, urls, branch):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        bodies = [
            # Random bytes, most of which are three tokens when they are read again.
            {"prefix_prompt": prompt, "max_tokens": 128, "response_num": branch // len(urls), "stop": [],
             "temperature": 0.6, "seed": secrets.randbelow(2**32)}
            for _ in urls
        ]  # fmt: skip
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(call, [f"{url}/generate" for url in urls], bodies))
        solutions = [prompt + text for answer in found for text in answer.get("results", [])]
        values = [call(f"{urls[0]}/score", {"text": s, "return_all_scores": False})["value"] for s in solutions]
        assert len(solutions) == branch
        return {"content": prompt, "solution_lst": solutions, "score_lst": values}

    with process(published, grace=120.0) as (server, url):
        lines = [
            json.dumps({"prompt": question, "answer": "2", "output": infer(question, [url, url], 4)})
            for question in ("1 + 1?", "2 + 2?")
        ]
        body = {"prefix_prompt": "q", "max_tokens": 400, "seed": 1}
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(call, f"{url}/generate", body)
            until(lambda: "reflective_rows 8.0" in httpx.get(f"{url}/metrics").text)
            server.send_signal(signal.SIGTERM)
            assert len(last.result()["results"]) == 8, "what is under way is finished"
        rest = server.stderr.read()
        assert (
            server.wait(tiny.PATIENCE) in (0, -signal.SIGTERM) and "Traceback" not in rest and "cancelled" not in rest
        )
    records = [json.loads(line) for line in lines]
    steps = 0
    for output in (record["output"] for record in records):
        expected = [definition(published, text) for text in output["solution_lst"]]
        assert output["score_lst"] == pytest.approx([e[0] for e in expected], abs=1e-3)
        steps += sum(len(e[1]) for e in expected)
        best = output["score_lst"].index(max(output["score_lst"]))
        assert expected[best][0] == pytest.approx(max(e[0] for e in expected), abs=1e-3)
    assert steps > 8


@pytest.fixture(scope="module")
def metastone(published):
    with live(rf.ReflectiveModel.from_pretrained(published), limits=Limits(candidates=16)) as server:
        yield server


@pytest.mark.parametrize(
    "text",
    [
        "Q<think>\nfirst.\n\nsecond.\n\n.\n\nthird.\n\n</think>after.\n\nend",
        "Q<think>.\n\na.\n\nb",
        "a step.\n\nanother.\n\n",
        "<think>x.\n\n<think>y.\n\n</think>z.\n\n",
        "x</think>y.\n\nz</think>q.\n\n",
        ".\n\nab.\n\n",
        "no step at all",
        "snowman ☃.\n\n中文。.\n\n",
        "no longer than the positions.\n\n" * 17 + "And as many more tokens as reading again may add.\n\n" * 1,
    ],
)
def test_published_scores_are_those_of_the_definition(metastone, published, text):
    value, scores, ids, positions = definition(published, text)
    answer = metastone.http.post("/score", json={"text": text, "return_all_scores": True})
    assert answer.status_code == 200 and answer.json().keys() == {"value", "all_scores", "token_ids", "score_positions"}
    assert answer.json()["value"] == pytest.approx(value, abs=1e-3)
    assert answer.json()["all_scores"] == pytest.approx(scores, abs=1e-3)
    assert answer.json()["token_ids"] == ids and answer.json()["score_positions"] == positions
    assert metastone.http.post("/score", json={"text": text}).json() == {"value": answer.json()["value"]}


def test_published_generation(metastone):
    body = {"prefix_prompt": "<|user|>q\n<|assistant|><think>\n", "max_tokens": 30, "response_num": 3, "seed": 5}
    one, two = (metastone.http.post("/generate", json={**body, **more}).json() for more in ({}, {"stop": None}))
    assert one == two and one.keys() == {"results"} and len(set(one["results"])) == 3
    (whole,) = metastone.http.post("/generate", json={**body, "response_num": 1, "max_tokens": 1 << 15}).json()[
        "results"
    ]
    assert whole.startswith(one["results"][0]), "no more than there are positions for"
    penalised, free = (
        metastone.engine.generate(body["prefix_prompt"], n=3, max_new_tokens=30, temperature=0.8, seed=5, repetition_penalty=p)
        for p in (1.05, 1.0)
    )  # fmt: skip
    texts = [[c.text for c in future.result(tiny.PATIENCE).candidates] for future in (penalised, free)]
    assert one["results"] == texts[0] != texts[1], "as the published server has it"
    assert metastone.http.post("/generate", json={**body, "repetition_penalty": 1}).json()["results"] == texts[1]
    stop = one["results"][0][4:6]
    stopped = metastone.http.post("/generate", json={**body, "stop": [stop]}).json()["results"]
    assert stopped[0] == one["results"][0][:6], "with the stop text"


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/score", {"text": ""}, 200, "text: it is empty"),
        ("/score", {"text": "x" * 577}, 200, "text: 577 tokens, more than the model's 512 positions"),
        ("/score", {"txt": "x"}, 422, None),
        ("/score", {"text": 5}, 422, None),
        ("/score", b"{", 422, None),
        ("/score", b'{"text": "\\ud800"}', 200, "half of a surrogate pair"),
        ("/generate", {}, 422, None),
        ("/generate", b'{"prefix_prompt": "x", "temperature": NaN}', 422, None),
        ("/generate", {"prefix_prompt": ""}, 200, "empty"),
        ("/generate", {"prefix_prompt": "x" * 600}, 200, "512 positions"),
        ("/generate", {"prefix_prompt": "x", "response_num": 0}, 200, "n=0"),
        ("/generate", {"prefix_prompt": "x", "max_tokens": 0}, 200, "max_new_tokens=0"),
        ("/generate", {"prefix_prompt": "x", "temperature": -1}, 200, "temperature=-1"),
        ("/generate", {"prefix_prompt": "x", "repetition_penalty": 0}, 200, "repetition_penalty=0"),
        ("/generate", {"prefix_prompt": "x", "response_num": 17}, 400, None),
    ],
)
def test_published_errors(metastone, path, body, status, says):
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = metastone.http.post(path, headers={"Content-Type": "application/json"}, **given)
    assert answer.status_code == status, answer.text
    if says:
        assert list(answer.json()) == ["error"] and says in answer.json()["error"]
    else:
        assert answer.json().keys() == ({"detail"} if status == 422 else {"error"})


# -- OpenAI ----------------------------------------------------------------------------------------------------------


def same(scores, candidate):
    return scores["score"] == pytest.approx(candidate.score, rel=1e-4) and scores["step_scores"] == pytest.approx(
        candidate.step_scores, rel=1e-4
    )


def test_chat_completions(alone, client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    made = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "ABCDE"}], n=3, seed=4, **SAMPLING
    )
    expected = alone.generate("ABCDE", n=3, seed=4, temperature=1.0, top_p=0.9, max_new_tokens=40)
    assert made.object == "chat.completion" and [c.index for c in made.choices] == [0, 1, 2]
    steps = 0
    for choice, candidate in zip(made.choices, expected.candidates, strict=True):
        assert (choice.message.role, choice.message.content) == ("assistant", candidate.text)
        assert choice.finish_reason == candidate.status and same(choice.reflective, candidate)
        assert choice.reflective["step_spans"] == [list(span) for span in candidate.step_spans]
        steps += choice.reflective["n_steps"]
    assert steps > 5 and {c.finish_reason for c in made.choices} <= {"stop", "length"}
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, expected.tokens)
    assert made.usage.total_tokens == 5 + expected.tokens
    assert made.reflective["seed"] == 4 and len(made.reflective["scores"]) == 3


def test_settings_of_sampling(alone, client):
    ours = {"presence_penalty": 0.7, "frequency_penalty": -0.3, "top_p": 0.9}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 9, "temperature": [1.0, 0.0]}
    bias = {9: 2.0, 11: -5.0}
    expected = alone.generate("ABC", n=3, seed=4, max_new_tokens=30, logit_bias=bias, **ours, **extra)
    ask = {"model": "tiny", "n": 3, "seed": 4, "max_tokens": 30, "logit_bias": {str(t): v for t, v in bias.items()}, **ours}
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "ABC"}], extra_body=extra, **ask)
    assert [c.message.content for c in chat.choices] == [c.text for c in expected.candidates]
    made = client.completions.create(prompt="ABC", extra_body=extra, **ask)
    assert [c.text for c in made.choices] == [c.text for c in expected.candidates]


def test_stop_texts_are_cut_off(letters, client):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "ABC"}], "seed": 1, **SAMPLING}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    stop = whole[5:7]
    choice = client.chat.completions.create(**ask, stop=[stop, "none"]).choices[0]
    assert choice.message.content == before(whole, [stop]) and choice.finish_reason == "stop"
    assert all(end <= len(choice.message.content) for _, end in choice.reflective["step_spans"])
    short = client.chat.completions.create(**{**ask, "max_tokens": 2}).choices[0]
    assert short.message.content == whole[:2] and short.finish_reason == "length"


@pytest.mark.parametrize("stop", [None, 2], ids=["whole", "stop"])
def test_streamed_choices_are_those_of_one_answer(letters, client, stop):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "KLM"}], "n": 3, "seed": 9, **SAMPLING}
    if stop:
        text = client.chat.completions.create(**ask).choices[1].message.content
        ask["stop"] = text[stop : stop + 3]
    made = client.chat.completions.create(**ask)
    *chunks, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == made.usage and all(c.usage is None for c in chunks)
    assert all(len(c.choices) == 1 and c.object == "chat.completion.chunk" for c in chunks)
    for i, choice in enumerate(made.choices):
        parts = [c.choices[0] for c in chunks if c.choices[0].index == i]
        assert parts[0].delta.role == "assistant"
        assert "".join(p.delta.content or "" for p in parts) == choice.message.content
        assert [p.finish_reason for p in parts if p.finish_reason] == [choice.finish_reason] and parts[-1].finish_reason
        assert same(
            parts[-1].reflective,
            rf.model.Candidate("", choice.reflective["score"], choice.reflective["step_scores"], [], []),
        )
        running = [p.reflective for p in parts[:-1] if getattr(p, "reflective", None)]
        told = [score for r in running for score in r["step_scores"]]
        assert told == pytest.approx(choice.reflective["step_scores"], rel=1e-4)
        if running:
            assert running[-1]["score"] == pytest.approx(choice.reflective["score"], rel=1e-4)
    assert len(chunks) > 20


def test_streams_end_with_done_and_come_as_they_are_decoded(letters):
    body = {"messages": [{"role": "user", "content": "KLM"}], "stream": True, "seed": 9, **SAMPLING}
    before, arrived, lines = letters.engine.stats()["tokens"], threading.Event(), []
    handle = hold(letters, before + 20, arrived)
    with letters.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            if len(lines) == 3:
                assert letters.engine.stats()["tokens"] <= before + 20
                arrived.set()
    handle.remove()
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines) and len(lines) > 10


def test_completions(alone, client):
    expected = alone.generate("ABC", n=2, seed=1, temperature=1.0, top_p=0.9, max_new_tokens=40)
    ids = alone.encode("ABC")[0].tolist()
    for prompt in ("ABC", ids):
        made = client.completions.create(model="tiny", prompt=prompt, n=2, seed=1, **SAMPLING)
        assert [c.text for c in made.choices] == [c.text for c in expected.candidates]
        assert all(same(choice.reflective, c) for choice, c in zip(made.choices, expected.candidates, strict=True))
    parts = list(client.completions.create(model="tiny", prompt="ABC", n=2, seed=1, stream=True, **SAMPLING))
    assert "".join(p.choices[0].text for p in parts if p.choices[0].index == 1) == expected.candidates[1].text


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({"best_of": 5}, {"n": 5}),
        ({"effort": "low"}, {"effort": "low"}),
        ({"strategy": "particles", "best_of": 4}, {"strategy": "particles", "n": 4}),
        ({"strategy": "refine", "best_of": 3}, {"strategy": "refine", "n": 3}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_one_of_several_is_chosen(alone, client, asked, settings, stream):
    expected = alone.generate("ABC", seed=2, temperature=1.0, top_p=0.9, max_new_tokens=40, **settings)
    made = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "ABC"}], seed=2, extra_body=asked, stream=stream, **SAMPLING
    )
    if stream:
        parts = list(made)
        text, scores = "".join(p.choices[0].delta.content or "" for p in parts), parts[-1].choices[0].reflective
        run = parts[-1].reflective
    else:
        (choice,) = made.choices
        text, scores, run = choice.message.content, choice.reflective, made.reflective
        assert made.usage.completion_tokens == expected.tokens
    assert text == expected.text and same(scores, expected.best)
    assert run["scores"] == pytest.approx([c.score for c in expected.candidates], rel=1e-4)
    assert run["chosen_by"] == [expected.chosen_by]


def test_a_question_is_asked_anew_with_drafts(letters):
    """In a conversation, where it is known what stands behind the question, and with room for the drafts where nobody says how long an answer may be."""
    body = {"strategy": "refine", "best_of": 2, "seed": 0, "temperature": 1.0}
    found = letters.http.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "ABC"}], "max_tokens": 9}).json()
    assert len(found["reflective"]["scores"]) == 3
    half = letters.http.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "ABC"}]}).json()
    assert half["usage"]["completion_tokens"] <= 3 * (512 - 3) // 2 and "error" not in half
    refused = letters.http.post("/v1/completions", json={**body, "prompt": "ABC", "max_tokens": 9})
    assert refused.status_code == 400 and "/v1/chat/completions" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"frequency_penalty": 2.5}, "frequency_penalty=2.5 must lie in [-2, 2]"),
        ({"top_k": -2}, "top_k=-2 must not be negative"),
        ({"min_p": 2}, "min_p=2.0 must lie in [0, 1]"),
        ({"repetition_penalty": -1}, "repetition_penalty=-1.0 must be finite, and above 0"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"temperature": [1, 1]}, "temperature: 2 for 1 candidates"),
        ({"logit_bias": {"5": 101}}, "less than or equal to 100"),
        ({"logit_bias": {"A": 1}}, "integer"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias: 1000000 is no token"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "at most 1024"),
        ({"n": 0}, "n: "),
        ({"n": 65}, "65 in one request"),
        ({"best_of": 65}, "65 in one request"),
        ({"n": 2, "best_of": 4}, "leave n at 1"),
        ({"effort": "extreme"}, "'low', 'medium', 'high' or 'auto'"),
        ({"strategy": "none"}, "expected one of best_of_n"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop": ["", "x"]}, "at least 1 character"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"max_tokens": 510}, "512 positions"),
        ({"max_completion_tokens": 0}, "greater than or equal to 1"),
        ({"seed": -1}, "seed=-1"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
        ({"messages": [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]}, "takes one question"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty"),
    ],
)
def test_refusals(letters, more, says):
    body = {"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 4, **more}
    answer = letters.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def test_what_asks_for_nothing_is_accepted(letters):
    neutral = {
        "logprobs": False,
        "tools": [],
        "frequency_penalty": 0,
        "top_k": -1,
        "response_format": {"type": "text"},
        "user": "me",
    }
    nothing = dict.fromkeys(["n", "stop", "seed", "temperature", "top_p", "stream", "logit_bias", "stream_options"])
    parts = [{"type": "text", "text": "AB"}, {"type": "text", "text": "C"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 4, **neutral, **nothing}
    answer = letters.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == 3


NEUTRAL = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 4, "seed": 1},
    "/v1/completions": {"prompt": "ABC", "max_tokens": 4, "seed": 1},
    "/score": {"text_1": "KLM", "text_2": "ABC" + STEPS[0]},
    "/pooling": {"input": "ABC" + STEPS[0]},
    "/generate": {"prefix_prompt": "ABC", "max_tokens": 4, "response_num": 2, "seed": 1},
}


@pytest.mark.parametrize("path", NEUTRAL)
def test_null_is_absent(letters, path):
    """In every field that a route knows, under each of its names."""
    kinds = {
        "/v1/chat/completions": schemas.ChatCompletion, "/v1/completions": schemas.Completion, "/score": schemas.PairScore,
        "/pooling": schemas.Pooling, "/generate": schemas.PublishedGenerate,
    }  # fmt: skip
    kind, body = kinds[path], NEUTRAL[path]
    names = set(kind.refused)
    for name, field in kind.model_fields.items():
        names |= set(field.validation_alias.choices) if field.validation_alias else {name}
    assert len(names) > 5
    nulls = dict.fromkeys(sorted(names - body.keys()))

    def answer(body):
        found = letters.http.post(path, json=body)
        assert found.status_code == 200, found.text
        return {k: v for k, v in found.json().items() if k not in ("id", "created")}

    assert answer({**nulls, **body}) == answer(body)
    assert answer({**nulls, **body, "stream_options": {"include_usage": None}}) == answer(body)


def test_null_of_the_published_score(letters):
    body = {"text": "ABC" + STEPS[0], "return_all_scores": None, "text_1": None, "text_2": None}
    assert (
        letters.http.post("/score", json=body).json() == letters.http.post("/score", json={"text": body["text"]}).json()
    )


def test_a_limit_is_not_lifted_by_the_null_of_its_other_name(letters):
    body = {"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 4, "seed": 1, "max_completion_tokens": None}
    assert letters.http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] <= 4


def test_several_prompts_are_answered_each_as_alone(alone, client):
    texts = ["ABC", "Z", "KLMN"]
    ids = [alone.encode(text)[0].tolist() for text in texts]
    found = [alone.generate(t, n=2, seed=3, temperature=1.0, top_p=0.9, max_new_tokens=40) for t in texts]
    expected = [c for generation in found for c in generation.candidates]
    for prompt in (texts, ids):
        made = client.completions.create(model="tiny", prompt=prompt, n=2, seed=3, **SAMPLING)
        assert [c.index for c in made.choices] == list(range(6))
        assert [c.text for c in made.choices] == [c.text for c in expected]
        assert all(same(choice.reflective, c) for choice, c in zip(made.choices, expected, strict=True))
        assert made.usage.prompt_tokens == sum(map(len, ids))
    *parts, last = client.completions.create(
        model="tiny", prompt=ids, n=2, seed=3, stream=True, stream_options={"include_usage": True}, **SAMPLING
    )
    for i, c in enumerate(expected):
        own = [p.choices[0] for p in parts if p.choices[0].index == i]
        assert "".join(p.text for p in own) == c.text and own[-1].finish_reason == c.status
    assert last.usage == made.usage
    (one,) = client.completions.create(model="tiny", prompt=[ids[0]], seed=3, **SAMPLING).choices
    assert one.text == expected[0].text
    chosen = client.completions.create(
        model="tiny", prompt=texts, seed=3, extra_body={"best_of": 2}, **SAMPLING
    ).choices
    assert [c.text for c in chosen] == [generation.text for generation in found]


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_several_prompts_is_wrong(alone, client, stream):
    expected = alone.generate("ABC", seed=3, n=1, temperature=1.0, top_p=0.9, max_new_tokens=40)
    prompts = ["", "ABC", "A" * 600]
    made = client.completions.create(model="tiny", prompt=prompts, seed=3, stream=stream, **SAMPLING)
    choices = [p.choices[0] for p in made] if stream else made.choices
    assert {c.index for c in choices} == {0, 1, 2}
    assert "".join(c.text for c in choices if c.index == 1) == expected.text
    for i, says in ((0, "prompt[0]: it is empty"), (2, "prompt[2]: 600 tokens")):
        (wrong,) = [c for c in choices if c.index == i]
        assert wrong.finish_reason == "error" and wrong.text == "" and says in wrong.reflective["error"]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "at least 1 item"),
        (["", ""], "prompt[1]: it is empty"),
        (["A", 5], "item 1: expected a text or token ids"),
        ([[5], []], "item 1: expected a text or token ids"),
        ([True], "item 0: expected a text or token ids"),
        (None, "Field required"),
        (["A"] * 65, "65 in one request"),
        ([["x"]] * 1_000_000, "item 0: expected a text or token ids"),
    ],
)
def test_refusals_of_prompts(letters, prompt, says):
    answer = letters.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"] and len(answer.text) < 1000


def test_a_chat_in_which_a_tool_was_called(metastone):
    """As the openai client sends it back: content null, arguments as JSON."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    body = {
        "messages": chat,
        "max_tokens": 4,
        "tools": tools,
        "tool_choice": "none",
        "stop": "",
        "response_format": {"type": "text"},
    }
    answer = metastone.http.post("/v1/chat/completions", json=body)
    text = "<|user|>1 + 1?\n<|assistant|>\n<|tool|>2\n<|assistant|><think>"
    assert answer.json()["usage"]["prompt_tokens"] == len(metastone.model.tokenizer(text).input_ids)
    for wrong in ({"tool_choice": "auto"}, {"tool_choice": None}):
        assert "tools is not supported" in metastone.http.post("/v1/chat/completions", json={**body, **wrong}).text
    called = {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    assert schemas.Message(**chat[1]).templated == {"role": "assistant", "content": "", "tool_calls": [called]}
    assert schemas.Message(**chat[2]).templated == {"role": "tool", "content": "2", "tool_call_id": "1"}


def test_completions_with_what_asks_for_nothing(letters):
    neutral = {"suffix": "", "stop": "", "echo": False, "logit_bias": {}, "stop_token_ids": [], "ignore_eos": False}
    answer = letters.http.post("/v1/completions", json={"prompt": "ABC", "max_tokens": 4, **neutral})
    assert answer.status_code == 200, answer.text


def test_one_model_by_its_name(client, letters):
    assert client.models.retrieve("tiny") == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("org/other")
    text = letters.http.get("/metrics").text
    assert 'route="/v1/models/{model}",status="404"' in text and "org/other" not in text


def test_without_max_tokens_a_response_may_fill_the_context():
    with live(endless()) as server:
        body = {"messages": [{"role": "user", "content": "A" * 490}]}
        answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["total_tokens"] == 512 and answer["choices"][0]["finish_reason"] == "length"


def test_errors_are_those_that_the_openai_client_knows(client):
    ask = {"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 4}
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="other", **ask)
    with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
        client.chat.completions.create(model="tiny", response_format={"type": "json_object"}, stream=True, **ask)


def test_a_chat_goes_through_the_template(metastone):
    chat = [("system", "be brief"), ("user", "1 + 1?"), ("assistant", "2"), ("user", "and 1?")]
    body = {"messages": [{"role": role, "content": text} for role, text in chat], "max_tokens": 4}
    used = metastone.http.post("/v1/chat/completions", json=body).json()["usage"]
    text = "".join(f"<|{role}|>{text}\n" for role, text in chat) + "<|assistant|><think>"
    assert used["prompt_tokens"] == len(metastone.model.tokenizer(text).input_ids)


def test_eight_at_once_are_answered_as_one_by_one(letters):
    def ask(i):
        body = {"messages": [{"role": "user", "content": "ABCDEFGH"[i:]}], "n": 1 + i % 3, "seed": i, **SAMPLING}
        return letters.http.post("/v1/chat/completions", json=body).json()["choices"]

    alone = [ask(i) for i in range(8)]
    rows = []
    handle = letters.model.model.register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True
    )
    with slowed(letters.model, 0.005), ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    handle.remove()
    assert max(rows) == 8, "in one batch"
    for one, other in zip(alone, together, strict=True):
        assert [c["message"] for c in one] == [c["message"] for c in other]
        for a, b in zip(one, other, strict=True):
            assert a["reflective"]["score"] == pytest.approx(b["reflective"]["score"], rel=1e-4)


# -- vLLM ------------------------------------------------------------------------------------------------------------


def test_pooling(letters, alone):
    text = "ABC" + STEPS[0] + "XYZ" + STEPS[3]
    whole, other = alone.score("", [text, "AAAA"])
    assert len(whole.step_scores) > 1
    answer = letters.http.post("/pooling", json={"model": "tiny", "input": [text, "AAAA"]}).json()
    assert answer["object"] == "list" and [d["object"] for d in answer["data"]] == ["pooling"] * 2
    assert [row for (row,) in answer["data"][0]["data"]] == pytest.approx(whole.step_scores, rel=1e-4)
    assert answer["data"][1]["data"] == [] and other.step_scores == []
    ids = alone.tokenizer(text).input_ids
    assert answer["usage"]["prompt_tokens"] == len(ids) + 4
    for given in (text, ids, [ids]):
        (one,) = letters.http.post("/pooling", json={"input": given, "task": "classify"}).json()["data"]
        assert one["data"] == pytest.approx([whole.score], rel=1e-4)
    chat = [{"role": "user", "content": "ABC"}, {"role": "assistant", "content": text[3:]}]
    (one,) = letters.http.post("/pooling", json={"messages": chat}).json()["data"]
    (response,) = alone.score("ABC", [text[3:]])
    assert [row for (row,) in one["data"]] == pytest.approx(response.step_scores, rel=1e-4)


@pytest.mark.parametrize(
    "fields", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs(letters, alone, path, fields):
    responses = ["ABC" + STEPS[0] + "DEF" + STEPS[1], "XYZ" + STEPS[2] + "A"]
    found = alone.score("KLM", responses)
    answer = letters.http.post(path, json=dict(zip(fields, ["KLM", responses], strict=True))).json()
    assert [d["score"] for d in answer["data"]] == pytest.approx([c.score for c in found], rel=1e-4)
    assert [(d["index"], d["object"]) for d in answer["data"]] == [(0, "score"), (1, "score")]
    assert answer["usage"]["prompt_tokens"] == 2 * 3 + sum(len(c.token_ids) for c in found)
    paired = letters.http.post(path, json=dict(zip(fields, [["KLM", "Z"], responses], strict=True))).json()
    (last,) = alone.score("Z", responses[1:])
    assert [d["score"] for d in paired["data"]] == pytest.approx([found[0].score, last.score], rel=1e-4)


def test_a_chat_that_asks_for_no_answer_is_a_text(letters, alone):
    """As vLLM's pooling example sends it."""
    text = "ABC" + STEPS[0] + "XYZ" + STEPS[3]
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
    (one,) = letters.http.post("/pooling", json=body).json()["data"]
    (whole,) = alone.score("", [text])
    assert [row for (row,) in one["data"]] == pytest.approx(whole.step_scores, rel=1e-4)


@pytest.mark.parametrize("path", ["/score", "/pooling"])
def test_one_of_several_texts_is_wrong(letters, alone, path):
    texts = ["ABC" + STEPS[0], "", "A" * 600, "ABCD" + STEPS[1]]
    body = {"queries": "KLM", "documents": texts} if path == "/score" else {"input": texts, "task": "classify"}
    answer = letters.http.post(path, json=body).json()
    found = alone.score("KLM" if path == "/score" else "", [texts[0], texts[3]])
    given = [d["score"] if path == "/score" else d["data"][0] for d in answer["data"]]
    assert [given[0], given[3]] == pytest.approx([c.score for c in found], rel=1e-4)
    assert given[1] is given[2] is None and [d["index"] for d in answer["data"]] == [0, 1, 2, 3]
    assert answer["data"][1]["error"] == "response[1]: it is empty" and "error" not in answer["data"][0]
    assert "response[2]: " in answer["data"][2]["error"] and "512 positions" in answer["data"][2]["error"]


@pytest.mark.parametrize("field", ["softmax", "activation", "use_activation", "normalize"])
@pytest.mark.parametrize("path", ["/score", "/v1/score", "/pooling"])
def test_activations(letters, path, field):
    body = {"text_1": "A", "text_2": "B"} if "score" in path else {"input": "A"}
    for value in (True, None):
        assert letters.http.post(path, json={**body, field: value}).status_code == 200
    answer = letters.http.post(path, json={**body, field: False})
    assert answer.status_code == 400 and f"{field} is not supported" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/score", {"text_1": "A"}, "Field required"),
        ("/score", {"text_1": ["A", "B"], "text_2": ["C"] * 3}, "2 questions for 3 responses"),
        ("/score", {"text_1": "A", "text_2": []}, "at least 1 item"),
        ("/score", {"text_1": "A", "text_2": ["B"] * 65}, "65 in one request"),
        ("/score", {"text_1": "A", "text_2": "B", "use_activation": False}, "use_activation is not supported"),
        ("/score", {"text_1": "A", "text_2": ""}, "response: it is empty"),
        ("/pooling", {}, "expected input or messages"),
        ("/pooling", {"input": []}, "at least 1 item"),
        ("/pooling", {"input": "A", "encoding_format": "base64"}, "encoding_format is not supported"),
        ("/pooling", {"input": [99999]}, "is no token of this model"),
        ("/pooling", {"input": "A" * 600}, "512 positions"),
    ],
)
def test_refusals_of_texts(letters, path, body, says):
    answer = letters.http.post(path, json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies(chunked):
    with live(reflective_model(), limits=Limits(body_bytes=1000)) as server:
        body = json.dumps({"text": "A" * 2000}).encode()
        given = iter([body[:600], body[600:1200], body[1200:]]) if chunked else body
        answer = server.http.post("/score", content=given, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]
        assert server.http.post("/score", json={"text": "A" * 300}).status_code == 200


def test_a_full_queue():
    model = endless()
    body = {"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 200, "stream": True}
    with slowed(model), live(model, batch_rows=1, max_queue=1) as server, contextlib.ExitStack() as open_streams:
        for running, queued in ((1, 0), (1, 1)):
            open_streams.enter_context(server.http.stream("POST", "/v1/chat/completions", json=body))
            until(
                lambda r=running, q=queued: (
                    (server.engine.stats()["running"], server.engine.stats()["queued"]) == (r, q)
                )
            )
        for path, given in (("/v1/chat/completions", body), ("/score", {"text": "A"})):
            answer = server.http.post(path, json=given)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert "try again" in answer.json()["error"]["message"]


def test_the_api_key():
    with live(reflective_model(), api_key="secret") as server:
        body = {"text": "A"}
        for key in (None, "Bearer wrong", "Bearer secre", "secret", "Basic secret", "Bearer sécret".encode()):
            answer = server.http.post("/score", json=body, headers={"Authorization": key} if key else {})
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert server.http.get("/metrics").status_code == server.http.get("/openapi.json").status_code == 401
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.http.post("/score", json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret").models.list().data[0].id == "tiny"


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_is_up(stream, monkeypatch):
    body = {
        "messages": [{"role": "user", "content": "ABC"}],
        "max_tokens": 400,
        "temperature": 1.0,
        "n": 8,
        "stream": stream,
    }
    with live(endless(), limits=Limits(seconds=0.3)) as server:
        cancelled, asked = held(server, tokens=20)
        # Which begins when the engine is asked: until then a slow machine may take as long as it wants.
        monkeypatch.setattr(Service, "left", lambda *_: 0.3 if asked else None)
        answer = server.http.post("/v1/chat/completions", json=body)
        if stream:
            lines = answer.text.split("\n\n")
            assert json.loads(lines[-3][6:])["error"]["code"] == 504 and lines[-2] == "data: [DONE]"
        else:
            assert answer.status_code == 504 and "longer than 0.3 seconds" in answer.json()["error"]["message"]
        until(lambda: server.engine.stats()["rows"] == 0)
        assert cancelled.is_set() and server.engine.stats()["tokens"] < 8 * 10


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prefix_prompt": "ABC", "response_num": 8}),
        ("/v1/completions", {"prompt": "ABC", "n": 8}),
        ("/v1/completions", {"prompt": "ABC", "n": 8, "stream": True}),
    ],
)
def test_who_hangs_up_is_no_longer_decoded_for(path, body):
    data = json.dumps({"max_tokens": 400, "temperature": 1.0, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with live(endless()) as server:
        cancelled, _ = held(server, tokens=20)
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + data)
            until(lambda: server.engine.stats()["tokens"] >= 20)
        until(lambda: server.engine.stats()["rows"] == 0)
        assert cancelled.is_set() and server.engine.stats()["tokens"] < 8 * 10


def test_who_hangs_up_is_no_longer_scored_for():
    """A text as long as the model admits: it is running, in pieces, and then it is gone."""
    model = endless(prompt=None)
    body = {"text": "A" * 511 + STEPS[0]}
    data = json.dumps(body).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with live(model) as server:
        cancelled, _ = held(server)
        server.engine._pace.most = 64
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + data)
            until(lambda: server.engine.stats()["running"] == 1)
            metrics = server.http.get("/metrics").text
            assert "reflective_running_requests 1.0" in metrics and "reflective_queued_requests 0.0" in metrics
        until(lambda: server.engine.stats()["running"] == 0)
        assert cancelled.is_set() and server.engine.stats()["scored"] == 0
        assert server.http.post("/v1/completions", json={"prompt": "A", "max_tokens": 2}).status_code == 200


def test_clients_that_leave_cost_the_others_nothing():
    """``benchmarks/serve_load.py``, small."""
    model = reflective_model(prompt=None)
    with live(model, max_queue=64) as server:
        handle = model.model.model.register_forward_pre_hook(lambda *_: time.sleep(0.005))
        server.engine._pace.most = 64
        found = asyncio.run(load(server.url, 16, 4, requests=2, text="AB" * 255 + STEPS[0], tokens=4, patience=0.05))
        handle.remove()
    assert found["lost"] == 0 and found["left"] >= 4


@pytest.mark.parametrize("path", ["/score", "/pooling", "/v1/completions"])
def test_the_time_is_up_for_long_texts(path, monkeypatch):
    text = "A" * 500 + STEPS[0]
    body = {"/score": {"text": text}, "/pooling": {"input": text}, "/v1/completions": {"prompt": text, "max_tokens": 2}}
    model = reflective_model(prompt=None)
    with live(model, limits=Limits(seconds=0.5)) as server:
        cancelled, asked = held(server)
        monkeypatch.setattr(Service, "left", lambda *_: 0.3 if asked else None)
        server.engine._pace.most = 64
        answer = server.http.post(path, json=body[path])
        assert answer.status_code == 504 and "longer than 0.5 seconds" in answer.text
        until(lambda: server.engine.stats()["running"] == server.engine.stats()["queued"] == 0)
        assert cancelled.is_set()
        monkeypatch.undo()
        until(lambda: server.http.post("/score", json={"text": "A"}).status_code == 200)


def test_slow_clients_stall_nobody():
    """Some dribble their head, some their body, some read nothing of what is streamed to them."""
    body = json.dumps({"prompt": "ABC", "max_tokens": 500, "n": 8, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with live(endless(), limits=Limits(seconds=tiny.PATIENCE)) as server, contextlib.ExitStack() as connections:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))

        def connect():
            connection = connections.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(address)
            return connection

        for cut in (5, len(head) - 3, len(head), len(head) + 20):
            for _ in range(5):
                connect().sendall((head.encode() + body)[:cut])
        unread = [connect() for _ in range(3)]
        for connection in unread:
            connection.sendall(head.encode() + body)
        for seed in range(5):
            ask = {"prompt": "KLM", "max_tokens": 4, "seed": seed}
            assert server.http.post("/v1/completions", json=ask).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for():
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with (
        live(reflective_model(), limits=Limits(seconds=0.3)) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection,
    ):
        connection.sendall(head)
        connection.settimeout(tiny.PATIENCE)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


# -- metrics, and the end --------------------------------------------------------------------------------------------


def test_metrics():
    from prometheus_client.parser import text_string_to_metric_families

    def read(server):
        text = server.http.get("/metrics").text
        families = text_string_to_metric_families(text)
        return {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}

    with live(endless(prompt=None)) as server:
        body = {"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 10, "temperature": 1.0, "n": 3}
        tokens = server.http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"]
        server.http.post("/v1/chat/completions", json={})
        server.http.post("/score", json={"text": "ABC" + STEPS[0]})
        server.http.get("/none/of/these")
        found = read(server)
        assert found["reflective_requests_total", "/v1/chat/completions", "200"] == 1
        assert found["reflective_requests_total", "/v1/chat/completions", "400"] == 1
        assert found["reflective_requests_total", "404", "other"] == 1
        assert found["reflective_request_seconds_count", "/v1/chat/completions"] == 2
        assert found["reflective_request_seconds_sum", "/v1/chat/completions"] > 0
        assert found[("reflective_tokens_total",)] == tokens and found[("reflective_scored_texts_total",)] == 1
        assert found[("reflective_trajectory_score_count",)] == 4
        assert found[("reflective_rows",)] == found[("reflective_queued_requests",)] == 0
        with (
            slowed(server.model),
            server.http.stream("POST", "/v1/chat/completions", json={**body, "max_tokens": 300, "stream": True}),
        ):
            until(lambda: read(server)[("reflective_rows",)] == 3)
            assert read(server)[("reflective_running_requests",)] == 1


def test_a_score_that_is_no_number(letters, monkeypatch):
    broken = rf.model.Candidate("x", math.nan, [math.nan], [(0, 1)], [5], error="the hidden state holds NaN")
    monkeypatch.setattr(letters.model, "score_tokens", lambda *_, **__: [broken])
    assert letters.http.post("/score", json={"text": "A"}).json() == {"error": "the hidden state holds NaN"}
    (data,) = letters.http.post("/v1/score", json={"text_1": "A", "text_2": "B"}).json()["data"]
    assert data["score"] is None and data["error"] == "the hidden state holds NaN"


def test_a_failure_of_the_engine_is_told(letters, monkeypatch):
    monkeypatch.setattr(letters.model, "score_tokens", lambda *_, **__: 1 / 0)
    assert letters.http.post("/score", json={"text": "A"}).json() == {"error": "ZeroDivisionError: division by zero"}
    answer = letters.http.post("/pooling", json={"input": "A"})
    assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"]["message"]


def test_shutting_down_cancels_what_is_not_finished_in_time_and_says_so(published):
    body = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 300, "n": 2, "temperature": 1.0, "seed": 1}
    with process(published, seconds=0.3, grace=1.0, batch_rows=2) as (server, url):
        with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=url, timeout=tiny.PATIENCE) as http:
            whole = pool.submit(http.post, "/v1/chat/completions", json=body)
            until(lambda: "reflective_rows 2.0" in http.get("/metrics").text)
            streamed = pool.submit(http.post, "/v1/chat/completions", json={**body, "stream": True})
            until(lambda: "reflective_queued_requests 1.0" in http.get("/metrics").text)
            server.send_signal(signal.SIGINT)
            whole, streamed = whole.result(), streamed.result()
        assert whole.status_code == 503 and "shutting down; " in whole.json()["error"]["message"]
        events = streamed.text.split("\n\n")
        assert json.loads(events[-3][6:])["error"]["code"] == 503 and events[-2] == "data: [DONE]"
        lines = [line for line in server.stderr.read().splitlines() if line.startswith("cancelled at shutdown: ")]
        assert len(lines) == 2 and "tokens decoded" in lines[0] and "still queued" in lines[1]
        assert server.wait(tiny.PATIENCE) == 0


# -- text as it comes ------------------------------------------------------------------------------------------------

TEXTS = [
    "plain text",
    "naïve ☃ 中文 \U0001f600!",
    " leading",
    "stST stop",
    "aaab",
    "\U0001f469\u200d\U0001f680 ok",
    "�x",
]
STOPS = [(), ("stop",), ("aab",), ("b", "aaab"), ("中",), ("\U0001f600!",)]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_text(small, text, stop):  # noqa: F811
    tokens = small.tokenizer(text).input_ids
    for seed in range(5):
        cuts = sorted(random.Random(seed).choices(range(len(tokens) + 1), k=seed * 3))
        incoming, pieces = Incoming(small.decode, stop), []
        for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
            pieces.append(incoming.feed(tokens[begin:end]))
            certain = before(small.decode(tokens[:end]), stop).rstrip("\ufffd")
            assert "".join(pieces) == certain[: len("".join(pieces))]
        assert "".join([*pieces, incoming.finish(text)]) == before(text, stop)
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_pieces_of_bytes_that_are_no_text(small):  # noqa: F811
    rng = random.Random(0)
    for _ in range(20):
        tokens = [rng.randrange(2, 258) for _ in range(60)]
        incoming = Incoming(small.decode, ["a", "zz"])
        pieces = [incoming.feed([token]) for token in tokens]
        text = small.decode(tokens)
        assert "".join([*pieces, incoming.finish(text)]) == before(text, ["a", "zz"])


def test_what_may_become_a_stop_text_is_held_back(small):  # noqa: F811
    incoming = Incoming(small.decode, ["stop!"])
    feed = [incoming.feed(small.tokenizer(piece).input_ids) for piece in ("a st", "o", "p", "s", "top", "!x")]
    assert feed == ["a ", "", "", "stop", "", ""]


def test_a_stream_of_bytes_holds_no_broken_characters(small):  # noqa: F811
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "seed": 3,
        "temperature": 1.5,
        "top_p": 1.0,
        "max_tokens": 200,
    }
    unanswered = rf.ReflectiveModel(small.model, small.tokenizer, small.head, replace(small.config, answer=None))
    with live(unanswered) as server:
        whole = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        events = server.http.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")[:-2]
        pieces = [json.loads(e[6:])["choices"][0]["delta"].get("content", "") for e in events]
    assert "".join(pieces) == whole and len(pieces) > 10
