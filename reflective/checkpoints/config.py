"""How a checkpoint is used: ``reflective.json``, beside the head."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..scoring.taps import At
from .files import CONFIG_NAME


@dataclass
class Config:
    """What a checkpoint says of its use, kept in ``reflective.json`` beside the head.

    Attributes:
        rule, delimiter: of the step-tokens, see ``StepTokens.from_tokenizer``.
        at: which state is a step's feature.
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

    @classmethod
    def read(cls, file: Path) -> "Config":
        """The contents of a ``reflective.json``; ValueError, naming the file, where it is none."""
        try:
            said = json.loads(file.read_text(encoding="utf-8-sig"))
            said.pop("base_model", None)  # where the model lies, not how it is used
            return cls(**said)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a valid {CONFIG_NAME}: {error}") from error
