"""TRL's own GRPO and RLOO trainers on our reward, and its stepwise format from and to rollouts."""

import copy
import json
import math
import os
import random

os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import tiny
import torch
from test_model import DELIMITERS, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

import reflective as rf
from reflective.engines.hf.internals import checkpointing_setting
from reflective.integrations.trl import SPRMReward, evaluating, from_stepwise, to_stepwise
from reflective.model import Config
from reflective.train.data import read_rollouts, write_rollouts

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL, transformers and torch announce what they will deprecate
TEXTS = ["ab", "a longer prompt", "x 1 y", "why?"]
CHATS = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": text}] for text in TEXTS]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{{ mark }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def reflective(seed=0, **changes):
    """A model whose states, and hence scores, differ from token to token, with dropout where it trains."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    sizes = {**tiny._SIZES, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "eos_token_id": 1}
    net = LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.4))
    with torch.no_grad():
        net.get_input_embeddings().weight *= 20
    return rf.ReflectiveModel(
        net, tokenizer, tiny.head(), Config(**{"rule": "text", "delimiter": DELIMITERS} | changes)
    )


def modes(net):
    return [(type(m), m.training, len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in net.modules()]


# -- the reward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prompts", "scorer", "aggregation"),
    [
        ("GRPO", TEXTS, "another", "geometric_mean"),
        ("GRPO", CHATS, "policy", "min"),
        ("GRPO", TEXTS, "lora", "mean"),
        ("RLOO", TEXTS, "policy", "geometric_mean"),
        ("RLOO", CHATS, "another", "last"),
    ],
)
def test_trainers_are_rewarded_by_the_score_of_what_they_sampled(tmp_path, kind, prompts, scorer, aggregation):
    trl = pytest.importorskip("trl", minversion="1.16")
    from datasets import Dataset

    policy = reflective()
    model = reflective(seed=1) if scorer == "another" else policy
    reward = SPRMReward(model, aggregation, chat_template_kwargs={"mark": "!"})
    expected, weights = [], []

    class Trainer(getattr(trl, f"{kind}Trainer")):
        def _tokenize_prompts(self, prompts):
            found = super()._tokenize_prompts(prompts)
            self.prompt_ids = found[0]
            return found

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids):
            before, net = modes(model.model), copy.deepcopy(model.model).eval()
            assert (scorer == "another") != model.model.training
            rows = [torch.tensor([*p, *c]) for p, c in zip(self.prompt_ids, completion_ids, strict=True)]
            found = rf.score(net, model.head, model.steps, rows, prompt_lengths=[len(p) for p in self.prompt_ids])
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
            assert modes(model.model) == before
            assert rewards.flatten().tolist() == pytest.approx(found.aggregate(aggregation).tolist(), rel=1e-5)
            expected.extend(rewards.flatten().tolist())
            weights.append(sum(p.double().sum().item() for p in policy.model.parameters() if p.requires_grad))
            return rewards

    peft_config = None
    if scorer == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    if scorer == "another":
        model.model.eval()
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=3,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=24, logging_steps=1, save_strategy="no",
        learning_rate=1e-2, beta=0.0, **checkpointing_setting(scorer == "policy"), chat_template_kwargs={"mark": "!"},
    )  # fmt: skip
    trainer = Trainer(
        policy.model, reward, settings, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=policy.tokenizer, peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3 and len(expected) == 24
    assert len(set(weights)) == 3, "the policy of the moment is another at every step"
    assert len({round(r, 6) for r in expected}) > 8 and min(expected) >= 0 and max(expected) < 1
    logged = [e[f"rewards/sprm_{aggregation}/mean"] for e in trainer.state.log_history if "reward" in e]
    assert logged == pytest.approx([sum(expected[i : i + 8]) / 8 for i in (0, 8, 16)], rel=1e-4)


def test_reward_leaves_the_policy_as_it_was_after_a_failure():
    model = reflective()
    model.model.train()
    model.model.model.layers[1].eval()  # frozen by its owner
    before = modes(model.model)
    ids = model.tokenizer(["a 1 b 2", "c 3 d"]).input_ids
    reward = SPRMReward(model)
    assert all(0 < r < 1 for r in reward(["p", "q"], ["a 1 b 2", "c 3 d"], ids))
    assert modes(model.model) == before
    with pytest.raises(ValueError, match="1000000 is no token"):
        reward(["p"], [[]], [[10**6]])
    assert modes(model.model) == before
    reward.model = rf.ReflectiveModel(model.model, model.tokenizer, tiny.head(torch.bfloat16), model.config)
    with pytest.raises(ValueError, match="head"):
        reward(["p"], ["a 1 b 2"], ids[:1])
    assert modes(model.model) == before
    with pytest.raises(ZeroDivisionError), evaluating(model.model):
        assert not model.model.training
        1 / 0  # noqa: B018
    assert modes(model.model) == before


def test_reward_without_a_score_is_none_and_without_a_step_zero():
    model = reflective()
    ids = model.tokenizer(["x 1 y 2", "zzz", "w 7"]).input_ids
    with torch.no_grad():
        model.model.get_input_embeddings().weight[ids[2][0]] = torch.nan
    some, none, bad = SPRMReward(model)(["p"] * 3, ["x 1 y 2", "zzz", "w 7"], ids)
    assert 0 < some < 1 and none == 0.0 and bad is None


def test_reward_refuses_what_it_cannot_score():
    model = reflective()
    with pytest.raises(ValueError, match="aggregation='best'"):
        SPRMReward(model, "best")
    with pytest.raises(ValueError, match="completion_ids: none for 1 prompts"):
        SPRMReward(model)(["p"], ["abc"])
    with pytest.raises(ValueError, match="reads them as 'abc', the trainer's as 'xyz'"):
        SPRMReward(model)(["p"], ["xyz"], model.tokenizer(["abc"]).input_ids)


def test_reward_of_nothing():
    reward = SPRMReward(reflective())
    assert reward([], [], []) == []
    ids = reward.model.tokenizer(["a 1 b 2"]).input_ids
    assert reward(["p", ""], ["", ""], [[], []]) == [0.0, 0.0] and reward([""], [""], [[]]) == [0.0]
    none, some, bare = reward(["", "p", ""], ["", "a 1 b 2", "a 1 b 2"], [[], *ids, *ids])
    assert none == 0.0 and [some] == reward(["p"], ["a 1 b 2"], ids) and 0 < bare < 1
    with pytest.raises(ValueError, match="reads them as 'a 1 b 2', the trainer's as 'x'"):
        reward(["p"] * 2, ["", "x"], [[], *ids])


CALLED = [CHATS[0][1], {"role": "assistant", "content": None, "tool_calls": []}, CHATS[1][1]]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
IMAGE = [CHATS[0][0], {"role": "user", "content": [{"type": "image", "image": object()}, *PARTS[0]["content"]]}]


def test_reward_behind_messages_without_content_and_in_parts():
    model = reflective()
    model.model.eval()
    ids = model.tokenizer(["a 1 b 2"]).input_ids
    said = [[{"role": "assistant", "content": None}]]

    def same(prompt, text):
        (expected,) = model.score_tokens([model.tokenizer(text).input_ids], ids)
        assert SPRMReward(model)([prompt], said, ids) == pytest.approx([expected.score], rel=1e-5)

    model.tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    same(CALLED, "user:ab;assistant:;user:a longer prompt;")
    same(PARTS, "user:ab;")
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% elif m.content is defined %}"
        "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% else %}-{% endif %}{% endfor %}"
    )
    # A template that knows of these is the trainer's, and gets them as they are: by transformers 5.17 with None, which this one
    # does not take, later ones without.
    try:
        text = model.tokenizer.apply_chat_template(CALLED, tokenize=False)
        assert text == "ab-a longer prompt"
    except TypeError:
        text = "aba longer prompt"
    same(CALLED, text)
    same(PARTS, "<a><b>")
    model.tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    with pytest.raises(ValueError, match="prompts: the tokenizer's chat template refuses them: no tools"):
        SPRMReward(model)([CALLED], said, ids)


@pytest.mark.parametrize(
    ("prompts", "given", "message"),
    [
        (["p", IMAGE], {}, r"prompts\[0\]='p': expected texts, or conversations of role and content, all of one kind"),
        ([None, CHATS[0]], {}, r"prompts\[0\]=None: expected texts"),
        ([CHATS[0], []], {}, r"prompts\[1\]=\[\]: expected texts"),
        ([CHATS[0], IMAGE], {}, r"prompts\[1\]\[1\].content holds a part of type 'image': SPRMReward reads text alone"),
        ([CHATS[0], CHATS[1]], {"images": [None, [object()]]}, "images: SPRMReward reads text alone"),
        ([CHATS[0], CHATS[1]], {"image": [object(), None]}, "image: SPRMReward reads text alone"),
        (TEXTS[:2], {"completion_ids": [[5], None]}, r"completion_ids\[1\]=None: expected a list of token ids"),
        (TEXTS[:2], {"completion_ids": [[5]]}, "completion_ids: 1 for 2 prompts"),
        (TEXTS[:2], {"completions": []}, "completions: 0 for 2 prompts"),
    ],
)
def test_reward_refuses_prompts_by_name(prompts, given, message):
    given = {"completions": [[{"role": "assistant", "content": "x"}]] * 2, "completion_ids": [[5], [6]], **given}
    with pytest.raises(ValueError, match=message):
        SPRMReward(reflective())(prompts, **given)
    columns = {"images": [None, []], "image": None}
    assert len(SPRMReward(reflective())(TEXTS[:2], [[]] * 2, [[5], [6]], **columns)) == 2, "columns without one"


# -- stepwise supervision ----------------------------------------------------------------------------------------------


def rollouts_of(model, tmp_path):
    """As ``reflective train --data`` reads them: drawn twice, without a verdict, ended and unended, with and without steps."""
    r = random.Random(0)
    lines = []
    for i in range(12):
        text = "".join(r.choice("bcdé x1ae。2") for _ in range(20))
        ids = model.tokenizer(text).input_ids + [1] * (i % 2)
        lines.append({"prompt": f"q{i % 4}", "response_ids": ids, "outcome": [0, 1, None][i % 3], "count": 1 + i % 2})
    lines.append({"prompt": "q", "response": "xyz", "outcome": 1})
    lines.append({"prompt": "q", "response_ids": [1], "outcome": 0})
    file = tmp_path / "rollouts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return read_rollouts(file, model.tokenizer)


def steps_of(model, rollouts):
    """``(prompt and response without end-of-sequence, step-tokens within, outcome, count)`` of every judged trajectory."""
    found = []
    for i in range(len(rollouts)):
        ids, n = rollouts.ids(i).tolist(), int(rollouts.prompt_length[i])
        steps = model.steps.mask([ids], prompt_lengths=[n])[0].nonzero().flatten().tolist()
        outcome = float(rollouts.outcome[i])
        if not math.isnan(outcome) and ids[n:] != [1]:
            found.append((ids[:-1] if ids[-1] == 1 else ids, steps, outcome, int(rollouts.count[i])))
    return sorted(found)


def test_stepwise_and_back_has_the_same_trajectories_and_steps(tmp_path):
    model = reflective()
    rollouts = rollouts_of(model, tmp_path)
    records = list(to_stepwise(rollouts, model))
    assert len(records) == int(sum(count for *_, count in steps_of(model, rollouts))) > 12
    for record in records:
        assert len(set(record["labels"])) == 1 and len(record["labels"]) == len(record["completions"])
        assert all(step[-1] in DELIMITERS for step in record["completions"][:-1])
    assert from_stepwise(records, tmp_path / "back.jsonl", model) == len(records)
    back = read_rollouts(tmp_path / "back.jsonl", model.tokenizer)
    assert steps_of(model, back) == steps_of(model, rollouts)
    write_rollouts(back, tmp_path / "again.jsonl", model.tokenizer)
    assert steps_of(model, read_rollouts(tmp_path / "again.jsonl", model.tokenizer)) == steps_of(model, back)


def test_stepwise_from_trl_has_its_separator_between_steps(tmp_path):
    model = reflective(delimiter="\n")
    records = [
        {
            "prompt": "9.8 or 9.11?",
            "completions": ["11 is greater than 8.", "Hence, 9.11 > 9.8."],
            "labels": [True, False],
        },
        {"prompt": "1 + 1", "completions": ["2"], "labels": [1]},
        {"prompt": "two steps in one", "completions": ["a\nb", "c"], "labels": [True, True]},
    ]
    file = tmp_path / "trl.jsonl"
    with pytest.warns(UserWarning, match=r"1 of 3 records, the first of them number 3"):
        assert from_stepwise(records, file, model, separator="\n") == 2
    rollouts = read_rollouts(file, model.tokenizer)
    assert rollouts.outcome.tolist() == [0, 1]
    text = "9.8 or 9.11?11 is greater than 8.\nHence, 9.11 > 9.8.\n"
    assert model.tokenizer.decode(rollouts.ids(0)) == text
    ids, mask, lengths = rollouts.padded([0], 0)
    ends = model.steps.mask(ids, mask, lengths)[0].nonzero().flatten().tolist()
    assert ends == [i for i, c in enumerate(text) if c == "\n"]
    assert not list(tmp_path.glob("*.unfinished"))


def test_stepwise_refuses_bad_records(tmp_path):
    model, file = reflective(delimiter="\n"), tmp_path / "x.jsonl"
    good = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}
    for change, message in (
        ({"prompt": None}, "record 2: prompt=None"),
        ({"completions": []}, "record 2: completions="),
        ({"labels": [True]}, "record 2: labels=.*2 steps"),
        ({"labels": [True, 0.5]}, "record 2: labels="),
    ):
        with pytest.raises(ValueError, match=message):
            from_stepwise([good, good | change], file, model, separator="\n")
    with pytest.raises(ValueError, match=r"separator='': the steps of 1 of 1 records.*end in \['\\n'\]"):
        from_stepwise([good], file, model)
    assert not file.exists()


def test_a_beginning_of_sequence_token_stays_the_only_one(tmp_path):
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    model = reflective()
    core = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<pad>", pad_token="<pad>", eos_token="<eos>")
    model = rf.ReflectiveModel(model.model, tokenizer, model.head, model.config)
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "xa y", "outcome": 1}\n')
    rollouts = read_rollouts(tmp_path / "a.jsonl", tokenizer)
    assert rollouts.ids(0)[0] == 0
    records = list(to_stepwise(rollouts, model))
    assert records == [{"prompt": "p", "completions": ["xa", " y"], "labels": [True, True]}]
    from_stepwise(records, tmp_path / "b.jsonl", model)
    assert torch.equal(read_rollouts(tmp_path / "b.jsonl", tokenizer).tokens, rollouts.tokens)


def test_trl_trains_its_prm_on_our_steps(tmp_path):
    prm = pytest.importorskip("trl.experimental.prm", reason="TRL has no PRMTrainer after 1.13")
    from datasets import Dataset

    model = reflective()
    rollouts = rollouts_of(model, tmp_path)
    records = list(to_stepwise(rollouts, model))
    settings = prm.PRMConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=2,
        per_device_train_batch_size=4, logging_steps=1, save_strategy="no", step_separator="", learning_rate=1e-3,
    )  # fmt: skip
    torch.manual_seed(0)
    net = LlamaForTokenClassification(model.model.config)
    trainer = prm.PRMTrainer(net, settings, train_dataset=Dataset.from_list(records), processing_class=model.tokenizer)
    for record, row in zip(records, trainer.train_dataset, strict=True):
        prompt = len(model.tokenizer(record["prompt"]).input_ids)
        steps = model.steps.mask([row["input_ids"]], prompt_lengths=[prompt])[0].nonzero().flatten().tolist()
        labelled = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert labelled in (steps, [*steps, len(row["input_ids"]) - 1]), "TRL's steps end where ours do"
        assert [row["labels"][i] for i in labelled] == [int(x) for x in record["labels"]]
    trainer.train()
    assert all(e["loss"] > 0 for e in trainer.state.log_history if "loss" in e) and trainer.state.global_step == 2
