"""rf.score: scores of finished text, by the backbone up to the layer that the SPRM reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self

from ...scoring.heads import Head, Heads, named, parts_of, together
from ...scoring.scores import TrajectoryScores
from ...scoring.sharded import ShardedHead
from ...scoring.steps import StepTokens, integers, padding
from ...scoring.taps import At
from ...utils.lengths import batches_by_length
from ..base import Score
from .backbone import Backbone
from .kv import new_cache
from .parts import check_parts


def score(
    model: nn.Module,
    head: Heads,
    steps: StepTokens | Mapping[str, StepTokens] | None,
    input_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    at: At | None = None,
    prompt_lengths: Tensor | Sequence[int] | int | None = None,
    *,
    backend: str | None = None,
    batch_tokens: int = 16_384,
    w1_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
) -> Any:
    """Score finished trajectories: the answer that ``StreamScorer`` gives while they are decoded.

    The backbone runs up to the deepest state that the head reads and stops: for the paper's no last layer, no logits, no other layer's
    states.

    Args:
        model, head, steps, at, backend, w1_dtype, process_group: as for ``StreamScorer``; several heads may have ``steps`` each, by their
            names.
        input_ids: [B, T], [T] for one, or a list of B sequences of any lengths.
        attention_mask: [B, T], 0 at left or right padding. None: no padding.
        prompt_lengths: tokens of each prompt, padding not counted; only steps after it are scored. None: the whole text.
        batch_tokens: padded tokens a forward; rows are batched by length under this limit, one row at the least.

    Returns:
        ``TrajectoryScores``; of several heads, given as a row or by names, those of each by its number or name. One forward serves all.

    Raises:
        ValueError: bad input, named.
    """
    several = isinstance(steps, Mapping)
    parts = [
        _Part.of(model, part, steps[name] if several else steps, at, backend, w1_dtype, process_group)
        for name, one in named(head).items()
        for part in one.parts().values()
    ]
    backbone = parts[0].backbone
    if not isinstance(input_ids, Tensor):
        input_ids, attention_mask = _pad(input_ids, attention_mask)
    ids = input_ids.to(backbone.device)
    if ids.dim() == 1:
        ids = ids[None]
    masks = [part.steps.mask(ids, attention_mask, prompt_lengths) for part in parts]  # [B, T] each; checks the input
    pad, length = padding(attention_mask, ids.shape, backbone.device)

    log_scores = [torch.zeros(ids.shape, dtype=torch.float32, device=backbone.device) for _ in parts]
    for rows in batches_by_length((length - pad).tolist(), batch_tokens):
        last = max(int(m[rows].any(0).nonzero()[-1]) if m[rows].any() else -1 for m in masks)
        if last < 0:
            continue
        # From the first token to the last state that is read; what follows it cannot change it.
        left, right = int(pad[rows].min()), last + 1
        column = torch.arange(left, right, device=backbone.device)
        real = (column >= pad[rows, None]) & (column < length[rows, None])
        found = [m[rows, left:right].nonzero(as_tuple=True) for m in masks]  # row and step [M] each
        features = backbone.features_at(
            [part.backbone.places for part in parts], ids[rows, left:right], None if real.all() else real.long(),
            [(row, read_at(step, part.at)) for part, (row, step) in zip(parts, found, strict=True)],
        )  # [M, K] each  # fmt: skip
        index = torch.tensor(rows, device=ids.device)
        for part, scores, (row, step), rows_of in zip(parts, log_scores, found, features, strict=True):
            scores[index[row], left + step] = part.placed.score_rows(rows_of)

    return together(head, [
        part.collect([s[m] for s, m in zip(scores, mask, strict=True)], [m.nonzero().flatten() for m in mask])
        for part, scores, mask in zip(parts, log_scores, masks, strict=True)
    ])  # fmt: skip


@dataclass
class _Part:
    """A head of one logit, ready to be run on what a backbone gives it."""

    backbone: Backbone
    head: Head
    steps: StepTokens
    placed: ShardedHead

    @classmethod
    def of(
        cls, model: nn.Module, head: Head, steps: StepTokens | None, at: At | None, backend: str | None = None,
        w1_dtype: torch.dtype | None = None, group: ProcessGroup | None = None,
    ) -> Self:  # fmt: skip
        backbone = Backbone.of(model, head.tap if at is None else replace(head.tap, at=at))
        steps = check_parts(backbone, head, steps)
        return cls(
            backbone, head, steps, ShardedHead(head, backbone.device, backbone.dtype, backend, w1_dtype, group).load()
        )

    @property
    def at(self) -> At:
        return self.backbone.tap.at

    def collect(self, found: list[Tensor], columns: list[Tensor]) -> TrajectoryScores:
        """From the log-scores and columns of every trajectory's steps."""
        return TrajectoryScores.collect(
            [float(f.double().sum()) for f in found], [len(f) for f in found], found, columns, self.at, self.head.aggregation,
            self.head.sigmoid, self.head.higher_is_better,
        )  # fmt: skip


class Reading:
    """``score`` of one text, a piece at a time: for who has other things to do between two forwards.

    Args:
        model, head, steps, at: as for ``score``; a model whose cache is ``kv.check_rows_apart``'s.
        ids: of the whole text, prompt included.
        prompt_length: as for ``score``.

    Attributes:
        left: tokens that are still to be run; those behind the last step never are.
    """

    def __init__(
        self, model: nn.Module, head: Heads, steps: StepTokens | None, ids: Sequence[int], at: At | None = None,
        prompt_length: int = 0,
    ) -> None:  # fmt: skip
        self._head, self._parts = head, [_Part.of(model, part, steps, at) for part in parts_of(head)]
        self._ids = integers("ids", ids)[None].to(self._parts[0].backbone.device)
        self._steps = [p.steps.mask(self._ids, None, [prompt_length])[0].nonzero().flatten() for p in self._parts]  # [M] each
        self._reads = [read_at(steps, p.at) for steps, p in zip(self._steps, self._parts, strict=True)]
        self._end = max(int(reads[-1]) + 1 if len(reads) else 0 for reads in self._reads)
        self._found = [[torch.zeros(0, device=self._ids.device)] for _ in self._parts]
        self._done, self._cache = 0, new_cache()

    @property
    def left(self) -> int:
        return self._end - self._done

    def read(self, tokens: int) -> None:
        """Run so many further tokens at most."""
        begin, self._done = self._done, min(self._done + tokens, self._end)
        here = [reads[(reads >= begin) & (reads < self._done)] - begin for reads in self._reads]
        features = self._parts[0].backbone.features_at(
            [part.backbone.places for part in self._parts], self._ids[:, begin : self._done], None,
            [(torch.zeros_like(columns), columns) for columns in here], self._cache,
        )  # fmt: skip
        for part, found, rows in zip(self._parts, self._found, features, strict=True):
            if len(rows):
                found.append(part.placed.score_rows(rows))
        if not self.left:
            self._cache = None

    def scores(self) -> TrajectoryScores:
        """What ``score`` gives, once nothing is left."""
        return together(self._head, [
            part.collect([torch.cat(found)], [steps])
            for part, found, steps in zip(self._parts, self._found, self._steps, strict=True)
        ])  # fmt: skip


def of_text(scores: TrajectoryScores, i: int, prompt_length: int) -> Score:
    """Of trajectory ``i``, whose prompt has ``prompt_length`` columns, padding included."""
    positions = scores.step_positions[i] - prompt_length
    return Score(float(scores.score[i]), scores.step_scores[i].tolist(), positions.tolist(), scores.errors.get(i))


def read_at(step: Tensor, at: At) -> Tensor:
    """Column of the state that stands for the step whose step-token is at column ``step``."""
    return step - int(at == "predict")


def read_positions(
    steps: StepTokens,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    prompt_lengths: Tensor | Sequence[int] | int | None,
    at: At,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(row, step, read)``, int64 [M] each: of every step that counts in [B, T], row by row, its step-token's column and
    the column of the state that the head reads: those of ``score``, for training.

    Raises:
        ValueError: see ``StepTokens.mask``.
    """
    row, step = steps.mask(input_ids, attention_mask, prompt_lengths).nonzero(as_tuple=True)
    return row, step, read_at(step, at)


def _pad(sequences: Sequence, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A list of sequences as right-padded ids [B, T] and their mask."""
    if attention_mask is not None:
        raise ValueError("attention_mask: leave it out when input_ids is a list; each sequence has its own length")
    rows = [integers(f"input_ids[{i}]", s) for i, s in enumerate(sequences)]
    if not rows or any(r.dim() != 1 or not len(r) for r in rows):
        raise ValueError("input_ids: expected at least one sequence, each a flat list of at least one token id")
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask
