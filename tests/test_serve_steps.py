"""What a server and runs over files do with a model whose weights are in vLLM, on what is like it."""

import json
import threading
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import tiny
from like_vllm import LikeVLLM
from test_cli import run
from test_search import QUESTIONS, STEPS, letter_tokenizer, reflective_model
from test_serve_engine import SAMPLING, Gate

import reflective as rf
from reflective import batch
from reflective.engines.vllm import host as hosting
from reflective.serve.engine import Closed, Engine

RUN_IN_A_STEP = 40


@pytest.fixture(scope="module")
def twin():
    """The same weights here."""
    return reflective_model()


@pytest.fixture
def model(tmp_path, monkeypatch):
    return in_vllm(tmp_path, monkeypatch)


def in_vllm(place, monkeypatch, **how):
    """The model of ``reflective_model`` in what is like vLLM, its files in ``place``."""
    here = reflective_model()
    here.save_pretrained(place)
    like = LikeVLLM(here, **{"seats": 6, **how})
    like.vllm_config.scheduler_config.max_num_batched_tokens = RUN_IN_A_STEP
    like.vllm_config.additional_config = {"reflective": {"head": str(place), "delimiter": list(STEPS)}}
    like.vllm_config.model_config = SimpleNamespace(
        dtype=here.model.dtype, max_model_len=512, get_vocab_size=lambda: here.model.config.vocab_size,
        try_get_generation_config=lambda: {"eos_token_id": 2},
    )  # fmt: skip
    like.forgotten = 0
    like.reset_prefix_cache = lambda: setattr(like, "forgotten", like.forgotten + 1)
    like.engine_core = SimpleNamespace(shutdown=lambda: setattr(like, "closed", True))
    core = like.core()
    with monkeypatch.context() as patched:
        patched.setattr(hosting, "start", lambda settings: core)
        host = hosting.VLLMHost({"model": str(place)}, letter_tokenizer())
    return rf.ReflectiveModel(None, letter_tokenizer(), here.head, here.config, place, host)


def test_requests_and_texts_are_answered_as_each_alone(model, twin):
    engine = Engine(model)
    assert engine.batch_rows == 6
    asked = [(QUESTIONS[i % 3], {**SAMPLING, "n": 1 + i % 3, "seed": i}) for i in range(6)]
    texts = [(["AB", ""], ["CKZKLE" * 9, "CKZKLEKK"]), (["A"] * 3, ["ZZKAKA", "K", "AK" * 30])]
    found = [engine.generate(q, **settings) for q, settings in asked]
    scored = [engine.score(*some) for some in texts]
    for (prompts, responses), future in zip(texts, scored, strict=True):
        for prompt, response, c in zip(prompts, responses, future.result(tiny.PATIENCE), strict=True):
            (alone,) = twin.score(prompt, [response])
            assert c.text == alone.text and c.step_spans == alone.step_spans
            assert c.step_scores == pytest.approx(alone.step_scores, rel=1e-4)
    tokens = 0
    for (question, _), future in zip(asked, found, strict=True):
        generation = future.result(tiny.PATIENCE)
        tokens += generation.tokens
        for c in generation.candidates:
            (alone,) = twin.score_tokens([twin.encode(question)[0].tolist()], [c.token_ids])
            assert c.step_scores == pytest.approx(alone.step_scores, rel=1e-4)
    assert engine.submit(model.host.core.stats).result(tiny.PATIENCE)["kept"] == 0
    assert engine.close() == []
    assert engine.stats() == {"queued": 0, "running": 0, "rows": 0, "tokens": tokens, "scored": 5}
    assert model.host.core.stats()["rows"] == 0 and not model.host.core.under_way


def test_no_more_texts_are_with_vllm_than_it_runs_in_a_step(model):
    """So nobody who comes later waits for all of them, nor a short one for a long."""
    core, engine, most, order = model.host.core, Engine(model), [], []
    add = core.add

    def counted(ids, **params):
        name = add(ids, **params)
        if "score_from" in str(params.get("extra_args")):
            under_way[name] = len(ids)
            most.append(sum(size for other, size in under_way.items() if other in core.under_way))
        return name

    under_way = {}
    core.add = counted
    gate = Gate()
    running = engine.generate("ABC", seed=1, on_step=gate, **{**SAMPLING, "max_new_tokens": 300})
    assert gate.reached.wait(tiny.PATIENCE)
    jobs = {"long": ["ABCK" * 8] * 8, "short": ["AK"], "brief": ["A", "K"]}
    for name, responses in jobs.items():
        future = engine.score(["A"] * len(responses), responses)
        future.add_done_callback(lambda _, name=name: order.append(name))
    gate.open.set()
    running.result(tiny.PATIENCE)
    engine.close()
    assert len(most) == 11 and max(most) <= RUN_IN_A_STEP + 33, "the last may go beyond"
    assert order[-1] == "long" and sorted(order) == sorted(jobs)


def test_cancelled_texts_leave_vllm(model):
    engine, gate = Engine(model), Gate()
    running = engine.generate("ABC", seed=1, on_step=gate, **SAMPLING)
    assert gate.reached.wait(tiny.PATIENCE)
    texts = engine.score(["A"] * 20, ["ABCK" * 8] * 20)
    assert texts.cancel()
    late = engine.score(["A"], ["ABK"])
    gate.open.set()
    assert len(late.result(tiny.PATIENCE)) == 1
    running.cancel()
    with pytest.raises(CancelledError):
        texts.result(tiny.PATIENCE)
    begun = threading.Event()
    again = engine.score(["A"] * 20, ["ABCK" * 8] * 20)
    model.host.core.llm.step, step = lambda: (begun.set(), step())[1], model.host.core.llm.step
    assert begun.wait(tiny.PATIENCE)
    assert again.cancel() or again.done()
    assert engine.submit(lambda: 5).result(tiny.PATIENCE) == 5
    engine.close()
    assert model.host.core.stats()["rows"] == 0 and not model.host.core.under_way


def test_what_is_wrong_with_a_text_the_others_do_not_pay(model):
    engine, real = Engine(model), model.host.core.add

    def picky(ids, **params):
        if len(ids) == 4:
            raise RuntimeError("four")
        return real(ids, **params)

    model.host.core.add = picky
    bad, good = engine.score(["A"] * 3, ["CK", "CKZ", "C"]), engine.score(["A"], ["CKZK"])
    assert len(good.result(tiny.PATIENCE)) == 1
    with pytest.raises(RuntimeError, match="four"):
        bad.result(tiny.PATIENCE)
    with pytest.raises(RuntimeError, match="four"):
        engine.generate("ABCD", seed=1, **SAMPLING).result(tiny.PATIENCE)
    assert len(engine.generate("ABC", n=2, seed=1, **SAMPLING).result(tiny.PATIENCE).candidates) == 2
    engine.close()
    assert engine.broken is None and model.host.core.stats()["rows"] == 0


def test_when_vllm_fails_everybody_is_told(model):
    engine, gate = Engine(model, batch_rows=2), Gate()
    futures = [engine.generate("ABC", seed=1, n=2, on_step=gate, **SAMPLING)]
    assert gate.reached.wait(tiny.PATIENCE)
    futures += [engine.generate("ABC", seed=1, **SAMPLING), engine.score(["A"], ["CK"]), engine.score(["A"], ["CK"])]
    assert futures[-1].cancel()

    def fail():
        raise RuntimeError("the device is lost")

    model.host.core.llm.step = fail
    gate.open.set()
    for future in futures[:-1]:
        with pytest.raises(RuntimeError, match="the device is lost"):
            future.result(tiny.PATIENCE)
    assert str(engine.broken) == "the device is lost"
    with pytest.raises(Closed):
        engine.generate("ABC", **SAMPLING)
    assert engine.close() == []


def test_limits_are_those_of_vllm(model):
    engine = Engine(model)
    for call, wrong in (
        (lambda: engine.score(["A"], ["B" * 511]), "512 tokens, more than the 511 that vLLM scores"),
        (lambda: engine.score([""], ["B" * 520], more=0.125), "520 tokens, more than the 511"),
        (lambda: engine.generate("A" * 512, max_new_tokens=0, prompt_logprobs=0), "512 tokens, more than the 511"),
        (lambda: engine.generate([61]), "61 is no token"),
        (lambda: Engine(model, schedule="deferred"), "schedule='deferred'"),
    ):
        with pytest.raises(ValueError, match=wrong):
            call()
    engine.close()
    model.close()
    assert model.host.core.llm.closed


def test_runs_over_files(model, twin, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"prompt": "AB", "response": "CKZKLE" * (1 + i)} for i in range(5)]
    records += [{"question": "A"}, {"text": "B" * 512}]
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    told = []
    assert batch.score_file(lambda: model, source, output, batch_tokens=40, report=told.append) == 2
    assert told[1].endswith("with its prompt 512 tokens, more than the 511 that vLLM scores, one below max_model_len")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    for record, row in zip(records[:5], found, strict=False):
        (alone,) = twin.score("AB", [record["response"]])
        assert row["score"] == pytest.approx(alone.score, rel=1e-4)

    source.write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    given = {"n": 2, "max_new_tokens": 8, "seed": 3, "together": 2, "report": told.append}
    assert batch.generate_file(lambda: model, source, whole, **given) == 0
    assert model.host.core.llm.forgotten == 2, "before each window"
    generate, windows = model.generate, []

    def interrupted(questions, **settings):
        if windows:
            raise KeyboardInterrupt
        windows.append(questions)
        return generate(questions, **settings)

    model.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        batch.generate_file(lambda: model, source, cut, **given)
    del model.generate
    assert batch.generate_file(lambda: model, source, cut, **given) == 0
    assert cut.read_bytes() == whole.read_bytes()


def test_identity_changes_with_what_results_depend_on(tmp_path, monkeypatch, model):
    identity = model.identity()
    json.dumps(identity)
    assert identity["use"]["delimiter"] == STEPS and identity["dtype"] == "torch.float32"
    model.host._settings |= {"gpu_memory_utilization": 0.5, "max_num_seqs": 3}
    assert model.identity() == identity
    model.host._settings |= {"quantization": "fp8"}
    assert model.identity() != identity
    del model.host._settings["quantization"]
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert model.identity() != identity
    again = model.identity()
    model.head[0].weight.data[0, 0] += 1
    assert model.identity() != again


@pytest.mark.parametrize(
    ("args", "wrong"),
    [
        (("--vllm", "{}"), "--vllm: these are settings of vLLM, and the engine is 'hf'; add --engine vllm"),
        (("--engine", "vllm", "--vllm", "{"), "--vllm '{': no JSON"),
        (("--engine", "vllm", "--vllm", "[1]"), "expected a JSON object"),
        (("--engine", "vllm", "--vllm", '{"model": "x", "hf_overrides": {}}'), "--vllm: hf_overrides, model: not by"),
        (("--engine", "tgi"), "engine='tgi'; expected one of 'hf', 'vllm'"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "score", "serve"])
def test_what_the_command_line_refuses(tmp_path, command, args, wrong):
    text = {"generate": ["x"], "score": ["--text", "x"], "serve": []}[command]
    assert wrong in run(command, "--model", tmp_path, *args, *text, code=2).stderr
