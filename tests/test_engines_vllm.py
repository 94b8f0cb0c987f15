"""The engine for vLLM and its worker's scorer, without vLLM; ``tests/in_vllm`` has them in it."""

import json
import random
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import recorded
import tiny
import torch
from like_vllm import LikeVLLM
from test_search import QUESTIONS, reflective_model

import reflective as rf
from reflective.engines.vllm import modes, requests, sequences
from reflective.engines.vllm.engine import VLLMEngine
from reflective.engines.vllm.finished import Finished
from reflective.engines.vllm.options import Options
from reflective.engines.vllm.pruning import PruneRule
from reflective.engines.vllm.requests import Requests, Wanted
from reflective.engines.vllm.results import MissingSteps, check_ids, collect
from reflective.engines.vllm.walk import Walk
from reflective.scoring.sharded import ShardedHead
from reflective.search import strategies as search
from reflective.search.strategies import prune


def in_vllm(model: rf.ReflectiveModel, monkeypatch, **how) -> tuple[rf.ReflectiveModel, LikeVLLM]:
    """``model`` as it would be in vLLM, whose candidates draw what those of the transformers engine draw."""
    numbers: dict[tuple, int] = {}
    born: dict[int, int] = {}

    def uniform(seed: int, place: int) -> float:
        born.setdefault(seed, place)
        key = next(k for k, n in numbers.items() if n == seed)
        return np.random.default_rng(key[:-1]).random(place - born[seed] + 1)[-1]

    runs = iter(range(1000))
    like = LikeVLLM(model, uniform=uniform, **how)
    core = like.core()

    def engine(batch_rows=None, **_):
        run = next(runs)  # the same seed comes again in another run
        monkeypatch.setattr(sequences, "seed", lambda of: numbers.setdefault((*of, run), len(numbers)))
        return VLLMEngine(core, model.steps, at="predict", ends=[2], batch_rows=batch_rows)

    host = SimpleNamespace(
        engine=engine, max_length=512, vocab_size=model.vocab_size, name="like", check_sampling=lambda sampling: None
    )
    return rf.ReflectiveModel(None, model.tokenizer, model.head, model.config, host=host), like


@pytest.mark.parametrize("name", [name for name in recorded.runs() if "seed 1" not in name])
def test_strategies_come_to_what_they_come_to_in_transformers(name, monkeypatch):
    """All runs of ``recorded``, with a place for everybody: the same tokens, scores and chosen candidates."""
    checkpoint, strategy, settings = recorded.runs()[name]
    settings.pop("batch_rows", None)  # who waits for a place is each engine's own business
    plain = recorded.reflective_model(**checkpoint)
    expected = recorded.record(plain, strategy, settings)
    model, like = in_vllm(plain, monkeypatch, seats=64)
    for was, is_ in zip(expected, recorded.record(model, strategy, settings), strict=True):
        assert is_["best"] == was["best"] and len(is_["candidates"]) == len(was["candidates"])
        for c, other in zip(is_["candidates"], was["candidates"], strict=True):
            for key in ("log_prob", "score", "steps"):
                assert c.pop(key) == pytest.approx(other.pop(key), rel=1e-3, abs=1e-5)
            assert c == other
    assert not like.running and not like.waiting and like.requests.stats()["rows"] == 0


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("best_of_n", {"presence_penalty": 1.5, "frequency_penalty": 0.5, "min_tokens": 9, "logit_bias": {2: 2.0, 30: 1.0}}),
        ("step_beam", {"presence_penalty": 2.0, "temperature": [1.0, 0.5, 2.0]}),
        ("dvts", {"frequency_penalty": 1.5, "repetition_penalty": 1.4, "min_tokens": 20, "logit_bias": {2: 4.0}}),
        ("particles", {"top_k": 7, "min_p": 0.05, "presence_penalty": 1.0, "thinking_budget": 7}),
    ],
)
def test_settings_of_sampling_do_what_they_do_in_transformers(strategy, settings, monkeypatch):
    """Where a sequence goes on by another request, too: its tokens are given as a prompt then, and are output for all that."""
    plain = reflective_model(think_end="XYZ")
    asked = {"seed": 3, "max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, **settings}
    model, like = in_vllm(plain, monkeypatch, seats=64)
    begun = []
    monkeypatch.setattr(like, "add_request", lambda *of, add=like.add_request: (begun.append(of[2]), add(*of)))
    texts = ["<think>" + QUESTIONS[0], QUESTIONS[1]]
    expected = plain.generate(texts, strategy=search.by_name(strategy, n=4), **asked)
    penalties = {"presence_penalty": 0, "frequency_penalty": 0}
    free = plain.generate(texts, strategy=search.by_name(strategy, n=4), **asked | penalties)
    found = model.generate(texts, strategy=search.by_name(strategy, n=4), **asked)
    for g, other, without in zip(found, expected, free, strict=True):
        assert [(c.token_ids, c.status) for c in g.candidates] == [(c.token_ids, c.status) for c in other.candidates]
        assert [c.token_ids for c in g.candidates] != [c.token_ids for c in without.candidates]
    again = [p for p in begun if "output_from" in p.extra_args["reflective"]]
    assert again or strategy == "best_of_n"


def test_who_lacks_memory_waits_the_worst_first(monkeypatch):
    """A sequence is parked, and draws what it would have drawn; blocks are never short."""
    settings = {"strategy": "best_of_n", "n": 6, "seed": 4, **recorded.SAMPLING}
    model, like = in_vllm(reflective_model(), monkeypatch, seats=16)
    plenty = model.generate(QUESTIONS[0], **settings)
    model, short = in_vllm(reflective_model(), monkeypatch, seats=16, blocks=like.most_blocks // 2)
    made = []
    engine = model.host.engine
    model.host.engine = lambda **how: made.append(engine(**how)) or made[-1]
    found = model.generate(QUESTIONS[0], **settings)
    assert [c.token_ids for c in found.candidates] == [c.token_ids for c in plenty.candidates]
    assert [c.score for c in found.candidates] == pytest.approx([c.score for c in plenty.candidates], rel=1e-5)
    assert made[0].parked > 2 and short.most_blocks < short.vllm_config.cache_config.num_gpu_blocks <= like.most_blocks


# -- the worker's rows ---------------------------------------------------------------------------------------------------


def requests_of(*, seats=2, **how) -> tuple[Requests, rf.StepTokens]:
    steps = rf.StepTokens(tiny.STEP_IDS, tiny.THINK, tiny.END_THINK, vocab_size=tiny.VOCAB)
    placed = ShardedHead(tiny.head(), torch.device("cpu"), torch.float32, None, None, None).load()
    return Requests(steps, placed, at="predict", seats=seats, ends=[2], **how), steps


def feed(made: Requests, name: str, tokens: list[int], hidden: torch.Tensor | None = None) -> None:
    rows = torch.tensor([made.row(name)], dtype=torch.int32)
    for t in tokens:
        made.consume(torch.tensor([t]), torch.randn(1, tiny.HIDDEN) if hidden is None else hidden[None], rows)


def test_rows_are_taken_again_and_what_they_came_to_is_kept():
    made, steps = requests_of(seats=2)
    texts = {}
    for i in range(300):
        name = f"r{i}-{i:08x}"
        made.admit(name, [5, 6, 7], 3, Wanted())
        made.settle()
        texts[name] = [random.Random(i).randrange(5, 40) for _ in range(12)]
        feed(made, name, texts[name])
        made.leave(name)
    stats = made.stats()
    assert stats["rows"] + stats["kept"] == 300 and stats["kept"] > 100
    for i in (0, 150, 299):
        (log,) = made.log(made.find([f"r{i}"]), forget=True)
        ids = [5, 6, 7, *texts[log.request]]
        (scores,) = [collect([log], [ids], [3], steps, "predict")]
        assert (
            scores.step_positions[0].tolist()
            == steps.mask(torch.tensor([ids]), None, [3])[0].nonzero().flatten().tolist()
        )
        assert made.log(made.find([f"r{i}"]), forget=True) == []
    assert made.stats()["rows"] + made.stats()["kept"] == 297


def test_no_more_is_kept_than_may_be(monkeypatch):
    monkeypatch.setattr(requests, "KEPT", 10)
    made, _ = requests_of(seats=1)
    for i in range(500):
        made.admit(f"r{i}", [5, 6], 2, Wanted())
        made.settle()
        made.leave(f"r{i}")
    assert (
        made.stats()["kept"] <= 10
        and len(made.find([f"r{i}" for i in range(500)])) == made.stats()["kept"] + made.stats()["rows"]
    )
    for i in range(66):  # as many as there are rows
        made.admit(f"s{i}", [5, 6], 2, Wanted())
    with pytest.raises(RuntimeError, match="raise max_num_seqs"):
        made.admit("one more", [5, 6], 2, Wanted())


def test_what_was_forgotten_before_it_left_leaves_nothing():
    made, _ = requests_of()
    made.admit("a-12345678", [5, 6], 2, Wanted(key="mine"))
    feed_after = made.find(["mine"])
    assert len(made.log(feed_after, forget=True)) == 1 and made.stats()["rows"] == 1, "it may go on"
    made.leave("a-12345678")
    assert made.stats()["rows"] == 0 and made.find(["mine", "a-12345678"]) == []


def test_a_log_that_is_full_and_ids_that_are_others():
    made, steps = requests_of(max_steps=3)
    made.admit("a", [5, 6], 2, Wanted())
    made.settle()
    feed(made, "a", [10, 30] * 6)
    (log,) = made.log(["a"], forget=True)
    ids = [5, 6, *[10, 30] * 6]
    with pytest.raises(MissingSteps, match="more steps than max_steps"):
        collect([log], [ids], [2], steps, "predict")
    check_ids(log, ids, tiny.VOCAB)
    check_ids(log, ids[:-1], tiny.VOCAB)  # a token past the end
    for other in (ids[:-2], [*ids[:-1], 31], [*ids, 5, 6], [6, *ids[1:]]):
        with pytest.raises(ValueError, match="the worker scored other tokens"):
            check_ids(log, other, tiny.VOCAB)


def test_what_a_request_can_ask_for():
    assert Wanted.of(None) == Wanted.of({"other": 1}) == Wanted()
    assert Wanted.of({"reflective": "k"}).key == "k" and Wanted.of({"reflective": {"group": "g"}}).group == "g"
    with pytest.raises(ValueError, match="unexpected keyword argument 'keys'"):
        Wanted.of({"reflective": {"keys": 1}})
    assert requests.given_id("3_reflective.7-0123abcd") == "reflective.7" and requests.given_id("7") == "7"


def test_steps_are_found_on_the_host_where_they_are_on_the_device():
    steps = rf.StepTokens(tiny.STEP_IDS, tiny.THINK, tiny.END_THINK, vocab_size=tiny.VOCAB)
    for seed in range(40):
        draw = random.Random(seed)
        ids = [
            draw.choice([tiny.THINK, tiny.END_THINK, *range(8, 24)]) if seed % 2 else draw.randrange(5, 40)
            for _ in range(30)
        ]
        start = draw.randrange(1, 6)
        walk = Walk(steps, ids[:start])
        for i in range(start, 30):
            walk.feed(ids[i])
            expected = steps.mask(torch.tensor([ids[: i + 1]]), None, [start])[0].nonzero().flatten().tolist()
            assert walk.copy().counted() == expected


@pytest.mark.parametrize("at", ["predict", "token"])
def test_finished_texts_by_the_prefill(at):
    """In pieces; where columns in scope are cached they are run again."""
    model = reflective_model()
    like = LikeVLLM(model, at=at, piece=5, cached=9)
    draw = random.Random(1)
    texts = [([draw.randrange(5, 60) for _ in range(4 + 7 * i)], 3) for i in range(5)]
    found = Finished(like.core(), model.steps, at, texts).run()
    for (ids, start), scores in zip(texts, found, strict=True):
        expected = rf.score(model.model, model.head, model.steps, [ids], at=at, prompt_lengths=[start])
        places = expected.step_positions[0].tolist()
        assert scores.step_positions[0].tolist() == [p for p in places if at == "predict" or p < len(ids) - 1]
        assert scores.step_scores[0].tolist() == pytest.approx(
            expected.step_scores[0].tolist()[: len(scores.step_scores[0])], abs=1e-5
        )
    assert not like.running and like.requests.stats()["rows"] == 0


# -- prune in the worker -------------------------------------------------------------------------------------------------


def pruned_run(rule, *, seeds=6, tokens=40):
    """Requests of one group, to their end: ``{name: (tokens, log)}``."""
    model = reflective_model()
    like = LikeVLLM(model, seats=8, rule=rule)
    core = like.core()
    names = [
        core.add(
            model.encode("ABCDEFGH")[0].tolist(), max_tokens=tokens, temperature=1.0, seed=s, stop_token_ids=[2],
            extra_args={"reflective": {"group": "g"}},
        )
        for s in range(seeds)
    ]  # fmt: skip
    out = {name: [] for name in names}
    while core.under_way:
        core.step()
        for name in names:
            for output in core.fetch(name):
                out[name] += output.outputs[0].token_ids
    return {name: (out[name], core.logs([name], forget=True)[0]) for name in names}


def test_the_device_stops_whom_the_strategy_stops():
    free, rule = pruned_run(None), PruneRule(0.03, 2)
    found = pruned_run(rule)
    stopped = set()
    for (tokens, log), (whole, _) in zip(found.values(), free.values(), strict=True):
        if log.pruned:
            assert tokens[:-1] == whole[: len(tokens) - 1] and tokens[-1] == 2, "an end instead of its next token"
            stopped.add(log.key)
        else:
            assert tokens == whole, "who survives does not notice who is stopped"
    assert 0 < len(stopped) < 6
    # By the rule itself: in every step all are compared by the steps that count for what they have sampled.
    prompt = [5, 6, 7, 8, 9, 10, 11, 12]
    model = reflective_model()
    scores = {log.key: {c: float(np.exp(s)) for c, _, s in log.steps} for _, log in found.values()}
    walks = {log.key: Walk(model.steps, prompt) for _, log in found.values()}
    decided = {}
    for place in range(max(len(tokens) for tokens, _ in found.values())):
        final = []
        for tokens, log in found.values():
            final.append(len(tokens) <= place + 1 and tokens[-1] == 2)
            if place < len(tokens):
                walks[log.key].feed(tokens[place])
        curves = {k: prune.extend([], [scores[k][c] for c in walk.counted()]) for k, walk in walks.items()}
        shown = [k for k in curves if k not in decided]
        ended = dict(zip(curves, final, strict=True))
        for tokens, log in found.values():
            own = curves[log.key]
            if log.key in shown and len(own) >= rule.min_steps and not ended[log.key] and place < len(tokens):
                others = [curves[k] for k in shown], [ended[k] for k in shown]
                if prune.lag(own, len(own), *others) > rule.threshold:
                    decided[log.key] = place
    assert set(decided) == stopped
    for tokens, log in found.values():
        assert not log.pruned or len(tokens) == decided[log.key] + 2, "stopped in the step after"


def test_modes_that_nobody_has_tried_are_refused_by_name():
    def config(**changed):
        parallel = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "enable_dbo": False}
        given = {
            "parallel_config": SimpleNamespace(**parallel), "compilation_config": SimpleNamespace(pass_config=SimpleNamespace()),
            "speculative_config": None, "kv_transfer_config": None,
            "model_config": SimpleNamespace(
                enable_prompt_embeds=False, is_multimodal_model=False, is_hybrid=False, is_attention_free=False
            ),
        }  # fmt: skip
        for path, value in changed.items():
            part, _, name = path.partition("__")
            setattr(given[part], name, value) if name else given.update({part: value})
        return SimpleNamespace(**given)

    modes.check(config())
    modes.check(config(speculative_config=SimpleNamespace(method="ngram")))
    for change, named in {
        "parallel_config__pipeline_parallel_size": "pipeline_parallel_size", "parallel_config__enable_dbo": "enable_dbo",
        "parallel_config__data_parallel_size": "data_parallel_size", "model_config__is_hybrid": "is_hybrid",
        "parallel_config__enable_batch_sharded_sampling": "enable_batch_sharded_sampling",
        "model_config__is_multimodal_model": "is_multimodal_model", "kv_transfer_config": "kv_transfer_config",
        "parallel_config__prefill_context_parallel_size": "prefill_context_parallel_size", "watermark_config": "watermark_config",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{named}: reflective does not score in this mode"):
            modes.check(config(**{change: 2}))
    with pytest.raises(ValueError, match="'eagle3' is not among ngram, draft_model"):
        modes.check(config(speculative_config=SimpleNamespace(method="eagle3")))


def test_options_that_are_none():
    assert Options.of({"reflective": {"head": "h", "rule": "text"}}).record() == {"head": "h", "rule": "text"}
    with pytest.raises(ValueError, match="reflective.vllm.settings makes it"):
        Options.of({})
    with pytest.raises(ValueError, match="unknown margin; expected head"):
        Options.of({"reflective": {"head": "h", "margin": 1}})
    with pytest.raises(ValueError, match="max_steps"):
        Options("h", max_steps=0)


def test_without_vllm_it_says_what_to_install(tmp_path, monkeypatch):
    from reflective.engines.vllm import core

    monkeypatch.setattr(core, "_version", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'reflective-kernels\[vllm\]'"):
        core.check_version()
    monkeypatch.setattr(core, "_version", lambda name: "0.34.1")
    with pytest.raises(ImportError, match="this is 0.34.1"):
        core.check_version()
    with pytest.raises(ValueError, match="max_model_len: no settings of engine='hf'"):
        rf.ReflectiveModel.from_pretrained(tmp_path, max_model_len=10)
    with pytest.raises(ValueError, match="engine='sglang'"):
        rf.ReflectiveModel.from_pretrained(tmp_path, engine="sglang")


def test_what_vllm_is_started_with(tmp_path, capsys):
    """Of a published directory: a head beside the weights, no ``reflective.json``."""
    import reflective.vllm

    head = tmp_path / "elsewhere"
    tiny.model("llama").save_pretrained(tmp_path)
    tiny.head().save_pretrained(head)
    (head / "reflective.json").write_text('{"rule": "text", "at": "token", "prompt": "{question}"}')
    found = reflective.vllm.settings(tmp_path, head=head, max_steps=9)
    assert found["hf_overrides"] == {"architectures": ["ReflectiveLlamaForCausalLM"]} and found["model"] == str(
        tmp_path
    )
    assert found["additional_config"] == {
        "reflective": {"head": str(head), "rule": "text", "at": "token", "max_steps": 9}
    }
    reflective.vllm.main([str(tmp_path), "--head", str(head), "--max-model-len", "64"])
    said = shlex.split(capsys.readouterr().out)
    assert said[0] == str(tmp_path) and said[-2:] == ["--max-model-len", "64"]
    assert json.loads(said[said.index("--additional-config") + 1])["reflective"]["at"] == "token"
    for wrong in ([], ["serve"], ["--head", str(head)]):
        with pytest.raises(SystemExit, match="usage"):
            reflective.vllm.main(wrong)
    with pytest.raises(ValueError, match="reflective.engines.vllm.options.Options"):
        reflective.vllm.settings(tmp_path, head=head, schedule="deferred")
