"""Head and backbone trained together: what is read, what is trained, that a killed run goes on, two processes as one."""

import copy
import json
import pickle
import sys
from pathlib import Path

import peft
import pytest
import test_model
import test_train_head
import tiny
import torch
from ranks import run_ranks
from test_train_head import Killed, weights
from transformers import LlamaConfig, LlamaForCausalLM

import reflective as rf
from reflective.engines.hf.backbone import Backbone
from reflective.engines.hf.finished import read_positions
from reflective.engines.hf.internals import cache_of, checkpoints, set_checkpointing, with_cache
from reflective.model import Config
from reflective.scoring.taps import Tap
from reflective.train.backbone import _Reader, tune
from reflective.train.data import Rollouts
from reflective.train.objective import sprm_objective

PROMPT = 6


def reflective_model(dtype=torch.float32, at="predict"):
    settings = Config(rule="text", delimiter=test_model.DELIMITERS, at=at)
    model = rf.ReflectiveModel(tiny.model(dtype=dtype), test_model.byte_tokenizer(), tiny.head(dtype), settings)
    model.steps = tiny.steps()
    return model


def rollouts(questions=12, samples=4, seed=0):
    """A correct trajectory has token 30 before every step, an incorrect one token 31. All prompts begin with the same 4."""
    g = torch.Generator().manual_seed(seed)
    texts, outcomes = [], []
    for q in range(questions):
        prompt = torch.cat([torch.arange(5, 9), torch.randint(40, tiny.VOCAB, (PROMPT - 4,), generator=g)])
        for s in range(samples):
            outcomes.append(float(s % 2))
            steps = [
                torch.cat([torch.randint(40, tiny.VOCAB, (3,), generator=g), torch.tensor([31 - s % 2, 10])])
                for _ in range(1 + (q + s) % 3)
            ]
            texts.append(torch.cat([prompt, *steps, torch.randint(40, tiny.VOCAB, (s + 1,), generator=g)]))
    n = len(texts)
    return Rollouts(
        tokens=torch.cat(texts).int(), length=torch.tensor([len(t) for t in texts]), prompt_length=torch.full((n,), PROMPT),
        question=torch.arange(questions).repeat_interleave(samples), outcome=torch.tensor(outcomes),
        answer=torch.zeros(n, dtype=torch.int64), count=torch.ones(n, dtype=torch.int64),
    )  # fmt: skip


FAST = {"backbone_lr": 1e-3, "head_lr": 1e-3, "batch": 16, "lr_warmup": 2, "autocast": None, "lora": 4}


# -- what is heard, and what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_listening_gets_the_state_with_its_graph_once(reentrant, wrapped):
    net = tiny.model().train()
    ids = torch.randint(5, tiny.VOCAB, (2, 12))
    truth = net(ids, output_hidden_states=True).hidden_states[-2]
    expected = torch.autograd.grad(truth.square().mean(), net.model.layers[0].mlp.up_proj.weight)[0]
    if reentrant is not None:
        set_checkpointing(net, True, reentrant)
        net.enable_input_require_grads()  # as reentrant checkpoints need
    whole = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj"])) if wrapped else net
    weight = net.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    layer, heard = net.model.layers[-1], []
    plain, ran = type(layer), []
    layer.input_layernorm.register_forward_hook(lambda *args: ran.append(None))
    with Backbone.of(whole).listening(heard.append):
        out = whole(input_ids=ids, use_cache=False)
        assert len(heard) == 1 and torch.equal(heard[0], truth)
    (heard[0].square().mean() + 0 * out.logits.sum()).backward()
    assert len(heard) == 1 and len(ran) == (1 if reentrant is None else 2), "computed anew once, and not heard again"
    torch.testing.assert_close(weight.grad, expected)
    assert type(layer) is plain and not any(name.startswith("_reflective") for name in vars(layer))
    with pytest.raises(Killed), Backbone.of(whole).listening(lambda hidden: kill()):
        whole(input_ids=ids)
    assert type(layer) is plain
    whole(input_ids=ids)
    assert len(heard) == 1


def kill():
    raise Killed


def test_listeners_within_each_other():
    net, outer, inner = tiny.model(), [], []
    backbone, ids = Backbone.of(net), torch.full((1, 4), 7)
    with backbone.listening(outer.append), torch.no_grad():
        with backbone.listening(inner.append):
            net(ids)
        net(ids)
    net(ids)
    assert (
        len(outer) == 2 and len(inner) == 1 and type(net.model.layers[-1]).__mro__[1] is not type(net.model.layers[0])
    )


def column_of(hidden):
    columns = torch.arange(hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    return columns[None, :, None].expand_as(hidden).contiguous()


class Recording(rf.SPRM):
    """A head that keeps what it is given."""

    def forward(self, features):
        self.given.append(features[:, 0])
        return super().forward(features)


def by_rule(rule):
    """Step-tokens, and which ids a text of them is made of."""
    if rule == "ids":
        return tiny.steps().resized(VOCAB), torch.tensor([tiny.STEP_IDS[0], *range(30, 33)])
    tokenizer = test_model.byte_tokenizer()
    delimiter = {"text": ".\n\n", "zh": ".\n\n"}.get(rule, ".")
    ids = torch.tensor(tokenizer.encode("..\n\n\n\na" if rule == "text" else "..\n\nab"))
    return rf.StepTokens.from_tokenizer(tokenizer, rule=rule, delimiter=delimiter).resized(VOCAB), ids


VOCAB = 260


@pytest.fixture(scope="module")
def marked():
    """A decoder whose states, where the head reads them, say at which column they stand."""
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**{**tiny._SIZES, "vocab_size": VOCAB})).eval()
    net.model.layers[-2].register_forward_hook(lambda module, args, out: column_of(out))
    return net


@pytest.mark.parametrize("at", ["predict", "token"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", ["ids", "exact", "contains", "text", "zh"])
def test_training_reads_what_scoring_reads(marked, monkeypatch, at, side, rule):
    """States that carry their own column: the rows of the loss are those that rf.score puts through the head, and where the
    stream says that its steps are."""
    torch.manual_seed(1)
    (steps, alphabet), net, head = by_rule(rule), marked, tiny.head()
    lengths = [80, 9, 47, 66]
    ids, mask = torch.full((4, 83), tiny.PAD), torch.zeros(4, 83, dtype=torch.int64)
    for i, n in enumerate(lengths):
        begin = 83 - n if side == "left" else 0
        row = alphabet[torch.randint(len(alphabet), (n,))]
        row[-1] = alphabet[-1]  # a stream never sees the state of a step-token that comes last
        if rule == "ids" and i != 2:
            row[2 + i], row[n - 3] = tiny.THINK, tiny.END_THINK
        ids[i, begin : begin + n], mask[i, begin : begin + n] = row, 1
    prompts = torch.tensor([4, 0, 9, 20])
    read = []
    score_rows = sys.modules["reflective.engines.hf.finished"].ShardedHead.score_rows
    monkeypatch.setattr(
        "reflective.scoring.sharded.ShardedHead.score_rows", lambda self, f: read.append(f[:, 0]) or score_rows(self, f)
    )
    scores = rf.score(net, head, steps, ids, mask, at, prompts, batch_tokens=1)
    training = Recording(tiny.HIDDEN)
    training.given = []
    hidden = column_of(torch.zeros(4, 83, tiny.HIDDEN))
    sprm_objective(training, steps, hidden, ids, mask, prompts, torch.ones(4), at=at)
    row, step, column = read_positions(steps, ids, mask, prompts, at)
    assert len(row) > 3 and torch.equal(training.given[0], column.float())
    assert [p.tolist() for p in scores.step_positions] == [step[row == i].tolist() for i in range(4)]
    # Of a single row scoring drops the padding on the left, so its columns begin there.
    by_length = sorted(range(4), key=lambda i: lengths[i])
    pads = [83 - n if side == "left" else 0 for n in lengths]
    expected = [column[row == i] - pads[i] for i in by_length if (row == i).any()]
    assert [r.tolist() for r in read] == [e.tolist() for e in expected]
    # The stream, which is fed right-padded prompts and then token by token, knows of the same steps.
    for i, n in enumerate(lengths):
        text = ids[i, pads[i] : pads[i] + n]
        assert (step[row == i] - pads[i]).tolist() == streamed(net, head, steps, text, int(prompts[i]), at)


def streamed(net, head, steps, text, prompt, at):
    """Columns of the steps that a StreamScorer finds in ``text``, fed the prompt and then token by token."""
    scorer, prompt = rf.StreamScorer(net, head, steps, at=at), max(prompt, 1)
    with scorer, torch.no_grad():
        cache = cache_of(net(text[None, :prompt], use_cache=True))
        for t in range(prompt, len(text) - 1):
            cache = cache_of(net(text[None, t : t + 1], **with_cache(net, cache), use_cache=True))
    return scorer.result(text[None]).step_positions[0].tolist()


# -- what is trained --------------------------------------------------------------------------------------------------


def test_the_reader_reads_what_scoring_reads():
    """Features of a batch whose prompts begin alike are those of each text alone, and so are their gradients."""
    model, data = reflective_model(torch.float64), rollouts()
    data.tokens[data._end - data.length] = torch.where(data.question % 2 > 0, 9, 5).int()  # some batches share nothing
    reader = _Reader(model, data, None, 200)
    forwards = reader.forwards(torch.arange(len(data)))
    assert torch.cat(forwards).sort().values.tolist() == list(range(len(data))) and len(forwards) == 4
    assert all(int(reader.length[rows].max()) * len(rows) <= 200 for rows in forwards)
    weight, backbone = model.model.model.layers[0].mlp.up_proj.weight, reader.backbone
    for rows in (*forwards, torch.tensor([0, 8, 19])):
        features, owner = reader(rows)
        alone = []
        for i in rows.tolist():
            ids = data.ids(i)[None].long()
            *_, read = read_positions(reader.steps, ids, None, data.prompt_length[i], "predict")
            assert len(read) == reader.n_steps[i] and int(read[-1]) + 1 == reader.length[i]
            alone.append(backbone.hidden(ids, None)[0, read])
        assert owner.bincount().tolist() == [len(a) for a in alone]
        torch.testing.assert_close(features, torch.cat(alone))
        ours, theirs = (torch.autograd.grad(f.square().sum(), weight)[0] for f in (features, torch.cat(alone)))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_only_the_layers_below_the_last_run():
    model, ran = reflective_model(), []
    for name, module in model.model.named_modules():
        module.register_forward_hook(lambda *args, name=name: ran.append(name))
    tune(model, rollouts(4), **FAST)
    assert any("layers.2" in name for name in ran)
    assert not any(part in name for name in ran for part in ("layers.3", "model.norm", "lm_head"))


@pytest.mark.parametrize(
    "flags",
    [{}, {"lora": None}, {"autocast": torch.bfloat16}, {"gradient_checkpointing": True, "standardise": False}],
    ids=["lora", "full", "bf16", "checkpointing"],
)
def test_learns_what_the_backbone_has_to_bring(flags):
    steps = []
    model, data = reflective_model(), rollouts(30)
    before, modules = copy.deepcopy(model.model.state_dict()), {n: type(m) for n, m in model.model.named_modules()}
    tuned = tune(
        model, data, **{**FAST, "epochs": 4, "backbone_lr": 3e-3, "head_lr": 3e-3, "on_step": steps.append, **flags}
    )
    assert [s.number for s in steps] == list(range(1, len(steps) + 1)) and steps[-1].done == 1
    assert steps[-1].gap > 0.3 > abs(steps[0].gap) and steps[-1].loss < 0.8 * steps[0].loss
    assert all(s.kept == 1 for s in steps), "plain BCE"
    held = rollouts(10, seed=1)
    ids, mask, prompts = held.padded(torch.arange(len(held)), tiny.PAD)
    score = rf.score(tuned.model.model, tuned.model.head, model.steps, ids, mask, prompt_lengths=prompts).score
    assert score[held.outcome > 0].mean() - score[held.outcome < 1].mean() > 0.2
    after = tuned.model.model.state_dict()
    if flags.get("lora", 4) is None:
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert "model.layers.0.mlp.up_proj.weight" in changed and "model.embed_tokens.weight" in changed
        assert not any(part in n for n in changed for part in ("layers.3", "model.norm", "lm_head"))
        assert {n: type(m) for n, m in model.model.named_modules()} == modules and tuned.adapter is None
    else:
        assert all(torch.equal(before[n], after[n]) for n in before if n in after), "the base is as it was"
        trained = {n for n in after if "lora_" in n}
        assert trained and not any("layers.3" in n for n in trained)
    assert not model.model.training and not checkpoints(model.model)
    assert all(p.grad is None for p in model.model.parameters())


def test_dynamic_weights_class_balance_and_scale():
    model, data, found = reflective_model(), rollouts(), {}
    for name, flags in {
        "plain": {}, "dynamic": {"warmup": 1}, "balanced": {"class_balance": True}, "cut": {"feature_gradient_scale": 0.0},
    }.items():  # fmt: skip
        steps = []
        tuned = tune(copy.deepcopy(model), data, **{**FAST, "on_step": steps.append, **flags})
        found[name] = steps, max(float(p.abs().max()) for n, p in tuned.adapter.named_parameters() if "lora_B" in n)
    plain, dynamic = found["plain"][0], found["dynamic"][0]
    assert plain[0] == dynamic[0] and plain[1].loss > dynamic[1].loss and dynamic[1].kept < 1
    assert found["balanced"][0][0].loss != plain[0].loss
    assert found["cut"][1] == 0 < found["plain"][1]


@pytest.mark.parametrize("balance", [False, True])
def test_a_batch_is_the_same_in_one_forward_or_in_many(balance):
    """Also with class balance, whose counts are the batch's."""
    model, data = reflective_model(torch.float64), rollouts()
    model.head = test_train_head.without_dropout(tiny.HIDDEN)
    found = []
    for batch_tokens in (1, 100, 100_000):
        steps, other = [], copy.deepcopy(model)
        flags = {**FAST, "lora": None, "class_balance": balance, "on_step": steps.append, "batch_tokens": batch_tokens}
        found.append((weights(tune(other, data, **flags).head), torch.tensor([s.loss for s in steps])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    data = rollouts()
    flags = {**FAST, "epochs": 2, "warmup": 2, "class_balance": True, "save_every": 2}
    whole = tune(reflective_model(), data, **flags)

    def killed(step):
        if step.number == 5:
            raise Killed

    with pytest.raises(Killed):
        tune(reflective_model(), data, **flags, checkpoint=tmp_path, on_step=killed)
    steps = []
    resumed = tune(reflective_model(), data, **flags, checkpoint=tmp_path, on_step=steps.append)
    assert steps[0].number == 5 and steps[-1].done == 1
    assert torch.equal(weights(resumed.head), weights(whole.head))
    assert all(map(torch.equal, resumed.adapter.state_dict().values(), whole.adapter.state_dict().values()))
    with pytest.raises(ValueError, match=r"other settings \(lora was 4, is 2\)"):
        tune(reflective_model(), data, **{**flags, "lora": 2}, checkpoint=tmp_path)


@pytest.mark.parametrize("lora", [None, 4])
def test_after_an_exception_the_model_is_as_found(lora):
    model = reflective_model()
    model.model.lm_head.weight.requires_grad_(False)
    old, modules = model.head, {name: type(m) for name, m in model.model.named_modules()}
    with pytest.raises(Killed):
        tune(model, rollouts(4), **{**FAST, "lora": lora}, gradient_checkpointing=True, on_step=lambda step: kill())
    assert model.head is old and {name: type(m) for name, m in model.model.named_modules()} == modules
    assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    assert not checkpoints(model.model)
    assert {name for name, p in model.model.named_parameters() if not p.requires_grad} == {"lm_head.weight"}


def test_saved_and_continued(tmp_path):
    model, data = reflective_model(), rollouts()
    tuned = tune(model, data, **FAST)
    tuned.save(tmp_path, published=True)
    names = {"score_module.safetensors", "score_module.pt", "adapter_model.safetensors", "adapter_config.json"}
    assert names <= {f.name for f in tmp_path.iterdir()}
    assert Config(**json.loads((tmp_path / "reflective.json").read_text())) == model.config
    assert torch.equal(weights(rf.SPRM.from_pretrained(tmp_path / "score_module.pt")), weights(tuned.head))
    assert not torch.equal(weights(model.head), weights(tiny.head())) and model.head is tuned.model.head

    base = tiny.model()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.randint(5, tiny.VOCAB, (2, 30))
    for net in (loaded, base, loaded.merge_and_unload()):
        torch.testing.assert_close(
            rf.score(net, model.head, model.steps, ids).score, rf.score(model.model, model.head, model.steps, ids).score
        )
    with pytest.raises(ValueError, match="there is an adapter in it; pass its PeftModel as lora"):
        tune(model, data, **FAST)
    before = {n: p.clone() for n, p in tuned.adapter.named_parameters()}
    again = tune(model, data, **{**FAST, "lora": tuned.adapter})
    changed = {n for n, p in again.adapter.named_parameters() if not torch.equal(p, before[n])}
    assert again.adapter is tuned.adapter and changed and all("lora_" in n for n in changed)


@pytest.mark.parametrize(
    ("tap", "trained"), [(Tap((-3, -4)), (0, 1)), (Tap((-1,)), (0, 1, 2, 3)), (Tap((1, -2), norm=True, at="token"), (0, 1, 2))]
)
def test_what_the_head_reads_is_what_trains(tap, trained):
    """The layers below the deepest that it reads, and no other; what is read is what a forward has there."""
    model, data = reflective_model(at=tap.at), rollouts(4)
    model.head = tiny.head(hidden=len(tap.layers) * tiny.HIDDEN).use(tap=tap)
    reader = _Reader(model, data, None, 200)
    rows = torch.arange(5)
    features, owner = reader(rows)
    ids, mask, prompts = data.padded(rows, 0)
    row, _, read = read_positions(reader.steps, ids, mask, prompts, tap.at)
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
        normed = model.model.model.norm if tap.norm else lambda x: x
        expected = torch.cat([normed(states[layer])[row, read] for layer in tap.layers], 1)
    assert torch.equal(owner, row)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)

    before = copy.deepcopy(model.model.state_dict())
    tuned = tune(model, data, **{**FAST, "lora": None})
    changed = {n for n, p in model.model.state_dict().items() if not torch.equal(p, before[n])}
    assert {int(n.split(".")[2]) for n in changed if ".layers." in n} == set(trained)
    assert ("model.norm.weight" in changed) == (tap.norm or -1 in tap.layers)
    assert tuned.head.tap == model.head.tap == tap
    adapted = reflective_model(at=tap.at)
    adapted.head = tiny.head(hidden=len(tap.layers) * tiny.HIDDEN).use(tap=tap)
    names = peft.get_peft_model_state_dict(tune(adapted, data, **FAST).adapter)
    assert {int(n.partition(".layers.")[2].split(".")[0]) for n in names} == set(trained)


def test_a_whole_model_is_saved(tmp_path):
    model = reflective_model()
    tune(model, rollouts(4), **{**FAST, "lora": None}).save(tmp_path)
    assert {"model.safetensors", "score_module.safetensors", "reflective.json"} <= {f.name for f in tmp_path.iterdir()}


def test_refused():
    with pytest.raises(ValueError, match="full training loses small updates in its dtype"):
        tune(reflective_model(torch.bfloat16), rollouts(4), **{**FAST, "lora": None})
    only_last = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[3])
    model = reflective_model()
    with pytest.raises(ValueError, match=r"lora: no layer below hidden_states\[\d+\], the deepest that is read, has one"):
        tune(model, rollouts(4), **{**FAST, "lora": only_last})
    data = rollouts(4)
    data.outcome[:] = 0
    with pytest.raises(ValueError, match="both outcomes are needed"):
        tune(model, data, **FAST)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_bf16_base_keeps_its_dtype(autocast):
    model = reflective_model(torch.bfloat16)
    tuned = tune(model, rollouts(), **{**FAST, "autocast": autocast})
    assert rf.score(model.model, model.head, model.steps, torch.full((1, 9), 10)).n_steps.tolist() == [0]
    assert tuned.head.dtype == torch.float32 and tuned.model.head.dtype == torch.bfloat16
    assert {p.dtype for n, p in tuned.adapter.named_parameters() if "lora_" in n} == {torch.float32}


# -- two processes as one ---------------------------------------------------------------------------------------------


def tune_shared(accelerator=None):
    model, steps = reflective_model(), []
    model.head = test_train_head.without_dropout(tiny.HIDDEN)
    flags = {**FAST, "batch_tokens": 60, "class_balance": True, "warmup": 1, "on_step": steps.append}
    tuned = tune(model, rollouts(9, samples=3), accelerator=accelerator, **flags)
    return tuned.head.state_dict(), peft.get_peft_model_state_dict(tuned.adapter), [s.loss for s in steps]


def main(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found = accelerator.num_processes, test_train_head.fit_shared(accelerator).state_dict(), tune_shared(accelerator)
    Path(folder, f"{accelerator.process_index}.pickle").write_bytes(pickle.dumps(found))


def test_two_processes_are_as_one(tmp_path):
    run_ranks([sys.executable, __file__, tmp_path])
    (count, head, tuned), other = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2))
    assert count == 2
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(dict(head), dict(test_train_head.fit_shared().state_dict()), **close)
    alone = tune_shared()
    for ours, theirs in zip(tuned, alone, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    assert all(torch.equal(head[k], other[1][k]) for k in head), "both hold the same bits"
    assert all(torch.equal(tuned[1][k], other[2][1][k]) for k in tuned[1])


if __name__ == "__main__":
    main(sys.argv[1])
