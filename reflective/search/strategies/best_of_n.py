"""Best of N, the published selection."""

from dataclasses import dataclass
from typing import ClassVar

from . import Strategy


@dataclass
class BestOfN(Strategy):
    """Answer: ``argmax_i (prod_s score_is)^(1/steps_i)`` over n independent candidates, all decoded to their end.

    Source: Test-Time Scaling with Reflective Generative Model, arXiv 2507.01951, sections 3.3 and 4.1: best of 2, 8 or 32.
    """

    name: ClassVar[str] = "best_of_n"
    about: ClassVar[str] = "All run to their end; the highest score is the answer."
