"""ReflectiveModel: best of N on a tiny byte-level model, and on the embedded default."""

import math
import re
import shutil
import string
import sys

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

import reflective as rf
from reflective.model import Config

DELIMITERS = list("aeiou" + string.digits)  # a random byte ends a step now and then


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def told(message):
    return pytest.raises(ValueError, match=re.escape(message))


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
    assert small.reader.ends(tokens, steps) == [len(small.tokenizer.decode(tokens[: s + 1])) for s in steps]


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


def test_a_head_with_no_room_in_the_models_dtype(small, tmp_path):
    small.save_pretrained(tmp_path)
    head = tiny.head()
    head[0].weight[0, 0] = 1e5
    head.save_pretrained(tmp_path)
    assert rf.ReflectiveModel.from_pretrained(tmp_path, dtype=torch.bfloat16).head.dtype == torch.bfloat16
    with told("head: 0.weight has no room in torch.float16"):
        rf.ReflectiveModel.from_pretrained(tmp_path, dtype=torch.float16)


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
    monkeypatch.setattr("reflective.checkpoints.default.converted", lambda fetch: tmp_path / "base")
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
    ("given", "message"),
    [
        ({"question": ""}, "question: it is empty"),
        ({"question": " \n"}, "question: it is empty"),
        ({"question": ["a", ""]}, "question[1]: it is empty"),
        ({"question": None}, "question=None: expected a text, a list of messages, or a list of these"),
        ({"question": b"x"}, "question=b'x': expected a text"),
        ({"question": 5}, "question=5: expected a text"),
        ({"question": {"role": "user"}}, "question={'role': 'user'}: expected a text"),
        ({"question": ["a", None]}, "question[1]=None: expected a text or a list of messages"),
        ({"question": "\ud800"}, "question: character 3 is '\\ud800', half of a surrogate pair"),
        ({"question": "a" * 600}, "question: its prompt has 604 tokens and the model 512 positions"),
        ({"question": ["a", "b" * 508]}, "question[1]: its prompt has 512 tokens and the model 512 positions"),
        ({"n": 0}, "n=0: at least one candidate"),
        ({"n": 2.5}, "n=2.5: expected a number of candidates, an integer"),
        ({"n": "3"}, "n='3': expected a number of candidates"),
        ({"n": 10**9}, "n=1000000000: more than 65536 candidates"),
        ({"effort": "extreme"}, "effort='extreme'; expected one of low, medium, high"),
        ({"effort": ["low"]}, "effort=['low']; expected one of low, medium, high"),
        ({"strategy": "best"}, "strategy='best'; expected one of best_of_n"),
        ({"strategy": ["best_of_n"]}, "strategy=['best_of_n']; expected one of best_of_n"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": None}, "max_new_tokens=None: expected an integer"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0: expected an integer"),
        ({"temperature": -1}, "temperature=-1 must be finite, and not negative"),
        ({"temperature": None}, "temperature=None must be finite"),
        ({"temperature": math.nan}, "temperature=nan must be finite"),
        ({"top_p": 1.1}, "top_p=1.1 must lie in [0, 1]"),
        ({"top_p": "1"}, "top_p='1' must lie in [0, 1]"),
        ({"temperature": "hot"}, "temperature='hot' must be finite"),
        ({"temperature": []}, "temperature: 0 for 8 candidates; give one, or at most one a candidate"),
        ({"temperature": [1.0] * 3, "n": 2}, "temperature: 3 for 2 candidates; give one, or at most one a candidate"),
        ({"temperature": [1.0, -1]}, "temperature[1]=-1 must be finite, and not negative"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"top_k": 2.5}, "top_k=2.5: expected an integer"),
        ({"min_p": 1.5}, "min_p=1.5 must lie in [0, 1]"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be finite, and above 0; 1 is none"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf must be finite"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5 must lie in [-2, 2]"),
        ({"frequency_penalty": None}, "frequency_penalty=None must lie in [-2, 2]"),
        ({"min_tokens": -1}, "min_tokens=-1 must not be negative"),
        ({"logit_bias": [1]}, "logit_bias=[1]: expected a mapping from token ids to numbers"),
        ({"logit_bias": {"a": 1}}, "logit_bias: token id='a': expected an integer"),
        ({"logit_bias": {5: math.inf}}, "logit_bias[5]=inf: expected a finite number"),
        ({"logit_bias": {5: 1.0, 10**6: 1.0}}, "logit_bias: 1000000 is no token; ids are integers from 0 to "),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"seed": [-1]}, "seed=-1 must not be negative"),
        ({"seed": 1.5}, "seed=1.5: expected an integer, or a list of one for each question"),
        ({"seed": "1"}, "seed='1': expected an integer, or a list"),
        ({"seed": torch.tensor(1)}, "seed=tensor(1): expected an integer, or a list"),
        ({"seed": [1, 2]}, "seed: 2 seeds for 1 questions"),
        ({"stop": ""}, "stop='': expected a list of texts, none of them empty"),
        ({"stop": [""]}, "stop=['']: expected a list of texts, none of them empty"),
        ({"stop": 5}, "stop=5: expected a list of texts"),
        ({"stop": iter(["a"])}, ": expected a list of texts"),  # which would be empty when it is looked at again
        ({"thinking_budget": -1}, "thinking_budget=-1 must not be negative"),
        ({"thinking_budget": 1.5}, "thinking_budget=1.5: expected an integer"),
        ({"batch_rows": 0}, "batch_rows=0 must be at least 1"),
        ({"batch_rows": 1.5}, "batch_rows=1.5: expected an integer"),
        ({"schedule": "now"}, "schedule='now'"),
        ({"on_step": 5}, "on_step=5: expected a function"),
    ],
)
def test_bad_input(small, monkeypatch, given, message):
    monkeypatch.setattr(small.model, "forward", lambda *args, **kwargs: pytest.fail("generation has started"))
    with told(message):
        small.generate(**{"question": "x", **given})


def test_odd_but_good_input(small):
    same = {"n": 2, "max_new_tokens": 4, "seed": 0}
    assert small.generate([], **same) == []
    one = small.generate("x", **same)
    assert small.generate("x", **same, stop=None).candidates == one.candidates
    assert (
        small.generate(np.array(["x"]), **{**same, "n": np.int64(2), "seed": np.int64(0)})[0].candidates
        == one.candidates
    )
    greedy = small.generate("x", n=3, max_new_tokens=4, temperature=0, seed=0)
    assert len({tuple(c.token_ids) for c in greedy.candidates}) == 1 and greedy.best is greedy.candidates[0]
    (long,) = small.generate("b" * 500, n=1, max_new_tokens=64, seed=0).candidates
    assert (len(long.token_ids), long.status) == (8, "length"), "504 of 512 positions are the prompt's"


def test_a_conversation_is_a_question(small):
    def ask(question):
        found = small.generate(question, n=2, max_new_tokens=4, seed=0)
        return [g.prompt for g in found] if isinstance(found, list) else found.prompt

    user = {"role": "user", "content": "x"}
    parts = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}
    assert ask([user]) == "Q: x\n" and ask([[user], "z", [parts]]) == ["Q: x\n", "Q: z\n", "Q: xy\n"]
    image = {"role": "user", "content": [parts["content"][0], {"type": "image_url", "image_url": {"url": "x"}}]}
    for question, message in (
        ([image], "question[0].content[1] is of type 'image_url'; text alone is read"),
        (["z", [image]], "question[1][0].content[1] is of type 'image_url'"),
        ([{"role": "user", "content": None}], "question: it is empty"),
        ([{"role": "user", "content": 5}], "question[0].content: expected a text or a list of text parts, not int"),
        ([{"role": "user"}], "question[0] has no content"),
        ([{"content": "x"}], "question[0]: role=None; expected"),
        (
            [user, user],
            "question: the roles of its messages are ['user', 'user'], but the checkpoint's prompt takes one",
        ),
    ):
        with told(message):
            ask(question)

    core = Tokenizer.from_str(small.tokenizer.backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    )
    model = rf.ReflectiveModel(small.model, tokenizer, small.head, Config(rule="text", delimiter=DELIMITERS))
    called = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    assert model.format([user, called, parts]) == "user:x;assistant:;user:xy;" and model.format("x") == "user:x;"
    with told("question: the tokenizer's chat template refuses it: no tools"):
        model.generate([user, {"role": "tool", "content": "7"}])


@pytest.mark.parametrize(
    ("prompt", "responses", "message"),
    [
        ("p", [], "responses: expected at least one"),
        ("p", "abc", "responses='abc': expected a list of texts"),
        ("p", None, "responses=None: expected a list of texts"),
        ("p", ["a", ""], "responses[1]: it is empty"),
        ("p", ["a", None], "responses[1]=None: expected a text"),
        ("p", ["\udc00"], "responses[0]: character 0 is '\\udc00', half of a surrogate pair"),
        (None, ["a"], "prompt=None: expected a list of texts"),
        (["p", 7], ["a", "b"], "prompt[1]=7: expected a text"),
        (["p"], ["a", "b"], "prompt: 1 prompts for 2 responses"),
    ],
)
def test_texts_that_cannot_be_scored(small, prompt, responses, message):
    with told(message):
        small.score(prompt, responses)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=64, n_layer=3, n_head=4),
        OPTConfig(hidden_size=64, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64),
    ],
    ids=["gpt2", "opt"],
)
def test_learned_positions_have_an_end(small, config):
    config.vocab_size, config.max_position_embeddings = len(small.tokenizer), 32
    model = rf.ReflectiveModel(
        AutoModelForCausalLM.from_config(config).eval(), small.tokenizer, small.head, small.config
    )
    (last,) = model.score("p", ["na" * 15 + "n"])
    assert last.step_scores
    for prompt, responses, message in (
        ("p", ["a", "a" * 32], "responses[1]: with its prompt 33 tokens, and the model has 32 positions"),
        ("", ["a" * 33], "responses[0]: with its prompt 33 tokens"),
    ):
        with told(message):
            model.score(prompt, responses)
    assert len(model.generate("x" * 20, n=1, seed=0).candidates[0].token_ids) <= 8  # behind 24


def test_rotary_positions_go_on(small):
    """What was decoded up to the last one may be more tokens when it is read again."""
    (found,) = small.score("p", ["a" * 600])
    assert found.error is None and len(found.token_ids) == 600


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[1]], [[2], [3]], "prompts: 1 for 2 responses"),
        ([[1], [1]], [[2], []], "responses[1]: it is empty"),
        ([1], [2], "prompts[0]=1: expected a list of token ids"),
        ([[1]], [[2, 258]], "responses[0]: 258 is no token; ids are integers from 0 to 257"),
        ([[-1]], [[2]], "prompts[0]: -1 is no token"),
        ([[1]], [[2.0]], "responses[0]: 2.0 is no token"),
        ([[1]], ["ab"], "responses[0]='ab': expected a list of token ids"),
    ],
)
def test_ids_that_cannot_be_scored(small, prompts, responses, message):
    with told(message):
        small.score_tokens(prompts, responses)


def test_ids_in_other_forms(small):
    one = small.score_tokens([[5]], [[66, 67]])
    for form in (torch.tensor, np.array):
        assert small.score_tokens(form([[5]]), form([[66, 67]])) == one
    with told("batch_tokens=0 must be at least 1"):
        small.score_tokens([[5]], [[66]], batch_tokens=0)


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
