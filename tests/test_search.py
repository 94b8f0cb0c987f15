"""The decode loop: every candidate as if decoded alone, whatever company it keeps and what becomes of the others."""

import re
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Lfm2Config,
    LogitsProcessorList,
    MambaConfig,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import reflective as rf
from reflective.engines.hf.kv import Rows, new_cache
from reflective.engines.hf.pace import Pace
from reflective.model import Config
from reflective.search.candidates import Ask
from reflective.search.loop import Search
from reflective.search.strategies import HOLD, KEEP, STOP, Strategy

LETTERS = "".join(chr(ord("A") + i) for i in range(tiny.VOCAB - 5))  # the text of ids 5 to 60
STEPS = [LETTERS[i - 5] for i in tiny.STEP_IDS]
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "max_new_tokens": 40}
QUESTIONS = ["ABCDEFGH", "Z", "KLMNABCZZZ"]


def letter_tokenizer():
    special = ["<pad>", "<s>", "</s>", "<think>", "</think>"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *LETTERS])}, unk_token="Z"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"</?think>|."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def reflective_model(kind="llama", net=None, **config):
    net = net or tiny.model(kind)
    net.generation_config.eos_token_id = 2
    settings = {"rule": "contains", "delimiter": STEPS, "prompt": "{question}", **config}
    return rf.ReflectiveModel(net, letter_tokenizer(), tiny.head(), Config(**settings))


@pytest.fixture(scope="module")
def model():
    return reflective_model()


def continued(model, prompt, ids, generator, limit, temperature=1.0, top_p=0.9):
    """``ids`` as they go on alone: one whole forward a token. Returns ids and the sum of their log-probabilities."""
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    ids, total = list(ids), 0.0
    while len(ids) < limit:
        with torch.no_grad():
            logits = model.model(torch.tensor([prompt + ids])).logits[:, -1]
        cdf = warp(None, logits)[0].double().softmax(0).cumsum(0).numpy()
        token = int(np.searchsorted(cdf / cdf[-1], generator.random(), side="right"))
        total += float(logits[0].double().log_softmax(0)[token])
        if token == 2:
            break
        ids.append(token)
    return ids, total


def check_scores(model, generation):
    prompt = model.encode(generation.prompt)[0].tolist()
    for c in generation.candidates:
        expected = tiny.second_pass(model.model, model.head, prompt + c.token_ids, "predict", len(prompt))
        assert len(c.step_scores) == len(expected) == len(c.step_spans)
        assert c.step_scores == pytest.approx(expected.exp().tolist(), rel=1e-4)
        assert c.score == pytest.approx(tiny.geometric_mean(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral_sliding", "gemma2", "gemma3", "qwen2_vl", "mixtral"])
def test_company_does_not_matter(kind):
    """Three questions of different lengths, places for five of their twelve candidates, joined as others leave."""
    model = reflective_model(kind)
    rows = []
    handle = model.model.register_forward_pre_hook(
        lambda m, a, k: rows.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    found = model.generate(QUESTIONS, n=4, batch_rows=5, **SAMPLING)
    handle.remove()
    assert len({len(c.token_ids) for g in found for c in g.candidates}) > 3, "they leave at different times"
    assert max(q for q, _ in rows) == 5
    fed = sum(c.tokens - 1 for g in found for c in g.candidates)
    assert sum(r for r, width in rows if width == 1) == fed, "no row without anything to do"
    for q, generation in enumerate(found):
        prompt = model.encode(generation.prompt)[0].tolist()
        check_scores(model, generation)
        for c in generation.candidates[:: 1 if kind == "llama" else 3]:
            ids, log_prob = continued(model, prompt, [], np.random.default_rng([3, q, c.number]), 40)
            assert c.token_ids == ids and c.log_prob == pytest.approx(log_prob, rel=1e-4)
            assert c.status == ("length" if len(ids) == 40 else "stop")
            assert c.tokens == len(ids) + (c.status == "stop")
        assert generation.tokens == sum(c.tokens for c in generation.candidates)
        seconds, alive = zip(*generation.alive, strict=True)
        assert (
            alive[-1] == 0
            and max(alive) <= 4
            and list(seconds) == sorted(seconds)
            and seconds[-1] == generation.seconds
        )


def test_seeds(model):
    wide, narrow = (model.generate(QUESTIONS, n=4, batch_rows=b, **SAMPLING) for b in (64, 3))
    for a, b in zip(wide, narrow, strict=True):
        assert [c.token_ids for c in a.candidates] == [c.token_ids for c in b.candidates]
    one = model.generate(QUESTIONS[0], n=6, **SAMPLING)
    assert [c.token_ids for c in one.candidates[:4]] == [c.token_ids for c in wide[0].candidates]
    drawn = model.generate("A", n=2, max_new_tokens=20, temperature=1.0)
    again = model.generate("A", n=2, max_new_tokens=20, temperature=1.0, seed=drawn.seed)
    assert drawn.candidates == again.candidates
    assert model.generate([], n=2) == []


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_greedy_is_what_generate_decodes(kind):
    model = reflective_model(kind)
    for question in QUESTIONS:
        ids = model.encode(question)
        out = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=0
        )
        (c,) = model.generate(question, n=1, temperature=0, max_new_tokens=30).candidates
        assert c.token_ids == [t for t in out[0, ids.shape[1] :].tolist() if t != 2]


@dataclass
class Scripted(Strategy):
    """Acts by the turn of its question, and keeps what it was shown."""

    n: int = 4
    turns: list = field(default_factory=list)  # per turn: actions of the candidates shown, by number
    log: list = field(default_factory=list, repr=False)

    def observe(self, step):
        self.log.append([(c.number, len(c.token_ids), list(c.step_scores), c.finished) for c in step.candidates])
        actions = self.turns[len(self.log) - 1] if len(self.log) <= len(self.turns) else {}
        Scripted.last = self
        return [actions.get(c.number, KEEP) for c in step.candidates]


@pytest.mark.parametrize("kind", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("batch_rows", [64, 3])
def test_forks_stops_and_holds(kind, by_step, batch_rows):
    """Cache, score state and text of each follow: all end as if decoded alone from where they forked."""
    model = reflective_model(kind)
    turns = [{0: 3, 1: HOLD}, {2: STOP, 4: 2, 1: HOLD}, {3: HOLD}, {0: STOP, 6: 2, 3: HOLD}]
    strategy = Scripted(turns=turns, by_step=by_step)
    generation = model.generate(QUESTIONS[0], strategy=strategy, batch_rows=batch_rows, **SAMPLING)
    plain = model.generate(QUESTIONS[0], n=4, **SAMPLING)
    assert strategy.log == [], "each question has a copy"
    check_scores(model, generation)
    prompt = model.encode(generation.prompt)[0].tolist()
    shown = [{number: length for number, length, *_ in turn} for turn in Scripted.last.log]
    assert len(generation.candidates) >= 7 and shown[1].keys() >= {1, 4, 5}
    for c in generation.candidates:
        if c.parent is None:
            alone = plain.candidates[c.number].token_ids
            assert c.token_ids == (alone[: len(c.token_ids)] if c.status == "stopped" else alone)
            continue
        turn = next(i for i, turn in enumerate(shown) if c.number in turn) - 1
        begin = generation.candidates[c.parent].token_ids[: shown[turn][c.parent]]
        ids, _ = continued(model, prompt, begin, np.random.default_rng([3, 0, c.number]), 40)
        stopped = c.status == "stopped"
        assert c.token_ids == (ids[: len(c.token_ids)] if stopped else ids)
        assert c.tokens == len(c.token_ids) - len(begin) + (c.status == "stop")
        with torch.no_grad():
            whole = prompt + c.token_ids + [2] * (c.status == "stop")
            log_probs = model.model(torch.tensor([whole])).logits[0].double().log_softmax(1)
        expected = sum(float(log_probs[t - 1, whole[t]]) for t in range(len(prompt), len(whole)))
        assert c.log_prob == pytest.approx(expected, rel=1e-4)
    assert {c.status for c in generation.candidates} >= {"stopped"}
    assert generation.best.status != "stopped"


def test_what_a_strategy_sees(model):
    """By step: it is asked when every candidate has ended a step or finished; the step's token is the newest."""
    model.generate(QUESTIONS[0], strategy=Scripted(n=12, by_step=True), **SAMPLING)
    whole = model.generate(QUESTIONS[0], n=12, **SAMPLING).candidates
    # A tag that comes later takes steps before it out of the count.
    tagged = {c.number for c in whole if {tiny.THINK, tiny.END_THINK} & set(c.token_ids)}
    before, seen = {}, 0
    for turn in Scripted.last.log:
        for number, length, scores, finished in turn:
            steps = before.get(number, 0)
            if number not in tagged and not finished:
                seen += 1
                assert scores == pytest.approx(whole[number].step_scores[: steps + 1], rel=1e-4)
                assert whole[number].token_ids[length - 1] in tiny.STEP_IDS
            before[number] = len(scores)
    assert seen > 5 and all(finished for _, _, _, finished in Scripted.last.log[-1])


def test_finished_candidates_can_be_discarded_and_doubled(model):
    @dataclass
    class Doubling(Strategy):
        def observe(self, step):
            actions = {0: STOP, 1: 2 if len(step.candidates) < 5 else KEEP}
            return [actions.get(c.number, KEEP) if c.finished else KEEP for c in step.candidates]

    generation = model.generate(QUESTIONS[0], strategy=Doubling(n=4), **SAMPLING)
    assert generation.candidates[0].status == "stopped"
    twins = [c for c in generation.candidates if c.parent == 1]
    assert twins
    for twin in twins:
        original = generation.candidates[1]
        assert (twin.token_ids, twin.step_scores, twin.score, twin.log_prob, twin.status, twin.tokens) == (
            original.token_ids, original.step_scores, original.score, original.log_prob, original.status, 0
        )  # fmt: skip


@dataclass
class Faulty(Strategy):
    fault: object = None
    method: str = "observe"

    def observe(self, step):
        if self.method == "choose":
            return None
        return self.fault(step) if callable(self.fault) else self.fault

    def choose(self, candidates):
        return self.fault(candidates) if self.method == "choose" else super().choose(candidates)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Faulty(fault=lambda step: 1 / 0), "Faulty: observe failed: ZeroDivisionError"),
        (Faulty(fault=lambda found: {}["x"], method="choose"), "Faulty: choose failed: KeyError"),
        (Faulty(fault=[KEEP]), r"Faulty: observe gave \[1\] for 8 candidates"),
        (Faulty(fault=lambda step: [-3] * 8), "Faulty: observe gave"),
        (Faulty(fault=lambda step: [HOLD] * len(step.candidates)), "Faulty: it holds every candidate"),
    ],
)
def test_a_strategy_that_fails_is_named(model, strategy, message):
    with pytest.raises(RuntimeError, match=message):
        model.generate("A", strategy=strategy, **SAMPLING)
    assert model.generate("A", n=2, **SAMPLING).candidates[0].step_scores, "the model is as it was"


@pytest.mark.parametrize("where", ["forward", "last layer", "observe", "on_step"])
def test_interrupt(model, where):
    calls, limit = [], 12

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == limit:
            raise KeyboardInterrupt

    handle = None
    if where in ("forward", "last layer"):
        module = model.model if where == "forward" else model.model.model.layers[-1]
        handle = module.register_forward_hook(interrupt)
    strategy = Faulty(fault=interrupt) if where == "observe" else None
    found = model.generate(
        QUESTIONS, n=4, batch_rows=8, strategy=strategy, on_step=interrupt if where == "on_step" else None, **SAMPLING
    )
    if handle:
        handle.remove()
    assert found[-1].interrupted and {c.status for c in found[-1].candidates} == {"interrupted"}
    assert len(found) == 3 and sum(len(c.step_scores) for g in found for c in g.candidates) > 3
    whole = model.generate(QUESTIONS, n=4, **SAMPLING)
    for part, all_of_it in zip(found, whole, strict=True):
        check_scores(model, part)
        for a, b in zip(part.candidates, all_of_it.candidates, strict=True):
            assert a.token_ids == b.token_ids[: len(a.token_ids)]
    assert not model.model._forward_pre_hooks and type(model.model) is type(tiny.model())


def test_nothing_decoded_before_an_interrupt(model, monkeypatch):
    monkeypatch.setattr(rf.StreamScorer, "__enter__", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    generation = model.generate("A", n=3)
    assert generation.interrupted and [(c.text, c.score) for c in generation.candidates] == [("", 0.0)] * 3


def test_stop_pattern():
    """Looked for in the newest 24 tokens, as they are decoded."""
    model = reflective_model(stop="[A-Za-m]{4}")
    plain = reflective_model().generate(QUESTIONS[0], n=8, **SAMPLING)
    found = model.generate(QUESTIONS[0], n=8, **SAMPLING)
    hits = 0
    for c, whole in zip(found.candidates, plain.candidates, strict=True):
        hit = model_end("[A-Za-m]{4}", whole.text)
        assert c.text == whole.text[:hit]
        hits += hit < len(whole.text)
        assert c.status == "stop" or hit == len(whole.text)
    assert hits > 2
    check_scores(model, found)


def model_end(pattern, text):
    match = re.search(pattern, text)
    return match.end() if match else len(text)


def test_a_complete_answer_ends_a_response_outside_of_its_thinking():
    config = {"answer": "([M-R]+)"}
    plain = reflective_model().generate(QUESTIONS[0], n=8, **SAMPLING).candidates
    found = reflective_model(**config).generate(QUESTIONS[0], n=8, **SAMPLING).candidates
    ended = 0
    for c, whole in zip(found, plain, strict=True):
        if "<think>" not in whole.text and "</think>" not in whole.text:
            hit = model_end("[M-R]+(?=.)", whole.text) + 1
            assert c.text == whole.text[:hit]
            ended += hit < len(whole.text)
    assert ended > 2
    thinking = reflective_model(**config, prompt="{question}<think>").generate(QUESTIONS[0], n=8, **SAMPLING).candidates
    closed = [c for c in thinking if "</think>" in c.text]
    assert any(len(c.token_ids) == 40 for c in thinking)
    for c in thinking:
        _, tag, rest = c.text.rpartition("</think>")
        assert c.answer == model_answer(rest)
        assert tag or c.status == "length" or c.tokens == len(c.token_ids) + 1, "no answer ends it while it thinks"
    assert closed


def model_answer(text):
    match = re.search("([M-R]+)", text)
    return match and match.group(1)


@pytest.mark.parametrize("think_end", [None, "X</think>Y"])
def test_thinking_budget(think_end):
    model = reflective_model(prompt="{question}<think>", think_end=think_end)
    free = model.generate(QUESTIONS, n=4, **SAMPLING)
    cut = model.generate(QUESTIONS, n=4, thinking_budget=10, batch_rows=7, **SAMPLING)
    forced = model.tokenizer(think_end or "</think>").input_ids
    kinds = set()
    for a, b in zip(free, cut, strict=True):
        check_scores(model, b)
        for without, c in zip(a.candidates, b.candidates, strict=True):
            thinks = len(without.token_ids) >= 10 and tiny.END_THINK not in without.token_ids[:10]
            kinds.add(thinks)
            assert c.token_ids[:10] == without.token_ids[:10]
            if thinks:
                assert c.token_ids[10 : 10 + len(forced)] == forced and len(c.token_ids) <= 40
            else:
                assert c.token_ids == without.token_ids
    assert True in kinds
    answers = model.generate("A", n=2, thinking_budget=0, **SAMPLING).candidates
    assert all(c.token_ids[: len(forced)] == forced for c in answers)


def test_no_thinking_to_end():
    model = reflective_model(prompt="{question}<think></think>")
    a, b = (model.generate("A", n=4, thinking_budget=budget, **SAMPLING).candidates for budget in (None, 5))
    assert [c.token_ids for c in a] == [c.token_ids for c in b]
    tagless = reflective_model()
    tagless.steps.think_end_id = None
    with pytest.raises(ValueError, match="thinking_budget: the tokenizer has no </think>"):
        tagless.generate("A", thinking_budget=5)


def test_scoring_ends_with_the_thinking_and_decoding_does_not():
    model = reflective_model(prompt="{question}<think>")
    found = model.generate(QUESTIONS[0], n=8, thinking_budget=12, **SAMPLING)
    after = [c for c in found.candidates if set(c.token_ids[14:]) & set(tiny.STEP_IDS)]
    assert after and all(len(c.token_ids) > 13 for c in after)
    check_scores(model, found)


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (MambaConfig(vocab_size=61, hidden_size=64, num_hidden_layers=2), "MambaForCausalLM"),
        (
            Lfm2Config(**tiny._SIZES, layer_types=["conv", "full_attention"] * 2),
            "Lfm2ForCausalLM has a LinearAttention",
        ),
    ],
)
def test_other_caches_are_refused_by_name(config, layer):
    net = AutoModelForCausalLM.from_config(config)
    model = rf.ReflectiveModel(
        net, letter_tokenizer(), tiny.head(), Config(rule="contains", delimiter=STEPS, prompt="{question}")
    )
    with pytest.raises(ValueError, match=layer):
        model.generate("A")


def test_logits_are_not_kept():
    """Neither the prompt's, which weigh most, nor those of any token before the last."""
    model, alive = reflective_model(), []
    handle = model.model.register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out.logits)))

    def look(questions):
        assert sum(ref() is not None for ref in alive) <= 1

    model.generate(QUESTIONS, n=4, batch_rows=5, on_step=look, **SAMPLING)
    handle.remove()
    assert len(alive) > 20


def test_rows_of_a_cache():
    """Taken without padding, joined with as much as the longest needs."""
    cache, values = new_cache(), torch.arange(2 * 3 * 4 * 2.0).view(2, 3, 4, 2)
    cache.update(values, -values, 0)
    rows = Rows(cache, [2, 4])
    short, long = rows.take(0), rows.take(1)
    assert short.layers[0][0].shape == (3, 2, 2) and torch.equal(long.layers[0][1], -values[1])
    rows.arrange([0])
    assert rows.lengths == [2] and cache.layers[0].keys.shape == (1, 3, 2, 2)
    assert rows.mask(torch.device("cpu")) is None
    rows.arrange([0], [long, short])
    assert torch.equal(cache.layers[0].keys[1], values[1]) and torch.equal(
        cache.layers[0].keys[2, :, 2:], values[0, :, 2:]
    )
    assert not cache.layers[0].keys[[0, 2], :, :2].any()
    assert rows.mask(torch.device("cpu")).tolist() == [[0, 0, 1, 1, 1], [1] * 5, [0, 0, 1, 1, 1]]
    rows.arrange([])
    rows.arrange([], [short])
    assert rows.lengths == [2] and torch.equal(cache.layers[0].values[0], -values[0, :, 2:])


def test_keys_are_appended_where_there_is_room():
    """The same as transformers' layer holds, also after rows have been moved, without a copy at every token."""
    ours, theirs, moved = new_cache(), DynamicCache(), 0
    rows = Rows(ours, [3, 3])
    for step in range(200):
        if step == 90:
            rows.lengths = [ours.get_seq_length()] * 2
            rows.arrange([1])
            theirs.batch_select_indices(torch.tensor([1]))
        new = torch.randn(2 if step < 90 else 1, 3, 3 if step == 0 else 1, 4)
        before = ours.layers[0].keys.data_ptr() if step else 0
        for a, b in zip(ours.update(new, -new, 0), theirs.update(new, -new, 0), strict=True):
            assert torch.equal(a, b)
        moved += ours.layers[0].keys.data_ptr() != before
    assert moved <= 6, "the first, one when rows moved, and where room ran out"


def test_settings_that_cannot_be(model):
    for settings, message in (
        ({"strategy": "best"}, "strategy='best'; expected one of best_of_n, "),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"thinking_budget": -1}, "thinking_budget=-1 must not be negative"),
        ({"seed": -1}, "seed=-1"),
        ({"question": ["A", " "]}, r"question\[1\]: it is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**{"question": "A", **settings})


def test_n_of_a_strategy(model):
    for settings, n in (
        ({"strategy": Scripted(n=3)}, 3),
        ({"strategy": Scripted(n=3), "n": 2}, 2),
        ({"strategy": Scripted(n=3), "effort": "low"}, 2),
        ({"strategy": "majority"}, 8),
        ({}, 8),
    ):
        assert len(model.generate("A", max_new_tokens=2, **settings).candidates) == n


def test_plot(model, tmp_path):
    pytest.importorskip("matplotlib")
    result = model.generate("A", strategy=Scripted(turns=[{0: 2, 1: STOP}]), **SAMPLING)
    figure = result.plot(tmp_path / "run.png")
    scores, alive = figure.axes
    assert sum(len(line.get_xdata()) for line in scores.lines) == sum(len(c.step_scores) for c in result.candidates)
    assert alive.lines[0].get_ydata().tolist() == [count for _, count in result.alive]
    assert result.plot().axes
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen2_vl"])
def test_a_prompt_prefilled_in_pieces_is_that_prefilled_whole(kind):
    """Beside short ones that decode meanwhile; and no forward is longer than a piece."""
    model, widths = reflective_model(kind), []
    whole = reflective_model(kind)
    prompts = ["ABCDEFGH" * 20, "Z", "KLM" * 30]
    asks = [
        Ask(model.encode(p)[0].tolist(), model.strategy(n=2), max_new_tokens=6, temperature=1.0, top_p=0.9, seed=3)
        for p in prompts
    ]
    handle = model.model.register_forward_pre_hook(
        lambda m, a, k: widths.append(k["input_ids"].numel()), with_kwargs=True
    )
    engine = model.engine(batch_rows=8, pace=Pace(Pace.LEAST, torch.device("cpu")), schedule="immediate")
    found = [model.generation("", q) for q in Search(engine, model.reader).run(asks)]
    handle.remove()
    assert max(widths) <= Pace.LEAST and len(widths) > 4
    for prompt, generation in zip(prompts, found, strict=True):
        for c in generation.candidates:
            ids = whole.encode(prompt)[0].tolist()
            generator = np.random.default_rng([3, 0, c.number])
            expected, total = continued(whole, ids, [], generator, 6)
            assert c.token_ids == expected and c.log_prob == pytest.approx(total, rel=1e-3)
            scores = tiny.second_pass(whole.model, whole.head, ids + c.token_ids, "predict", len(ids))
            assert c.step_scores == pytest.approx(scores.exp().tolist(), rel=1e-4)


def test_pace(monkeypatch):
    """A machine of 10,000 tokens a second, by a clock that stands still between them."""
    now = [0.0]
    monkeypatch.setattr("reflective.engines.hf.pace.time", SimpleNamespace(perf_counter=lambda: now[0]))
    pace = Pace(1000, torch.device("cpu"), seconds=0.05)
    assert pace.tokens() == 64
    for _ in range(6):
        n = pace.tokens()
        with pace.timed(n):
            now[0] += n / 10_000
    assert pace.tokens() == pytest.approx(500, abs=1)
    pace.seconds = 1e-6
    assert pace.tokens() == 64
    pace.seconds = 1e6
    with pace.timed(5):
        pass
    assert pace.tokens() <= 1000
