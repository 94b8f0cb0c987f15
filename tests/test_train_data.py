"""What training reads: files of rollouts and of questions, and verifiers that judge responses."""

import functools
import json
import math
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reflective import tasks
from reflective.scoring.taps import Tap
from reflective.search.verify import verifier
from reflective.tasks import Question
from reflective.train.data import (
    Rollouts,
    question_weights,
    read_questions,
    read_rollouts,
    split_questions,
    write_rollouts,
)

BOS, EOS = 1, 2
CHAT = "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte level, without merges; begins texts with <s>."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT, **special)


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def draw(prompt="p", response="r", outcome=1, **more):
    return {"prompt": prompt, "response": response, "outcome": outcome, **more}


def test_equal_draws_are_counted_together(tokenizer, tmp_path):
    file = write(
        tmp_path / "draws.jsonl",
        draw("1+1=", "2", 1, answer=2), draw("1+1=", "3", False, answer="3"), draw("1+1=", "2", True, answer="2", count=4),
        draw("1+1=", "2.0", 1.0, answer="2.0"), draw("2+2=", "2", None), draw("2+2=", "5", math.nan, answer=" "),
    )  # fmt: skip
    r = read_rollouts(file, tokenizer)
    assert r.count.tolist() == [5, 1, 1, 1, 1]
    assert r.question.tolist() == [0, 0, 0, 1, 1]
    assert r.outcome.tolist()[:3] == [1, 0, 1] and r.outcome[3:].isnan().all()
    assert r.answer.tolist() == [0, 1, 0, -1, -1], "2 and 2.0 mean the same"
    assert r.length.tolist() == [6, 6, 8, 6, 6] and r.prompt_length.tolist() == [5] * 5
    assert r.ids(2).tolist() == [BOS, *ids(tokenizer, "1+1="), *ids(tokenizer, "2.0")]
    assert (r.tokens.dtype, r.count.dtype, r.outcome.dtype) == (torch.int32, torch.int64, torch.float32)


def test_prompts_become_ids_as_where_they_were_decoded(tokenizer, tmp_path):
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "x"}
    file = write(
        tmp_path / "draws.jsonl",
        draw("hi", "é", question="a"), draw("<s>hi", "é", question="b"), draw([user], "é"), draw([system, user], "é", question="a"),
        {"prompt_ids": [5, 6], "response_ids": [7, EOS], "outcome": 0}, draw([user, {"role": "assistant", "content": "so"}], ""),
    )  # fmt: skip
    r = read_rollouts(file, tokenizer)
    prompts = [r.ids(i)[: r.prompt_length[i]].tolist() for i in range(len(r))]
    assert prompts[0] == prompts[1] == [BOS, *ids(tokenizer, "hi")], "one beginning, not two"
    assert prompts[2] == [BOS, *ids(tokenizer, "user: hi\na: ")]
    assert prompts[3] == [BOS, *ids(tokenizer, "system: x\nuser: hi\na: ")]
    assert r.ids(4).tolist() == [5, 6, 7, EOS]
    assert r.ids(5).tolist() == prompts[5] == [BOS, *ids(tokenizer, "user: hi\nassistant: so")], (
        "and goes on from there"
    )
    assert r.question.tolist() == [0, 1, 2, 0, 3, 4]
    assert [len(r.ids(i)) - len(p) for i, p in enumerate(prompts)] == [2, 2, 2, 2, 2, 0]


def test_prompt_and_response_are_tokenised_apart(tokenizer, tmp_path):
    """A tokenizer that merges "ab" must not do so across the border."""
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    r = read_rollouts(write(tmp_path / "x.jsonl", draw("a", "b")), PreTrainedTokenizerFast(tokenizer_object=core))
    assert r.ids(0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (draw(outcome=2), "outcome=2;"),
        (draw(outcome=0.5), "outcome=0.5;"),
        (draw(outcome="1"), "outcome='1';"),
        ({"prompt": "p", "response": "r"}, "outcome='missing';"),
        (draw(prompt=""), "prompt='';"),
        ({**draw(), "prompt_ids": []}, "the prompt is empty"),
        (draw(prompt=[1]), r"prompt=\[1\];"),
        (draw(response=None), "response=None;"),
        (draw(count=0), "count=0;"),
        (draw(count=True), "count=True;"),
        (draw(answer=[1]), r"answer=\[1\];"),
        (draw(prompt_ids=[-1]), "prompt_ids is no list"),
        (draw(outcome=0), "outcome 0, but 1 for the same response in .*line 1"),
        (draw(outcome=None), "outcome None, but 1"),
        ([1], "expected an object"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tokenizer, tmp_path, record, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(draw()) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, line 3: {message}"):
        read_rollouts(file, tokenizer)


def test_bad_files(tokenizer, tmp_path):
    (tmp_path / "broken.jsonl").write_text("{]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1: JSONDecodeError"):
        read_rollouts(tmp_path / "broken.jsonl", tokenizer)
    with pytest.raises(ValueError, match="no record"):
        read_rollouts(tmp_path / "empty.jsonl", tokenizer)
    (tmp_path / "table.csv").write_text("prompt,response\n")
    with pytest.raises(ValueError, match=r"table\.csv holds no JSON"):
        read_rollouts(tmp_path / "table.csv", tokenizer)
    with pytest.raises(ValueError, match="format='csv'; expected jsonl or parquet"):
        read_rollouts(tmp_path / "table.csv", tokenizer, format="csv")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_written_is_read_again(tokenizer, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    tokens = torch.tensor(
        [BOS, 40, 41, EOS, BOS, 40, 42, 200, 201, BOS, 50, 51], dtype=torch.int32
    )  # 200, 201: no UTF-8
    mine = Rollouts(
        tokens, length=torch.tensor([4, 5, 3]), prompt_length=torch.tensor([2, 2, 2]), question=torch.tensor([0, 0, 1]),
        outcome=torch.tensor([1.0, 0.0, math.nan]), answer=torch.tensor([0, -1, 0]), count=torch.tensor([3, 1, 2]),
    )  # fmt: skip
    path = tmp_path / f"rollouts.{suffix}"
    write_rollouts(mine, path, tokenizer)
    again = read_rollouts(path, tokenizer)
    for name, value in vars(mine).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(9), getattr(again, name).nan_to_num(9)), name
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == "jsonl":  # without its ids a text finds its way back as well
        record = json.loads(path.read_text().splitlines()[0])
        assert record["response"].endswith("</s>")
        bare = {k: v for k, v in record.items() if not k.endswith("_ids")}
        assert torch.equal(read_rollouts(write(path, bare), tokenizer).tokens, tokens[:4])


def rollouts(length, prompt_length, **more):
    n = len(length)
    return Rollouts(
        tokens=torch.arange(sum(length), dtype=torch.int32), length=torch.tensor(length),
        prompt_length=torch.tensor(prompt_length),
        **{"question": torch.arange(n), "outcome": torch.ones(n), "answer": torch.zeros(n, dtype=torch.long),
           "count": torch.ones(n, dtype=torch.long), **more},
    )  # fmt: skip


def test_padded():
    r = rollouts([3, 1, 2], [2, 1, 1])
    found, mask, prompts = r.padded([2, 0, 2], pad=77)
    assert found.tolist() == [[4, 5, 77], [0, 1, 2], [4, 5, 77]] and found.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]] and mask.dtype == torch.int64
    assert prompts.tolist() == [1, 2, 1]
    assert [r.ids(i).tolist() for i in range(3)] == [[0, 1, 2], [3], [4, 5]]
    assert r.padded(torch.tensor([1]), 0)[0].tolist() == [[3]] and r.padded([], 0)[0].shape == (0, 0)


def test_select_save_and_join(tmp_path):
    r = rollouts(
        [3, 1, 2], [2, 1, 1], features=torch.eye(4), trajectory=torch.tensor([0, 0, 2, 2]), position=torch.tensor([1, 2, 0, 1])
    )  # fmt: skip
    r.ids(0)  # what is looked up once must not find its way into the file
    part = r.select(torch.tensor([False, True, True]))
    assert part.tokens.tolist() == [3, 4, 5] and part.trajectory.tolist() == [1, 1] and part.position.tolist() == [0, 1]
    assert torch.equal(part.features, r.features[2:])
    r.save(tmp_path / "r.safetensors")
    both = Rollouts.join([Rollouts.load(tmp_path / "r.safetensors"), part])
    assert both.trajectory.tolist() == [0, 0, 2, 2, 4, 4] and both.ids(4).tolist() == [4, 5]
    scored = rollouts([1, 1], [1, 1], trajectory=torch.tensor([0, 1])).select(torch.tensor([False, True]))
    assert scored.trajectory.tolist() == [0] and scored.features is None


def test_files_say_where_features_were_read(tmp_path):
    three = {"features": torch.arange(12.0).view(2, 6), "trajectory": torch.arange(2), "position": torch.zeros(2).long()}
    r = rollouts([3, 1], [2, 1], **three, tap=Tap((-9, 4, -2), at="token"), model="org/policy")
    r.save(tmp_path / "r.safetensors")
    again = Rollouts.load(tmp_path / "r.safetensors")
    assert again.tap == r.tap and again.model == "org/policy" and torch.equal(again.features, r.features)
    assert r.select(torch.tensor([False, True])).tap == Rollouts.join([r, again]).tap == r.tap
    read = again.read(Tap((-2, -9), at="token"))
    assert read.features.tolist() == [[4, 5, 0, 1], [10, 11, 6, 7]] and read.tap == Tap((-2, -9), at="token")
    assert again.read(r.tap) is again and torch.equal(read.tokens, r.tokens)
    for other in (Tap((-3,), at="token"), Tap((-2,)), Tap((-2,), norm=True, at="token")):
        with pytest.raises(ValueError, match="record them with that tap"):
            again.read(other)
    with pytest.raises(ValueError, match="record them all with one tap"):
        Rollouts.join([r, read])

    old = {name: value for name, value in r.tensors.items() if value is not None}
    save_file(old, tmp_path / "old.safetensors")  # as written before there were taps
    old = Rollouts.load(tmp_path / "old.safetensors")
    assert old.tap is None and old.model is None and old.read(Tap()) is old and torch.equal(old.features, r.features)
    assert Rollouts.join([old, r]).tap == r.tap, "a run that was begun then goes on"


def test_questions_are_split_into_disjoint_parts():
    r = rollouts([1] * 40, [1] * 40, question=torch.arange(10).repeat(4) * 7)
    first, second = split_questions(r, 0.3, seed=1)
    assert len(first.question.unique()) == 3 and len(second.question.unique()) == 7 and len(first) == 12
    assert not set(first.question.tolist()) & set(second.question.tolist())
    assert torch.equal(first.tokens, split_questions(r, 0.3, seed=1)[0].tokens)
    assert any(not torch.equal(first.tokens, split_questions(r, 0.3, seed=s)[0].tokens) for s in range(2, 6))
    assert len(split_questions(r, 0.01)[0]) == len(split_questions(r, 0.99)[1]) == 4
    with pytest.raises(ValueError, match="fraction=1"):
        split_questions(r, 1)
    with pytest.raises(ValueError, match="cannot split 1 question"):
        split_questions(r.select(r.question == 7), 0.5)


def test_question_weights():
    """Question 5: three right draws against one wrong and one unjudged; question 900: right only."""
    r = rollouts(
        [1] * 5, [1] * 5, question=torch.tensor([5, 5, 5, 5, 900]), outcome=torch.tensor([1.0, 1.0, 0.0, math.nan, 1.0]),
        count=torch.tensor([2, 1, 1, 1, 5]),
    )  # fmt: skip
    weights = functools.partial(question_weights, r.question, r.outcome, r.count)
    assert weights(within_questions=False).tolist() == [1, 0.5, 0.5, 0.5, 2.5]
    balanced = weights(within_questions=True) * 2  # the mean count
    assert torch.allclose(balanced, torch.tensor([4 / 3, 2 / 3, 2.0, 0.0, 0.0]))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_read_questions(tmp_path, suffix):
    records = [
        {"question": "1 + 1", "answer": "2", "level": 3},
        {"prompt": [{"role": "user", "content": "2 + 2"}], "answer": "4"},
        {"problem": "3 + 3", "answer": "6"},
        {"question": "4 + 4"},
    ]
    if suffix == "jsonl":
        file = write(tmp_path / "q.jsonl", {**records[0], "answer": 2}, *records[1:])
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        file, names = tmp_path / "q.parquet", {name for record in records for name in record}
        pq.write_table(pa.table({name: [record.get(name) for record in records] for name in names}), file)
    found = read_questions(file)
    first = next(found)
    assert first == Question("1 + 1", "2") and first.entry["level"] == 3
    assert next(found) == Question("2 + 2", "4") and next(found) == Question("3 + 3", "6")
    with pytest.raises(ValueError, match=f"{'line' if suffix == 'jsonl' else 'row'} 4: no answer"):
        next(found)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2"}]
    with pytest.raises(ValueError, match="line 1: expected a question"):
        list(read_questions(write(tmp_path / "q.jsonl", {"prompt": chat, "answer": 4})))


def test_questions_are_distinct_and_disjoint():
    first, second = tasks.split(tasks.sums(0), 300, 200)
    texts = [q.text for q in first + second]
    assert len(set(texts)) == 500
    assert all(eval(q.text) == int(q.answer) for q in first)
    with pytest.raises(ValueError, match="not enough different questions: 301 asked for, 300 found"):
        tasks.split(iter(first), 301)
    with pytest.raises(ValueError, match="not enough different questions: 9 asked for, 8 found"):
        tasks.split(tasks.sums(0, low=1, high=2), 9)  # the task itself never ends


def test_questions_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    ours = tasks.split(tasks.chain_sum(3), 20)[0]
    assert all(eval(q.text) == int(q.answer) for q in ours)
    made = tasks.split(tasks.gym(0, "chain_sum", min_terms=2, max_terms=2), 600)[0]  # more than a dataset is made with
    judge = verifier("reasoning-gym:chain_sum")
    assert all(judge(f"so <answer>{q.answer}</answer>", q) == 1 for q in made)


def test_answers_compared():
    asked, pattern = Question("7+7", "14"), lambda text: text.partition("= ")[2] or None
    judge = verifier("answer", pattern)
    assert [judge(f"7+7 = {a}", asked) for a in ("14", "+14", "14.0", "-14", "28/2")] == [1, 1, 1, 0, 1]
    assert judge("14", asked) == 0, "no answer was found"
    assert [verifier("exact", pattern)(f"= {a}", asked) for a in ("14", "14.0")] == [1, 0]
    assert verifier("exact")(" 14\n", asked) == 1
    with pytest.raises(ValueError, match="no answer pattern"):
        verifier("answer")


def test_mathematics():
    pytest.importorskip("math_verify")
    judge, half = verifier("math"), Question("", r"\frac{1}{2}")
    cases = [(r"so \boxed{0.5}", half), ("it is $1/2$.", half), (r"so \boxed{2}", half), ("no idea", half)]
    assert [judge(*case) for case in cases] == [1, 1, 0, 0]
    assert judge("72", Question("", r"$\boxed{72}$")) == 1
    assert judge("whatever", Question("", "")) is None, "nothing to compare with"
    found = []
    worker = threading.Thread(target=lambda: found.extend(judge(*case) for case in cases))
    worker.start()
    worker.join()
    assert found == [1, 1, 0, 0], "also where no alarm can be set"


RIGHT = [
    ("204", "204."), ("204", r"\text{204}"), ("204", r"\underline{204}"), ("204", r"204\\"), ("204", r"\frac{408}{2}"),
    ("204", r"x = 204"), ("204", r"204^\circ"), ("204", r"204\text{ cm}"), ("1,000", "1000"), ("1000", "1{,}000"),
    ("yes", r"\text{Yes}"), (r"\text{Monday}", "Monday"), ("1/2", "0.5"), (r"\frac{1}{2}", r"\dfrac12"), ("(1,2)", "(1, 2)"),
    ("x+1", "1+x"), (r"2\sqrt{2}", r"\sqrt{8}"), ("-3", "- 3"), ("025", "25"), ("A", "A"), (r"\text{A}", "A"),
]  # fmt: skip
WRONG = [
    ("204", "203"), ("204", "-204"), ("204", "2040"), ("204", ""), ("204", "204, 205"), ("12", "21"), ("1/2", "1/3"), ("A", "B"),
    ("yes", "no"), ("x+1", "x-1"), ("(1,2)", "(1,3)"), (r"\sqrt{2}", r"\sqrt{3}"),
]  # fmt: skip
UNCLEAR = [
    ("12", "1,2"), ("no", "on"), ("204", "2.04"), ("204", "20400"), ("204", "204_8"), ("0", "1 000"), ("1000", "1 000"),
    ("204", "204 dollars"), ("204", "204.01"), ("204", "about 204 or so"), ("", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("pairs", "label"), [(RIGHT, 1), (WRONG, 0), (UNCLEAR, None)])
def test_labels_of_answers_in_boxes(pairs, label):
    """None rather than what is wrong where ways to compare disagree."""
    pytest.importorskip("math_verify")
    judge = verifier("math")
    told = [(right, given, judge(f"So it is \\boxed{{{given}}}.", Question("", right))) for right, given in pairs]
    assert told == [(right, given, label) for right, given in pairs]


def test_the_last_box_is_the_answer():
    """All of them read as one would be 7204, or a set."""
    pytest.importorskip("math_verify")
    judge, asked = verifier("math"), Question("", "204")
    assert judge(r"\boxed{7}</think>\boxed{204}", asked) == judge(r"\boxed{7}, no, \boxed{204}", asked) == 1
    assert judge(r"\boxed{204}, no, \boxed{7}", asked) == 0
    assert judge(r"<think>\boxed{204}</think>Done.", asked) == 1 and judge("<think>5 + 5", asked) == 0


def test_what_cannot_be_told_has_no_label(monkeypatch):
    math_verify = pytest.importorskip("math_verify")
    judges, asked = [verifier("answer", str), verifier("math")], Question("", "x+1")
    found = []
    worker = threading.Thread(target=lambda: found.extend(j(r"\boxed{1+x}", asked) for j in judges))
    worker.start()
    worker.join()
    assert found == [1, 1], "in any thread"

    def slow(*_, **__):
        raise math_verify.errors.TimeoutException

    with monkeypatch.context() as patch:
        patch.setattr(math_verify, "verify", slow)
        assert [j(r"\boxed{1+x}", asked) for j in judges] == [None, None]
        assert judges[0]("x+1", asked) == 1, "which takes no mathematics"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "math_verify", None)
        assert [judges[0](given, asked) for given in ("x+1", "1+x")] == [1, None]


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    asked = next(tasks.gym(0, "countdown"))
    judge = verifier("reasoning-gym:countdown", lambda text: text or None)
    expression = asked.entry["metadata"]["expression"]
    assert judge(expression, asked) == 1
    assert judge("1", asked) == judge(") +", asked) == judge("", asked) == 0
    with pytest.raises(ValueError, match="no entry with its metadata"):
        judge("1", Question("a", "1"))
    with pytest.raises(ValueError, match="not registered"):
        verifier("reasoning-gym:nothing")


def test_an_answer_that_a_dataset_chokes_on_is_wrong(monkeypatch):
    gym = pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(
        gym, "get_score_answer_fn", lambda name: lambda answer, entry: int(answer) / entry["metadata"]["of"]
    )
    judge = verifier("reasoning-gym:x", str)
    assert [judge(a, Question("", "2", {"metadata": {"of": 2}})) for a in ("2", "1", "two")] == [1, 0, 0]
    with pytest.raises(KeyError, match="of"):  # not the answer's fault
        judge("2", Question("", "2", {"metadata": {}}))


def test_functions(tmp_path, monkeypatch):
    (tmp_path / "my_verdicts.py").write_text(
        "class My:\n    @staticmethod\n    def verdict(response, question):\n"
        "        return {'y': True, 'n': 0, '?': None, '!': float('nan'), 'half': 0.5}[response]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    judge, asked = verifier("my_verdicts:My.verdict"), Question("", "")
    assert [judge(r, asked) for r in "yn?!"] == [1.0, 0.0, None, None]
    assert verifier(lambda response, question: response == question.text)("", asked) == 1
    with pytest.raises(ValueError, match="verdict returned 0.5"):
        judge("half", asked)
    with pytest.raises(ValueError, match="nothing"):
        verifier("my_verdicts:nothing")
    for spec in ("maths", "reasoning-gym:", "a b:c", ":"):
        with pytest.raises(ValueError, match=f"verifier='{spec}'; expected answer"):
            verifier(spec)
