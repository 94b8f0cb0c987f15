"""Where the steps of a text are, token by token, on the host: what the device's automaton does, without its states."""

import copy
from collections.abc import Iterable

from typing_extensions import Self

from ...kernels.layout import END, NEXT_STATE, STEP, THINK, counted_regions
from ...scoring.steps import StepTokens


class Walk:
    """
    Args:
        steps: of the model.
        prompt: none of whose steps count.

    Attributes:
        column: of the next token.
        found: ``(column, region)`` of every step so far, whether or not it counts.
    """

    def __init__(self, steps: StepTokens, prompt: Iterable[int]) -> None:
        self._classes, self._entries = steps.token_class.cpu().numpy(), steps.transition.cpu().numpy()
        self._state = self._think = self._end = self.column = 0
        self.found: list[tuple[int, int]] = []
        for token in prompt:
            self.feed(token)
        self.found.clear()

    def feed(self, token: int) -> None:
        entry = int(self._entries[self._classes[token], self._state])
        if entry & STEP and self.column >= 2:
            self.found.append((self.column, (self._think > 0) + 2 * (self._end > 0)))
        self._state = entry & NEXT_STATE
        self._think += bool(entry & THINK)
        self._end += bool(entry & END)
        self.column += 1

    def counted(self) -> list[int]:
        """Columns of the steps that count for the tags seen so far."""
        regions = counted_regions(self._think, self._end)
        return [column for column, region in self.found if region in regions]

    def copy(self) -> Self:
        other = copy.copy(self)
        other.found = list(self.found)
        return other
