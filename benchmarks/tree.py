"""An engine for comparing strategies: what sequences have in common is decoded once, whichever of them, and whichever run, comes to it first.

Strategies that are compared decode much the same: all begin with the same candidates, and forks of a candidate that is probably right mostly agree.
The tokens that a strategy is charged with are counted by the search, as ever; what is spared is the machine's time.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from reflective.engines.base import Appended, Chance, Ended, Event, Opened, Prompt, Sampling, Score, Stepped
from reflective.engines.hf.backbone import Backbone
from reflective.engines.hf.ends import end_tokens
from reflective.model import ReflectiveModel
from reflective.scoring.sprm import SPRM
from reflective.train.sampler import RowCache, Sampler

_PIECE = 32  # rows whose distributions are made at a time: their float32 logits stay in cache
_NARROW = 12.0  # natural logarithms: tokens this much less likely than the likeliest are never within a nucleus that is used here


@dataclass(eq=False, slots=True)
class _Node:
    """A token behind those of its parents; the root is a whole prompt.

    Attributes:
        prompt: ids, of a root; length: tokens from the prompt's first to this.
        ids: that may come next, ascending; upto: the distribution function there; log_probs: at temperature 1. None: not known yet.
        state: [layers, H], what was computed from this token.
        steps: which tokens of the text up to here are step-tokens that count, by their places behind the prompt; None: not known yet.
    """

    parent: "_Node | None"
    token: int
    length: int
    prompt: list[int] | None = None
    ids: list[int] | None = None
    upto: list[float] | None = None
    log_probs: list[float] | None = None
    state: Tensor | None = None
    steps: tuple[int, ...] | None = None
    children: dict[int, "_Node"] = field(default_factory=dict)

    def child(self, token: int) -> "_Node":
        found = self.children.get(token)
        if found is None:
            found = self.children[token] = _Node(self, token, self.length + 1)
        return found

    def path(self) -> list[int]:
        """All tokens, the prompt's first."""
        behind, node = [], self
        while node.prompt is None:
            behind.append(node.token)
            node = node.parent
        return node.prompt + behind[::-1]


@dataclass(eq=False)
class _Row:
    """Keys and values of all tokens up to ``node``, of which ``fed`` are in the cache."""

    node: _Node
    fed: int = 0


@dataclass(eq=False)
class _Sequence:
    number: int
    prefix: int
    sampling: Sampling
    node: _Node  # its newest token, or the prompt
    nodes: list[_Node] = field(default_factory=list)  # of all its tokens
    forced: list[int] = field(default_factory=list)
    places: tuple[int, ...] = ()  # of its steps
    scores: list[float] = field(default_factory=list)
    resting: bool = False

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.sampling.seed)
        self.uniforms: Iterator[float] = itertools.chain.from_iterable(random.random(64).tolist() for _ in itertools.count())

    def score(self) -> Score:
        mean = math.exp(sum(math.log(max(s, 1e-10)) for s in self.scores) / len(self.scores)) if self.scores else 0.0
        return Score(mean, list(self.scores), list(self.places))


class TreeEngine:
    """
    Args:
        model: its sampling is everybody's: ``temperature`` and ``top_p``, and no other setting.
        places: sequences that go at once; the others wait.

    Attributes:
        head: whose scores are told; another may be put in its place between runs, if it reads where the first does.
        fed: tokens that the model was fed.
    """

    how = "tree"
    scoring_seconds = 0.0

    def __init__(self, model: ReflectiveModel, *, temperature: float, top_p: float = 1.0, places: int = 1024) -> None:
        if model.tap.at != "predict":
            raise ValueError(f"model: its head reads at {model.tap.at!r}; the tree keeps scores of heads that read where a step-token is predicted")
        self.model, self.temperature, self.top_p, self.places = model, temperature, top_p, places
        self.head: SPRM = model.head
        self.ends = end_tokens(model.model, model.tokenizer)
        self._read = Backbone.of(model.model, model.tap).places
        self._feeder = Sampler(model.model, model.tokenizer, ends=self.ends, layers=sorted(self._read.points))
        self._roots: dict[tuple[int, ...], _Node] = {}
        self._scores: dict[tuple[SPRM, _Node], float] = {}
        self._rows: list[_Row] = []
        self._cache = RowCache([])
        self._prefixes: dict[int, tuple[Prompt, _Node]] = {}
        self._unopened: list[int] = []
        self._sequences: dict[int, _Sequence] = {}
        self._numbers = itertools.count()

    def forget(self) -> None:
        """Let go of all that was decoded."""
        self._roots, self._scores, self._rows, self._cache = {}, {}, [], RowCache([])

    @property
    def fed(self) -> int:
        return self._feeder.tokens

    # -- the engine's calls, as ``engines/base.py`` has them ------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def room(self) -> int:
        return self.places - sum(not s.resting for s in self._sequences.values())

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        new = [next(self._numbers) for _ in prompts]
        for number, prompt in zip(new, prompts, strict=True):
            ids = list(prompt.ids)
            root = self._roots.setdefault(tuple(ids), _Node(None, ids[-1], len(ids), ids))
            self._prefixes[number] = prompt, root
        self._unopened += new
        return new

    def start(self, prefix: int, samplings: Sequence[Sampling]) -> list[int]:
        return self._add(_Sequence(next(self._numbers), prefix, s, self._prefixes[prefix][1]) for s in samplings)

    def fork(self, sequence: int, samplings: Sequence[Sampling]) -> list[int]:
        s = self._sequences[sequence]
        return self._add(
            _Sequence(
                next(self._numbers), s.prefix, sampling, s.node, list(s.nodes), list(s.forced), s.places, list(s.scores)
            )
            for sampling in samplings
        )

    def stop(self, sequences: Sequence[int]) -> list[Score]:
        return [self._sequences.pop(number).score() for number in sequences]

    def rest(self, sequences: Sequence[int]) -> None:
        for number in sequences:
            self._sequences[number].resting = True

    def resume(self, sequences: Sequence[int]) -> None:
        for number in sequences:
            self._sequences[number].resting = False

    def force(self, sequence: int, tokens: Sequence[int]) -> None:
        self._sequences[sequence].forced = list(tokens)

    def close(self, prefixes: Sequence[int]) -> None:
        gone = set(prefixes)
        for number in gone:
            del self._prefixes[number]
        self._unopened = [number for number in self._unopened if number not in gone]
        self._sequences = {number: s for number, s in self._sequences.items() if s.prefix not in gone}

    def advance(self, **how: Any) -> list[Event] | None:
        if self._unopened:
            opened, self._unopened = self._unopened, []
            return [Opened(prefix, []) for prefix in opened]
        going = list(itertools.islice((s for s in self._sequences.values() if not s.resting), self.places))
        if not going:
            return None
        self._know({s.node for s in going if s.node.ids is None})
        drawn = [(s, *self._draw(s)) for s in going]
        self._score([s for s, _, ended in drawn if not ended])
        return [event for s, chance, ended in drawn for event in self._tell(s, chance, ended)]

    # -- what a token takes ---------------------------------------------------------------------------------------------

    def _draw(self, s: _Sequence) -> tuple[Chance, bool]:
        """The next token of ``s``, to which it moves unless that ends it."""
        node, uniform = s.node, next(s.uniforms)
        if s.forced:
            chance = Chance(s.forced.pop(0), 0.0, [])  # nobody had a choice
        else:
            at = min(bisect_right(node.upto, uniform * node.upto[-1]), len(node.ids) - 1)
            chance = Chance(node.ids[at], node.log_probs[at], [])
        if chance.token in self.ends:
            return chance, True
        s.node = node.child(chance.token)
        s.nodes.append(s.node)
        return chance, False

    def _tell(self, s: _Sequence, chance: Chance, ended: bool) -> Iterator[Event]:
        if ended:
            del self._sequences[s.number]
            yield Ended(s.number, "stop", chance, s.score())
            return
        yield Appended(s.number, chance)
        told, s.places = s.places, s.node.steps
        if told != s.places:
            s.scores = [self._scores[self.head, s.nodes[place]] for place in s.places]
        if len(s.nodes) >= s.sampling.max_tokens:
            del self._sequences[s.number]
            yield Ended(s.number, "length", None, s.score())
        elif told != s.places and self._prefixes[s.prefix][0].steps != "untold":
            yield Stepped(s.number, list(s.scores), ended=s.places[-1:] == (len(s.nodes) - 1,))

    def _score(self, sequences: list[_Sequence]) -> None:
        """Learn which of the tokens of ``sequences`` end a step that counts, and the scores of those."""
        unknown = {s.node: len(s.nodes) for s in sequences if s.node.steps is None}
        if unknown:
            paths, width = [node.path() for node in unknown], max(node.length for node in unknown)
            ids = torch.tensor([p + [0] * (width - len(p)) for p in paths])
            real = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in paths])
            prompts = [node.length - behind for node, behind in unknown.items()]
            found = self.model.steps.mask(ids, real, prompt_lengths=prompts).nonzero().tolist()
            places: list[list[int]] = [[] for _ in paths]
            for row, column in found:
                places[row].append(column - prompts[row])
            for node, own in zip(unknown, places, strict=True):
                before = node.parent.steps  # one and the same for all within a step
                node.steps = before if before == tuple(own) else tuple(own)
        steps = {s.nodes[place]: None for s in sequences if s.places != s.node.steps for place in s.node.steps}
        new = [node for node in steps if (self.head, node) not in self._scores]
        if new:
            states, layers = torch.stack([node.parent.state for node in new]), self._feeder.layers  # [M, layers, H]
            with torch.no_grad():
                features = self._read.join({i: states[:, layers.index(i)] for i in self._read.points})
                scores = self.head(features[:, : self.head.hidden_size].to(self.head.dtype)).float().sigmoid()
            self._scores |= {(self.head, node): score for node, score in zip(new, scores.flatten().tolist(), strict=True)}

    def _know(self, nodes: set[_Node]) -> None:
        """Feed ``nodes``, and keep what may come behind each."""
        slots = {row.node: i for i, row in enumerate(self._rows)}
        wanted = {s.node for s in self._sequences.values()}
        # Who rests keeps its row, and is fed its last token anew: slots that are fed must lie side by side.
        if not nodes:
            return
        heirs = [(_Row(row.node, row.fed - 1), i) for i, row in enumerate(self._rows) if row.node in wanted]
        heirs += [(_Row(node, node.length - 1), slots[node.parent]) for node in nodes if node.parent in slots]
        self._rows = self._cache.arrange(heirs) if heirs else []
        if self._rows:
            self._feed(self._rows, 0)
        known = {row.node for row in self._rows}
        self._feed([_Row(node) for node in nodes if node not in known], len(self._rows))

    def _feed(self, rows: list[_Row], first: int) -> None:
        """Feed ``rows``, which lie in the slots from ``first`` on, all that is missing."""
        self._rows = self._rows[:first] + rows
        if not rows:
            return
        feed = [row.node.path()[row.fed :] for row in rows]
        logits, states = self._feeder.feed(feed, self._rows, first, 0, self._cache)
        for i in range(0, len(rows), _PIECE):
            for row, kept in zip(rows[i : i + _PIECE], self._kept(logits[i : i + _PIECE]), strict=True):
                row.node.ids, row.node.upto, row.node.log_probs = kept
        for row, state in zip(rows, states, strict=True):
            row.node.state = state

    def _kept(self, logits: Tensor) -> Iterable[tuple[list[int], list[float], list[float]]]:
        """Of each row of ``logits`` the tokens within the nucleus, their distribution function and log-probabilities."""
        logits = logits.float()
        total = logits.logsumexp(-1)
        warm = logits if self.temperature == 1 else logits / self.temperature
        all_of_it = total if self.temperature == 1 else warm.logsumexp(-1)
        row, column = (warm >= warm.amax(-1, keepdim=True) - _NARROW).nonzero(as_tuple=True)
        each = torch.bincount(row, minlength=len(logits)).tolist()
        mass = (warm[row, column].double() - all_of_it[row]).exp().numpy()
        log_prob, ids = (logits[row, column] - total[row]).numpy(), column.numpy()
        begin = 0
        for n in each:
            own = slice(begin, begin + n)
            p, begin = mass[own], begin + n
            order = np.argsort(-p, kind="stable")
            inside = np.sort(order[(p[order].cumsum() - p[order]) < self.top_p])
            yield ids[own][inside].tolist(), p[inside].cumsum().tolist(), log_prob[own][inside].tolist()

    def _add(self, new: Iterable[_Sequence]) -> list[int]:
        numbers = []
        for s in new:
            self._sequences[s.number] = s
            numbers.append(s.number)
        return numbers
