"""StreamScorer against rf.score, the definition, and an independent second pass over the same trajectories."""

import copy
import dataclasses
import inspect
import itertools

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache, T5Config, T5ForConditionalGeneration

import reflective as rf
from reflective.engines.hf.internals import cache_of, with_cache
from reflective.scoring.sharded import ShardedHead

BACKENDS = [name for name, info in rf.backends().items() if info.available]
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 40}


def prompts(lengths=(5, 9, 3), seed=1):
    """Left-padded random prompts without tags: ids and mask [B, P]."""
    torch.manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), tiny.PAD)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, -n:] = torch.randint(5, tiny.VOCAB, (n,))
        mask[row, -n:] = 1
    return ids, mask


def device_for(backend):
    """Where a model must be for ``backend`` to score it: an interpreted Triton kernel runs on CPU."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def decode(scorer, net, ids, mask, seed=3, **kwargs):
    torch.manual_seed(seed)
    with scorer:
        prompt = {"attention_mask": mask.to(net.device)}
        out = net.generate(ids.to(net.device), **prompt, **{**SAMPLING, **kwargs})
    return out.cpu() if isinstance(out, torch.Tensor) else out


def real(row, pad):
    """A trajectory without left padding and without what follows its end-of-sequence token."""
    ids = row[pad:].tolist()
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def assert_agrees(scores, net, head, out, mask, at, *, last=True, least=10):
    """The 2x rule against a float64 copy of model and head, for every trajectory of ``out``."""
    exact, exact_head = copy.deepcopy(net).double(), copy.deepcopy(head).double()
    per_prompt = len(out) // len(mask)
    ours, theirs, n = 0.0, 0.0, 0
    for i, row in enumerate(out):
        pad, P = int((mask[i // per_prompt] == 0).sum()), mask.shape[1]
        ids = real(row, pad)
        found = tiny.expected_steps(ids, P - pad)
        truth = tiny.second_pass(exact, exact_head, ids, at, P - pad)
        published = tiny.second_pass(net, head, ids, at, P - pad)
        if not last and found and found[-1] == len(row) - pad - 1:
            found, truth, published = found[:-1], truth[:-1], published[:-1]
        assert scores.step_positions[i].tolist() == [t + pad for t in found]
        assert int(scores.n_steps[i]) == len(found)
        n += len(found)
        if found:
            ours = max(ours, float((scores.step_scores[i].log().double().cpu() - truth).abs().max()))
            theirs = max(theirs, float((published.double() - truth).abs().max()))
            assert float(scores.score[i]) == pytest.approx(tiny.geometric_mean(scores.step_scores[i].log()), rel=1e-5)
        else:
            assert float(scores.score[i]) == 0
    assert n >= least, "the trajectories hold too few steps to test anything"
    assert ours <= 2 * theirs + 1e-6, f"error {ours:.2e} against {theirs:.2e} of the second pass"


@pytest.mark.parametrize("at", ["predict", "token"])
@pytest.mark.parametrize("schedule", ["deferred", "immediate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stream_agrees_with_a_second_pass(backend, schedule, at):
    net, head, (ids, mask) = tiny.model().to(device_for(backend)), tiny.head().to(device_for(backend)), prompts()
    tokens = 12 if backend == "triton" else 40  # the interpreter is slow
    scorer = rf.StreamScorer(net, head, tiny.steps(), schedule, at, backend=backend, buffer_rows=8)
    out = decode(scorer, net, ids, mask, num_return_sequences=2, max_new_tokens=tokens)
    assert_agrees(scorer.result(out), net, head, out, mask, at, last=at == "predict")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_bfloat16(backend):
    device = device_for(backend)
    net, head, (ids, mask) = (
        tiny.model(dtype=torch.bfloat16).to(device),
        tiny.head(torch.bfloat16).to(device),
        prompts(),
    )
    scorer = rf.StreamScorer(net, head, tiny.steps(), backend=backend)
    out = decode(scorer, net, ids, mask, num_return_sequences=2)
    assert_agrees(scorer.result(out), net, head, out, mask, "predict")


@pytest.mark.parametrize("schedule", ["deferred", "immediate"])
@pytest.mark.parametrize(
    ("activation", "width", "bias"), [("gelu", 24, True), ("gelu_tanh", 3, False), ("silu", 2, True)]
)
def test_heads_of_other_activations(activation, width, bias, schedule):
    torch.manual_seed(7)
    net, head, (ids, mask) = (
        tiny.model(),
        rf.SPRM(tiny.HIDDEN, width, activation=activation, bias=bias).eval(),
        prompts(),
    )
    head.requires_grad_(False)[3].weight.mul_(4)
    for backend in (b for b in BACKENDS if b != "triton"):
        here = device_for(backend)
        scorer = rf.StreamScorer(
            net.to(here), head.to(here), tiny.steps(), schedule, backend=backend, buffer_rows=8
        )  # fmt: skip
        out = decode(scorer, net, ids, mask, num_return_sequences=2)
        assert_agrees(scorer.result(out), net.cpu(), head.cpu(), out, mask, "predict")
        finished = rf.score(net, head, tiny.steps(), out, prompt_lengths=9)
        assert torch.cat(finished.step_scores).numel() > 10


def test_float8_weights_score_as_the_head_of_their_rounded_values():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts()
    rounded = copy.deepcopy(head)
    w1, _, w2, _ = head.weights(torch.float8_e4m3fn)
    rounded[0].weight.copy_(w1.float() * (w2 / head[3].weight).T)
    results = {}
    for name, sprm, kwargs in (("ours", head, {"w1_dtype": torch.float8_e4m3fn}), ("rounded", rounded, {})):
        scorer = rf.StreamScorer(net, sprm, tiny.steps(), **{"backend": "torch", **kwargs})
        out = decode(scorer, net, ids, mask, num_return_sequences=2)
        finished = rf.score(net, sprm, tiny.steps(), out, **kwargs, prompt_lengths=9)
        results[name] = torch.cat(scorer.result(out).step_scores), torch.cat(finished.step_scores)
    for ours, expected in zip(*results.values(), strict=True):
        assert len(ours) > 10
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert_agrees(scorer.result(out), net, rounded, out, mask, "predict")


def test_float8_falls_back_to_the_definition_on_cpu():
    net, head = tiny.model(), tiny.head()
    assert rf.StreamScorer(net, head, tiny.steps(), w1_dtype=torch.float8_e4m3fn).backend.name == "torch"
    if _fast() == "cpu":
        with pytest.raises(ValueError, match="backend='cpu' cannot be used here: .*not torch.float8_e4m3fn"):
            rf.StreamScorer(net, head, tiny.steps(), w1_dtype=torch.float8_e4m3fn, backend="cpu")


@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
def test_models_are_found_by_one_mechanism(kind):
    net, head, (ids, mask) = tiny.model(kind), tiny.head(), prompts((6, 6))
    scorer = rf.StreamScorer(net, head, tiny.steps())
    out = decode(scorer, net, ids, mask, num_return_sequences=3)
    assert_agrees(scorer.result(out), net, head, out, mask, "predict")


@pytest.mark.parametrize("at", ["predict", "token"])
def test_finished_text_gives_the_stream_s_answer(at):
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts()
    scorer = rf.StreamScorer(net, head, tiny.steps(), at=at)
    out = decode(scorer, net, ids, mask, num_return_sequences=2)
    stream = scorer.result(out)
    pads = (mask == 0).sum(1).repeat_interleave(2)
    rows = [torch.tensor(real(row, int(pad))) for row, pad in zip(out, pads, strict=True)]
    finished = rf.score(net, head, tiny.steps(), rows, at=at, prompt_lengths=mask.sum(1).repeat_interleave(2))
    for i, (row, pad) in enumerate(zip(out, pads.tolist(), strict=True)):
        positions, scores = finished.step_positions[i] + pad, finished.step_scores[i]
        if at == "token" and len(positions) and positions[-1] == len(row) - 1:
            positions, scores = positions[:-1], scores[:-1]  # its state was never computed
        assert stream.step_positions[i].tolist() == positions.tolist()
        torch.testing.assert_close(stream.step_scores[i], scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "how", [{"do_sample": False, "suppress_tokens": [2], "max_new_tokens": 100}, {"cache_implementation": "static"}]
)
def test_ways_of_generating(how):
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((6, 9, 4, 9))
    scorer = rf.StreamScorer(net, head, tiny.steps())
    out = decode(scorer, net, ids, mask, **how)
    assert_agrees(scorer.result(out), net, head, out, mask, "predict")


def test_output_objects_are_taken_too():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts()
    scorer = rf.StreamScorer(net, head, tiny.steps())
    out = decode(scorer, net, ids, mask, return_dict_in_generate=True)
    assert torch.equal(scorer.result(out).score, scorer.result(out.sequences).score)


def test_schedules_agree_to_the_bit():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts()
    results = []
    for schedule, rows in (("immediate", 256), ("deferred", 256), ("deferred", 7)):
        scorer = rf.StreamScorer(net, head, tiny.steps(), schedule, backend=_fast(), buffer_rows=rows)
        results.append(scorer.result(decode(scorer, net, ids, mask, num_return_sequences=2)))
    for other in results[1:]:
        assert torch.equal(results[0].score, other.score)
        assert all(torch.equal(a, b) for a, b in zip(results[0].step_scores, other.step_scores, strict=True))


@pytest.mark.parametrize("tags", list(itertools.product((0, 1, 2), (0, 1, 2))))
def test_tags_missing_single_and_doubled(tags):
    """Greedy decoding is replaced by forcing every token, so that tags fall where the test wants them."""
    net, head = tiny.model(), tiny.head()
    torch.manual_seed(sum(tags) + 7 * tags[0])
    text = torch.randint(5, tiny.VOCAB, (2, 150))
    for row in text:
        row[torch.randperm(40)[: tags[0]] + 6] = tiny.THINK
        row[torch.randperm(40)[: tags[1]] + 100] = tiny.END_THINK
    scorer = rf.StreamScorer(net, head, tiny.steps())
    with scorer:
        cache = cache_of(net(text[:, :5]))
        for t in range(5, 150):
            net(text[:, t : t + 1], **with_cache(net, cache))
    assert_agrees(scorer.result(text), net, head, text, torch.ones(2, 5, dtype=torch.long), "predict")
    assert scorer.counts() == scorer.result().n_steps.tolist()


def test_prompt_that_holds_the_think_tag():
    net, head = tiny.model(), tiny.head()
    ids, mask = prompts((6, 8))
    ids[:, -2], ids[0, -1] = tiny.THINK, tiny.STEP_IDS[0]
    scorer = rf.StreamScorer(net, head, tiny.steps())
    out = decode(scorer, net, ids, mask, num_return_sequences=3)
    assert_agrees(scorer.result(out), net, head, out, mask, "predict")


def test_scope_text_scores_the_prompt_too():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((30, 30))
    scorer = rf.StreamScorer(net, head, tiny.steps(), scope="text", buffer_rows=3)
    out = decode(scorer, net, ids, mask)
    scores = scorer.result(out)
    finished = rf.score(net, head, tiny.steps(), [real(row, 0) for row in out])
    assert any(int(p[0]) < 30 for p in scores.step_positions)
    for a, b in zip(scores.step_positions, finished.step_positions, strict=True):
        assert a.tolist() == b.tolist()
    torch.testing.assert_close(scores.score, finished.score, rtol=1e-4, atol=1e-6)


def test_the_last_token_counts_though_it_is_never_fed_back():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((6,))
    only_steps = torch.zeros(tiny.VOCAB).index_fill(0, torch.tensor(tiny.STEP_IDS), 1.0)

    def force(input_ids, logits):
        return logits.masked_fill(only_steps == 0, -torch.inf)

    for at, n in (("predict", 1), ("token", 0)):
        ids[0, -1] = 5
        scorer = rf.StreamScorer(net, head, tiny.steps(), at=at)
        out = decode(scorer, net, ids, mask, max_new_tokens=1, logits_processor=[force])
        assert scorer.result().n_steps.tolist() == [0]
        assert scorer.result(out).n_steps.tolist() == [n]
        assert scorer.result().n_steps.tolist() == [0], "asking for a result must not change the stream"


@pytest.mark.parametrize(("scope", "quiet"), [("response", 9), ("text", 0)])
@pytest.mark.parametrize("record_features", [False, True])
def test_the_op_is_told_of_the_columns_before_the_scope(record_features, scope, quiet):
    net, head = tiny.model(), tiny.head()
    ids, mask = prompts()
    scorer = rf.StreamScorer(net, head, tiny.steps(), scope=scope, record_features=record_features, buffer_rows=64)
    calls, backend = [], scorer.backend

    def decode_step(*args):
        calls.append((args[0].shape[1], args[22]))
        backend.decode_step(*args)

    scorer.stream.placed.backend = dataclasses.replace(backend, decode_step=decode_step)
    scorer.result(decode(scorer, net, ids, mask, max_new_tokens=4))
    assert calls[:4] == [(9, quiet), (1, 0), (1, 0), (1, 0)]


def test_one_scorer_serves_several_generations():
    net, head = tiny.model(), tiny.head()
    scorer = rf.StreamScorer(net, head, tiny.steps())
    for lengths, seed in (((4, 7), 3), ((5, 5, 5), 4), ((9,), 5)):
        ids, mask = prompts(lengths)
        out = decode(scorer, net, ids, mask, seed=seed, num_return_sequences=4)
        assert_agrees(scorer.result(out), net, head, out, mask, "predict")


def test_cached_prefix_announced_by_begin():
    net, head = tiny.model(), tiny.head()
    ids, mask = prompts((12,))
    ids[0, 3] = tiny.THINK
    ids, mask = ids.expand(6, -1), mask.expand(6, -1)
    with torch.no_grad():
        cache = cache_of(net(ids[:1, :9]))
    cache.batch_repeat_interleave(6)
    scorer = rf.StreamScorer(net, head, tiny.steps())
    torch.manual_seed(3)
    with scorer:
        scorer.begin(ids)
        out = net.generate(ids, attention_mask=mask, **with_cache(net, cache), **SAMPLING)
    assert_agrees(scorer.result(out), net, head, out, mask, "predict")


def test_a_prompt_in_pieces_must_be_announced():
    """By whoever writes the loop; generate announces its prompts."""
    net, head = tiny.model(), tiny.head()
    text = torch.randint(5, tiny.VOCAB, (2, 60))
    text[:, 6], text[:, 5] = tiny.STEP_IDS[0], 7

    def loop():
        cache = cache_of(net(text[:, :5]))
        net(text[:, 5:12], **with_cache(net, cache))
        for t in range(12, 60):
            net(text[:, t : t + 1], **with_cache(net, cache))

    scorer = rf.StreamScorer(net, head, tiny.steps())
    with torch.no_grad(), pytest.raises(RuntimeError, match="announce the whole of it with scorer.begin"), scorer:
        loop()
    with torch.no_grad(), scorer:
        scorer.begin(text[:, :12])
        loop()
    assert_agrees(scorer.result(text), net, head, text, torch.ones(2, 12), "predict")


def test_begin_concerns_the_next_generation_only():
    net, head = tiny.model(), tiny.head()
    ids, _ = prompts((6, 6))
    scorer = rf.StreamScorer(net, head, tiny.steps())
    with scorer:
        scorer.begin(ids)  # abandoned
    other, other_mask = prompts((7, 7, 7))
    with scorer:
        scorer.begin(other)
        torch.manual_seed(3)
        net.generate(other, attention_mask=other_mask, **SAMPLING)
        torch.manual_seed(4)
        out = net.generate(other, attention_mask=other_mask, suppress_tokens=[2], **SAMPLING)
    assert_agrees(scorer.result(out), net, head, out, other_mask, "predict")


def test_finished_text_may_be_scored_while_a_stream_is_attached():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts()
    scorer = rf.StreamScorer(net, head, tiny.steps())
    with scorer:
        out = net.generate(ids, attention_mask=mask, **SAMPLING)
        before = scorer.result(out).score
        rf.score(net, head, tiny.steps(), out.clamp_min(5))
        assert torch.equal(scorer.result(out).score, before)


def test_inference_mode_and_plain_mode_may_alternate():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((6, 9, 4, 9))
    scorer = rf.StreamScorer(net, head, tiny.steps())
    with torch.inference_mode():
        decode(scorer, net, ids, mask)
    out = decode(scorer, net, ids, mask)
    assert_agrees(scorer.result(out), net, head, out, mask, "predict")


def test_a_static_cache_is_not_asked_at_every_token(monkeypatch):
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((6, 9, 4, 9, 8))
    scorer, asked = rf.StreamScorer(net, head, tiny.steps()), []
    length = StaticCache.get_seq_length
    monkeypatch.setattr(StaticCache, "get_seq_length", lambda *a, **k: asked.append(_in_scorer()) or length(*a, **k))
    for seed in (3, 4):  # the second generation may get the first one's cache again
        out = decode(scorer, net, ids, mask, seed=seed, cache_implementation="static", suppress_tokens=[2])
        assert_agrees(scorer.result(out), net, head, out, mask, "predict")
    assert sum(asked) <= 4


def _in_scorer():
    return any(frame.filename.endswith("follower.py") and frame.function == "past" for frame in inspect.stack()[1:4])


def test_two_scorers_on_one_model_do_not_meet():
    net, (ids, mask) = tiny.model(), prompts()
    first = rf.StreamScorer(net, tiny.head(seed=0), tiny.steps())
    second = rf.StreamScorer(net, tiny.head(seed=1), tiny.steps(step_ids=[30, 31, 32, 33, 34, 35]), "immediate")
    with first:
        out = decode(second, net, ids, mask, num_return_sequences=2)
    alone = rf.StreamScorer(net, tiny.head(seed=1), tiny.steps(step_ids=[30, 31, 32, 33, 34, 35]))
    assert torch.equal(decode(alone, net, ids, mask, num_return_sequences=2), out)
    assert_agrees(first.result(out), net, tiny.head(seed=0), out, mask, "predict")
    assert torch.equal(second.result(out).score, alone.result(out).score)


def test_features_are_those_that_were_scored():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts()
    scorer = rf.StreamScorer(net, head, tiny.steps(), record_features=True, buffer_rows=6, schedule="immediate")
    out = decode(scorer, net, ids, mask, num_return_sequences=2)
    for _ in range(2):  # asking twice gives the same
        scores = scorer.result(out)
        features, owner = scorer.features()
        assert torch.bincount(owner, minlength=6).tolist() == scores.n_steps.tolist()
        torch.testing.assert_close(
            head(features).squeeze(-1).sigmoid(), torch.cat(scores.step_scores), rtol=1e-5, atol=1e-6
        )
    assert_agrees(scores, net, head, out, mask, "predict")
    with pytest.raises(RuntimeError, match="record_features=True"):
        rf.StreamScorer(net, head, tiny.steps()).features()


def test_more_steps_than_the_log_keeps_still_count():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((6, 6))
    full = rf.StreamScorer(net, head, tiny.steps())
    short = rf.StreamScorer(net, head, tiny.steps(), max_steps=2)
    with full:
        out = decode(short, net, ids, mask, suppress_tokens=[2])
    with pytest.warns(UserWarning, match="max_steps=2"):
        scores = short.result(out)
    assert torch.equal(scores.score, full.result(out).score)
    assert torch.equal(scores.n_steps, full.result(out).n_steps)
    assert [len(s) for s in scores.step_scores] == [2, 2]


def test_a_nonfinite_state_spoils_its_own_sequence_only():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((6, 6, 6))
    clean = rf.StreamScorer(net, head, tiny.steps())
    out = decode(clean, net, ids, mask, suppress_tokens=[2])
    reference = clean.result(out)
    column = int(reference.step_positions[1][1]) - 1

    scorer = rf.StreamScorer(net, head, tiny.steps())
    with scorer:
        cache = cache_of(net(out[:, :6]))
        for t in range(6, out.shape[1]):

            def poison(module, args, kwargs, output, t=t):
                if t == column:
                    output[1, -1, 5] = float("inf")

            handle = net.model.layers[-2].register_forward_hook(poison, with_kwargs=True)
            net(out[:, t : t + 1], **with_cache(net, cache))
            handle.remove()
    with pytest.warns(rf.NonFiniteWarning, match=f"sequence 1: the hidden state at column {column} "):
        scores = scorer.result(out)
    assert scores.score[1].isnan() and list(scores.errors) == [1]
    torch.testing.assert_close(scores.score[[0, 2]], reference.score[[0, 2]], rtol=1e-4, atol=1e-6)
    assert scores.best() != 1


def test_the_model_is_left_as_it_was_found():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts()

    def hooks():
        of_modules = [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
        return of_modules, sorted(vars(net)), sorted(vars(net.model.layers[-1]))

    before, parameters = hooks(), {k: v.clone() for k, v in net.state_dict().items()}
    scorer = rf.StreamScorer(net, head, tiny.steps())
    with pytest.raises(ZeroDivisionError), scorer:
        assert hooks() != before
        raise ZeroDivisionError
    assert hooks() == before
    broken = rf.StreamScorer(net, head, tiny.steps())
    with pytest.raises(ValueError, match="input_ids"), broken:
        net(inputs_embeds=torch.zeros(1, 3, tiny.HIDDEN))
    rf.score(net, head, tiny.steps(), [[5, 6, 7, tiny.STEP_IDS[0], 9]])
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(net.model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        rf.score(net, head, tiny.steps(), [[5, 6, 7, tiny.STEP_IDS[0], 9]])
    assert hooks() == before and not net.training
    assert all(torch.equal(parameters[k], v) for k, v in net.state_dict().items())
    assert scorer.result(decode(scorer, net, ids, mask)).n_steps.sum() > 0


def test_nothing_is_allocated_by_an_idle_step():
    if _fast() != "cpu":
        pytest.skip("the compiled CPU backend is not here")
    net, head = tiny.model(), tiny.head()
    scorer = rf.StreamScorer(net, head, tiny.steps(), backend="cpu")
    ids, mask = prompts((6, 6))
    decode(scorer, net, ids, mask)
    state, hidden, plain = scorer.stream.state, torch.randn(2, 1, tiny.HIDDEN), torch.full((2, 1), 7)
    pointers = [t.data_ptr() for t in state.tensors()]
    with torch.profiler.profile(profile_memory=True) as profile:
        for token in (plain, torch.full((2, 1), tiny.STEP_IDS[0]), plain):
            scorer.stream.run(state, token, hidden)
    assert sum(abs(e.self_cpu_memory_usage) for e in profile.key_averages() if "decode_step" in e.key) == 0
    assert [t.data_ptr() for t in state.tensors()] == pointers


def test_attaching_takes_no_memory_for_the_head():
    """Its weights stay those of the module, and nothing of their size is made in order to choose who computes with them."""
    head, net = tiny.head(), tiny.model()
    with torch.profiler.profile(profile_memory=True) as profile:
        placed = ShardedHead(head, net.device, net.dtype, None, None, None).load()
    assert [w.data_ptr() for w in placed.weights] == [
        head.get_parameter(n).data_ptr() for n in ("0.weight", "0.bias", "3.weight", "3.bias")
    ]
    assert max((e.cpu_memory_usage for e in profile.events()), default=0) < head[0].weight.nbytes / 4


# -- what must be refused, clearly ------------------------------------------------------------------------------------


def test_parts_that_do_not_fit():
    net, head, steps = tiny.model(), tiny.head(), tiny.steps()
    with pytest.raises(ValueError, match=r"hidden size 32 differs from the 64 of LlamaForCausalLM"):
        rf.StreamScorer(net, tiny.head(hidden=32), steps)
    with pytest.raises(
        ValueError, match=r"dtype torch.bfloat16 differs from the torch.float32.*head.to\(torch.float32\)"
    ):
        rf.score(net, tiny.head(torch.bfloat16), steps, [[1, 2, 3]])
    with pytest.raises(ValueError, match="vocabular"):
        rf.StreamScorer(net, head, rf.StepTokens(step_ids=[tiny.VOCAB]))
    with pytest.raises(ValueError, match="the padding token 0 is a step-token"):
        rf.StreamScorer(net, head, tiny.steps(step_ids=[0, 5]))
    with pytest.raises(ValueError, match="encoder-decoder"):
        rf.StreamScorer(
            T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=2, num_heads=2)),
            head,
            steps,
        )
    config = LlamaConfig(**{**tiny._SIZES, "num_hidden_layers": 1})
    with pytest.raises(ValueError, match="has 1 layer"):
        rf.StreamScorer(LlamaForCausalLM(config), head, steps)
    with pytest.raises(ValueError, match="not a transformers model"):
        rf.StreamScorer(torch.nn.Linear(2, 2), head, steps)
    for name, value in (("schedule", "later"), ("at", "step"), ("scope", "all"), ("backend", "tpu")):
        with pytest.raises(ValueError, match=f"{name}='{value}'; expected one of"):
            rf.StreamScorer(net, head, steps, **{name: value})
    with pytest.raises(ValueError, match="w1_dtype=torch.int8; expected None"):
        rf.StreamScorer(net, head, steps, w1_dtype=torch.int8)
    with pytest.raises(ValueError, match="backend='cuda' (is unavailable|cannot be used here)"):
        rf.StreamScorer(net, head, steps, backend="cuda")


def test_streams_that_cannot_be_scored():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((6, 6))
    scorer = rf.StreamScorer(net, head, tiny.steps())
    with pytest.raises(RuntimeError, match="nothing to score"):
        scorer.result()
    with pytest.raises(ValueError, match="use_cache=True"):
        decode(scorer, net, ids, mask, use_cache=False)
    with pytest.raises(ValueError, match="padding_side='left'"):
        decode(scorer, net, ids, mask.flip(1) * torch.tensor([1, 1, 1, 1, 1, 0]))
    with pytest.raises(ValueError, match="at least one prompt of at least one token"):
        scorer.begin(torch.empty(0, 3, dtype=torch.long))
    with torch.no_grad():
        cache = cache_of(net(ids))
    with pytest.raises(RuntimeError, match="announce the whole prompt with scorer.begin"), scorer:
        net(torch.full((2, 1), 7), **with_cache(net, cache))
    with scorer, pytest.raises(RuntimeError, match="attached already"):
        scorer.__enter__()

    with scorer:
        cache = cache_of(net(ids))
        net(torch.full((2, 1), 7), **with_cache(net, cache))
        cache.crop(-1)
        with pytest.raises(RuntimeError, match="rolled back"):
            net(torch.full((2, 1), 8), **with_cache(net, cache))


def test_sequences_that_were_not_decoded():
    net, head, (ids, mask) = tiny.model(), tiny.head(), prompts((6, 6))
    scorer = rf.StreamScorer(net, head, tiny.steps())
    out = decode(scorer, net, ids, mask)
    changed = out.clone()
    changed[1, 8] = 5 if int(out[1, 8]) != 5 else 6
    with pytest.raises(ValueError, match=r"rows \[1\] are not the tokens that the model decoded"):
        scorer.result(changed)
    with pytest.raises(ValueError, match="does not continue"):
        scorer.result(out[:, :10])
    with pytest.raises(ValueError, match="does not continue"):
        scorer.result(out[:1])
    assert torch.equal(scorer.result().n_steps, scorer.result().n_steps), "what was scored is still there"


def _fast():
    return "cpu" if "cpu" in BACKENDS else "torch"
