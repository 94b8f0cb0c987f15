"""The per-sequence state of a decode stream. The kernels and this class know its fields; nothing else does."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import layout


@dataclass
class StreamState:
    """One structure of arrays on the model's device, allocated once. Shapes: ``reflective.kernels.decode_step``."""

    seq: Tensor  # [N, SEQ_FIELDS] int64
    tally: Tensor  # [N, N_REGIONS, TALLY_FIELDS] float64
    last_hidden: Tensor  # [N, 2, H]
    step_column: Tensor  # [N, C] int32
    step_region: Tensor  # [N, C] int8
    step_score: Tensor  # [N, C] float32, natural log
    slots: Tensor  # [R, H]
    slot_owner: Tensor  # [R, OWNER_FIELDS] int32
    n_slots: Tensor  # [1] int32
    workspace: Tensor  # [layout.workspace_size(R + N, K)] float32

    @classmethod
    def allocate(
        cls, n: int, hidden_size: int, units: int, *, buffer_rows: int, max_steps: int, dtype: torch.dtype,
        device: torch.device,
    ) -> "StreamState":  # fmt: skip
        """State for ``n`` sequences, a head of ``units`` units, ``buffer_rows`` waiting rows and ``max_steps`` logged steps a
        sequence.

        At H = 5120 in bf16, 32 sequences, 256 rows and 16,384 steps this is 8.7 MB.
        """

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            # Decoding may run in inference mode once and outside it the next time; plain tensors serve both.
            with torch.inference_mode(False):
                tensor = torch.zeros(shape, dtype=dtype, device=device)
            return static(tensor)

        return cls(
            seq=zeros(n, layout.SEQ_FIELDS, dtype=torch.int64),
            tally=zeros(n, layout.N_REGIONS, layout.TALLY_FIELDS, dtype=torch.float64),
            last_hidden=zeros(n, 2, hidden_size, dtype=dtype),
            step_column=zeros(n, max_steps, dtype=torch.int32),
            step_region=zeros(n, max_steps, dtype=torch.int8),
            step_score=zeros(n, max_steps, dtype=torch.float32),
            slots=zeros(buffer_rows, hidden_size, dtype=dtype),
            slot_owner=zeros(buffer_rows, layout.OWNER_FIELDS, dtype=torch.int32),
            n_slots=zeros(1, dtype=torch.int32),
            workspace=zeros(layout.workspace_size(buffer_rows + n, units), dtype=torch.float32),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in the order in which ``decode_step`` takes them."""
        # Field by field: torch 2.11 cannot trace vars().
        return (
            self.seq, self.tally, self.last_hidden, self.step_column, self.step_region, self.step_score, self.slots,
            self.slot_owner, self.n_slots, self.workspace,
        )  # fmt: skip

    def buffer(self) -> tuple[Tensor, ...]:
        """The fields in the order in which ``flush`` takes them."""
        return self.tally, self.step_score, self.slots, self.slot_owner, self.n_slots, self.workspace

    def take(self, rows: list[int], columns: int | None = None) -> "StreamState":
        """A copy of some sequences, with the first ``columns`` places of their step logs. Nothing may wait in the buffer."""
        index = torch.tensor(rows, device=self.seq.device)
        slots = self.slots.new_zeros(max(1, len(rows)), self.slots.shape[1])
        return StreamState(
            *(t[index] for t in (self.seq, self.tally, self.last_hidden)),
            *(t[index, :columns] for t in (self.step_column, self.step_region, self.step_score)),
            slots,
            self.slot_owner.new_zeros(len(slots), layout.OWNER_FIELDS),
            torch.zeros_like(self.n_slots),
            torch.zeros_like(self.workspace),
        )

    def put(self, target: Tensor, source: Tensor, columns: int | None = None) -> None:
        """Have rows ``target`` go on from rows ``source``, of which no more than ``columns`` steps are logged. Nothing may wait
        in the buffer."""
        for t in (self.seq, self.tally, self.last_hidden):
            t[target] = t[source]
        for t in (self.step_column, self.step_region, self.step_score):
            t[target, :columns] = t[source, :columns]

    def grown(self, n: int, units: int) -> "StreamState":
        """This state with room for ``n`` sequences; itself if it has it."""
        if n <= len(self.seq):
            return self
        more = StreamState.allocate(
            n, self.slots.shape[1], units, buffer_rows=max(len(self.slots), n), max_steps=self.step_column.shape[1],
            dtype=self.slots.dtype, device=self.slots.device,
        )  # fmt: skip
        for old, new in zip(self.tensors()[:-1], more.tensors()[:-1], strict=True):  # the workspace holds nothing
            new[: len(old)] = old
        return more

    def snapshot(self) -> tuple[Tensor, ...]:
        """What ``restore`` needs to undo a forward that begins with an empty buffer."""
        return tuple(t.clone() for t in (self.seq, self.tally, self.last_hidden))

    def restore(self, snapshot: tuple[Tensor, ...]) -> None:
        """Undo everything since ``snapshot``."""
        for t, old in zip((self.seq, self.tally, self.last_hidden), snapshot, strict=True):
            t.copy_(old)
        self.n_slots.zero_()

    def reset(self, pad: Tensor, start: Tensor) -> None:
        """Start ``len(pad)`` new sequences: ``pad`` columns of left padding, steps in scope from column ``start``."""
        self.seq.zero_()
        self.seq[: len(pad), layout.PAD] = pad
        self.seq[: len(pad), layout.START] = start
        self.tally.zero_()
        self.n_slots.zero_()

    def restart(self, rows: Tensor, pad: Tensor, start: int | Tensor) -> None:
        """The same for the sequences ``rows`` alone. Nothing of theirs may wait in the buffer."""
        self.seq[rows] = 0
        self.seq[rows, layout.PAD] = pad
        self.seq[rows, layout.START] = start
        self.tally[rows] = 0

    def silence(self) -> None:
        """Count tags and hash ids from here on, but no more steps."""
        self.seq[:, layout.START] = torch.iinfo(torch.int64).max

    def hashes(self) -> Tensor:
        """Per sequence, the running hash of the ids consumed; compare with ``hash_ids``."""
        return self.seq[:, layout.HASH]

    def seen(self) -> Tensor:
        """Per sequence, the tokens consumed, left padding included."""
        return self.seq[:, layout.SEEN]

    def totals(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(count, log_sum)``, int64 and float64 [len(rows)]: of the scored steps that count for the tags seen so far. The host does not
        wait for the device."""
        tally, counted = self.tally[rows], _counted(self.seq[rows])
        return (tally[..., layout.COUNT] * counted).sum(1).long(), tally[..., layout.LOG_SUM].where(counted, 0).sum(1)

    def counts(self) -> list[int]:
        """Of every sequence, how many scored steps count for the tags seen so far. One read of the device."""
        return (self.tally[:, :, layout.COUNT] * _counted(self.seq)).sum(1).int().tolist()

    def counted(self, rows: Tensor) -> Tensor:
        """Of the sequences ``rows`` [n], how many scored steps count for the tags seen so far: [n] int64, on the device. What a row
        less than 0 has is of no meaning."""
        rows = rows.long()
        return (self.tally[rows, :, layout.COUNT] * _counted(self.seq[rows])).sum(1).long()

    def newest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the sequences ``rows`` [n], the log-score of the step that ended last, [n] float32, and a number for the tags seen so far, [n]
        int64, -1 where no such step is in the log; on the device. As for ``counted``, a row less than 0 has what is of no meaning."""
        rows = rows.long()
        seq = self.seq[rows]
        n, tags = seq[:, layout.N_STEPS], seq[:, layout.N_THINK].clamp_max(2) * 3 + seq[:, layout.N_END].clamp_max(2)
        logged = n <= self.step_score.shape[1]
        return self.step_score[rows, (n - 1).clamp(0, self.step_score.shape[1] - 1)], tags.where(logged, -1)

    def sequences(self, rows: Sequence[int]) -> list["SequenceTally"]:
        """What each of the sequences ``rows`` has by now, of the regions that count for the tags seen so far.

        A handful of device reads for all of them: three for each would be 3 ms of a GPU's time for 64.
        """
        at = torch.as_tensor(rows, dtype=torch.int64, device=self.seq.device)
        seq, tally = self.seq[at], self.tally[at]
        counts = _counted(seq)
        n_steps, n_logged = (tally[..., layout.COUNT] * counts).sum(1).long(), seq[:, layout.N_STEPS]
        # Summed on the host, in the order of the regions; a region without a step has no sum.
        log_sums = [
            sum(t[layout.LOG_SUM] for t, counted in zip(regions, which, strict=True) if counted and t[layout.COUNT])
            for regions, which in zip(tally.tolist(), counts.tolist(), strict=True)
        ]
        logged = self.step_column[at, : max(n_logged.tolist(), default=0)]
        keep = torch.arange(logged.shape[1], device=at.device) < n_logged[:, None]
        keep &= counts.gather(1, self.step_region[at, : logged.shape[1]].long() * keep)
        kept = keep.sum(1).tolist()
        columns = logged[keep].long().split(kept)
        log_scores = self.step_score[at, : logged.shape[1]][keep].split(kept)
        return [SequenceTally(*of) for of in zip(n_steps.tolist(), log_sums, columns, log_scores, strict=True)]

    def counted_order(self, owners: Tensor) -> Tensor:
        """Which rows of ``owners`` [M, OWNER_FIELDS] are of steps that count, ordered by sequence, then by step."""
        sequence, step, region = owners.long().unbind(1)
        counted = _counted(self.seq)
        order = (sequence << 32 | step).argsort()
        return order[counted[sequence, region][order]]


# Which regions count, by the number of tags seen of either kind (two stands for more): [3, 3, N_REGIONS].
_COUNTED = torch.tensor(
    [[[r in layout.counted_regions(a, b) for r in range(layout.N_REGIONS)] for b in range(3)] for a in range(3)]
)


def _counted(seq: Tensor) -> Tensor:
    """[n, N_REGIONS]: which regions count for the tags that each of ``seq`` [n, SEQ_FIELDS] has seen."""
    return _counted_on(seq.device)[seq[:, layout.N_THINK].clamp_max(2), seq[:, layout.N_END].clamp_max(2)]


@functools.cache
def _counted_on(device: torch.device) -> Tensor:
    """Copied once, as nothing may be while a CUDA graph is captured."""
    return _COUNTED.to(device)


def static(tensor: Tensor) -> Tensor:
    """``tensor``, of which a CUDA graph of a compiled forward takes no copy: it is written in place, or too large to copy."""
    if tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


@dataclass
class SequenceTally:
    """Steps of one sequence that count: how many, the sum of their log-scores, and (up to the log's capacity) each one."""

    n_steps: int
    log_sum: float
    columns: Tensor
    log_scores: Tensor


def hash_ids(ids: Tensor) -> Tensor:
    """The hash that a stream of ``ids`` [B, T] leaves behind: ``sum_t (id_t + 1) * factor**(T-1-t)`` modulo 2**64."""
    powers = torch.full(ids.shape[1:], layout.HASH_FACTOR, dtype=torch.int64, device=ids.device)
    powers[:1] = 1
    return ((ids + 1) * powers.cumprod(0).flip(0)).sum(1)


def hash_prefixes(ids: Tensor) -> Tensor:
    """[B, T]: ``hash_ids`` of every beginning, ``ids[:, : t + 1]`` at ``t``."""
    hashes, hash_ = [], torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    for column in (ids + 1).unbind(1):
        hash_ = hash_ * layout.HASH_FACTOR + column
        hashes.append(hash_)
    return torch.stack(hashes, 1)
