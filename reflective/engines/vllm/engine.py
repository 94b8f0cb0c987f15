"""The engine that has vLLM decode (``engines.base`` says what an engine is).

One ``advance`` is one step of vLLM's engine core, in this process. A sequence is a request; where it is stopped it is aborted, and where it is to
go on in another way, after a rest, with forced tokens or as a fork, there is a new request with the prompt and the tokens so far. Of these all
but the last block's keys and values are in the prefix cache, and the scores of its steps travel along.

**Memory first.** vLLM, short of memory for keys and values, preempts whom it admitted last. Here that does not come about: before a step for
which there may be too few blocks, the sequence with the lowest score is parked, and goes on when there is room again, best first. It draws the same
tokens as if nothing had happened. Blocks are counted from above: forks of one sequence share more than is known here.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from typing_extensions import Self

from ...scoring.scores import TrajectoryScores, logit_of
from ...scoring.steps import StepTokens
from ...scoring.taps import At
from ..base import Appended, Chance, Ended, Event, Opened, Prompt, Sampling, Score, Stepped
from .core import Core
from .results import check_ids
from .sequences import Prefix, chance_of, continuation
from .sequences import Sequence as Continuation
from .walk import Walk


class VLLMEngine:
    """See ``engines.base.Engine`` for all that is not said here.

    Args:
        core: vLLM, which others may use too.
        steps: of its model.
        at, aggregation, sigmoid: of the head, as its worker has it.
        ends: tokens that end a sequence.
        batch_rows: sequences decoded together at most; None: as many as vLLM decodes.

    Attributes:
        parked: how often a sequence had to wait for memory.
        how: ``"vllm"``.
    """

    how = "vllm"

    def __init__(
        self, core: Core, steps: StepTokens, *, at: At, ends: Collection[int], batch_rows: int | None = None,
        aggregation: str = "geometric_mean", sigmoid: bool = True,
    ) -> None:  # fmt: skip
        config = core.config
        self.core, self.steps, self.at, self.ends = core, steps, at, frozenset(ends)
        self.aggregation, self.sigmoid = aggregation, sigmoid
        self.batch_rows = batch_rows or config.scheduler_config.max_num_seqs
        self.parked = 0
        self._block, self._blocks = config.cache_config.block_size, config.cache_config.num_gpu_blocks or 0
        drafted = 0 if config.speculative_config is None else config.speculative_config.num_speculative_tokens
        self._ahead = 2 * (drafted + 1)  # tokens that a sequence can need places for in a step
        self._numbers = itertools.count()
        self._prefixes: dict[int, Prefix] = {}
        self._sequences: dict[int, Continuation] = {}  # that have not ended
        self._requests: dict[str, Continuation | Prefix] = {}  # under way in vLLM
        self._ended: list[Event] = []  # to be told
        self._entered = False

    @property
    def scoring_seconds(self) -> float:
        """Of vLLM's worker, since it began."""
        return self.core.stats()["seconds"]

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        self._drop(list(self._requests))

    # -- prompts -----------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        return self.batch_rows - sum(not s.resting for s in self._sequences.values())

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        new = [Prefix(next(self._numbers), prompt, Walk(self.steps, prompt.ids)) for prompt in prompts]
        self._prefixes |= {p.number: p for p in new}
        return [p.number for p in new]

    def start(self, prefix: int, samplings: Sequence[Sampling]) -> list[int]:
        if (place := self._prefixes.get(prefix)) is None:
            raise KeyError(f"prefix {prefix} was closed, or never opened")
        return self._keep(Continuation(next(self._numbers), place, s, place.walk.copy()) for s in samplings)

    def _keep(self, new: Iterable[Continuation]) -> list[int]:
        numbers = []
        for s in new:
            self._sequences[s.number] = s
            s.prefix.sequences.append(s)
            numbers.append(s.number)
        return numbers

    # -- tokens ------------------------------------------------------------------------------------------------------

    def advance(self) -> list[Event] | None:
        if not self._entered:
            raise RuntimeError("the engine hears no forward: call it within `with engine:`")
        self._collect(list(self._requests))
        if events := self._tell():
            return events
        self._submit()
        if not self._requests:
            return None
        self._relieve()
        self.core.step()
        self._collect(list(self._requests))
        return self._tell()

    def _submit(self) -> None:
        """Requests for whoever has none: of prompts on their own, and of sequences, as many as have places."""
        for prefix in self._prefixes.values():
            alone = prefix.prompt.logprobs is not None or all(not s.sampling.max_tokens for s in prefix.sequences)
            if not prefix.opened and alone and prefix.request is None:
                prefix.request = self.core.add(
                    prefix.prompt.ids, max_tokens=1, temperature=0.0, prompt_logprobs=prefix.prompt.logprobs
                )
                self._requests[prefix.request] = prefix
        running = [s for s in self._sequences.values() if s.request in self._requests]
        back = sorted((s for s in self._sequences.values() if s.parked), key=_mean, reverse=True)
        waiting = [
            s for p in self._prefixes.values() for s in p.sequences if s.waits and (p.opened or p.request is None)
        ]
        for s in [*back, *waiting]:
            if len(running) >= self.batch_rows or (running and not self._fits([*running, s], len(running) + 1)):
                return
            s.parked = False
            running.append(s)
            ids, params = continuation(s, sorted(self.ends), self.at)
            s.request = self.core.add(ids, **params)
            self._requests[s.request] = s

    def _drop(self, requests: Iterable[str]) -> None:
        """Abort requests, and forget what was scored of them."""
        if gone := list(requests):
            self.core.abort(gone)
            for r in gone:
                if whose := self._requests.pop(r, None):
                    whose.request = None
            self.core.logs(gone, forget=True)

    def _collect(self, names: Iterable[str]) -> None:
        for name in names:
            for output in self.core.fetch(name):
                self._take(name, output)

    def _take(self, name: str, output: Any) -> None:
        """What vLLM tells of a request."""
        whose = self._requests[name]
        if isinstance(whose, Prefix):
            if output.finished:
                del self._requests[name]
                whose.request, whose.opened = None, True
                whose.chances = self._of_prompt(whose.prompt.ids, output.prompt_logprobs, 0, whose.prompt.logprobs)
                self._ended.append(Opened(whose.number, whose.chances))
                self.core.logs([name], forget=True)
            return
        s, (new,) = whose, output.outputs
        if not s.prefix.opened:
            s.prefix.opened = True
            self._ended.append(Opened(s.prefix.number, []))
        most = s.sampling.logprobs
        if s.forced and new.token_ids:
            begin = len(output.prompt_token_ids) - len(s.forced)
            s.drawn += self._of_prompt(output.prompt_token_ids, output.prompt_logprobs, begin, most)
            s.forced = []
        if not s.spare:
            s.drawn += [chance_of(token, of, most) for token, of in zip(new.token_ids, new.logprobs, strict=True)]
        if output.finished:
            s.ended = True
            del self._requests[name]

    def _of_prompt(self, ids: Sequence[int], of: Any, begin: int, most: int | None) -> list[Chance]:
        if of is None:
            return []
        return [chance_of(token, chances, most) for token, chances in zip(ids[begin:], of[begin:], strict=True)]

    # -- events ------------------------------------------------------------------------------------------------------

    def _tell(self) -> list[Event]:
        """What is known and was not told: of a sequence a token at most, and its steps."""
        events, self._ended = self._ended, []
        told: list[tuple[Continuation, list[Event]]] = []
        scored: list[Continuation] = []  # whose newest steps are told
        ended: dict[int, tuple[str, Chance | None]] = {}
        for s in list(self._sequences.values()):
            if s.resting:
                continue
            if not s.sampling.max_tokens and s.prefix.opened:
                ended[s.number] = "length", None
                told.append((s, []))
                continue
            own = self._next(s, ended)
            if own is not None:
                told.append((s, own))
                if any(isinstance(e, Stepped) for e in own):
                    scored.append(s)
        self._learn([s for s in scored if s.number not in ended])
        ends = [s for s, _ in told if s.number in ended]
        scores = dict(zip((s.number for s in ends), self._scores(ends), strict=True))
        for s, own in told:
            events += [
                e._replace(step_scores=self._step_scores(s, len(e.step_scores))) if isinstance(e, Stepped) else e
                for e in own
            ]
            if s.number in ended:
                events.append(Ended(s.number, *ended[s.number], scores[s.number]))
        return events

    def _next(self, s: Continuation, ended: dict[int, tuple[str, Chance | None]]) -> list[Event] | None:
        """Its next events, without their scores; None: nothing is known of it. Where it ends is noted in ``ended``.

        A step is told when the next token is there, though its score was there with its own: then a strategy sees of all candidates what it
        sees in an engine that has to feed a token first, and comes to the same.
        """
        events: list[Event] = []
        if s.owes_step and s.drawn:
            s.owes_step = False
            events += self._stepped(s)
            if events and events[0].ended and s.prefix.prompt.steps == "awaited":
                return events
        if s.drawn:
            chance = s.drawn.popleft()
            if chance.token in self.ends:
                ended[s.number], s.end = ("stop", chance), [chance.token]
                return events
            s.tokens.append(chance.token)
            s.walk.feed(chance.token)
            s.owes_step = True
            events.append(Appended(s.number, chance))
        elif not self._over(s):
            return None
        if self._over(s):
            ended[s.number] = "length", None
        return events

    def _over(self, s: Continuation) -> bool:
        return len(s.tokens) >= s.sampling.max_tokens or (s.ended and not s.drawn)

    def _stepped(self, s: Continuation) -> list[Stepped]:
        """Whether the steps that count have changed; the scores come later."""
        if s.prefix.prompt.steps == "untold" or (n := len(s.walk.counted())) == s.steps:
            return []
        more, s.steps = n > s.steps, n
        return [Stepped(s.number, [0.0] * n, more)]

    # -- scores ------------------------------------------------------------------------------------------------------

    def _learn(self, sequences: Sequence[Continuation], *, last: bool = False) -> None:
        """Ask vLLM's worker for the steps of sequences that have, or have just had, a request; ``last``: for the last time."""
        asked = {name: s for s in sequences if (name := s.request) is not None}
        if not asked:
            return
        for log in self.core.logs(list(asked), forget=last):
            s = asked[log.key]
            if last and not s.forced:  # else the prefill of those may be under way
                check_ids(log, [*s.ids, *(c.token for c in s.drawn), *s.end], self.steps.vocab_size)
            s.known |= {column: (region, score) for column, region, score in log.steps}

    def _step_scores(self, s: Continuation, n: int) -> list[float]:
        """Of the first ``n`` steps that count, NaN where there is none."""
        logged = [s.known[c][1] if c in s.known else math.nan for c in s.walk.counted()[:n]]
        return [math.exp(log_score) for log_score in logged] if self.sigmoid else logit_of(torch.tensor(logged)).tolist()

    def _scores(self, sequences: Sequence[Continuation]) -> list[Score]:
        """Of sequences that end here, whose requests are aborted and forgotten."""
        if not sequences:
            return []
        self._drop_alive(sequences)
        self._learn(sequences, last=True)
        found, columns, errors = [], [], {}
        for i, s in enumerate(sequences):
            counted = s.walk.counted()
            if self.at != "predict":
                last = len(s.ids) - 1  # which may have no state
                counted = [c for c in counted if c in s.known or c < last]
            if missing := [c for c in counted if c not in s.known]:
                errors[i] = f"the steps at columns {missing} were not scored: there were more than max_steps"
            counted = [c for c in counted if c in s.known]
            columns.append(torch.tensor(counted, dtype=torch.int64))
            found.append(torch.tensor([s.known[c][1] for c in counted], dtype=torch.float32))
        scores = TrajectoryScores.collect(
            [float(f.double().sum()) for f in found], [len(f) for f in found], found, columns, self.at, self.aggregation,
            self.sigmoid,
        )  # fmt: skip
        self._end(sequences)
        return [
            Score(
                math.nan if i in errors else float(scores.score[i]), scores.step_scores[i].tolist(),
                (columns[i] - len(s.prefix.prompt.ids)).tolist(), errors.get(i) or scores.errors.get(i),
            )
            for i, s in enumerate(sequences)
        ]  # fmt: skip

    def _drop_alive(self, sequences: Sequence[Continuation]) -> None:
        """Abort their requests, which can still be asked about."""
        self._collect([s.request for s in sequences if s.request in self._requests])  # what was drawn belongs to them
        if alive := [s.request for s in sequences if s.request in self._requests]:
            self.core.abort(alive)
            for name in alive:
                del self._requests[name]

    def _end(self, sequences: Sequence[Continuation]) -> None:
        gone = set(sequences)
        for s in sequences:
            del self._sequences[s.number]
            s.request = None
        for prefix in {s.prefix for s in sequences}:
            prefix.sequences = [s for s in prefix.sequences if s not in gone]

    # -- what becomes of sequences -----------------------------------------------------------------------------------

    def _leave(self, sequences: Sequence[Continuation]) -> None:
        """Take sequences out of vLLM. What was drawn and scored stays."""
        there = [s for s in sequences if s.request is not None]
        self._drop_alive(there)
        self._learn(there, last=True)
        for s in there:
            s.request = None

    def fork(self, sequence: int, samplings: Sequence[Sampling]) -> list[int]:
        s = self._going(sequence)
        if any(c not in s.known for c, _ in s.walk.found):
            self._learn([s])
        known = {c: of for c, of in s.known.items() if c < len(s.ids)}
        if s.prefix.prompt.steps == "untold":
            s.steps = len(s.walk.counted())
        return self._keep(
            Continuation(
                next(self._numbers), s.prefix, sampling, s.walk.copy(), list(s.tokens), forced=list(s.forced), steps=s.steps,
                known=dict(known), owes_step=s.owes_step,
            )
            for sampling in samplings
        )  # fmt: skip

    def stop(self, sequences: Sequence[int]) -> list[Score]:
        return self._scores([self._going(number) for number in sequences])

    def rest(self, sequences: Sequence[int]) -> None:
        resting = [self._going(number) for number in sequences]
        self._leave(resting)
        for s in resting:
            s.resting, s.parked = True, False

    def resume(self, sequences: Sequence[int]) -> None:
        for number in sequences:
            self._going(number).resting = False

    def force(self, sequence: int, tokens: Sequence[int]) -> None:
        s = self._going(sequence)
        self._leave([s])
        s.drawn.clear()
        s.known = {c: of for c, of in s.known.items() if c < len(s.ids)}
        s.ended, s.spare, s.forced = False, False, list(tokens)

    def close(self, prefixes: Sequence[int]) -> None:
        closed = [self._prefixes.pop(number) for number in prefixes]
        gone = [r for p in closed for r in (p.request, *(s.request for s in p.sequences)) if r is not None]
        self._drop(gone)
        for prefix in closed:
            self._end(list(prefix.sequences))

    def _going(self, sequence: int) -> Continuation:
        """The sequence of this number; KeyError if none of those that go on has it."""
        if (found := self._sequences.get(sequence)) is None:
            raise KeyError(f"sequence {sequence} has ended, or was never started")
        return found

    # -- memory ------------------------------------------------------------------------------------------------------

    def _relieve(self) -> None:
        """Park the worst of those that decode until the others have blocks enough for the next step."""
        running = [s for s in self._sequences.values() if s.request in self._requests]
        if len(running) < 2 or self._fits(running, 0):
            return
        self._learn(running)
        running.sort(key=_mean)
        while len(running) > 1 and not self._fits(running, 0):
            worst = running.pop(0)
            self._leave([worst])
            worst.parked = True
            self.parked += 1

    def _fits(self, sequences: Sequence[Continuation], spare: int) -> bool:
        """Whether there are blocks for ``sequences`` with what a step may add, and ``spare`` ones."""
        block = self._block
        shared = {s.prefix.number: len(s.prefix.prompt.ids) // block for s in sequences}
        own = sum(
            -(-(len(s.ids) + len(s.drawn) + len(s.forced) + self._ahead) // block) - shared[s.prefix.number]
            for s in sequences
        )
        # vLLM keeps one block for itself.
        return sum(shared.values()) + own + spare <= self._blocks - 1


def _mean(s: Continuation) -> float:
    """Mean log-score of the steps that count so far; infinite where there is none, so that such a sequence is parked last."""
    scores = [s.known[c][1] for c in s.walk.counted() if c in s.known]
    return sum(scores) / len(scores) if scores else math.inf
