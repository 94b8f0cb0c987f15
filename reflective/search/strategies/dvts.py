"""Diverse verifier tree search."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..stopped import STOPPED
from . import KEEP, STOP, Step
from .tree import TreeSearch


@dataclass
class DVTS(TreeSearch):
    """In each of ``n/width`` subtrees, after every step: ``beam <- argmax_children score``, continued ``width`` times.

    Subtrees never mix, which keeps the search diverse where a single beam would collapse. A subtree whose best child has
    finished is done; the best of all subtrees is the answer. Where ``width`` does not divide n, subtrees differ in size
    by one.

    Source: Beeching, Tunstall and Rush, Scaling test-time compute with open models (2024), huggingface/search-and-learn
    ``dvts``; compared at length by Liu et al., Can 1B LLM Surpass 405B LLM?, arXiv 2502.06703. Width 4, the last step's
    score, at most 40 rounds, after which the children decode to their ends. The source's results also list the siblings
    that lost the last round; they cannot be the answer, and here they are stopped.

    Attributes:
        width: M, continuations of a subtree's beam.
        rounds: of selection, at most.
    """

    name: ClassVar[str] = "dvts"
    about: ClassVar[str] = "After every step the best of each of several trees is kept and forked."
    stops: ClassVar[str] = STOPPED["dvts"]
    _tree: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # of every candidate, by its number

    def observe(self, step: Step) -> Sequence[int] | None:
        trees = max(1, self.n // self.width)
        members: dict[int, list[int]] = {}
        for i, c in enumerate(step.candidates):
            if c.number not in self._tree:
                self._tree[c.number] = c.number * trees // self.n if c.parent is None else self._tree[c.parent]
            members.setdefault(self._tree[c.number], []).append(i)
        if self.over():
            return None
        actions = [STOP] * len(step.candidates)
        for tree, children in members.items():
            best = max(children, key=lambda i: (self.standing(step.candidates[i]), -i))
            if not step.candidates[best].step_scores:  # all have finished without a step: nothing tells which to stop
                for i in children:
                    actions[i] = KEEP
                continue
            size = sum(number * trees // self.n == tree for number in range(self.n))
            actions[best] = KEEP if step.candidates[best].finished else size
        return actions
