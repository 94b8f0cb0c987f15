"""What beam search leaves behind: the steps of hypotheses that ended and whose rows others have taken over."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels import layout
from ...scoring.state import SequenceTally, StreamState, hash_prefixes


@dataclass
class Lineage:
    """A record for each time that the rows were reordered, as small tensors on the model's device, read once at the end.

    A hypothesis is a record and a row of it; its steps lie on the way from there to the first record, by parents.
    """

    seen: list[int] = field(default_factory=list)  # tokens consumed by then
    parents: list[Tensor] = field(default_factory=list)  # [B], row i goes on from what was row parents[i]
    seq: list[Tensor] = field(default_factory=list)  # [B, SEQ_FIELDS] before the reordering
    last_step: list[Tensor] = field(default_factory=list)  # [B, 3] float64: column, region and log-score of the newest
    first: StreamState | None = None  # the rows at the first record
    latest: StreamState | None = None  # and at the last

    def record(self, state: StreamState, seen: int, parents: Tensor) -> None:
        """Before the rows of ``state``, nothing of which waits in the buffer, are reordered."""
        B = len(parents)
        self.latest = state.take(list(range(B)), columns=seen + 1)  # a step is logged for each token at most
        self.first = self.first or self.latest
        row = torch.arange(B, device=parents.device)
        newest = (state.seq[:B, layout.N_STEPS] - 1).clamp(0, state.step_column.shape[1] - 1)
        logs = state.step_column, state.step_region, state.step_score
        self.seen.append(seen)
        self.parents.append(parents.clone())
        self.seq.append(state.seq[:B].clone())
        self.last_step.append(torch.stack([log[row, newest].double() for log in logs], 1))

    def find(self, ids: Tensor) -> list[tuple[int, int] | None]:
        """For each row of ``ids`` [M, T] the record and row that consumed its longest beginning."""
        prefixes = hash_prefixes(ids)  # [M, T]
        consumed = torch.tensor(self.seen, device=ids.device) - 1
        known = consumed + 1 < ids.shape[1]  # the token that ended it was not consumed
        hashes = torch.stack(self.seq)[:, :, layout.HASH]  # [records, B]
        same = prefixes[:, consumed.clamp_max(ids.shape[1] - 1)][:, :, None] == hashes[None]  # [M, records, B]
        same &= known[None, :, None]
        found: list[tuple[int, int] | None] = []
        for match in same.cpu():
            record, row = match.nonzero().unbind(1)
            found.append((int(record[-1]), int(row[-1])) if len(record) else None)
        return found

    def tally(self, record: int, row: int) -> SequenceTally:
        """The steps of the hypothesis that was ``row`` before ``record``."""
        parents, seq = torch.stack(self.parents).tolist(), torch.stack(self.seq).tolist()
        last_step = torch.stack(self.last_step).tolist()
        regions = layout.counted_regions(seq[record][row][layout.N_THINK], seq[record][row][layout.N_END])
        steps: list[tuple[float, float, float]] = []
        for k in range(record, 0, -1):
            parent = parents[k - 1][row]
            if seq[k][row][layout.N_STEPS] > seq[k - 1][parent][layout.N_STEPS]:
                steps.append(last_step[k][row])
            row = parent
        n = min(seq[0][row][layout.N_STEPS], self.first.step_column.shape[1])
        logs = self.first.step_column, self.first.step_region, self.first.step_score
        steps = [*zip(*(log[row, :n].tolist() for log in logs), strict=True), *steps[::-1]]
        counted = [(column, score) for column, region, score in steps if region in regions]
        return SequenceTally(
            n_steps=len(counted),
            log_sum=sum(score for _, score in counted),
            columns=torch.tensor([int(column) for column, _ in counted], dtype=torch.int64),
            log_scores=torch.tensor([score for _, score in counted], dtype=torch.float32),
        )
