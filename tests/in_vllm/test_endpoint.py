"""Scores in the answers of vLLM's own server: real ones, on loopback, asked by the ``openai`` client and by HTTP."""

import asyncio
import json
import math
import re
import shutil

import httpx
import openai
import pytest
from common import settings
from servers import empty, server, stats

PROMPTS = ["First add 3 and 4.\n\nThen", "We count the primes"]
CHAT = [{"role": "user", "content": "add 3 and 4"}]
DRAWN = {"model": "tiny", "temperature": 1.0, "max_tokens": 48, "n": 8, "seed": 7}
WITH_IDS = {"return_token_ids": True}
PRUNE = {"threshold": 1.0, "min_steps": 2}
END = 0  # the tokenizer's first


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory):
    with server(settings(tiny, max_num_seqs=32), tmp_path_factory.mktemp("scored")) as url:
        yield url
        found = empty(url)
        assert found["rows"] == found["kept"] == 0


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The same model as vLLM has it without scores, and without a head beside its weights."""
    place = tmp_path_factory.mktemp("plain")
    shutil.copytree(tiny, place, ignore=shutil.ignore_patterns("score_module*"), dirs_exist_ok=True)
    scoring = ("hf_overrides", "worker_extension_cls", "additional_config")
    said = settings(tiny, max_num_seqs=32) | {"model": str(place)}
    return {name: value for name, value in said.items() if name not in scoring}


@pytest.fixture(scope="module")
def stock(plain, tmp_path_factory):
    """A server without the plugin."""
    with server(plain, tmp_path_factory.mktemp("stock"), plugins="") as url:
        yield url


@pytest.fixture(scope="module")
def pruning(tiny, tmp_path_factory):
    with server(settings(tiny, max_num_seqs=32, prune=PRUNE), tmp_path_factory.mktemp("prune")) as url:
        yield url


def client(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)


def check(field, prompt, ids, truth):
    scores, columns = truth(prompt, ids)
    assert field["error"] is None
    assert field["positions"] == [c - len(prompt) for c in columns]
    assert field["step_scores"] == pytest.approx(scores, abs=1e-5)
    n = len(scores)
    assert field["score"] == pytest.approx(math.prod(scores) ** (1 / n) if n else 0, abs=1e-5)
    return n


def gathered(chunks):
    """Of a stream's chunks, the ids of prompt and response and the field of every choice, which comes with its end and only then."""
    prompts, ids, fields = {}, {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            i = choice.index
            ids.setdefault(i, []).extend(getattr(choice, "token_ids", None) or [])
            prompt = getattr(choice, "prompt_token_ids", None) or getattr(chunk, "prompt_token_ids", None)
            prompts[i] = prompts.get(i) or prompt
            assert hasattr(choice, "reflective") == (choice.finish_reason is not None)
            if choice.finish_reason:
                assert i not in fields
                fields[i] = choice.reflective
    return prompts, ids, fields


def test_completions(scored, truth):
    ask = client(scored).completions.create
    answer = ask(prompt=PROMPTS, extra_body=WITH_IDS, **DRAWN)
    assert [c.index for c in answer.choices] == list(range(16))
    steps = [check(c.reflective, c.prompt_token_ids, c.token_ids, truth) for c in answer.choices]
    assert sum(steps) > 20
    assert len({tuple(c.prompt_token_ids) for c in answer.choices}) == 2

    prompts, ids, fields = gathered(ask(prompt=PROMPTS, stream=True, extra_body=WITH_IDS, **DRAWN))
    assert sorted(fields) == list(range(16))
    for i, c in enumerate(answer.choices):
        first = prompts[i - i % 8] or c.prompt_token_ids
        assert (first, ids[i]) == (c.prompt_token_ids, c.token_ids)  # by seed
        check(fields[i], first, ids[i], truth)


def test_chat(scored, truth):
    ask = client(scored).chat.completions.create
    answer = ask(messages=CHAT, extra_body=WITH_IDS, **DRAWN)
    steps = [check(c.reflective, answer.prompt_token_ids, c.token_ids, truth) for c in answer.choices]
    assert len(steps) == 8 and sum(steps) > 10
    _, ids, fields = gathered(ask(messages=CHAT, stream=True, extra_body=WITH_IDS, **DRAWN))
    assert [ids[i] for i in range(8)] == [c.token_ids for c in answer.choices]
    for i in range(8):
        check(fields[i], answer.prompt_token_ids, ids[i], truth)


def test_nothing_else_is_said_than_vllm_says(scored, stock):
    """Without the field, the answers are those of a server without the plugin; ids that are not asked for are not given."""
    for path, body in REQUESTS:
        (status, mine), (_, theirs) = (told(send(url, path, body)) for url in (scored, stock))
        mine, theirs = (json.loads(said) if isinstance(said, str) else said for said in (mine, theirs))
        assert status == 200
        for choice in mine["choices"]:
            field = choice.pop("reflective")
            assert set(field) == {"score", "step_scores", "positions", "error"} and field["error"] is None
        assert mine == theirs


USAGE = {"stream_options": {"include_usage": True}}
CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
REQUESTS = [
    ("completions", {"prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}),
    ("completions", {"prompt": PROMPTS, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 2, "logprobs": 2}),
    ("completions", {"prompt": PROMPTS[0], "max_tokens": 0, "echo": True}),
    ("completions", {"prompt": PROMPTS[0], "max_tokens": 5, "temperature": 0, "echo": True}),
    ("completions", {"prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "stream": True}),
    ("completions", {"prompt": "é\n", "max_tokens": 24, "seed": 1, "n": 2, "stream": True} | USAGE),
    ("chat/completions", {"messages": CHAT, "max_tokens": 24, "seed": 5, "n": 3}),
    ("chat/completions", {"messages": CHAT, "max_tokens": 24, "seed": 5, "logprobs": True, "stop": ["e"]}),
    ("chat/completions", {"messages": CHAT, "max_tokens": 9, "seed": 5, "n": 2, "stream": True} | USAGE),
    ("chat/completions", {"messages": CHAT, "max_tokens": 9, "seed": 5, "stream": True} | CONTINUOUS),
]
WRONG = [
    ("completions", {"prompt": PROMPTS[0], "max_tokens": 9000}),
    ("completions", {"prompt": PROMPTS[0], "temperature": -1, "stream": True}),
    ("completions", {"prompt": {"a": 1}}),
    ("completions", {"prompt": PROMPTS[0], "model": "another"}),
    ("chat/completions", {"messages": CHAT, "n": 0}),
    ("chat/completions", {"messages": "?"}),
    ("chat/completions", {"messages": CHAT, "max_tokens": 4, "stream": True, "logit_bias": {"99999": 1}}),
]


def send(url, path, body):
    headers = {"X-Request-Id": "same"}
    return httpx.post(f"{url}/v1/{path}", json={"model": "tiny", **body}, headers=headers, timeout=300)


def told(answer):
    """Status and text of an answer, without its time and what names the server's process. A stream's tokens come one by one or several at a time,
    as the server finds time for them, and choices as they come: so events are joined by choice."""
    text = re.sub(r'"created":\d+', '"created":0', answer.text)
    text = re.sub(r'"system_fingerprint":"[^"]*"', '"system_fingerprint":""', text)
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.status_code, text
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    choices, others = {}, []
    for event in [json.loads(event.removeprefix("data: ")) for event in events[:-2]]:
        for choice in event.get("choices", []):
            assert ("reflective" in choice) == (choice["finish_reason"] is not None) or "reflective" not in text
            so_far = choices.setdefault(choice["index"], {"text": "", "content": ""})
            so_far["content"] += choice.get("delta", {}).pop("content", "")
            so_far["text"] += choice.pop("text", "")
            so_far |= choice | ({"delta": {**so_far.get("delta", {}), **choice["delta"]}} if "delta" in choice else {})
        if not event.get("choices"):
            others.append(event)
    return answer.status_code, {**event, "choices": [choices[i] for i in sorted(choices)], "others": others}


def test_errors_come_through(scored, stock):
    for path, body in WRONG:
        mine, theirs = (told(send(url, path, body)) for url in (scored, stock))
        assert mine == theirs
        assert mine[0] in (400, 404) or mine[1]["others"][0]["error"]["code"] == 400
    assert stats(scored)["kept"] == 0


def test_installed_but_unused(plain, stock, tmp_path_factory):
    """The same bytes, but for times, and in a stream for where one chunk ends and the next begins."""
    with server(plain, tmp_path_factory.mktemp("unused")) as url:
        for path, body in REQUESTS + WRONG:
            assert told(send(url, path, body)) == told(send(stock, path, body))


def test_beam_search_has_no_scores(scored):
    body = {"prompt": PROMPTS[0], "max_tokens": 6, "use_beam_search": True, "n": 2, "temperature": 0}
    choices = send(scored, "completions", body).json()["choices"]
    assert [c["reflective"]["error"] for c in choices] == ["beam search is not scored"] * 2
    found = empty(scored)
    assert found["rows"] == found["kept"] == 0


def test_clients_that_hang_up(scored, truth):
    """64 at a time, a third of which leave: before the answer begins, or in the midst of it."""

    async def ask(http, i):
        body = {
            "model": "tiny", "prompt": f"{PROMPTS[i % 2]} {i}", "max_tokens": 64, "n": 1 + i % 3, "seed": i, "temperature": 1,
            **WITH_IDS,
        }  # fmt: skip
        if i % 2:
            body["stream"] = True
        if i % 3 == 0:
            return await leave(http, body, i)
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200
        events = [answer.text] if not i % 2 else [e[6:] for e in answer.text.split("\n\n") if e.startswith("data: {")]
        prompt, ids, fields = None, {}, {}
        for c in [c for event in events for c in json.loads(event)["choices"]]:
            prompt = c["prompt_token_ids"] or prompt
            ids[c["index"]] = ids.get(c["index"], []) + c["token_ids"]
            if c["finish_reason"]:
                fields[c["index"]] = c["reflective"]
        assert len(fields) == body["n"]
        return prompt, ids, fields

    async def leave(http, body, i):
        try:
            async with http.stream("POST", "/v1/completions", json=body, timeout=0.02 * (1 + i % 7)) as answer:
                async for _ in answer.aiter_lines():
                    if i % 2:
                        return
        except httpx.TimeoutException:
            pass

    async def everybody():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=scored, timeout=300, limits=limits) as http:
            return await asyncio.gather(*[ask(http, i) for i in range(64)])

    answers = [a for a in asyncio.run(everybody()) if a]
    assert len(answers) == 42
    for prompt, ids, fields in answers:
        for i, field in fields.items():
            check(field, prompt, ids[i], truth)
    found = empty(scored)
    assert found["rows"] == found["kept"] == 0


def test_no_row_is_left(scored):
    """Of short requests; ``benchmarks/vllm_soak.py`` sends 10,000."""

    async def everybody():
        async with httpx.AsyncClient(base_url=scored, timeout=300) as http:
            free = asyncio.Semaphore(32)

            async def ask(i):
                body = {
                    "model": "tiny",
                    "prompt": [i % 256, 5],
                    "max_tokens": 1 + i % 3,
                    "n": 1 + i % 2,
                    "stream": bool(i % 4),
                }
                async with free:
                    return (await http.post("/v1/completions", json=body)).text.count('"reflective":{"score"')

            return await asyncio.gather(*[ask(i) for i in range(400)])

    assert asyncio.run(everybody()) == [1 + i % 2 for i in range(400)]
    found = empty(scored)
    assert found["rows"] == found["kept"] == 0


def ended(url, body):
    """By index: ids, field and finish reason, and the ids of the prompts."""
    answer = client(url).completions.create(**body)
    chunks = list(answer) if body["stream"] else [answer]
    reasons = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    return *gathered(chunks), reasons


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"min_tokens": 400}, {"ignore_eos": True}], ids=str)
def test_prune(pruning, scored, truth, more, stream):
    """Who is pruned, by a rule that others test, says the beginning of what it would have said, and ends; the others say it all."""
    body = {"prompt": PROMPTS, "extra_body": WITH_IDS | more, **DRAWN, "max_tokens": 400, "stream": stream}
    prompts, ids, fields, reasons = ended(pruning, body)
    _, whole, _, usual = ended(scored, body)
    pruned = [i for i in range(16) if fields[i]["pruned"]]
    assert 2 <= len(pruned) <= 14
    for i in range(16):
        check(fields[i], prompts[i - i % 8], ids[i], truth)
        if i not in pruned:
            assert (ids[i], reasons[i]) == (whole[i], usual[i])
            continue
        same = ids[i].index(END) if END in ids[i] else len(ids[i])
        assert same < len(whole[i]) and ids[i][:same] == whole[i][:same]
        # To some releases the forced token is the end in spite of min_tokens.
        assert reasons[i] in {"ignore_eos": ["abort"], "min_tokens": ["abort", "stop"]}.get("".join(more), ["stop"])
    found = empty(pruning)
    assert found["rows"] == found["kept"] == 0
