"""Which models of vLLM can be scored, in which ways it may be run, and that a plugin which is not used is not noticed."""

import os
import subprocess
import sys

import pytest
from common import DELIMITER, settings
from test_stream import check, run, started  # noqa: F401

PROMPT = "First add 3 and 4.\n\nThen"


def made(path, tiny, kind, **config):
    """Directory of a small random model of this kind, with the tokenizer and the head of ``tiny``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 336, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
        "tie_word_embeddings": False, "initializer_range": 0.15,
    }  # fmt: skip
    for file in tiny.iterdir():
        if file.name.startswith(("tokenizer", "score_module")):
            (path / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | config)).float().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}), ("qwen3", {"head_dim": 32}), ("mistral", {"sliding_window": None}), ("phi3", {}),
        ("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
        ("qwen3_moe", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    ],
)  # fmt: skip
def test_other_decoders(started, tiny, tmp_path, kind, config):  # noqa: F811
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import reflective as rf

    path = made(tmp_path, tiny, kind, **config)
    llm = started(path)
    model, head = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), rf.SPRM.from_pretrained(path)
    steps = rf.StepTokens.from_tokenizer(AutoTokenizer.from_pretrained(path), delimiter=DELIMITER)

    def truth(prompt, response, at):
        with torch.no_grad():
            found = rf.score(model, head, steps, [[*prompt, *response]], prompt_lengths=[len(prompt)])
        return found.step_scores[0].tolist(), found.step_positions[0].tolist()

    assert check(llm, run(llm, [PROMPT], n=4, tokens=30), truth) > 3


def test_all_that_serve_eagle3_and_no_other(tiny, tmp_path):
    """By what a class says of itself; none is listed by name."""
    from vllm import LLM, ModelRegistry
    from vllm.model_executor.models.interfaces import supports_eagle3

    from reflective.engines.vllm import models, plugin

    names = [name for name in ModelRegistry.models if not name.startswith(plugin.PREFIX)]
    assert {plugin.PREFIX + name for name in names} <= set(ModelRegistry.models)
    some = ["Qwen2ForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "Gemma4ForCausalLM", "OPTForCausalLM"]
    assert [supports_eagle3(getattr(models, plugin.PREFIX + name)) for name in some] == [True] * 4 + [False]
    with pytest.raises(AttributeError, match="no architecture NoSuchModel"):
        models.ReflectiveNoSuchModel  # noqa: B018
    path = made(tmp_path, tiny, "opt", word_embed_proj_dim=128, ffn_dim=256)
    with pytest.raises(Exception, match="OPTForCausalLM gives no auxiliary hidden states"):
        LLM(**settings(path))


def test_settings_that_do_not_exist(tiny):
    import reflective.vllm

    with pytest.raises(ValueError, match="schedule"):
        reflective.vllm.settings(tiny, schedule="deferred")
    with pytest.raises(ValueError, match="at='middle'"):
        reflective.vllm.settings(tiny, at="middle")
    with pytest.raises(FileNotFoundError):
        reflective.vllm.settings(tiny / "nowhere")
    with pytest.raises(ValueError, match="expected threshold"):
        reflective.vllm.settings(tiny, prune={"margin": 1})


def test_lora(started, tiny, truth, tmp_path):  # noqa: F811
    """Requests of a base model, and of an adapter on it: each is scored by what decoded it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    import reflective as rf

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tuned = get_peft_model(
        base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path)
    merged = tuned.merge_and_unload().eval()
    llm = started(tiny, enable_lora=True, max_loras=1, max_lora_rank=8)
    steps = rf.StepTokens.from_tokenizer(llm.get_tokenizer(), delimiter=DELIMITER)
    head = rf.SPRM.from_pretrained(tiny, dtype=torch.float32)

    def adapted(prompt, response, at):
        with torch.no_grad():
            found = rf.score(merged, head, steps, [[*prompt, *response]], prompt_lengths=[len(prompt)])
        return found.step_scores[0].tolist(), found.step_positions[0].tolist()

    # One after the other: on a CPU vLLM 0.32 lets an adapter decode whatever shares a batch with it.
    params = SamplingParams(n=2, max_tokens=30, temperature=1.0, seed=5)
    plain = llm.generate([PROMPT], params, use_tqdm=False)
    other = llm.generate([PROMPT], params, lora_request=LoRARequest("tuned", 1, str(tmp_path)), use_tqdm=False)
    assert check(llm, plain, truth) > 3
    assert check(llm, other, adapted, forget=False) > 3
    with pytest.raises(AssertionError):
        check(llm, other, truth)


STOCK = """
import hashlib, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=512, max_num_seqs=16, enforce_eager=True, block_size=32)
    params = SamplingParams(n=4, max_tokens=60, temperature=0.8, seed=3, logprobs=2)
    outputs = llm.generate(["First add 3 and 4.\\n\\nThen", "a b"], params, use_tqdm=False)
    said = [(c.token_ids, c.cumulative_logprob, [sorted((t, p.logprob) for t, p in of.items()) for of in c.logprobs]) for o in outputs for c in o.outputs]
    print("DIGEST", hashlib.sha256(repr(said).encode()).hexdigest())
"""


def test_installed_and_not_used(plain, tmp_path):
    """Stock vLLM says the same with the plugin and without it: tokens, and log-probabilities to the last bit."""
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    found = []
    for allowed in ({}, {"VLLM_PLUGINS": ""}):
        done = subprocess.run(
            [sys.executable, script, plain],
            env=os.environ | allowed,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("DIGEST")]
        assert lines, done.stderr[-2000:]
        found += lines
    assert found[0] == found[1]


def test_tensor_parallel(tiny, truth):
    """Two ranks on this machine: every rank has the same bits."""
    from vllm import LLM

    llm = LLM(**settings(tiny, tensor_parallel_size=2, distributed_executor_backend="mp"))
    try:
        assert len(llm.collective_rpc("reflective_start")) == 2
        outputs = run(llm, [PROMPT, "a b"], n=4, tokens=40)
        logs = llm.collective_rpc("reflective_logs", args=([o.request_id for o in outputs], False))
        assert logs[0] == logs[1] and len(logs[0]) == 8
        assert check(llm, outputs, truth) > 10
    finally:
        llm.llm_engine.engine_core.shutdown()
