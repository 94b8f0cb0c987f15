"""Questions of a file to answer."""

import dataclasses
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from ..search.candidates import SAMPLING_DEFAULTS, Ask, SamplingSettings
from ..utils.outputs import finite
from ..utils.records import PIECE_BYTES, Json, Parquet, Record, open_file, pieces
from .journal import WHOLE_ROW, Journal, Result
from .progress import Tally
from .run import Load, Report, Run, Work, fault, here, in_halves

if TYPE_CHECKING:
    from ..model import Generation, ReflectiveModel
    from ..search.strategies import Strategy

TO_ANSWER = ("question", "prompt", "problem")
ANSWERED = ("text", "score", "best", "candidates", "strategy", "seed", "tokens", "error")


def generate_file(
    load: Load,
    source: str | Path,
    output: str | Path,
    *,
    effort: str | None = None,
    strategy: "Strategy | str | None" = None,
    n: int | None = None,
    max_new_tokens: int = 512,
    thinking_budget: int | None = None,
    seed: int | None = None,
    together: int = 8,
    replace: bool = False,
    report: Report = print,
    run: Run = here,
    decoding: str = "auto",
    kv_tokens: int | None = None,
    **sampling: Unpack[SamplingSettings],
) -> int:
    """Answer every question of a file of JSON or parquet, and write it with ``ANSWERED`` into another.

    A row has a ``question``, ``prompt`` or ``problem``: a text, or a conversation of one user message. ``candidates`` are all
    that there were, and ``best`` is the index of the chosen one among them.

    Args:
        load, source, output, replace, report, run: as for ``score_file``.
        effort, strategy, n, max_new_tokens, thinking_budget, decoding, kv_tokens, **sampling: as for ``ReflectiveModel.generate``.
        seed: row r is answered with ``seed_of(seed, r)``, which its ``seed`` says, as it would be alone. None draws one, with
            which the run goes on when it was killed.
        together: questions decoded in one batch, and kept together. A run that goes on may have another number.

    Returns, raises: as ``score_file``; and KeyboardInterrupt, where ``ReflectiveModel.generate`` gives what there is.
    """
    file = open_file(source)
    settings = {
        "max_new_tokens": max_new_tokens, "thinking_budget": thinking_budget, **SAMPLING_DEFAULTS, **sampling,
    }  # fmt: skip
    with Journal(Path(output), replace) as journal:
        work = Work("generate", file, journal, TO_ANSWER, ANSWERED)
        if seed is None and (seed := journal.setting("seed")) is None:
            seed = secrets.randbits(32)
        journal.agree({"seed": seed, **settings})
        how = {"decoding": decoding, "kv_tokens": kv_tokens}
        return run(load, _Answering(strategy, effort, n, seed, together, settings, how), work, report)


@dataclasses.dataclass
class _Answering:
    """A ``run.Job``; attributes: as the arguments of ``generate_file``, ``settings`` those that every question has, ``how`` those
    that no answer depends on."""

    strategy: "Strategy | str | None"
    effort: str | None
    n: int | None
    seed: int
    together: int
    settings: dict[str, Any]
    how: dict[str, Any]

    def windows(self, source: Json | Parquet) -> Iterator[list[Record]]:
        return pieces(source.records(TO_ANSWER), lambda record: record.size, self.together, PIECE_BYTES)

    def begin(self, model: "ReflectiveModel") -> dict[str, Any]:
        strategy = model.strategy(self.strategy, self.effort, self.n)
        _check_settings(model, strategy, self.settings)
        return {**model.identity(), "strategy": repr(strategy)}

    def results(
        self, model: "ReflectiveModel", window: list[Record], done: Collection[tuple[int, int]], tally: Tally
    ) -> Iterator[list[Result]]:
        strategy = model.strategy(self.strategy, self.effort, self.n)
        results: list[Result] = []
        asked: list[tuple[int, str]] = []
        for record in window:
            if (record.number, WHOLE_ROW) not in done:
                try:
                    asked.append((record.number, _question(model, record)))
                except ValueError as error:
                    results.append((record.number, WHOLE_ROW, fault(error, ANSWERED)))

        def answer(asked: list[tuple[int, str]]) -> "list[Generation]":
            model.forget()  # the windows before, which were perhaps answered by another process
            seeds = [seed_of(self.seed, number) for number, _ in asked]
            found = model.generate(
                [question for _, question in asked], strategy=strategy, seed=seeds, **self.settings, **self.how
            )
            if any(generation.interrupted for generation in found):
                raise KeyboardInterrupt
            return found

        for (number, _), found in zip(asked, in_halves(answer, asked), strict=True):
            results.append((number, WHOLE_ROW, _answered(found)))
        tokens = sum(result["tokens"] or 0 for _, _, result in results)
        tally.expect(len(results), tokens)
        tally.advance(len(results), tokens, sum(result["error"] is not None for _, _, result in results))
        yield results


def seed_of(seed: int, row: int) -> int:
    """The seed of a row's question, in [0, 2^63)."""
    import numpy as np

    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]) >> 1


def _question(model: "ReflectiveModel", record: Record) -> str:
    """What a record asks.

    Raises:
        ValueError: nothing, or what leaves no room for an answer.
    """
    if record.fault:
        raise ValueError(record.fault)
    asked = next((record.fields[name] for name in TO_ANSWER if record.fields.get(name) is not None), None)
    match asked:
        case [{"role": "user", "content": text}]:
            asked = text
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError("expected a question, prompt or problem: a text, or one user message")
    length = model.encode(model.format(asked)).shape[1]
    if model.max_length and length >= model.max_length:
        raise ValueError(
            f"the prompt has {length:,} tokens, which leaves no room in the model's {model.max_length:,} positions"
        )
    return asked


def _answered(found: "Generation | Exception") -> dict[str, Any]:
    if isinstance(found, Exception):
        return fault(found, ANSWERED)
    return finite(
        {
            "text": found.text, "score": found.score, "best": found.candidates.index(found.best),
            "candidates": [c.record() for c in found.candidates],
            "strategy": found.strategy, "seed": found.seed, "tokens": found.tokens, "error": found.best.error,
        }
    )  # fmt: skip


def _check_settings(model: "ReflectiveModel", strategy: "Strategy", settings: dict[str, Any]) -> None:
    """Raises ValueError for settings that no question can be answered with."""
    model.check_sampling(Ask([0], strategy, **settings))
    if settings["thinking_budget"] is not None:
        model.think_end()
