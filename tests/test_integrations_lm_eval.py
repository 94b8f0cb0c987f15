"""The harness itself, on a task of its own making on disk, with best of N as its model."""

import json
import os
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from test_model import DELIMITERS, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import reflective as rf
from reflective.model import Config
from reflective.search.strategies import Strategy

lm_eval = pytest.importorskip("lm_eval", minversion="0.4.13")
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from reflective.integrations.lm_eval import ReflectiveLM

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own
QUESTIONS = ["ab", "what is it?", "1 + 2", "longer than the others"]
UNTIL = ["qq", *"zZpPkKhHtTvV"]
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: 24, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""
CHOSEN = """
task: chosen
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no", "perhaps"]
doc_to_target: 1
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint with a prompt and a stop pattern of its own, which are not to be used, and two tasks."""
    home = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    net = LlamaForCausalLM(LlamaConfig(**{**tiny._SIZES, "vocab_size": len(tokenizer), "eos_token_id": 1}))
    with torch.no_grad():
        net.get_input_embeddings().weight *= 20
    config = Config(rule="text", delimiter=DELIMITERS, prompt="Q: {question}\n", stop="[xw]", answer="([a-f])")
    rf.ReflectiveModel(net, tokenizer, tiny.head(), config).save_pretrained(home / "model")
    data = home / "data.json"
    data.write_text("\n".join(json.dumps({"question": q, "answer": "c"}) for q in QUESTIONS))
    (home / "tasks").mkdir()
    for name, task in (("written", WRITTEN), ("chosen", CHOSEN)):
        (home / "tasks" / f"{name}.yaml").write_text(task.format(data=data, until=json.dumps(UNTIL)))
    return home


@pytest.fixture(scope="module")
def bare(place):
    model = rf.ReflectiveModel.from_pretrained(place / "model")
    model.config = replace(model.config, prompt="{question}", stop=None)
    return model


def tasks(place):
    return TaskManager(include_path=str(place / "tasks"), include_defaults=False)


def asked(context, **given):
    return Instance("generate_until", {}, (context, {"until": UNTIL, "max_gen_toks": 24} | given), 0)


def best(bare, context, seed=0, repeat=0, **settings):
    seed = zlib.crc32(f"{seed} {repeat} {context}".encode())
    return bare.generate([context], seed=[seed], max_new_tokens=24, stop=UNTIL, **settings)[0]


def cut(text):
    for end in UNTIL:
        text = text.split(end)[0]
    return text


@pytest.mark.parametrize(
    "settings",
    [
        {"effort": "medium", "temperature": 1.0, "top_p": 1.0},
        {"strategy": "majority", "n": 5, "temperature": 0.9},
        {"strategy": "step_beam", "n": 4, "temperature": 1.0, "batch_rows": 6},
    ],
)
def test_the_harness_gets_what_generate_thinks_best(place, bare, settings):
    results = lm_eval.simple_evaluate(
        model="reflective", model_args={"pretrained": str(place / "model"), "seed": 3, "device": "cpu"} | settings,
        tasks=["written"], task_manager=tasks(place), log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    samples = sorted(results["samples"]["written"], key=lambda s: s["doc_id"])
    assert len(samples) == len(QUESTIONS)
    settings = {name: value for name, value in settings.items() if name != "batch_rows"}
    several = stopped = 0
    for sample, question in zip(samples, QUESTIONS, strict=True):
        context = f"Question: {question}\nAnswer:"
        expected = best(bare, context, seed=3, **settings)
        assert sample["arguments"][0][0] == context == expected.prompt
        assert sample["resps"] == [[cut(expected.text)]]
        stopped += cut(expected.text) != expected.text
        several += len({c.text for c in expected.candidates}) > 1
        assert expected.best.score == max(c.score for c in expected.candidates) or "strategy" in settings
    assert several == len(QUESTIONS) and stopped
    assert results["results"]["written"]["exact_match,none"] == 0


def test_likelihoods_are_those_of_the_harness_itself(place):
    found = {}
    for name, model in (
        ("ours", ReflectiveLM(str(place / "model"), n=2, device="cpu", batch_size=2)),
        ("theirs", HFLM(str(place / "model"), device="cpu", batch_size=2)),
    ):
        results = lm_eval.simple_evaluate(
            model=model, tasks=["chosen"], task_manager=tasks(place), log_samples=True, bootstrap_iters=0
        )
        found[name] = [s["filtered_resps"] for s in results["samples"]["chosen"]]
    for ours, theirs in zip(*found.values(), strict=True):
        for (a, greedy_a), (b, greedy_b) in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-5) and greedy_a == greedy_b


def test_an_answer_depends_on_its_request_alone(place):
    lm = ReflectiveLM(rf.ReflectiveModel.from_pretrained(place / "model"), n=3, temperature=1.0)
    requests = [asked("a b"), asked("c d", max_gen_toks=9), asked("a b"), asked("c d", until=["e", "y", ""])]
    found = lm.generate_until(requests, disable_tqdm=True)
    assert found[0] != found[2], "a repeat is another sample"
    assert lm.generate_until(requests[:1], disable_tqdm=True) == found[:1]
    assert lm.generate_until([requests[1], requests[0]], disable_tqdm=True) == found[1::-1]
    assert all(len(f) <= n for f, n in zip(found, (24, 9, 24, 24), strict=True))
    assert not {"e", "y"} & set(found[3]) and all(f == cut(f) for f in found[:3])
    other = ReflectiveLM(lm.reflective, n=3, temperature=1.0, seed=1)
    assert other.generate_until(requests[:1], disable_tqdm=True) != found[:1]


def test_a_long_context_keeps_its_end_and_a_short_one_is_tokenized_once(bare):
    lm = ReflectiveLM(bare, n=2, temperature=1.0, max_length=40)
    long = "x" * 30 + "0123456789abcdef"
    assert lm._ask(long, {"until": UNTIL, "max_gen_toks": 24}, 0).prompt == bare.tokenizer("0123456789abcdef").input_ids
    assert lm.generate_until([asked(long)], disable_tqdm=True) != [""]
    with pytest.raises(ValueError, match="max_gen_toks=40 leaves no room"):
        lm.generate_until([asked("a", max_gen_toks=40)])
    assert lm.generate_until([], disable_tqdm=True) == []
    bos = bare.tokenizer.decode([lm.prefix_token_id])
    assert lm._ask(bos + "a", {"max_gen_toks": 9}, 0).prompt.count(lm.prefix_token_id) == 1
    assert lm._ask("", {"max_gen_toks": 9}, 0).prompt == [lm.prefix_token_id]


def test_thinking_is_taken_off_as_the_harness_does(bare):
    def answers(end):
        lm = ReflectiveLM(bare, n=2, temperature=1.0, think_end_token=end)
        return lm.generate_until([asked(f"question {i}") for i in range(6)], disable_tqdm=True)

    whole = answers(None)
    mark = next(c for text in whole for c in text[1:-1] if c.isascii() and c.isalpha())
    after = [text.rpartition(mark)[2].lstrip() for text in whole]
    assert answers(bare.tokenizer(mark).input_ids[0]) == answers(mark) == after != [text.lstrip() for text in whole]


@dataclass
class Impatient(Strategy):
    def choose(self, candidates):
        if Impatient.asked:
            raise KeyboardInterrupt
        Impatient.asked += 1
        return 0


def test_what_was_answered_before_ctrl_c_is_in_the_cache(bare, tmp_path):
    Impatient.asked = 0
    requests = [asked("first"), asked("second")]
    caching = CachingLM(ReflectiveLM(bare, strategy=Impatient(n=2), batch_rows=2), str(tmp_path / "cache.db"))
    with pytest.raises(KeyboardInterrupt):
        caching.generate_until(requests)
    lm = ReflectiveLM(bare, n=2)
    caching = CachingLM(lm, str(tmp_path / "cache.db"))
    asks, run = [], lm.generate_until
    lm.generate_until = lambda requests: asks.append(len(requests)) or run(requests, disable_tqdm=True)
    caching.generate_until(requests)
    assert asks == [1]


def test_refusals_of_requests(bare):
    lm = ReflectiveLM(bare, n=2)
    assert lm.generate_until([]) == []
    for given, message in (
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
        ({"max_gen_toks": 512}, "max_gen_toks=512 leaves no room for a context in the model's 512 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate_until([asked("a"), asked("b", **given)])
    assert len(lm.generate_until([asked("a"), asked("")])) == 2, "an empty context is the beginning of a text"


def test_refusals(place):
    path = str(place / "model")
    for settings, message in (
        ({"peft": "somewhere", "parallelize": True}, "parallelize, peft: load the model yourself"),
        ({"effort": "heroic"}, "effort='heroic'"),
        ({"strategy": "guess"}, "strategy='guess'"),
    ):
        with pytest.raises(ValueError, match=message):
            ReflectiveLM(path, device="cpu", **settings)


@pytest.mark.parametrize("processes", [1, 2])
def test_command_line(place, bare, tmp_path, processes):
    """Also where every process takes a share of the requests, as under ``accelerate launch``."""
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        sys.executable, *launch, "-m", "reflective.integrations.lm_eval", "--model", "reflective", "--tasks", "written",
        "--model_args", f"pretrained={place / 'model'},n=3,temperature=1.0", "--include_path", place / "tasks",
        "--output_path", tmp_path, "--log_samples", "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=tiny.PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("samples_written*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        context = f"Question: {QUESTIONS[sample['doc_id']]}\nAnswer:"
        assert sample["resps"] == [[cut(best(bare, context, n=3, temperature=1.0).text)]]


# -- the harness as a client of the server -------------------------------------------------------------------------------


def alone(net, ids, length):
    """Log-likelihood of what follows the first ``length`` of ``ids``, and whether it is what greedy decoding gives."""
    with torch.no_grad():
        rows = net(torch.tensor([ids])).logits[0].float().log_softmax(-1)[length - 1 : -1]
    after = torch.tensor(ids[length:])
    return rows.gather(1, after[:, None]).sum().item(), bool((rows.argmax(-1) == after).all())


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 3}, {"num_concurrent": 4}], ids=["defaults", "batch", "concurrent"]
)
def test_local_completions(place, bare, settings):
    from test_serve import live

    net = LlamaForCausalLM.from_pretrained(place / "model").eval()
    model = rf.ReflectiveModel(bare.model, bare.tokenizer, bare.head, replace(bare.config, answer=None))
    with live(model) as server:
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "tiny", "base_url": f"{server.url}/v1/completions", "tokenizer": str(place / "model"), **settings
            },
            tasks=["written", "chosen"], task_manager=tasks(place), log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    seen = 0
    for sample in results["samples"]["chosen"]:
        for (context, continuation), ((found, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            ids = bare.tokenizer(context + continuation).input_ids
            expected, likeliest = alone(net, ids, len(bare.tokenizer(context).input_ids))
            assert (float(found), greedy in (True, "True")) == (pytest.approx(expected, abs=1e-4), likeliest)
            seen += 1
    assert seen == 3 * len(QUESTIONS)
    for sample in results["samples"]["written"]:
        ((context, given),) = sample["arguments"]
        ids = bare.tokenizer(context, return_tensors="pt").input_ids
        out = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0)
        text = bare.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"] == [[cut(text)]] and set(UNTIL) <= set(given["until"])
