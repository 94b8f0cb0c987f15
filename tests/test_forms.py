"""Published heads load in their own forms: what is read from a checkpoint scores as its project does (``published.py``)."""

import itertools
import json

import published
import pytest
import safetensors.torch
import tiny
import torch
import torch.nn.functional as F
from test_checkpoints import XBAI, publish
from transformers import AutoModelForCausalLM, AutoTokenizer

from reflective.scoring.forms import Form, form_of, found, read

H, N = tiny.HIDDEN, 4  # of the models here: hidden size, layers
PROMPT = 5


# -- what scores with a form: the least that can, on hidden states that are all kept -----------------------------------


@torch.no_grad()
def features(form: Form, model, ids):
    """[T, K] as ``layers`` and ``norm`` say."""
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states

    def normed(layer):
        x = states[layer][0].float()
        if form.norm == "rms":
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return model.model.norm(x) if form.norm and layer not in (-1, len(states) - 1) else x

    return torch.cat([normed(layer) for layer in form.layers], -1)


def scored(form: Form, model, ids, positions):
    """``(score, step scores)`` of the steps at ``positions``."""
    rows = features(form, model, ids)[[t - (form.at == "predict") for t in positions]]
    if form.kind == "mlp":
        w1, b1, w2, b2 = form.tensors
        act = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}
        logits = act[form.activation](rows @ w1.T + b1) @ w2.T + b2
    else:
        w, b = form.tensors[:2]
        logits = rows @ w.T + b
    scores = (logits.sigmoid() if form.sigmoid else logits)[:, 0]
    if form.aggregation == "gated":
        w, b = form.tensors[2:]
        gates = (rows @ w.T + b).sigmoid()[:, 0]
        return float((gates * scores).sum() / gates.sum()), scores.tolist()
    ways = {"geometric_mean": lambda s: s.clamp_min(1e-10).log().mean().exp(), "mean": torch.mean, "max": torch.max}
    return float(ways[form.aggregation](scores)), scores.tolist()


def agrees(form: Form, model, ids, expected: published.Scored):
    score, scores = scored(form, model, ids, expected.positions)
    assert scores == pytest.approx(expected.step_scores, rel=2e-4, abs=2e-4)
    assert score == pytest.approx(expected.score, rel=2e-4, abs=2e-4)
    assert max(scores) - min(scores) > 0.01, "scores that tell nothing apart would prove nothing"


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, tiny.VOCAB, (40,), generator=generator).tolist()


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory):
    """A model with a tokenizer, and ``(ids, prompt length)`` of a thought and an answer."""
    path = publish("xbai", tmp_path_factory.mktemp("xbai"), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt, answer = (tokenizer.encode(XBAI[part], add_special_tokens=False) for part in ("prompt", "response"))
    (step,) = tokenizer.encode(".\n\n", add_special_tokens=False)
    at = answer.index(step)
    answer[at:at] = [step]  # two in a row
    return (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        tokenizer,
        prompt + answer,
        len(prompt),
    )


# -- MetaStone ---------------------------------------------------------------------------------------------------------


def test_metastone(reasoning):
    net, tokenizer, ids, prompt = reasoning
    state = published.metastone_checkpoint(H)
    form = found(state).for_model(H, N)
    assert (form.name, form.kind, form.layers, form.norm, form.at) == ("metastone", "mlp", (-2,), False, "predict")
    assert form.step_rule is None and not form.unknown
    expected = published.oracle_metastone(net, ids, prompt, state, tokenizer=tokenizer)
    assert len(expected.positions) > 2
    agrees(form, net, ids, expected)


# -- STEP, Gambit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False], ids=["as training saves it", "state dict alone"])
def test_step(reasoning, tmp_path, wrapped):
    net, tokenizer, ids, prompt = reasoning
    state = published.step_checkpoint(H)
    file = tmp_path / "Qwen3-4B_step_scorer.pt"
    torch.save(state if wrapped else state["model_state_dict"], file)
    form = form_of(file).for_model(H, N)
    assert (form.name, form.kind, form.layers, form.norm, form.at) == ("step", "mlp", (-1,), False, "token")
    assert (form.tensors[0].shape, form.higher_is_better, form.unknown) == ((512, H), True, {})
    agrees(form, net, ids, published.oracle_step(net, ids, prompt, state, tokenizer=tokenizer))


def test_which_steps_step_counts(reasoning):
    """All of a run, and those behind ``</think>``; the last only where something came after it."""
    net, tokenizer, ids, prompt = reasoning
    rule = dict(found(published.step_checkpoint(H)).step_rule)
    assert rule == {
        "rule": "contains", "delimiter": "\n\n", "think_start_id": None, "think_end_id": None, "consecutive": "all"
    }  # fmt: skip
    expected = published.oracle_step(net, ids, prompt, published.step_checkpoint(H), tokenizer=tokenizer)
    texts = [tokenizer.decode([i]) for i in ids]
    positions = [t for t in range(prompt, len(ids)) if rule["delimiter"] in texts[t]]
    assert positions == expected.positions
    assert any(b == a + 1 for a, b in itertools.pairwise(positions))
    end = ids.index(tokenizer.convert_tokens_to_ids("</think>"))
    assert any(t < end for t in positions) and any(t > end for t in positions)
    streamed = published.oracle_step(net, ids, prompt, published.step_checkpoint(H), tokenizer=tokenizer, streamed=True)
    assert positions[-1] == len(ids) - 1 and streamed.positions == positions[:-1]


def test_step_without_a_step(reasoning):
    net, tokenizer, ids, prompt = reasoning
    assert published.oracle_step(net, ids[:prompt], prompt, published.step_checkpoint(H), tokenizer=tokenizer) == (
        None, [], [],
    )  # fmt: skip


def test_metrics_of_numpy_are_all_that_is_unpickled(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    file = tmp_path / "scorer.pt"
    torch.save(published.step_checkpoint(H) | {"metrics": Code()}, file)
    with pytest.raises(ValueError, match=r"scorer\.pt was refused: it is damaged, or holds pickled code"):
        form_of(file)


# -- SWIFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("layers", [None, (2, 3, 4), (1,)], ids=str)
def test_swift(model, ids, gate, layers):
    K = H * (N + 1 if layers is None else len(layers))
    state = published.swift_checkpoint(K, gate=gate)
    form = found(state)
    assert set(form.unknown) == {"layers", "norm"} and form.layers is None and form.width == K
    form = form.for_model(H, N, layers=layers, vocab_size=tiny.VOCAB)
    assert form.layers == (layers or (0, 1, 2, 3, 4)) and "layers" not in form.unknown
    assert (form.name, form.at, form.norm, form.sigmoid) == ("swift", "every", False, False)
    assert (form.kind, form.aggregation) == (("gated_linear", "gated") if gate else ("linear", "mean"))
    expected = published.oracle_swift(model, ids, PROMPT, state, layers=layers)
    assert expected.positions == list(range(PROMPT, len(ids)))
    agrees(form, model, ids, expected)


def test_swift_with_the_final_norm(model, ids):
    state = published.swift_checkpoint(2 * H)
    form = found(state).for_model(H, N, layers=(3, 1), norm=True)  # in ascending order, as theirs
    expected = published.oracle_swift(model, ids, PROMPT, state, layers=(1, 3), apply_norm=True)
    agrees(form, model, ids, expected)
    agrees(
        found(state, {"layers": "[1, 3]", "norm": "true"}).for_model(H, N), model, ids, expected
    )  # as the metadata of a file say
    for layers in ((3, 4), (1, -1)):
        with pytest.raises(ValueError, match="norms the last of hidden_states a second time"):
            found(state).for_model(H, N, layers=layers, norm=True)


def test_swift_of_some_layers_and_nothing_says_which():
    with pytest.raises(
        ValueError, match=f"{2 * H} inputs are 2 of the model's 5 hidden_states, and nothing says which"
    ):
        found(published.swift_checkpoint(2 * H)).for_model(H, N)


def test_swift_on_logits():
    with pytest.raises(ValueError, match="128 inputs are the model's vocabulary: it was trained on logits"):
        found(published.swift_checkpoint(128)).for_model(H, N, vocab_size=128)
    with pytest.raises(ValueError, match="61 inputs are no multiple of the model's hidden size 64"):
        found(published.swift_checkpoint(61)).for_model(H, N)


# -- SingProbe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("layers", [(1, 2, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("output", [0, 9])
def test_singprobe(model, ids, tmp_path, act, layers, output):
    state, config = published.singprobe_checkpoint(H * len(layers)), published.singprobe_config(H, layers, act)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    form = form_of(tmp_path, output=output).for_model(H, N)
    assert (form.name, form.kind, form.layers, form.norm, form.at) == ("singprobe", "mlp", layers, "rms", "every")
    assert (form.activation, form.trained_on, form.output) == (act, "inclusionAI/Ling-3.0-flash", output)
    assert set(form.unknown) == {"aggregation"} and not form.higher_is_better
    agrees(form, model, ids, published.oracle_singprobe(model, ids, PROMPT, state, config=config, output=output))


def test_singprobe_as_its_training_leaves_it(model, ids, tmp_path):
    """``guard_model.pt`` of several processes, and the configuration in ``training_state.json``."""
    state, config = published.singprobe_checkpoint(2 * H), published.singprobe_config(H, (1, 3), "relu")
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "guard_model.pt")
    base = {"name": "base", "hidden_layers": [1, 3], "hidden_size": H}
    training = {"step": 80, "config": {"base_model": base, "singprobe_model": {"arch": "mlp", "activation": "relu"}}}
    (tmp_path / "training_state.json").write_text(json.dumps(training))
    form = form_of(tmp_path / "guard_model.pt", output=8).for_model(H, N)
    assert (form.layers, form.activation, form.trained_on) == ((1, 3), "relu", "base")
    agrees(form, model, ids, published.oracle_singprobe(model, ids, PROMPT, state, config=config, output=8))


def test_singprobe_alone_says_little(model, ids):
    state = published.singprobe_checkpoint(2 * H)
    with pytest.raises(ValueError, match=r"fc2\.weight has 10 outputs .*give output=, 0 to 9"):
        found(state)
    with pytest.raises(ValueError, match=r"output=10: fc2\.weight has 10"):
        found(state, output=10)
    form = found(state, output=7)
    assert set(form.unknown) == {"activation", "layers", "aggregation"} and form.activation == "gelu"
    assert form.higher_is_better, "7 is that the query is safe"
    form = form.for_model(H, N, layers=(0, 2))
    config = published.singprobe_config(H, (0, 2))
    agrees(form, model, ids, published.oracle_singprobe(model, ids, PROMPT, state, config=config, output=7))


def test_singprobe_whose_files_disagree():
    said = {"base_model_layer_ids": "[1, 2, 3]", "hidden_size": "64"}
    with pytest.raises(ValueError, match="128 inputs, and 3 layers .* of hidden_size 64 are 192"):
        found(published.singprobe_checkpoint(128), said, output=0)
    with pytest.raises(ValueError, match="hidden_act='tanh'"):
        found(published.singprobe_checkpoint(128), {"hidden_act": "tanh"}, output=0)


# -- linear probes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "classifier.", "module.probe."])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear(model, ids, prefix, bias):
    state = published.linear_checkpoint(2 * H, bias=bias)
    said = {"layers": "[3, 1]", "at": "token", "sigmoid": "false", "aggregation": "mean", "trained_on": "org/model"}
    form = found({prefix + key: value for key, value in state.items()}, said).for_model(H, N)
    assert (form.name, form.layers, form.trained_on, set(form.unknown)) == ("linear", (3, 1), "org/model", {"norm"})
    expected = published.oracle_linear(model, ids, [7, 12, 13, 30], state, layers=(3, 1), sigmoid=False)
    agrees(form, model, ids, expected)


def test_linear_that_says_nothing(model, ids):
    state = published.linear_checkpoint(H)
    form = found(state)
    assert set(form.unknown) == {"layers", "norm", "at", "aggregation", "sigmoid"}
    form = form.for_model(H, N)
    agrees(form, model, ids, published.oracle_linear(model, ids, [7, 12, 13], state, layers=(-2,), sigmoid=True))
    with pytest.raises(ValueError, match="2 of the model's 5 hidden_states, and nothing says which"):
        found(published.linear_checkpoint(2 * H)).for_model(H, N)
    assert found(published.linear_checkpoint(5 * H)).for_model(H, N).layers == (0, 1, 2, 3, 4)


# -- refused -----------------------------------------------------------------------------------------------------------


def deeper(*sizes):
    pairs = enumerate(itertools.pairwise(sizes))
    return {f"net.{2 * i}.{what}": torch.ones(b, a) if what == "weight" else torch.ones(b)
            for i, (a, b) in pairs for what in ("weight", "bias")}  # fmt: skip


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (published.attention_probe_checkpoint(H), "an attention probe over the sequence"),
        ({"module." + k: v for k, v in published.attention_probe_checkpoint(H).items()}, "an attention probe"),
        (published.sequence_scorer_checkpoint(H), "a transformer over the steps"),
        ({"model_config": {"type": "sequence_transformer"}, "model_state_dict": {"x": torch.ones(1)}}, "over the steps"),
        (published.reprobe_checkpoint(H), "a transformer over the tokens"),
        (torch.nn.GRU(H, 4).state_dict(), "a recurrent network"),
        (deeper(H, 32, 16, 1), "an MLP of 2 hidden layers, and a head has one"),
        ({"dim_reduction.proj.weight": torch.ones(4, H), "base_model.fused_layer.weight": torch.ones(2, 4)}, "not ready"),
        ({"gate_layer.weight": torch.ones(1, H), "gate_layer.bias": torch.ones(1)}, "a gate without a value"),
        ({"fused_layer.weight": torch.ones(1, H), "fused_layer.bias": torch.ones(1)}, "a gate without a value"),
        ({"fused_layer.weight": torch.ones(3, H), "fused_layer.bias": torch.ones(3)}, r"expected \[2, K\]"),
        ({"weight": torch.ones(2, H), "bias": torch.ones(2)}, "weight has 2 outputs"),
        ({"weight": torch.ones(H)}, r"weight is \[64\], expected \[1, K\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_head_is_refused_with_the_reason(state, why):
    with pytest.raises(ValueError, match=why):
        found(state)


def test_unknown_keys_are_listed_beside_those_that_are_known():
    state = {"0.weight": torch.ones(4, H), "0.bias": torch.ones(4), "5.weight": torch.ones(1, 4)}
    with pytest.raises(ValueError, match=r"found 0\.bias 0\.weight 5\.weight; no form that is known .*STEP's \(net\.0"):
        found(state)
    with pytest.raises(ValueError, match="it looks quantised"):
        found({"0.qweight": torch.ones(4, H), "0.scales": torch.ones(4)})
    with pytest.raises(ValueError, match="found no tensor"):
        found({})
    with pytest.raises(ValueError, match="expected tensors by key, found list"):
        found([torch.ones(1)])
    with pytest.raises(ValueError, match="found epoch"):
        found({"epoch": 3})


ALL = {
    "metastone": published.metastone_checkpoint(H),
    "step": published.step_checkpoint(H)["model_state_dict"],
    "swift": published.swift_checkpoint(H),
    "swift_ungated": published.swift_checkpoint(H, gate=False),
    "singprobe": published.singprobe_checkpoint(H, outputs=1),
    "linear": published.linear_checkpoint(H),
}


@pytest.mark.parametrize("name", ALL)
def test_weights_that_are_no_numbers_are_refused(name):
    for key, value in ALL[name].items():
        for bad in (float("nan"), float("inf")):
            spoilt = value.clone()
            spoilt.view(-1)[-1] = bad
            with pytest.raises(ValueError, match=f"{key} holds NaN or infinity"):
                found(ALL[name] | {key: spoilt})
        with pytest.raises(ValueError, match=f"{key} is torch.int8, no plain float"):
            found(ALL[name] | {key: value.to(torch.int8)})


@pytest.mark.parametrize("name", ALL)
def test_shapes_that_do_not_fit_are_refused(name):
    for key, value in ALL[name].items():
        for wrong in (value[None], torch.cat([value, value, value], -1) if value.dim() == 1 else value[:0]):
            with pytest.raises(ValueError, match=r"shapes do not fit together|outputs|gate without a value"):
                found(ALL[name] | {key: wrong})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_tensors_are_copies_in_the_files_dtype(name, dtype):
    state = {key: value.to(dtype) for key, value in ALL[name].items()}
    form = found(state)
    assert all(t.dtype == dtype and t.is_contiguous() for t in form.tensors)
    storages = {value.untyped_storage().data_ptr() for value in state.values()}
    assert not storages & {t.untyped_storage().data_ptr() for t in form.tensors}
    assert form.width == H


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"layers": "[1, 1]"}, "each once"),
        ({"layers": "deep"}, "expected indices of layers"),
        ({"layers": "[]"}, "expected indices of layers"),
        ({"norm": "yes"}, "norm='yes'"),
        ({"at": "start"}, "at='start'"),
        ({"aggregation": "gated"}, "does not go with a head of the form mlp"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"sigmoid": "maybe"}, "sigmoid='maybe'"),
        ({"step_rule": "exact"}, "step_rule='exact'"),
    ],
)
def test_metadata_that_make_no_sense(said, why):
    with pytest.raises(ValueError, match=why):
        found(ALL["step"], said)


def test_metadata_win_over_what_the_form_fixes():
    rule = {"rule": "text", "delimiter": "\n"}
    said = {
        "layers": "[2]",
        "norm": "true",
        "at": "every",
        "activation": "silu",
        "aggregation": "min",
        "sigmoid": "true",
    }
    form = found(ALL["step"], {**said, "step_rule": json.dumps(rule), "trained_on": "org/model", "format": "pt"})
    assert (form.layers, form.norm, form.at, form.activation) == ((2,), True, "every", "silu")
    assert (form.aggregation, form.sigmoid, form.step_rule, form.trained_on) == ("min", True, rule, "org/model")


def test_models_that_a_head_does_not_fit():
    form = found(ALL["metastone"])
    with pytest.raises(ValueError, match="64 inputs are no multiple of the model's hidden size 48"):
        form.for_model(48, N)
    with pytest.raises(ValueError, match=r"layers=\(-2,\): 1 of hidden size 32 are 32 inputs, and the head has 64"):
        form.for_model(32, N)
    with pytest.raises(ValueError, match="the model has hidden_states 0 to 4, so no 5"):
        form.for_model(H, N, layers=(5,))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head.pt", "head.pth", "pytorch_model.bin", "anything.safetensors"])
def test_files(tmp_path, name):
    file = tmp_path / name
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(ALL["swift"], file, metadata={"layers": "[3]"})
    else:
        torch.save(ALL["swift"], file)
    state, metadata = read(file)
    assert set(state) == set(ALL["swift"]) and metadata == ({"layers": "[3]"} if file.suffix == ".safetensors" else {})
    assert form_of(file).layers == ((3,) if file.suffix == ".safetensors" else None)
    assert form_of(tmp_path).name == "swift", "the only file of weights in a directory"


def test_a_models_configuration_beside_a_head_is_not_the_heads(tmp_path):
    torch.save(ALL["step"], tmp_path / "head.pt")
    config = {"model_type": "qwen3", "hidden_size": 9, "hidden_act": "silu", "labels": ["a"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read(tmp_path / "head.pt")[1] == {}


def test_files_that_are_no_heads(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file of weights"):
        read(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"cut\.pt (cannot be read as a checkpoint|was refused)"):
        read(tmp_path / "cut.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read as a checkpoint"):
        read(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds cut\.pt, cut\.safetensors: give one of them"):
        read(tmp_path)
    many = {f"layers.{i}.weight": torch.ones(1) for i in range(201)}
    safetensors.torch.save_file(many, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds 201 tensors: a model, no head"):
        read(tmp_path / "model.safetensors")
    torch.save(published.reprobe_checkpoint(H), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: .*a transformer over the tokens"):
        form_of(tmp_path / "weights.pth")


def test_a_pickled_pipeline_of_scikit_learn_is_refused(tmp_path):
    """As LYNX keeps its probe; written by hand, as a pickle that names the class is all that it takes."""
    (tmp_path / "probe.pkl").write_bytes(b"\x80\x02csklearn.pipeline\nPipeline\n)\x81.")
    with pytest.raises(ValueError, match="a pickled scikit-learn object"):
        read(tmp_path / "probe.pkl")
