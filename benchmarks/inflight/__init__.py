"""The same checks for anything that scores in a stream: who is right where.

    python -m reflective.benchmarks.inflight [--system NAME ...] [--case NAME ...] [--out benchmarks/results]

Every system decodes every case and scores what it decoded; the same tokens are then run through the model a second time, in float64, and each score
is compared. ``docs/inflight.md`` has the table, and an adapter of thirty lines for a system of yours.

``cases``: what must hold, and why people get it wrong. ``world``: a small random model, and the truth about any tokens. ``run``: what a system hands
over. ``system``: what an adapter is, and the verdict on it. ``hf``, ``vllm``, ``public``: adapters. ``table``: the results as a table.
"""

from .cases import CASES, NEEDS, Case, chosen
from .run import Run, Scored
from .system import System, Verdict, compare, judge
from .world import World

__all__ = ["CASES", "NEEDS", "Case", "Run", "Scored", "System", "Verdict", "World", "chosen", "compare", "judge"]
