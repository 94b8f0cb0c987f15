"""transformers' own pipeline, with scores: those of rf.score on the very ids that it decoded."""

import copy
import math

import pytest
import tiny
import torch
from test_model import DELIMITERS, byte_tokenizer
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

import reflective as rf
from reflective.integrations.pipeline import ScoredTextGenerationPipeline, _best
from reflective.model import Config

PROMPTS = ["ab", "a longer prompt 1 2", "why?"]
CHAT = [{"role": "user", "content": "a 1 b"}]
SETTINGS = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.0, "top_k": 0}


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    net = LlamaForCausalLM(LlamaConfig(**{**tiny._SIZES, "vocab_size": len(tokenizer), "eos_token_id": 1})).eval()
    with torch.no_grad():
        net.get_input_embeddings().weight *= 20
    return net, tokenizer, tiny.head(), rf.StepTokens.from_tokenizer(tokenizer, rule="text", delimiter=DELIMITERS)


def scored(parts, **settings):
    net, tokenizer, head, steps = parts
    return pipeline(
        "text-generation", model=net, tokenizer=copy.deepcopy(tokenizer), device="cpu", head=head, steps=steps,
        pipeline_class=ScoredTextGenerationPipeline, **settings,
    )  # fmt: skip


def plain(parts, **settings):
    return pipeline("text-generation", model=parts[0], tokenizer=copy.deepcopy(parts[1]), device="cpu", **settings)


def run(pipe, *args, **settings):
    torch.manual_seed(1)
    return pipe(*args, **{**SETTINGS, **settings})


def check(parts, records, prompt, pad=0, at="predict"):
    """Scores of records with token ids, padded on the left, are those of the finished ids alone."""
    net, _, head, steps = parts
    for record in records:
        ids = record["generated_token_ids"][
            pad : None if at == "predict" else -1
        ]  # the last token has no state of its own
        end = ids.index(1, len(prompt)) + 1 if 1 in ids[len(prompt) :] else len(ids)
        finished = rf.score(net, head, steps, [ids[:end]], at=at, prompt_lengths=[len(prompt)])
        assert ids[: len(prompt)] == prompt
        assert record["score"] == pytest.approx(float(finished.score), rel=1e-5)
        assert record["step_scores"] == pytest.approx(finished.step_scores[0].tolist(), rel=1e-5)


@pytest.mark.parametrize("at", ["predict", "token"])
def test_every_record_has_the_score_of_its_ids(parts, at):
    pipe = scored(parts, at=at)
    records = run(pipe, PROMPTS[1], num_return_sequences=6, return_tensors=True)
    assert len(records) == 6 and len({r["score"] for r in records}) > 3
    assert len({len(r["step_scores"]) for r in records}) > 1
    none = run(pipe, PROMPTS[1], suppress_tokens=parts[1]("".join(DELIMITERS)).input_ids)
    assert [(r["score"], r["step_scores"]) for r in none] == [(0.0, [])]
    check(parts, records, parts[1](PROMPTS[1]).input_ids, at=at)


def test_one_path_is_enough(parts, tmp_path):
    net, tokenizer, head, _ = parts
    config = Config(rule="text", delimiter=DELIMITERS, at="token")
    rf.ReflectiveModel(net, tokenizer, head, config).save_pretrained(tmp_path / "all")
    pipe = pipeline("text-generation", model=str(tmp_path / "all"), pipeline_class=ScoredTextGenerationPipeline)
    want = run(scored(parts, at="token"), PROMPTS[1], num_return_sequences=4)
    assert run(pipe, PROMPTS[1], num_return_sequences=4) == want and any(r["step_scores"] for r in want)

    # Apart: a published head, which says nothing of its use; and what is said in the call comes first.
    head.save_pretrained(tmp_path / "score_module.pt")
    plain_path = tmp_path / "plain"
    net.save_pretrained(plain_path)
    tokenizer.save_pretrained(plain_path)
    settings = {"model": str(plain_path), "pipeline_class": ScoredTextGenerationPipeline}
    steps = rf.StepTokens.from_tokenizer(tokenizer, rule="text", delimiter=DELIMITERS)
    pipe = pipeline("text-generation", head=tmp_path / "score_module.pt", steps=steps, at="token", **settings)
    assert run(pipe, PROMPTS[1], num_return_sequences=4) == want
    with pytest.raises(FileNotFoundError, match="score_module"):
        pipeline("text-generation", **settings)
    with pytest.raises(ValueError, match="steps: a head alone"):
        pipeline("text-generation", head=head, **settings)


@pytest.mark.parametrize(
    "inputs", [PROMPTS[0], PROMPTS, CHAT, [CHAT, [*CHAT, {"role": "assistant", "content": "x"}]], ""]
)
@pytest.mark.parametrize("settings", [{}, {"return_full_text": False}, {"num_return_sequences": 3}, {"batch_size": 2}])
def test_all_else_is_as_without_scores(parts, inputs, settings):
    def without(found):
        if isinstance(found, list):
            return [without(f) for f in found]
        assert set(found) == {"generated_text", "score", "step_scores"} and 0 <= found["score"] < 1
        return {"generated_text": found["generated_text"]}

    if inputs == "" and "batch_size" in settings:
        pytest.skip("transformers batches no empty prompt")
    assert without(run(scored(parts), inputs, **settings)) == run(plain(parts), inputs, **settings)


def test_batches_are_taken_apart_with_their_scores(parts):
    pipe, tokenizer = scored(parts, batch_size=2), parts[1]
    found = run(pipe, PROMPTS, num_return_sequences=3, return_tensors=True)
    ids = [tokenizer(p).input_ids for p in PROMPTS]
    for records, prompt, width in zip(found, ids, [len(ids[1]), len(ids[1]), len(ids[2])], strict=True):
        check(parts, records, prompt, pad=width - len(prompt))
    assert sum(len(r["step_scores"]) for records in found for r in records) > 5

    class Lines(Dataset):
        def __len__(self):
            return len(PROMPTS)

        def __getitem__(self, i):
            return PROMPTS[i]

    assert [len(records) for records in run(pipe, Lines(), best_of=2)] == [1, 1, 1]


def test_best_of_is_the_record_with_the_highest_score(parts):
    pipe = scored(parts)
    several = run(pipe, PROMPTS, num_return_sequences=5)
    best = [[max(records, key=lambda r: r["score"]) | {"chosen_by": "score"}] for records in several]
    assert any(b["score"] > records[0]["score"] for (b,), records in zip(best, several, strict=True))
    assert run(pipe, PROMPTS, best_of=5) == best
    always = scored(parts, best_of=5)
    assert run(always, PROMPTS) == best
    assert run(always, PROMPTS, num_return_sequences=5) == several
    last = run(pipe, PROMPTS, best_of=5, aggregation="last")
    for (record,), records in zip(last, several, strict=True):
        assert record["score"] == pytest.approx(
            max(r["step_scores"][-1] for r in records if r["step_scores"]), rel=1e-6
        )
    assert run(scored(parts, best_of=5, aggregation="last"), PROMPTS) == last


@pytest.mark.filterwarnings("ignore::reflective.scoring.scores.NonFiniteWarning")
def test_a_response_without_a_score_is_never_the_best(parts):
    net = copy.deepcopy(parts[0])
    with torch.no_grad():
        net.get_input_embeddings().weight[20:28] = torch.nan  # of tokens that no prompt has
    pipe = scored((net, *parts[1:]))
    settings = {"remove_invalid_values": True}
    several = run(pipe, PROMPTS[0], num_return_sequences=8, **settings)
    (best,) = run(pipe, PROMPTS[0], best_of=8, **settings)
    valid = [r for r in several if not math.isnan(r["score"])]
    assert math.isnan(several[0]["score"]) and 0 < len(valid) < 8
    assert best == max(valid, key=lambda r: r["score"]) | {"chosen_by": "score"}


@pytest.mark.parametrize("settings", [{}, {"return_tensors": True}])
@pytest.mark.parametrize("inputs", [PROMPTS[0], CHAT], ids=["text", "chat"])
def test_without_a_step_the_best_is_what_is_said_most(parts, inputs, settings):
    """One token each, of a few that are likely; the scorer knows no token that would end a step."""
    silent = rf.StepTokens.from_tokenizer(parts[1], rule="text", delimiter="\u2603")
    pipe = scored((*parts[:3], silent))
    settings = {"max_new_tokens": 1, "top_k": 4, **settings}
    several = run(pipe, inputs, num_return_sequences=24, **settings)
    (best,) = run(pipe, inputs, best_of=24, **settings)
    (key,) = {key for key in several[0] if key.startswith("generated_")}
    said = [repr(record[key]) for record in several]
    most = max(map(said.count, said))
    assert 1 < len(set(said)) < 24 and (best["score"], best["step_scores"]) == (0, [])
    assert repr(best[key]) == max(said, key=said.count)
    assert best["chosen_by"] == (
        "majority" if len({text for text in said if said.count(text) == most}) == 1 else "first"
    )


def test_best_record():
    def record(text, score=0.0, steps=()):
        return {"generated_text": text, "score": score, "step_scores": list(steps)}

    a, b, worst = record("a"), record("b"), record("w", math.nan, [math.nan])
    assert _best([a, b, b, worst]) == {**b, "chosen_by": "majority"}
    assert _best([worst, a, b]) == {**a, "chosen_by": "first"} and _best([worst, a]) == {**a, "chosen_by": "score"}
    low = record("low", 0.0, [0.0])
    assert _best([a, a, low]) == {**low, "chosen_by": "score"}, "a step, if of score 0"


def test_beams_and_static_caches_are_scored_too(parts):
    prompt = parts[1](PROMPTS[0]).input_ids
    for settings in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"cache_implementation": "static"},
    ):
        records = run(scored(parts), PROMPTS[0], return_tensors=True, **{"max_new_tokens": 20, **settings})
        check(parts, records, prompt)


def test_refusals_leave_the_model_as_it_was(parts):
    net = parts[0]
    before = [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    pipe = scored(parts)
    for settings, message in (
        ({"best_of": 0}, "best_of=0 must be at least 1"),
        ({"best_of": 2.5}, "best_of=2.5: expected an integer"),
        ({"best_of": 2, "num_return_sequences": 4}, "best_of=2"),
        ({"aggregation": "best"}, "aggregation='best'"),
        ({"use_cache": False}, "KV cache"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipe, PROMPTS[0], **settings)
    with pytest.raises(ValueError, match="head"):
        scored((*parts[:2], tiny.head(hidden=32), parts[3]))
    for inputs, message in (
        (None, "text_inputs=None: expected a text"),
        (5, "text_inputs=5: expected a text"),
        (["a", None], r"text_inputs\[1\]=None: expected a text"),
        ("\ud800", "text_inputs: character 0 is .* half of a surrogate pair"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipe, inputs)
    assert run(pipe, []) == [], "nothing comes of nothing"
    assert [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] == before
    assert run(pipe, PROMPTS[0])[0]["score"] >= 0
