"""Rollouts to learn from: many answers to each question, judged, with the features that the decoder had at hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines.hf.ends import end_tokens
from ..engines.hf.finished import read_positions
from ..model import ReflectiveModel
from ..scoring.steps import StepTokens
from ..scoring.taps import At
from ..search.strategies.votes import answer_numbers
from ..search.verify import Verifier, verifier
from ..tasks import Question
from ..utils.outputs import folder, json_text
from .data import Rollouts
from .sampler import Draw, Sampler


@dataclass(frozen=True)
class View:
    """Which states stand for a response.

    Attributes:
        steps: its step-tokens; None: no steps, but one state, the last that was computed (an outcome head's).
        at: as for ``StreamScorer``.
        layer: index of ``hidden_states``; -2 is what published heads read.
    """

    steps: StepTokens | None
    at: At = "predict"
    layer: int = -2


def roll_out(
    model: ReflectiveModel,
    questions: Sequence[Question],
    *,
    samples: int = 8,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    batch_rows: int = 256,
    seed: int = 0,
    verify: Verifier | str = "answer",
    block: int = 256,
    first: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[Rollouts]:
    """Answer every question ``samples`` times; yields the rollouts of ``block`` questions at a time.

    Features are the states that the sampler kept while decoding: no forward is run for them. Every block is seeded by
    itself, so starting at block ``first`` yields what a whole run would from there.

    Args:
        verify: says whether a response is right, see ``verifier``.
        batch_rows: as for ``Sampler``.
        progress: called with the number of responses that have just been decoded.

    Raises:
        ValueError: bad settings, named; a model that the sampler cannot run.
    """
    views = {"steps": View(model.steps, model.config.at)}
    for found in roll_out_views(
        model, questions, views, samples=samples, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens,
        batch_rows=batch_rows, seed=seed, verify=verify, block=block, first=first, progress=progress,
    ):  # fmt: skip
        yield found["steps"]


def roll_out_views(
    model: ReflectiveModel,
    questions: Sequence[Question],
    views: Mapping[str, View],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_rows: int,
    seed: int,
    verify: Verifier | str,
    block: int,
    first: int,
    progress: Callable[[int], None],
) -> Iterator[dict[str, Rollouts]]:
    """``roll_out`` with several views of the same responses: rollouts that differ in their features alone."""
    judge = verifier(verify, model.answer if model.config.answer else None)
    layers = sorted({view.layer for view in views.values()})
    sampler = Sampler(
        model.model, model.tokenizer, ends=end_tokens(model.model, model.tokenizer), stop=model.config.stop,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_rows=batch_rows, layers=layers,
    )  # fmt: skip
    for number, begin in enumerate(range(0, len(questions), block)):
        part = questions[begin : begin + block]
        if number >= first:
            prompts = [model.encode(model.format(q.text))[0].tolist() for q in part]
            found: list[list[Draw]] = [[] for _ in part]
            kept: list[dict[str, tuple[Tensor, Tensor, Tensor]]] = [{} for _ in part]
            for q, draws in sampler.run(prompts, samples, seed=seed * 1_000_003 + number):
                found[q] = draws
                kept[q] = {name: _features(view, layers, prompts[q], draws) for name, view in views.items()}
                for draw in draws:
                    draw.forget()
                progress(samples)
            yield _judged(model, judge, part, begin, prompts, found, kept, views)
        else:
            progress(samples * len(part))


def _features(view: View, layers: list[int], prompt: list[int], draws: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    """``(features [M, H], draw [M], position [M])`` of one question's draws."""
    if view.steps is None:
        row = torch.arange(len(draws))
        length = torch.tensor([len(d.token_ids) for d in draws])
        step, read = len(prompt) + length - 1, len(prompt) + length - 2
    else:
        width = max(len(d.token_ids) for d in draws)
        rows = [prompt + d.token_ids + [0] * (width - len(d.token_ids)) for d in draws]
        real = [[1] * (len(prompt) + len(d.token_ids)) + [0] * (width - len(d.token_ids)) for d in draws]
        found = read_positions(view.steps, torch.tensor(rows), torch.tensor(real), len(prompt), view.at)
        # With at="token" a step-token that was generated last has no state, as in a stream.
        known = found[2] < torch.tensor([len(prompt) + len(d.token_ids) - 1 for d in draws])[found[0]]
        row, step, read = (x[known] for x in found)
    layer = layers.index(view.layer)
    states = [draws[r].state(c - len(prompt))[layer] for r, c in zip(row.tolist(), read.tolist(), strict=True)]
    return (torch.stack(states) if states else draws[0].state(-1)[:0]).cpu(), row, step


def _judged(
    model: ReflectiveModel,
    judge: Verifier,
    questions: Sequence[Question],
    begin: int,
    prompts: list[list[int]],
    found: list[list[Draw]],
    kept: list[dict[str, tuple[Tensor, Tensor, Tensor]]],
    views: Mapping[str, View],
) -> dict[str, Rollouts]:
    owner = [q for q, draws in enumerate(found) for _ in draws]
    draws = [draw for part in found for draw in part]
    texts = [model.decode(d.token_ids) for d in draws]
    verdicts = [judge(text, questions[q]) for q, text in zip(owner, texts, strict=True)]
    common = {
        "tokens": torch.tensor([t for q, d in zip(owner, draws, strict=True) for t in prompts[q] + d.token_ids]).int(),
        "length": torch.tensor([len(prompts[q]) + len(d.token_ids) for q, d in zip(owner, draws, strict=True)]),
        "prompt_length": torch.tensor([len(prompts[q]) for q in owner]),
        "question": torch.tensor(owner) + begin,
        "outcome": torch.tensor([float("nan") if v is None else float(v) for v in verdicts]),
        "answer": torch.tensor(answer_numbers(owner, [model.answer(text) for text in texts])),
        "count": torch.tensor([d.count for d in draws]),
    }
    shift = torch.tensor([0, *map(len, found)]).cumsum(0).tolist()
    out = {}
    for name in views:
        parts = [(f, row + s, at) for (f, row, at), s in zip((k[name] for k in kept), shift, strict=False)]
        features, trajectory, position = (torch.cat(x) for x in zip(*parts, strict=True))
        out[name] = Rollouts(**common, features=features, trajectory=trajectory, position=position)
    return out


def recorded(
    path: Path, settings: dict[str, Any], make: Callable[[int], Iterator[dict[str, Rollouts]]]
) -> dict[str, Rollouts]:
    """All rollouts of ``make``, kept in directory ``path`` block by block, so that an interrupted run goes on there.

    Args:
        settings: what the rollouts depend on; kept beside them.
        make: yields the blocks from a given one on, one view beside the other.

    Raises:
        ValueError: ``path`` holds rollouts of other settings.
    """
    path = folder(path, "path")
    stamp, text = path / "settings.json", json_text(settings, sort_keys=True, indent=2)
    if stamp.is_file() and stamp.read_text() != text:
        raise ValueError(f"{path} holds rollouts made with other settings; choose another directory or remove it")
    stamp.write_text(text)
    blocks = sorted(block for block in path.iterdir() if block.is_dir() and block.name.isdecimal())
    parts = [{file.stem: Rollouts.load(file) for file in block.iterdir()} for block in blocks]
    for number, views in enumerate(make(len(parts)), len(parts)):
        unfinished = path / "unfinished"
        unfinished.mkdir(exist_ok=True)
        for name, rollouts in views.items():
            rollouts.save(unfinished / f"{name}.safetensors")
        unfinished.rename(path / f"{number:05d}")
        parts.append(views)
    return {name: Rollouts.join([part[name] for part in parts]) for name in parts[0]}
