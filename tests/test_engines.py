"""What ``engines/base.py`` asks of every engine, tried on each that there is here; another one needs a line in ``ENGINES``."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import tiny
import torch
from like_vllm import LikeVLLM
from scripted import ScriptedEngine, ids
from test_search import reflective_model

import reflective as rf
from reflective.benchmarks.tree import TreeEngine
from reflective.engines.base import Appended, Ended, Engine, Opened, Prompt, Sampling, Stepped
from reflective.engines.vllm.engine import VLLMEngine


@dataclass
class Kind:
    """Attributes: ``make``: an engine with so many places; ``truth``: step scores of tokens behind a prompt."""

    make: Callable[[int], Engine]
    prompts: list[list[int]]
    truth: Callable[[Sequence[int], Sequence[int]], list[float]]


def script(seed):
    return "".join(random.Random(str(seed)).choice("abcdef" + "123456789" * (i % 3 == 0)) for i in range(60))


def scripted(late):
    return Kind(
        lambda places: ScriptedEngine(script, late=late, places=places),
        [ids("?"), ids("two")],
        lambda prompt, tokens: [(t - ord("0")) / 10 for t in tokens if chr(t).isdigit()],
    )


def transformers(schedule, ahead=False, **how):
    model = reflective_model()

    def make(places):
        engine = model.engine(batch_rows=places, schedule=schedule, **how)
        if ahead:  # as on a GPU
            engine._places.ahead = True
        return engine

    def truth(prompt, tokens):
        scores = rf.score(model.model, model.head, model.steps, [[*prompt, *tokens]], prompt_lengths=[len(prompt)])
        return scores.step_scores[0].tolist()

    prompts = [model.encode(text)[0].tolist() for text in ("ABCDEFGH", "Z")]
    return Kind(make, prompts, truth)


def tree():
    """With which the benchmarks compare strategies."""
    model, kind = reflective_model(), transformers("deferred")

    def make(places):
        return TreeEngine(model, temperature=1.0, top_p=0.9, places=places)

    return dataclasses.replace(kind, make=make)


def vllm(at="predict", **how):
    """The engine for vLLM, on what is like it."""
    model = reflective_model()
    core, kind = LikeVLLM(model, at=at, **how).core(), transformers("deferred")

    def truth(prompt, tokens):
        scores = rf.score(model.model, model.head, model.steps, [[*prompt, *tokens]], None, at, [len(prompt)])
        return scores.step_scores[0].tolist()

    return Kind(lambda places: VLLMEngine(core, model.steps, at=at, ends=[2], batch_rows=places), kind.prompts, truth)


ENGINES = {
    "scripted": lambda: scripted(True),
    "scripted, steps told at once": lambda: scripted(False),
    "transformers, immediate": lambda: transformers("immediate"),
    "transformers, deferred": lambda: transformers("deferred"),
    "transformers, seats, immediate": lambda: transformers("immediate", decoding="seats"),
    "transformers, seats, deferred": lambda: transformers("deferred", decoding="seats"),
    "transformers, seats, a step ahead": lambda: transformers("immediate", ahead=True, decoding="seats"),
    "tree": lambda: tree(),
    "vllm": lambda: vllm(),
    "vllm, a token past every end, preempted": lambda: vllm(ahead=True, preempt=0.1),
    "vllm, several tokens a step, prompts in pieces": lambda: vllm(draft=3, piece=3),
}


@pytest.fixture(scope="module", params=ENGINES)
def kind(request):
    return ENGINES[request.param]()


def sampling(*seed, **settings):
    return Sampling(seed=seed, **{"temperature": 1.0, "top_p": 0.9, "max_tokens": 24, **settings})


class Log:
    """What was told of every sequence."""

    def __init__(self, engine):
        self.engine, self.tokens, self.steps, self.ended, self.opened = engine, {}, {}, {}, []

    def advance(self):
        """Take in one answer; whether there was one."""
        events = self.engine.advance()
        if events is None:
            return False
        told = {}
        for event in events:
            if isinstance(event, Opened):
                self.opened.append(event.prefix)
                continue
            assert event.sequence not in self.ended, "something behind the end"
            told.setdefault(event.sequence, []).append(event)
            if isinstance(event, Appended):
                self.tokens.setdefault(event.sequence, []).append(event.chance.token)
                assert event.chance.log_prob <= 0
            elif isinstance(event, Stepped):
                assert not event.ended or len(event.step_scores) > len(self.steps.get(event.sequence, ()))
                self.steps[event.sequence] = event.step_scores
            elif isinstance(event, Ended):
                self.ended[event.sequence] = event
        for events in told.values():
            assert sum(isinstance(e, Appended) for e in events) <= 1, "a token at a time"
        self.last = told
        return True

    def run(self, turns=10_000):
        while turns and self.advance():
            turns -= 1
        return self


def alone(kind, prompt, wanted):
    engine = kind.make(8)
    with engine:
        (prefix,) = engine.open([Prompt(prompt)])
        (s,) = engine.start(prefix, [wanted])
        log = Log(engine).run()
        engine.close([prefix])
    return log.tokens.get(s, []), log.ended[s]


def same(found, expected):
    assert list(found) == pytest.approx(list(expected), rel=1e-4)


@pytest.mark.parametrize("places", [2, 8])
def test_a_sequence_is_what_it_is_alone(kind, places):
    """Behind two prompts, with places for all and for few."""
    engine, wanted = kind.make(places), [sampling(7, c) for c in range(3)]
    with engine:
        prefixes = engine.open([Prompt(p) for p in kind.prompts])
        started = [engine.start(prefix, wanted) for prefix in prefixes]
        log = Log(engine).run()
        assert engine.room == places and engine.advance() is None
        engine.close(prefixes)
    assert sorted(log.opened) == sorted(prefixes)
    for prompt, sequences in zip(kind.prompts, started, strict=True):
        for s, w in zip(sequences, wanted, strict=True):
            tokens, end = alone(kind, prompt, w)
            assert log.tokens[s] == tokens and log.ended[s].reason == end.reason
            same(log.ended[s].score.step_scores, kind.truth(prompt, tokens))
            assert (end.chance is None) == (end.reason == "length")
            places_of_steps = log.ended[s].score.positions
            assert len(places_of_steps) == len(log.ended[s].score.step_scores) and all(
                0 <= p < len(tokens) for p in places_of_steps
            )


@pytest.mark.parametrize("steps", ["told", "awaited"])
def test_steps_are_told_before_what_follows_them(kind, steps):
    engine = kind.make(8)
    with engine:
        (prefix,) = engine.open([Prompt(kind.prompts[0], steps=steps)])
        sequences = engine.start(prefix, [sampling(1, c) for c in range(4)])
        log, seen = Log(engine), 0
        while log.advance():
            for s, events in log.last.items():
                kinds = [type(e) for e in events]
                if Stepped in kinds:
                    seen += events[kinds.index(Stepped)].ended
                    behind = Appended in kinds[kinds.index(Stepped) :]  # a token that these scores do not know of
                    same(log.steps[s], kind.truth(kind.prompts[0], log.tokens[s][: len(log.tokens[s]) - behind]))
                    if steps == "awaited" and events[kinds.index(Stepped)].ended:
                        assert isinstance(events[-1], Stepped), "it waits here"
        engine.close([prefix])
    assert seen > 4
    for s in sequences:
        assert log.tokens[s] == alone(kind, kind.prompts[0], sampling(1, sequences.index(s)))[0]


def test_forks_go_on_where_the_parent_is_and_draw_their_own(kind):
    engine, prompt = kind.make(8), kind.prompts[0]
    with engine:
        (prefix,) = engine.open([Prompt(prompt, steps="awaited")])
        started = engine.start(prefix, [sampling(2, 9 + c) for c in range(4)])
        log = Log(engine)
        while not (set(log.steps) - set(log.ended)):
            assert log.advance()
        s = min(set(log.steps) - set(log.ended))
        before = list(log.tokens[s])
        forks = engine.fork(s, [sampling(2, c) for c in (1, 2, 3)])
        for fork in forks:
            log.tokens[fork], log.steps[fork] = list(before), log.steps[s]
        log.run()
        engine.close([prefix])
    behind = {s: log.tokens[s][len(before) :] for s in (s, *forks)}
    assert len({tuple(tokens) for tokens in behind.values()}) > 2
    assert log.tokens[s] == alone(kind, prompt, sampling(2, 9 + started.index(s)))[0], "a parent does not notice"
    for sequence, end in log.ended.items():
        same(end.score.step_scores, kind.truth(prompt, log.tokens[sequence]))


def test_a_stopped_sequence_is_scored_as_it_was_told(kind):
    engine, prompt = kind.make(8), kind.prompts[1]
    with engine:
        (prefix,) = engine.open([Prompt(prompt)])
        kept, *stopped = engine.start(prefix, [sampling(3, c, max_tokens=30) for c in range(4)])
        log = Log(engine).run(turns=13)
        there = [s for s in stopped if s not in log.ended]
        assert there
        scores = engine.stop(there)
        told = {s: list(log.tokens[s]) for s in there}
        log.run()
        engine.close([prefix])
    for s, score in zip(there, scores, strict=True):
        assert log.tokens[s] == told[s] and s not in log.ended
        same(score.step_scores, kind.truth(prompt, told[s]))
        log_mean = torch.tensor(score.step_scores, dtype=torch.float64).log().mean().exp() if score.step_scores else 0.0
        assert score.score == pytest.approx(float(log_mean), rel=1e-4) and score.error is None
    assert log.tokens[kept] == alone(kind, prompt, sampling(3, 0, max_tokens=30))[0]


def test_who_rests_is_not_told_of_and_loses_nothing(kind):
    engine, prompt = kind.make(8), kind.prompts[0]
    with engine:
        (prefix,) = engine.open([Prompt(prompt, steps="told")])
        a, b = engine.start(prefix, [sampling(4, c) for c in range(2)])
        log = Log(engine).run(turns=6)
        engine.rest([a])
        told = list(log.tokens[a])
        log.run()
        assert log.tokens[a] == told and a not in log.ended and b in log.ended
        engine.resume([a])
        log.run()
        engine.close([prefix])
    tokens, end = alone(kind, prompt, sampling(4, 0))
    assert log.tokens[a] == tokens and log.ended[a].reason == end.reason
    same(log.ended[a].score.step_scores, end.score.step_scores)


@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"repetition_penalty": 3.0},
        {"min_tokens": 24, "logit_bias": ((2, 5.0),)},
    ],
    ids=str,
)
def test_settings_that_look_back_do_so_behind_a_rest_and_in_a_fork(kind, settings):
    engine, prompt, wanted = kind.make(8), kind.prompts[0], sampling(5, 0, top_p=1.0, **settings)
    if isinstance(engine, TreeEngine):
        pytest.skip("one sampling for all")
    with engine:
        (prefix,) = engine.open([Prompt(prompt)])
        a, b = engine.start(prefix, [wanted, sampling(5, 1)])
        log = Log(engine).run(turns=12)
        engine.rest([a])
        log.run()
        before = list(log.tokens[a])
        assert len(before) > 4 and a not in log.ended
        (fork,) = engine.fork(a, [sampling(5, 2, top_p=1.0, temperature=0.0, **settings)])
        (twin,) = engine.fork(a, [sampling(5, 3, top_p=1.0, temperature=0.0, **settings)])
        for f in (fork, twin):
            log.tokens[f] = list(before)
        log.run(turns=5)  # the twin rests once more, the fork does not
        if twin not in log.ended:
            engine.rest([twin])
            log.run()
            engine.resume([twin])
        engine.resume([a])
        log.run()
        engine.close([prefix])
    assert log.tokens[a] == alone(kind, prompt, wanted)[0]
    if len(log.tokens[b]) > 0 and not isinstance(engine, ScriptedEngine):  # which draws what its script says
        assert log.tokens[fork] == log.tokens[twin]
        assert log.tokens[a] != alone(kind, prompt, sampling(5, 0, top_p=1.0))[0]


def test_forced_tokens_come_whatever_was_drawn(kind):
    engine, prompt, forced = kind.make(8), kind.prompts[0], [ord("x")] * 3 if kind.prompts[0] == ids("?") else [7, 8, 9]
    with engine:
        (prefix,) = engine.open([Prompt(prompt)])
        first, later = engine.start(prefix, [sampling(5, c) for c in range(2)])
        engine.force(first, forced)
        log = Log(engine)
        while len(log.tokens.get(later, ())) < 4:
            assert log.advance()
        engine.force(later, forced)
        log.run()
        engine.close([prefix])
    assert log.tokens[first][:3] == forced and log.tokens[later][4:7] == forced
    assert log.tokens[later][:4] == alone(kind, prompt, sampling(5, 1))[0][:4]


def test_forced_behind_a_step_that_is_awaited(kind):
    """What was drawn there, and held back, is not what comes; nor for one that rests meanwhile, or is forked afterwards."""
    engine, prompt, forced = kind.make(8), kind.prompts[0], [ord("x")] * 3 if kind.prompts[0] == ids("?") else [50, 51, 52]
    with engine:
        (prefix,) = engine.open([Prompt(prompt, steps="awaited")])
        engine.start(prefix, [sampling(5, c, max_tokens=30) for c in range(7)])
        log, told, forks = Log(engine), {}, {}
        while log.advance():
            for s in [s for s in log.steps if s not in told and s not in log.ended and s not in forks]:
                told[s] = len(log.tokens[s])
                if len(told) == 2:
                    engine.rest([s])
                engine.force(s, forced)
                if len(told) == 3:
                    (fork,) = engine.fork(s, [sampling(5, 9, max_tokens=30)])
                    forks[fork], log.tokens[fork] = told[s], list(log.tokens[s])
                if len(told) == 2:
                    engine.resume([s])
        engine.close([prefix])
    assert len(told) >= 3 and len(forks) == 1
    for s, at in (told | forks).items():
        behind = log.tokens[s][at:][: len(forced)]
        assert behind == forced[: len(behind)] and (len(behind) == 3 or s in log.ended), s
        positions = kind.truth(prompt, log.tokens[s])
        assert log.ended[s].score.step_scores == pytest.approx(positions, rel=1e-3)


def test_a_sequence_may_start_when_others_have_ended(kind):
    engine, prompt = kind.make(4), kind.prompts[0]
    with engine:
        (prefix,) = engine.open([Prompt(prompt, steps="awaited")])
        engine.start(prefix, [sampling(6, c) for c in range(2)])
        log = Log(engine).run()
        (late,) = engine.start(prefix, [sampling(6, 7)])
        log.run()
        engine.close([prefix])
    assert len(log.ended) == 3 and log.tokens[late] == alone(kind, prompt, sampling(6, 7))[0]


def test_closed_prefixes_are_forgotten_run_or_not(kind):
    engine = kind.make(4)
    with engine:
        early = engine.open([Prompt(kind.prompts[0])])
        engine.start(early[0], [sampling(6, 0)])
        engine.close(early)
        assert engine.room == 4 and engine.advance() is None
        (prefix,) = engine.open([Prompt(kind.prompts[0])])
        engine.start(prefix, [sampling(6, c) for c in range(2)])
        Log(engine).run(turns=3)
        engine.close([prefix])
        assert engine.room == 4 and engine.advance() is None
        (again,) = engine.open([Prompt(kind.prompts[1])])
        (s,) = engine.start(again, [sampling(6, 5)])
        log = Log(engine).run()
        engine.close([again])
    tokens, end = alone(kind, kind.prompts[1], sampling(6, 5))
    assert log.tokens[s] == tokens and again not in (prefix, *early)
    same(log.ended[s].score.step_scores, end.score.step_scores)


def test_sequences_started_behind_a_prefix_that_was_run(kind):
    engine, prompt = kind.make(4), kind.prompts[0]
    with engine:
        (prefix,) = engine.open([Prompt(prompt)])
        (first,) = engine.start(prefix, [sampling(8, 0)])
        log = Log(engine).run(turns=5)
        (late,) = engine.start(prefix, [sampling(8, 1)])
        log.run()
        engine.close([prefix])
    for c, s in enumerate((first, late)):
        assert log.tokens[s] == alone(kind, prompt, sampling(8, c))[0]


def test_a_transformers_model_is_left_as_it_was_found():
    model = reflective_model()
    engine = model.engine()
    with pytest.raises(KeyError, match="sequence 12 has ended"), engine:
        engine.stop([12])
    with pytest.raises(KeyError, match="prefix 3 was closed"), engine:
        engine.start(3, [sampling(0)])
    assert type(model.model) is type(tiny.model()) and torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="within `with engine:`"):
        engine.advance()


@pytest.mark.parametrize("decoding", ["batch", "seats"])
def test_prompts_are_fed_as_columns_before_the_scope(decoding, monkeypatch):
    """Also those in pieces, here of two tokens, and beside those that decode: none of the latter's columns is one."""
    from reflective.engines.hf import engine as hf

    monkeypatch.setattr(hf, "LOGITS", 2 * tiny.VOCAB)
    engine = reflective_model().engine(batch_rows=4, decoding=decoding)
    placed, calls = engine.scorer.stream.placed, []
    backend = placed.backend

    def decode_step(*args):
        calls.append((args[0].shape[1], args[22]))
        backend.decode_step(*args)

    placed.backend = dataclasses.replace(backend, decode_step=decode_step)
    with engine:
        prefixes = engine.open([Prompt([5, 6, 7, 8, 9]), Prompt([7, 5, 6], logprobs=0)])
        for prefix in prefixes:
            engine.start(prefix, [sampling(7, 1)])
        Log(engine).run()
        engine.close(prefixes)
    prompts = [call for call in calls if call[0] > 1]
    assert sorted(prompts) == [(2, 2), (5, 5)] and calls.count((1, 1)) == 1, "3 tokens are pieces of 2 and 1"
    assert calls.count((1, 0)) > 5
