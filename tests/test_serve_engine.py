"""The server's engine: requests that come and go in one batch, against ReflectiveModel alone."""

import threading
from concurrent.futures import CancelledError

import pytest
import tiny
from test_search import QUESTIONS, reflective_model

from reflective.serve.engine import Closed, Engine, QueueFull

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def model():
    return reflective_model()


@pytest.fixture(scope="module")
def twin():
    """The same model for what is expected: one that decodes in the engine's thread is not to be used in another."""
    return reflective_model()


@pytest.fixture
def engine(model):
    engine = Engine(model, batch_rows=6)
    yield engine
    engine.close()


class Gate:
    """Keeps the engine's thread in its first forward until it is opened."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, candidates):
        self.reached.set()
        assert self.open.wait(tiny.PATIENCE)


def same(found, expected):
    """Scores may differ in their last bits: what shares a batch changes the order of sums in matrix products."""
    assert [(c.token_ids, c.status) for c in found.candidates] == [(c.token_ids, c.status) for c in expected.candidates]
    for a, b in zip(found.candidates, expected.candidates, strict=True):
        assert a.step_scores == pytest.approx(b.step_scores, rel=1e-4)


def test_requests_in_one_batch_are_answered_as_each_alone(model, twin, engine):
    widths = []
    handle = model.model.register_forward_pre_hook(lambda m, a, k: widths.append(len(k["input_ids"])), with_kwargs=True)
    asked = [
        (QUESTIONS[i % 3], {**SAMPLING, "n": 1 + i % 3, "seed": i, "temperature": (1.0, 0.7, 0.0)[i % 3], "top_p": (0.9, 1.0)[i % 2]})
        for i in range(8)
    ]  # fmt: skip
    found = [f.result(tiny.PATIENCE) for f in [engine.generate(q, **settings) for q, settings in asked]]
    handle.remove()
    assert max(widths) == 6, "they share a batch"
    for (question, settings), generation in zip(asked, found, strict=True):
        alone = twin.generate(question, **settings)
        same(generation, alone)
        assert generation.best.number == alone.best.number
        assert generation.prompt == question and generation.seed == settings["seed"]
    assert engine.stats() == {
        "queued": 0, "running": 0, "rows": 0, "tokens": sum(g.tokens for g in found), "scored": 0,
    }  # fmt: skip


def test_strategies_differ_within_a_batch(model, twin, engine):
    names = ["step_beam", "particles", "best_of_n", "majority"]
    found = [
        f.result(tiny.PATIENCE) for f in [engine.generate("ABC", strategy=s, n=4, seed=5, **SAMPLING) for s in names]
    ]
    for name, generation in zip(names, found, strict=True):
        assert generation.strategy == name
        same(generation, twin.generate("ABC", strategy=name, n=4, seed=5, **SAMPLING))


def test_stop_texts(model, twin, engine):
    alone = twin.generate("ABC", n=2, seed=1, **SAMPLING)
    stop = alone.candidates[0].text[3:5]
    cut = engine.generate("ABC", n=2, seed=1, stop=[stop, "none"], **SAMPLING).result(tiny.PATIENCE)
    for a, b in zip(alone.candidates, cut.candidates, strict=True):
        at = a.text.find(stop)
        assert b.text == (a.text if at < 0 else a.text[: at + len(stop)])
    assert cut.candidates[0].status == "stop" and len(cut.candidates[0].text) == 5


def test_texts_are_scored_between_forwards(model, twin, engine):
    gate = Gate()
    running = engine.generate("ABC", seed=1, on_step=gate, **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE)
    scores = [engine.score(["AB", ""], ["CKZKLE", "CKZKLEKK"]), engine.score(["A"], ["ZZKAKA"])]
    wrong = engine.submit(lambda: 1 / 0)
    assert engine.stats()["queued"] == 3 and not running.done()
    gate.open.set()
    found = [c for f in scores for c in f.result(tiny.PATIENCE)]
    expected = [twin.score("AB", ["CKZKLE"]), twin.score("", ["CKZKLEKK"]), twin.score("A", ["ZZKAKA"])]
    for a, (b,) in zip(found, expected, strict=True):
        assert a.step_spans == b.step_spans and a.step_scores == pytest.approx(b.step_scores, rel=1e-4)
    with pytest.raises(ZeroDivisionError):
        wrong.result(tiny.PATIENCE)
    same(running.result(tiny.PATIENCE), twin.generate("ABC", n=1, seed=1, **SAMPLING))
    assert engine.stats()["scored"] == 3


def test_what_one_request_does_wrong_the_others_do_not_pay(engine, model, twin, monkeypatch):
    score_tokens = type(model).score_tokens

    def picky(self, prompts, responses, **settings):
        if any(len(r) == 3 for r in responses):
            raise RuntimeError("three")
        return score_tokens(self, prompts, responses, **settings)

    gate = Gate()
    running = engine.generate("ABC", seed=1, on_step=gate, **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE)
    monkeypatch.setattr(type(model), "score_tokens", picky)
    good, bad = engine.score(["A"], ["CKZK"]), engine.score(["A"], ["CKZ"])
    gate.open.set()
    assert len(good.result(tiny.PATIENCE)) == 1
    with pytest.raises(RuntimeError, match="three"):
        bad.result(tiny.PATIENCE)
    running.result(tiny.PATIENCE)

    gate = Gate()
    running = engine.generate("ABC", seed=1, on_step=gate, **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE)
    with monkeypatch.context() as patched:
        patched.setattr(model.model, "forward", lambda *a, **k: 1 / 0)
        gate.open.set()
        with pytest.raises(ZeroDivisionError):
            running.result(tiny.PATIENCE)
    same(
        engine.generate("ABC", n=2, seed=1, **SAMPLING).result(tiny.PATIENCE),
        twin.generate("ABC", n=2, seed=1, **SAMPLING),
    )
    odd = engine.generate("ABC", n=2, seed=1, on_step=lambda c: 1 / 0, **SAMPLING)
    same(odd.result(tiny.PATIENCE), twin.generate("ABC", n=2, seed=1, **SAMPLING))


def test_cancellation(model, twin, engine):
    gate = Gate()
    seen = []

    def watch(candidates):
        seen.append(len(candidates[0].token_ids))
        gate(candidates)

    running = engine.generate("ABC", n=6, seed=1, on_step=watch, **SAMPLING)
    waiting = engine.generate("ABC", n=6, seed=1, **SAMPLING)
    after = engine.generate("Z", n=2, seed=4, **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE) and engine.stats()["queued"] == 2
    assert running.cancel() and waiting.cancel() and engine.stats()["queued"] == 1
    gate.open.set()
    cut = running.result(tiny.PATIENCE)
    assert cut.interrupted and seen == [1] and {c.status for c in cut.candidates} <= {"interrupted", "stop"}
    with pytest.raises(CancelledError):
        waiting.result(tiny.PATIENCE)
    same(after.result(tiny.PATIENCE), twin.generate("Z", n=2, seed=4, **SAMPLING))
    assert not after.cancel()


def test_long_prompts_and_texts_come_in_pieces(model, twin):
    """A long prompt and long texts beside one that decodes: every answer is that of each alone, and no forward is long."""
    engine, sizes = Engine(model, batch_rows=4, batch_tokens=64), []
    hooks = [
        module.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].numel()), with_kwargs=True)
        for module in (model.model, model.model.model)
    ]
    gate = Gate()
    running = engine.generate("ABC", seed=1, on_step=gate, **{**SAMPLING, "max_new_tokens": 400})
    assert gate.reached.wait(tiny.PATIENCE)
    text = "CKZKLEKKAB" * 30
    prompts = ["AB" * 100, "Z", "KLM" * 60]
    asked = [engine.generate(p, n=2, seed=2, **SAMPLING) for p in prompts]
    scores = [
        engine.score(["AB", ""], [text, text[:5]]),
        engine.score(["A"], ["ZZKAKA"]),
        engine.score(["A"], [text[7:]]),
    ]
    gate.open.set()
    for prompt, future in zip(prompts, asked, strict=True):
        same(future.result(tiny.PATIENCE), twin.generate(prompt, n=2, seed=2, **SAMPLING))
    expected = [("AB", text), ("", text[:5]), ("A", "ZZKAKA"), ("A", text[7:])]
    found = [c for future in scores for c in future.result(tiny.PATIENCE)]
    for c, (prompt, response) in zip(found, expected, strict=True):
        (one,) = twin.score(prompt, [response])
        assert c.step_spans == one.step_spans and c.text == one.text
        assert c.step_scores == pytest.approx(one.step_scores, rel=1e-4)
    same(running.result(tiny.PATIENCE), twin.generate("ABC", n=1, seed=1, **{**SAMPLING, "max_new_tokens": 400}))
    for hook in hooks:
        hook.remove()
    assert max(sizes) <= 64 and engine.stats()["running"] == engine.stats()["queued"] == 0
    engine.close()


def test_long_texts_are_given_up_between_two_pieces(model):
    """Scored texts and prompts: cancelled while they run, and the places and queue are free again."""
    engine = Engine(model, batch_rows=1, batch_tokens=64)
    with_pieces, reached = threading.Event(), threading.Event()

    def slow(*_):
        reached.set()
        assert with_pieces.wait(tiny.PATIENCE)

    hook = model.model.model.register_forward_pre_hook(slow)
    long = [engine.score([""], ["ABC" * 150 + "K"]), engine.generate("ABC" * 150, **SAMPLING)]
    assert reached.wait(tiny.PATIENCE) and engine.stats()["running"] + engine.stats()["queued"] == 2
    assert all(future.cancel() for future in long)
    with_pieces.set()
    assert long[0].cancelled()
    after = engine.generate("Z", n=1, seed=4, **SAMPLING).result(tiny.PATIENCE)
    assert len(after.candidates) == 1
    assert long[1].cancelled() or long[1].result(tiny.PATIENCE).interrupted
    hook.remove()
    assert engine.stats()["scored"] == 0 and engine.close() == []


def test_short_texts_do_not_wait_for_long_ones(model):
    engine = Engine(model, batch_tokens=64)
    order, gate = [], Gate()
    running = engine.generate("ABC", seed=1, on_step=gate, **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE)
    for name, text in (("long", "ABC" * 160 + "K"), ("short", "ABCK"), ("longer", "ABC" * 165 + "K"), ("brief", "AK")):
        engine.score([""], [text]).add_done_callback(lambda _, name=name: order.append(name))
    gate.open.set()
    running.result(tiny.PATIENCE)
    engine.close()
    assert sorted(order[:2]) == ["brief", "short"] and order[2:] == ["long", "longer"]


def test_preparing_counts(model):
    engine = Engine(model, max_queue=2)
    hold, reached = threading.Event(), threading.Event()

    def ask():
        reached.set()
        assert hold.wait(tiny.PATIENCE)
        return engine.generate("A", seed=1, **SAMPLING)

    first, second = engine.prepare(ask), engine.prepare(ask)
    assert reached.wait(tiny.PATIENCE) and engine.stats()["queued"] == 2
    with pytest.raises(QueueFull, match="2 requests"):
        engine.prepare(ask)
    assert second.cancel() and engine.stats()["queued"] == 1
    quick = engine.prepare(lambda: engine.encode("ABC"), size=1 << 20)
    assert quick.result(tiny.PATIENCE) == engine.encode("ABC"), "in a lane of its own"
    hold.set()
    assert len(first.result(tiny.PATIENCE).result(tiny.PATIENCE).candidates) == 1
    engine.close()
    with pytest.raises(Closed):
        engine.prepare(ask)


def test_several_prompts_in_one_request(model, twin):
    engine = Engine(model, batch_rows=2)
    gate = Gate()
    told = []
    found = engine.generate_all(
        QUESTIONS, n=2, seed=7, on_step=lambda i, c: told.append((i, c[0].question.prompt)), **SAMPLING
    )
    for prompt, generation in zip(QUESTIONS, found.result(tiny.PATIENCE), strict=True):
        same(generation, twin.generate(prompt, n=2, seed=7, **SAMPLING))
    assert {i for i, _ in told} == {0, 1, 2} and all(p == engine.encode(QUESTIONS[i]) for i, p in told)
    cut = engine.generate_all(QUESTIONS, n=2, seed=7, on_step=lambda i, c: gate(c), **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE) and engine.stats()["running"] == 1
    assert cut.cancel()
    gate.open.set()
    assert all(g.interrupted for g in cut.result(tiny.PATIENCE)) and engine.stats()["running"] == 0
    with pytest.raises(ValueError, match=r"prompt\[1\]: 61 is no token"):
        engine.generate_all([[5], [61]], **SAMPLING)
    engine.close()


def test_limits(model):
    engine = Engine(model, batch_rows=2, max_queue=2)
    gate = Gate()
    running = engine.generate("ABC", n=2, seed=1, on_step=gate, **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE)
    queued = [engine.generate("A", n=1, seed=1, **SAMPLING), engine.score(["A"], ["B"])]
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.generate("A", **SAMPLING)
    gate.open.set()
    assert engine.close() == []
    assert running.done() and all(f.done() for f in queued)
    with pytest.raises(Closed):
        engine.generate("A", **SAMPLING)


def test_what_shutting_down_cuts_off_is_said(model):
    engine = Engine(model, batch_rows=2)
    gate = Gate()
    running = engine.generate("ABC", n=2, seed=1, on_step=gate, **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE)
    queued = [engine.generate("A", **SAMPLING), engine.score(["A"], ["B"]), engine.submit(int)]
    queued[-1].add_done_callback(lambda _: gate.open.set())  # cancelled last
    lines = engine.close(timeout=0.1)
    assert [line.split(":")[0] for line in lines] == [
        "generate",
        "generate",
        "score",
        "a request beside decoding, still queued",
    ]
    assert "2 candidates, 2 tokens decoded" in lines[0]
    assert running.result(0).interrupted and all(f.cancelled() for f in queued)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt: it is empty"),
        ({"prompt": [5, 61]}, "prompt: 61 is no token"),
        ({"prompt": [5, True]}, "prompt: True is no token"),
        ({"max_new_tokens": 510}, "more than the 512 positions"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": "AB"}, "stop='AB'"),
        ({"stop": [""]}, "stop="),
        ({"n": 0}, "n=0"),
        ({"strategy": "luck"}, "strategy='luck'"),
    ],
)
def test_bad_input_is_named_at_once(engine, given, wrong):
    with pytest.raises(ValueError, match=wrong):
        engine.generate(**{"prompt": "ABC", **SAMPLING, **given})


def test_bad_texts_are_named_at_once(engine):
    for prompts, responses, wrong in (
        ([], [], "0 for 0 prompts"),
        (["A"], [], "0 for 1"),
        (["A"], [""], "response: it is empty"),
        ([""], [[99]], "response: 99"),
        (["A"], ["B" * 512], "512 positions"),
        (["A", "A"], ["B", ""], r"response\[1\]: it is empty"),
    ):
        with pytest.raises(ValueError, match=wrong):
            engine.score(prompts, responses)


def test_the_model_is_left_as_it_was(model):
    kind = type(model.model), type(model.model.model.layers[-1])
    engine = Engine(model)
    engine.generate([5, 6, 7], n=2, **SAMPLING).result(tiny.PATIENCE)
    engine.close()
    assert (type(model.model), type(model.model.model.layers[-1])) == kind
