"""Where a head reads a model: any layers, before or after the final norm, at any token; eager, compiled, in a stream and in finished text."""

import json

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import reflective as rf
from reflective.engines.hf.backbone import Backbone
from reflective.engines.hf.internals import with_cache

P, NEW = 9, 24
TAPS = {
    "paper": rf.Tap(),
    "embeddings": rf.Tap((0,)),
    "after the norm": rf.Tap((-1,), at="token"),
    "several": rf.Tap((-3, -1, 1)),
    "in another order": rf.Tap((1, -3), at="token"),
    "normed": rf.Tap((-2, 1), norm=True),
    "by rms": rf.Tap((2, -1), norm="rms", at="token"),
    "every": rf.Tap((-2,), at="every"),
}


def head(tap, dtype=torch.float32, hidden=tiny.HIDDEN):
    torch.manual_seed(1)
    return rf.SPRM(len(tap.layers) * hidden, 40, dtype=dtype).use(tap=tap).requires_grad_(False).eval()


def model(kind="llama"):
    net = tiny.model(kind)
    net.generation_config.eos_token_id = 2
    net.generation_config.pad_token_id = tiny.PAD
    return net


def prompts(rows=3):
    return torch.randint(5, 60, (rows, P), generator=torch.Generator().manual_seed(2))


def decoded(net, scorer, **how):
    torch.manual_seed(3)
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "min_new_tokens": NEW, "suppress_tokens": [tiny.PAD]} | how
    with scorer:
        return net.generate(prompts(), attention_mask=torch.ones(3, P, dtype=torch.int64), **how)


@torch.no_grad()
def expected(net, sprm, ids, prompt_length=P):
    """Of each row, columns and scores by all of the model's hidden states; of a stream, in which the last token has none."""
    tap, states = sprm.tap, net(ids, output_hidden_states=True).hidden_states
    n = len(states) - 1
    norms = [m for name, m in net.named_modules() if name.rpartition(".")[2] in ("norm", "ln_f", "final_layernorm")]

    def normed(layer):
        x = states[layer]
        if tap.norm == "rms":
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return norms[-1](x) if tap.norm and layer % (n + 1) != n else x

    scores = sprm(torch.cat([normed(layer) for layer in tap.layers], -1)).sigmoid()[..., 0]
    found = []
    for row, of in zip(ids.tolist(), scores, strict=True):
        if tap.at == "every":
            columns = [t for t in range(prompt_length, len(row)) if row[t] not in (2, tiny.PAD)]
        else:
            columns = tiny.expected_steps(row, prompt_length)
        if tap.at != "predict":
            columns = [t for t in columns if t < len(row) - 1]
        found.append((columns, of[[t - (tap.at == "predict") for t in columns]]))
    return found


def agree(found, wanted, atol=2e-5):
    for i, (columns, scores) in enumerate(wanted):
        assert found.step_positions[i].tolist() == columns
        torch.testing.assert_close(found.step_scores[i], scores, rtol=1e-4, atol=atol)
    assert sum(len(columns) for columns, _ in wanted) > 3


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("llama", name) for name in TAPS), *((kind, name) for kind in ("gpt2", "phi", "gemma2") for name in ("several", "normed"))],
)
def test_a_stream_and_finished_text_read_what_output_hidden_states_has(kind, name):
    net, sprm = model(kind), head(TAPS[name])
    scorer = rf.StreamScorer(net, sprm, tiny.steps())
    out = decoded(net, scorer)
    wanted = expected(net, sprm, out)
    agree(scorer.result(out), wanted)
    whole = rf.score(net, sprm, tiny.steps(), out[:, :-1], prompt_lengths=P)
    if sprm.tap.at != "predict":  # else the token that came last may have ended a step
        agree(whole, wanted)
    assert type(net).__name__ == type(model(kind)).__name__ and "_reflective_tap" not in vars(net)
    assert not any("_reflective_ears" in vars(m) for m in net.modules())


@pytest.mark.parametrize("name", ["after the norm", "several", "normed", "every"])
def test_compiled_forwards(name):
    net, sprm = model(), head(TAPS[name])
    plain = rf.StreamScorer(net, sprm, tiny.steps())
    out = decoded(net, plain)
    wanted, graphs = plain.result(out), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    scorer, cache = rf.StreamScorer(net, sprm, tiny.steps()), StaticCache(net.config, max_cache_len=64)
    with torch.no_grad(), scorer:
        scorer.begin(out[:, :P])
        run = torch.compile(net.forward, backend=backend, fullgraph=True)
        for piece in (out[:, :P], *out[:, P:-1].split(1, 1)):
            run(piece, **with_cache(net, cache), use_cache=True)
    found = scorer.result(out)
    assert any("decode_step" in str(node.target) for node in graphs[-1].graph.nodes)
    for a, b in zip(found.step_scores, wanted.step_scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_the_forward_of_finished_text_ends_at_the_deepest_layer_that_is_read():
    net, run = model(), []
    for i, layer in enumerate(net.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: run.append(i))
    net.model.norm.register_forward_pre_hook(lambda *_: run.append("norm"))
    ids = prompts()
    for layers, last in (((1,), [0]), ((-4, 2), [0, 1]), ((-1,), [0, 1, 2, 3, "norm"])):
        run.clear()
        rf.score(net, head(rf.Tap(layers, at="every")), None, ids)
        # The layer at whose input the forward ends is called, and does nothing.
        assert [i for i in run if i in last] == last and set(run) - set(last) <= {len(last)}


def test_scorers_of_several_taps_on_one_model():
    net = model()
    heads = [head(TAPS[name]) for name in ("several", "paper", "every", "after the norm")]
    scorers = [rf.StreamScorer(net, h, tiny.steps()) for h in heads]
    with scorers[0], scorers[1], scorers[2]:
        out = decoded(net, scorers[3])
    for h, scorer in zip(heads, scorers, strict=True):
        agree(scorer.result(out), expected(net, h, out))


def test_scores_are_the_same_whoever_left_meanwhile():
    net, sprm, other = model(), head(TAPS["several"]), rf.StreamScorer(model(), head(TAPS["every"]), tiny.steps())
    scorer, gone = rf.StreamScorer(net, sprm, tiny.steps()), rf.StreamScorer(net, head(TAPS["embeddings"]), tiny.steps())
    with pytest.raises(ZeroDivisionError), gone:
        1 / 0  # noqa: B018
    out = decoded(net, scorer)
    agree(scorer.result(out), expected(net, sprm, out))
    assert other.backbone.model is not net


def test_beams_are_followed_at_any_tap():
    net, sprm = model(), head(TAPS["several"])
    scorer = rf.StreamScorer(net, sprm, tiny.steps())
    out = decoded(net, scorer, num_beams=3, do_sample=False)
    wanted = [rf.score(net, sprm, tiny.steps(), row[None], prompt_lengths=P) for row in out]
    found = scorer.result(out)
    for i, one in enumerate(wanted):
        torch.testing.assert_close(found.step_scores[i], one.step_scores[0], rtol=1e-4, atol=2e-5)


def test_gradients_go_through_every_layer_that_is_read():
    net, sprm = model(), head(rf.Tap((1, -2, -1)))
    net.requires_grad_(True)
    backbone = Backbone.of(net, sprm.tap)
    hidden = backbone.hidden(prompts(), None)
    assert hidden.shape == (3, P, 3 * tiny.HIDDEN) and backbone.width == 3 * tiny.HIDDEN
    sprm(hidden).sum().backward()
    assert all(layer.mlp.down_proj.weight.grad.abs().max() > 0 for layer in net.model.layers)


def test_a_width_that_is_no_multiple_of_8_is_filled_up():
    config = tiny.CONFIGS["llama"].__class__(
        **{**tiny._SIZES, "hidden_size": 36, "intermediate_size": 40, "head_dim": 10, "num_attention_heads": 2}
    )
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config).eval()
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = 2, tiny.PAD
    sprm = head(rf.Tap((-2,), at="every"), hidden=36)
    scorer = rf.StreamScorer(net, sprm, None)
    out = decoded(net, scorer)
    agree(scorer.result(out), expected(net, sprm, out))


def test_every_token_costs_one_row_and_padding_none():
    """A sequence that has ended is fed padding, which is no text."""
    net, sprm = model(), head(TAPS["every"])
    scorer = rf.StreamScorer(net, sprm)
    ids = torch.cat([prompts(2), torch.tensor([[7, 8, 2, 0, 0], [9, 9, 9, 9, 9]])], 1)
    with torch.no_grad(), scorer:
        cache = with_cache(net, DynamicCache())
        net(ids[:, :P], **cache)
        for t in range(P, ids.shape[1]):
            net(ids[:, t : t + 1], **cache)
    assert [p.tolist() for p in scorer.result().step_positions] == [[9, 10], [9, 10, 11, 12, 13]]


# -- what it is as data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", TAPS.values(), ids=TAPS)
def test_a_tap_is_data(tap):
    assert rf.Tap.from_dict(json.loads(json.dumps(tap.to_dict()))) == tap


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"layers": ()}, r"layers=\(\): name at least one"), ({"layers": ("a",)}, "expected indices of hidden_states"),
        ({"layers": (-2, -2)}, "-2 is named twice"), ({"at": "before"}, "at='before'; expected one of 'predict', 'token', 'every'"),
        ({"norm": "layer"}, "norm='layer'; expected False, True or 'rms'"), ({"deep": 1}, "unknown deep"),
    ],
)  # fmt: skip
def test_what_is_no_tap(given, why):
    with pytest.raises(ValueError, match=why):
        rf.Tap.from_dict(given)


@pytest.mark.parametrize(
    ("tap", "why"),
    [
        (rf.Tap((7,)), r"LlamaForCausalLM has hidden_states 0 to 4 \(or -5 to -1\), so no 7"),
        (rf.Tap((-6,)), "so no -6"),
        (rf.Tap((3, -2)), "3 is named twice"),
        (rf.Tap((-1, 2), norm=True), "the last has the final norm already"),
    ],
)
def test_a_tap_that_the_model_does_not_have(tap, why):
    with pytest.raises(ValueError, match=why):
        rf.StreamScorer(model(), head(tap), tiny.steps())


def test_no_final_norm(monkeypatch):
    net = model()
    net.model.norm = nn.Identity()
    with pytest.raises(ValueError, match="norm=True: no final norm found in LlamaModel"):
        rf.StreamScorer(net, head(TAPS["normed"]), tiny.steps())


def test_layers_on_several_devices(monkeypatch):
    from reflective.engines.hf import backbone

    net = model()
    where = {net.model.layers[0]: "cpu", net.model.layers[2]: "meta"}
    of = backbone._device_of
    monkeypatch.setattr(backbone, "_device_of", lambda m: torch.device(where[m]) if m in where else of(m))
    with pytest.raises(ValueError, match=r"hidden_states\[1\] on cpu, hidden_states\[3\] on meta; place it so"):
        rf.StreamScorer(net, head(rf.Tap((1, 3))), tiny.steps())


def test_a_width_that_does_not_match_the_tap():
    sprm = rf.SPRM(tiny.HIDDEN).use(tap=rf.Tap((-2, -1)))
    with pytest.raises(ValueError, match=r"hidden size 64 differs from the 128 of LlamaForCausalLM, of which it reads layers \(-2, -1\)"):
        rf.StreamScorer(model(), sprm, tiny.steps())


def test_steps_are_needed_but_for_every_token():
    with pytest.raises(ValueError, match="steps=None: a head that reads at='predict' needs StepTokens"):
        rf.StreamScorer(model(), head(rf.Tap()))
    rf.StreamScorer(model(), head(rf.Tap(at="every")))


def test_another_model_of_equal_width_is_warned_of():
    net, sprm = model(), head(rf.Tap()).use(trained_on="somebody/other-7B")
    net.config.name_or_path = net.name_or_path = "somebody/this-7B"
    with pytest.warns(UserWarning, match="trained on the states of somebody/other-7B, and this is somebody/this-7B"):
        rf.StreamScorer(net, sprm, tiny.steps())
