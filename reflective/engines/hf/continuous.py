"""Continuous batching (``model.generate_batch``): which packed tokens of a forward belong to which request."""

from typing import Any

import torch
from torch import Tensor

from .internals import BatchedRequest, batched_requests, unseen_forwards
from .states import States
from .stream import Stream


class Batching:
    """The states of one manager's requests. Its forwards carry ids [1, T], one request's tokens after the other's.

    Requests come and go; each has a state of the scorer. Tokens that a request gives again, because its cache was given up
    and is prefilled anew, are left out; a prefix that the cache had already is consumed without hidden states, which no step
    of a response needs.

    Raises:
        ValueError: the manager runs the model where Python does not see its forwards.
    """

    def __init__(self, manager: Any, stream: Stream, states: States) -> None:
        if names := unseen_forwards(manager):
            raise ValueError(
                f"continuous batching with {', '.join(names)} runs forwards that the scorer does not see; pass "
                "continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False, use_async_batching=False) and no "
                "compile config"
            )
        if stream.flushes_by_hand:
            raise ValueError("continuous batching is scored without record_features and process_group; use generate")
        if stream.scope == "text":
            raise ValueError("scope='text': continuous batching shares cached prompts; use scope='response'")
        self.manager, self._stream, self._states = manager, stream, states
        self.rows: dict[str, int] = {}
        self.seen: dict[str, int] = {}  # tokens consumed
        self.placed: tuple[list[int], list[int]] = [], []  # rows and bounds of the forward in progress
        self.parents: list[BatchedRequest] = []  # with children, that the forward in progress ends the prompt of

    def before(self) -> None:
        """The forward of the requests that the manager has put into its next batch begins."""
        rows, bounds, self.parents = [], [0], []
        for request in batched_requests(self.manager):
            if request.name not in self.rows:
                self._admit(request)
            row, seen = self.rows[request.name], self.seen[request.name]
            if request.past > seen:
                raise RuntimeError(
                    f"request {request.name}: tokens {seen} to {request.past} never went through the model"
                )
            again = min(request.tokens, seen - request.past)
            rows += [-1, row]
            bounds += [bounds[-1] + again, bounds[-1] + request.tokens]
            self.seen[request.name] = max(seen, request.past + request.tokens)
            if request.children:
                self.parents.append(request)
        self.placed = rows, bounds

    def _admit(self, request: BatchedRequest) -> None:
        ids, past = torch.tensor([request.prompt]), request.past
        (row,) = self._states.admit(ids, None)
        self.rows[request.name], self.seen[request.name] = row, past
        if past:
            hidden = self._stream.no_hidden(1, past)
            rows = torch.tensor([row], dtype=torch.int32, device=hidden.device)
            self._stream.run(self._stream.state, ids[:, :past].to(hidden.device), hidden, rows, quiet=past)

    def features(self, ids: Tensor, hidden: Tensor) -> None:
        """Score the states [1, T, H] of that forward."""
        rows, bounds = (torch.tensor(x, dtype=torch.int32).to(hidden.device, non_blocking=True) for x in self.placed)
        self._stream.run(self._stream.state, ids.long(), hidden, rows, bounds)
        for parent in self.parents:
            rows = self._states.fork([self.rows[parent.name]] * len(parent.children))
            self.rows |= zip(parent.children, rows, strict=True)
            self.seen |= dict.fromkeys(parent.children, self.seen[parent.name])

    def finished(self, outputs: dict[str, Any] | None) -> tuple[list[int], list[Tensor] | None]:
        """States and sequences of the requests that ``generate_batch`` returned, in its order; None: of all, as they are."""
        if outputs is None:
            return list(self.rows.values()), None
        if not hasattr(outputs, "items"):
            raise ValueError("sequences: pass the dictionary that generate_batch returned")
        if unknown := [name for name in outputs if name not in self.rows]:
            raise ValueError(f"sequences: requests {unknown} never ran while this scorer was attached")
        texts = [torch.tensor([*out.prompt_ids, *out.generated_tokens]) for out in outputs.values()]
        return [self.rows[name] for name in outputs], texts
