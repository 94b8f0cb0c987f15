"""``benchmarks/in_vllm.py`` takes a scorer out of an engine and puts it back; ``benchmarks/gpu_vllm.py`` watches it."""

import pytest
from common import settings

import reflective.vllm


@pytest.fixture(scope="module")
def llm(tiny):
    from vllm import LLM

    llm = LLM(**settings(tiny) | {"worker_extension_cls": "reflective.benchmarks.gpu_vllm.Watched"})
    reflective.vllm.start(llm)
    return llm


def generated(llm, seed: int):
    from vllm import SamplingParams

    params = SamplingParams(n=2, max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": list(range(4, 20))}], params, use_tqdm=False)


def test_out_is_out_altogether_and_back_in_as_it_was(llm, truth):
    def calls() -> int:
        return llm.collective_rpc("bench_stats")[0]["calls"]

    llm.collective_rpc("bench_scorer", args=(True,))
    first = generated(llm, 1)
    within, (scores,) = calls(), reflective.vllm.scores(llm, first)
    llm.collective_rpc("bench_scorer", args=(False,))
    out = generated(llm, 1)
    assert calls() == within >= 24
    with pytest.raises(ValueError, match="has no scores"):
        reflective.vllm.scores(llm, out)
    llm.collective_rpc("bench_scorer", args=(True,))
    again = generated(llm, 1)
    (same,) = reflective.vllm.scores(llm, again)
    assert calls() >= within + 24
    stats = llm.collective_rpc("bench_stats")[0]
    assert stats["wrapper"] > stats["scorer"] > 0 and stats["mean_wrapper"] > 0
    for a, b, c in zip(first[0].outputs, out[0].outputs, again[0].outputs, strict=True):
        assert list(a.token_ids) == list(b.token_ids) == list(c.token_ids)
    for i, candidate in enumerate(again[0].outputs):
        expected, _ = truth(again[0].prompt_token_ids, list(candidate.token_ids))
        assert same.step_scores[i].tolist() == scores.step_scores[i].tolist() == pytest.approx(expected, abs=1e-5)
        assert expected


def test_a_step_gives_the_host_nothing_and_an_item_is_seen(llm):
    llm.collective_rpc("bench_scorer", args=(True,))
    (control,) = llm.collective_rpc("bench_watch")
    assert control["reads"] == ["_local_scalar_dense"]
    generated(llm, 2)
    (seen,) = llm.collective_rpc("bench_watched")
    assert seen["calls"] >= 24 and seen["reads"] == []
