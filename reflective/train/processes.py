"""The processes that train together, and their random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """Data parallel, each with a whole copy of what is trained; gradients are added up once a step.

    Args:
        accelerator: None for this process alone.
        device: of this process where there is no accelerator.

    Attributes:
        count, index: how many, and which of them this is.
        main: whether this is the one that writes and reports.
        device: where this one computes.

    Raises:
        ValueError: an accelerator that splits the model between processes.
    """

    def __init__(self, accelerator: "Accelerator | None", device: torch.device) -> None:
        self.count, self.index, self.main, self.device = 1, 0, True, device
        if accelerator is not None:
            kind = accelerator.distributed_type.value
            if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
                raise ValueError(f"accelerator: {kind} splits the model; this needs a whole one in every process")
            self.count, self.index = accelerator.num_processes, accelerator.process_index
            self.main, self.device = accelerator.is_main_process, accelerator.device

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count > 1:
            for work in [torch.distributed.all_reduce(t, async_op=True) for t in tensors]:
                work.wait()

    @contextmanager
    def seeded(self, *numbers: int) -> Iterator[None]:
        """Within, torch's generators start from ``numbers``; afterwards they are as they were."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(mix(*numbers))
            yield


def mix(*numbers: int) -> int:
    """One seed of several."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return seed
