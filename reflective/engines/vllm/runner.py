"""The scorer in vLLM's Model Runner V2: a model brings a state of its own, and that wraps the sampler."""

import functools
from typing import Any

import torch
from transformers import AutoTokenizer
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from ...scoring.sharded import ShardedHead
from .options import Options, no_text
from .requests import Requests, Wanted


def new_requests(config: VllmConfig, device: torch.device) -> Requests:
    """What scores the requests of a worker.

    Raises:
        ValueError: settings that are none; a head, step-tokens and a model that do not fit together.
    """
    options, model = Options.of(config.additional_config), config.model_config
    head = options.load_head(model.dtype)
    head.check_model(len(options.layers) * model.get_hidden_size(), model.dtype, model.architecture, head.tap)
    placed = ShardedHead(head, device, model.dtype, options.backend, options.head_dtype(), None).load()
    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )
    generation = model.try_get_generation_config() or {}
    steps = options.load_steps(tokenizer, model.get_vocab_size(), no_text(generation))
    drafted = 0 if config.speculative_config is None else config.speculative_config.num_speculative_tokens
    rule = options.prune_rule
    if rule is not None and drafted:
        raise ValueError(
            "prune: the worker does not prune while tokens are drafted (speculative_config); leave one of the two out"
        )
    ends = generation.get("eos_token_id", tokenizer.eos_token_id)
    return Requests(
        steps.to(device), placed, at=options.at, seats=config.scheduler_config.max_num_seqs,
        # In the step of the end itself, and in the one that was under way by then.
        past=2 * (drafted + 1) if drafted else 1, max_steps=options.logged(model.max_model_len), rule=rule,
        ends=[ends] if isinstance(ends, int) else list(ends or [0]),
    )  # fmt: skip


@functools.cache
def scored_state(base: type | None) -> type:
    """The state that a model of vLLM brings, or the usual one, with scores.

    Raises:
        ValueError: it is of another kind, whose sampling nobody has looked at.
    """
    base = base or DefaultModelState
    if not issubclass(base, DefaultModelState):
        raise ValueError(  # noqa: TRY004  # it is the model, and no argument
            f"{base.__name__}: reflective scores models with the usual state of vLLM's runner alone"
        )
    return type(f"Scored{base.__name__}", (ScoredState, base), {"__module__": __name__})


class ScoredState:
    """What such a class gets before it."""

    def __init__(self, vllm_config: VllmConfig, model: Any, *args: Any) -> None:
        super().__init__(vllm_config, model, *args)
        if model.reflective is None:
            model.reflective = new_requests(vllm_config, self.device)
        self.requests: Requests = model.reflective
        self.rows = torch.full((self.max_num_reqs,), -1, dtype=torch.int32, device=self.device)  # of the runner's slots
        self.drawn_before: dict[int, list[int]] = {}  # by slot, of new requests that go on from another, its tokens

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        if (params := new_req_data.sampling_params) is not None:
            wanted = Wanted.of(params.extra_args)
            self.rows[req_index] = self.requests.admit(
                new_req_data.req_id, list(new_req_data.prefill_token_ids), len(new_req_data.prompt_token_ids), wanted
            )
            if wanted.output_from is not None:
                self.drawn_before[req_index] = list(new_req_data.prompt_token_ids)[wanted.output_from :]

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.requests.leave(req_id)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.requests.settle()

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        rejection = None
        if (speculation := self.vllm_config.speculative_config) is not None:
            from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

            rejection = ScoredSampler(RejectionSampler(sampler, speculation, self.device), self)
        return ScoredSampler(sampler, self), rejection


class ScoredSampler:
    """A sampler of vLLM. What it sampled is scored, with the states that it was sampled from.

    Args:
        inner: vLLM's, whose attributes are this one's.
    """

    def __init__(self, inner: Any, state: ScoredState) -> None:
        self.inner, self.state = inner, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def apply_staged_writes(self) -> None:
        """Have the penalties count what was drawn before, too: vLLM has just counted what is behind a new request's prompt."""
        self.inner.apply_staged_writes()
        for slot, ids in self.state.drawn_before.items():
            counts = self.inner.penalties_state.output_bin_counts[slot]
            ids = torch.tensor(ids, device=counts.device)
            counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))
        self.state.drawn_before.clear()

    def __call__(self, logits: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(logits, input_batch, *args, **kwargs)
        state, requests = self.state, self.state.requests
        if input_batch.req_ids[0] not in requests:  # vLLM's own trial runs
            return out
        hidden, B = state.model.reflective_hidden, input_batch.num_reqs
        if requests.by_prefill:
            starts = input_batch.query_start_loc_np
            for i, request in enumerate(input_batch.req_ids):
                if request in requests.by_prefill:
                    begin = int(input_batch.num_computed_tokens_np[i])
                    requests.prefilled(request, begin, hidden[int(starts[i]) : int(starts[i + 1])])
        rows = state.rows[input_batch.idx_mapping[:B]]
        rows = torch.where(out.num_sampled[:B] > 0, rows, -1)
        requests.force(out.sampled_token_ids[:B, 0], rows)
        ids = out.sampled_token_ids[:B].long()
        at = input_batch.logits_indices
        if state.vllm_config.speculative_config is None:
            requests.consume(ids[:, 0], hidden[at], rows)
        else:
            requests.consume_some(ids, out.num_sampled[:B], hidden[at], input_batch.cu_num_logits[:B], rows)
        return out
