"""The step of fixed shape: what comes of it is what comes of the batch, whoever sits where, ahead or not, captured or not."""

import copy
import gc
import json

import pytest
import recorded
import tiny
import torch
from test_search import QUESTIONS, reflective_model

from reflective.engines.base import Appended, Ended, Prompt, Sampling, Stepped
from reflective.engines.hf import attention
from reflective.engines.hf import seats as module
from reflective.engines.hf.internals import exchange_attention, register_attention
from reflective.engines.hf.scorer import StreamScorer
from reflective.engines.hf.seats import Seats
from reflective.engines.hf.sequences import Continuation

RUN = {"n": 4, "max_new_tokens": 40, "seed": 1, "temperature": 1.0, "top_p": 0.9}
# Of these what becomes of a candidate depends on how far the others are when it ends a step; a step ahead they are one token further.
LOOK_AROUND = ("prune", "replace", "first_finish", "patient", "stop")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Done:
    """In place of a CUDA event."""

    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Steps are launched ahead, in the shapes that would be captured; what would be captured is run each time."""

    def captured(self, run):
        places = run.args[0]
        before = {name: t.clone() for name, t in vars(places).items() if name != "heard"}
        heard = self.scorer.stream.state.snapshot()
        for _ in range(2):
            run()
        assert all(torch.equal(t, before[name]) for name, t in vars(places).items() if name != "heard"), "it fed somebody"
        assert all(map(torch.equal, self.scorer.stream.state.snapshot(), heard)), "the scorer heard of it"
        return run

    def made(model, scorer, ends, **how):
        places = Seats.__new__(Seats)
        Seats.__init__(places, model, scorer, ends, **how)
        places.ahead = places.captures = True
        return places

    tensor, empty_like = torch.tensor, torch.empty_like
    monkeypatch.setattr(Seats, "_captured", captured)
    monkeypatch.setattr("reflective.engines.hf.engine.Seats", made)
    monkeypatch.setattr(torch.cuda, "Event", Done)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch, "tensor", lambda *a, pin_memory=False, **k: tensor(*a, **k))
    monkeypatch.setattr(torch, "empty_like", lambda *a, pin_memory=False, **k: empty_like(*a, **k))


class told:
    """What candidates came to, to be compared."""

    def __init__(self, generations):
        self.whole = [[(c.token_ids, c.status, c.parent, c.answer) for c in g.candidates] for g in generations]
        self.steps = [score for g in generations for c in g.candidates for score in c.step_scores]

    def __eq__(self, other):
        assert self.whole == other.whole
        return self.steps == pytest.approx(other.steps, rel=1e-4)

    __hash__ = None


def runs():
    return [name for name, (checkpoint, *_) in recorded.runs().items() if "kind" not in checkpoint]


def found(name):
    checkpoint, strategy, settings = recorded.runs()[name]
    run = recorded.record(recorded.reflective_model(**checkpoint), strategy, settings | {"decoding": "seats"})
    for question in run:
        del question["alive"]  # of each piece of work, which are others
        for c in question["candidates"]:
            for key in ("log_prob", "score", "steps"):
                c[key] = pytest.approx(c[key], rel=1e-3, abs=1e-5)
    return run


@pytest.fixture(scope="module")
def expected():
    was = json.loads(recorded.FILE.read_text())
    for question in (q for run in was.values() for q in run):
        del question["alive"]
    return was


@pytest.mark.parametrize("name", runs())
def test_a_recorded_run_is_what_it_was(name, expected):
    assert found(name) == expected[name]


@pytest.mark.parametrize("name", [name for name in runs() if not name.startswith(LOOK_AROUND)])
def test_a_step_ahead_a_recorded_run_is_what_it_was(name, expected, like_a_gpu):
    now, was = found(name), copy.deepcopy(expected[name])
    if name.startswith(("exit", "auto", "refine")):  # these wait for nobody: when one is met, the others are a token further
        for question in (*now, *was):
            del question["calls"]
    assert now == was


@pytest.mark.parametrize("name", [name for name in runs() if name.startswith("prune")])
def test_who_is_pruned_a_step_later_has_the_same_tokens_before(name, expected, like_a_gpu):
    for was, now in zip(expected[name], found(name), strict=True):
        for a, b in zip(was["candidates"], now["candidates"], strict=True):
            shorter, longer = sorted((a["text"], b["text"]), key=len)
            assert longer.startswith(shorter)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_every_kind_of_model_has_seats_or_is_refused(kind):
    model = reflective_model(kind)
    batch = model.generate(QUESTIONS, decoding="batch", **RUN)
    assert batch[0].engine == "batch"
    windows = "sliding" in kind or kind in ("gemma2", "gemma3")
    try:
        seats = model.generate(QUESTIONS, decoding="seats", **RUN)
    except ValueError as refused:
        assert windows and "sliding" in str(refused) and "take 'batch'" in str(refused)
    else:
        assert not windows and seats[0].engine == "seats" and told(seats) == told(batch)


@pytest.mark.parametrize("settings", [
    {"n": 9, "batch_rows": 4}, {"temperature": [0.0, 0.7, 1.2], "top_k": 20, "min_p": 0.01}, {"repetition_penalty": 1.3, "min_tokens": 6},
    {"presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {30: 2.0}}, {"schedule": "immediate"}, {"thinking_budget": 9},
])  # fmt: skip
def test_settings(settings, like_a_gpu):
    model = reflective_model()
    a, b, c = (model.generate(QUESTIONS, decoding=d, **RUN | settings) for d in ("batch", "seats", "seats"))
    assert told(b) == told(a) and told(c) == told(a) and b[0].engine == "captured"


def test_the_compiled_forward_is_one_graph(monkeypatch):
    graphs, compile_ = [], torch.compile

    def traced(function, **how):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return compile_(function, backend=backend, **how)

    monkeypatch.setattr(torch, "compile", traced)
    model = reflective_model()
    batch = model.generate(QUESTIONS, decoding="batch", schedule="immediate", **RUN)
    found = model.generate(QUESTIONS, decoding="compiled", schedule="immediate", **RUN)
    assert found[0].engine == "compiled" and told(found) == told(batch)
    assert 1 <= len(graphs) <= 2, "for any number of seats and columns, and for one seat"
    assert any("decode_step" in str(node.target) for node in graphs[0].graph.nodes), "the scorer is in it"


def test_what_cannot_be_compiled_is_captured(monkeypatch, like_a_gpu):
    def fails(function, **how):
        def run(*args):
            raise RuntimeError("no")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    model = reflective_model()
    found = model.generate(QUESTIONS, decoding="compiled", **RUN)
    assert model._kept[1]._places.why_not_compiled == "RuntimeError: no"
    assert found[0].engine == "captured" and told(found) == told(model.generate(QUESTIONS, decoding="batch", **RUN))


def test_a_model_that_turns_out_to_attend_otherwise_goes_on_in_a_batch(monkeypatch):
    def refuses(*args, **kwargs):
        raise module.Unseatable("it looks elsewhere")

    model = reflective_model()
    expected = told(model.generate(QUESTIONS, decoding="batch", **RUN))
    made = []

    def seats(self, decoding):
        made.append(self)
        return Seats(self.model, self.scorer, self.ends)

    monkeypatch.setattr("reflective.engines.hf.engine.TransformersEngine._made", seats)
    register_attention(attention.NAME, refuses, attention._mask_as_it_is)
    try:
        found = model.generate(QUESTIONS, **RUN)
    finally:
        attention.register()
    assert told(found) == expected and found[0].engine == "batch" and made[0].why_batch == "it looks elsewhere"


@pytest.mark.parametrize("captured", [0, 1, 2])
@pytest.mark.parametrize("strategy", ["best_of_n", "particles"])
def test_a_step_that_cannot_be_captured_goes_on_in_a_batch(captured, strategy, like_a_gpu, monkeypatch):
    """The first, or one of another shape, when there is something under way."""
    made, left = Seats._captured, [captured]

    def fails(self, run):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        return made(self, run)

    monkeypatch.setattr(Seats, "_captured", fails)
    monkeypatch.setattr("reflective.engines.hf.engine.TransformersEngine._made", lambda e, _: module.Seats(e.model, e.scorer, e.ends))
    monkeypatch.setattr(module, "LEAST_COLUMNS", 16)
    model = reflective_model()
    ahead = Seats.__init__

    def init(self, *args, **how):
        ahead(self, *args, **how)
        self.ahead = self.captures = True

    monkeypatch.setattr(Seats, "__init__", init)
    found = model.generate(QUESTIONS, strategy=strategy, **RUN)
    monkeypatch.undo()
    expected = told(reflective_model().generate(QUESTIONS, decoding="batch", strategy=strategy, **RUN))
    assert found[0].engine == "batch" and told(found) == expected


def test_a_model_of_which_a_layer_attends_elsewhere_is_refused():
    model = reflective_model()
    layer = model.model.model.layers[0].self_attn
    layer.config = copy.deepcopy(layer.config)
    exchange_attention(layer, "sdpa")
    with pytest.raises(ValueError, match="decoding='seats': 3 of the 4 layers of LlamaForCausalLM attend by .* take 'batch'"):
        model.generate(QUESTIONS, decoding="seats", **RUN)


def test_seats_get_fewer_as_sequences_end(like_a_gpu, monkeypatch):
    widths = []
    run = Seats._run

    def watched(self, places, *args):
        widths.append(len(places.token))
        return run(self, places, *args)

    monkeypatch.setattr(Seats, "_run", watched)
    model = reflective_model()
    engine = model.engine(batch_rows=8, decoding="seats")
    with engine:
        (prefix,) = engine.open([Prompt(model.encode(QUESTIONS[0])[0].tolist())])
        engine.start(prefix, [Sampling(seed=(0, c), temperature=0.0, max_tokens=4 + 8 * c) for c in range(8)])
        while engine.advance() is not None:
            pass
        engine.close([prefix])
    assert list(dict.fromkeys(widths)) == [8, 4, 2, 1]


def test_an_engine_is_kept_while_the_weights_stay(like_a_gpu):
    model = reflective_model()
    first = told(model.generate(QUESTIONS, decoding="seats", **RUN))
    kept = model._kept[1]
    assert told(model.generate(QUESTIONS, decoding="seats", **RUN)) == first and model._kept[1] is kept
    head = model.head[0].weight
    with torch.no_grad():
        head.mul_(0.5)
    assert told(model.generate(QUESTIONS, decoding="seats", **RUN)) == told(model.generate(QUESTIONS, decoding="batch", **RUN))
    model.generate(QUESTIONS, decoding="seats", **RUN)
    kept = model._kept[1]
    model.model.lm_head.weight = torch.nn.Parameter(model.model.lm_head.weight.detach().clone())
    model.generate(QUESTIONS, decoding="seats", **RUN)
    assert model._kept[1] is not kept
    with pytest.raises(ZeroDivisionError):
        model.generate(QUESTIONS, decoding="seats", on_step=lambda _: 1 / 0, **RUN)
    assert model._kept is None
    model.generate(QUESTIONS, decoding="seats", **RUN)
    model.free()
    assert model._kept is None


@on_a_gpu
@pytest.mark.parametrize("decoding", ["seats", "compiled"])
@pytest.mark.parametrize("settings", [
    {}, {"schedule": "immediate"}, {"strategy": "step_beam"}, {"strategy": "particles"}, {"thinking_budget": 9}, {"n": 20, "batch_rows": 12},
    {"repetition_penalty": 1.2, "min_tokens": 5},
])  # fmt: skip
def test_captured_on_a_gpu(settings, decoding):
    """Twice, the second time by what the first captured; memory that was let go meanwhile is somebody else's."""
    model = reflective_model()
    model.model.cuda()
    batch = told(model.generate(QUESTIONS, decoding="batch", **RUN | settings))
    for _ in range(2):
        found = model.generate(QUESTIONS, decoding=decoding, **RUN | settings)
        assert told(found) == batch and found[0].engine == {"seats": "captured"}.get(decoding, decoding)
        gc.collect()
        torch.cuda.empty_cache()
        taken = [torch.full((n,), float("nan"), device="cuda") for n in (8, 64, 512, 4096, 1 << 16) for _ in range(64)]
    del taken


def test_the_log_of_steps_is_read_whole_only_where_tags_change(like_a_gpu, monkeypatch):
    """Elsewhere the step tells the newest score, and the host does not wait for the step launched behind it."""
    model, whole = reflective_model(), []

    def read_whole(self, row):
        assert len(set(tags)) > len(whole), "read again, with no tag in between"
        whole.append(row)
        return real(self, row)

    real = StreamScorer.step_scores
    monkeypatch.setattr(StreamScorer, "step_scores", read_whole)
    think, end = model.steps.think_start_id, model.steps.think_end_id
    forced = {30: think, 60: end, 90: end}
    engine, last, n, tags = model.engine(decoding="seats"), [], 0, [()]
    with engine:
        (prefix,) = engine.open([Prompt(model.encode(QUESTIONS[0])[0].tolist(), steps="awaited")])
        endless = Sampling(seed=(0,), temperature=1.0, max_tokens=120, logit_bias=((2, -100.0), (3, -100.0), (4, -100.0)))
        (sequence,) = engine.start(prefix, [endless])
        while (events := engine.advance()) is not None:
            for event in events:
                if isinstance(event, Appended):
                    n += 1
                    if event.chance.token in (think, end):
                        tags.append((n, event.chance.token))
                    if n in forced:
                        engine.force(sequence, [forced[n]])
                elif isinstance(event, Stepped):
                    last = event.step_scores
                elif isinstance(event, Ended):
                    assert event.score.step_scores == pytest.approx(last, rel=1e-6), "each as in the log"
                    assert len(last) >= 6
        engine.close([prefix])
    assert 1 <= len(whole) <= 3, "as a tag lets other steps count"


def test_a_score_is_appended_only_to_what_counts_still(monkeypatch):
    engine = reflective_model().engine(decoding="seats")
    monkeypatch.setattr(engine.scorer, "step_scores", lambda row: ["read", row])
    s = Continuation(0, None, Sampling(seed=(0,)), state=7)
    follow = engine._follow_steps
    assert not follow(s, 0, 0.0, 0) and follow(s, 1, 0.5, 0) and s.step_scores == [0.5]
    assert not follow(s, 1, 0.5, 3), "the tag says nothing yet"
    assert follow(s, 2, 0.6, 3) and s.step_scores == ["read", 7], "another step may count than did"
    assert follow(s, 3, 0.7, 3) and s.step_scores == ["read", 7, 0.7]
    assert follow(s, 0, 0.0, 4) and s.step_scores == [] and follow(s, 1, 0.8, 4) and s.step_scores == [0.8]
    assert follow(s, 2, 0.9, -1) and s.step_scores == ["read", 7], "the log is full"


@pytest.mark.parametrize("decoding", ["batch", "seats", "captured"])
@pytest.mark.parametrize("room", [40, 100, 200])
def test_candidates_wait_for_memory(decoding, room, monkeypatch, request):
    """For the places of one, or of some, which get fewer as they get longer."""
    monkeypatch.setattr(module, "LEAST_COLUMNS", 16)
    if decoding == "captured":
        request.getfixturevalue("like_a_gpu")
        decoding = "seats"
    model = reflective_model()
    prompts = [model.encode(text)[0].tolist() for text in QUESTIONS]

    def run(kv_tokens):
        engine, tokens, scores, held = model.engine(batch_rows=16, decoding=decoding, kv_tokens=kv_tokens), {}, {}, 0
        with engine:
            prefixes = engine.open([Prompt(p, steps="awaited") for p in prompts])
            for q, prefix in enumerate(prefixes):
                engine.start(prefix, [Sampling(seed=(q, c), temperature=1.0, max_tokens=20 + 15 * c) for c in range(4)])
            while (events := engine.advance()) is not None:
                seated = engine._seated
                if len(seated) > 1:
                    held = max(held, engine._places.tokens(len(seated), engine._longest(seated) - 1))
                for event in events:
                    if isinstance(event, Appended):
                        tokens.setdefault(event.sequence, []).append(event.chance.token)
                    elif isinstance(event, Ended):
                        scores[event.sequence] = event.score.score
            engine.close(prefixes)
        return tokens, scores, held

    tokens, scores, held = run(room)
    assert held <= room
    freely = run(10**9)
    assert tokens == freely[0] and scores == pytest.approx(freely[1]) and freely[2] > 200


# -- prompts that are kept once -----------------------------------------------------------------------------------------------


@pytest.fixture
def shares(monkeypatch):
    """Every prompt of two sequences is shared; tells how many were, at most, at a time."""
    most = [0]
    share = Seats._share

    def watched(self):
        share(self)
        most[0] = max(most[0], len(self._prompts))

    monkeypatch.setattr(module, "SHARED", 1)
    monkeypatch.setattr(Seats, "_share", watched)
    return most


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "phi", "gpt2", "mixtral", "qwen2_vl"])
def test_a_shared_prompt_gives_the_same(kind, shares):
    model = reflective_model(kind)
    batch = model.generate(QUESTIONS, decoding="batch", **RUN)
    assert told(model.generate(QUESTIONS, decoding="seats", **RUN)) == told(batch)
    assert shares == [len(QUESTIONS)], "each question's is"


@pytest.mark.parametrize("settings", [
    {"n": 9, "batch_rows": 4}, {"strategy": "step_beam"}, {"strategy": "particles"}, {"strategy": "astar"}, {"schedule": "immediate"},
    {"thinking_budget": 9}, {"repetition_penalty": 1.2}, {"kv_tokens": 160},
])  # fmt: skip
def test_who_shares_a_prompt_forks_waits_and_ends_as_others(settings, shares, like_a_gpu, monkeypatch):
    monkeypatch.setattr(module, "LEAST_COLUMNS", 16)
    model = reflective_model()
    batch = told(model.generate(QUESTIONS, decoding="batch", **RUN | settings))
    for _ in range(2):
        assert told(model.generate(QUESTIONS, decoding="seats", **RUN | settings)) == batch and shares[0] > 0


def test_shared_prompts_are_in_the_compiled_graph(shares, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, backend="eager", **how))
    model = reflective_model()
    batch = told(model.generate(QUESTIONS, decoding="batch", **RUN))
    found = model.generate(QUESTIONS, decoding="compiled", **RUN)
    assert told(found) == batch and found[0].engine == "compiled" and shares[0] > 0


def test_a_model_that_hands_no_shared_prompt_to_its_layers_has_copies(shares, monkeypatch):
    model = reflective_model()
    batch = told(model.generate(QUESTIONS, decoding="batch", **RUN))
    monkeypatch.setattr(module, "takes_shared", lambda _: False)
    assert told(model.generate(QUESTIONS, decoding="seats", **RUN)) == batch and shares == [0]
    monkeypatch.undo()

    attend = attention.attend
    register_attention(attention.NAME, lambda *a, shared_prompts=None, **k: attend(*a, **k), attention._mask_as_it_is)
    try:
        assert told(model.generate(QUESTIONS, decoding="seats", **RUN)) == batch and shares == [0]
    finally:
        attention.register()


def test_a_long_prompt_is_kept_once():
    """As the batch would keep it for each of its sequences, ``auto`` takes seats on a CPU too."""
    model = reflective_model()
    question = " ".join(["what is 2 + 2?"] * 100)
    n = module.SHARED // len(model.encode(question)[0]) + 2
    engine = model.engine(batch_rows=n + 1)
    with engine:
        prefixes = engine.open([Prompt(model.encode(text)[0].tolist()) for text in (QUESTIONS[0], question)])
        engine.start(prefixes[0], [Sampling(seed=(0, 0), temperature=0.0, max_tokens=30)])
        while not any(isinstance(e, Appended) for e in engine.advance()):
            pass
        assert engine.how == "batch"
        engine.start(prefixes[1], [Sampling(seed=(1, c), temperature=1.0, max_tokens=3) for c in range(n)])
        while engine.how == "batch" and engine.advance() is not None:
            pass
        own, long = engine._places._columns, engine._prefixes[prefixes[1]].row.length
        assert len(engine._seated) == n + 1 and own < long
        assert engine._places._prompts == [engine._prefixes[prefixes[1]]]
        held = engine._prefixes[prefixes[1]].row.layers[0][0].data_ptr()
        assert engine._places._shared(engine._places._places).prompts[0][0][0].data_ptr() == held, "it was not copied"
        while engine.advance() is not None:
            pass
        engine.close(prefixes)
    assert not engine._places._prompts
