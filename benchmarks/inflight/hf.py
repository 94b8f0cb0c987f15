"""Cases in transformers' ``generate``, and the systems that score there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

import reflective as rf
from reflective.engines.hf.internals import cache_of, with_cache
from reflective.published import second_pass

from .cases import Case
from .run import Run, Scored
from .world import DELIMITER, END, LAYER, PAD, World

NOT_HERE = {"preemption": "transformers' generate throws nobody out of memory"}


class Call:
    """One or more calls of ``generate`` that make up a case. What was run before, for its cache, was run when this is made: attach what scores
    afterwards.

    ::

        for part in Call.all(world, case):
            with whatever listens:
                rows = part.generate()
            for row in rows:
                row.ids, row.prompt, row.pad, row.at

    Args:
        model: that decodes; None: ``world.model``.

    Attributes:
        ids, mask: [B, P], the prompts; width: P.
        out: what ``generate`` returned.
        events: see ``Run``.
    """

    def __init__(self, world: World, case: Case, prompts: Sequence[str], model: Any = None) -> None:
        self.world, self.case, self.model = world, case, model or world.model
        self.prompts = [world.ids(text) for text in prompts]
        self.width = max(map(len, self.prompts))
        left, rows, masks = case.padding == "left", [], []
        for prompt in self.prompts:
            pad = self.width - len(prompt)
            rows.append([PAD] * pad + prompt if left else prompt + [PAD] * pad)
            masks.append([0] * pad + [1] * len(prompt) if left else [1] * len(prompt) + [0] * pad)
        self.ids, self.mask = torch.tensor(rows), torch.tensor(masks)
        self.events: dict[str, int] = {}
        self._cache = self._prefill(case.cached + self.width * (case.cached < 0)) if case.cached else None

    @classmethod
    def all(cls, world: World, case: Case, model: Any = None) -> Iterator["Call"]:
        """All together; then, where the case has it so, each alone."""
        torch.manual_seed(1)
        yield cls(world, case, case.prompts, model)
        for prompt in case.prompts if case.alone else ():
            yield cls(world, case, [prompt], model)

    def settings(self) -> dict[str, Any]:
        """Arguments of ``generate`` besides the prompts."""
        case, world = self.case, self.world
        given: dict[str, Any] = {
            "max_new_tokens": case.tokens, "do_sample": not case.beams and not case.alone, "pad_token_id": PAD,
            "num_return_sequences": case.n, "logits_processor": [_Only(world.allowed(case.allowed))],
            "eos_token_id": END if "<|end|>" in case.allowed else None,
        }  # fmt: skip
        if given["do_sample"]:
            given["top_k"] = 0
        if self._cache is not None:
            given |= with_cache(self.model, self._cache)
        if case.piece:
            given["prefill_chunk_size"] = case.piece
        if case.drafts == "lookup":
            given |= {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
        if case.drafts == "model":
            given |= {"assistant_model": world.draft}
        if case.beams:
            given |= {"num_beams": case.beams, "num_return_sequences": case.beams}
        if case.stop_after:
            given["stopping_criteria"] = [_After(self.width + case.stop_after)]
        return given

    def generate(self, **more: Any) -> "list[Row]":
        """The rows that come back. ``more``: of ``generate``, whose whole answer is then ``out``."""
        return self.by(lambda: self.model.generate(self.ids, attention_mask=self.mask, **self.settings() | more))

    def by(self, generate: Callable[[], Any]) -> "list[Row]":
        """The same by a function of yours that calls ``generate``, somehow, with ``ids``, ``mask`` and ``settings()``."""
        fed: list[int] = []
        cached = 0 if self._cache is None else self._cache.get_seq_length()
        counting = self.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: fed.append(ids[0].shape[1]))
        try:
            self.out = generate()
        finally:
            counting.remove()
        sequences = getattr(self.out, "sequences", self.out)
        decoded = sequences.shape[1] - self.width
        case = self.case
        self.events = {
            "cached": cached, "pieces": -(-self.width // case.piece) if case.piece else 0,
            # Of a draft all tokens are fed, and the refused ones once more than there are tokens.
            "rejected": sum(fed) + cached - self.width - decoded + 1 if case.drafts else 0,
            "stopped": len(sequences) if case.stop_after and decoded < case.tokens else 0,
        }  # fmt: skip
        per = len(sequences) // len(self.prompts)
        return [Row.of(i, row.tolist(), self, self.prompts[i // per]) for i, row in enumerate(sequences)]

    def _prefill(self, columns: int) -> Any:
        """What another request of these prompts has left in the cache."""
        with torch.no_grad():
            return cache_of(self.model(self.ids[:, :columns], use_cache=True))


@dataclass(frozen=True)
class Row:
    """A row of what ``generate`` returned.

    Attributes:
        at: its number in the batch.
        ids: without padding; prompt: how many are the prompt's.
        pad: columns of padding before them; width: columns of the padded prompt.
    """

    at: int
    ids: list[int]
    prompt: int
    pad: int
    width: int

    @classmethod
    def of(cls, at: int, row: list[int], call: Call, prompt: list[int]) -> "Row":
        response = row[call.width :]
        response = response[: response.index(END) + 1] if END in response else response
        while response and response[-1] == PAD:  # never drawn
            response.pop()
        pad = call.width - len(prompt) if call.case.padding == "left" else 0
        return cls(at, prompt + response, len(prompt), pad, call.width)

    def scored(self, scores: Sequence[float] | Tensor, columns: Sequence[int] | None = None) -> Scored:
        return Scored(self.ids, self.prompt, [float(s) for s in scores], columns)


class _Only:
    """Bars all tokens but some: a logits processor."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        barred = torch.full_like(logits, -torch.inf)
        barred[:, self.ids] = logits[:, self.ids]
        return barred


class _After:
    """Somebody stops the call: a stopping criterion."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns)


# -- systems -----------------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """``reflective.StreamScorer`` around ``generate``."""

    schedule: str
    cannot: dict[str, str] = field(default_factory=lambda: dict(NOT_HERE))

    def __post_init__(self) -> None:
        self.name = f"reflective-{self.schedule}"
        self.about = f"reflective.StreamScorer around transformers' generate, schedule {self.schedule}"

    def run(self, world: World, case: Case) -> Run:
        found, events = [], {}
        for part in Call.all(world, case):
            with rf.StreamScorer(world.model, world.head, world.steps(case.rule), self.schedule) as scorer:
                rows = part.generate()
            scores = scorer.result(part.out)
            for row in rows:
                columns = [c - row.pad for c in scores.step_positions[row.at].tolist()]
                found.append(row.scored(scores.step_scores[row.at], columns))
            events |= part.events
        return Run(found, events)


class SecondPass:
    """Generate, then run every finished text through the model again."""

    name = "second-pass"
    about = "a second pass of the whole model over the decoded tokens, one sequence a call (reflective.published.second_pass with the prompt's length)"
    cannot = NOT_HERE

    def run(self, world: World, case: Case) -> Run:
        found, events = [], {}
        for part in Call.all(world, case):
            found += [row.scored(*self.score(world, case, row)) for row in part.generate()]
            events |= part.events
        return Run(found, events)

    def score(self, world: World, case: Case, row: Row) -> tuple[Tensor, list[int] | None]:
        parts = SimpleNamespace(model=world.model, head=world.head, steps=world.steps(case.rule))
        return second_pass(parts, torch.tensor([row.ids]), row.prompt), None


class Published(SecondPass):
    """As MetaStone-S1's server does it, which is sent a text."""

    name = "published"
    about = "MetaStone-S1's way: the text is sent to a server that tokenizes it and scores all of its steps, one text a call"
    cannot = NOT_HERE | {"split delimiters": "its step-tokens are the one id that '.\\n\\n' encodes to"}

    def score(self, world: World, case: Case, row: Row) -> tuple[Tensor, list[int] | None]:
        parts = SimpleNamespace(model=world.model, head=world.head, steps=world.steps())
        return second_pass(parts, torch.tensor([world.ids(world.tokenizer.decode(row.ids))]), None), None


def read(world: World, case: Case, rows: Sequence[Row], states: Tensor, place: Callable[[Row, int], int]) -> list[Scored]:
    """Scores of the steps of ``rows`` from ``states`` [B, places, H], of which ``place`` says where a row's column was predicted."""
    found = []
    for row in rows:
        columns = world.columns(row.ids, row.prompt, case.rule)
        features = states[row.at, [place(row, column) for column in columns]]
        found.append(row.scored(world.head(features).sigmoid().flatten(), columns))
    return found


class OutputHiddenStates:
    """``generate(output_hidden_states=True)``, all steps' states put one behind the other."""

    name = "output-hidden-states"
    about = (
        "generate(output_hidden_states=True, return_dict_in_generate=True), the steps' states concatenated and read by column, as in "
        "huggingface/transformers#31229"
    )
    cannot = NOT_HERE

    def run(self, world: World, case: Case) -> Run:
        found, events = [], {}
        for part in Call.all(world, case):
            rows = part.generate(output_hidden_states=True, return_dict_in_generate=True)
            states = torch.cat([step[LAYER] for step in part.out.hidden_states], 1)  # [B, columns, H]
            found += read(world, case, rows, states, lambda row, column: row.pad + column - 1)
            events |= part.events
        return Run(found, events)


class Hook:
    """A forward hook that keeps the last position of every forward."""

    name = "hook"
    about = (
        "a forward hook on the decoder layer that keeps each forward's last position, row k being the state that predicted token k, as probes on "
        "generate are commonly written (huggingface/transformers#30036, TransformerLensOrg/TransformerLens#697)"
    )
    cannot = NOT_HERE

    def run(self, world: World, case: Case) -> Run:
        found, events = [], {}
        for part in Call.all(world, case):
            kept: list[Tensor] = []
            layer = world.model.model.layers[LAYER]
            handle = layer.register_forward_hook(lambda _, __, out, to=kept: to.append(first(out)[:, -1].clone()))
            try:
                rows = part.generate()
            finally:
                handle.remove()
            states = torch.stack(kept, 1)  # [B, forwards, H]
            found += read(world, case, rows, states, lambda row, column: column - row.prompt)
            events |= part.events
        return Run(found, events)


def first(output: Any) -> Tensor:
    """Of a decoder layer's output the hidden states."""
    return output[0] if isinstance(output, tuple) else output


class Generate:
    """``ReflectiveModel.generate``, whose search drives an engine of ours."""

    name = "reflective-generate"
    about = "reflective.ReflectiveModel.generate: best of n; step_beam for forks, prune for what is stopped"
    cannot: ClassVar = {
        "prefix cache": "it keeps no keys and values from one call to the next; candidates of one question share their prompt's",
        "right padding": "it takes texts, and pads nothing",
        "pieces": "it prefills a prompt as it sees fit",
        "preemption": "a sequence waits for memory before it starts",
        "prompt lookup": "it drafts no tokens",
        "draft model": "it drafts no tokens",
    }

    def run(self, world: World, case: Case) -> Run:
        from reflective.checkpoints.config import Config
        from reflective.strategies import by_name

        config = Config(rule=case.rule, delimiter=DELIMITER, prompt="{question}")
        model = rf.ReflectiveModel(world.model, world.tokenizer, world.head, config)
        return generated(model, world, case, by_name)


def generated(model: Any, world: World, case: Case, by_name: Any) -> Run:
    """``case`` by ``ReflectiveModel.generate``, whichever engine is behind it."""
    bias = dict.fromkeys(world.allowed(case.allowed), 0.0)
    bias |= {t: -1e9 for t in range(world.vocabulary) if t not in bias}
    strategy = by_name("best_of_n", n=case.n)
    if case.beams:
        strategy = by_name("step_beam", n=case.beams, width=2)
    if case.stop_after:
        strategy = by_name("prune", n=6, threshold=0.01, min_steps=2)
    settings = {
        "strategy": strategy, "max_new_tokens": case.tokens, "seed": 1, "temperature": 0.0 if case.alone else 1.0, "top_p": 1.0, "logit_bias": bias,
    }  # fmt: skip
    parts = [list(case.prompts), *([p] for p in case.prompts if case.alone)]
    parts += [list(case.prompts)] * bool(case.cached)  # the second time from the cache
    found, events = [], {"stopped": 0}
    for part in parts:
        for prompt, generation in zip(part, model.generate(part, **settings), strict=True):
            ids = world.ids(prompt)
            for c in generation.candidates:
                found.append(Scored([*ids, *c.token_ids], len(ids), c.step_scores))
                events["stopped"] += c.status == "stopped"
    return Run(found, events)


SYSTEMS = (Stream("immediate"), Stream("deferred"), Generate(), SecondPass(), Published(), OutputHiddenStates(), Hook())
