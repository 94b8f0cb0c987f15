"""``ReflectiveModel`` with a real vLLM behind it: strategies, scores, finished text, and a few blocks for too many sequences."""

import pytest
from common import DELIMITER, V2

import reflective as rf
from reflective.engines.base import Sampling
from reflective.engines.vllm.engine import VLLMEngine

QUESTIONS = ["First add 3 and 4.\n\nThen", "We count the primes.\n\n2 and"]
VLLM = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True, "block_size": 32}


def loaded(tiny, **vllm):
    import json

    # The published rule for a head in a .safetensors is "contains"; the delimiter is this model's own.
    (tiny / "reflective.json").write_text(json.dumps({"delimiter": DELIMITER, "prompt": "{question}"}))
    return rf.ReflectiveModel.from_pretrained(tiny, engine="vllm", **VLLM | vllm)


@pytest.fixture(scope="module")
def model(tiny):
    made = loaded(tiny, max_model_len=400, num_gpu_blocks_override=30, disable_log_stats=False)
    yield made
    assert made.host.core.stats()["rows"] <= 16 and not made.host.core.under_way
    made.close()


def preempted(model):
    return next(m.value for m in model.host.core.llm.get_metrics() if m.name == "vllm:num_preemptions")


def check(generation, truth, prompt):
    for c in generation.candidates:
        values, columns = truth(prompt, c.token_ids)
        assert c.step_scores == pytest.approx(values, abs=1e-5) and c.error is None
        assert len(c.step_spans) == len(columns)


@pytest.mark.parametrize(
    "strategy", ["best_of_n", "prune", "replace", "auto", "step_beam", "dvts", "particles", "astar", "first_finish", "rpc"]
)
def test_strategies(model, truth, strategy):
    given = {
        "prune": {"threshold": 0.1}, "replace": {"interval": 6, "warmup": 6}, "auto": {"exponent": 3.0, "enough": 0.99},
    }.get(strategy, {})  # fmt: skip
    from reflective.search.strategies import by_name

    n, tokens = (4, 24) if V2 else (8, 60)
    found = model.generate(
        QUESTIONS, strategy=by_name(strategy, n=n, **given), seed=1, max_new_tokens=tokens, temperature=1.0
    )
    for question, generation in zip(QUESTIONS, found, strict=True):
        prompt = model.encode(question)[0].tolist()
        check(generation, truth, prompt)
        assert generation.best in generation.candidates and generation.scoring_seconds > 0


def test_who_survives_does_not_notice_who_is_stopped(model):
    from reflective.search.strategies import by_name

    settings = {"seed": 3, "max_new_tokens": 40, "temperature": 1.0}
    free = model.generate(QUESTIONS[0], strategy=by_name("best_of_n", n=8), **settings)
    pruned = model.generate(QUESTIONS[0], strategy=by_name("prune", n=8, threshold=0.05), **settings)
    stopped = 0
    for whole, c in zip(free.candidates, pruned.candidates, strict=True):
        if c.status == "stopped":
            stopped += 1
            assert c.token_ids == whole.token_ids[: len(c.token_ids)] and len(c.token_ids) < len(whole.token_ids)
        else:
            assert c.token_ids == whole.token_ids and c.score == pytest.approx(whole.score, rel=1e-5)
    assert 0 < stopped < 8


def test_more_than_memory_has_room_for(model, truth, monkeypatch):
    """The worst is parked until there is room, and nothing changes; vLLM preempts nobody."""
    settings = {"seed": 5, "max_new_tokens": 60 if V2 else 120, "temperature": 1.0, "n": 10}
    made, engine = [], model.host.engine
    monkeypatch.setattr(model.host, "engine", lambda **how: made.append(engine(**how)) or made[-1])
    before = preempted(model)
    found = model.generate(QUESTIONS[0], **settings)
    check(found, truth, model.encode(QUESTIONS[0])[0].tolist())
    assert made[0].parked > 0 and preempted(model) == before
    few = model.generate(QUESTIONS[0], batch_rows=3, **settings)
    assert [c.token_ids for c in few.candidates] == [c.token_ids for c in found.candidates]
    monkeypatch.setattr(VLLMEngine, "_fits", lambda *_: True)  # as vLLM would have it
    plain = model.generate(QUESTIONS[0], **settings)
    assert preempted(model) > before
    assert [c.token_ids for c in plain.candidates] == [c.token_ids for c in found.candidates]


def test_finished_text(model, truth):
    prompt, responses = (
        QUESTIONS[0],
        [" add 5.\n\nSo the answer is three", " add 5.\n\nSo the answer is 12.\n\nthe end", "e"],
    )
    found = model.score(prompt, responses)
    for response, c in zip(responses, found, strict=True):
        values, _ = truth(
            model.encode(prompt)[0].tolist(), model.tokenizer(response, add_special_tokens=False).input_ids
        )
        assert c.step_scores == pytest.approx(values, abs=1e-5)
    with pytest.raises(ValueError, match=r"responses\[0\]: with its prompt .* max_model_len"):
        model.score(prompt, ["e" * 500])


def test_thinking_is_ended_and_what_is_forced_is_scored(model, truth):
    model.config.think_end = " the end.\n\n"
    found = model.generate("<think>" + QUESTIONS[0], n=3, seed=2, max_new_tokens=40, temperature=1.0, thinking_budget=6)
    ends = model.tokenizer(" the end.\n\n", add_special_tokens=False).input_ids
    forced = [c for c in found.candidates if c.token_ids[6 : 6 + len(ends)] == ends]
    assert forced
    check(found, truth, model.encode("<think>" + QUESTIONS[0])[0].tolist())


def test_settings_of_sampling(model):
    """Two ways to have tokens that cannot come; what vLLM does not take is refused before anything has begun."""
    settings = {"seed": 3, "max_new_tokens": 20, "temperature": 1.0, "n": 4, "strategy": "step_beam"}
    assert all(c.token_ids == [5] * 20 for c in model.generate(QUESTIONS[0], logit_bias={5: 100.0}, **settings).candidates)
    narrow = model.generate(QUESTIONS[0], top_k=1, **settings).candidates
    greedy = model.generate(QUESTIONS[0], **settings | {"temperature": [0.0]}).candidates
    assert narrow[0].token_ids == greedy[0].token_ids == model.generate(QUESTIONS[0], min_p=1.0, **settings).candidates[0].token_ids
    for wrong, message in (
        ({"temperature": [1.0, 2.5]}, "temperature must be in"), ({"logit_bias": {10**6: 1.0}}, "1000000 is no token"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.generate(QUESTIONS[0], **settings | wrong)
    with pytest.raises(ValueError, match="logit_bias: 1025 tokens, and vLLM takes 1024"):
        model.host.check_sampling(Sampling((0,), logit_bias=tuple((t, 1.0) for t in range(1025))))
    assert not model.host.core.under_way


def test_log_probabilities(model):
    from reflective.search.candidates import Ask
    from reflective.search.loop import Search

    ids = model.encode(QUESTIONS[0])[0].tolist()
    ask = Ask(ids, model.strategy(n=2), max_new_tokens=6, seed=1, logprobs=3, prompt_logprobs=2)
    (question,) = Search(model.host.engine(), model.reader).run([ask])
    assert [c.token for c in question.prompt_chances] == ids and question.prompt_chances[0].log_prob is None
    for c in question.candidates:
        assert [chance.token for chance in c.chances][: len(c.token_ids)] == c.token_ids
        assert all(len(chance.top) == 3 and chance.top[0][1] >= chance.log_prob for chance in c.chances)
        assert c.log_prob == pytest.approx(sum(chance.log_prob for chance in c.chances))


def test_what_is_refused(model, tiny):
    with pytest.raises(ValueError, match="backend='torch': vLLM is set up when the model is loaded"):
        model.generate(QUESTIONS[0], n=1, backend="torch")
    with pytest.raises(AttributeError, match="the weights of this model are in vLLM"):
        model.model.parameters()
    with pytest.raises(ValueError, match="device_map, untrained"):
        rf.ReflectiveModel.from_pretrained(tiny, engine="vllm", device_map="cpu")
