"""What is relied on of a model and of transformers, and what is said where it does not hold: never that the ids are wrong."""

import functools
import threading
import warnings

import pytest
import tiny
import torch
import transformers
from test_scorer import assert_agrees, decode, prompts
from torch import nn
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

import reflective as rf
from reflective.engines.hf import internals
from reflective.engines.hf.internals import cache_argument, compiled_everywhere, small_model
from reflective.engines.hf.trial import try_release

TODAY = cache_argument(small_model())  # what this release calls a cache
NO_END = {"suppress_tokens": [2, tiny.THINK, tiny.END_THINK]}  # long enough to have steps


def scorer_of(net, **kwargs):
    return rf.StreamScorer(net, tiny.head(), tiny.steps(), **kwargs)


@pytest.fixture
def newer(monkeypatch):
    """A transformers that the package was not tested with."""
    monkeypatch.setattr(internals, "VERSION", "5.99.0")
    try_release.cache_clear()
    yield
    try_release.cache_clear()


NEWER = "transformers 5.99.0 is newer than this release of reflective-kernels knows: it was tested with 5"


# -- a release of next year ----------------------------------------------------------------------------------------------


class Layer(LlamaDecoderLayer):
    """Takes states and cache by other names, behind something else."""

    def forward(self, position_embeddings, *, states, memory):
        return super().forward(states, position_embeddings=position_embeddings, **{TODAY: memory})


class Decoder(LlamaModel):
    """Of prompts without padding."""

    skips = 0  # layers

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])

    def forward(self, input_ids, memory):
        states, past = self.embed_tokens(input_ids), memory.get_seq_length()
        turned = self.rotary_emb(states, position_ids=torch.arange(past, past + input_ids.shape[1])[None])
        for layer in self.layers[: len(self.layers) - self.skips]:
            states = self.call(layer, turned, states, memory)
        return BaseModelOutputWithPast(self.norm(states))

    def call(self, layer, turned, states, memory):
        return layer(turned, states=states, memory=memory)


class Renamed(LlamaForCausalLM):
    """Calls its cache ``memory``, everywhere."""

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)

    def forward(self, input_ids=None, memory: Cache | None = None, attention_mask=None, **kwargs):
        memory = DynamicCache(config=self.config) if memory is None else memory
        return CausalLMOutputWithPast(
            logits=self.lm_head(self.model(input_ids, memory).last_hidden_state), **{TODAY: memory}
        )

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs | {"memory": inputs.pop(TODAY)}


def renamed(kind=Renamed):
    """``tiny.model()`` of another class, and itself."""
    plain = tiny.model()
    net = kind(plain.config).eval()
    net.load_state_dict(plain.state_dict())
    return net, plain


def test_what_is_called_otherwise_is_heard_all_the_same():
    net, plain = renamed()
    ids, mask = prompts((6, 6))
    scorer = scorer_of(net)
    out = decode(scorer, net, ids, mask, **NO_END)
    assert_agrees(scorer.result(out), plain, tiny.head(), out, mask, "predict")
    beams = decode(scorer, net, ids, mask, num_beams=3, **NO_END)
    assert scorer.result(beams).n_steps.sum() > 5


class Opaque:
    """A cache as nobody knows it."""

    def __init__(self, cache):
        self.inner = cache


class Hiding(Renamed):
    def forward(self, input_ids=None, memory=None, attention_mask=None, **kwargs):
        return super().forward(input_ids, memory and memory.inner)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs | {"memory": Opaque(inputs["memory"])}


def hide_cache(net, monkeypatch):
    def call(layer, turned, states, memory):
        return layer(turned, states=states, memory=Opaque(memory))

    monkeypatch.setattr(net.model, "call", call)
    monkeypatch.setattr(
        Layer, "forward", lambda self, turned, states, memory: _forward(self, turned, states, memory.inner)
    )


def _forward(layer, turned, states, memory):
    return LlamaDecoderLayer.forward(layer, states, position_embeddings=turned, **{TODAY: memory})


def hide_states(net, monkeypatch):
    monkeypatch.setattr(
        net.model, "call", lambda layer, turned, states, memory: layer(turned, states=[states], memory=memory)
    )
    monkeypatch.setattr(
        Layer, "forward", lambda self, turned, states, memory: _forward(self, turned, states[0], memory)
    )


def skip_layer(net, monkeypatch):
    net.model.skips = 1


def miscount(net, monkeypatch):
    count = DynamicCache.get_seq_length
    monkeypatch.setattr(DynamicCache, "get_seq_length", lambda *args: count(*args) + (count(*args) > 0))


def decode_elsewhere(net, monkeypatch):
    def generate(self, ids, **kwargs):
        return torch.cat([ids, self.lm_head(self.model(ids, DynamicCache()).last_hidden_state)[:, -1:].argmax(-1)], 1)

    monkeypatch.setattr(Renamed, "generate", generate)


BREAKS = [
    (Hiding, hide_cache, "handed no key-value cache to its forwards"),
    (Renamed, hide_states, "is given no hidden states of 64 values"),
    (Renamed, skip_layer, "did not call its last layer"),
    (Renamed, miscount, "of 6 tokens on 0 the DynamicCache of Renamed says that it holds 7, not 6"),
    (Renamed, decode_elsewhere, "called neither the model nor its forward"),
]


@pytest.mark.parametrize(("kind", "damage", "message"), BREAKS)
@pytest.mark.parametrize("release", ["known", "newer"])
def test_what_cannot_be_followed_is_refused_and_whose_fault_it_is_said(kind, damage, message, release, monkeypatch):
    net, _ = renamed(kind)
    scorer, (ids, mask) = scorer_of(net), prompts((6, 6))
    damage(net, monkeypatch)
    who = "look at the code of (Renamed|Hiding) itself"
    if release == "newer":
        # What it finds is tested below.
        monkeypatch.setattr("reflective.engines.hf.scorer.try_release", lambda way: None)
        monkeypatch.setattr(internals, "VERSION", "5.99.0")
        who = NEWER
    with pytest.raises(RuntimeError, match=f"(?s){message}.*{who}") as error:
        decode(scorer, net, ids, mask)
    assert "report it" in str(error.value) and "sequences" not in str(error.value)


def test_an_untested_release_is_tried_and_warned_of_once(newer):
    net, (ids, mask) = tiny.model(), prompts((6, 9))
    scorer = scorer_of(net)
    with pytest.warns(UserWarning, match=r"transformers 5.99.0 is newer than .* was tested with \(5\.") as said, scorer:
        pass
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in ({}, {"num_beams": 2, "do_sample": False}, {"prompt_lookup_num_tokens": 3, "do_sample": False}):
            scorer = scorer_of(net)
            out = decode(scorer, net, ids[:1], mask[:1], **settings, **NO_END)
            assert scorer.result(out).n_steps.shape == (1,)


def other_order(monkeypatch):
    """Beams are reordered by something new."""

    def sort(self, indices):
        for layer in self.layers:
            layer.reorder_cache(indices)

    monkeypatch.setattr(DynamicCache, "sort", sort, raising=False)
    find = transformers.GenerationMixin._beam_search

    def search(self, *args, **kwargs):
        cache = next(value for value in kwargs.values() if isinstance(value, Cache))
        cache.reorder_cache = functools.partial(cache.sort)
        return find(self, *args, **kwargs)

    monkeypatch.setattr(transformers.GenerationMixin, "_beam_search", search)


def test_an_untested_release_that_is_shown_to_be_wrong_is_refused(newer, monkeypatch):
    net, (ids, mask) = tiny.model(), prompts((6, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals, "small_model", lambda: renamed(Hiding)[0])
        hide_cache(internals.small_model(), patch)
        with pytest.raises(RuntimeError, match=f"tried on a small model, decoding failed.*{NEWER}"), scorer_of(net):
            pass
    assert type(net) is LlamaForCausalLM
    with pytest.warns(UserWarning, match="5.99.0"), scorer_of(net):
        pass
    other_order(monkeypatch)
    with pytest.raises(
        RuntimeError, match=f"(?s)small model, beams: nothing, or the wrong thing, was heard of select.*{NEWER}"
    ):
        decode(scorer_of(net), net, ids, mask, num_beams=2)


# -- forwards within generate that are not its own ------------------------------------------------------------------------


class Asking(LogitsProcessor):
    """Runs the model itself at every token: without a cache, on a cache of its own, or by ``generate``."""

    def __init__(self, net, how):
        self.net, self.how, self.asked = net, how, 0

    def __call__(self, input_ids, scores):
        self.asked += 1
        if self.how == "generate":
            self.net.generate(input_ids[:, -3:], max_new_tokens=2, do_sample=False, pad_token_id=0)
        elif self.how == "cache":
            self.net(input_ids[:, -2:], **{TODAY: DynamicCache(config=self.net.config)})
        else:
            self.net(input_ids[:, -2:], use_cache=self.how == "its own")
        return scores


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["no cache", "its own", "cache", "generate", "guidance"])
def test_a_logits_processor_may_run_the_model(how, compiled):
    net, (ids, mask) = tiny.model(), prompts((6, 9, 4))
    settings, processor = dict(NO_END), Asking(net, how)
    if how == "guidance":
        settings |= {"guidance_scale": 1.5}
    else:
        settings |= {"logits_processor": LogitsProcessorList([processor])}
    if compiled:
        torch._dynamo.reset()
        settings |= {"cache_implementation": "static"}
        settings |= {"compile_config": compiled_everywhere(CompileConfig(backend="eager", mode=None, fullgraph=True))}
    scorer = scorer_of(net)
    out = decode(scorer, net, ids, mask, **settings)
    assert how == "guidance" or processor.asked == 40
    assert_agrees(scorer.result(out), net, tiny.head(), out, mask, "predict")


def test_a_model_that_is_compiled_in_place_may_be_run_by_a_logits_processor():
    torch._dynamo.reset()
    net, (ids, mask) = tiny.model(), prompts((9, 9))
    net.compile(backend="eager", dynamic=True)
    scorer, processor = scorer_of(net), Asking(net, "no cache")
    out = decode(scorer, net, ids, mask, logits_processor=LogitsProcessorList([processor]), max_new_tokens=20, **NO_END)
    assert_agrees(scorer.result(out), net, tiny.head(), out, mask, "predict", least=4)


def test_what_is_drafted_on_a_static_cache_is_not_compiled():
    net, ids = tiny.model(), torch.tensor([[7, 8, 10, 9, 7, 8, 10, 9, 7, 8]])
    how = {"prompt_lookup_num_tokens": 3, "do_sample": False, "max_new_tokens": 40}
    how |= {"compile_config": compiled_everywhere(CompileConfig(backend="eager", mode=None, fullgraph=True)), **NO_END}

    def cache():
        return {TODAY: StaticCache(config=net.config, max_cache_len=64)}

    try:
        truth = net.generate(ids, **how, **cache())
    except ValueError as refused:
        pytest.skip(str(refused))  # by transformers, up to 5.23
    scorer = scorer_of(net)
    out = decode(scorer, net, ids, torch.ones_like(ids), **how, **cache())
    assert torch.equal(out, truth)
    assert_agrees(scorer.result(out), net, tiny.head(), out, torch.ones_like(ids), "predict", least=1)


def test_ids_that_generate_changed_are_not_the_callers_fault():
    net, (ids, mask) = tiny.model(), prompts((6, 6))

    def rewrite(model, input_ids, **kwargs):
        cache = kwargs[TODAY]
        for _ in range(5):
            fed = input_ids if not cache.get_seq_length() else input_ids[:, -1:]
            model(fed, **{TODAY: cache})
            input_ids = torch.cat([input_ids, torch.full((2, 1), 7)], 1)
        return torch.where(input_ids == 7, 8, input_ids)

    scorer = scorer_of(net)
    out = decode(scorer, net, ids, mask, custom_generate=rewrite)
    with pytest.raises(RuntimeError, match=r"they are what generate returned, but rows \[0, 1\] are not the tokens"):
        scorer.result(out)
    out[0, -1] = 9
    with pytest.raises(ValueError, match="pass what generate returned, unchanged"):
        scorer.result(out)


# -- threads -------------------------------------------------------------------------------------------------------------


class Waiting(LogitsProcessor):
    """At the fifth token, lets another thread have its turn."""

    def __init__(self, turn):
        self.turn, self.calls = turn, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 5:
            thread = threading.Thread(target=self.turn)
            thread.start()
            thread.join()
        return scores


@pytest.mark.parametrize("what", ["generate", "forward", "attach"])
def test_another_thread_that_runs_the_model_is_refused_there(what):
    net, (ids, mask) = tiny.model(), prompts((6, 9))
    said, scorer = [], scorer_of(net)

    def turn():
        try:
            if what == "generate":
                net.generate(ids, attention_mask=mask, max_new_tokens=3)
            elif what == "forward":
                net(ids)
            else:
                with scorer_of(net):
                    pass
        except RuntimeError as error:
            said.append(str(error))

    processors = LogitsProcessorList([Waiting(turn)])
    out = decode(scorer, net, ids, mask, logits_processor=processors, **NO_END)
    assert len(said) == 1 and "another thread runs this LlamaForCausalLM" in said[0]
    assert_agrees(scorer.result(out), net, tiny.head(), out, mask, "predict")
    assert net.generate(ids, attention_mask=mask, max_new_tokens=3).shape == (2, 12)


def test_finished_text_may_be_scored_by_another_thread_in_the_midst_of_a_forward():
    net, (ids, mask) = tiny.model(), prompts((6, 9))
    text, found = torch.randint(5, tiny.VOCAB, (2, 30)), []
    head = tiny.head()  # which seeds
    truth = rf.score(net, head, tiny.steps(), text).score

    def turn(*args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: found.append(rf.score(net, head, tiny.steps(), text).score))
            thread.start()
            thread.join()

    scorer, hook = scorer_of(net), net.model.layers[1].register_forward_hook(turn)
    out = decode(scorer, net, ids, mask, **NO_END)
    hook.remove()
    assert_agrees(scorer.result(out), net, tiny.head(), out, mask, "predict")
    assert len(found) == 40 and all(torch.equal(score, truth) for score in found)


def test_threads_may_score_finished_text_at_the_same_time():
    net, head, text = tiny.model(), tiny.head(), torch.randint(5, tiny.VOCAB, (2, 30))
    truth, found = rf.score(net, head, tiny.steps(), text).score, []
    layer, mlp = net.model.layers[-1], net.model.layers[0].mlp
    before = type(layer), sorted(vars(layer)), sorted(vars(mlp))

    def turn():
        found.extend(rf.score(net, head, tiny.steps(), text).score for _ in range(10))

    threads = [threading.Thread(target=turn) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30 and all(torch.equal(score, truth) for score in found)
    assert (type(layer), sorted(vars(layer)), sorted(vars(mlp))) == before


def test_generate_may_run_in_a_thread_of_its_own():
    """As with ``TextIteratorStreamer``."""
    net, (ids, mask) = tiny.model(), prompts((6, 9))
    scorer, found = scorer_of(net), []
    with scorer:
        thread = threading.Thread(
            target=lambda: found.append(net.generate(ids, attention_mask=mask, **NO_END, max_new_tokens=40))
        )
        thread.start()
        thread.join()
    assert_agrees(scorer.result(found[0]), net, tiny.head(), found[0], mask, "predict", least=2)
