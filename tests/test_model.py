"""ReflectiveModel: best of N on a tiny byte-level model, and on the embedded default."""

import math
import shutil
import string
import sys

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import reflective as rf
from reflective.model import Config

DELIMITERS = list("aeiou" + string.digits)  # a random byte ends a step now and then


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(**{**tiny._SIZES, "vocab_size": len(tokenizer), "eos_token_id": 1})
    net = AutoModelForCausalLM.from_config(config).eval()
    settings = Config(rule="text", delimiter=DELIMITERS, prompt="Q: {question}\n", answer="([0-9])")
    return rf.ReflectiveModel(net, tokenizer, tiny.head(), settings)


@pytest.mark.parametrize(("effort", "n"), [("low", 2), ("medium", 8), ("high", 32)])
def test_effort_is_the_number_of_candidates(small, effort, n):
    result = small.generate("why?", effort, max_new_tokens=3)
    assert len(result.candidates) == n
    assert len(small.generate("why?", effort, n=3, max_new_tokens=2).candidates) == 3


def test_candidates_text_scores_and_spans(small):
    result = small.generate("how?", n=32, max_new_tokens=80, temperature=1.0, top_p=1.0, seed=1)
    assert result.prompt == "Q: how?\n"
    assert sum(len(c.step_scores) for c in result.candidates) > 20
    for c in result.candidates:
        assert len(c.step_spans) == len(c.step_scores)
        if c.step_scores:
            assert c.score == pytest.approx(math.exp(sum(map(math.log, c.step_scores)) / len(c.step_scores)), rel=1e-5)
            assert c.step_spans[0][0] == 0
        for (_, end), (begin, _) in zip(c.step_spans, c.step_spans[1:], strict=False):
            assert end == begin
        for begin, end in c.step_spans:
            assert c.text[end - 1] in DELIMITERS, c.text[begin:end]
        assert c.answer == next((x for x in c.text if x in string.digits), None)
    assert result.best.score == max(c.score for c in result.candidates)
    assert (result.text, result.score) == (result.best.text, result.best.score)


def test_seed_repeats_a_run_and_finished_text_agrees(small):
    a, b = (small.generate("what?", n=4, max_new_tokens=40, temperature=1.0, seed=7) for _ in range(2))
    assert [c.text for c in a.candidates] == [c.text for c in b.candidates]
    assert a.candidates == b.candidates
    rows = [torch.cat([small.encode(a.prompt)[0], torch.tensor(c.token_ids)]) for c in a.candidates]
    finished = rf.score(small.model, small.head, small.steps, rows, prompt_lengths=small.encode(a.prompt).shape[1])
    assert finished.score.tolist() == pytest.approx([c.score for c in a.candidates], rel=1e-4)


def test_score_text(small):
    one, two = small.score("Q: x\n", ["nabecod!", "zzz"])
    assert len(one.step_scores) == 3 and 0 < one.score < 1 and one.text == "nabecod!"
    assert (two.score, two.step_scores) == (0.0, [])
    assert [one.text[a:b] for a, b in one.step_spans] == ["na", "be", "co"]


def test_text_scored_whole_begins_as_the_tokenizer_begins_it(small, monkeypatch):
    given = []
    monkeypatch.setattr("reflective.model.score", lambda *args, **kwargs: given.append(args[3]) or 1 / 0)
    core = Tokenizer.from_str(small.tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    model = rf.ReflectiveModel(small.model, with_bos, small.head, small.config)
    for prompt, starts in (("", [1]), ("p", [1, with_bos.encode("p", add_special_tokens=False)[0]])):
        with pytest.raises(ZeroDivisionError):
            model.score(prompt, ["abc"])
        ids = given.pop()[0].tolist()
        assert ids == starts + with_bos.encode("abc", add_special_tokens=False)


def test_spans_of_many_steps_are_those_of_whole_prefixes(small):
    text = "naïve 中文 é a b — e\U0001f600o " * 20
    tokens = small.tokenizer(text).input_ids
    steps = [i for i, t in enumerate(small.tokenizer.convert_ids_to_tokens(tokens)) if t in DELIMITERS]
    assert len(steps) > 60
    assert small._ends(tokens, steps) == [len(small.tokenizer.decode(tokens[: s + 1])) for s in steps]


def test_a_broken_config_is_named(small, tmp_path):
    small.save_pretrained(tmp_path)
    for content in ('{"rule": "text",', '{"rules": "text"}'):
        (tmp_path / "reflective.json").write_text(content)
        with pytest.raises(ValueError, match=r"reflective\.json is not a valid"):
            rf.ReflectiveModel.from_pretrained(tmp_path)


def test_save_and_load(small, tmp_path):
    small.save_pretrained(tmp_path)
    again = rf.ReflectiveModel.from_pretrained(tmp_path)
    assert again.config == small.config
    a, b = (m.generate("same?", n=2, max_new_tokens=20, seed=3) for m in (small, again))
    assert [c.token_ids for c in a.candidates] == [c.token_ids for c in b.candidates]
    assert a.score == pytest.approx(b.score, rel=1e-5)
    (tmp_path / "score_module.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="score_module"):
        rf.ReflectiveModel.from_pretrained(tmp_path)


@pytest.fixture
def adapted(small, tmp_path):
    """The small model with an adapter; ``base`` and ``tuned`` hold the one and, with a head of its own, the other."""
    peft = pytest.importorskip("peft")
    small.save_pretrained(tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    layers = ["q_proj", "v_proj", "down_proj"]
    tuned = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "tuned")
    tiny.head(seed=1).save_pretrained(tmp_path / "tuned")
    shutil.copy(tmp_path / "base" / "reflective.json", tmp_path / "tuned")
    return tuned.eval()


@torch.no_grad()
def logits_of(net):
    return net(torch.arange(2, 42)[None]).logits


@pytest.mark.parametrize("alone", [False, True], ids=["head", "path"])
def test_an_adapter_beside_the_head_is_merged(small, adapted, tmp_path, alone):
    """As ``head``, or as ``path``: then its configuration names the model."""
    given = {} if alone else {"head": tmp_path / "tuned"}
    model = rf.ReflectiveModel.from_pretrained(tmp_path / ("tuned" if alone else "base"), **given)
    assert type(model.model) is type(small.model) and not hasattr(model.model, "peft_config")
    assert [name for name, _ in model.model.named_modules()] == [name for name, _ in small.model.named_modules()]
    assert all(p.requires_grad for p in model.model.parameters()) and not model.model.training
    torch.testing.assert_close(logits_of(model.model), logits_of(adapted), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits_of(adapted), logits_of(small.model), rtol=0.1)

    rows = torch.arange(2, 250)[None]
    expected = rf.score(adapted.get_base_model(), tiny.head(seed=1), model.steps, rows)
    assert rf.score(model.model, model.head, model.steps, rows).step_scores[0].tolist() == pytest.approx(
        expected.step_scores[0].tolist(), rel=1e-5
    )
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    again = rf.ReflectiveModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits_of(again.model), logits_of(model.model))


def test_a_merged_weight_is_rounded_once(adapted, tmp_path):
    model = rf.ReflectiveModel.from_pretrained(tmp_path / "base", head=tmp_path / "tuned", dtype=torch.bfloat16).model
    for name, layer in adapted.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            exact = (
                layer.base_layer.weight.bfloat16().float()
                + 2 * layer.lora_B.default.weight @ layer.lora_A.default.weight
            )
            assert torch.equal(model.get_submodule(name).weight, exact.bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_default_model_takes_an_adapter(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr("reflective.default.converted", lambda fetch: tmp_path / "base")
    model = rf.ReflectiveModel.default(head=tmp_path / "tuned")
    torch.testing.assert_close(logits_of(model.model), logits_of(adapted), rtol=1e-5, atol=1e-6)


def test_adapters_that_cannot_be_merged(small, adapted, tmp_path, monkeypatch):
    import peft

    adapted.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="holds a model and an adapter"):
        rf.ReflectiveModel.from_pretrained(tmp_path / "base")
    (tmp_path / "base" / "adapter_config.json").unlink()
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(net, prompt).save_pretrained(tmp_path / "prompt")
    small.head.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="changes inputs, not weights"):
        rf.ReflectiveModel.from_pretrained(tmp_path / "base", head=tmp_path / "prompt")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        rf.ReflectiveModel.from_pretrained(tmp_path / "base", head=tmp_path / "tuned")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 0}, "n=0: at least one candidate"),
        ({"effort": "extreme"}, "effort='extreme'; expected one of low, medium, high"),
        ({"question": " "}, "question: it is empty"),
    ],
)
def test_bad_input(small, kwargs, message):
    with pytest.raises(ValueError, match=message):
        small.generate(**{"question": "x", **kwargs})


def test_the_default_model_scores_its_steps(default_model):
    """SmolLM2 spells '.\\n\\n' in several tokens; the stream, finished text and a second pass agree on every step."""
    result = default_model.generate("7 + 5 + 6", n=3, max_new_tokens=48, seed=0)
    steps = [c.text[a:b] for c in result.candidates for a, b in c.step_spans]
    assert len(steps) >= 6 and all(s.endswith(".\n\n") for s in steps)
    assert default_model.steps.rule == "text"
    for c in result.candidates:
        (again,) = default_model.score(result.prompt, [c.text])
        if again.token_ids == c.token_ids:
            assert again.step_scores == pytest.approx(c.step_scores, rel=1e-3)
            assert again.step_spans == c.step_spans


def test_the_default_model_answers_when_its_thinking_budget_is_used_up(default_model):
    for c in default_model.generate("7 + 5 + 6", n=3, max_new_tokens=32, seed=0, thinking_budget=4).candidates:
        thoughts, _, answer = c.text.partition(default_model.config.think_end)
        assert len(default_model.tokenizer(thoughts).input_ids) == 4
        assert c.answer is not None and c.answer in answer
