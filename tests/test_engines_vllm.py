"""The engine for vLLM and its worker's scorer, without vLLM; ``tests/in_vllm`` has them in it."""

import json
import random
import shlex
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import recorded
import safetensors.torch
import tiny
import torch
from like_vllm import LikeVLLM
from test_search import QUESTIONS, reflective_model
from transformers import AutoModelForCausalLM, LlamaConfig

import reflective as rf
from reflective.engines.base import Appended, Ended, Prompt, Sampling, Stepped
from reflective.engines.vllm import modes, requests, sequences
from reflective.engines.vllm.engine import VLLMEngine
from reflective.engines.vllm.finished import Finished
from reflective.engines.vllm.options import Options, no_text
from reflective.engines.vllm.pruning import PruneRule, Pruning
from reflective.engines.vllm.requests import Requests, Wanted
from reflective.engines.vllm.results import MissingSteps, check_ids, collect
from reflective.engines.vllm.walk import Walk
from reflective.scoring.heads import GatedLinear, Head, LinearHead
from reflective.scoring.scores import aggregate
from reflective.scoring.sharded import ShardedHead
from reflective.scoring.taps import Tap
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


# Whom ``replace`` exchanges depends on how far the others are when one ends a step, and a fork is a request that takes vLLM a step to begin.
@pytest.mark.parametrize("name", [n for n in recorded.runs() if "seed 1" not in n and not n.startswith("replace")])
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


def test_each_run_has_the_time_of_its_own(monkeypatch):
    """The worker goes on counting; what is told of a run is what it came to meanwhile."""
    model, like = in_vllm(reflective_model(), monkeypatch, seats=16)
    runs = [model.generate(QUESTIONS[0], n=4, seed=s, **recorded.SAMPLING) for s in range(3)]
    assert all(run.scoring_seconds > 0 for run in runs)
    assert sum(run.scoring_seconds for run in runs) <= like.requests.stats()["seconds"] * 1.001


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


@dataclass
class Headed:
    """What ``LikeVLLM`` reads of a ``ReflectiveModel``."""

    model: torch.nn.Module
    head: Head
    steps: rf.StepTokens


def headed(name: str) -> Headed:
    """A model with a head that reads it elsewhere than the paper's, or says something else."""
    small = name == "three layers of 20"
    net = tiny.model("llama")
    if small:
        sizes = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 10}
        net = AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny.CONFIGS["llama"].to_dict(), **sizes})).eval()
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = 2, 0
    tap, said = {
        "behind the final norm": (Tap((-1,), at="token"), {"aggregation": "min"}),
        "three layers of 20": (Tap((-2, 0, -1)), {"aggregation": "max"}),
        "every token": (Tap((-2,), at="every"), {"aggregation": "mean"}),
        "a linear probe": (Tap((3, 1), at="token"), {"aggregation": "last", "sigmoid": False}),
    }[name]
    torch.manual_seed(3)
    K = len(tap.layers) * net.config.hidden_size
    head = LinearHead(K) if name == "a linear probe" else rf.SPRM(K)
    steps = rf.StepTokens(tiny.STEP_IDS, tiny.THINK, tiny.END_THINK, vocab_size=tiny.VOCAB)
    return Headed(net, head.use(tap=tap, **said).requires_grad_(False).eval(), steps)


HEADS = ["behind the final norm", "three layers of 20", "every token", "a linear probe"]


def expected_of(model: Headed, ids: list[int], start: int, *, fed: bool = False) -> tuple[list[int], list[float], float]:
    """Columns and scores of the steps, and the score, by ``rf.score``; without that of a token that came last, which has no state unless it
    was ``fed``, for an end to be drawn behind it."""
    head, (found,) = model.head, [rf.score(model.model, model.head, model.steps, [ids], prompt_lengths=[start])]
    columns, scores = found.step_positions[0].tolist(), found.step_scores[0].tolist()
    if head.tap.at != "predict" and not fed and columns and columns[-1] == len(ids) - 1:
        columns, scores = columns[:-1], scores[:-1]
    return columns, scores, aggregate(scores, head.aggregation)


@pytest.mark.parametrize("how", [{}, {"ahead": True, "preempt": 0.1}, {"draft": 3, "piece": 3}])
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_other_taps(name, how):
    """Through preemptions, tokens past an end, drafts and prompts in pieces: as ``rf.score`` reads the finished text."""
    model = headed(name)
    like, head = LikeVLLM(model, **how), model.head
    core, prompt = like.core(), [5, 6, 7, 8]
    names = [core.add(prompt, max_tokens=24, temperature=1.0, seed=s, stop_token_ids=[2]) for s in range(4)]
    out = {name: list(prompt) for name in names}
    while core.under_way:
        core.step()
        for n in names:
            for output in core.fetch(n):
                out[n] += output.outputs[0].token_ids
    texts, steps = list(out.values()), like.requests.steps
    found = collect(core.logs(names, forget=True), texts, [4] * 4, steps, head.tap.at, head.aggregation, head.sigmoid)
    assert int(found.n_steps.sum()) > (60 if name == "every token" else 8)
    for i, ids in enumerate(texts):
        columns, scores, score = expected_of(model, ids, 4)
        assert found.step_positions[i].tolist() == columns
        assert found.step_scores[i].tolist() == pytest.approx(scores, abs=1e-5)
        assert float(found.score[i]) == pytest.approx(score, abs=1e-5)
    assert ("preempt" not in how) or like.preemptions


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_other_taps_behind_forks_and_rests(name):
    model = headed(name)
    like, head = LikeVLLM(model, piece=5), model.head
    reading = {"at": head.tap.at, "aggregation": head.aggregation, "sigmoid": head.sigmoid}
    engine = VLLMEngine(like.core(), like.requests.steps, ends=[2], **reading)
    sampling = [Sampling((c,), 1.0, 0.9, max_tokens=20) for c in range(6)]
    prompt, tokens, told, ended = [5, 6, 7, 8], {}, {}, {}

    def advance(turns):
        while turns and (events := engine.advance()) is not None:
            turns -= 1
            for e in events:
                if isinstance(e, Appended):
                    tokens.setdefault(e.sequence, []).append(e.chance.token)
                elif isinstance(e, Stepped):
                    told[e.sequence] = e.step_scores, list(tokens[e.sequence])
                elif isinstance(e, Ended):
                    ended[e.sequence] = e

    with engine:
        (prefix,) = engine.open([Prompt(prompt, steps="told")])
        first, second = engine.start(prefix, sampling[:2])
        advance(8)
        for parent in (first, second):
            tokens |= {fork: list(tokens[parent]) for fork in engine.fork(parent, sampling[2:4])}
        engine.rest([second])
        advance(4)
        engine.force(first, [10, 30, 11])
        engine.resume([second])
        advance(-1)
        engine.close([prefix])
    assert len(ended) == 6
    for s, end in ended.items():
        score, fed = end.score, end.reason == "stop"
        columns, scores, value = expected_of(model, [*prompt, *tokens[s]], 4, fed=fed)
        assert [p + 4 for p in score.positions] == columns and score.error is None
        assert score.step_scores == pytest.approx(scores, abs=1e-5) and score.score == pytest.approx(value, abs=1e-5)
    for scores, of in told.values():
        assert not any(np.isnan(scores)) and len(scores) <= len(of)
        n = len(scores) - 1
        assert scores[:n] == pytest.approx(expected_of(model, [*prompt, *of], 4)[1][:n], abs=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_finished_texts_of_other_taps(name):
    """By the prefill, in pieces, some of it cached."""
    model = headed(name)
    like, head = LikeVLLM(model, piece=5, cached=9), model.head
    draw = random.Random(1)
    texts = [([draw.randrange(5, 60) for _ in range(4 + 7 * i)], 3) for i in range(5)]
    reading = {"at": head.tap.at, "aggregation": head.aggregation, "sigmoid": head.sigmoid}
    found = Finished(like.core(), like.requests.steps, texts=texts, **reading).run()
    for (ids, start), scores in zip(texts, found, strict=True):
        columns, expected, score = expected_of(model, ids, start)
        assert scores.step_positions[0].tolist() == columns and float(scores.score[0]) == pytest.approx(score, abs=1e-5)
        assert scores.step_scores[0].tolist() == pytest.approx(expected, abs=1e-5)


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


def test_a_row_that_was_anothers_leads_nobody():
    """After a preemption a request may come back into a row of another, its steps there at once: of how it stood before nothing lies there."""
    made, totals = Pruning(PruneRule(0.5), 3, 8, [2], torch.device("cpu")), {}
    state = SimpleNamespace(totals=lambda at: tuple(torch.tensor([totals[int(i)][k] for i in at], dtype=d) for k, d in enumerate((torch.int64, torch.float64))))

    def seen(row, count, log_sum):
        totals[row] = count, log_sum
        made.observe(state, torch.tensor([9]), torch.tensor([row]))
        return bool(made.stopped(torch.tensor([row])))

    made.admit(0, "one")
    assert not seen(0, 1, -0.01) and not seen(0, 2, -0.02)
    made.admit(0, "two")
    made.admit(1, "two")
    assert not seen(0, 3, -6.0)
    assert not seen(1, 1, -1.2), "0.01 behind nobody: that was of a request of another group"
    assert not seen(1, 2, -2.6) and not seen(0, 4, -6.5)
    made.admit(2, "two")
    assert not seen(2, 4, -4.0) and seen(0, 5, -9.0) is False and seen(1, 4, -9.0), "-2.25 against -1"


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
                if prune.leader(len(own), *others) - own[-1] / len(own) > rule.threshold:
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
    with pytest.raises(ValueError, match="aggregation='median'"):
        Options("h", aggregation="median")
    with pytest.raises(ValueError, match="aggregation='gated': a head of two logits"):
        Options("h", aggregation="gated")
    with pytest.raises(ValueError, match="sigmoid=False says that scores are none"):
        Options("h", sigmoid=False)
    with pytest.raises(ValueError, match="is named twice"):
        Options("h", layers=[-1, -1])
    with pytest.raises(ValueError, match="prune: the worker compares geometric means.*aggregation='mean'"):
        Options("h", aggregation="mean", prune={"threshold": 0.5})


def test_options_of_before_there_were_taps_mean_the_papers():
    said = {"reflective": {"head": "h", "rule": "exact", "at": "token", "max_steps": 77}}
    old = Options.of(said)
    assert old.tap == Tap((-2,), False, "token") and old.reading["aggregation"] == "geometric_mean" and old.reading["sigmoid"]
    assert old.record() == said["reflective"] and old.logged(100) == 77
    assert Options("h").logged(100_000) == 4096 and Options("h", at="every").logged(100_000) == 100_000
    every = Options("h", at="every").load_steps(None, 9, no_text({"eos_token_id": [2, 8], "pad_token_id": 0}))
    assert every.step_ids == (1, 3, 4, 5, 6, 7) and no_text({"eos_token_id": 3}) == {3} and no_text(None) == set()
    new = Options("h", layers=(-1, 3), aggregation="mean", consecutive="all")
    assert Options.of({"reflective": json.loads(json.dumps(new.record()))}) == new


def test_a_head_is_written_down_as_vllm_reads_it(tmp_path, monkeypatch):
    """A linear one, from memory, with the rule that it was trained by; several and gated ones are refused."""
    import reflective.vllm

    monkeypatch.setenv("REFLECTIVE_CACHE", str(tmp_path / "cache"))
    tiny.model("llama").save_pretrained(tmp_path)
    torch.manual_seed(5)
    rule = {"rule": "contains", "delimiter": "\n\n", "consecutive": "all", "think_start_id": None, "think_end_id": None}
    tap, said = Tap((-1, 2), at="token"), {"aggregation": "last", "sigmoid": False}
    head = LinearHead(2 * tiny.HIDDEN).use(tap=tap, step_rule=rule, trained_on="somebody/other-7B", **said)
    with pytest.warns(UserWarning, match="trained on the states of somebody/other-7B, and this is "):
        found = reflective.vllm.settings(tmp_path, head=head)["additional_config"]
    head.use(trained_on=None)
    assert reflective.vllm.settings(tmp_path, head=head)["additional_config"] == found, "written once"
    options = Options.of(json.loads(json.dumps(found)))
    assert options.tap == tap and options.reading == {"at": "token", "higher_is_better": True, **said} and options.prune is None
    assert {name: getattr(options, name) for name in rule} == rule
    assert str(tmp_path / "cache") in options.head
    read, features = options.load_head(torch.float32), torch.randn(5, 2 * tiny.HIDDEN)
    assert read.tap == tap and not read.sigmoid and read.aggregation == "last"
    assert torch.allclose(read(features), head(features), atol=1e-6)
    with pytest.raises(ValueError, match=r"gated_linear has 2 logits a step \(value, gate\)"):
        reflective.vllm.settings(tmp_path, head=GatedLinear(tiny.HIDDEN))
    with pytest.raises(ValueError, match="head: several"):
        reflective.vllm.settings(tmp_path, head={"a": head, "b": head})
    with pytest.raises(ValueError, match="prune: the worker compares geometric means"):
        reflective.vllm.settings(tmp_path, head=head, prune={"threshold": 1.0})
    with pytest.raises(ValueError, match="unknown layers; .* the head says"):
        reflective.vllm.settings(tmp_path, head=head, layers=[-3])
    plain = reflective.vllm.settings(tmp_path, head=tiny.head())["additional_config"]["reflective"]
    assert set(plain) == {"head"}


def test_published_heads_are_read_for_vllm_by_what_their_files_say(tmp_path, monkeypatch):
    """STEP's: behind the final norm, every step of a run; SingProbe's: a risk, by GELU, of layers divided by their size."""
    import reflective.vllm

    monkeypatch.setenv("REFLECTIVE_CACHE", str(tmp_path / "cache"))
    tiny.model("llama").save_pretrained(tmp_path)
    torch.manual_seed(5)
    H = tiny.HIDDEN
    step = {"net.0.weight": torch.randn(16, H), "net.0.bias": torch.randn(16), "net.2.weight": torch.randn(1, 16), "net.2.bias": torch.randn(1)}
    torch.save({"model_state_dict": step}, tmp_path / "step.pt")
    probe = {"fc1.weight": torch.randn(8, 2 * H), "fc1.bias": torch.randn(8), "fc2.weight": torch.randn(1, 8), "fc2.bias": torch.randn(1)}
    said = {"base_model_layer_ids": "[1, 3]", "hidden_act": '"gelu"'}
    safetensors.torch.save_file(probe, tmp_path / "probe.safetensors", said)
    for file, tap, aggregation in (
        ("step.pt", Tap((-1,), at="token"), "mean"), ("probe.safetensors", Tap((1, 3), "rms", "every"), "max"),
    ):  # fmt: skip
        options = Options.of(reflective.vllm.settings(tmp_path, head=tmp_path / file)["additional_config"])
        head, read = rf.load_head(tmp_path / file), options.load_head(torch.float32)
        features = torch.randn(5, head.hidden_size)
        assert options.tap == read.tap == tap and options.aggregation == aggregation
        assert read.activation == head.activation and options.higher_is_better == head.higher_is_better
        assert torch.allclose(read(features), head(features), atol=1e-5)
    options = Options.of(reflective.vllm.settings(tmp_path, head=tmp_path / "step.pt")["additional_config"])
    assert (options.delimiter, options.consecutive, options.think_start_id) == ("\n\n", "all", None)


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
