"""vLLM, as far as its engine's door and a worker's scorer see of it: requests, steps, prompts in pieces, preemptions, tokens past an end, and
several tokens a step. What decodes is a small model of transformers, one whole forward a token; what scores is the real thing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import reflective as rf
from reflective.engines.base import Sampling
from reflective.engines.hf.sampling import draw
from reflective.engines.vllm.core import Core
from reflective.engines.vllm.requests import Requests, Wanted
from reflective.engines.vllm.worker import ReflectiveWorker
from reflective.scoring.sharded import ShardedHead


@dataclass(eq=False)
class _Request:
    name: str
    id: str
    prompt: list[int]
    params: Any
    out: list[int] = field(default_factory=list)
    told: int = 0
    computed: int = 0
    admitted: bool = False
    row: int = -1

    @property
    def drawn_before(self) -> list[int]:
        begin = Wanted.of(self.params.extra_args).output_from
        return [] if begin is None else self.prompt[begin:]


class LikeVLLM:
    """
    Args:
        piece: tokens of a prompt that are run in a step at most.
        preempt: how likely a request is preempted before a step, which drops what it sampled last where ``ahead``.
        ahead: whether one token is sampled past every end, as by asynchronous scheduling.
        draft: tokens a step, at most.
        cached: columns of a prompt that need not be run, unless a request says so.
        uniform: what a request of this seed draws with at a place.
        at: in place of what the head says.
    """

    def __init__(
        self, model: rf.ReflectiveModel, *, at: str | None = None, seats: int = 8, piece: int = 1000, preempt: float = 0.0,
        ahead: bool = False, draft: int = 1, cached: int = 0, blocks: int = 10_000, rule: Any = None, ends: tuple[int, ...] = (2,),
        uniform: Callable[[int, int], float] = lambda seed, place: np.random.default_rng([seed, place]).random(),
    ) -> None:  # fmt: skip
        net = self.model = model.model
        placed = ShardedHead(model.head, torch.device("cpu"), net.dtype, None, None, None).load()
        self.layers, at = model.head.tap.layers, at or model.head.tap.at
        every = at == "every"
        steps = rf.StepTokens.every(net.config.vocab_size, [0, *ends]) if every else model.steps.resized(net.config.vocab_size)
        past = 2 * draft if draft > 1 else 1
        self.requests = Requests(steps, placed, at=at, seats=seats, past=past, rule=rule, ends=ends)
        self.seats, self.piece, self.preempt, self.ahead, self.draft = seats, piece, preempt, ahead, draft
        self.cached = cached
        self.random, self.uniform = random.Random(0), uniform
        self._kept: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.running: list[_Request] = []
        self.waiting: list[_Request] = []
        self.preemptions = self.most_blocks = 0
        speculation = SimpleNamespace(num_speculative_tokens=draft - 1) if draft > 1 else None
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=seats), speculative_config=speculation,
            cache_config=SimpleNamespace(block_size=4, num_gpu_blocks=blocks),
        )  # fmt: skip
        scored = SimpleNamespace(reflective=self.requests, reflective_hidden=None)
        self._worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: scored))

    def core(self) -> Core:
        return Core(
            self,
            lambda **fields: SimpleNamespace(
                **{
                    "stop_token_ids": (),
                    "prompt_logprobs": None,
                    "logprobs": None,
                    "seed": 0,
                    "top_p": 1.0,
                    "top_k": 0,
                    "min_p": 0.0,
                    "min_tokens": 0,
                    "repetition_penalty": 1.0,
                    "presence_penalty": 0.0,
                    "frequency_penalty": 0.0,
                    "logit_bias": None,
                    "extra_args": None,
                    **fields,
                }
            ),
        )

    def collective_rpc(self, method: str, args: tuple = ()) -> list[Any]:
        return [getattr(ReflectiveWorker, method)(self._worker, *args)]

    def add_request(self, name: str, prompt: dict, params: Any) -> None:
        self.waiting.append(
            _Request(name, f"{name}-{self.random.getrandbits(32):08x}", prompt["prompt_token_ids"], params)
        )

    def abort_request(self, names: list[str]) -> None:
        for r in [r for r in self.running if r.name in names]:
            self._leave(r)
        self.waiting = [r for r in self.waiting if r.name not in names]

    def _leave(self, r: _Request) -> None:
        self.running.remove(r)
        self.requests.leave(r.id)
        r.admitted, r.computed = False, 0

    def step(self) -> list[Any]:
        for r in list(self.running):
            if self.random.random() < self.preempt:
                self.preemptions += 1
                self._leave(r)
                if self.ahead:
                    r.out = r.out[: max(r.told, len(r.out) - 1)]
                self.waiting.insert(0, r)
        while self.waiting and len(self.running) < self.seats:
            self.running.append(self.waiting.pop(0))
        blocks = {
            tuple(r.prompt + r.out)[: i * 4 + 4]
            for r in self.running
            for i in range(-(-(len(r.prompt + r.out) + 1) // 4))
        }
        self.most_blocks = max(self.most_blocks, len(blocks))
        for r in self.running:
            if not r.admitted:
                r.admitted = True
                if not getattr(r.params, "skip_reading_prefix_cache", None):
                    r.computed = min(self.cached, len(r.prompt) - 1)
                r.row = self.requests.admit(r.id, r.prompt + r.out, len(r.prompt), Wanted.of(r.params.extra_args))
        self.requests.settle()
        ready = [r for r in self.running if self._prefill(r)]
        for group in [[r] for r in ready] if self.draft > 1 else [ready] * bool(ready):
            self._decode(group)
        return [self._output(r) for r in ready]

    def _prefill(self, r: _Request) -> bool:
        """Run a piece of what is not run; whether that was the last."""
        begin, known = r.computed, len(r.prompt + r.out)
        r.computed = min(known, begin + self.piece)
        _, hidden = self._forward(r)
        if r.id in self.requests.by_prefill:
            self.requests.prefilled(r.id, begin, hidden[begin : r.computed])
        return r.computed == known

    def _decode(self, group: list[_Request]) -> None:
        """A token of each, or several of one."""
        rows = torch.tensor([r.row for r in group], dtype=torch.int32)
        states = []
        for r in group * self.random.randint(1, self.draft):
            logits, hidden = self._forward(r)
            states.append(hidden[-1])
            r.out.append(self._draw(r, logits[-1]))
        n = len(states)
        if self.draft > 1:
            ids = group[0].out[-n:] + [-1] * (self.draft - n)
            self.requests.consume_some(
                torch.tensor([ids]), torch.tensor([n]), torch.stack(states), torch.tensor([0]), rows
            )
        else:
            sampled = torch.tensor([r.out[-1] for r in group])
            self.requests.force(sampled, rows)
            self.requests.consume(sampled, torch.stack(states), rows)
            for r, token in zip(group, sampled.tolist(), strict=True):
                r.out[-1] = token
        for r in group:
            r.computed = len(r.prompt + r.out) - 1

    def _forward(self, r: _Request, behind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] and states [T, H] of its ids, all but the last ``behind``; those of ids seen lately are kept."""
        ids = tuple(r.prompt + r.out)[: -behind or None]
        if ids not in self._kept:
            with torch.no_grad():
                out = self.model(torch.tensor([ids]), output_hidden_states=True)
            if len(self._kept) > 2000:
                self._kept.clear()
            read = torch.cat([out.hidden_states[i][0] for i in self.layers], -1)
            self._kept[ids] = out.logits[0], F.pad(read, (0, -read.shape[-1] % 8))
        return self._kept[ids]

    def _draw(self, r: _Request, logits: torch.Tensor) -> int:
        p = r.params
        chance = self.uniform(p.seed, len(r.prompt + r.out))
        sampling = Sampling(
            (0,), p.temperature, p.top_p, top_k=p.top_k, min_p=p.min_p, repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty, frequency_penalty=p.frequency_penalty,
            logit_bias=tuple((p.logit_bias or {}).items()), min_tokens=p.min_tokens and len(r.drawn_before) + p.min_tokens,
        )  # fmt: skip
        prompt = r.prompt[: len(r.prompt) - len(r.drawn_before)]
        text = prompt, [*r.drawn_before, *r.out]
        return draw(logits[None], [chance], [-1], [sampling], [text], p.stop_token_ids)[0].token

    def _output(self, r: _Request) -> Any:
        new, reason = [], None
        while r.told < len(r.out) and reason is None:
            new.append(r.out[r.told])
            r.told += 1
            reason = (
                "stop" if new[-1] in r.params.stop_token_ids else "length" if r.told >= r.params.max_tokens else None
            )
        if reason and self.ahead:  # sampled before anybody knew
            logits, hidden = self._forward(r)
            one, rows = torch.tensor([self._draw(r, logits[-1])]), torch.tensor([r.row], dtype=torch.int32)
            if self.draft > 1:
                self.requests.consume_some(one[None], torch.tensor([1]), hidden[-1:], torch.tensor([0]), rows)
            else:
                self.requests.consume(one, hidden[-1:], rows)
        first = r.told == len(new)
        if reason:
            self._leave(r)
        logits, _ = self._forward(r, behind=len(r.out) - r.told + 1)
        of = [self._chances(r, logits, i) for i in range(len(r.prompt) + r.told - len(new), len(r.prompt) + r.told)]
        prompt = None
        if first and r.params.prompt_logprobs is not None:
            prompt = [None, *(self._chances(r, logits, i, r.params.prompt_logprobs) for i in range(1, len(r.prompt)))]
        completion = SimpleNamespace(index=0, token_ids=new, logprobs=of, finish_reason=reason)
        return SimpleNamespace(
            request_id=r.name, outputs=[completion], finished=reason is not None, prompt_token_ids=r.prompt, prompt_logprobs=prompt
        )  # fmt: skip

    def _chances(self, r: _Request, logits: torch.Tensor, i: int, most: int | None = None) -> dict[int, Any]:
        token, chances = (r.prompt + r.out)[i], logits[i - 1].log_softmax(0)
        order = chances.argsort(descending=True).tolist()
        likely = {*order[: (r.params.logprobs if most is None else most) or 0], token}
        return {t: SimpleNamespace(logprob=float(chances[t]), rank=order.index(t) + 1) for t in likely}
