"""Log-probabilities in OpenAI's routes, against those of a whole forward of transformers."""

import json
import math
from dataclasses import replace
from operator import itemgetter

import pytest
import tiny
import torch
from test_model import small  # noqa: F401 (a fixture)
from test_search import QUESTIONS, reflective_model
from test_serve import SAMPLING, client, live, metastone, openai, published  # noqa: F401 (fixtures)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import reflective as rf
from reflective.engines.base import Chance
from reflective.engines.hf import engine
from reflective.serve import logprobs
from reflective.serve.engine import Engine
from reflective.serve.logprobs import Spelling, Told
from reflective.serve.text import Incoming

CHAT = [{"role": "user", "content": "ABCDE"}]
EXACT = {"rel": 0, "abs": 1e-4}


def reference(model, ids):
    """Log-probabilities [T - 1, V] of what follows each of ``ids`` but the last."""
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def check(model, prompt, tokens, found, k):
    """``found``: of every one of ``tokens`` its log-probability and those of the ``k`` likeliest, in order."""
    expected = reference(model, [*prompt, *tokens])[len(prompt) - 1 :]
    assert len(found) == len(tokens)
    for row, token, (own, top) in zip(expected, tokens, found, strict=True):
        assert own == pytest.approx(row[token].item(), **EXACT)
        assert top == pytest.approx(row.topk(k).values.tolist(), **EXACT)


def places(model, tokens):
    return [len(model.decode(tokens[:i])) for i in range(len(tokens))]


def with_end(model, c):
    return c.token_ids + [model.tokenizer.eos_token_id] * (c.status == "stop")


def of_chat(choice):
    return [(e.logprob, [t.logprob for t in e.top_logprobs]) for e in choice.logprobs.content]


def of_completion(said):
    """Of all but the first token of a prompt, of which nothing is known; the likeliest and the one that came, in order."""
    rows = zip(said.token_logprobs, said.top_logprobs, strict=True)
    return [(own, sorted(top.values(), reverse=True)) for own, top in rows if top is not None]


def test_chat(letters, alone, client):  # noqa: F811
    ask = {"model": "tiny", "messages": CHAT, "n": 3, "seed": 7, **SAMPLING, "temperature": 0.7}
    made = client.chat.completions.create(logprobs=True, top_logprobs=3, **ask)
    expected = alone.generate("ABCDE", n=3, seed=7, temperature=0.7, top_p=0.9, max_new_tokens=40)
    prompt = alone.encode("ABCDE")[0].tolist()
    assert len({c.status for c in expected.candidates}) == 2, "some end by themselves"
    for choice, c in zip(made.choices, expected.candidates, strict=True):
        assert choice.message.content == c.text, "as without"
        check(alone, prompt, with_end(alone, c), of_chat(choice), 3)
        entries = choice.logprobs.content
        assert [e.token for e in entries] == [alone.decode([t], special=True) for t in with_end(alone, c)]
        assert b"".join(bytes(e.bytes) for e in entries).decode() == c.text
        assert all(bytes(t.bytes).decode() == t.token for e in entries for t in e.top_logprobs if t.bytes)
        assert sum(e.logprob for e in entries) == pytest.approx(c.log_prob, rel=1e-4)
    (plain,) = client.chat.completions.create(logprobs=True, **{**ask, "n": 1}).choices
    assert [(own, []) for own, _ in of_chat(made.choices[0])] == [
        (pytest.approx(own, **EXACT), top) for own, top in of_chat(plain)
    ]
    assert all(c.logprobs is None for c in client.chat.completions.create(**ask).choices)


def test_one_of_several_has_those_of_its_own(alone, client):  # noqa: F811
    for asked in ({"best_of": 4}, {"strategy": "particles", "best_of": 4}, {"strategy": "step_beam", "best_of": 4}):
        ask = {"model": "tiny", "messages": CHAT, "seed": 2, "extra_body": asked, **SAMPLING}
        choice = client.chat.completions.create(logprobs=True, top_logprobs=2, **ask).choices[0]
        best = alone.generate("ABCDE", n=4, strategy=asked.get("strategy"), seed=2, temperature=1.0, top_p=0.9, max_new_tokens=40).best  # fmt: skip
        check(alone, alone.encode("ABCDE")[0].tolist(), with_end(alone, best), of_chat(choice), 2)


def test_one_of_several_streamed_behind_its_prompt(client):  # noqa: F811
    ask = {
        "model": "tiny",
        "prompt": ["ABC", "Z"],
        "seed": 2,
        "extra_body": {"best_of": 4},
        "logprobs": 1,
        "echo": True,
    }
    made = client.completions.create(**ask, **SAMPLING)
    parts = [c for p in client.completions.create(stream=True, **ask, **SAMPLING) for c in p.choices]
    for choice in made.choices:
        own = [p for p in parts if p.index == choice.index]
        assert "".join(p.text for p in own) == choice.text
        assert [t for p in own if p.logprobs for t in p.logprobs.tokens] == choice.logprobs.tokens
        assert [i for p in own if p.logprobs for i in p.logprobs.text_offset] == choice.logprobs.text_offset
        assert own[-1].reflective["step_spans"] == choice.reflective["step_spans"]


@pytest.mark.parametrize("stop", [None, 3], ids=["whole", "stop"])
def test_streamed_chunks_have_those_of_their_text(client, stop):  # noqa: F811
    ask = {"model": "tiny", "messages": CHAT, "n": 3, "seed": 4, "logprobs": True, "top_logprobs": 2, **SAMPLING}
    if stop:
        text = client.chat.completions.create(**ask).choices[1].message.content
        ask["stop"] = [text[stop : stop + 3]]
    made = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(stream=True, **ask))
    pieces = 0
    for choice in made.choices:
        parts = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        told = [e for p in parts if p.logprobs for e in p.logprobs.content]
        assert [e.token for e in told] == [e.token for e in choice.logprobs.content]
        assert [e.logprob for e in told] == pytest.approx([e.logprob for e in choice.logprobs.content], **EXACT)
        assert b"".join(bytes(e.bytes) for e in told).decode() == choice.message.content
        for p in parts:
            own = b"".join(bytes(e.bytes) for e in p.logprobs.content).decode() if p.logprobs else ""
            assert own == (p.delta.content or "")
            pieces += bool(own)
    assert pieces > 20
    parts = list(
        client.completions.create(model="tiny", prompt="ABCDE", seed=4, n=3, logprobs=2, stream=True, **SAMPLING)
    )
    whole = client.completions.create(model="tiny", prompt="ABCDE", seed=4, n=3, logprobs=2, **SAMPLING)
    for choice in whole.choices:
        own = [p.choices[0].logprobs for p in parts if p.choices[0].index == choice.index and p.choices[0].logprobs]
        assert [t for p in own for t in p.tokens] == choice.logprobs.tokens
        assert [i for p in own for i in p.text_offset] == choice.logprobs.text_offset


def test_completions(alone, client):  # noqa: F811
    texts = ["ABC", "Z"]
    made = client.completions.create(model="tiny", prompt=texts, n=2, seed=1, logprobs=3, **SAMPLING)
    expected = [alone.generate(t, n=2, seed=1, temperature=1.0, top_p=0.9, max_new_tokens=40) for t in texts]
    expected = [(alone.encode(g.prompt)[0].tolist(), c) for g in expected for c in g.candidates]
    for choice, (prompt, c) in zip(made.choices, expected, strict=True):
        said, tokens = choice.logprobs, with_end(alone, c)
        check(alone, prompt, tokens, [(own, top[:3]) for own, top in of_completion(said)], 3)
        for token, own, top in zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=True):
            assert top[token] == own and len(top) in (3, 4)
        assert said.text_offset == places(alone, tokens) and choice.text == c.text
        assert said.tokens == [alone.decode([t], special=True) for t in tokens]
    none = client.completions.create(model="tiny", prompt="ABC", seed=1, logprobs=0, **SAMPLING).choices[0].logprobs
    assert [list(top) for top in none.top_logprobs] == [[token] for token in none.tokens]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", [0, 1, 5])
def test_echo(letters, alone, client, monkeypatch, limit, stream):  # noqa: F811
    """The logits of a prompt are taken in pieces, here of four tokens."""
    monkeypatch.setattr(engine, "LOGITS", 4 * 61)
    prompts = ["ABCDEFGHIJK", alone.encode("KLMNOPQ")[0].tolist(), "Z"]
    for prompt in prompts:
        ids = alone.encode(prompt)[0].tolist() if isinstance(prompt, str) else prompt
        text = alone.decode(ids)
        sizes = []
        hook = letters.model.model.register_forward_pre_hook(
            lambda m, a, k, sizes=sizes: sizes.append(k["input_ids"].shape[1]), with_kwargs=True
        )
        ask = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": limit,
            "n": 2,
            "echo": True,
            "seed": 3,
            "temperature": 1.0,
        }
        made = client.completions.create(logprobs=2, stream=stream, **ask)
        parts = [c for p in made for c in p.choices] if stream else made.choices
        hook.remove()
        assert max(sizes) <= 4 and sum(s for s in sizes if s > 1) >= len(ids) - 1
        for i in range(2):
            own = [p for p in parts if p.index == i]
            lists = [p.logprobs for p in own if p.logprobs]
            tokens, offsets, found = [], [], []
            for said in lists:
                tokens += said.tokens
                offsets += said.text_offset
                found += of_completion(said)
            assert lists[0].token_logprobs[0] is None and lists[0].top_logprobs[0] is None
            said = "".join(p.text for p in own)
            assert said.startswith(text) and own[-1].finish_reason in ("length", "stop")
            after = alone.tokenizer(said[len(text) :]).input_ids + [2] * (own[-1].finish_reason == "stop")
            assert len(tokens) == len(ids) + len(after) and offsets == places(alone, ids + after)
            check(alone, ids[:1], ids[1:] + after, [(p, top[:2]) for p, top in found], 2)
            assert all(b <= len(said) and a >= len(text) for a, b in own[-1].reflective["step_spans"])
    plain = client.completions.create(model="tiny", prompt="ABC", echo=True, max_tokens=0)
    assert plain.choices[0].text == "ABC" and plain.choices[0].logprobs is None and plain.usage.completion_tokens == 0


def test_echoed_spans_are_of_the_whole_text(client):  # noqa: F811
    ask = {"model": "tiny", "prompt": "ABC", "seed": 1, **SAMPLING}
    without, echoed = (client.completions.create(echo=echo, **ask).choices[0] for echo in (False, True))
    assert echoed.text == "ABC" + without.text and without.reflective["step_spans"]
    assert echoed.reflective["step_spans"] == [[a + 3, b + 3] for a, b in without.reflective["step_spans"]]


def test_an_echo_beside_a_wrong_prompt(client):  # noqa: F811
    made = client.completions.create(model="tiny", prompt=["", "ABC", "A" * 512], echo=True, max_tokens=0, logprobs=1)
    assert [c.text for c in made.choices] == ["", "ABC", "A" * 512]
    assert made.choices[0].logprobs is None and made.choices[0].finish_reason == "error"
    assert len(made.choices[2].logprobs.tokens) == 512


# -- what lm-evaluation-harness 0.4.13 sends, model local-completions at its defaults --------------------------------------


def likelihood(out, lengths):
    """As its ``LocalCompletionsAPI.parse_logprobs``."""
    found = []
    for choice, length in zip(sorted(out["choices"], key=itemgetter("index")), lengths, strict=True):
        said = choice["logprobs"]
        own, top = said["token_logprobs"][length:-1], said["top_logprobs"][length:-1]
        found.append((sum(own), all(p == max(t.values()) for p, t in zip(own, top, strict=True))))
    return found


@pytest.mark.parametrize("form", ["ids", "list of ids", "text"])
def test_requests_of_the_harness(letters, alone, form):
    greedy = alone.generate("KLM", n=1, temperature=0, max_new_tokens=4).text
    pairs = [("ABC", "DE"), ("KLM", greedy), ("Z", "A"), ("ABCDEF", "GHIJKLMNOPQRSTUVWXYZ")]
    right = []
    for context, continuation in pairs:
        ids, length = alone.tokenizer(context + continuation).input_ids, len(context)
        prompt = {"ids": ids, "list of ids": [ids], "text": context + continuation}[form]
        body = {
            "model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True
        }  # fmt: skip
        answer = letters.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        ((total, is_greedy),) = likelihood(answer.json(), [length])
        rows, tokens = reference(alone, ids)[length - 1 :], torch.tensor(ids[length:])
        assert total == pytest.approx(rows.gather(1, tokens[:, None]).sum().item(), **EXACT)
        assert is_greedy == bool((rows.argmax(-1) == tokens).all())
        right.append(is_greedy)
    assert right == [False, True, right[2], False]
    body = {
        "prompt": [alone.encode("KLM")[0].tolist()],
        "model": "tiny",
        "max_tokens": 4,
        "temperature": 0,
        "seed": 1234,
    }
    made = letters.http.post("/v1/completions", json={**body, "stop": ["\n\n", "</s>"]}).json()
    assert made["choices"][0]["text"] == greedy


def test_a_batch_of_the_harness(letters, alone):
    """``batch_size=4``: one request, whose end tokens count as others do."""
    rows = [alone.tokenizer(text).input_ids for text in ("ABCDE", "Z", "KLMNABCZZZ", "AB")]
    body = {
        "model": "tiny",
        "prompt": rows,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    net = letters.model.model
    net.generation_config.eos_token_id = 2
    found = likelihood(letters.http.post("/v1/completions", json=body).json(), [1] * 4)
    for ids, (total, _) in zip(rows, found, strict=True):
        expected = reference(alone, ids).gather(1, torch.tensor(ids[1:])[:, None]).sum().item() if ids[1:] else 0
        assert total == pytest.approx(expected, **EXACT)


def test_a_response_that_ends_at_once_has_its_end_token():
    model = reflective_model(prompt=None)
    likeliest = model.generate("ABC", n=1, temperature=0, max_new_tokens=1).candidates[0].token_ids[0]
    model.model.generation_config.eos_token_id = likeliest
    with live(model) as server:
        body = {"prompt": "ABC", "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
        (choice,) = server.http.post("/v1/completions", json=body).json()["choices"]
        ask = {"messages": [{"role": "user", "content": "ABC"}], "temperature": 0, "logprobs": True, "top_logprobs": 1}
        chat = server.http.post("/v1/chat/completions", json=ask).json()
    assert choice["text"] == "ABC" and choice["finish_reason"] == "stop"
    (entry,) = chat["choices"][0]["logprobs"]["content"]
    assert chat["choices"][0]["message"]["content"] == "" and entry["bytes"] == [], "it is no part of the text"
    assert entry["token"] == entry["top_logprobs"][0]["token"] == model.decode([likeliest])
    assert len(choice["logprobs"]["tokens"]) == 4 and choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs=3: ask for logprobs"),
        ("chat/completions", {"logprobs": False, "top_logprobs": 3}, "top_logprobs=3: ask for logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ("chat/completions", {"logprobs": True, "top_logprobs": -1}, "greater than or equal to 0"),
        ("chat/completions", {"logprobs": 5}, "logprobs: "),
        ("chat/completions", {"echo": True}, "echo is not supported"),
        ("chat/completions", {"prompt_logprobs": 1}, "prompt_logprobs is not supported"),
        ("completions", {"logprobs": 21}, "less than or equal to 20"),
        ("completions", {"logprobs": True}, "logprobs: "),
        ("completions", {"top_logprobs": 2}, "top_logprobs is not supported"),
        ("completions", {"max_tokens": 0}, "max_tokens=0: should be greater than or equal to 1"),
        ("completions", {"max_tokens": -1, "echo": True}, "max_tokens: "),
        (
            "completions",
            {"prompt": ["A" * 500] * 50, "logprobs": 20, "echo": True},
            "525000 of the prompts in one answer",
        ),
    ],
)
def test_refusals(letters, path, more, says):
    given = {"messages": CHAT} if path.startswith("chat") else {"prompt": "ABC"}
    answer = letters.http.post(f"/v1/{path}", json={**given, "max_tokens": 2, **more})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("more", [{"logprobs": False}, {"top_logprobs": 0}, {"echo": False}, {"logprobs": None}])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_what_asks_for_nothing(letters, path, more):
    given = {"messages": CHAT} if path.startswith("chat") else {"prompt": "ABC"}
    answer = letters.http.post(f"/v1/{path}", json={**given, "max_tokens": 2, **more})
    assert answer.status_code == 200 and answer.json()["choices"][0]["logprobs"] is None


# -- in the engine ---------------------------------------------------------------------------------------------------


def test_requests_in_one_batch_keep_what_each_asks_for(alone):
    engine = Engine(reflective_model(prompt=None), batch_rows=6)
    asked = [{"logprobs": None}, {"logprobs": 0}, {"logprobs": 5}, {"logprobs": 1, "prompt_logprobs": 2}]
    futures = [
        engine.generate(QUESTIONS[i % 3], n=2, seed=i, temperature=1.0, max_new_tokens=20, **a)
        for i, a in enumerate(asked)
    ]
    for i, (future, given) in enumerate(zip(futures, asked, strict=True)):
        found = future.result(tiny.PATIENCE)
        plain = alone.generate(QUESTIONS[i % 3], n=2, seed=i, temperature=1.0, max_new_tokens=20)
        for c, expected in zip(found.candidates, plain.candidates, strict=True):
            assert c.token_ids == expected.token_ids
            if given["logprobs"] is None:
                assert c.logprobs is None
                continue
            assert [chance.token for chance in c.logprobs] == with_end(alone, c)
            assert {len(chance.top) for chance in c.logprobs} == {given["logprobs"]}
            assert sum(chance.log_prob for chance in c.logprobs) == pytest.approx(c.log_prob)
    assert [len(chance.top) for chance in found.prompt_logprobs] == [0] + [2] * 7 and plain.prompt_logprobs is None
    assert plain.candidates[0].logprobs is None
    with pytest.raises(ValueError, match="logprobs=-1 must not be negative"):
        engine.generate("A", logprobs=-1)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        engine.generate("A", max_new_tokens=0)
    more = engine.generate("A", max_new_tokens=2, logprobs=100, seed=1).result(tiny.PATIENCE).candidates[0].logprobs
    assert len(more[0].top) == 61, "no more than there are tokens"
    engine.close()


def test_a_long_prompt_is_given_up(alone):
    model = reflective_model(prompt=None)
    engine = Engine(model, batch_tokens=64)
    future = engine.generate("ABC" * 150, prompt_logprobs=1, max_new_tokens=0)
    future.cancel()
    after = engine.generate("AB", prompt_logprobs=1, max_new_tokens=0).result(tiny.PATIENCE)
    assert len(after.prompt_logprobs) == 2 and after.candidates[0].status == "length" and not after.tokens
    whole = engine.generate("ABC" * 150, prompt_logprobs=0, max_new_tokens=0).result(tiny.PATIENCE)
    ids = alone.encode("ABC" * 150)[0].tolist()
    check(alone, ids[:1], ids[1:], [(chance.log_prob, []) for chance in whole.prompt_logprobs[1:]], 0)
    assert engine.stats()["running"] == 0
    engine.close()


# -- spelling --------------------------------------------------------------------------------------------------------


def test_parts_of_characters(small):  # noqa: F811
    text = "naïve ☃ 中文 \U0001f600!"
    with live(small) as server:
        ask = {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 5}
        said = server.http.post("/v1/completions", json=ask).json()["choices"][0]["logprobs"]
    raw = b"".join(
        bytes(int(b, 16) for b in t[6:].split("\\x")[1:]) if t.startswith("bytes:") else t.encode()
        for t in said["tokens"]
    )
    assert raw.decode() == text and "bytes:\\xe2" in said["tokens"] and len(said["tokens"]) == len(text.encode())
    assert all(len(top) >= 5 for top in said["top_logprobs"][1:]), "no two share a name"
    place = [len(raw[:i].decode(errors="ignore")) for i in range(len(raw))]
    assert said["text_offset"] == place


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_that_are_no_text(small, stream):  # noqa: F811
    ask = {
        "messages": [{"role": "user", "content": "x"}], "seed": 3, "temperature": 1.5, "top_p": 1.0, "max_tokens": 120,
        "logprobs": True, "top_logprobs": 1, "stream": stream,
    }  # fmt: skip
    free = rf.ReflectiveModel(small.model, small.tokenizer, small.head, replace(small.config, answer=None))
    with live(free) as server:
        answer = server.http.post("/v1/chat/completions", json=ask)
    if stream:
        parts = [json.loads(e[6:])["choices"][0] for e in answer.text.split("\n\n")[:-2]]
        text = "".join(p["delta"].get("content", "") for p in parts)
        entries = [e for p in parts if p.get("logprobs") for e in p["logprobs"]["content"]]
    else:
        (choice,) = answer.json()["choices"]
        text, entries = choice["message"]["content"], choice["logprobs"]["content"]
    assert "\ufffd" in text and b"".join(bytes(e["bytes"]) for e in entries).decode(errors="replace") == text
    parts = [e for e in entries if e["token"].startswith("\\x")]
    assert parts and all(e["token"] == "".join(f"\\x{b:02x}" for b in e["bytes"]) for e in parts)


def test_special_tokens(metastone):  # noqa: F811
    """Given as ids they are shown; in a text they are what the text says."""
    text = "<think>ab</think>"
    ids = metastone.model.tokenizer(text).input_ids
    for prompt in (text, ids):
        ask = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 1}
        (choice,) = metastone.http.post("/v1/completions", json=ask).json()["choices"]
        assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == text
        assert choice["logprobs"]["text_offset"] == [0, 7, 8, 9]


class Decoding:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, tokens, *, special=False):
        return self.tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def test_a_space_that_decoding_drops():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3, "▁▁a": 4, "▁": 5}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")

    spelling = Spelling(Decoding(tokenizer))
    told = Told(logprobs.chat, spelling)
    told.feed([Chance(token, -1.0, [(2, -0.5)]) for token in (1, 3, 2, 1)])
    content = told.take(None)["content"]
    assert [e["token"] for e in content] == ["a", "c", " b", " a"]
    assert [e["top_logprobs"][0]["token"] for e in content] == ["b", " b", " b", " b"]
    assert b"".join(bytes(e["bytes"]) for e in content).decode() == tokenizer.decode([1, 3, 2, 1]) == "ac b a"
    assert spelling.bytes(4) == b"  a" and spelling.bytes(4, first=True).decode() == tokenizer.decode([4])
    told = Told(logprobs.chat, spelling)
    told.feed([Chance(token, -1.0, []) for token in (5, 1)])
    assert [e["bytes"] for e in told.take(None)["content"]] == [[], [32, 97]] and tokenizer.decode([5, 1]) == " a"


def test_a_space_with_part_of_a_character():
    """Byte-level tokenizers merge the two: what follows begins behind the space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({t: i for i, t in enumerate([*alphabet, "Ġâ"])}, [("Ġ", "â")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    spelling = Spelling(Decoding(tokenizer))
    ids = tokenizer("a ☃!").input_ids
    told = Told(logprobs.completion, spelling, begin=5)
    streamed, pieces, incoming = [], [], Incoming(spelling.decode)
    for i in ids:
        told.feed([Chance(i, -1.0, [])])
        pieces.append(incoming.feed([i]))
        said = told.take(incoming.sent)
        streamed.append(said and (said["tokens"], said["text_offset"]))
    assert pieces == ["a", "", "", " ☃", "!"]
    assert streamed == [
        (["a"], [5]), None, None, (["bytes:\\x20\\xe2", "bytes:\\x98", "bytes:\\x83"], [6, 7, 7]), (["!"], [8])
    ]  # fmt: skip


def test_numbers_that_json_lacks():
    assert logprobs._number(-math.inf) == -9999.0 and logprobs._number(math.nan) is None
    assert logprobs._number(None) is None and logprobs._number(-1.5) == -1.5
