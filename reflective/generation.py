"""Rollouts for training: ``generate`` with a scorer riding along, the shared part of the prompts prefilled once."""

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .scorer import StreamScorer

TAIL = 24  # tokens decoded to look for a response's end; no pattern in use spans more


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scorer: StreamScorer,
    ids: Tensor,
    *,
    shared: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: str | None = None,
) -> Tensor:
    """Decode prompts [B, P] of one length, whose first ``shared`` columns are equal and prefilled once: ids [B, P + new].

    Args:
        scorer: attached here, for the decoding alone; ask it for the result afterwards.
        temperature: 0 decodes greedily.
        stop: regular expression; a sequence ends when its newest text matches.
    """
    B, P = ids.shape
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    cache = None
    if shared:
        with torch.no_grad():
            cache = model(ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(B)
    with scorer:
        scorer.begin(ids)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token(tokenizer),
            stopping_criteria=StoppingCriteriaList([_Stop(tokenizer, P, stop)]) if stop else None,
            **(sampling or {"do_sample": False}),
        )


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


class _Stop(StoppingCriteria):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, pattern: str) -> None:
        self.tokenizer, self.prompt_length, self.pattern = tokenizer, prompt_length, re.compile(pattern)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        tail = input_ids[:, max(self.prompt_length, input_ids.shape[1] - TAIL) :]
        texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
        return torch.tensor([bool(self.pattern.search(text)) for text in texts], device=input_ids.device)
