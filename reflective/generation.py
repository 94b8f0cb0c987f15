"""Sampling candidates with a scorer riding along, the shared part of their prompts prefilled once."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .scorer import StreamScorer

_TAIL = 24  # tokens decoded to look for the stop pattern; no pattern in use spans more


@dataclass
class Sampled:
    """Attributes: ``sequences``: [B, P + new] ids; ``prompt_length``: P; ``seconds``: of decoding, prefill and
    scoring included, ``on_step`` not."""

    sequences: Tensor
    prompt_length: int
    seconds: float


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
    on_step: Callable[[Tensor], None] | None = None,
) -> Sampled:
    """Decode prompts [B, P] of one length, whose first ``shared`` columns are equal and are prefilled once.

    Args:
        scorer: attached here, for the decoding alone; ask it for the result afterwards.
        temperature: 0 decodes greedily.
        stop: regular expression; a sequence ends when its newest text matches.
        on_step: called with all ids after every decoded token.
    """
    began = time.perf_counter()
    B, P = ids.shape
    watch = _Stop(tokenizer, P, stop, on_step)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    cache = None
    if shared:
        with torch.no_grad():
            cache = model(ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(B)
    with scorer:
        scorer.begin(ids)
        sequences = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token(tokenizer),
            stopping_criteria=StoppingCriteriaList([watch]),
            **(sampling or {"do_sample": False}),
        )
    return Sampled(sequences, P, time.perf_counter() - began - watch.watching)


def response_lengths(
    sequences: Tensor, prompt_length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokens of each response, up to its end-of-sequence token or the padding at its end."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    pad, lengths = pad_token(tokenizer), []
    for row in sequences[:, prompt_length:].tolist():
        n = next((i for i, token in enumerate(row) if token in ends), len(row))
        while n and row[n - 1] == pad:
            n -= 1
        lengths.append(n)
    return lengths


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _Stop(StoppingCriteria):
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        pattern: str | None,
        on_step: Callable[[Tensor], None] | None,
    ) -> None:
        self.tokenizer, self.prompt_length, self.on_step = tokenizer, prompt_length, on_step
        self.pattern = re.compile(pattern) if pattern else None
        self.watching = 0.0  # seconds within on_step

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if self.on_step:
            began = time.perf_counter()
            self.on_step(input_ids)
            self.watching += time.perf_counter() - began
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        if self.pattern:
            tail = input_ids[:, max(self.prompt_length, input_ids.shape[1] - _TAIL) :]
            texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
            done = torch.tensor([bool(self.pattern.search(text)) for text in texts])
        return done.to(input_ids.device)
