"""How much may be run beside those that decode, before they notice."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Pace:
    """How many tokens may be run between two forwards of those that decode: about as many as take ``seconds``.

    Learnt from what was run, as neither model nor machine is known; at least 64, for which a forward that reads all weights is
    worth it, and never more than twice as many as ever before.

    Args:
        most: tokens, at any time.
        device: on which they run.
    """

    LEAST = 64

    def __init__(self, most: int, device: torch.device, seconds: float = 0.2) -> None:
        self.most, self.device, self.seconds = max(most, self.LEAST), device, seconds
        self._rate, self._tried = 0.0, self.LEAST // 2

    def tokens(self) -> int:
        return max(self.LEAST, min(self.most, 2 * self._tried, int(self._rate * self.seconds)))

    @contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        """Within, so many are run."""
        began = time.perf_counter()
        yield
        if tokens >= self.LEAST:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            self._rate = tokens / max(1e-6, time.perf_counter() - began)
            self._tried = max(self._tried, tokens)
