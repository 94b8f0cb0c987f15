"""Heads that read the model elsewhere than the paper's, or say something else of a step: in a real vLLM what ``rf.score`` says of the finished text."""

import httpx
import pytest
from common import DELIMITER, V2, settings
from servers import empty, server
from test_models import made
from test_stream import PROMPTS, SMALL, TOKENS, run, started  # noqa: F401

EVERY_STEP = {"rule": "contains", "delimiter": DELIMITER, "consecutive": "all", "think_start_id": None, "think_end_id": None}
HEADS = {
    "behind the final norm": {"layers": (-1,), "at": "token", "aggregation": "mean", "step_rule": EVERY_STEP},
    "several layers": {"layers": (-2, -4)},
    "the embeddings among them": {"layers": (4, 0, -3), "aggregation": "min"},
    "every token": {"layers": (-2,), "at": "every", "aggregation": "mean"},
    "divided by their size": {"layers": (1, -1), "norm": "rms", "aggregation": "max", "higher_is_better": False},
    "a linear probe": {"layers": (-1, 2), "at": "token", "aggregation": "last", "sigmoid": False},
    "a linear probe on every token": {"layers": (-1,), "at": "every", "aggregation": "mean", "sigmoid": False},
}


def head_of(name, hidden=128, **said):
    import torch

    import reflective as rf
    from reflective.scoring.heads import LinearHead
    from reflective.scoring.taps import Tap

    said = dict(said or HEADS[name])
    tap = Tap(said.pop("layers"), said.pop("norm", False), said.pop("at", "predict"))
    torch.manual_seed(7)
    made_ = (LinearHead if "linear" in name else rf.SPRM)(len(tap.layers) * hidden)
    return made_.use(tap=tap, **said).requires_grad_(False).eval()


class Truth:
    """``rf.score`` by the model at ``path``, in float32."""

    def __init__(self, path, head):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import reflective as rf

        self.head = head
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        rule = head.step_rule or {"delimiter": DELIMITER}
        self.steps = rf.StepTokens.from_tokenizer(AutoTokenizer.from_pretrained(path), **rule)

    def __call__(self, prompt, response, *, fed=False):
        """Columns and scores of the steps, and the score; without that of a token that came last, whose state there is not unless it was ``fed``, for
        an end to be drawn behind it."""
        import torch

        import reflective as rf
        from reflective.scoring.scores import aggregate

        ids = [*prompt, *response]
        with torch.no_grad():
            found = rf.score(self.model, self.head, self.steps, [ids], prompt_lengths=[len(prompt)])
        columns, scores = found.step_positions[0].tolist(), found.step_scores[0].tolist()
        if self.head.tap.at != "predict" and not fed and columns and columns[-1] == len(ids) - 1:
            columns, scores = columns[:-1], scores[:-1]
        return columns, scores, aggregate(scores, self.head.aggregation)


def check(llm, outputs, truth):
    """Every trajectory to 1e-5; how many steps there were."""
    import reflective.vllm

    steps = 0
    for output, scores in zip(outputs, reflective.vllm.scores(llm, outputs), strict=True):
        for i, c in enumerate(output.outputs):
            columns, values, score = truth(output.prompt_token_ids, list(c.token_ids))
            assert scores.step_positions[i].tolist() == columns
            assert scores.step_scores[i].tolist() == pytest.approx(values, abs=1e-5, rel=1e-5)
            assert float(scores.score[i]) == pytest.approx(score, abs=1e-5, rel=1e-5)
            steps += len(columns)
    return steps


@pytest.mark.parametrize("name", HEADS)
def test_streams_some_of_them_preempted(started, tiny, name):  # noqa: F811
    head = head_of(name)
    llm = started(tiny, head=head, disable_log_stats=False, **SMALL)
    outputs = run(llm, PROMPTS[: 2 if V2 else 3], n=8, tokens=max(TOKENS, 40), ignore_eos=True)
    tokens = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    steps = check(llm, outputs, Truth(tiny, head))
    assert steps > (tokens // 2 if head.tap.at == "every" else 30)
    assert next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0


@pytest.mark.skipif(V2, reason="one runner is enough")
@pytest.mark.parametrize("name", ["behind the final norm", "the embeddings among them", "every token"])
def test_prompts_in_pieces_and_cached(started, tiny, name):  # noqa: F811
    head = head_of(name)
    llm = started(tiny, head=head, max_num_batched_tokens=32, enable_chunked_prefill=True)
    truth = Truth(tiny, head)
    for _ in range(2):
        outputs = run(llm, PROMPTS[:2], n=4, tokens=40, seed=None)
        assert check(llm, outputs, truth) > 10
    assert max(o.num_cached_tokens for o in outputs) > 64


@pytest.mark.skipif(V2, reason="Inductor has no use for interpreted kernels")
def test_compiled(started, tiny):  # noqa: F811
    head = head_of("the embeddings among them")
    llm = started(tiny, head=head, enforce_eager=False)
    assert check(llm, run(llm, PROMPTS[:1], n=4), Truth(tiny, head)) > 5


@pytest.mark.skipif(V2, reason="one runner is enough")
@pytest.mark.parametrize("name", ["several layers", "every token", "a linear probe"])
def test_forks_rests_and_finished_texts(tiny, name):
    from transformers import AutoTokenizer

    from reflective.engines.base import Appended, Ended, Prompt, Sampling, Stepped
    from reflective.engines.vllm.host import VLLMHost

    head = head_of(name)
    tokenizer, truth = AutoTokenizer.from_pretrained(tiny), Truth(tiny, head)
    host = VLLMHost(settings(tiny, head=head), tokenizer)
    prompt = tokenizer.encode(PROMPTS[0])
    tokens, told, ended = {}, {}, {}
    sampling = [Sampling((c,), 1.0, 1.0, max_tokens=40) for c in range(4)]

    def advance(engine, turns):
        while turns and (events := engine.advance()) is not None:
            turns -= 1
            for e in events:
                if isinstance(e, Appended):
                    tokens.setdefault(e.sequence, []).append(e.chance.token)
                elif isinstance(e, Stepped):
                    told[e.sequence] = e.step_scores
                elif isinstance(e, Ended):
                    ended[e.sequence] = e

    try:
        engine = host.engine()
        with engine:
            (prefix,) = engine.open([Prompt(prompt, steps="told")])
            first, second = engine.start(prefix, sampling[:2])
            advance(engine, 12)
            for parent in (first, second):
                tokens |= {fork: list(tokens[parent]) for fork in engine.fork(parent, sampling[2:])}
            engine.rest([second])
            advance(engine, 4)
            engine.resume([second])
            advance(engine, -1)
            engine.close([prefix])
        assert len(ended) == 6 and len(told) > 2
        for s, end in ended.items():
            score = end.score
            columns, values, value = truth(prompt, tokens[s], fed=end.reason == "stop")
            assert [len(prompt) + p for p in score.positions] == columns and score.error is None
            assert score.step_scores == pytest.approx(values, abs=1e-5, rel=1e-5) and score.score == pytest.approx(value, abs=1e-5, rel=1e-5)
            n = min(len(told.get(s, [])), len(values))  # a fork may have no further step
            assert told.get(s, [])[:n] == pytest.approx(values[:n], abs=1e-5, rel=1e-5)
        texts = [([*prompt, *tokens[s]], len(prompt)) for s in ended]
        for (ids, start), score in zip(texts, host.score(texts), strict=True):
            _, values, value = truth(ids[:start], ids[start:])
            assert score.step_scores == pytest.approx(values, abs=1e-5, rel=1e-5) and score.score == pytest.approx(value, abs=1e-5, rel=1e-5)
    finally:
        host.close()


@pytest.mark.skipif(V2, reason="vLLM's own server")
def test_over_http(tiny, tmp_path):
    head = head_of("a linear probe on every token")
    truth, ask = Truth(tiny, head), {"model": "tiny", "prompt": PROMPTS[0], "n": 4, "max_tokens": 30, "return_token_ids": True}
    with server(settings(tiny, head=head), tmp_path) as url:
        answer = httpx.post(url + "/v1/completions", json=ask | {"temperature": 1.0, "seed": 3}, timeout=300).json()
        found = empty(url)
    for c in answer["choices"]:
        columns, values, score = truth(c["prompt_token_ids"], c["token_ids"])
        said = c["reflective"]
        assert said["error"] is None and [len(c["prompt_token_ids"]) + p for p in said["positions"]] == columns
        assert said["step_scores"] == pytest.approx(values, abs=1e-5, rel=1e-5) and said["score"] == pytest.approx(score, abs=1e-5, rel=1e-5)
        assert min(values) < 0, "no probabilities"
    assert len(answer["choices"]) == 4 and found["rows"] == found["kept"] == 0


@pytest.mark.skipif(V2, reason="one runner is enough")
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}), ("qwen3", {"head_dim": 32}), ("mistral", {"sliding_window": None}), ("phi3", {}),
        ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
        ("qwen3_moe", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
        ("opt", {"word_embed_proj_dim": 128, "ffn_dim": 256}),
    ],
)  # fmt: skip
def test_all_hidden_states_of_other_decoders(started, tiny, tmp_path, kind, config):  # noqa: F811
    """Of OPT, which serves no drafters, what comes behind the final norm."""
    layers = (-1,) if kind == "opt" else (2, 0, -1, 1)
    path, head = made(tmp_path, tiny, kind, **config), head_of("", layers=layers, at="token")
    llm = started(path, head=head)
    assert check(llm, run(llm, PROMPTS[2:], n=4, tokens=30), Truth(path, head)) > 3


@pytest.mark.skipif(V2, reason="one runner is enough")
def test_what_is_refused(started, tiny):  # noqa: F811
    from torch import nn
    from vllm import LLM

    from reflective.engines.vllm import models
    from reflective.scoring.taps import Tap

    head = head_of("several layers")
    with pytest.raises(Exception, match=r"norm=True with layers=\(-2, -4\): vLLM gives states of layers below the last as they are"):
        LLM(**settings(tiny, head=head.use(tap=Tap((-2, -4), norm=True))))
    with pytest.raises(Exception, match="has hidden_states 0 to 4 .* no -7"):
        LLM(**settings(tiny, head=head.use(tap=Tap((-2, -7)))))
    with pytest.raises(Exception, match="hidden size 128 differs from the 256 .* of which it reads layers"):
        started(tiny, head=head_of("", layers=(-2,)).use(tap=Tap((-2, -1))))
    plain = type("DeepseekV3ForCausalLM", (nn.Module,), {})
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM gives no auxiliary hidden state of index 0"):
        models._spare_embeddings(type("A", (type("B", (plain,), {}),), {})())
    with pytest.raises(ValueError, match="MiniCPMForCausalLM scales its output"):
        models._order(type("MiniCPMForCausalLM", (), {}), Tap((-1,)), 4)
