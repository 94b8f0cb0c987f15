"""The sampler: the draws of ``generate`` and the states of a forward, whatever is decoded beside them."""

import math
import string
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    GraniteConfig,
    PreTrainedTokenizerFast,
    TopPLogitsWarper,
)

import reflective as rf
from reflective.engines.hf.internals import attention_of
from reflective.model import Config
from reflective.train.sampler import Sampler, _common

CHARACTERS = string.ascii_letters + " .?\n"
PROMPTS = ["why now?", "why not?", "who", "why not so soon after that?"]
OTHERS = {  # two that scale logits; attention that cannot be exchanged; keys that are not the cache's
    "granite": GraniteConfig(**tiny._SIZES, logits_scaling=3.0, attention_multiplier=0.1, embedding_multiplier=2.0),
    "cohere": CohereConfig(**tiny._SIZES, logit_scale=0.3),
    "bloom": BloomConfig(vocab_size=tiny.VOCAB, hidden_size=64, n_layer=4, n_head=4),
    "deepseek_v3": DeepseekV3Config(
        **{**tiny._SIZES, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=12, first_k_dense_replace=4,
    ),
}  # fmt: skip


def tokenizer():
    special = ["<pad>", "<bos>", "<eos>", "<think>", "</think>"]
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*special, *CHARACTERS])}, merges=[]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def network(kind, dtype=torch.float32):
    if kind in tiny.CONFIGS:
        return tiny.model(kind, dtype)
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(OTHERS[kind], dtype=dtype).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(6.0 if p.dim() > 1 else 1.0)
    return net


def reflective(kind="llama", **settings):
    config = Config(**{"rule": "text", "delimiter": list("aeiou"), "prompt": "{question}", **settings})
    return rf.ReflectiveModel(network(kind), tokenizer(), tiny.head(), config)


def sampler(net, **settings):
    settings = {"ends": {2}, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0} | settings
    return Sampler(net, tokenizer(), **settings)


def ids_of(texts):
    return [tokenizer().encode(text) for text in texts]


def counted(draws):
    return Counter({tuple(d.token_ids): d.count for d in draws})


def run(net, prompts, samples, seed=0, **settings):
    """Draws by prompt, each with how often it came out."""
    return {q: counted(draws) for q, draws in sampler(net, **settings).run(prompts, samples, seed)}


def assert_draws_of_generate(model, samples, **settings):
    texts = [c + "?" for c in "abcd"] + PROMPTS
    expected = model.generate(texts, n=samples, seed=5, **settings)
    given = {"ends": {2}, "stop": model.config.stop, "log_probs": True, **settings}
    found = dict(sampler(model.model, **given).run(ids_of(texts), samples, seed=5))
    statuses = set()
    for q, generation in enumerate(expected):
        ours = []
        for d in found[q]:
            row = [t for t in d.token_ids if t != 2]
            ours += [(row, d.finished, pytest.approx(d.log_prob, rel=1e-4, abs=1e-4))] * d.count
        theirs = [(c.token_ids, c.status, c.log_prob) for c in generation.candidates]
        assert sorted(theirs) == sorted(ours, key=lambda draw: draw[:2])
        statuses |= {status for _, status, _ in theirs}
    return statuses


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt2", "mixtral", "qwen3_moe"])
def test_the_draws_are_those_of_generate(kind):
    assert assert_draws_of_generate(reflective(kind), 6, max_new_tokens=16, temperature=0.9, top_p=0.9)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 2.0, "top_p": 1.0}, {"top_p": 0.0}])
def test_temperature_and_top_p_are_those_of_generate(settings):
    assert_draws_of_generate(reflective(), 4, **{"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9} | settings)


@pytest.mark.parametrize(("samples", "batch_rows"), [(16, 256), (2, 4)], ids=["at_once", "one_after_the_other"])
def test_a_pattern_the_length_and_the_end_token_end_a_draw(samples, batch_rows):
    model = reflective(stop=r"[aeiou]\w|[n-z]")
    settings = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "batch_rows": batch_rows}
    assert assert_draws_of_generate(model, samples, **settings) == {"stop", "length"}
    draws = [d for _, found in sampler(model.model).run(ids_of(PROMPTS), 16) for d in found]
    assert {d.finished for d in draws} == {"stop", "length"}
    assert all((d.finished == "stop") == (d.token_ids[-1] == 2) for d in draws)
    assert all(len(d.token_ids) == 12 for d in draws if d.finished == "length")


def deviation(net, prompts, truth=None, **settings):
    """Largest relative deviation of log-probabilities and states from a forward of each finished text alone."""
    worst, theirs, seen = 0.0, 0.0, 0
    layers = list(range(-5, 0))
    for q, draws in sampler(net, layers=layers, log_probs=True, **settings).run(prompts, 3, seed=1):
        for d in draws:
            ids = torch.tensor([prompts[q] + d.token_ids])
            at = torch.arange(len(prompts[q]) - 1, ids.shape[1] - 1)
            with torch.no_grad():
                out, exact = (n and n(ids, output_hidden_states=True) for n in (net, truth))
            states = torch.stack([d.state(t) for t in range(-1, len(d.token_ids) - 1)], 1).double()  # [layers, T, H]
            plain, exact = (
                o and torch.stack([o.hidden_states[i][0, at] for i in layers]).double() for o in (out, exact)
            )
            truth_states = plain if exact is None else exact
            size = truth_states.abs().amax((1, 2), keepdim=True)
            worst = max(worst, float(((states - truth_states) / size).abs().max()))
            theirs = max(theirs, float(((plain - truth_states) / size).abs().max()))
            log_probs = out.logits[0, at].float().log_softmax(-1)[range(len(at)), d.token_ids]
            if truth is None:
                assert d.log_prob == pytest.approx(float(log_probs.sum()), rel=1e-5)
            with pytest.raises(IndexError):
                d.state(len(d.token_ids) - 1)
            with pytest.raises(IndexError):
                d.state(-2)
            seen += 1
    assert seen > 2 * len(prompts)
    return worst, theirs


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "qwen3_moe", "granite", "cohere", "qwen2_vl", "llava"])
def test_states_and_log_probabilities_are_those_of_a_forward(kind):
    worst, _ = deviation(network(kind, torch.float64), ids_of(PROMPTS))
    assert worst < 1e-12


def test_states_in_bfloat16_are_as_exact_as_a_forward_s():
    worst, theirs = deviation(network("llama", torch.bfloat16), ids_of(PROMPTS), network("llama", torch.float64))
    assert 0 < worst <= 2 * theirs


@pytest.mark.parametrize(
    "prompts",
    [PROMPTS, ["same?"] * 5, ["a", "b", "c", "a"], ["x", "xy", "xyz"], ["alone in here?"], ["q"]],
    ids=["some", "equal", "one_token", "nested", "one", "one_of_one_token"],
)
def test_a_draw_does_not_depend_on_what_is_decoded_beside_it(prompts):
    """Against every prompt decoded as the only one with its number."""
    net, ids = network("llama", torch.float64), ids_of(prompts)
    alone = []
    for q in range(len(ids)):  # behind prompts that end at once
        found = dict(sampler(net, temperature=1.0).run([[3]] * q + [ids[q]], 5, seed=2))
        alone.append(counted(found[q]))
    for batch_rows in (1, 4, 256):
        found = run(net, ids, 5, seed=2, batch_rows=batch_rows)
        assert [found[q] for q in range(len(ids))] == alone
        assert all(count.total() == 5 for count in alone)


def test_what_draws_have_in_common_is_decoded_once():
    greedy, net, prompt = {"temperature": 0.0, "ends": set()}, network("llama"), ids_of(["why?"])[0]
    s = sampler(net, **greedy)
    ((q, draws),) = s.run([prompt], 500)
    assert q == 0 and len(draws) == 1 and draws[0].count == 500
    assert (s.forwards, s.tokens) == (1 + 12, len(prompt) + 11)  # the prefix is all of the prompt but its last token
    s = sampler(net, **greedy)
    dict(s.run([[*prompt, t] for t in range(5, 45)], 7))
    assert (s.forwards, s.tokens) == (1 + 12, len(prompt) + 40 * 12)


def chi_square(counts, chances):
    """In standard deviations from its expectation, outcomes expected less than five times taken together."""
    expected = chances * counts.sum()
    rare = expected < 5
    o, e = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    o, e = o[e > 0], e[e > 0]
    return (((o - e) ** 2 / e).sum() - (len(e) - 1)) / math.sqrt(2 * (len(e) - 1))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_thousands_of_draws_are_distributed_as_the_model_says(top_p):
    net, prompt, n = network("llama"), ids_of(["why?"])[0], 3000
    settings = {"max_new_tokens": 2, "temperature": 1.5, "top_p": top_p, "ends": set(), "batch_rows": 16}
    found = run(net, [prompt], n, **settings)[0]
    assert found.total() == n

    def chances(ids):
        with torch.no_grad():
            logits = net(torch.tensor([ids])).logits[0, -1:] / 1.5
        logits = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
        return logits.double().softmax(-1)[0].numpy()

    first = Counter()
    for (a, _), count in found.items():
        first[a] += count
    assert abs(chi_square(np.array([first[t] for t in range(tiny.VOCAB)]), chances(prompt))) < 4
    likely = first.most_common(1)[0][0]
    second = np.array([found[likely, t] for t in range(tiny.VOCAB)])
    assert second.sum() > 100 and abs(chi_square(second, chances([*prompt, likely]))) < 4


@pytest.mark.parametrize("vocab", [1, 61, 256, 257, 777])
def test_a_uniform_chooses_by_the_cumulative_distribution(vocab):
    s, rows = sampler(network("llama"), temperature=0.7), 8
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    logits[1, ::2] = -math.inf
    logits[1, -1] = logits[2, -1] = 0.0
    logits[2, : vocab // 2] = logits[
        3:, 256:
    ] = -math.inf  # float32 and float64 sum a block differently: nothing behind it
    chance = torch.cat([torch.rand(500, dtype=torch.float64), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    owner = torch.arange(rows).repeat_interleave(len(chance))
    tokens = s._choose(logits.clone(), owner, chance.repeat(rows))
    exact = (logits.double() / 0.7).softmax(-1)
    cdf, u = exact.cumsum(-1), chance.repeat(rows)
    assert (exact[owner, tokens] > 0).all()
    assert (cdf[owner, tokens] > u - 1e-6).all() and (cdf[owner, tokens] - exact[owner, tokens] < u + 1e-6).all()


def test_logits_that_are_no_numbers_are_treated_as_by_generate():
    model = reflective()
    with torch.no_grad():
        model.model.lm_head.weight[7] = math.nan
    (generation,) = model.generate(["why?"], n=3, max_new_tokens=4, seed=0)
    ((_, (draw,)),) = sampler(model.model, max_new_tokens=4, log_probs=True).run(ids_of(["why?"]), 3)
    assert [c.token_ids for c in generation.candidates] == [draw.token_ids] * draw.count
    assert draw.count == 3 and math.isnan(draw.log_prob)


def hooks(net):
    return [module for module in net.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_the_model_is_the_caller_s_between_answers_and_after():
    net, prompts = network("llama"), ids_of(PROMPTS)
    ids, found = torch.tensor(prompts[:1]), {}
    before, plain = attention_of(net.config), net(ids).logits
    for q, draws in sampler(net, batch_rows=1).run(prompts, 3):
        found[q] = counted(draws)
        assert torch.is_grad_enabled() and attention_of(net.config) == before and not hooks(net)
        assert torch.equal(net(ids).logits, plain) and net(ids).logits.requires_grad
        assert not any(d.state(-1).requires_grad for d in draws)
    assert found == run(net, prompts, 3)
    early = sampler(net, batch_rows=1).run(prompts, 3)
    next(early)
    early.close()
    assert attention_of(net.config) == before and not hooks(net)

    handle = net.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dict(sampler(net).run(prompts, 3))
    handle.remove()
    assert torch.is_grad_enabled() and attention_of(net.config) == before and not hooks(net)
    with torch.no_grad():
        dict(sampler(net, batch_rows=1).run(prompts, 3))
        assert not torch.is_grad_enabled()


def test_sub_models_keep_their_attention():
    net = network("llava")
    net.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa", "": "sdpa"})
    list(sampler(net).run(ids_of(PROMPTS), 2))
    parts = net.config, net.config.text_config, net.config.vision_config
    assert [attention_of(part) for part in parts] == ["sdpa", "eager", "sdpa"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mistral_sliding", "not every token attends to all before it"),
        ("gemma2", "not every token attends to all before it"),
        ("gemma3", "not every token attends to all before it"),
        ("bloom", "attention of BloomForCausalLM cannot be exchanged"),
        ("deepseek_v3", "DeepseekV3ForCausalLM does not hand its keys on"),
    ],
)
def test_models_that_it_would_get_wrong_are_refused(kind, message):
    net = network(kind)
    before = attention_of(net.config)
    with pytest.raises(ValueError, match=message):
        list(sampler(net).run(ids_of(PROMPTS), 2))
    assert attention_of(net.config) == before and not hooks(net)


@pytest.mark.parametrize("prompts", [PROMPTS, "ab"], ids=["prefix", "no_prefix"])
def test_a_layer_that_attends_in_its_own_way_is_noticed(prompts):
    net = network("llama")
    net.model.layers[-1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match="3 of the 4 layers of LlamaForCausalLM attend"):
        list(sampler(net).run(ids_of(prompts), 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("attention_mask", torch.ones(1)), ("sliding_window", 8), ("softcap", 50.0), ("s_aux", torch.ones(4))],
)
def test_what_attention_is_told_besides_is_noticed(name, value):
    net = network("llama")
    attention = net.model.layers[1].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **given: plain(*args, **given | {name: value})
    with pytest.raises(ValueError, match=f"LlamaAttention attends with {name.replace('attention_', 'a ')}"):
        list(sampler(net).run(ids_of("ab"), 2))


def test_states_of_the_model_that_forbid_sampling():
    net, prompts = network("llama"), ids_of(PROMPTS)
    with pytest.raises(ValueError, match="in training mode"):
        list(sampler(net.train()).run(prompts, 2))
    with rf.StreamScorer(net.eval(), tiny.head(), tiny.steps()), pytest.raises(ValueError, match="StreamScorer"):
        list(sampler(net).run(prompts, 2))
    assert len(list(sampler(net).run(prompts, 2))) == len(prompts)
    net.model.layers[0].to("meta")
    with pytest.raises(ValueError, match="several devices"):
        sampler(net)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"batch_rows": 0}, "batch_rows=0 must be at least 1"),
        ({"temperature": -0.5}, r"temperature=-0\.5 must be at least 0"),
        ({"layers": [-6]}, "hidden_states 0 to 4, or -1 to -5"),
        ({"layers": [5]}, "hidden_states 0 to 4, or -1 to -5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(network("llama"), **settings)


@pytest.mark.parametrize(("prompts", "samples"), [([], 1), ([[5], []], 1), ([[5]], 0)])
def test_nothing_to_do(prompts, samples):
    with pytest.raises(ValueError, match="at least one of each, and no empty prompt"):
        next(sampler(network("llama")).run(prompts, samples))


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [([[1, 2, 3]], 2), ([[1]], 0), ([[1, 2], [1, 2]], 1), ([[1, 2, 3], [1, 2]], 1), ([[1, 5, 2], [1, 5, 3], [1, 4]], 1),
     ([[7, 1, 2], [7, 1, 3]], 2), ([[1, 2], [2, 2]], 0)],
)  # fmt: skip
def test_what_prompts_begin_with(prompts, shared):
    assert _common(prompts) == shared
