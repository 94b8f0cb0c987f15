"""rf.score: scores of finished text, by the backbone up to the layer that the SPRM reads."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.utils.rnn import pad_sequence

from ...scoring.heads import Head
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
    head: Head,
    steps: StepTokens | None,
    input_ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    at: At | None = None,
    prompt_lengths: Tensor | Sequence[int] | int | None = None,
    *,
    backend: str | None = None,
    batch_tokens: int = 16_384,
    w1_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
) -> TrajectoryScores:
    """Score finished trajectories: the answer that ``StreamScorer`` gives while they are decoded.

    The backbone runs up to the deepest state that the head reads and stops: for the paper's no last layer, no logits, no other layer's
    states.

    Args:
        model, head, steps, at, backend, w1_dtype, process_group: as for ``StreamScorer``.
        input_ids: [B, T], [T] for one, or a list of B sequences of any lengths.
        attention_mask: [B, T], 0 at left or right padding. None: no padding.
        prompt_lengths: tokens of each prompt, padding not counted; only steps after it are scored. None: the whole text.
        batch_tokens: padded tokens a forward; rows are batched by length under this limit, one row at the least.

    Raises:
        ValueError: bad input, named.
    """
    backbone = Backbone.of(model, head.tap if at is None else replace(head.tap, at=at))
    at, steps = backbone.tap.at, check_parts(backbone, head, steps)
    placed = ShardedHead(head, backbone.device, backbone.dtype, backend, w1_dtype, process_group).load()

    if not isinstance(input_ids, Tensor):
        input_ids, attention_mask = _pad(input_ids, attention_mask)
    ids = input_ids.to(backbone.device)
    if ids.dim() == 1:
        ids = ids[None]
    mask = steps.mask(ids, attention_mask, prompt_lengths)  # [B, T]; checks the input
    pad, length = padding(attention_mask, ids.shape, backbone.device)

    log_scores = torch.zeros(ids.shape, dtype=torch.float32, device=backbone.device)
    for rows in batches_by_length((length - pad).tolist(), batch_tokens):
        if not mask[rows].any():
            continue
        # From the first token to the last state that is read; what follows it cannot change it.
        left, right = int(pad[rows].min()), int(mask[rows].any(0).nonzero()[-1]) + 1
        steps_here = mask[rows, left:right]
        column = torch.arange(left, right, device=backbone.device)
        real = (column >= pad[rows, None]) & (column < length[rows, None])
        row, step = steps_here.nonzero(as_tuple=True)  # [M]
        hidden = backbone.features(
            ids[rows, left:right], None if real.all() else real.long(), row, read_at(step, at)
        )  # [M, H]
        log_scores[torch.tensor(rows, device=ids.device)[row], left + step] = placed.score_rows(hidden)

    found = [log_scores[i][mask[i]] for i in range(len(ids))]
    return TrajectoryScores.collect(
        [float(f.double().sum()) for f in found],
        [len(f) for f in found],
        found,
        [m.nonzero().flatten() for m in mask],
        at,
        head.aggregation,
        head.sigmoid,
    )


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
        self, model: nn.Module, head: Head, steps: StepTokens | None, ids: Sequence[int], at: At | None = None,
        prompt_length: int = 0,
    ) -> None:  # fmt: skip
        self._backbone = Backbone.of(model, head.tap if at is None else replace(head.tap, at=at))
        self.at, self._head, steps = self._backbone.tap.at, head, check_parts(self._backbone, head, steps)
        self._placed = ShardedHead(head, self._backbone.device, self._backbone.dtype, None, None, None).load()
        self._ids = integers("ids", ids)[None].to(self._backbone.device)
        self._steps = steps.mask(self._ids, None, [prompt_length])[0].nonzero().flatten()  # [M]
        self._reads = read_at(self._steps, self.at)
        self._end = int(self._reads[-1]) + 1 if len(self._reads) else 0
        self._done, self._found, self._cache = 0, [torch.zeros(0, device=self._backbone.device)], new_cache()

    @property
    def left(self) -> int:
        return self._end - self._done

    def read(self, tokens: int) -> None:
        """Run so many further tokens at most."""
        begin, self._done = self._done, min(self._done + tokens, self._end)
        here = self._reads[(self._reads >= begin) & (self._reads < self._done)] - begin
        ids = self._ids[:, begin : self._done]
        hidden = self._backbone.features(ids, None, torch.zeros_like(here), here, self._cache)
        if len(here):
            self._found.append(self._placed.score_rows(hidden))
        if not self.left:
            self._cache = None

    def scores(self) -> TrajectoryScores:
        """What ``score`` gives, once nothing is left."""
        found = torch.cat(self._found)
        return TrajectoryScores.collect(
            [float(found.double().sum())], [len(found)], [found], [self._steps], self.at, self._head.aggregation,
            self._head.sigmoid,
        )  # fmt: skip


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
