"""What runs in a real vLLM: ``make vllm``, which runs every file in a process of its own, those named ``test_stream*`` on both model runners.

Engines' cores run in the process of the tests, which starts them in two seconds; the servers' do not.
"""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import common  # before vLLM is imported anywhere


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Directory of a random Qwen2 with a tokenizer of bytes and some merges, and a head beside its weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    import reflective as rf

    place = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [
        "First add 3 and 4.\n\nThen add 5.\n\nSo the answer is 12.\n\n",
        "We count the primes.\n\n<think> </think>",
    ] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>", "<|pad|>", "<think>", "</think>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(place)
    torch.manual_seed(0)
    # vLLM's attention on a CPU wants heads of 32 at least.
    config = Qwen2Config(
        vocab_size=len(fast) + -len(fast) % 16, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=fast.eos_token_id,
        bos_token_id=None, pad_token_id=fast.pad_token_id, tie_word_embeddings=False, initializer_range=0.15,
    )  # fmt: skip
    Qwen2ForCausalLM(config).float().save_pretrained(place)
    rf.SPRM(128, dtype=torch.float32).requires_grad_(False).eval().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def plain(tiny, tmp_path_factory) -> Path:
    """The same model without the head, which vLLM would take for weights of the model."""
    place = tmp_path_factory.mktemp("plain")
    for file in tiny.iterdir():
        if "score_module" not in file.name:
            (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.fixture(scope="session")
def truth(tiny):
    """``truth(prompt, response, at)``: step scores and their columns by ``rf.score``, in float32, of ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import reflective as rf

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    head = rf.SPRM.from_pretrained(tiny, dtype=torch.float32)
    steps = rf.StepTokens.from_tokenizer(AutoTokenizer.from_pretrained(tiny), delimiter=common.DELIMITER)

    def scores(prompt, response, at="predict"):
        with torch.no_grad():
            found = rf.score(model, head, steps, [[*prompt, *response]], prompt_lengths=[len(prompt)], at=at)
        return found.step_scores[0].tolist(), found.step_positions[0].tolist()

    return scores
