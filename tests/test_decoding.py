"""StreamScorer in every way of decoding that transformers has: compiled, assisted, beams, continuous batching, forks.

Truth is the float64 second pass over the returned ids (``assert_agrees`` of test_scorer.py), or, for one-sequence cases,
``rf.score`` of the same ids.
"""

import copy
import dataclasses
import re

import pytest
import tiny
import torch
from test_scorer import SAMPLING, assert_agrees, decode, device_for, prompts
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    StoppingCriteria,
)

import reflective as rf
from reflective.engines.hf.internals import (
    cache_of,
    compiled_everywhere,
    give_compiled_call,
    take_compiled_call,
    with_cache,
)

NO_TAGS = [2, tiny.THINK, tiny.END_THINK]  # nor an end: the sampled text is long enough to have steps
BACKENDS = [name for name, info in rf.backends().items() if info.available and name != "triton"]


def scorer_of(net, **kwargs):
    return rf.StreamScorer(net, tiny.head().to(net.device), tiny.steps(), **kwargs)


def assert_finished_agrees(scores, net, rows, prompt_lengths, at="predict"):
    """The stream's scores are those of ``rf.score`` of the same ids."""
    finished = rf.score(net, tiny.head().to(net.device), tiny.steps(), rows, at=at, prompt_lengths=prompt_lengths)
    assert scores.n_steps.tolist() == finished.n_steps.tolist()
    assert int(scores.n_steps.sum()) >= 5, "too few steps to test anything"
    for i in range(len(rows)):
        assert scores.step_positions[i].tolist() == finished.step_positions[i].tolist()
        torch.testing.assert_close(scores.step_scores[i], finished.step_scores[i], rtol=1e-4, atol=1e-6)


# -- compiled ----------------------------------------------------------------------------------------------------------


def compile_by(way, net, backend):
    """A forward of ``net`` compiled in one of the four ways there are."""
    if way == "module":
        return torch.compile(net, backend=backend, fullgraph=True)
    if way == "call":
        return torch.compile(net.__call__, backend=backend, fullgraph=True)
    if way == "forward":
        net.forward = torch.compile(net.forward, backend=backend, fullgraph=True)
    else:
        net.compile(backend=backend, fullgraph=True)
    return net


@pytest.mark.parametrize("way", ["module", "call", "forward", "compile"])
@torch.no_grad()
def test_a_compiled_loop_is_compiled_once_more_and_never_again(way):
    """Plain, scored, plain, scored by another scorer: two graphs for each shape in all, no graph break."""
    torch._dynamo.reset()
    net, text = tiny.model().to(device_for("cuda")), torch.randint(5, tiny.VOCAB, (2, 30))
    text[:, 8:30:4] = tiny.STEP_IDS[0]
    text, counter = text.to(net.device), CompileCounterWithBackend("eager")
    forward = compile_by(way, net, counter)

    def loop(scorer):
        cache = StaticCache(config=net.config, max_cache_len=32)
        step = torch.compile(net.__call__, backend=counter, fullgraph=True) if way == "call" else forward
        first = net if way == "call" else forward
        for begin, end in [(0, 6), *((t, t + 1) for t in range(6, 30))]:
            position = torch.arange(begin, end, device=net.device)[None]
            model = first if begin == 0 else step
            if scorer and begin == 0:
                scorer.begin(text[:, :6])
            model(input_ids=text[:, begin:end], position_ids=position, **with_cache(net, cache), use_cache=True)

    graphs = []
    for scored in (False, True, False, True, True):
        if not scored:
            loop(None)
        else:
            scorer = scorer_of(net)
            with scorer:
                loop(scorer)
            assert_finished_agrees(scorer.result(text), net, text, 6)
        graphs.append(counter.frame_count)
    assert graphs[1:] == [2 * graphs[0]] * 4, "one more compilation when first scored, none after that"


@pytest.mark.parametrize("schedule", ["deferred", "immediate"])
@pytest.mark.parametrize("compiled_before", [False, True])
def test_generate_with_a_static_cache_and_its_own_compilation(schedule, compiled_before, monkeypatch):
    """transformers' own compiled decoding (here with Dynamo's eager backend), the same scores as eager."""
    torch._dynamo.reset()
    net, (ids, mask) = tiny.model().to(device_for("cuda")), prompts((6, 9, 4))
    ids, mask = ids.to(net.device), mask.to(net.device)
    config = compiled_everywhere(CompileConfig(backend="eager", mode=None, fullgraph=True))
    how = {"cache_implementation": "static", "compile_config": config, "suppress_tokens": [2]}
    if compiled_before:
        net.generate(ids, attention_mask=mask, **SAMPLING, **how)
        before = take_compiled_call(net)
        give_compiled_call(net, before)
    torch._dynamo.utils.counters.clear()
    for seed in (3, 4):
        scorer = scorer_of(net, schedule=schedule)
        out = decode(scorer, net, ids, mask, seed=seed, **how)
        assert_agrees(scorer.result(out), net, tiny.head().to(net.device), out, mask.cpu(), "predict")
        eager = scorer_of(net, schedule=schedule)
        same = decode(eager, net, ids, mask, seed=seed, **how | {"compile_config": None})
        assert torch.equal(out, same)
        torch.testing.assert_close(scorer.result(out).score, eager.result(same).score, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not compiled_before or take_compiled_call(net) is before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("schedule", ["deferred", "immediate"])
def test_cuda_graphs_by_the_default_compilation_of_generate(schedule):
    """``mode="reduce-overhead"``: the op is captured with the model, and no graph is skipped for the state's sake."""
    torch._dynamo.reset()
    net, (ids, mask) = tiny.model().cuda(), prompts((6, 9, 4))
    how = {"cache_implementation": "static", "suppress_tokens": [2], "max_new_tokens": 60}
    torch._dynamo.utils.counters.clear()
    for seed in (3, 4):
        scorer = scorer_of(net, schedule=schedule)
        out = decode(scorer, net, ids, mask, seed=seed, **how)
        assert_agrees(scorer.result(out), net, tiny.head().cuda(), out, mask, "predict")
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def test_a_prompt_in_pieces_after_a_compiled_generation():
    """Between the two nobody asks for a result, which would tell the scorer how far the first came."""
    torch._dynamo.reset()
    net, (ids, mask) = tiny.model(), prompts((12, 12))
    ids[:, 6], ids[:, 5] = tiny.STEP_IDS[0], 7
    config = compiled_everywhere(CompileConfig(backend="eager", mode=None, fullgraph=True))
    scorer = scorer_of(net)
    decode(scorer, net, ids, mask, cache_implementation="static", compile_config=config)
    out = decode(scorer, net, ids, mask, prefill_chunk_size=5, suppress_tokens=NO_TAGS)
    assert_agrees(scorer.result(out), net, tiny.head(), out, mask, "predict")


@torch.no_grad()
def test_inductor_calls_the_op_on_the_state_itself():
    """One call in the generated code, and no copy of the step log before or after it."""
    torch._dynamo.reset()
    net, text = tiny.model(), torch.randint(5, tiny.VOCAB, (2, 10))
    text[:, 8] = tiny.STEP_IDS[0]
    scorer, cache = scorer_of(net, max_steps=777), StaticCache(config=net.config, max_cache_len=16)
    with scorer:
        net(text[:, :6], **with_cache(net, cache))
        where = [t.data_ptr() for t in scorer.stream.state.tensors()]
        forward, codes = torch.compile(net.__call__, fullgraph=True), set()
        for t in range(6, 10):
            inputs = {"input_ids": text[:, t : t + 1], "position_ids": torch.tensor([[t]])} | with_cache(net, cache)
            codes |= set(run_and_get_code(forward, **inputs)[1])
    code = "".join(codes)
    assert code.count("torch.ops.reflective.decode_step.default(") == 1
    assert not re.search(r"= (empty_strided\w*|torch\.|aten\.).*\b777\b", code)
    assert [t.data_ptr() for t in scorer.stream.state.tensors()] == where
    assert_agrees(scorer.result(text), net, tiny.head(), text, torch.ones(2, 6), "predict", least=2)


def test_what_cannot_be_compiled_is_refused_by_name():
    net, (ids, mask) = tiny.model(), prompts((6, 6))
    config = compiled_everywhere(CompileConfig(backend="eager", mode=None, fullgraph=True))
    with pytest.raises(ValueError, match="record_features=True needs eager forwards"):
        decode(
            scorer_of(net, record_features=True), net, ids, mask, cache_implementation="static", compile_config=config
        )
    torch._dynamo.reset()
    forward = torch.compile(net, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="scorer.begin"), scorer_of(net):
        forward(input_ids=ids)
    assert type(net).__mro__[1] is not type(net)


def test_a_model_whose_cache_does_not_count_is_refused_by_name():
    config = MambaConfig(vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, num_hidden_layers=3, state_size=4)
    with pytest.raises(ValueError, match="MambaForCausalLM consists of LinearAttentionLayers.*rf.score"):
        scorer_of(MambaForCausalLM(config))


# -- several tokens a forward, and back again ----------------------------------------------------------------------------


def repeating_prompt(n=24):
    """A prompt whose n-grams come again, so that prompt lookup finds drafts."""
    torch.manual_seed(5)
    phrase = torch.randint(5, tiny.VOCAB, (6,))
    phrase[3] = tiny.STEP_IDS[0]
    return phrase.repeat(4)[None, :n]


@pytest.mark.parametrize("at", ["predict", "token"])
@pytest.mark.parametrize("schedule", ["deferred", "immediate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_assisted_decoding_rolls_the_score_state_back(backend, schedule, at):
    """By an assistant that is nearly the model: some of its tokens are accepted, some are not."""
    net = tiny.model().to(device_for(backend))
    assistant = copy.deepcopy(net)
    with torch.no_grad():
        for p in assistant.parameters():
            p.add_(0.02 * p.std() * torch.randn_like(p)) if p.dim() > 1 else None
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    ids, _ = prompts((9,))
    scorer, drafted = scorer_of(net, schedule=schedule, at=at, backend=backend, buffer_rows=4), []
    back = scorer.on_crop
    torch.manual_seed(3)
    scorer.on_crop = lambda length: drafted.append(scorer.stream.seen - length) or back(length)
    with scorer:
        out = net.generate(
            ids.to(net.device), assistant_model=assistant, suppress_tokens=NO_TAGS, **SAMPLING | {"max_new_tokens": 80}
        )
    assert any(drafted) and not all(n == max(drafted) for n in drafted), "nothing was rolled back"
    scores = scorer.result(out)
    if at == "token" and int(out[0, -1]) in tiny.STEP_IDS:
        out = out[:, :-1]
    assert_finished_agrees(scores, net, out, 9, at)


def test_prompt_lookup_decoding():
    net, ids = tiny.model(), repeating_prompt()
    scorer = scorer_of(net)
    torch.manual_seed(3)
    with scorer:
        out = net.generate(ids, suppress_tokens=NO_TAGS, prompt_lookup_num_tokens=4, **SAMPLING)
    assert_finished_agrees(scorer.result(out), net, out, ids.shape[1])


def test_features_survive_a_roll_back():
    net, ids = tiny.model(), repeating_prompt()
    scorer = scorer_of(net, record_features=True)
    torch.manual_seed(3)
    with scorer:
        out = net.generate(ids, suppress_tokens=NO_TAGS, prompt_lookup_num_tokens=4, **SAMPLING)
    scores = scorer.result(out)
    features, owner = scorer.features()
    assert owner.tolist() == [0] * int(scores.n_steps[0])
    torch.testing.assert_close(tiny.head()(features)[:, 0].sigmoid(), scores.step_scores[0], rtol=1e-5, atol=1e-6)


def test_early_exit_drafts_are_not_taken_for_the_stream():
    net, (ids, _) = tiny.model(), prompts((9,))
    scorer = scorer_of(net)
    torch.manual_seed(3)
    with scorer:
        out = net.generate(ids, suppress_tokens=NO_TAGS, assistant_early_exit=2, **SAMPLING)
    assert_finished_agrees(scorer.result(out), net, out, 9)


def test_a_cache_cut_back_too_far_is_noticed():
    net, (ids, _) = tiny.model(), prompts((9,))
    scorer = scorer_of(net)
    with torch.no_grad(), scorer:
        cache = cache_of(net(ids))
        for t in (5, 6, 7):
            net(torch.tensor([[t]]), **with_cache(net, cache))
        cache.crop(-2)
        with pytest.raises(RuntimeError, match="rolled back by more than the tokens of its last forward"):
            net(torch.tensor([[8]]), **with_cache(net, cache))


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_chunked_prefill_needs_no_announcement_in_generate(chunk):
    net, (ids, mask) = tiny.model(), prompts((12, 9, 12))
    ids[0, 6], ids[0, 5], ids[0, 2] = tiny.STEP_IDS[0], 7, tiny.THINK
    scorer = scorer_of(net)
    out = decode(scorer, net, ids, mask, prefill_chunk_size=chunk, suppress_tokens=[2])
    assert_agrees(scorer.result(out), net, tiny.head(), out, mask, "predict")


def test_a_prefilled_cache_needs_no_announcement_in_generate():
    net, (ids, _) = tiny.model(), prompts((12,))
    ids[0, 3] = tiny.THINK
    with torch.no_grad():
        cache = cache_of(net(ids[:, :9]))
    cache.batch_repeat_interleave(6)
    ids = ids.expand(6, -1)
    scorer = scorer_of(net)
    out = decode(scorer, net, ids, torch.ones_like(ids), **with_cache(net, cache), suppress_tokens=[2])
    assert_agrees(scorer.result(out), net, tiny.head(), out, torch.ones_like(ids), "predict")


class Interrupt(StoppingCriteria):
    """Ctrl-C after 30 tokens; keeps the ids so far."""

    def __call__(self, input_ids, scores, **kwargs):
        self.ids, self.tokens = input_ids, getattr(self, "tokens", 0) + 1
        if self.tokens == 30:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("schedule", ["deferred", "immediate"])
def test_an_interrupt_leaves_the_model_usable_and_what_was_scored(schedule):
    net, (ids, mask) = tiny.model(), prompts((9, 9))
    scorer, watch, before = scorer_of(net, schedule=schedule), Interrupt(), type(net)
    with pytest.raises(KeyboardInterrupt):
        decode(scorer, net, ids, mask, stopping_criteria=[watch], suppress_tokens=NO_TAGS)
    assert type(net) is before
    fed = watch.ids[:, :-1]  # the newest token was drawn, but not fed
    assert fed.shape == (2, 38)
    assert_finished_agrees(scorer.result(), net, fed, 9)
    out = decode(scorer, net, ids, mask, suppress_tokens=NO_TAGS)
    assert_agrees(scorer.result(out), net, tiny.head(), out, mask, "predict")


# -- rows that move ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["fixed length", "ends", "sampled"])
def test_beam_search(how, backend):
    """Returned are beams that ran to the end and hypotheses that ended before, whose rows were taken by others."""
    net, (ids, mask) = tiny.model().to(device_for(backend)), prompts((6, 9, 7))
    settings = {"num_beams": 4, "num_return_sequences": 3, "do_sample": how == "sampled", "max_new_tokens": 40}
    settings |= {"suppress_tokens": NO_TAGS} if how == "fixed length" else {"length_penalty": 0.5}
    if how == "ends":  # a likely token ends a hypothesis, so that many end early and at different lengths
        settings |= {"eos_token_id": [2, 40, 41], "min_new_tokens": 6, "suppress_tokens": NO_TAGS[1:]}
    scorer = scorer_of(net, backend=backend)
    torch.manual_seed(3)
    with scorer:
        out = net.generate(ids.to(net.device), attention_mask=mask.to(net.device), pad_token_id=0, **settings).cpu()
    scores = scorer.result(out)
    rows, prompt_lengths = [], []
    for i, row in enumerate(out):
        pad = int((mask[i // 3] == 0).sum())
        text = row[pad:].tolist()
        while text[-1] == 0:
            text.pop()
        rows.append(torch.tensor(text))
        prompt_lengths.append(9 - pad)
    lengths = {len(r) for r in rows}
    assert how != "ends" or len(lengths) > 2, lengths
    finished = rf.score(net, tiny.head().to(net.device), tiny.steps(), rows, prompt_lengths=prompt_lengths)
    assert scores.n_steps.tolist() == finished.n_steps.tolist() and int(scores.n_steps.sum()) >= 10
    for i in range(len(rows)):
        torch.testing.assert_close(scores.step_scores[i].cpu(), finished.step_scores[i].cpu(), rtol=1e-4, atol=1e-6)
    broken = out.clone()
    broken[1, 10] = 7 if int(broken[1, 10]) != 7 else 8
    with pytest.raises(ValueError, match="row 1 is none that beam search decoded"):
        scorer.result(broken)


def test_the_state_follows_what_is_done_to_the_cache():
    """Repeat after prefill, drop a row, exchange two: as a loop of one's own does with its cache."""
    net, (ids, _) = tiny.model(), prompts((8, 8))
    torch.manual_seed(2)
    text = torch.randint(5, tiny.VOCAB, (6, 60))
    text[:, :8] = ids.repeat_interleave(3, 0)
    scorer = scorer_of(net)
    with torch.no_grad(), scorer:
        cache = cache_of(net(ids))
        cache.batch_repeat_interleave(3)
        order = torch.arange(6)
        for t in range(8, 59):
            if t == 20:
                keep = torch.tensor([5, 0, 1, 3])
                cache.batch_select_indices(keep)
                order = order[keep]
            if t == 40:
                order = order[[1, 1, 2]]
                cache.reorder_cache(torch.tensor([1, 1, 2]))
                text = torch.cat([text, text[order[1:2]]])
                text[-1, 40:] = text[-1, 40:].flip(0)
                order[1] = 6
            net(text[order, t : t + 1], **with_cache(net, cache))
    rows = text[order]
    assert_finished_agrees(scorer.result(rows), net, rows, 8)
    assert type(cache) is DynamicCache, "the cache has its own class again"


def test_states_by_hand():
    """Sequences that rest, fork, come later and go, each with its own length."""
    net = tiny.model()
    torch.manual_seed(4)
    texts = [torch.randint(5, tiny.VOCAB, (n,)) for n in (40, 33, 50, 28)]
    scorer = scorer_of(net, schedule="immediate", max_steps=20)

    def run(state, text, begin, end, cache):
        scorer.assign([state], prompts=not begin)
        return cache_of(net(text[None, begin:end], **with_cache(net, cache)))

    with torch.no_grad(), scorer:
        a, b = scorer.admit(torch.stack([texts[0][:6], texts[1][:6]]))
        caches = [run(a, texts[0], 0, 6, None), run(b, texts[1], 0, 6, None)]
        for t in range(6, 20):
            caches[0] = run(a, texts[0], t, t + 1, caches[0])
        (c,) = scorer.fork([a])
        texts[2][:20] = texts[0][:20]
        caches.append(copy.deepcopy(caches[0]))
        for t in range(20, 32):
            caches[2] = run(c, texts[2], t, t + 1, caches[2])
        for t in range(6, 32):
            caches[1] = run(b, texts[1], t, t + 1, caches[1])
        for t in range(20, 39):
            caches[0] = run(a, texts[0], t, t + 1, caches[0])
        for t in range(32, 49):
            caches[2] = run(c, texts[2], t, t + 1, caches[2])
        first = scorer.result([texts[1]], rows=[b])
        scorer.release([b])
        (d,) = scorer.admit(texts[3][None, :6])
        assert d == b
        caches[1] = run(d, texts[3], 0, 6, None)
        for t in range(6, 28):
            caches[1] = run(d, texts[3], t, t + 1, caches[1])
        counts = scorer.counts()
        rest = scorer.result([texts[2], texts[3], texts[0]], rows=[c, d, a])
        assert scorer.step_scores(c) == pytest.approx(rest.step_scores[0][: counts[c]].tolist(), rel=1e-5)
    assert_finished_agrees(first, net, [texts[1][:33]], 6)
    assert_finished_agrees(rest, net, [texts[2], texts[3], texts[0]], 6)
    with pytest.raises(ValueError, match="do not continue the 49"):
        scorer.result([texts[2][:30]], rows=[c])
    with pytest.raises(ValueError, match="are not the tokens"):
        scorer.result([texts[2].flip(0)], rows=[c])
    with scorer, pytest.raises(ValueError, match="different states"):
        scorer.assign([a, a])


# -- continuous batching ---------------------------------------------------------------------------------------------------


def batching_config(num_blocks=64, **kwargs):
    pytest.importorskip("psutil", reason="continuous batching looks at the machine's memory")
    names = {f.name for f in dataclasses.fields(ContinuousBatchingConfig)}
    size = {"page_size" if "page_size" in names else "block_size": 16, "num_blocks": num_blocks}
    settings = {"use_cuda_graph": False, "use_async_batching": False, "max_batch_tokens": 64}
    return ContinuousBatchingConfig(**settings | size | kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("samples", [1, 3])
def test_continuous_batching_scores_each_request(samples, backend):
    """More requests than fit into one batch, prompts longer than a batch's tokens, several samples of a prompt."""
    net = tiny.model().to(device_for(backend))
    torch.manual_seed(6)
    texts = [torch.randint(5, tiny.VOCAB, (n,)).tolist() for n in (5, 40, 9, 23, 3, 30)]
    generation = GenerationConfig(max_new_tokens=30, do_sample=True, eos_token_id=2, num_return_sequences=samples)
    scorer = scorer_of(net, backend=backend)
    with scorer:
        out = net.generate_batch(
            texts, generation_config=generation, continuous_batching_config=batching_config(max_batch_tokens=24)
        )
    assert len(out) in (6, 6 * samples)  # transformers 5.17 hands out the first sample of each alone
    assert not any(o.error for o in out.values())
    rows = [torch.tensor([*o.prompt_ids, *o.generated_tokens]) for o in out.values()]
    assert_finished_agrees(scorer.result(out), net, rows, [len(o.prompt_ids) for o in out.values()])


def test_continuous_batching_with_shared_prefixes_and_requests_that_are_begun_anew():
    net = tiny.model()
    torch.manual_seed(7)
    prefix = torch.randint(5, tiny.VOCAB, (48,)).tolist()
    prefix[20] = tiny.THINK
    texts = [[*prefix, *torch.randint(5, tiny.VOCAB, (n,)).tolist()] for n in (4, 9, 2, 7)]
    generation = GenerationConfig(max_new_tokens=60, do_sample=True, eos_token_id=-1)
    scorer = scorer_of(net)
    with scorer:
        out = net.generate_batch(
            texts, generation_config=generation, continuous_batching_config=batching_config(num_blocks=13)
        )
    assert not any(o.error for o in out.values()) and len(out) == 4
    rows = [torch.tensor([*o.prompt_ids, *o.generated_tokens]) for o in out.values()]
    assert_finished_agrees(scorer.result(out), net, rows, [len(o.prompt_ids) for o in out.values()])


def test_continuous_batching_that_cannot_be_followed_is_refused_by_name():
    net, generation = tiny.model(), GenerationConfig(max_new_tokens=4, eos_token_id=2)
    compiled = batching_config(varlen_compile_config=CompileConfig(mode=None, backend="eager"))
    with scorer_of(net), pytest.raises(ValueError, match="with varlen_compile_config"):
        net.generate_batch([[5, 6]], generation_config=generation, continuous_batching_config=compiled)
    with scorer_of(net, record_features=True), pytest.raises(ValueError, match="record_features"):
        net.generate_batch([[5, 6]], generation_config=generation, continuous_batching_config=batching_config())
    scorer = scorer_of(net)
    with scorer:
        out = net.generate_batch([[5, 6]], generation_config=generation, continuous_batching_config=batching_config())
    with pytest.raises(ValueError, match="never ran"):
        scorer.result({"other": next(iter(out.values()))})
