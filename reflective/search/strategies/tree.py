"""What strategies that keep and fork the best after every step have in common."""

from dataclasses import dataclass, field

from . import Strategy


@dataclass
class TreeSearch(Strategy):
    """Attributes:
    width: M, continuations of a beam that is kept.
    rounds: of selection, at most.
    """

    by_step: bool = True
    aggregation: str = "last"
    width: int = 4
    rounds: int = 40
    _round: int = field(default=0, init=False, repr=False)

    def over(self) -> bool:
        """Begin a round; whether it is one too many."""
        self._round += 1
        return self._round > self.rounds
