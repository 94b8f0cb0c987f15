"""ReflectiveModel: a backbone, its tokenizer, its head and its step-tokens in one."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .finished import score
from .generation import pad_token, response_lengths, sample
from .scorer import At, Schedule, StreamScorer
from .scores import TrajectoryScores
from .sprm import SPRM
from .steps import StepTokens

EFFORT = {"low": 2, "medium": 8, "high": 32}  # candidates, paper section 4.1
CONFIG_NAME = "reflective.json"


@dataclass
class Config:
    """What a checkpoint says of its use, kept in ``reflective.json`` beside the head.

    Attributes:
        rule, delimiter: of the step-tokens, see ``StepTokens.from_tokenizer``.
        at: which state is a step's feature.
        prompt: text around a question, with ``{question}``; None asks the tokenizer's chat template.
        stop: regular expression that ends a response, looked for in its newest 24 tokens; None leaves that to the
            end-of-sequence token.
        answer: regular expression whose first group is the answer within a response; None: no answers are read.
    """

    rule: str = "contains"
    delimiter: str | list[str] = ".\n\n"
    at: At = "predict"
    prompt: str | None = None
    stop: str | None = None
    answer: str | None = None

    @classmethod
    def read(cls, file: Path) -> "Config":
        """The contents of a ``reflective.json``; ValueError, naming the file, where it is none."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is not a valid {CONFIG_NAME}: {error}") from error


@dataclass
class Candidate:
    """One sampled response.

    Attributes:
        text: the response.
        score: geometric mean of the step scores; 0 without a step, NaN with an error.
        step_scores: score of every step, in order.
        step_spans: ``(begin, end)`` of every step in ``text``, delimiter included; the text between the last step's end
            and the end of ``text`` belongs to no step.
        token_ids: the response's tokens.
        answer: what the checkpoint's answer pattern finds, or None.
        error: why there is no score, or None.
    """

    text: str
    score: float
    step_scores: list[float]
    step_spans: list[tuple[int, int]]
    token_ids: list[int]
    answer: str | None = None
    error: str | None = None


@dataclass
class Generation:
    """Attributes: ``candidates``: as sampled; ``best``: the highest score; ``seconds``: decoding, scoring included;
    ``scoring_seconds``: host time within the scorer; ``prompt``: the text given to the model."""

    prompt: str
    candidates: list[Candidate]
    best: Candidate = field(init=False)
    seconds: float = 0.0
    scoring_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.best = max(self.candidates, key=lambda c: -1.0 if math.isnan(c.score) else c.score)

    @property
    def text(self) -> str:
        return self.best.text

    @property
    def score(self) -> float:
        return self.best.score


class ReflectiveModel:
    """A policy that scores its own reasoning.

    Args:
        model, tokenizer: as transformers loads them.
        head: of the model's hidden size and dtype.
        config: how the two are used together.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: SPRM, config: Config | None = None
    ) -> None:
        self.model, self.tokenizer, self.head, self.config = model, tokenizer, head, config or Config()
        self.steps = StepTokens.from_tokenizer(tokenizer, rule=self.config.rule, delimiter=self.config.delimiter)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        head: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        untrained: bool = False,
    ) -> "ReflectiveModel":
        """Load a directory with a transformers model, its tokenizer and a head.

        Args:
            path: model and tokenizer.
            head: head and ``reflective.json``, where they lie elsewhere; default ``path``.
            dtype: of the model; the head follows.
            untrained: start from a random head where there is none, to train it.

        Raises:
            FileNotFoundError, ValueError: the head is missing or is none, see ``SPRM.from_pretrained``; a broken
                ``reflective.json``.
        """
        home = Path(head or path).expanduser()
        file = (home if home.is_dir() else home.parent) / CONFIG_NAME
        config = Config.read(file) if file.is_file() else Config()
        sprm = None if untrained and not SPRM.found(home) else SPRM.from_pretrained(home)  # first: it fails fast
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map).eval()
        if sprm is None:
            sprm = SPRM(model.config.get_text_config(decoder=True).hidden_size).requires_grad_(False).eval()
        return cls(model, AutoTokenizer.from_pretrained(path), sprm.to(model.dtype), config)

    @classmethod
    def default(cls, *, head: str | Path | None = None, fetch: bool = False) -> "ReflectiveModel":
        """SmolLM2-135M-Instruct with the head that this package ships, or another, see ``reflective.default``."""
        from .default import load

        return load(head=head, fetch=fetch)

    def save_pretrained(self, path: str | Path) -> None:
        """Write model, tokenizer, head and ``reflective.json`` into a directory that ``from_pretrained`` reads."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        self.head.save_pretrained(path)
        (Path(path) / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    def format(self, question: str) -> str:
        """The prompt for ``question``."""
        if self.config.prompt is not None:
            return self.config.prompt.replace("{question}", question)
        if self.tokenizer.chat_template is None:
            return question
        chat = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def encode(self, text: str) -> Tensor:
        """``text`` as ids [1, T]; a chat template has put its special tokens there already."""
        templated = self.config.prompt is None and self.tokenizer.chat_template is not None
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=not templated).input_ids
        if not ids.shape[1]:
            raise ValueError("question: the prompt is empty; give at least one character")
        return ids.to(self.model.device)

    def generate(
        self,
        question: str,
        effort: str = "medium",
        *,
        n: int | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.6,
        top_p: float = 0.95,
        seed: int | None = None,
        schedule: Schedule = "deferred",
        backend: str | None = None,
        w1_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        on_step: Callable[[Tensor, StreamScorer], None] | None = None,
    ) -> Generation:
        """Sample candidates, score each step as it is decoded, pick the best.

        Args:
            question: put into the checkpoint's prompt.
            effort: ``"low"``, ``"medium"``, ``"high"``: 2, 8, 32 candidates; ``n`` overrides it.
            temperature, top_p: 0.6 and 0.95 as published; temperature 0 decodes greedily.
            seed: makes the run repeatable, by ``torch.manual_seed``. Ranks of a ``process_group`` need the same one.
            schedule, backend, w1_dtype, process_group: as for ``StreamScorer``.
            on_step: called with ids [n, T] and the scorer after every decoded token.

        Raises:
            ValueError: empty question, unknown effort, ``n`` below 1, a head that does not fit.
        """
        if n is None and effort not in EFFORT:
            raise ValueError(f"effort={effort!r}; expected one of {', '.join(EFFORT)}")
        n = EFFORT[effort] if n is None else n
        if n < 1:
            raise ValueError(f"n={n}: at least one candidate is needed")
        if not question.strip():
            raise ValueError("question: it is empty")
        if seed is not None:
            torch.manual_seed(seed)
        prompt = self.format(question)
        ids = self.encode(prompt)
        scorer = StreamScorer(
            self.model, self.head, self.steps, schedule, self.config.at,
            backend=backend, w1_dtype=w1_dtype, process_group=process_group,
        )  # fmt: skip
        out = sample(
            self.model, self.tokenizer, scorer, ids.expand(n, -1),
            shared=0 if self.model.generation_config.cache_implementation else ids.shape[1] - 1, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            stop=self.config.stop, on_step=on_step and (lambda seen: _watch(on_step, seen, scorer)),
        )  # fmt: skip
        scores = scorer.result(out.sequences)
        return Generation(
            prompt, self.candidates(out.sequences, out.prompt_length, scores), out.seconds, scorer.host_seconds
        )

    def score(
        self,
        prompt: str,
        responses: Sequence[str],
        *,
        backend: str | None = None,
        w1_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ) -> list[Candidate]:
        """Score finished responses to one formatted ``prompt``, by a forward of the truncated backbone.

        ``prompt`` and response are tokenized apart, as they were when the response was decoded. An empty prompt has the
        responses scored as whole texts.

        Args:
            backend, w1_dtype, process_group: as for ``StreamScorer``.

        Raises:
            ValueError: no response, or an empty one.
        """
        head = self.encode(prompt)[0].cpu() if prompt else torch.empty(0, dtype=torch.int64)
        rows = [
            torch.cat(
                [head, torch.tensor(self.tokenizer(r, add_special_tokens=not prompt).input_ids, dtype=torch.int64)]
            )
            for r in responses
        ]
        scores = score(
            self.model, self.head, self.steps, rows, at=self.config.at, prompt_lengths=len(head) if prompt else None,
            backend=backend, w1_dtype=w1_dtype, process_group=process_group,
        )  # fmt: skip
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token(self.tokenizer) or 0)
        return self.candidates(padded, len(head), scores, [len(r) - len(head) for r in rows])

    def candidates(
        self, sequences: Tensor, prompt_length: int, scores: TrajectoryScores, lengths: list[int] | None = None
    ) -> list[Candidate]:
        """Text, spans and answer of every scored sequence."""
        lengths = lengths or response_lengths(sequences, prompt_length, self.model, self.tokenizer)
        found = []
        for i, (row, length) in enumerate(zip(sequences[:, prompt_length:].tolist(), lengths, strict=True)):
            tokens = row[:length]
            text = self._decode(tokens)
            ends = self._ends(tokens, [p - prompt_length for p in scores.step_positions[i].tolist()])
            found.append(
                Candidate(
                    text=text,
                    score=float(scores.score[i]),
                    step_scores=scores.step_scores[i].tolist(),
                    step_spans=list(zip([0, *ends], ends, strict=False)),
                    token_ids=tokens,
                    answer=self.answer(text),
                    error=scores.errors.get(i),
                )
            )
        return found

    def _ends(self, tokens: list[int], steps: list[int]) -> list[int]:
        """Where in the decoded text each step-token ends. Decodes two steps at a time: a token's text depends on its
        neighbours, but decoding every prefix anew would take seconds for a thousand steps."""
        ends, length, anchor, last = [], 0, 0, 0
        for step in steps:
            length += len(self._decode(tokens[anchor : step + 1])) - len(self._decode(tokens[anchor:last]))
            ends.append(length)
            anchor, last = last, step + 1
        return ends

    def answer(self, text: str) -> str | None:
        """What the checkpoint's answer pattern finds in a response."""
        match = re.search(self.config.answer, text) if self.config.answer else None
        return match.group(1).strip() if match else None

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _watch(on_step: Callable[[Tensor, StreamScorer], None], ids: Tensor, scorer: StreamScorer) -> None:
    """Call ``on_step`` without charging the results that it asks for to the scorer."""
    before = scorer.host_seconds
    on_step(ids, scorer)
    scorer.host_seconds = before
