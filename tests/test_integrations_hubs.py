"""search-and-learn, its_hub and reward_hub on our scores, with a tiny model that both generates and scores.

its_hub and reward_hub are the released packages. search-and-learn is on no package index (what PyPI calls ``sal`` is another
project), so its contract is tested as its searches use it: the shapes they pass, and what they do with the answer.
"""

import asyncio
import copy
import functools
import math
import pickle
import threading
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_search import QUESTIONS, STEPS, reflective_model

from reflective.integrations import aggregation
from reflective.integrations.search_and_learn import ReflectivePRM
from reflective.model import Candidate
from reflective.scoring.scores import AGGREGATIONS, NonFiniteWarning, aggregate
from reflective.serve.engine import Engine

TEXTS = ["AFBGZCZDHZE", "ZF", "KLMZZJ", "ABCDE", "", "NAF"]  # F to Q end steps, of adjacent ones the first


def talker(*silent):
    """A tiny model that never says these ids, on top of those that its text could not show or tell from letters."""
    model = reflective_model()
    never = torch.tensor([0, 1, 3, 4, *silent])
    model.model.lm_head.register_forward_hook(lambda module, given, logits: logits.index_fill(-1, never, -math.inf))
    return model


@pytest.fixture(scope="module")
def model():
    return talker()


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model)
    yield engine
    engine.close()


def close(values):
    return pytest.approx(values, rel=1e-4)


@functools.cache
def step_scores(model, prompt, text):
    return model.score(prompt, [text])[0].step_scores if text else []


def mean(model, prompt, text):
    return close(aggregate(step_scores(model, prompt, text)))


@pytest.fixture(scope="module")
def broken():
    """A model whose states are NaN from the first Y on."""
    model = reflective_model()
    with torch.no_grad():
        model.model.get_input_embeddings().weight[model.tokenizer("Y").input_ids[0]] = math.nan
    engine = Engine(model)
    yield engine
    engine.close()


def test_aggregation_names():
    assert [aggregation(name) for name in ("prod", "model", "min", "last")] == [
        "product",
        "geometric_mean",
        "min",
        "last",
    ]
    assert [aggregation(name) for name in AGGREGATIONS] == list(AGGREGATIONS)
    with pytest.raises(ValueError, match="aggregation='median'; expected one of"):
        aggregation("median")


# -- search-and-learn ----------------------------------------------------------------------------------------------------


TEMPLATE = "{% for m in messages %}{{ m.content }}R{% endfor %}{% if add_generation_prompt %}S{% endif %}"


def sal_config(**settings):
    return SimpleNamespace(prm_path="none", system_prompt="CD", custom_chat_template=TEMPLATE, **settings)


def test_sal_scores_every_answer_behind_the_prompt_of_its_question(model, engine):
    """The prompt is the generator's; an answer without a step, or without text, still has a list to aggregate."""
    prm = ReflectivePRM(sal_config(), engine)
    outputs = [TEXTS, ["GAG"], [], ["BBB", "FAGAH"]]
    scores = prm.score([*QUESTIONS, "AB"], outputs)
    assert [len(answers) for answers in scores] == [6, 1, 0, 2]
    for question, answers, found in zip([*QUESTIONS, "AB"], outputs, scores, strict=True):
        assert prm.prompt(question) == f"CDR{question}RS"
        for answer, steps in zip(answers, found, strict=True):
            assert steps == close(step_scores(model, prm.prompt(question), answer) or [0.0])
    assert [len(steps) for steps in scores[0]] == [3, 1, 2, 1, 1, 2] and scores[0][3:5] == [[0.0], [0.0]]


@pytest.mark.parametrize(("how", "ours"), [("last", "last"), ("min", "min"), ("prod", "product")])
def test_sal_searches_aggregate_what_comes_back(model, engine, how, ours):
    """Best-of-N asks for n answers a question, beam search for one a beam and DVTS for a few a beam, of beams that share
    their question; each reads the lists in this order."""
    prm = ReflectivePRM(sal_config(), engine)
    sal_aggregate = {"last": lambda s: s[-1], "min": min, "prod": math.prod}[how]
    for questions, outputs in (
        (["AB", "Z"], [TEXTS[:3], TEXTS[:3]]),
        (["AB", "AB", "AB"], [[t] for t in TEXTS[:3]]),
        (["AB", "AB"], [["AFBG", "AFBH"], ["CF", ""]]),
    ):
        for question, answers, found in zip(questions, outputs, prm.score(questions, outputs), strict=True):
            expected = [aggregate(step_scores(model, prm.prompt(question), a), ours) for a in answers]
            assert [sal_aggregate(steps) for steps in found] == close(expected)


def test_sal_never_sees_nan(broken):
    """numpy's argmax would pick it."""
    with pytest.warns(NonFiniteWarning):
        (found,) = ReflectivePRM(sal_config(), broken).score(["AB"], [["AFBG", "AFYG"]])
    assert len(found[0]) == 2 and found[1] == [0.0]


def test_sal_loads_the_checkpoint_that_its_config_names(model, engine, tmp_path):
    model.save_pretrained(tmp_path)
    config = sal_config()
    config.prm_path = str(tmp_path)
    prm = ReflectivePRM(config, dtype="float32")
    assert prm.score(["AB"], [TEXTS]) == [[close(s) for s in ReflectivePRM(config, engine).score(["AB"], [TEXTS])[0]]]
    assert prm.model.config.hidden_size == 64 and prm.tokenizer.eos_token == "</s>"
    prm.engine.close()


def test_sal_bad_input(engine):
    prm = ReflectivePRM(sal_config(), engine)
    assert prm.score([], []) == [] and prm.score(["A"], [[]]) == [[]]
    for questions, outputs, message in (
        (["A", "B"], [["F"]], "outputs: 1 lists of answers for 2 questions"),
        (["A"], ["F"], r"outputs\[0\]='F': expected the list of the answers"),
        (["A", "B"], [["F"], None], r"outputs\[1\]=None: expected the list"),
        (["A"], [["F", None]], r"outputs\[0\]\[1\]=None: expected a text"),
        (["A"], [["F\ud800"]], r"outputs\[0\]\[0\]: character 1 is .* half of a surrogate pair"),
    ):
        with pytest.raises(ValueError, match=message):
            prm.score(questions, outputs)


def test_messages_without_content_and_in_parts(model):
    parts = {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}
    assert model.format([parts], "messages") == "AB" == model.format("AB")
    for messages, message in (
        ([], r"messages: expected a list of messages, each with role and content, not \[\]"),
        (5, "messages: expected a list of messages, each with role and content, not 5"),
        ([{**parts, "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\] is of type 'image_url'"),
        ([{**parts, "content": ["A"]}], r"messages\[0\].content\[0\] is of type 'str'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.format(messages, "messages")


# -- reward_hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    return pytest.importorskip("reward_hub.base", reason="needs reward_hub: pip install reward_hub==0.1.10")


@pytest.fixture
def reward_hub_prm(hub, engine):
    from reflective.integrations.reward_hub import ReflectiveProcessRewardModel

    return ReflectiveProcessRewardModel(engine)


IMAGE = [{"type": "text", "text": "AB"}, {"type": "image_url", "image_url": {"url": "x"}}]


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_reward_hub_aggregates_the_steps_of_the_definition(hub, reward_hub_prm, model):
    assert isinstance(reward_hub_prm, hub.AbstractProcessRewardModel)
    conversations = [conversation(q, t) for q in QUESTIONS for t in TEXTS]
    own = [step_scores(model, q, t) for q in QUESTIONS for t in TEXTS]
    assert reward_hub_prm.score(conversations) == close([aggregate(s, "last") for s in own])
    names = {"prod": "product", "min": "min", "last": "last", "model": "geometric_mean", "mean": "mean"}
    for name, ours in names.items():
        expected = close([aggregate(s, ours) for s in own])
        assert reward_hub_prm.score(conversations, aggregation_method=name, step_sep="Z") == expected
        if name != "mean":
            assert reward_hub_prm.score(conversations, aggregation_method=hub.AggregationMethod(name)) == expected
    assert reward_hub_prm.score(conversations[0]) == close([own[0][-1]]), "one conversation"
    assert reward_hub_prm.score([]) == []


def test_reward_hub_full_result(hub, reward_hub_prm, model):
    """A number for each of the caller's steps: several of ours end in the first, none in the second and the last."""
    f, g, h = step_scores(model, "AB", TEXTS[0])
    assert TEXTS[0].split("Z") == ["AFBG", "C", "DH", "E"]
    messages = [conversation("AB", t) for t in TEXTS]
    results = reward_hub_prm.score(messages, step_sep="Z", aggregation_method="min", return_full_prm_result=True)
    assert all(type(r) is hub.PRMResult for r in results)
    assert results[0].step_scores == close([g, h, h, h])
    assert (results[0].score, results[0].min, results[0].last) == close((min(f, g, h), min(f, g, h), h))
    assert results[0].product == close(f * g * h)
    assert [len(r.step_scores) for r in results] == [len(t.split("Z")) for t in TEXTS]
    assert results[3].step_scores == results[4].step_scores == [0.0] and results[4].score == 0.0
    (whole,) = reward_hub_prm.score(messages[0], aggregation_method="model", return_full_prm_result=True)
    assert whole.step_scores == [whole.score] == close([aggregate([f, g, h])])
    (ended,) = reward_hub_prm.score(conversation("AB", "AGBFCHF"), step_sep="F", return_full_prm_result=True)
    _, f, h = step_scores(model, "AB", "AGBFCHF")
    assert ended.step_scores == close([f, h, h]), "a separator is part of the step that it ends"


def test_reward_hub_scores_what_max_input_tokens_leave(reward_hub_prm, model):
    messages = conversation("AB", TEXTS[0])
    with pytest.warns(UserWarning, match="max_input_tokens=6: a conversation has 13"):
        (result,) = reward_hub_prm.score(messages, max_input_tokens=6, step_sep="Z", return_full_prm_result=True)
    f, g, _ = step_scores(model, "AB", TEXTS[0])
    assert result.step_scores == close([g, g, g, g]) and result.product == close(f * g)
    with pytest.warns(UserWarning, match="max_input_tokens=1"):
        assert reward_hub_prm.score(messages, max_input_tokens=1) == [0.0]


def test_reward_hub_progress_and_errors(reward_hub_prm, capsys):
    reward_hub_prm.score(conversation("A", "BF"), use_tqdm=True)
    assert "1/1" in capsys.readouterr().err
    for given, wrong in (
        ({"messages": [conversation("A", "F"), [{"role": "user", "content": "A"}]]}, r"messages\[1\]"),
        ({"step_sep": ""}, "step_sep"),
        ({"aggregation_method": "best"}, "aggregation='best'"),
        ({"messages": [{"role": "system", "content": "A"}, *conversation("A", "F")]}, r"\['system', 'user'\]"),
        ({"messages": conversation("A", None)}, r"messages\[0\]: expected the last message to be text"),
        ({"messages": [conversation("A", "F"), []]}, r"messages\[1\]: expected a list of messages"),
        ({"messages": "A"}, r"messages\[0\]: expected a list of messages.* not 'A'"),
        ({"messages": [conversation("A", IMAGE)]}, r"messages\[0\]\[1\].content\[1\] is of type 'image_url'"),
        ({"messages": [conversation(IMAGE, "F")]}, r"messages\[0\]\[0\].content\[1\] is of type 'image_url'"),
    ):
        with pytest.raises(ValueError, match=wrong):
            reward_hub_prm.score(**{"messages": conversation("A", "F"), **given})
    assert reward_hub_prm.score([]) == []
    (expected,) = reward_hub_prm.score(conversation("AB", "CF"))
    in_parts = conversation(IMAGE[:1], [{"type": "text", "text": "C"}, {"type": "text", "text": "F"}])
    assert reward_hub_prm.score([in_parts]) == [expected]


def test_reward_hub_prompts_by_the_chat_template(hub, engine):
    """Where the checkpoint has no prompt of its own."""
    from reflective.integrations.reward_hub import ReflectiveProcessRewardModel

    chat = reflective_model(prompt=None)
    chat.tokenizer.chat_template = TEMPLATE
    other = Engine(chat)
    messages = [{"role": "system", "content": "CD"}, *conversation("AB", TEXTS[0])]
    found = ReflectiveProcessRewardModel(other).score(messages, aggregation_method="model")
    other.close()
    assert found == [mean(chat, "CDRABRS", TEXTS[0])] and found != [mean(chat, "AB", TEXTS[0])]


# -- its_hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def its():
    """The package's names and ours in one place."""
    pytest.importorskip("its_hub", reason="needs its_hub, and Python 3.11: pip install its_hub==1.2.0")
    from its_hub import api
    from its_hub.core import orchestrator
    from its_hub.core.algorithms import beam_search, bon, particle_gibbs
    from its_hub.core.lms import step_generation

    from reflective.integrations import its_hub as ours

    modules = api, orchestrator, beam_search, bon, particle_gibbs, step_generation, ours
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


@pytest.fixture
def lm(its, engine):
    return its.ReflectiveLanguageModel(engine, max_completion_tokens=24, temperature=1.0, top_p=0.9, seed=0)


def test_its_hub_reward_model(its, engine, model):
    """One response or several, text or messages, at once or awaited; the separator that was left out is put back."""
    prm = its.ReflectiveProcessRewardModel(engine, step_sep="F")
    user = [its.ChatMessage(role="user", content="AB")]
    expected = [mean(model, "AB", t if t.endswith("F") else t + "F") for t in TEXTS]
    for prompt in ("AB", user, its.ChatMessages("AB"), its.ChatMessages(user)):
        assert prm.score(prompt, TEXTS) == expected and prm.score(prompt, TEXTS[0]) == expected[0]
        assert asyncio.run(prm.ascore(prompt, TEXTS)) == expected
        assert asyncio.run(prm.ascore(prompt, TEXTS[0])) == expected[0]
    assert prm.score("AB", []) == []
    for how in ("prod", "min", "last", "mean"):
        as_is = its.ReflectiveProcessRewardModel(engine, how, step_sep=None)
        assert as_is.score("AB", TEXTS) == close(
            [aggregate(step_scores(model, "AB", t), aggregation(how)) for t in TEXTS]
        )


def test_its_hub_outcome_reward_model(its, engine, model):
    orm = its.ReflectiveOutcomeRewardModel(engine)

    def talk(text):
        return [its.ChatMessage(role="user", content="AB"), its.ChatMessage(role="assistant", content=text)]

    assert orm.score([talk(t) for t in TEXTS]) == [mean(model, "AB", t) for t in TEXTS]
    assert asyncio.run(orm.ascore(talk(TEXTS[0]), orchestrator=None)) == mean(model, "AB", TEXTS[0])
    assert orm.score(its.ChatMessages(talk(TEXTS[0]))) == mean(model, "AB", TEXTS[0])
    with pytest.raises(ValueError, match="the last one to be the assistant's"):
        orm.score(talk("F")[:1])
    with pytest.raises(ValueError, match="the last one to be the assistant's"):
        orm.score([talk("F"), talk(None)])
    with pytest.raises(ValueError, match=r"content of the user's message\[1\] is of type 'image_url'"):
        orm.score([its.ChatMessage(role="user", content=IMAGE), *talk("F")[1:]])
    with pytest.raises(ValueError, match="messages: expected a list of messages"):
        orm.score(talk("F")[1:])
    assert orm.score([talk([{"type": "text", "text": TEXTS[0]}])]) == [mean(model, "AB", TEXTS[0])]
    prm = its.ReflectiveProcessRewardModel(engine)
    for wrong in (None, ["F", None]):
        with pytest.raises(ValueError, match="response_or_responses=None: expected a text"):
            prm.score("AB", wrong)


def test_its_hub_event_loop_goes_on_while_the_model_is_busy(its, engine, lm, model):
    prm = its.ReflectiveProcessRewardModel(engine)
    gate = threading.Event()
    engine.submit(lambda: gate.wait(tiny.PATIENCE))

    async def run():
        jobs = [
            asyncio.ensure_future(prm.ascore("AB", TEXTS)),
            asyncio.ensure_future(lm.agenerate([its.ChatMessage(role="user", content="AB")])),
        ]
        ticks = 0
        for _ in range(20):
            await asyncio.sleep(0.01)
            ticks += 1
        busy = not any(job.done() for job in jobs)
        gate.set()
        await asyncio.gather(*jobs)
        return ticks, busy

    try:
        assert asyncio.run(asyncio.wait_for(run(), tiny.PATIENCE)) == (20, True)
    finally:
        gate.set()


def test_its_hub_concurrent_calls_do_not_mix(its, engine, lm, model):
    """Decoding and scoring at once, from several threads and event loops."""
    prm = its.ReflectiveProcessRewardModel(engine, step_sep=None)
    expected = {(q, t): mean(model, q, t) for q in QUESTIONS for t in TEXTS}  # by hand, before the engine is busy
    wrong = []

    async def run(question):
        user = [its.ChatMessage(role="user", content=question)]
        for _ in range(3):
            responses, scores = await asyncio.gather(lm.agenerate([user] * 3), prm.ascore(question, TEXTS))
            wrong.extend(s for s, t in zip(scores, TEXTS, strict=True) if s != expected[question, t])
            texts = [str(r["content"]) for r in responses]
            again = await prm.ascore(question, texts)
            known = [r["content"].candidate.score for r in responses]
            wrong.extend(a for a, b in zip(again, known, strict=True) if a != close(b))

    threads = [threading.Thread(target=lambda q=q: asyncio.run(run(q))) for q in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(tiny.PATIENCE)
    assert not wrong


def test_its_hub_language_model(its, engine, lm, model):
    user = [its.ChatMessage(role="user", content="ABC")]
    usage = its.GenerationUsage()
    message = asyncio.run(lm.agenerate(user, usage_accumulator=usage, temperature=0.0))
    greedy = model.generate("ABC", n=1, temperature=0, max_new_tokens=24)
    assert message == {"role": "assistant", "content": greedy.text}
    assert (usage.prompt_tokens, usage.completion_tokens, usage.num_calls) == (3, greedy.tokens, 1)

    begun, rest = greedy.text[:5], greedy.text[5:]
    go_on = [*user, its.ChatMessage(role="assistant", content=begun)]
    assert asyncio.run(lm.agenerate(go_on, temperature=0.0, max_completion_tokens=19))["content"] == rest

    stop = greedy.text[6:8]
    at = greedy.text.index(stop)
    for include, expected in ((False, greedy.text[:at]), (True, greedy.text[: at + 2])):
        settings = {"temperature": 0.0, "include_stop_str_in_output": include}
        for stops in (stop, ["none", stop]):
            assert asyncio.run(lm.agenerate_single(user, stops, **settings))["content"] == expected

    hot, cold = asyncio.run(lm.agenerate([user, user], temperature=[5.0, 0.0]))
    assert cold["content"] == greedy.text != hot["content"]
    assert asyncio.run(lm.agenerate([])) == []

    full = its.ChatMessage(role="assistant", content="A" * 500)
    assert len(asyncio.run(lm.agenerate([*user, full], temperature=0.0))["content"]) <= 9
    full.content = "A" * 509
    assert asyncio.run(lm.agenerate([*user, full]))["content"] == ""
    assert asyncio.run(lm.agenerate(user, "", temperature=0.0))["content"] == greedy.text
    for messages, given, wrong in (
        (user, {"max_completion_tokens": 0}, "max_completion_tokens=0 must be at least 1"),
        ([user, user], {"temperature": [1.0]}, "temperature: 1 for 2 conversations"),
        ([its.ChatMessage(role="user", content=IMAGE)], {}, "is of type 'image_url'"),
    ):
        with pytest.raises(ValueError, match=wrong):
            asyncio.run(lm.agenerate(messages, **given))
    with pytest.raises(ValueError, match="tools"):
        asyncio.run(lm.agenerate(user, tools=[{"type": "function"}]))


def test_its_hub_seed_repeats(its, engine):
    def run():
        lm = its.ReflectiveLanguageModel(engine, max_completion_tokens=12, temperature=1.0, seed=4)
        return asyncio.run(lm.agenerate([[its.ChatMessage(role="user", content="ABC")]] * 4))

    first = run()
    assert first == run() and len({m["content"] for m in first}) > 1


def test_its_hub_cancelled_call_ends_decoding(its):
    model, left = talker(2), threading.Event()  # it never ends by itself
    engine = Engine(model)
    lm = its.ReflectiveLanguageModel(engine, max_completion_tokens=500, temperature=1.0, seed=1)

    def wait(*_):
        if engine.stats()["tokens"]:
            assert left.wait(tiny.PATIENCE)

    model.model.model.register_forward_pre_hook(wait)

    async def run():
        job = asyncio.ensure_future(lm.agenerate([[its.ChatMessage(role="user", content="ABC")]] * 8))
        while not engine.stats()["tokens"]:
            await asyncio.sleep(0.005)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        left.set()

    asyncio.run(run())
    engine.close()
    assert 0 < engine.stats()["tokens"] < 8 * 5


def test_its_hub_best_of_n_scores_nothing_twice(its, engine, lm, model):
    before = engine.stats()["scored"]
    result = its.BestOfN(its.ReflectiveOutcomeRewardModel(engine)).infer(
        lm, "ABC", budget=8, return_response_only=False
    )
    assert engine.stats()["scored"] == before, "the scores are those of decoding"
    assert result.scores == [mean(model, "ABC", r["content"]) for r in result.responses]
    assert result.the_one["content"] == result.responses[result.scores.index(max(result.scores))]["content"]
    assert len(set(result.scores)) > 1 and result.usage.num_calls == 8


def test_its_hub_best_of_n_of_other_texts(its, engine, model):
    """By another language model, and by ours behind another prompt: these are run through the model."""
    orm = its.ReflectiveOutcomeRewardModel(engine)

    class Canned(its.AbstractLanguageModel):
        async def agenerate(self, messages, stop=None, **settings):
            raise AssertionError("not asked by best of n")

        async def agenerate_single(self, messages, stop=None, **settings):
            return {"role": "assistant", "content": texts.pop()}

    texts = TEXTS[::-1]
    result = its.BestOfN(orm).infer(Canned(), "AB", budget=6, return_response_only=False)
    assert sorted(result.scores) == close(sorted(aggregate(step_scores(model, "AB", t)) for t in TEXTS))
    lm, again = (
        its.ReflectiveLanguageModel(engine, max_completion_tokens=20, temperature=1.0, seed=2) for _ in range(2)
    )

    def said(role, content):
        return its.ChatMessage(role=role, content=content)

    user = said("user", "ABC")
    whole = asyncio.run(lm.agenerate([user]))["content"]
    assert orm.score([said("user", "Z"), said("assistant", whole)]) == mean(model, "Z", whole) != whole.candidate.score
    rest = asyncio.run(lm.agenerate([user, said("assistant", "AFB")]))["content"]
    stop = next(c for c in whole[1:] if c in STEPS)
    cut = asyncio.run(again.agenerate([user], stop=stop))["content"]
    assert whole.startswith(cut + stop)
    for text in (rest, cut):
        assert orm.score([user, said("assistant", text)]) == mean(model, "ABC", text)


def test_its_hub_decoded_text_is_copied_as_text(lm, its):
    text = asyncio.run(lm.agenerate([its.ChatMessage(role="user", content="ABC")]))["content"]
    for copied in (copy.deepcopy(text), copy.copy(text), pickle.loads(pickle.dumps(text))):
        assert type(copied) is str and copied == text


@pytest.mark.parametrize("include", [False, True])
def test_its_hub_beam_search(its, engine, lm, model, include):
    sg = its.StepGeneration(
        max_steps=4, step_token="F", stop_token="Z", temperature=1.0, include_stop_str_in_output=include
    )
    prm = its.ReflectiveProcessRewardModel(engine, step_sep=None if include else "F")
    result = its.BeamSearch(sg, prm, beam_width=2).infer(lm, "ABC", budget=8, return_response_only=False)
    texts = [r["content"] for r in result.responses]
    assert len(texts) == 8 and max(result.steps_used) <= 5
    assert result.scores == [mean(model, "ABC", t if include or t.endswith("F") else t + "F") for t in texts]
    assert result.the_one["content"] == texts[result.scores.index(max(result.scores))]
    assert max(result.scores) > 0


@pytest.mark.parametrize("method", ["ParticleFiltering", "EntropicParticleFiltering", "ParticleGibbs"])
def test_its_hub_particles(its, engine, lm, model, method):
    sg = its.StepGeneration(max_steps=3, step_token="F", temperature=1.0)
    prm = its.ReflectiveProcessRewardModel(engine, "last", step_sep="F")
    search = getattr(its, method)(sg, prm)
    result = search.infer(lm, "ABC", budget=6, return_response_only=False)
    gibbs = method == "ParticleGibbs"
    responses = result.responses_lst[-1] if gibbs else result.responses
    weights = result.log_weights_lst[-1] if gibbs else result.log_weights_lst
    assert len(responses) == 6
    for response, weight in zip(responses, weights, strict=True):
        score = aggregate(step_scores(model, "ABC", response["content"] + "F"), "last")
        assert 1 / (1 + math.exp(-weight)) == pytest.approx(score, rel=1e-3, abs=1e-6)
    assert result.the_one["content"] == responses[weights.index(max(weights))]["content"]


def test_its_hub_by_tokens_a_step(its, engine, lm, model):
    sg = its.StepGeneration(max_steps=3, tokens_per_step=6, temperature=1.0)
    prm = its.ReflectiveProcessRewardModel(engine, step_sep=None)
    result = its.BeamSearch(sg, prm, beam_width=2).infer(lm, "ABC", budget=4, return_response_only=False)
    assert result.scores == [mean(model, "ABC", r["content"]) for r in result.responses]
    assert max(len(r["content"]) for r in result.responses) > 6


def test_its_hub_waits_for_places(its, model):
    """More at once than the engine queues, and than its_hub's orchestrator lets pass, which keeps the default threads."""
    narrow = Engine(model, batch_rows=2, max_queue=2)
    lm = its.ReflectiveLanguageModel(narrow, max_completion_tokens=4, temperature=1.0, seed=0)
    orm = its.ReflectiveOutcomeRewardModel(narrow)

    async def run(orchestrator):
        try:
            search = its.BestOfN(orm, orchestrator)
            return await asyncio.wait_for(
                search.ainfer(lm, "ABC", budget=40, return_response_only=False), tiny.PATIENCE
            )
        finally:
            for _ in range(
                40 if orchestrator._semaphore else 0
            ):  # after a failure threads still wait, and the loop for them
                orchestrator._semaphore.release()

    for orchestrator in (its.LMOrchestrator(max_concurrency=-1), its.LMOrchestrator(max_concurrency=2)):
        assert len(asyncio.run(run(orchestrator)).responses) == 40
    narrow.close()


def test_its_hub_scores_without_a_value_are_0(its, broken):
    prm = its.ReflectiveProcessRewardModel(broken, step_sep=None)
    with pytest.warns(NonFiniteWarning):
        scores = prm.score("AB", ["AFYG", "AFBG"])
    assert scores[0] == 0.0 < scores[1]
    decoded = its.Decoded("AFYG")
    decoded.engine, decoded.prompt = broken, "AB"
    decoded.candidate = Candidate("AFYG", math.nan, [math.nan], [(0, 2)], [], error="not finite")
    talk = [its.ChatMessage(role="user", content="AB"), its.ChatMessage(role="assistant", content=decoded)]
    assert its.ReflectiveOutcomeRewardModel(broken).score(talk) == 0.0
