"""``GET /`` of the server, and what it watches by: the page's headers, the events of every candidate over real HTTP, and the page itself in
headless Chromium."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
from pathlib import Path

import pytest
import tiny
from test_search import reflective_model

import reflective as rf
from reflective.scoring.scores import AGGREGATIONS, aggregate
from reflective.search.strategies import NAMES, kind

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from served import live, until
from test_serve import endless, held, hold, process, published  # noqa: F401 (a fixture)

from reflective.serve.engine import Engine
from reflective.serve.page import HEADERS, PATHS
from reflective.serve.service import Limits
from reflective.serve.text import before
from reflective.serve.watch import CHOSEN, CHOSEN_BY_STEPS, Watch

pytest_plugins = ["browser"]  # a page in headless Chromium
ROOT = Path(__file__).parents[1]
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 40}
CHAT = "/v1/chat/completions"


# -- the page over HTTP ----------------------------------------------------------------------------------------------


def test_the_page_is_given_without_a_key_and_holds_none():
    with live(reflective_model(), api_key="s3cret-key") as server:
        html = server.http.get("/").text
        for path in PATHS:
            answer = server.http.get(path)
            assert answer.status_code == 200 and "s3cret-key" not in answer.text and answer.text
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            tag = answer.headers["etag"]
            for known, status in ((tag, 304), (f'"other", W/{tag}', 304), ('"other"', 200)):
                again = server.http.get(path, headers={"If-None-Match": known})
                assert again.status_code == status and bool(again.content) == (status == 200)
                assert again.headers["etag"] == tag and again.headers["cache-control"] == "no-cache"
            head = server.http.head(path)
            assert head.status_code == 200 and not head.content and head.headers["content-type"] == answer.headers["content-type"]
        wanted = set(re.findall(r'(?:href|src)="([^"]+)"', html))
        assert {f"/{name}" for name in wanted} == set(PATHS) - {"/"}, "all that it is made of, and nothing from elsewhere"
        assert server.http.get("/page/none").status_code == server.http.get("/v1/strategies").status_code == 401
        known = {"Authorization": "Bearer s3cret-key"}
        assert server.http.get("/page/none", headers=known).status_code == 404
        assert server.http.get("/page/../live.js").status_code == 401
        assert server.http.get("/v1/strategies", headers=known).status_code == 200
        assert 'reflective_requests_total{route="/",status="200"}' in server.http.get("/metrics", headers=known).text


def test_types_and_policy(letters):
    types = {"/": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path in PATHS:
        assert letters.http.get(path).headers["content-type"] == types[path.rpartition(".")[2]] + "; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in str(policy) and policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert HEADERS["X-Content-Type-Options"] == "nosniff" and HEADERS["Referrer-Policy"] == "no-referrer"
    html, script = letters.http.get("/").text, letters.http.get("/page/live.js").text
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script>", html), "nothing that the policy refuses"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|document\.cookie", script)


def test_what_the_page_is_made_of_is_in_the_wheel():
    """As ``setuptools`` reads its patterns."""
    tomllib = pytest.importorskip("tomllib")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert told["include-package-data"] is False and "reflective.serve" in told["packages"] and "reflective.view" in told["packages"]
    folder = ROOT / "reflective" / "serve"
    packed = {path.name for pattern in told["package-data"]["reflective.serve"] for path in folder.glob(pattern)}
    assert packed == {path.name for path in (folder / "page").iterdir()} and len(packed) == len(PATHS) - 1
    assert {"scores.css"} <= {path.name for pattern in told["package-data"]["reflective.view"] for path in (ROOT / "reflective" / "view").glob(pattern)}


def test_what_is_offered_is_taken(letters):
    offers = letters.http.get("/v1/strategies").json()
    assert offers["model"] == "tiny" and offers["max_model_len"] == 512 and offers["max_candidates"] == 64
    assert [(e["effort"], e["candidates"], e["strategy"]) for e in offers["efforts"]] == [
        ("low", 2, "best_of_n"), ("medium", 8, "best_of_n"), ("high", 32, "best_of_n"),
    ]  # fmt: skip
    names = [s["id"] for s in offers["data"]]
    # These have no rule here.
    assert set(NAMES) - set(names) == {"select", "prune", "exit", "auto"} and all(s["about"] for s in offers["data"])
    for asked in [{"effort": e["effort"]} for e in offers["efforts"]] + [{"strategy": name, "best_of": 4} for name in names]:
        body = {"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 2, **asked}
        assert letters.http.post(CHAT, json=body).status_code == 200, asked
    for name in set(NAMES) - set(names):
        body = {"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 2, "strategy": name}
        assert letters.http.post(CHAT, json=body).status_code == 400, name


def test_what_is_beyond_the_limits_is_not_offered():
    with live(reflective_model(), limits=Limits(candidates=8)) as server:
        offers = server.http.get("/v1/strategies").json()
    assert [e["effort"] for e in offers["efforts"]] == ["low", "medium"] and offers["max_candidates"] == 8


def test_every_strategy_says_what_it_does():
    for name in NAMES:
        assert kind(name).about.endswith(".") and not kind(name).stops.endswith(".")
    assert set(CHOSEN_BY_STEPS) == set(AGGREGATIONS)
    assert set(CHOSEN) == set(re.findall(r'``"(\w+)"``', rf.model.Generation.__doc__.split("chosen_by:")[1].split("strategy:")[0]))


# -- what is watched -------------------------------------------------------------------------------------------------


def streamed(server, body, path=CHAT):
    """Every chunk of a streamed answer."""
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def watched(server, body, path=CHAT):
    return replayed(streamed(server, {**body, "reflective": {"watch": True}}, path))


class Seen:
    """One candidate as a client knows it that has nothing but the events."""

    def __init__(self, event, parent):
        self.parent, self.events, self.status, self.held = event["parent"], ["started"], "running", False
        self.text, self.scores, self.ends, self.running, self.tokens = "", [], [], [], 0
        if parent:
            assert len(parent.text) >= event["at"] and len(parent.scores) >= event["steps"]
            self.text = parent.text[: event["at"]]
            self.scores, self.ends = parent.scores[: event["steps"]], parent.ends[: event["steps"]]
            self.running = parent.running[: event["steps"]]
        else:
            assert (event["at"], event["steps"]) == (0, 0)
        self.told = self.end = None


def replayed(chunks):
    """Of each prompt its candidates and the choice, as the events tell them, in a form in which nothing out of order goes through."""
    candidates, chosen = {}, {}
    for chunk in chunks:
        for event in chunk.get("reflective", {}).get("events", []):
            assert chunk["choices"] == [] and event["prompt"] not in chosen
            mine = candidates.setdefault(event["prompt"], {})
            if event["type"] == "chosen":
                chosen[event["prompt"]] = event
                continue
            number = event["candidate"]
            if event["type"] == "started":
                assert number == len(mine)
                mine[number] = Seen(event, mine.get(event["parent"]) if event["parent"] is not None else None)
                continue
            c = mine[number]
            c.events.append(event["type"])
            assert c.status == "running" or (event["type"], event["status"]) == ("ended", "stopped")
            if event["type"] == "text":
                assert event["text"] and event["tokens"] >= c.tokens
                c.text, c.tokens = c.text + event["text"], event["tokens"]
            elif event["type"] == "step":
                assert event["step"] == len(c.scores)
                c.scores.append(event["score"])
                c.ends.append(event["end"])
                c.running.append(event["running"])
            elif event["type"] == "steps":
                c.scores, c.ends = event["step_scores"], event["ends"]
                c.running = [None] * (len(c.scores) - 1) + [event["running"]] * bool(c.scores)
            elif event["type"] == "held":
                assert event["held"] != c.held
                c.held = event["held"]
            else:
                c.status, c.end, c.told = event["status"], event, (c.scores, c.ends)
    return {prompt: (list(mine.values()), chosen.get(prompt)) for prompt, mine in candidates.items()}


def agrees(seen, chosen, expected, stops=()):
    """That what was seen is what ``generate`` makes of the same request."""
    assert [(c.parent, c.status, c.text) for c in seen] == [(c.parent, c.status, before(c.text, stops)) for c in expected.candidates]
    for c, e in zip(seen, expected.candidates, strict=True):
        assert c.end["step_scores"] == pytest.approx(e.step_scores, rel=1e-4)
        size = len(c.text)
        assert c.end["step_spans"] == [[min(place, size) for place in span] for span in e.step_spans]
        assert c.end["score"] == pytest.approx(e.score, rel=1e-4)
        assert (c.end["answer"], c.end["error"], c.end["tokens"]) == (e.answer, e.error, e.tokens) and c.end["why"]
        if c.told[0] == c.end["step_scores"]:  # else a tag had others count, of which the end tells
            assert [min(end, size) for end in c.told[1]] == [end for _, end in c.end["step_spans"]]
    assert chosen["candidate"] == expected.best.number and chosen["chosen_by"] == expected.chosen_by and chosen["why"]
    assert (chosen["strategy"], chosen["seed"], chosen["tokens"]) == (expected.strategy, expected.seed, expected.tokens)
    assert chosen["seconds"] > 0


@pytest.mark.parametrize("strategy", ["best_of_n", "first_finish", "replace", "step_beam", "dvts", "particles", "astar"])
def test_events_are_those_of_the_answer(letters, alone, strategy):
    ask = {"messages": [{"role": "user", "content": "ABC"}], "strategy": strategy, "best_of": 4, **SAMPLING}
    forks = stopped = holds = found_steps = 0
    for seed in range(3):
        expected = alone.generate("ABC", strategy=strategy, n=4, seed=seed, temperature=1.0, top_p=0.9, max_new_tokens=40)
        chunks = streamed(letters, {**ask, "seed": seed, "reflective": {"watch": True}})
        ((seen, chosen),) = replayed(chunks).values()
        agrees(seen, chosen, expected)
        for c in seen:
            for k, running in enumerate(c.running, 1):
                assert running in (None, aggregate(c.told[0][:k], "geometric_mean"))
            # A tag that has other steps count is told of with the next token, or with the end.
            assert c.told[0] == c.end["step_scores"] or re.search("</?think>", c.text)
        said = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
        assert said == expected.text
        forks += sum(c.parent is not None for c in seen)
        stopped += sum(c.status == "stopped" and "step" in c.events for c in seen)
        holds += sum("held" in c.events for c in seen)
        found_steps += sum(len(c.scores) for c in seen)
        words = {c.end["why"] for c in seen if c.status == "stopped"}
        assert words <= {kind(strategy).stops}
        own = kind(strategy)(n=4).aggregation
        assert own == "geometric_mean" or chosen["chosen_by"] != "score" or chosen["why"] == CHOSEN_BY_STEPS[own]
    assert found_steps > 10
    assert bool(forks) == (strategy in ("replace", "step_beam", "dvts", "particles", "astar"))
    assert bool(holds) == (strategy == "astar")
    if strategy in ("step_beam", "dvts", "replace"):
        assert stopped


def test_a_tag_has_other_steps_count(letters, alone):
    """With a second </think> those behind the first count too; all is told anew, with its places."""
    sampling = {**SAMPLING, "logit_bias": {str(tiny.END_THINK): 2.5}}
    ask = {"messages": [{"role": "user", "content": "ABC"}], "n": 8, "seed": 0, **sampling}
    ((seen, chosen),) = watched(letters, ask).values()
    expected = alone.generate(
        "ABC", n=8, seed=0, temperature=1.0, top_p=0.9, max_new_tokens=40, logit_bias={tiny.END_THINK: 2.5}
    )
    agrees(seen, chosen, expected)
    anew = [c for c in seen if "steps" in c.events]
    assert len(anew) > 1 and any(c.told[0] == c.end["step_scores"] and c.events.index("steps") < len(c.events) - 3 for c in anew)


def test_who_does_not_ask_sees_what_everybody_saw(letters):
    def plain(chunks):
        kept = []
        for chunk in chunks:
            if "events" not in chunk.get("reflective", {}):
                kept.append({name: value for name, value in chunk.items() if name not in ("id", "created")})
        return kept

    for asked in ({"n": 3}, {"effort": "low"}, {"strategy": "dvts", "best_of": 4}):
        ask = {"messages": [{"role": "user", "content": "KLM"}], "seed": 9, "stream_options": {"include_usage": True}, **SAMPLING, **asked}
        unasked = streamed(letters, ask)
        assert plain(unasked) == [{k: v for k, v in c.items() if k not in ("id", "created")} for c in unasked], "no events"
        for extras in ({"watch": True}, {"watch": False}, {}):
            chunks = streamed(letters, {**ask, "reflective": extras})
            told = joined(plain(chunks))
            assert told == joined(plain(unasked))
            assert any("events" in c.get("reflective", {}) for c in chunks) == bool(extras.get("watch"))


def joined(chunks):
    """What a stream comes to: how many pieces it comes in depends on how fast it was read."""
    texts, ends, rest = {}, {}, []
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
            if choice["finish_reason"]:
                ends[choice["index"]] = (choice, chunk["reflective"])
        if not chunk["choices"]:
            rest.append(chunk)
        assert set(chunk) <= {"object", "model", "choices", "usage", "reflective"}
    return texts, ends, rest


def test_the_openai_client_reads_the_events(letters):
    client = openai.OpenAI(base_url=f"{letters.url}/v1", api_key="none", max_retries=0)
    chunks = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "ABC"}], stream=True, seed=1,
        extra_body={"effort": "low", "reflective": {"watch": True}}, **SAMPLING,
    )  # fmt: skip
    kinds = [event["type"] for chunk in chunks if not chunk.choices for event in chunk.reflective["events"]]
    assert kinds.count("started") == kinds.count("ended") == 2 and kinds[-1] == "chosen" and "text" in kinds


def test_watching_needs_a_stream(letters):
    body = {"messages": [{"role": "user", "content": "ABC"}], "reflective": {"watch": True}}
    answer = letters.http.post(CHAT, json=body)
    assert answer.status_code == 400 and "ask for stream, true, too" in answer.json()["error"]["message"]
    answer = letters.http.post(CHAT, json={**body, "reflective": {"watch": "perhaps"}})
    assert answer.status_code == 400 and "reflective.watch" in answer.json()["error"]["message"]


def test_several_prompts_one_of_them_wrong(letters, alone):
    ask = {"prompt": ["ABC", "A" * 600, "KLM"], "best_of": 3, "seed": 2, **SAMPLING}
    seen = watched(letters, ask, "/v1/completions")
    assert list(seen) == [0, 2]
    for number, prompt in ((0, "ABC"), (2, "KLM")):
        agrees(*seen[number], alone.generate(prompt, n=3, seed=2, temperature=1.0, top_p=0.9, max_new_tokens=40))


def test_stop_texts_are_not_shown(letters, alone):
    whole = alone.generate("ABC", n=4, seed=1, temperature=1.0, top_p=0.9, max_new_tokens=40)
    stop = [whole.candidates[0].text[3:5], whole.candidates[1].text[6:9] + "never"]
    ask = {"messages": [{"role": "user", "content": "ABC"}], "best_of": 4, "seed": 1, "stop": stop, **SAMPLING}
    ((seen, chosen),) = watched(letters, ask).values()
    expected = alone.generate("ABC", n=4, seed=1, stop=stop, temperature=1.0, top_p=0.9, max_new_tokens=40)
    agrees(seen, chosen, expected, stop)
    assert seen[0].text == whole.candidates[0].text[:3]


@pytest.mark.parametrize("strategy", ["best_of_n", "step_beam"])
def test_bytes_of_characters(published, strategy):  # noqa: F811
    """Three bytes of most characters are three tokens: none is shown before it is whole."""
    model = rf.ReflectiveModel.from_pretrained(published)
    with live(model) as server:
        ask = {"messages": [{"role": "user", "content": "1 + 1?"}], "strategy": strategy, "best_of": 4, "seed": 3, "max_tokens": 60}
        ((seen, chosen),) = watched(server, ask).values()
    expected = rf.ReflectiveModel.from_pretrained(published).generate(
        [{"role": "user", "content": "1 + 1?"}], strategy=strategy, n=4, seed=3, max_new_tokens=60
    )
    agrees(seen, chosen, expected)
    assert any(ord(letter) > 127 for c in seen for letter in c.text)


def test_who_hangs_up_is_decoded_for_no_longer():
    with live(endless()) as server:
        body = {"messages": [{"role": "user", "content": "ABC"}], "best_of": 8, "max_tokens": 500, "stream": True, "reflective": {"watch": True}}
        cancelled, asked = held(server, tokens=40)
        with server.http.stream("POST", CHAT, json=body) as answer:
            lines = filter(None, answer.iter_lines())
            until(lambda: '"type": "text"' in next(lines))
            assert server.engine.stats()["rows"] == 8
        until(lambda: server.engine.stats()["running"] == server.engine.stats()["rows"] == 0)
        assert cancelled.is_set() and asked[0].result(tiny.PATIENCE)[0].interrupted
        assert server.engine.stats()["tokens"] < 8 * 500
        assert server.http.post(CHAT, json={"messages": [{"role": "user", "content": "ABC"}], "max_tokens": 4}).status_code == 200


def test_who_reads_slowly_holds_up_nobody_and_misses_nothing():
    """All is decoded while nothing is read; then everything is there, in few pieces."""
    body = {"messages": [{"role": "user", "content": "ABC"}], "best_of": 8, "max_tokens": 400, "seed": 1, "stream": True}
    body = json.dumps({**body, "temperature": 1.0, "reflective": {"watch": True}}).encode()
    with live(endless()) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            .encode() + body
        )
        until(lambda: server.engine.stats()["tokens"] == 8 * 400 and not server.engine.stats()["running"])
        connection.settimeout(tiny.PATIENCE)
        data = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    # Of chunked HTTP the lines between are left out.
    lines = [line.removeprefix("data: ") for line in data.decode().splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    ((seen, _),) = replayed(map(json.loads, lines)).values()
    assert len(seen) == 8 and all(c.tokens == 400 and c.told[0] and c.status == "length" for c in seen)


def test_between_engine_and_client_lies_a_record_a_candidate():
    """Nobody asks for the events until the end: the server is woken once, and text comes in pieces between steps."""
    model = endless()
    engine, watch, waiting, woken = Engine(model, batch_rows=8), Watch(model), set(), 0

    def on_step(question, candidates):
        nonlocal woken
        woken += watch.note(question, candidates)
        waiting.add(len(watch._new))

    try:
        asked = engine.generate_all(["ABC"], n=8, max_new_tokens=300, seed=1, temperature=1.0, on_step=on_step)
        (generation,) = asked.result(tiny.PATIENCE)
    finally:
        engine.close()
    assert woken == 1 and waiting == {8}
    batches = list(watch.events())
    ((seen, chosen),) = replayed(
        [*({"choices": [], "reflective": {"events": batch}} for batch in batches),
         {"choices": [], "reflective": {"events": [watch.chosen(0, generation)]}}]
    ).values()  # fmt: skip
    agrees(seen, chosen, generation)
    for c in seen:
        assert c.events.count("text") <= c.events.count("step") + 1 and c.told[0] == c.end["step_scores"] or "</think>" in c.text
    assert max(len(json.dumps(batch)) for batch in batches) < 1 << 17
    assert list(watch.events()) == []


# -- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(default_model):
    with live(default_model) as server:
        yield server


def opened(page, server):
    page.goto(server.url)
    page.wait_for_selector("#efforts input:checked", state="attached")


def ask(page, question, **fields):
    page.fill("#question", question)
    for name, value in fields.items():
        page.select_option(f"[name={name}]", value) if name == "strategy" else page.fill(f"[name={name}]", str(value))
    page.click("#go")


def done(page):
    page.wait_for_selector("#answer.final")
    page.wait_for_selector("#go:enabled")


def when(page, expression):
    """Playwright's ``wait_for_function`` is a script that the page's policy refuses."""
    until(lambda: page.evaluate(expression))


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@contextlib.contextmanager
def paused(server, tokens):
    """No forward begins from so many further tokens on, until it is left."""
    go_on = threading.Event()
    handle = hold(server, server.engine.stats()["tokens"] + tokens, go_on)
    try:
        yield
    finally:
        go_on.set()
        handle.remove()


def test_scores_arrive_while_candidates_grow(page, embedded):
    """With the keyboard alone, on the embedded model: its second step is not there while the first is scored on the page."""
    opened(page, embedded)
    with paused(embedded, 2 * 16):
        page.keyboard.press("Tab")
        while page.evaluate("document.activeElement.id") != "question":
            page.keyboard.press("Tab")
        page.keyboard.type("8 + 13 + 6")
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowLeft")  # from medium to low
        for name, value in (("seed", "5"), ("temperature", "0.8")):
            while page.evaluate("document.activeElement.name") != name:
                page.keyboard.press("Tab")
            page.keyboard.type(value)
        page.keyboard.press("Control+Enter")
        when(page, "document.querySelectorAll('.card .step').length === 2")
        assert page.locator(".card[data-state=writing]").count() == 2 and page.locator("#answer.final").count() == 0
        assert page.locator("#answer-title").text_content() == "Ahead so far"
        first = page.locator(".card .step").first
        assert first.text_content() == "8 + 13 = 21." and 0 < float(first.get_attribute("data-score")) < 1
        assert float(first.evaluate("step => step.style.getPropertyValue('--score')")) == pytest.approx(
            float(first.get_attribute("data-score")), abs=0.005
        )
        assert first.evaluate("step => getComputedStyle(step).backgroundColor") not in ("rgba(0, 0, 0, 0)", "transparent")
        assert page.locator("#go").is_disabled() and page.locator("#stop").is_enabled()
    done(page)
    body = {"messages": [{"role": "user", "content": "8 + 13 + 6"}], "effort": "low", "seed": 5, "temperature": 0.8, "max_tokens": 512}
    ((seen, chosen),) = watched(embedded, body).values()
    for i, c in enumerate(seen):
        card = page.locator(f"[data-candidate='{i}']")
        assert card.locator(".text").text_content() == c.text
        assert card.locator(".step").evaluate_all("all => all.map(s => s.dataset.score)") == [f"{s:.2f}" for s in c.end["step_scores"]]
        assert card.locator(".score").text_content() == f"{c.end['score']:.2f}"
        assert card.locator(".state").text_content() == ("chosen" if i == chosen["candidate"] else "finished")
        assert f"answers {c.end['answer']}" in card.locator(".foot").text_content()
    assert page.locator("#answer-big").text_content() == seen[chosen["candidate"]].end["answer"]
    why = page.locator("#answer-why").text_content()
    assert f"Candidate {chosen['candidate'] + 1}, score {seen[chosen['candidate']].end['score']:.2f}" in why and chosen["why"] in why
    facts = dict(zip(page.locator("#facts dt").all_text_contents(), page.locator("#facts dd").all_text_contents(), strict=True))
    assert facts["chosen by"] == chosen["chosen_by"] and facts["seed"] == "5" and facts["strategy"] == chosen["strategy"]
    assert facts["tokens"].startswith(f"{chosen['tokens']} decoded") and facts["time"].endswith(" s")


def test_stop_hangs_up(page, embedded):
    opened(page, embedded)
    for way in ("click", "Escape"):
        cancelled = threading.Event()
        before_it = embedded.engine.stats()["tokens"]
        with paused(embedded, 16):
            ask(page, "8 + 13 + 6", max_tokens=200)
            page.wait_for_selector(".card[data-state=writing]")
            (job,) = {*embedded.engine.queue.running.values()}
            job.add_done_callback(lambda _, cancelled=cancelled: cancelled.set())
            page.click("#stop") if way == "click" else page.keyboard.press("Escape")
            page.wait_for_selector("#go:enabled")
            until(lambda job=job: all(q.cancelled for q in job.questions))
        until(lambda: embedded.engine.stats()["running"] == embedded.engine.stats()["rows"] == 0)
        assert cancelled.wait(tiny.PATIENCE) and embedded.engine.stats()["tokens"] <= before_it + 32
        assert page.locator(".card[data-state=ended]").count() == 8 and "by you" in page.locator("#facts").text_content()
        assert page.locator("#notice").is_hidden() and page.locator("#stop").is_disabled()


def test_forks_and_who_is_stopped(page, letters, alone):
    opened(page, letters)
    ask(page, "ABC", strategy="step_beam", best_of=4, temperature=1, max_tokens=40, seed=0)
    done(page)
    expected = alone.generate("ABC", strategy="step_beam", n=4, seed=0, temperature=1.0, max_new_tokens=40)
    for c in expected.candidates:
        node = page.locator(f"[data-candidate='{c.number}']")
        assert node.locator(".text").text_content() == c.text
        assert (node.locator(".from").count() == 1) == (c.parent is not None)
        if c.parent is not None:
            assert node.locator(".from").text_content().startswith(f"↳ {c.parent + 1}")
    stopped = [c for c in expected.candidates if c.status == "stopped" and c.number != expected.best.number]
    assert page.locator("#rows .row").count() == len(stopped) > 0
    assert page.locator("#stopped > summary").text_content() == f"Stopped: {len(stopped)}"
    assert all("it was not among the best" in why for why in page.locator("#rows .why").all_text_contents())
    assert page.locator("#family").is_visible() and page.locator("#tree > g").count() == len(expected.candidates)
    assert page.locator("#race > g.chosen").count() == page.locator("#tree > g.chosen").count() == 1
    row = page.locator("#rows .row").first  # its text is there for who opens it
    assert row.locator(".text").is_hidden()
    row.locator("summary").focus()
    page.keyboard.press("Enter")
    assert row.locator(".text").is_visible()


def test_a_reload_keeps_the_form(page, letters):
    opened(page, letters)
    page.check("[name=effort][value=low]", force=True)
    page.select_option("#strategy", "dvts")
    values = {"question": "what </textarea> is\n\"this\"?", "best_of": "4", "temperature": "0.25", "max_tokens": "77", "seed": "12"}
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.reload()
    page.wait_for_selector("#efforts input:checked", state="attached")
    assert {name: page.input_value(f"[name={name}]") for name in values} == values
    assert page.is_checked("[name=effort][value=low]") and page.input_value("#strategy") == "dvts"
    assert page.locator("#about").text_content() == kind("dvts").about
    assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []


MARKUP = "<script>window.bad = 1</script><img src=x onerror='window.bad = 1'></textarea><b>ABC</b> & 😀"


def test_a_question_full_of_markup_stays_text(page, letters):
    opened(page, letters)
    ask(page, MARKUP, max_tokens=10, seed=1)
    done(page)
    page.reload()
    page.wait_for_selector("#efforts input:checked", state="attached")
    assert page.input_value("#question") == MARKUP
    assert page.evaluate("[window.bad, document.scripts.length, document.images.length, document.querySelectorAll('b').length]")[0] is None
    assert page.evaluate("[document.scripts.length, document.images.length]") == [1, 0]


def test_an_answer_full_of_markup_stays_text_and_steps_lie_where_they_end(page, errors, letters):
    """What a server says, letter for letter: none of it is markup, characters are counted as the server counts them, and a type of event
    that a later server may have is passed over."""
    opened(page, letters)
    end = len(MARKUP)
    events = [
        {"type": "started", "candidate": 0, "parent": None, "at": 0, "steps": 0},
        {"type": "text", "candidate": 0, "text": MARKUP + "\n\nre", "tokens": 9},
        {"type": "step", "candidate": 0, "step": 0, "score": 0.25, "running": 0.25, "end": end + 2},
        {"type": "murmured", "candidate": 0, "text": "<i>"},
        {"type": "started", "candidate": 1, "parent": 0, "at": end + 3, "steps": 1},
        {"type": "text", "candidate": 1, "text": "d", "tokens": 1},
        {"type": "ended", "candidate": 0, "status": "stopped", "why": MARKUP, "score": 0.25, "step_scores": [0.25],
         "step_spans": [[0, end + 2]], "answer": MARKUP, "error": None, "tokens": 10},
        {"type": "ended", "candidate": 1, "status": "stop", "why": "", "score": 0.25, "step_scores": [0.25], "step_spans": [[0, end + 2]],
         "answer": MARKUP, "error": None, "tokens": 2},
        {"type": "chosen", "candidate": 1, "chosen_by": MARKUP, "why": MARKUP, "strategy": MARKUP, "seed": 1, "tokens": 12, "seconds": 1.5},
    ]  # fmt: skip
    chunk = json.dumps({"choices": [], "reflective": {"events": events}}, ensure_ascii=False)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {chunk}\n\ndata: [DONE]\n\n"))
    ask(page, "?")
    done(page)
    for number, tail in ((0, "\n\nre"), (1, "\n\nrd")):
        box = page.locator(f"[data-candidate='{number}'] .text")
        assert box.text_content() == MARKUP + tail and box.locator(".step").text_content() == MARKUP
    assert page.locator("#answer-big").text_content() == MARKUP
    assert page.evaluate("window.bad") is None and page.evaluate("[document.scripts.length, document.images.length]") == [1, 0]


def test_the_key_is_asked_for_and_kept_for_the_tab_alone(page, errors):
    with live(reflective_model(prompt=None), api_key="s3cret") as server:
        page.goto(server.url)
        page.wait_for_selector("#key:not([hidden])")
        assert "asks for its key" in page.locator("#key-hint").text_content() and page.evaluate("document.activeElement.id") == "secret"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        when(page, "document.getElementById('key-hint').textContent.includes('not this server')")
        assert page.evaluate("sessionStorage.getItem('reflective.key')") is None
        page.keyboard.type("s3cret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#efforts input:checked", state="attached")
        assert page.locator("#key").is_hidden() and "s3cret" not in page.content()
        page.reload()
        page.wait_for_selector("#efforts input:checked", state="attached")
        ask(page, "ABC", max_tokens=10, seed=1)
        done(page)
        tokens = server.engine.stats()["tokens"]
        assert page.evaluate("[sessionStorage.getItem('reflective.key'), localStorage.length]") == ["s3cret", 0]
        other = page.context.new_page()
        other.goto(server.url)
        other.wait_for_selector("#key:not([hidden])")
        other.close()
        page.click("#forget")
        assert page.evaluate("sessionStorage.getItem('reflective.key')") is None and page.locator("#key").is_visible()
        page.fill("#question", "ABC")
        page.click("#go")  # without it nothing is to be had
        page.wait_for_selector("#go:enabled")
        assert page.locator("#key").is_visible() and server.engine.stats()["tokens"] == tokens > 0
    assert errors and all("401" in error for error in errors)
    errors.clear()


def test_refusals_are_said_in_words(page, errors):
    with live(reflective_model(prompt=None), max_queue=1, limits=Limits(body_bytes=2000)) as server:
        opened(page, server)
        notice = page.locator("#notice")
        ask(page, "ABC", max_tokens=600)
        notice.wait_for()
        assert "The server does not take this" in notice.text_content() and "512 positions" in notice.text_content()
        assert page.locator("#again").is_hidden() and page.locator("#empty").is_visible()
        ask(page, "A" * 3000, max_tokens=10)
        when(page, "document.getElementById('notice').textContent.includes('too long for this server')")
        assert "2000 bytes" in notice.text_content()
        with paused(server, 1):
            body = {"messages": [{"role": "user", "content": "ABC"}], "n": 8, "max_tokens": 30}
            threads = [threading.Thread(target=httpx.post, args=(server.url + CHAT,), kwargs={"json": body, "timeout": tiny.PATIENCE}) for _ in range(2)]
            for thread in threads:
                thread.start()
                until(lambda: server.engine.stats()["running"] == 1)
            until(lambda: server.engine.stats()["queued"] == 1)
            ask(page, "ABC", max_tokens=10)
            when(page, "document.getElementById('notice').textContent.includes('The server is busy')")
            assert "1 request is waiting; try again later. It asks to wait 1 second." in notice.text_content()
        for thread in threads:
            thread.join()
        page.click("#again")
        done(page)
        assert notice.is_hidden()
        # Servers in between say this.
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, body="slow down"))
        ask(page, "ABC")
        notice.wait_for()
        assert "Too many requests" in notice.text_content() and "It asks to wait 7 seconds." in notice.text_content()
    assert len(errors) == 4 and all(re.search("400|413|503|429", error) for error in errors)
    errors.clear()


def test_the_time_is_up_in_the_middle(page, monkeypatch):
    from reflective.serve.service import Service

    with live(endless(), limits=Limits(seconds=0.5)) as server:
        monkeypatch.setattr(Service, "left", lambda *_: None)
        opened(page, server)
        with paused(server, 40):
            monkeypatch.setattr(Service, "left", lambda *_: 1.0)
            ask(page, "ABC", max_tokens=400)
            when(page, "document.getElementById('notice').textContent.includes('It took too long')")
        assert "longer than 0.5 seconds" in page.locator("#notice").text_content() and page.locator("#go").is_enabled()
        assert page.locator(".card[data-state=ended]").count() == page.locator(".card").count() == 8


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals")
def test_the_server_goes_away_in_the_middle(page, errors, published):  # noqa: F811
    with process(published, seconds=0.05) as (server, url):
        page.goto(url)
        page.wait_for_selector("#efforts input:checked", state="attached")
        ask(page, "1 + 1?", max_tokens=400)
        page.wait_for_selector(".card[data-state=writing]")
        os.kill(server.pid, signal.SIGKILL)
        when(page, "document.getElementById('notice').textContent.includes('The connection broke off')")
        assert page.locator("#go").is_enabled() and page.locator(".card[data-state=ended]").count() == 8
        assert any(page.locator(".card .text").all_text_contents())
        page.click("#again")
        when(page, "document.getElementById('notice').textContent.includes('cannot be reached')")
        assert page.input_value("#question") == "1 + 1?"
    errors.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(page, letters, scheme):
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    opened(page, letters)
    assert fits(page)
    with paused(letters, 60):
        ask(page, "ABC" * 60, strategy="step_beam", best_of=4, temperature=1, max_tokens=40, seed=0)
        page.wait_for_selector(".card .step")
        assert fits(page)
        assert page.evaluate("(box => box.top >= 0 && box.bottom <= innerHeight)(document.getElementById('stop').getBoundingClientRect())")
    done(page)
    assert fits(page) and page.locator("#family").is_visible()
    for summary in page.locator("#rows summary").all()[:3]:
        summary.click()
    assert fits(page)
    page.set_viewport_size({"width": 320, "height": 640})
    assert fits(page)
