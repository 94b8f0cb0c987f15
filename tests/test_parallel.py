"""Two processes that share a model's work and its head, over gloo: same answers as one process, same bits on both."""

import os
import pickle
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import test_model
import test_scorer
import tiny
import torch
import torch.distributed as dist
from cases import assert_2x
from ranks import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import is_accelerate_available

import reflective as rf
from reflective import kernels
from reflective.engines.hf.internals import cache_of, with_cache
from reflective.model import Candidate, Config
from reflective.scoring import sharded as parallel

WORLD, UNITS = 2, 37  # units that two ranks cannot share evenly
STREAMS = {  # name: keywords of StreamScorer
    f"{schedule} {at} {rows}": {"schedule": schedule, "at": at, "buffer_rows": rows}
    for schedule, at, rows in (
        ("deferred", "predict", 20), ("deferred", "token", 20), ("deferred", "predict", 256),
        ("immediate", "predict", 20), ("immediate", "token", 1),
    )
}  # fmt: skip
EVEN_VOCAB = tiny.VOCAB + 1  # transformers 5.17 splits no odd one
TOKENS, PROMPTS = 30, (5, 9, 3, 9, 7, 4)
BEST_OF = {"n": 16, "max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "seed": 1}


def head():
    torch.manual_seed(0)
    return rf.SPRM(tiny.HIDDEN, UNITS).requires_grad_(False).eval()


def prompts():
    """Their third and their fifth column are steps of the prompts that are long enough, for ``scope="text"``."""
    ids, mask = test_scorer.prompts(PROMPTS)
    ids[:, 2] = torch.where(mask[:, 2] > 0, tiny.STEP_IDS[0], tiny.PAD)
    ids[:, 3], ids[:, 4] = 7 * mask[:, 3], tiny.STEP_IDS[1] * mask[:, 4]
    return ids, mask


def decode(scorer, net):
    return test_scorer.decode(scorer, net, *prompts(), max_new_tokens=TOKENS, suppress_tokens=[2])


def decode_from_chunks(scorer, net):
    ids, mask = prompts()
    with scorer:
        scorer.begin(ids, mask)
        torch.manual_seed(3)
        return net.generate(ids, attention_mask=mask, prefill_chunk_size=4, **test_scorer.SAMPLING)


def model_of(vocab_size):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**tiny._SIZES, "vocab_size": vocab_size})).eval()


def reflective_model():
    tokenizer = test_model.byte_tokenizer()
    settings = Config(rule="text", delimiter=test_model.DELIMITERS, prompt="Q: {question}\n")
    return rf.ReflectiveModel(model_of(len(tokenizer)), tokenizer, head(), settings)


# -- what each rank does ----------------------------------------------------------------------------------------------


def work(rank, folder):
    group, found = dist.group.WORLD, {}
    reductions, all_reduce = [], dist.all_reduce
    parallel.dist.all_reduce = lambda tensor, *args, **kwargs: (
        reductions.append(tensor.numel()) or all_reduce(tensor, *args, **kwargs)
    )
    net = tiny.model()
    for name, kwargs in STREAMS.items():
        scorer = rf.StreamScorer(net, head(), tiny.steps(), **kwargs, process_group=group)
        del reductions[:]
        out = decode(scorer, net)
        flushes, waiting = list(reductions), int(scorer.stream.state.n_slots)
        found[name] = out, scorer.result(out), flushes, waiting
    found["kept"] = [(tuple(w.shape), w.untyped_storage().nbytes()) for w in scorer.stream.placed.weights]

    rows = [row[pad:] for row, pad in zip(out, (prompts()[1] == 0).sum(1), strict=True)]
    for at in ("predict", "token"):
        found[f"finished {at}"] = rows, rf.score(net, head(), tiny.steps(), rows, at=at, process_group=group)

    scorer = rf.StreamScorer(net, head(), tiny.steps(), scope="text", buffer_rows=14, process_group=group)
    muddle(scorer, rank)
    found["scope text"] = decode_from_chunks(scorer, net), scorer.result()

    ids, mask = (t[1:2].expand(4, -1) for t in prompts())
    with torch.no_grad():
        cache = cache_of(net(ids[:1, :6]))
    cache.batch_repeat_interleave(4)
    scorer = rf.StreamScorer(net, head(), tiny.steps(), buffer_rows=14, record_features=True, process_group=group)
    with scorer:
        scorer.begin(ids)
        torch.manual_seed(3)
        out = net.generate(ids, attention_mask=mask, **with_cache(net, cache), **test_scorer.SAMPLING)
    found["cached prefix"] = out, scorer.result(out), scorer.features()

    half = tiny.model(dtype=torch.bfloat16)
    for name, w1_dtype in (("bfloat16", None), ("float8", torch.float8_e4m3fn)):
        scorer = rf.StreamScorer(half, head().bfloat16(), tiny.steps(), w1_dtype=w1_dtype, process_group=group)
        found[name] = decode(scorer, half), scorer.result()

    model = reflective_model()
    del reductions[:]
    candidates = model.generate("how?", **BEST_OF, process_group=group).candidates
    reduced = len(reductions)
    again = model.score("Q: how?\n", [c.text for c in candidates], process_group=group)
    found["candidates"] = candidates, again, (reduced, len(reductions))

    names = "torch", "cpu" if rf.backends()["cpu"].available else "torch"
    found["backend"] = rf.StreamScorer(net, head(), tiny.steps(), backend=names[rank], process_group=group).backend.name

    # transformers splits over what it takes for the machine's accelerator, hidden GPUs left out, and needs accelerate.
    if torch._C._get_accelerator().type != "cpu" or not is_accelerate_available():
        return found
    split = type(net).from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    found["split weights"] = type(split.model.layers[0].mlp.up_proj.weight).__name__
    scorer = rf.StreamScorer(split, head(), tiny.steps(), process_group=group, buffer_rows=20)
    found["tensor parallel model"] = (out := decode(scorer, split)), scorer.result(out)
    return found


def muddle(scorer, rank):
    """Have ``decode_step`` do what GPU kernels may: steps of one long call get their slots in any order, and what lies in
    unused slots is anything."""
    decode_step = scorer.backend.decode_step

    def muddled(*args):
        decode_step(*args)
        ids, (slots, slot_owner, n_slots, _) = args[0], args[14:18]
        n = int(n_slots)
        slots[n:] = float("nan")
        slot_owner[n:] = 2**31 - 1
        if rank and ids.shape[1] > 1:
            slots[:n], slot_owner[:n] = slots[:n].flip(0), slot_owner[:n].flip(0)

    scorer.stream.placed.backend = replace(scorer.backend, decode_step=muddled)


# -- what must come of it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What ``work`` found on every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    model_of(EVEN_VOCAB).save_pretrained(folder)
    run_ranks([sys.executable, __file__, folder], WORLD)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


def same(a, b):
    """Equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, rf.TrajectoryScores):
        return same(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Candidate):
        return same(vars(a), vars(b))
    return a == b or (repr(a) == repr(b) == "nan")  # finished text comes without log-probability


def test_ranks_agree_to_the_bit(ranks):
    for name in ranks[0].keys() - {"kept"}:
        assert same(ranks[0][name], ranks[1][name]), name


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_agrees_with_a_second_pass(ranks, name):
    out, scores, flushes, waiting = ranks[0][name]
    at, rows = STREAMS[name]["at"], max(STREAMS[name]["buffer_rows"], len(PROMPTS))
    test_scorer.assert_agrees(scores, tiny.model(), head(), out, prompts()[1], at, last=at == "predict")
    forwards, B = TOKENS - 1, len(PROMPTS)
    if STREAMS[name]["schedule"] == "immediate":
        assert flushes == [B] * forwards and waiting == 0
    else:
        full = rows // B  # forwards that fill the buffer
        assert flushes == [full * B] * ((forwards - 1) // full)


def test_a_rank_keeps_its_part_alone(ranks):
    for rank, mine in ((0, UNITS // 2), (1, UNITS - UNITS // 2)):
        shapes = (mine, tiny.HIDDEN), (mine,), (1, mine), (1,)
        assert ranks[rank]["kept"] == [(shape, 4 * torch.Size(shape).numel()) for shape in shapes]


@pytest.mark.parametrize("at", ["predict", "token"])
def test_finished_text_agrees_with_a_second_pass(ranks, at):
    rows, scores = ranks[0][f"finished {at}"]
    net, sprm = tiny.model(), head()
    for row, positions, found in zip(rows, scores.step_positions, scores.step_scores, strict=True):
        assert positions.tolist() == tiny.expected_steps(row.tolist())
        exact = tiny.second_pass(tiny.model().double(), head().double(), row.tolist(), at)
        assert_2x(found.log(), tiny.second_pass(net, sprm, row.tolist(), at), exact)
    assert scores.n_steps.sum() > 20


def test_what_lies_in_unused_slots_and_in_which_order_does_not_matter(ranks):
    out, scores = ranks[0]["scope text"]
    net = tiny.model()
    scorer = rf.StreamScorer(net, head(), tiny.steps(), scope="text")
    assert torch.equal(decode_from_chunks(scorer, net), out)
    assert_close(scores, scorer.result())
    assert any(int(p[0]) < max(PROMPTS) for p in scores.step_positions)


def test_cached_prefix_and_recorded_features(ranks):
    out, scores, (features, owner) = ranks[0]["cached prefix"]
    test_scorer.assert_agrees(scores, tiny.model(), head(), out, prompts()[1][1:2], "predict")
    assert torch.bincount(owner, minlength=4).tolist() == scores.n_steps.tolist()
    torch.testing.assert_close(head()(features).squeeze(-1).sigmoid(), torch.cat(scores.step_scores))


@pytest.mark.parametrize(("name", "w1_dtype"), [("bfloat16", None), ("float8", torch.float8_e4m3fn)])
def test_other_dtypes(ranks, name, w1_dtype):
    out, scores = ranks[0][name]
    net = tiny.model(dtype=torch.bfloat16)
    scorer = rf.StreamScorer(net, head().bfloat16(), tiny.steps(), w1_dtype=w1_dtype)
    assert torch.equal(decode(scorer, net), out)
    # Of bfloat16 heads the definition rounds units and logits, the compiled backend neither.
    rough = name == "bfloat16" and scorer.backend.name == "torch"
    assert_close(scores, scorer.result(), **({"rtol": 0.02, "atol": 0.01} if rough else {}))


def test_best_of_n_on_two_ranks(ranks):
    candidates, again, (reduced, reduced_again) = ranks[0]["candidates"]
    assert 1 < reduced < reduced_again - 1, "more than the choice of a backend was reduced, both times"
    model = reflective_model()
    alone = model.generate("how?", **BEST_OF).candidates
    assert [c.token_ids for c in candidates] == [c.token_ids for c in alone]
    assert sum(len(c.step_scores) for c in candidates) > 10
    for one, other, finished in zip(candidates, alone, again, strict=True):
        assert one.step_scores == pytest.approx(other.step_scores, rel=1e-5)
        if finished.token_ids == one.token_ids:
            assert finished.step_scores == pytest.approx(other.step_scores, rel=1e-4)
    with pytest.raises(ValueError, match="w1_dtype"):
        model.generate("how?", w1_dtype=torch.int8)
    with pytest.raises(ValueError, match="w1_dtype"):
        model.score("Q: how?\n", ["so"], w1_dtype=torch.int8)


def test_ranks_take_one_backend(ranks):
    assert {found["backend"] for found in ranks} == {"torch"}


def test_a_model_that_transformers_has_split(ranks):
    """Its layers hand each other whole hidden states, plain tensors, on every rank."""
    if "split weights" not in ranks[0]:
        pytest.skip("transformers splits no model over CPU processes here")
    assert ranks[0]["split weights"] == "DTensor"
    out, scores = ranks[0]["tensor parallel model"]
    test_scorer.assert_agrees(scores, model_of(EVEN_VOCAB), head(), out, prompts()[1], "predict")


def test_shards_add_up():
    sprm = head().double()
    features = torch.randn(9, tiny.HIDDEN, dtype=torch.float64)
    for world in (1, 2, 5, UNITS):
        shards = [parallel.shard(sprm.weights(), rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([w1 for w1, *_ in shards]), sprm[0].weight)
        logits = sum(kernels.logit_rows(features, *weights) for *weights, _ in shards) + shards[0][3]
        torch.testing.assert_close(logits, sprm(features).squeeze(-1))
    with pytest.raises(ValueError, match="38 ranks for a head of 37 units"):
        parallel.shard(sprm.weights(), 0, UNITS + 1)
    with pytest.raises(ValueError, match="does not belong"):
        parallel.units(UNITS, -1, 2)


def assert_close(ours, expected, rtol=1e-5, atol=1e-6):
    assert ours.n_steps.sum() > 10
    for a, b in zip(ours.step_positions, expected.step_positions, strict=True):
        assert a.tolist() == b.tolist()
    torch.testing.assert_close(torch.cat(ours.step_scores), torch.cat(expected.step_scores), rtol=rtol, atol=atol)
    torch.testing.assert_close(ours.score, expected.score, rtol=rtol, atol=atol)


if __name__ == "__main__":
    home, own_rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=tiny.PATIENCE))
    (home / f"{own_rank}.pickle").write_bytes(pickle.dumps(work(own_rank, home)))
    dist.destroy_process_group()
