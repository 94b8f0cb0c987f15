"""The loop behind ``ReflectiveModel.generate``: an engine decodes the candidates of several questions, strategies steer them."""

import collections
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..engines.base import Appended, Ended, Engine, Event, Opened, Score, Stepped
from .candidates import Ask, Live, Question
from .strategies import ANSWER, HOLD, KEEP, STOP, Step, Strategy
from .text import Reader


class Search:
    """Runs of an engine: questions that come and go, each with a strategy of its own.

    Args:
        reader: of the checkpoint's responses.
        on_step: called after every forward with the candidates, ended ones too, of each question under way.
        on_end: called with every question that has ended.
    """

    def __init__(
        self,
        engine: Engine,
        reader: Reader,
        *,
        on_step: Callable[[list[list[Live]]], None] | None = None,
        on_end: Callable[[Question], None] | None = None,
    ) -> None:
        self.engine, self.reader, self.on_step, self.on_end = engine, reader, on_step, on_end
        # Of questions that have come, by what stands behind them in the prompt, the engine's numbers.
        self._prefixes: dict[Question, dict[str, int]] = {}
        self._opened: dict[int, Question] = {}  # the same, the other way round
        self._under_way: list[Question] = []  # those whose prompts were run
        self._live: dict[int, Live] = {}  # candidates by the engine's numbers of their sequences
        self._events: collections.deque[Event] = collections.deque()  # told, and not yet taken in
        self._watched = 0.0  # seconds within ``on_step``

    def run(self, asks: Iterable[Ask]) -> list[Question]:
        """Decode until every candidate has ended. After a KeyboardInterrupt: what was decoded and scored by then.

        Raises:
            ValueError: a ``thinking_budget`` without a text that ends thinking.
            RuntimeError: the strategy failed, holds everything for ever, or says what is no action.
        """
        questions = [Question(self.reader, ask, watched=self._watched) for ask in asks]
        waiting = collections.deque(questions)

        def arrivals(room: int) -> list[Question]:
            new = []
            while waiting and room > 0:
                new.append(waiting.popleft())
                room -= len(new[-1].candidates)
            return new

        try:
            self.serve(arrivals)
        except KeyboardInterrupt:
            self._interrupt(questions)
        return questions

    def serve(self, arrivals: Callable[[int], list[Question]]) -> None:
        """Decode what ``arrivals`` brings, until that is nothing while nothing is left to do; see ``turn``."""
        with self.engine:
            while self.turn(arrivals):
                pass

    def turn(self, arrivals: Callable[[int], list[Question]], **how: Any) -> bool:
        """One piece of the engine's work, and what follows from it; whether there was anything to do.

        ``arrivals(room)`` is asked where there are places: for questions with about ``room`` candidates in all, 1 at the
        least. ``how``: to the engine's ``advance``.
        """
        self._drop()
        if (room := self.engine.room) > 0:
            self._open(arrivals(room))
        events = self.engine.advance(**how)
        if events is None:
            return False
        if events:
            opened = [self._opened[e.prefix] for e in events if isinstance(e, Opened)]
            self._follow(events)
            self._account(opened or self._under_way)
        return True

    # -- what comes from the engine ----------------------------------------------------------------------------------

    def _open(self, questions: list[Question]) -> None:
        prefixes = self.engine.open([q.opening(self.on_step is not None) for q in questions])
        for q, prefix in zip(questions, prefixes, strict=True):
            self._prefixes[q], self._opened[prefix] = {"": prefix}, q
            q.watched = self._watched if q.watched is None else q.watched
            self._start(q, q.candidates)

    def _start(self, q: Question, candidates: list[Live], asked: str = "") -> None:
        known = self._prefixes[q]
        if asked not in known:
            (known[asked],) = self.engine.open([q.opening(self.on_step is not None, asked)])
            self._opened[known[asked]] = q
        sequences = self.engine.start(known[asked], [q.ask.sampling(c.number, c.temperature) for c in candidates])
        for c, sequence in zip(candidates, sequences, strict=True):
            c.sequence = sequence
            self._live[sequence] = c
            self._force(c)

    def _follow(self, events: list[Event]) -> None:
        """Take in what an ``advance`` told, and have the strategies act on it until none has anything to say."""
        while True:
            self._events += events
            self._take()
            observed = [self._consult(q) for q in self._under_way if q.observes]  # every one, so no any() of them
            if True not in observed:
                return
            # Those that are let go behind a step, and their forks, have tokens already, which may end something.
            let_go = any(c.waits and not c.resting for q in self._under_way for c in q.open)
            events = (self.engine.advance() or []) if let_go else []

    def _take(self) -> None:
        complete: list[Live] = []
        appended: list[Live] = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Appended):
                c = self._live[event.sequence]
                c.append(event.chance)
                (complete if c.complete() else appended).append(c)
            elif isinstance(event, Stepped):
                c = self._live[event.sequence]
                c.stepped(event.step_scores)
                if event.ended and c.question.observes:
                    c.changed = c.waits = True
            elif isinstance(event, Ended):
                c = self._live.pop(event.sequence)
                if event.chance is not None:
                    c.heard(event.chance)
                c.end("stop" if c in complete else event.reason, event.score)
            else:
                question = self._opened[event.prefix]
                if question not in self._under_way:  # else it is the prompt of what was asked anew
                    question.prompt_chances = event.chances
                    self._under_way.append(question)
        for c in appended:
            self._force(c)
        self._end([c for c in complete if c.running], "stop")

    def _force(self, c: Live) -> None:
        if c.running and (tokens := c.question.forced(c)):
            self.engine.force(c.sequence, tokens)

    def _end(self, candidates: list[Live], status: str) -> None:
        """End candidates here, and score them."""
        sequences = [c.sequence for c in candidates]
        for c, score in zip(candidates, self.engine.stop(sequences) if sequences else [], strict=True):
            del self._live[c.sequence]
            c.end(status, score)

    def _account(self, questions: list[Question]) -> None:
        """After what a piece of work has led to: time, and questions that have ended."""
        for q in questions:
            q.went_by(self._watched)
            q.alive.append((q.seconds, len(q.open)))
        if self.on_step:
            began = time.perf_counter()
            self.on_step([q.candidates for q in self._under_way])
            self._watched += time.perf_counter() - began
        self._close([q for q in self._under_way if not q.open])

    def _close(self, questions: list[Question]) -> None:
        for q in questions:
            if q in self._under_way:
                self._under_way.remove(q)
            prefixes = list(self._prefixes.pop(q).values())
            for prefix in prefixes:
                del self._opened[prefix]
            self.engine.close(prefixes)
            if self.on_end:
                self.on_end(q)

    def _drop(self) -> None:
        """End what was cancelled, prompts that are not yet run included."""
        cancelled = [q for q in self._prefixes if q.cancelled]
        self._interrupt(cancelled)
        self._close(cancelled)

    def _interrupt(self, questions: list[Question]) -> None:
        self._take()
        for q in questions:
            if q.open:
                q.went_by(self._watched)
        self._end([c for q in questions for c in q.open if c.sequence is not None and c.token_ids], "interrupted")
        for q in questions:
            for c in q.open:
                self._live.pop(c.sequence, None)
                c.end("interrupted", Score())

    # -- the strategies ----------------------------------------------------------------------------------------------

    def _consult(self, q: Question) -> bool:
        """Have the strategy observe if that happened which it waits for, and do as it says; whether it was."""
        shown = [c for c in q.candidates if c.running or (c.finished and c.status != "stopped")]
        due = any(c.changed for c in shown)
        if q.strategy.by_step:
            due = due and all(c.changed or c.held or c.finished for c in shown)
        stuck = not due and any(c.held for c in shown) and all(c.held or c.finished for c in shown)
        if not due and not stuck:
            self._rest([c for c in shown if c.running and c.changed])  # until the others have ended their steps
            return False
        step = Step(shown, q.random, q.tokens, [c.changed for c in shown])
        self._act(q, shown, ask(q.strategy, "observe", step))
        if step.fresh > 0 and (new := q.begin(step.fresh, step.asked)):
            self._start(q, new, step.asked)
        if stuck and q.open and all(c.held for c in q.open):
            raise RuntimeError(
                f"strategy {name_of(q.strategy)}: it holds every candidate that could decode, time and again"
            )
        return True

    def _act(self, q: Question, shown: list[Live], actions: Sequence[int] | None) -> None:
        actions = [KEEP] * len(shown) if actions is None else [int(a) for a in actions]
        if len(actions) != len(shown) or min(actions, default=KEEP) < ANSWER:
            raise RuntimeError(f"strategy {name_of(q.strategy)}: observe gave {actions} for {len(shown)} candidates")
        for c, action in zip(shown, actions, strict=True):
            c.changed, c.held = False, action == HOLD and c.running
            if action > 1:
                self._fork(c, action - 1)
            elif action == ANSWER and c.running:
                self._answer(c)
        stopped = [c for c, action in zip(shown, actions, strict=True) if action == STOP]
        self._end([c for c in stopped if c.running], "stopped")
        for c in stopped:
            c.status = "stopped"
        going = [c for c in shown if c.running]
        self._rest([c for c in going if c.held])
        resumed = [c for c in going if c.resting and not c.held]
        if resumed:
            self.engine.resume([c.sequence for c in resumed])
        for c in resumed:
            c.resting = False

    def _rest(self, candidates: list[Live]) -> None:
        candidates = [c for c in candidates if not c.resting]
        if candidates:
            self.engine.rest([c.sequence for c in candidates])
        for c in candidates:
            c.resting = True

    def _answer(self, c: Live) -> None:
        """Have ``c`` end its thinking."""
        try:
            tokens = c.question.thinking_end(c)
        except ValueError as error:
            raise RuntimeError(f"strategy {name_of(c.question.strategy)}: it has candidates end their thinking, and {error}") from error
        if tokens:
            self.engine.force(c.sequence, tokens)

    def _fork(self, c: Live, k: int) -> None:
        """``k`` further candidates that go on where ``c`` is, or are as it has ended."""
        q = c.question
        numbers = range(len(q.candidates), len(q.candidates) + k)
        sequences: Sequence[int | None] = [None] * k
        if c.running:
            sequences = self.engine.fork(c.sequence, [q.ask.sampling(number, c.temperature) for number in numbers])
        forks = [c.forked(number, sequence) for number, sequence in zip(numbers, sequences, strict=True)]
        self._live |= {f.sequence: f for f in forks if f.sequence is not None}
        q.candidates += forks


def ask(strategy: Strategy, method: str, argument: Any) -> Any:
    """What ``strategy`` says; a RuntimeError names it if it fails."""
    try:
        return getattr(strategy, method)(argument)
    except Exception as error:
        raise RuntimeError(f"strategy {name_of(strategy)}: {method} failed: {error!r}") from error


def name_of(strategy: Strategy) -> str:
    """Of the class, for the strategies of users bear no other."""
    return type(strategy).__name__
