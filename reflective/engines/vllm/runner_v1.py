"""The scorer in vLLM's first model runner, which CPU builds fall back to: it has no place for a sampler of one's own, so its own is wrapped."""

import hashlib
from typing import Any

import torch

from .requests import Requests, Wanted
from .runner import new_requests


def install(runner: Any) -> None:
    """Have ``runner`` score, whose model is loaded."""
    model = runner.get_model()
    if model.reflective is not None:
        return
    if runner.speculative_config is not None:
        raise ValueError("speculative_config: scored by Model Runner V2 alone; set VLLM_USE_V2_MODEL_RUNNER=1")
    if getattr(runner, "use_async_scheduling", False):
        raise ValueError("async_scheduling: scored by Model Runner V2 alone; set async_scheduling=False")
    model.reflective = new_requests(runner.vllm_config, runner.device)
    runner.sampler = ScoredSampler(runner.sampler, runner, model)


class ScoredSampler:
    """See ``runner.ScoredSampler``."""

    def __init__(self, inner: Any, runner: Any, model: Any) -> None:
        self.inner, self.runner, self.model = inner, runner, model
        self._known: dict[str, Any] = {}  # the runner's record of each request, which a preemption leaves as it is

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runner, requests = self.runner, self.model.reflective
        here = list(runner.input_batch.req_ids)
        if not here or not runner.requests:  # vLLM's own trial runs
            return self.inner(*args, **kwargs)
        rows = self._admit(requests, here)
        self._seed(here)
        out = self.inner(*args, **kwargs)
        hidden, B = self.model.reflective_hidden, len(here)
        starts = runner.query_start_loc.np
        for i, request in enumerate(here):
            requests.prefilled(
                request, int(runner.input_batch.num_computed_tokens_cpu[i]), hidden[starts[i] : starts[i + 1]]
            )
        requests.force(out.sampled_token_ids[:B, 0], rows)
        at = runner.query_start_loc.gpu[1 : B + 1].long() - 1
        requests.consume(out.sampled_token_ids[:B, 0].long(), hidden[at], rows)
        return out

    def sweep(self) -> None:
        """Have those leave that the runner does not know any more."""
        for request in [r for r in self._known if r not in self.runner.requests]:
            self.model.reflective.leave(request)
            del self._known[request]

    def _admit(self, requests: Requests, here: list[str]) -> torch.Tensor:
        """Rows [B] int32 of the batch; -1 where this is a piece of a prompt, behind which nothing is sampled."""
        self.sweep()
        for request in here:
            record = self.runner.requests[request]
            if self._known.get(request) is not record:
                self._known[request] = record
                ids = list(record.prompt_token_ids) + list(record.output_token_ids)
                requests.admit(request, ids, len(record.prompt_token_ids), Wanted.of(record.sampling_params.extra_args))
        requests.settle()
        discard = self.runner.discard_request_mask.np[: len(here)]
        rows = [-1 if skip else requests.row(r) for r, skip in zip(here, discard, strict=True)]
        return torch.tensor(rows, dtype=torch.int32).to(requests.placed.device, non_blocking=True)

    def _seed(self, here: list[str]) -> None:
        """Have requests that ask for it draw by seed and place, as Model Runner V2 does."""
        for i, generator in self.runner.input_batch.generators.items():
            record = self.runner.requests[here[i]]
            if Wanted.of(record.sampling_params.extra_args).seeded_by_place:
                place = len(record.prompt_token_ids) + len(record.output_token_ids)
                digest = hashlib.blake2b(f"{record.sampling_params.seed} {place}".encode(), digest_size=8).digest()
                generator.manual_seed(int.from_bytes(digest, "big") >> 1)
