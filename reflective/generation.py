"""Where a response ends."""

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TAIL = 24  # tokens decoded to look for a response's end; no pattern in use spans more


def response_lengths(
    sequences: Tensor, prompt_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokens of each response, up to its end-of-sequence token or the padding at its end."""
    ends, pad, lengths = end_tokens(model, tokenizer), pad_token(tokenizer), []
    for row in sequences[:, prompt_length:].tolist():
        n = next((i for i, token in enumerate(row) if token in ends), len(row))
        while n and row[n - 1] == pad:
            n -= 1
        lengths.append(n)
    return lengths


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Any of which ends a response."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    return {eos} if isinstance(eos, int) else set(eos or ())


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
