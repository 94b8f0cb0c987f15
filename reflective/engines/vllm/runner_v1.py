"""The scorer in vLLM's first model runner, which CPU builds fall back to: it has no place for a sampler of one's own, so its own is wrapped."""

import dataclasses
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
        self._by_place: set[str] = set()  # requests whose seed draws by place
        self._drawn_before: dict[str, list[int]] = {}  # of requests that go on from another, its tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, logits: Any, sampling_metadata: Any, **kwargs: Any) -> Any:
        runner, requests = self.runner, self.model.reflective
        here = list(runner.input_batch.req_ids)
        if not here or not runner.requests:  # vLLM's own trial runs
            return self.inner(logits, sampling_metadata, **kwargs)
        rows = self._admit(requests, here)
        self._seed(here)
        out = self.inner(logits, self._penalised(here, sampling_metadata), **kwargs)
        hidden, B = self.model.reflective_hidden, len(here)
        if requests.by_prefill:
            starts, computed = runner.query_start_loc.np, runner.input_batch.num_computed_tokens_cpu
            for i, request in enumerate(here):
                if request in requests.by_prefill:
                    requests.prefilled(request, int(computed[i]), hidden[starts[i] : starts[i + 1]])
        requests.force(out.sampled_token_ids[:B, 0], rows)
        at = runner.query_start_loc.gpu[1 : B + 1].long() - 1
        requests.consume(out.sampled_token_ids[:B, 0].long(), hidden[at], rows)
        return out

    def hear(self) -> None:
        """Of requests that the runner has dropped."""
        for request in [r for r in self._known if r not in self.runner.requests]:
            self.model.reflective.leave(request)
            del self._known[request]
            self._by_place.discard(request)
            self._drawn_before.pop(request, None)

    def _admit(self, requests: Requests, here: list[str]) -> torch.Tensor:
        """Rows [B] int32 of the batch; -1 where this is a piece of a prompt, behind which nothing is sampled."""
        self.hear()
        for request in here:
            record = self.runner.requests[request]
            if self._known.get(request) is not record:
                self._known[request] = record
                ids = list(record.prompt_token_ids) + list(record.output_token_ids)
                wanted = Wanted.of(record.sampling_params.extra_args)
                requests.admit(request, ids, len(record.prompt_token_ids), wanted)
                if wanted.seeded_by_place:
                    self._by_place.add(request)
                if wanted.output_from is not None:
                    self._drawn_before[request] = list(record.prompt_token_ids)[wanted.output_from :]
        requests.settle()
        discard = self.runner.discard_request_mask.np[: len(here)]
        rows = [-1 if skip else requests.row(r) for r, skip in zip(here, discard, strict=True)]
        return torch.tensor(rows, dtype=torch.int32).to(requests.placed.device, non_blocking=True)

    def _penalised(self, here: list[str], metadata: Any) -> Any:
        """``metadata`` with what was drawn before as output, whose tokens presence and frequency penalty count."""
        if metadata.no_penalties or not any(request in self._drawn_before for request in here):
            return metadata
        output = [
            [*self._drawn_before.get(r, ()), *ids] for r, ids in zip(here, metadata.output_token_ids, strict=True)
        ]
        return dataclasses.replace(metadata, output_token_ids=output)

    def _seed(self, here: list[str]) -> None:
        """Have requests that ask for it draw by seed and place, as Model Runner V2 does."""
        for i, generator in self.runner.input_batch.generators.items() if self._by_place else ():
            if here[i] in self._by_place:
                record = self.runner.requests[here[i]]
                place = len(record.prompt_token_ids) + len(record.output_token_ids)
                digest = hashlib.blake2b(f"{record.sampling_params.seed} {place}".encode(), digest_size=8).digest()
                generator.manual_seed(int.from_bytes(digest, "big") >> 1)
