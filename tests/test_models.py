"""Streams of every kind of model, attention, placement and cache, against the rules of ``test_scorer``."""

from types import SimpleNamespace

import pytest
import test_finished
import test_scorer
import tiny
import torch
import torch.nn.functional as F
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.utils import is_flash_attn_2_available

import reflective as rf
from reflective.engines.hf.backbone import Backbone
from reflective.engines.hf.internals import attention_of, has_float8_cache

SLIDING = ["mistral_sliding", "gemma2", "gemma3"]
VISION = ["llava", "qwen2_vl"]


def stream(net, ids, mask, head=None, **kwargs):
    """Decode without an early end; the scores and what generate returned."""
    scorer = rf.StreamScorer(net, head or tiny.head(), tiny.steps())
    out = test_scorer.decode(scorer, net, ids, mask, **{"suppress_tokens": [2], "num_return_sequences": 2, **kwargs})
    return scorer.result(out), out


def assert_agrees(scores, net, out, mask, head=None):
    test_scorer.assert_agrees(scores, net, head or tiny.head(), out, mask, "predict")


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VISION)
def test_the_text_decoder_is_found_beside_a_vision_tower(kind):
    net = tiny.model(kind)
    found, decoder = Backbone.of(net), net.model.language_model
    assert found.decoder is decoder and found.layers is decoder.layers
    assert (found.hidden_size, found.vocab_size) == (tiny.HIDDEN, net.lm_head.out_features)


def test_a_vision_tower_as_deep_as_the_decoder_and_within_it():
    config = IdeficsConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        vision_config={"embed_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48},
    )  # fmt: skip
    net = IdeficsForVisionText2Text(config)
    assert Backbone.of(net).layers is net.model.layers


def test_the_dtype_is_that_of_the_states_not_of_quantised_weights():
    net = tiny.model(dtype=torch.bfloat16)
    for projection in (net.model.layers[2].self_attn.q_proj, net.model.layers[2].mlp.up_proj):
        projection.weight = torch.nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert Backbone.of(net).dtype == torch.bfloat16


def test_what_has_no_state_to_read_is_refused():
    net = tiny.model()
    net.model.layers[2].register_forward_hook(lambda module, args, states: states[None])
    with pytest.raises(ValueError, match=r"layers of LlamaForCausalLM hand on \[1, 1, 4, 64\], not one state"):
        rf.score(net, tiny.head(), tiny.steps(), [[5, 6, 7, tiny.STEP_IDS[0], 9]])
    with pytest.raises(ValueError, match="weights of LlamaForCausalLM are on the meta device"):
        Backbone.of(net.to("meta"))
    net.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    with pytest.raises(ValueError, match="no num_hidden_layers"):
        Backbone.of(net)


@pytest.mark.parametrize("kind", [*SLIDING, *VISION, "mixtral", "qwen3_moe"])
def test_finished_text(kind):
    test_finished.test_agrees_with_a_second_pass_alone(kind, "predict")


# -- images ------------------------------------------------------------------------------------------------------------


class Seeing(torch.nn.Module):
    """``net`` with an image in its prompt; the image is cast with the weights."""

    def __init__(self, kind):
        super().__init__()
        self.net = tiny.model(kind)
        # 16 patches of 3 x 2 x 4 x 4, merged by four, or pixels in patches of 4 x 4: four tokens
        self.shape = (16, 96) if kind == "qwen2_vl" else (1, 3, 8, 8)
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("pixels", torch.randn(self.shape, generator=generator))
        self.device = self.pixels.device

    def image(self, ids, copies=1):
        given = {"pixel_values": self.pixels.repeat(copies, *(1 for _ in self.shape[1:]))}
        if len(self.shape) == 2:
            given |= {
                "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(copies, 1),
                "mm_token_type_ids": (ids == tiny.IMAGE).int(),
            }
        return given

    def forward(self, ids, **kwargs):
        return self.net(ids, **self.image(ids), **kwargs)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", VISION)
def test_a_prompt_with_an_image(kind, cache):
    seeing, (ids, mask) = Seeing(kind), test_scorer.prompts((9, 7))
    ids[:, 2], ids[:, 3:7] = tiny.VISION_START, tiny.IMAGE
    markers = [tiny.IMAGE, tiny.VIDEO, tiny.VISION_START]
    kwargs = {"suppress_tokens": [2, *markers], "cache_implementation": cache}
    scores, out = stream(seeing.net, ids, mask, **seeing.image(ids, copies=2), **kwargs)
    assert_agrees(scores, seeing, out, mask)
    blind, _ = stream(seeing.net, ids, mask, **kwargs)
    assert not torch.equal(scores.score, blind.score), "the image made no difference"
    with pytest.raises(ValueError, match=f"token {tiny.IMAGE} stands for image features"):
        rf.score(seeing.net, tiny.head(), tiny.steps(), out)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_attention_implementations(attention, kind, device):
    flash = attention == "flash_attention_2"
    if flash and not (device.type == "cuda" and is_flash_attn_2_available()):
        pytest.skip("needs a GPU and the package flash-attn")
    dtype = torch.bfloat16 if flash else torch.float32
    net, plain = (tiny.model(kind, dtype).to(device) for _ in range(2))
    head, (ids, mask) = tiny.head(dtype).to(device), test_scorer.prompts()
    net.set_attn_implementation(attention)
    plain.set_attn_implementation("eager")
    assert attention_of(net.config) == attention
    # Inductor's flex attention takes 20 s to compile for a CPU, and fails with left padding (torch 2.13): run it as written.
    with torch.compiler.set_stance("force_eager" if device.type == "cpu" else "default"):
        scores, out = stream(net, ids, mask, head, max_new_tokens=24)
    assert_agrees(scores, plain, out, mask, head)


# -- placement ---------------------------------------------------------------------------------------------------------


def place(net, tmp_path, layers, rest, **kwargs):
    """``net`` with its layers on ``layers`` and all else on ``rest``, as ``from_pretrained(device_map=...)`` places it."""
    accelerate = pytest.importorskip("accelerate")
    parts = {name: rest for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    parts |= {f"model.layers.{i}": device for i, device in enumerate(layers)}
    return accelerate.dispatch_model(net, parts, offload_dir=tmp_path, **kwargs)


def assert_placement_does_not_matter(net):
    (ids, mask), plain = test_scorer.prompts(), tiny.model().to(Backbone.of(net).device)
    head = tiny.head().to(plain.device)
    scores, out = stream(net, ids, mask, head)
    assert_agrees(scores, plain, out, mask, head)
    lengths = mask.sum(1).repeat_interleave(2)
    mask = mask.repeat_interleave(2, 0)
    mask = torch.cat([mask, torch.ones(len(out), out.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
    ours, theirs = (rf.score(m, head, tiny.steps(), out, mask, prompt_lengths=lengths) for m in (net, plain))
    torch.testing.assert_close(ours.score, theirs.score, rtol=1e-5, atol=1e-6)


def test_weights_offloaded_to_disk(tmp_path):
    net = place(tiny.model(), tmp_path, ["cpu", "disk", "disk", "disk"], "cpu")
    assert next(net.model.layers[-2].parameters()).device.type == "meta"
    assert Backbone.of(net).device == torch.device("cpu")
    assert_placement_does_not_matter(net)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_offloaded_from_a_gpu(tmp_path):
    net = place(tiny.model(), tmp_path, [0, "cpu", "cpu", "disk"], 0)
    assert Backbone.of(net).device == torch.device("cuda:0")
    assert_placement_does_not_matter(net)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_layers_on_several_devices(tmp_path):
    other = 1 if torch.cuda.device_count() > 1 else "cpu"
    net = place(tiny.model(), tmp_path, [other, 0, 0, other], other, main_device=other)
    assert Backbone.of(net).device == torch.device("cuda:0")
    assert_placement_does_not_matter(net)


def test_the_device_is_that_of_the_layer_before_the_last():
    net = tiny.model()
    for layer, index in zip(net.model.layers, (0, 0, 1, 2), strict=True):
        layer._hf_hook = SimpleNamespace(execution_device=f"cuda:{index}")  # as accelerate leaves it
    assert Backbone.of(net).device == torch.device("cuda:1")


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", SLIDING)
def test_sliding_windows_shorter_than_the_text(kind, cache):
    net, (ids, mask) = tiny.model(kind), test_scorer.prompts((14, 9, 3))  # the window of 8 slides in prefill already
    scores, out = stream(net, ids, mask, cache_implementation=cache, max_new_tokens=60)
    assert_agrees(scores, net, out, mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches of GPUs only")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches(cache):
    net, (ids, mask) = tiny.model().cuda(), test_scorer.prompts()
    scores, out = stream(net, ids, mask, tiny.head().cuda(), cache_implementation=cache)
    assert_agrees(scores, net, out, mask, tiny.head().cuda())


@pytest.mark.parametrize("backend", ["fp8", "hqq", "quanto"])
def test_quantised_caches(backend, device):
    """The truth is the head on the states that this very decoding had: a pass without that cache has others."""
    groups = {"q_group_size": 16, "residual_length": 8}
    if backend == "fp8":
        groups = {}
        if not has_float8_cache():
            pytest.skip("this transformers has no float8 cache")
    elif backend == "hqq":
        pytest.importorskip("hqq")
        groups |= {"axis_key": 1, "axis_value": 1}
    else:
        pytest.importorskip("optimum.quanto")
    net, head, (ids, mask) = tiny.model().to(device), tiny.head().to(device), test_scorer.prompts((6, 6))
    scores, out = stream(
        net, ids, mask, head, cache_implementation="quantized", cache_config={"backend": backend, **groups},
        output_hidden_states=True, return_dict_in_generate=True,
    )  # fmt: skip
    hidden = torch.cat([states[-2] for states in out.hidden_states], 1)  # [4, T - 1, H]
    exact, ours, theirs = tiny.head().double().to(device), 0.0, 0.0
    for i, row in enumerate(out.sequences.tolist()):
        found = tiny.expected_steps(row, 6)
        assert scores.step_positions[i].tolist() == found and len(found) >= 3
        features = hidden[i, [t - 1 for t in found]]
        truth = F.logsigmoid(exact(features.double()).squeeze(-1))
        ours = max(ours, float((scores.step_scores[i].log().double().to(device) - truth).abs().max()))
        theirs = max(theirs, float((F.logsigmoid(head(features).squeeze(-1)) - truth).abs().max()))
    assert ours <= 2 * theirs + 1e-6
    unquantised = rf.score(net, head, tiny.steps(), out.sequences, prompt_lengths=6)
    assert (scores.score - unquantised.score).abs().max() > 1e-4, "nothing was quantised"
