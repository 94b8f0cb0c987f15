"""`reflective train` from questions to files: every way end to end, killed and gone on with, and as two processes."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from rich.console import Console
from test_model import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import reflective as rf
from reflective import train
from reflective.model import Config
from reflective.scoring.taps import Tap
from reflective.tasks import Question
from reflective.train import Rollouts, Settings, record_features, roll_out, run
from reflective.utils.fingerprint import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL, transformers and torch announce what they will deprecate
DELIMITERS = [chr(c) for c in range(ord("0"), ord("z"))]
FAST = Settings(
    verifier="test_train:even", questions=6, eval_questions=4, samples=8, temperature=1.0, max_new_tokens=10, epochs=2,
    batch=16, lora=2, steps=3, group=4, dtype="float32", backbone_lr=1e-3,
)  # fmt: skip


def even(response: str, question: Question) -> float | None:
    return float(sum(map(ord, response)) % 2 == 0)


def policy(**use):
    """A random model in whose text every third byte or so ends a step."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(**{**tiny._SIZES, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "eos_token_id": 1})
    net = AutoModelForCausalLM.from_config(config).eval()
    use = {"rule": "text", "delimiter": DELIMITERS, "prompt": "Q: {question}\n", "answer": "(.)"} | use
    return rf.ReflectiveModel(net, tokenizer, tiny.head(), Config(**use))


def changed(**settings):
    return dataclasses.replace(FAST, **settings)


class Killed(Exception):
    pass


def no_rollouts(*args, **kwargs):
    raise AssertionError("nothing is to be rolled out")


def same(a, b):
    """Reports, but for the time that it took."""
    drop = ("seconds", "versions")
    return {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}


def shown(report):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(train.table(report))
    return console.export_text()


# -- the head ----------------------------------------------------------------------------------------------------------


def test_head_end_to_end_and_gone_on_with(tmp_path, monkeypatch):
    model = policy()
    settings = changed(published=True)
    before = fingerprint(model.model.parameters())
    report = train.train(model, settings, tmp_path)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert fingerprint(model.model.parameters()) == before
    assert report["rollouts"]["train"]["trajectories"] == 48 and report["rollouts"]["eval"]["trajectories"] == 32
    assert {"best_of@2", "best_of@8", "auc_within"} < report["metrics"].keys() and "before" not in report
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "score_module.safetensors", "score_module.pt", "reflective.json", "report.json", "log.jsonl", "rollouts"
    }  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["done"]) for entry in log] == [("fit", 1), ("fit", 2)]
    assert {"loss", "kept", "gap"} < log[0].keys()
    head = rf.SPRM.from_pretrained(tmp_path)
    assert head.hidden_size == tiny.HIDDEN and head.dtype == model.model.dtype
    assert Config.read(tmp_path / "reflective.json") == model.config
    for name in ("pass@1", "majority@8", "best_of@8", "auc_within", "score_gap", "kept", "ece"):
        assert name in shown(report)

    (block,) = (tmp_path / "rollouts" / "train").glob("0*")
    rolled = Rollouts.load(block / "steps.safetensors")
    seen = [rolled.ids(i)[: int(rolled.prompt_length[i])].tolist() for i in range(len(rolled))]
    (held_out,) = (tmp_path / "rollouts" / "eval").glob("0*/steps.safetensors")
    held_out = Rollouts.load(held_out)
    assert not any(held_out.ids(i)[: int(held_out.prompt_length[i])].tolist() in seen for i in range(len(held_out))), (
        "questions of the evaluation are others"
    )

    shutil.rmtree(block)
    (tmp_path / "report.json").unlink()
    again = train.train(model, settings, tmp_path)
    assert same(again, report)
    new = Rollouts.load(block / "steps.safetensors")
    assert torch.equal(new.tokens, rolled.tokens) and torch.equal(new.features, rolled.features)
    monkeypatch.setattr(run, "roll_out", no_rollouts)
    monkeypatch.setattr(run, "_cast", no_rollouts)
    assert train.train(model, settings, tmp_path) == again, "one that is over only reports"


def test_several_layers_at_every_token_with_few_units(tmp_path):
    model = policy()
    settings = changed(layers="-1,-3", at="every", units=9)
    report = train.train(model, settings, tmp_path)
    head = rf.SPRM.from_pretrained(tmp_path)
    assert head.tap == Tap((-1, -3), at="every") and (head.hidden_size, head.width) == (2 * tiny.HIDDEN, 9)
    assert report["tap"] == {"layers": [-1, -3], "norm": False, "at": "every"} and "layers" not in report
    assert Config.read(tmp_path / "reflective.json").at == "every" and model.config.at == "predict"
    for name in ("train", "eval"):
        rolled = Rollouts.load(tmp_path / "rollouts" / name / "00000" / "steps.safetensors")
        assert rolled.tap == head.tap and rolled.features.shape[1] == 2 * tiny.HIDDEN
    i = int(rolled.length.argmax())
    mine = rolled.trajectory == i
    own = head(rolled.features[mine].to(head.dtype)).sigmoid().squeeze(-1)
    scored = rf.score(model.model, head, None, [rolled.ids(i).long()], prompt_lengths=rolled.prompt_length[i : i + 1])
    torch.testing.assert_close(scored.step_scores[0][: len(own)], own, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="rollouts made with other settings"):
        train.train(model, changed(layers="-1", at="every"), tmp_path)


def test_a_layer_is_chosen_in_training(tmp_path, monkeypatch):
    settings = changed(layers="auto", questions=12)
    report = train.train(policy(), settings, tmp_path)
    assert list(report["layers"]) == ["-2", "-3"], "of three layers"
    best = max(report["layers"], key=lambda layer: report["layers"][layer]["value"])
    assert report["tap"]["layers"] == [int(best)] and rf.SPRM.from_pretrained(tmp_path).tap == Tap((int(best),))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["layer"] for e in log if e["stage"] == "choose a layer"] == [-2, -3]
    rolled = Rollouts.load(tmp_path / "rollouts" / "train" / "00000" / "steps.safetensors")
    assert rolled.tap == Tap((-2, -3)), "recorded in one rollout"
    (tmp_path / "report.json").unlink()
    monkeypatch.setattr(run, "roll_out", lambda *a, **k: iter(()))
    assert same(train.train(policy(), settings, tmp_path), report)
    assert changed(layers="auto:-1,-3").candidates == (-1, -3)


@pytest.mark.parametrize("way", ["backbone", "joint"])
def test_the_backbone_trains_with_a_head_of_two_layers(tmp_path, way):
    model, at = policy(), "token"
    report = train.train(model, changed(way=way, layers=(-3, -1), at=at, steps=2), tmp_path)
    head = rf.SPRM.from_pretrained(tmp_path)
    assert head.tap == model.head.tap == Tap((-3, -1), at=at) and model.config.at == at
    assert head.hidden_size == 2 * tiny.HIDDEN and report["before"].keys() == report["metrics"].keys()
    after = {name: report["metrics"][name] != report["before"][name] for name in ("score_gap", "auc_step")}
    assert all(after.values()), "measured with the states of the trained model"
    changes = [
        not torch.equal(a, b) for a, b in zip(model.model.parameters(), policy().model.parameters(), strict=True)
    ]
    assert sum(changes) > 4


def test_layers_as_they_may_be_said():
    for given, kept in (("-9", (-9,)), ("-9,-2", (-9, -2)), (-9, (-9,)), ([4, -2], (4, -2)), ("auto", "auto"), (None, None)):
        assert changed(layers=given).layers == kept
    assert changed(units=7) == changed(width=7) and changed(width=7).width == 7
    for wrong, message in (
        ({"layers": "last"}, "layers='last'; expected -2, several such as -9,-2, or auto"),
        ({"layers": "auto:x"}, "layers='x'"), ({"layers": ()}, "at least one"), ({"layers": "-2,-2"}, "each once"),
        ({"at": "never"}, "at='never'"), ({"units": 5, "width": 6}, "two names of one setting"),
        ({"layers": "auto", "continue_head": "x"}, "chooses for a new head"),
        ({"layers": "-3", "published": True}, "published code reads layer -2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            changed(**wrong)


def test_taps_that_do_not_go(tmp_path):
    with pytest.raises(ValueError, match="hidden_states 0 to 3"):
        train.train(policy(), changed(layers="-9"), tmp_path)
    with pytest.raises(ValueError, match="published code reads layer -2"):
        train.train(policy(), changed(published=True, at="every"), tmp_path)
    with pytest.raises(ValueError, match="at='predict': the checkpoint says at='token'"):
        train.train(policy(at="token"), changed(at="predict"), tmp_path)
    tiny.head(seed=7).use(tap=Tap((-3,))).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="continue_head reads"):
        train.train(policy(), changed(layers="-2", continue_head=str(tmp_path / "start")), tmp_path)
    train.train(policy(), changed(continue_head=str(tmp_path / "start")), tmp_path / "run")
    assert rf.SPRM.from_pretrained(tmp_path / "run").tap == Tap((-3,)), "where it read before"


def test_other_settings(tmp_path, monkeypatch):
    model = policy()
    first = train.train(model, FAST, tmp_path)
    with pytest.raises(ValueError, match="rollouts made with other settings"):
        train.train(model, changed(temperature=0.9), tmp_path)
    with pytest.raises(ValueError, match="rollouts made with other settings"):
        train.train(policy(at="token"), FAST, tmp_path)
    made = []
    monkeypatch.setattr(run, "record_features", no_rollouts)
    monkeypatch.setattr(run, "roll_out", lambda *a, **k: made.append(k["first"]) or iter(()))
    other = train.train(model, changed(epochs=3, lr=1e-3), tmp_path)
    assert made == [1, 1], "the rollouts are those that are there"
    assert other["rollouts"] == first["rollouts"] and other["metrics"] != first["metrics"]
    assert train.train(model, changed(epochs=3, lr=1e-3), tmp_path) == other


def test_goes_on_from_a_head_and_in_another_dtype(tmp_path):
    model, start = policy(), tiny.head(seed=7)
    start.save_pretrained(tmp_path / "start")
    settings = changed(continue_head=str(tmp_path / "start"), lr=0.0, dtype="bfloat16")
    train.train(model, settings, tmp_path / "run")
    for key, weight in rf.SPRM.from_pretrained(tmp_path / "run").state_dict().items():
        torch.testing.assert_close(weight, start.state_dict()[key])
    rolled = Rollouts.load(tmp_path / "run" / "rollouts" / "train" / "00000" / "steps.safetensors")
    assert rolled.features.dtype == torch.bfloat16 and model.model.dtype == torch.float32


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="no answer pattern"):
        train.train(policy(answer=None), changed(verifier=None), tmp_path)
    with pytest.raises(ValueError, match="task='maths': none of sums, chain_sum, reasoning-gym:<dataset> or a file"):
        train.train(policy(), changed(task="maths"), tmp_path)
    for wrong, message in (
        ({"way": "both"}, "way='both'"), ({"dtype": "int8"}, "dtype='int8'"),
        ({"way": "joint", "data": "x"}, "of its own"),
        ({"way": "joint", "group": 3}, "batch=16 is no multiple of group=3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            changed(**wrong)


# -- features of responses from elsewhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["predict", "token"])
def test_recorded_features_are_those_of_the_sampler(at):
    model = policy(at=at)
    questions = [Question(text, "") for text in ("one", "another one", "why?")]
    (drawn,) = roll_out(model, questions, samples=24, temperature=1.0, max_new_tokens=12, verify=even)
    last = drawn.length - 1
    ends_in_a_step = model.steps.mask(*drawn.padded(range(len(drawn)), 0)[:2])[torch.arange(len(drawn)), last]
    assert ends_in_a_step.any(), "of which at=token knows no state"
    bare = dataclasses.replace(drawn, features=None, trajectory=None, position=None)
    seen = []
    read = record_features(model, bare, batch_tokens=64, progress=seen.append)
    assert read.tap == drawn.tap == Tap(at=at)
    assert sum(seen) == len(drawn) and len(seen) > 3
    order = (drawn.trajectory * 1000 + drawn.position).argsort()
    assert torch.equal(read.trajectory, drawn.trajectory[order]) and torch.equal(read.position, drawn.position[order])
    torch.testing.assert_close(read.features, drawn.features[order], rtol=1e-4, atol=1e-5)


def test_features_of_several_layers_are_those_of_the_sampler():
    model, tap = policy(), Tap((1, -1), at="every")
    questions = [Question(text, "") for text in ("one", "another one", "why?")]
    (drawn,) = roll_out(model, questions, samples=8, temperature=1.0, max_new_tokens=9, verify=even, tap=tap)
    read = record_features(model, drawn, tap=tap, batch_tokens=64)
    order = (drawn.trajectory * 1000 + drawn.position).argsort()
    assert torch.equal(read.trajectory, drawn.trajectory[order]) and torch.equal(read.position, drawn.position[order])
    torch.testing.assert_close(read.features, drawn.features[order], rtol=1e-4, atol=1e-5)
    assert read.tap == tap and read.features.shape[1] == 2 * tiny.HIDDEN


def test_from_a_file_of_judged_responses(tmp_path, monkeypatch):
    model = policy()
    questions = [Question(f"{i} + 1", "") for i in range(9)]
    (drawn,) = roll_out(model, questions, samples=8, temperature=1.0, max_new_tokens=10, verify=even)
    train.write_rollouts(drawn, tmp_path / "judged.jsonl", model.tokenizer)
    monkeypatch.setattr(run, "roll_out", no_rollouts)
    monkeypatch.setattr(run, "_BLOCK", 10)
    settings = changed(data=str(tmp_path / "judged.jsonl"), way="backbone", dtype="bfloat16")
    report = train.train(model, settings, tmp_path / "run")
    counts = report["rollouts"]
    assert (counts["train"]["questions"], counts["eval"]["questions"]) == (6, 3)
    assert counts["train"]["trajectories"] == 48 and counts["after"] == counts["eval"]
    assert report["before"]["pass@1"] == report["metrics"]["pass@1"], "the same responses, read anew"
    assert report["before"]["score_gap"] != report["metrics"]["score_gap"]
    assert len(list((tmp_path / "run" / "rollouts" / "train").glob("0*"))) > 3
    assert Rollouts.load(tmp_path / "run/rollouts/train/00000/steps.safetensors").features.dtype == torch.bfloat16


# -- with the backbone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [2, None], ids=["lora", "full"])
def test_backbone_end_to_end_and_gone_on_with(tmp_path, monkeypatch, lora):
    settings, model = changed(way="backbone", lora=lora, backbone_epochs=3), policy()
    report = train.train(model, settings, tmp_path / "whole")
    assert report["before"].keys() == report["metrics"].keys()
    assert report["rollouts"]["after"]["trajectories"] == 32 and "before" in shown(report)
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {"tokenizer.json", "adapter_model.safetensors" if lora else "model.safetensors"} < names
    assert not any(name.startswith("unfinished") for name in names)
    changes = [
        not torch.equal(a, b) for a, b in zip(model.model.parameters(), policy().model.parameters(), strict=True)
    ]
    assert sum(changes) > 4 and not any("lora" in name for name, _ in model.model.named_modules())
    head = rf.SPRM.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(w, head.state_dict()[k]) for k, w in model.head.state_dict().items())
    if not lora:
        loaded = rf.ReflectiveModel.from_pretrained(tmp_path / "whole")
        assert fingerprint(loaded.model.parameters()) == fingerprint(model.model.parameters())

    from reflective.train import backbone

    tell = run._Tell.__call__

    def killing(self, done, **numbers):
        tell(self, done, **numbers)
        if self.name.startswith("tune") and done == 100:
            raise Killed

    monkeypatch.setattr(run._Tell, "__call__", killing)
    with pytest.raises(Killed):
        train.train(policy(), settings, tmp_path / "killed")
    monkeypatch.setattr(run._Tell, "__call__", tell)
    monkeypatch.setattr(backbone._Learner, "learn", no_rollouts)
    assert same(train.train(policy(), settings, tmp_path / "killed"), report)


# -- joint -------------------------------------------------------------------------------------------------------------


def test_joint_end_to_end_and_gone_on_with(tmp_path, monkeypatch):
    from reflective.train import joint

    settings, model = changed(way="joint", steps=2), policy()
    report = train.train(model, settings, tmp_path / "whole")
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {"adapter_model.safetensors", "score_module.safetensors", "reflective.json"} < names
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if entry["stage"] == "joint"]
    assert [entry["done"] for entry in steps] == [1, 2] and {"reward", "loss", "kept", "gap"} < steps[0].keys()
    assert report["before"].keys() == report["metrics"].keys() and report["rollouts"]["after"]["trajectories"] == 32
    changes = [
        not torch.equal(a, b) for a, b in zip(model.model.parameters(), policy().model.parameters(), strict=True)
    ]
    assert sum(changes) > 4, "the adapter is merged"
    assert report["rollouts"]["settle"]["questions"] == 6 and {e["stage"] for e in log} == {"fit", "joint", "settle"}
    assert report["along"].keys() == report["metrics"].keys() and report["along"]["pass@1"] == report["metrics"]["pass@1"]

    tell = run._Tell.__call__

    def killing(self, done, *content, **numbers):
        if isinstance(self, run._Run) or (self.name == "joint" and done == 2):
            raise Killed
        tell(self, done, **numbers)

    monkeypatch.setattr(run._Tell, "__call__", killing)
    with pytest.raises(Killed):
        train.train(policy(), settings, tmp_path / "killed")
    monkeypatch.setattr(run._Tell, "__call__", tell)
    begun = []
    newest = joint.get_last_checkpoint
    monkeypatch.setattr(joint, "get_last_checkpoint", lambda path: begun.append(newest(path)) or begun[-1])
    write = run._Run._write
    monkeypatch.setattr(run._Run, "_write", killing)
    with pytest.raises(Killed):
        train.train(policy(), settings, tmp_path / "killed")
    monkeypatch.setattr(run._Run, "_write", write)
    resumed = train.train(policy(), settings, tmp_path / "killed")
    assert [Path(path).name for path in begun] == ["checkpoint-1", "checkpoint-2"]
    assert resumed["metrics"]["pass@1"] == report["metrics"]["pass@1"]
    assert resumed["metrics"]["score_gap"]["value"] == pytest.approx(report["metrics"]["score_gap"]["value"], rel=1e-3)


def test_the_head_that_is_saved_is_the_settled_one(tmp_path, monkeypatch):
    settings, fitted, measured = changed(way="joint", steps=2), [], []
    fit, measure = run.fit, run._Run._measure
    monkeypatch.setattr(run, "fit", lambda *a, **k: fitted.append((fit(*a, **k), k)) or fitted[-1][0])
    monkeypatch.setattr(run._Run, "_measure", lambda self, r, head: measured.append(fingerprint(head.parameters())) or measure(self, r, head))
    train.train(policy(), dataclasses.replace(settings, settle=4), tmp_path / "settled")
    head, how = fitted[-1]
    assert len(fitted) == 2 and how["dropout"] == 0.1 and how["init"] is None
    saved = rf.SPRM.from_pretrained(tmp_path / "settled")
    assert fingerprint(saved.parameters()) == fingerprint(head.parameters()) == measured[-1] != measured[-2]
    report = train.train(policy(), dataclasses.replace(settings, settle=0), tmp_path / "along")
    assert "along" not in report and "settle" not in report["rollouts"] and len(fitted) == 3, "the one before the policy moved"
    monkeypatch.setattr(sys.modules[__name__], "even", lambda response, question: 1.0)
    start = tmp_path / "start"
    tiny.head(seed=7).save_pretrained(start)
    report = train.train(policy(), dataclasses.replace(settings, continue_head=str(start)), tmp_path / "all right")
    assert "along" not in report and report["rollouts"]["settle"]["correct"] == 1.0 and len(fitted) == 3, "nothing to learn from"


def test_joint_of_a_chat_goes_on_from_a_head_with_all_weights(tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(run, "_accelerator", lambda: Accelerator(cpu=True))  # as on a GPU: there is one before TRL's
    model = policy(prompt=None)
    model.tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}"
    tiny.head(seed=7).save_pretrained(tmp_path / "start")
    settings = changed(
        way="joint", steps=2, lora=None, continue_head=str(tmp_path / "start"), gradient_checkpointing=True
    )
    report = train.train(model, settings, tmp_path / "run")
    assert "train" not in report["rollouts"], "answers of its own"
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert fingerprint(model.model.parameters()) != fingerprint(policy().model.parameters())
    halved = copy.copy(policy())
    halved.model = halved.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="loses small updates in torch.bfloat16"):
        train.train(halved, settings, tmp_path / "halved")


# -- command line ------------------------------------------------------------------------------------------------------


def test_command_line_as_two_processes(tmp_path):
    policy().save_pretrained(tmp_path / "model")
    command = [
        sys.executable, "-m", "reflective", "train", str(tmp_path / "run"), "--model", str(tmp_path / "model"), "--way",
        "backbone", "--verifier", "test_train:even", "--questions", "6", "--eval-questions", "5", "--samples", "8",
        "--temperature", "1", "--max-new-tokens", "10", "--epochs", "2", "--batch", "16", "--lora", "2", "--json",
        "--layers", "-3,-1", "--at", "token", "--units", "5",
    ]  # fmt: skip
    (out, _), (nothing, _) = run_ranks(command, cwd=Path(__file__).parent, TRITON_INTERPRET="1")
    report = json.loads(out)
    assert nothing == "" and report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rollouts"]["train"]["trajectories"] == 48 and report["rollouts"]["eval"]["questions"] == 5
    head = rf.SPRM.from_pretrained(tmp_path / "run")
    assert head.tap == Tap((-3, -1), at="token") and head.width == 5
    shares = sorted(p.name for p in (tmp_path / "run" / "rollouts").iterdir())
    assert shares == ["eval-0-of-2", "eval-1-of-2", "train-0-of-2", "train-1-of-2"]


def test_the_extras_are_asked_for_when_they_are_needed(monkeypatch):
    program = (
        "import sys, reflective.train\nassert not {'torch', 'trl', 'peft', 'accelerate', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in train.__all__:
        assert getattr(train, name) is not None
    monkeypatch.delitem(sys.modules, "reflective.train.backbone")
    monkeypatch.delitem(vars(train), "tune")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'peft is not installed: pip install "reflective-kernels\[train\]"'):
        _ = train.tune
