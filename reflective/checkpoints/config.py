"""How a checkpoint is used: ``reflective.json``, beside the head."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scoring.taps import At
from ..utils.patterns import compiled
from .files import CONFIG_NAME

if TYPE_CHECKING:
    from ..scoring.heads import Head

_LONGEST = 1024  # characters of a regular expression; the first search for a literal of so many takes 0.25 s, for one of 4,000 14 s


@dataclass
class Config:
    """What a checkpoint says of its use, kept in ``reflective.json`` beside the head.

    Attributes:
        rule, delimiter: of the step-tokens, see ``StepTokens.from_tokenizer``.
        at: which state is a step's feature, see ``Tap``.
        steps: all arguments of ``StepTokens.from_tokenizer`` in place of ``rule`` and ``delimiter``; None: these.
        head: where the head reads and how it is used, as ``Head.metadata`` has it, where its file has no room for that (``.pt``); None: as its
            file says.
        prompt: text around a question, with ``{question}``; None asks the tokenizer's chat template.
        stop: regular expression that ends a response, looked for in its newest 24 tokens; None leaves that to the
            end-of-sequence token.
        answer: regular expression whose first group is the answer within a response, or behind its ``</think>``;
            None: no answers are read. Without ``stop`` a response ends when something follows its answer.
        think_end: text that ends thinking and begins the answer, written when a ``thinking_budget`` is used up;
            None: the tokenizer's ``</think>``.
    """

    rule: str = "contains"
    delimiter: str | list[str] = ".\n\n"
    at: At = "predict"
    prompt: str | None = None
    stop: str | None = None
    answer: str | None = None
    think_end: str | None = None
    steps: dict[str, Any] | None = None
    head: dict[str, Any] | None = None

    @property
    def step_rule(self) -> dict[str, Any]:
        """Arguments of ``StepTokens.from_tokenizer``."""
        return self.steps or {"rule": self.rule, "delimiter": self.delimiter}

    def to_dict(self) -> dict[str, Any]:
        """As ``reflective.json`` has it: ``steps`` and ``head`` only where there is something to say."""
        return {k: v for k, v in asdict(self).items() if v is not None or k not in ("steps", "head")}

    @classmethod
    def read(cls, file: Path) -> "Config":
        """The contents of a ``reflective.json``; ValueError, naming the file, where it is none."""
        try:
            said = json.loads(file.read_text(encoding="utf-8-sig"))
            said.pop("base_model", None)  # where the model lies, not how it is used
            made = cls(**said)
            made._check()
            return made
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is not a valid {CONFIG_NAME}: {error}") from error

    def _check(self) -> None:
        """A file may hold anything.

        Raises:
            ValueError: a value of another type; a pattern that is none, or an ``answer`` without a group.
        """
        for name in ("rule", "at", "prompt", "stop", "answer", "think_end"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in ("rule", "at")):
                raise ValueError(f"{name}: expected a text, found {value!r:.60}")
        for name in ("stop", "answer"):
            if len(getattr(self, name) or "") > _LONGEST:
                raise ValueError(f"{name}: an expression of {len(getattr(self, name))} characters; {_LONGEST} are allowed")
        several = self.delimiter if isinstance(self.delimiter, list) else [self.delimiter]
        if not all(isinstance(text, str) for text in several):
            raise ValueError(f"delimiter: expected a text or a list of texts, found {self.delimiter!r:.60}")
        for name in ("steps", "head"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name}: expected an object, found {value!r:.60}")
        if self.stop is not None:
            compiled(self.stop)
        if self.answer is not None and compiled(self.answer).groups < 1:
            raise ValueError(f"answer: {self.answer!r} has no group; its first group is the answer")


def told(head: "Head", config: Config) -> dict[str, Any]:
    """What ``reflective.json`` says of both."""
    said = {name: json.loads(value) for name, value in head.metadata().items()}
    return replace(config, head=said or None).to_dict()
