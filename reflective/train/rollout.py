"""Rollouts to learn from: many answers to each question, judged, with the features that the decoder had at hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines.hf.backbone import Backbone
from ..engines.hf.ends import end_tokens
from ..engines.hf.finished import read_positions
from ..engines.hf.parts import check_steps, name_of
from ..model import ReflectiveModel
from ..scoring.steps import StepTokens
from ..scoring.taps import Tap
from ..search.strategies.votes import answer_numbers
from ..search.verify import Verifier, verifier
from ..tasks import Question
from ..utils.outputs import folder, json_text
from .data import Rollouts
from .sampler import Draw, Sampler

_PAPER = Tap()


@dataclass(frozen=True)
class View:
    """Which states stand for a response.

    Attributes:
        steps: its step-tokens; None: no steps, but one state, the last that was computed (an outcome head's). Of no account
            where the tap reads at every token.
        tap: of which layers, and at which tokens.
    """

    steps: StepTokens | None
    tap: Tap = _PAPER


@dataclass(frozen=True)
class _Reader:
    """A view of one model's draws."""

    backbone: Backbone
    steps: StepTokens | None

    @classmethod
    def of(cls, view: View, model: ReflectiveModel) -> "_Reader":
        backbone = Backbone.of(model.model, view.tap)
        every = view.tap.at == "every"
        steps = None if view.steps is None and not every else check_steps(backbone, view.steps)
        return cls(backbone, steps if steps is None else steps.to("cpu"))

    def __call__(self, layers: list[int], prompt: list[int], draws: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """``(features [M, K], draw [M], position [M])`` of one question's draws; ``layers``: of the states that were kept."""
        row, step, read = self._positions(prompt, draws)
        states = [draws[r].state(c - len(prompt)) for r, c in zip(row.tolist(), read.tolist(), strict=True)]
        kept = torch.stack(states) if states else draws[0].state(-1)[None][:0]  # [M, layers, H]
        places = self.backbone.places
        with torch.no_grad():
            features = places.join({i: kept[:, layers.index(i)] for i in places.points})
        return features[:, : len(places.points) * kept.shape[-1]].cpu(), row, step

    def _positions(self, prompt: list[int], draws: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """``(draw, step, read)`` [M], columns counted from the prompt's first token."""
        if self.steps is None:
            length = torch.tensor([len(d.token_ids) for d in draws])
            return torch.arange(len(draws)), len(prompt) + length - 1, len(prompt) + length - 2
        at, width = self.backbone.tap.at, max(len(d.token_ids) for d in draws)
        rows = [prompt + d.token_ids + [0] * (width - len(d.token_ids)) for d in draws]
        real = [[1] * (len(prompt) + len(d.token_ids)) + [0] * (width - len(d.token_ids)) for d in draws]
        found = read_positions(self.steps, torch.tensor(rows), torch.tensor(real), len(prompt), at)
        # A token that was generated last has no state of its own, as in a stream.
        known = found[2] < torch.tensor([len(prompt) + len(d.token_ids) - 1 for d in draws])[found[0]]
        return tuple(x[known] for x in found)


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
    tap: Tap | None = None,
    block: int = 256,
    first: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[Rollouts]:
    """Answer every question ``samples`` times; yields the rollouts of ``block`` questions at a time.

    Features are the states that the sampler kept while decoding: no forward is run for them. Every block is seeded by
    itself, so starting at block ``first`` yields what a whole run would from there.

    Args:
        verify: says whether a response is right, see ``verifier``.
        tap: where the model is read; None: where its head reads. Of several layers a head may learn from some alone, see
            ``Rollouts.read``.
        batch_rows: as for ``Sampler``.
        progress: called with the number of responses that have just been decoded.

    Raises:
        ValueError: bad settings, named; a model that the sampler cannot run.
    """
    views = {"steps": View(model.steps, tap or model.tap)}
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
    readers = {name: _Reader.of(view, model) for name, view in views.items()}
    layers = sorted({i for reader in readers.values() for i in reader.backbone.places.points})
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
                kept[q] = {name: read(layers, prompts[q], draws) for name, read in readers.items()}
                for draw in draws:
                    draw.forget()
                progress(samples)
            yield _judged(model, judge, part, begin, prompts, found, kept, views)
        else:
            progress(samples * len(part))


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
    for name, view in views.items():
        parts = [(f, row + s, at) for (f, row, at), s in zip((k[name] for k in kept), shift, strict=False)]
        features, trajectory, position = (torch.cat(x) for x in zip(*parts, strict=True))
        out[name] = Rollouts(
            **common, features=features, trajectory=trajectory, position=position, tap=view.tap, model=name_of(model.model)
        )
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
