"""Scores in a stock ``LLM`` against ``rf.score`` of the ids that came back, on the model runner that the environment names."""

import pytest
from common import V2, release, settings

LONG = "".join(f"First add {i} and {i + 1}.\n\nThen subtract {i}.\n\n" for i in range(6))
PROMPTS = [LONG + "So", LONG + "We count the primes.\n\n2 and", "a b"]
TOKENS = 24 if V2 else 80  # V2's kernels are interpreted
OLD = release() < (0, 32)
SMALL = {"num_gpu_blocks_override": 24, "max_model_len": 400}  # blocks for keys and values: preemption
IN_PIECES = (
    {} if V2 else {"seed": None}
)  # vLLM's first runner on a CPU crashes on a seed together with a prompt in pieces


@pytest.fixture
def started():
    """``started(**settings)``: an LLM that scores; one at a time."""
    import gc

    from vllm import LLM

    import reflective.vllm

    llms = []

    def start(*args, **kwargs):
        llms.append(LLM(**settings(*args, **kwargs)))
        found = reflective.vllm.start(llms[-1])
        assert (".cpu.model_runner" in found["runner"]) == V2, "the runner that was asked for"
        return llms[-1]

    yield start
    for llm in llms:
        llm.llm_engine.engine_core.shutdown()
    llms.clear()
    gc.collect()


def run(llm, prompts, n=8, tokens=TOKENS, **params):
    from vllm import SamplingParams

    return llm.generate(
        prompts, [SamplingParams(n=n, max_tokens=tokens, **{"temperature": 1.0, "seed": 1 + i, **params}) for i in range(len(prompts))],
        use_tqdm=False,
    )  # fmt: skip


def check(llm, outputs, truth, at="predict", forget=True):
    """Every trajectory's steps, where they are and what they score, to 1e-5; how many there were."""
    import reflective.vllm

    steps = 0
    for output, scores in zip(outputs, reflective.vllm.scores(llm, outputs, forget=forget), strict=True):
        for i, c in enumerate(output.outputs):
            values, columns = truth(output.prompt_token_ids, list(c.token_ids), at)
            if at == "token" and columns and columns[-1] == len(output.prompt_token_ids) + len(c.token_ids) - 1:
                values, columns = values[:-1], columns[:-1]  # a step that came last was never fed back
            assert scores.step_positions[i].tolist() == columns
            assert scores.step_scores[i].tolist() == pytest.approx(values, abs=1e-5)
            steps += len(columns)
    return steps


def stats(llm):
    return llm.collective_rpc("reflective_stats")[0]


def test_shared_prompts_cached_ones_and_seeds(started, tiny, truth):
    llm = started(tiny)
    first, again = run(llm, PROMPTS), run(llm, PROMPTS)
    assert [[c.token_ids for c in o.outputs] for o in first] == [[c.token_ids for c in o.outputs] for o in again], (
        "a seed repeats"
    )
    assert max(o.num_cached_tokens for o in again) > 64
    assert check(llm, first, truth) + check(llm, again, truth) > 50
    # Several thousands could be left behind: nothing is.
    run(llm, ["b"], n=1, tokens=1)
    assert stats(llm)["kept"] == 0 and stats(llm)["rows"] <= 2


def test_asked_for_twice_or_of_others(started, tiny, truth):
    import reflective.vllm

    llm = started(tiny)
    (output,) = run(llm, ["a b"], n=2, tokens=8)
    check(llm, [output], truth, forget=False)
    output.outputs[0].token_ids = [*output.outputs[0].token_ids[:-1], 7]
    with pytest.raises(ValueError, match="the worker scored other tokens"):
        reflective.vllm.scores(llm, [output])
    run(llm, ["b"], n=1, tokens=1)
    with pytest.raises(ValueError, match="asked for before"):
        reflective.vllm.scores(llm, [output])


def test_prompts_in_pieces(started, tiny, truth):
    llm = started(tiny, max_num_batched_tokens=32, enable_chunked_prefill=True)
    assert check(llm, run(llm, PROMPTS, n=4, **IN_PIECES), truth) > 10


@pytest.mark.parametrize("cached", [False, True])
def test_preempted_requests_go_on(started, tiny, truth, cached):
    llm = started(tiny, enable_prefix_caching=cached, disable_log_stats=False, **SMALL)
    assert check(llm, run(llm, PROMPTS, n=8, tokens=max(TOKENS, 40), ignore_eos=True), truth) > 40
    preempted = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preempted > 0 and (not V2 or stats(llm)["resumed"] > 0)


def test_at_token(started, tiny, truth):
    llm = started(tiny, at="token", enable_prefix_caching=True, **SMALL)
    assert check(llm, run(llm, PROMPTS[:2], tokens=max(TOKENS, 40)), truth, at="token") > 30


def test_prune_in_the_worker(started, tiny, truth):
    """Who lags ends in the step after; the others draw what they would have drawn."""
    llm = started(tiny, prune={"threshold": 0.3, "min_steps": 2})
    n, tokens = (6, 40) if V2 else (8, 80)
    (free,) = run(llm, PROMPTS[:1], n=n, tokens=tokens)
    (pruned,) = run(llm, PROMPTS[:1], n=n, tokens=tokens, extra_args={"reflective": {"group": "g"}})
    check(llm, [free, pruned], truth, forget=False)
    logs = {
        int(log[1].split("_")[0]): log
        for log in llm.collective_rpc("reflective_logs", args=([pruned.request_id], True))[0]
    }
    ended = 0
    for whole, c in zip(free.outputs, pruned.outputs, strict=True):
        if logs[c.index][-1]:  # Log.pruned
            ended += len(c.token_ids) < len(whole.token_ids)
            assert c.finish_reason == "stop" and c.token_ids[-1] == 0
            assert list(c.token_ids[:-1]) == list(whole.token_ids[: len(c.token_ids) - 1])
        else:
            assert c.token_ids == whole.token_ids
    assert 0 < ended < n


@pytest.mark.skipif(V2, reason="Inductor has no use for interpreted kernels")
def test_compiled(started, tiny, truth):
    llm = started(tiny, enforce_eager=False)
    assert check(llm, run(llm, PROMPTS[:1], n=4), truth) > 5


def test_finished_texts_and_what_begins_alike(started, tiny, truth):
    """By the prefill, the prompt cached or not."""
    import torch
    from vllm import SamplingParams

    from reflective.engines.vllm.core import Core
    from reflective.engines.vllm.finished import Finished
    from reflective.vllm import steps_for

    llm = started(tiny, max_num_batched_tokens=64)
    outputs = run(llm, PROMPTS[:2], n=3, tokens=max(TOKENS, 60), **IN_PIECES)
    texts = [([*o.prompt_token_ids, *c.token_ids], len(o.prompt_token_ids)) for o in outputs for c in o.outputs]
    texts += [texts[0], ([*texts[0][0][:-5], 7, 8, 9], texts[0][1])]  # the same, and one that begins like it
    texts.append((texts[0][0], 0))  # as a whole
    found = Finished(
        Core(llm.llm_engine, SamplingParams), steps_for(llm.llm_engine.vllm_config), "predict", texts
    ).run()
    for (ids, start), scores in zip(texts, found, strict=True):
        values, columns = truth(ids[:start], ids[start:])
        assert scores.step_positions[0].tolist() == columns and torch.allclose(
            scores.step_scores[0], torch.tensor(values), atol=1e-5
        )


@pytest.mark.skipif(not V2, reason="vLLM's first runner")
class TestSecondRunner:
    @pytest.mark.skipif(OLD, reason="the second runner does not draft yet")
    @pytest.mark.parametrize("at", ["predict", "token"])
    def test_draft_model(self, started, tiny, plain, truth, at):
        """Its own drafts, of which temperature has some refused."""
        speculation = {"method": "draft_model", "model": str(plain), "num_speculative_tokens": 3}
        llm = started(tiny, at=at, disable_log_stats=False, speculative_config=speculation)
        assert check(llm, run(llm, PROMPTS[:1], n=4, temperature=0.5), truth, at=at) > 5
        counts = {m.name: m.value for m in llm.get_metrics() if "spec_decode_num" in m.name and hasattr(m, "value")}
        assert counts["vllm:spec_decode_num_accepted_tokens"] > 0

    @pytest.mark.skipif(OLD, reason="the second runner does not draft yet")
    def test_ngram(self, started, tiny, truth):
        speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
        llm = started(tiny, speculative_config=speculation)
        assert check(llm, run(llm, PROMPTS[:1], n=8, temperature=0.5), truth) > 5

    @pytest.mark.parametrize("small", [{}, SMALL])
    def test_asynchronous_scheduling(self, started, tiny, truth, small, monkeypatch):
        """A token may be sampled past the end; one in flight is dropped by a preemption, and the request goes back."""
        from vllm.platforms.cpu import CpuPlatform

        usual = CpuPlatform.check_and_update_config

        def asynchronously(config):
            usual(config)
            config.scheduler_config.async_scheduling = True

        monkeypatch.setattr(
            CpuPlatform, "check_and_update_config", staticmethod(asynchronously)
        )  # which a CPU is not made to do
        llm = started(tiny, disable_log_stats=False, **small)
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        outputs = run(llm, PROMPTS, n=8, tokens=40, temperature=2.0)
        assert check(llm, outputs, truth) > 40
        if small:
            assert stats(llm)["resumed"] > 0
