"""What is said of the scoring when vLLM is started: ``additional_config["reflective"]``, plain values that every process gets."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ...scoring.heads import Head
from ...scoring.sprm import SPRM
from ...scoring.steps import Consecutive, StepTokens
from ...scoring.taps import At, Norm, Tap
from ...utils.arguments import whole
from .pruning import PruneRule

NAME = "reflective"  # in additional_config, and in extra_args of a request
SCORING = ("max_steps", "backend", "w1_dtype", "prune")  # options that are no part of a checkpoint
STEPS = 4096  # that are logged of a request, where they end at step-tokens


@dataclass(frozen=True)
class Options:
    """What is not said is as the paper's head has it.

    Attributes:
        head: directory or file of the head, an MLP with one hidden layer.
        rule, delimiter, consecutive, think_start_id, think_end_id: as for ``StepTokens.from_tokenizer``; of no meaning with ``at="every"``.
        at, layers, norm: the head's tap.
        aggregation, sigmoid, higher_is_better: of the head.
        backend, w1_dtype: as for ``StreamScorer``; the latter by name, ``"float8_e4m3fn"``.
        max_steps: of a request, that can be scored; None: 4,096, and with ``at="every"`` as many as the model has positions for, 9 bytes each.
        prune: ``{"threshold": nats, "min_steps": k}``: requests of one group are pruned by the worker, see ``pruning``.
    """

    head: str
    rule: str = "contains"
    delimiter: str | list[str] = ".\n\n"
    at: At = "predict"
    backend: str | None = None
    w1_dtype: str | None = None
    max_steps: int | None = None
    prune: dict[str, Any] | None = None
    layers: Sequence[int] = (-2,)
    norm: Norm = False
    aggregation: str = "geometric_mean"
    sigmoid: bool = True
    higher_is_better: bool = True
    consecutive: Consecutive = "first"
    think_start_id: int | str | None = "auto"
    think_end_id: int | str | None = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.tap.layers)  # JSON has a list
        if self.aggregation == "gated":
            raise ValueError("aggregation='gated': a head of two logits, and vLLM scores heads of one; the Hugging Face engine can")
        Head().use(**self._scores)
        if self.max_steps is not None:
            whole("max_steps", self.max_steps, 1)
        if self.prune_rule is not None and self.aggregation != "geometric_mean":
            raise ValueError(
                f"prune: the worker compares geometric means, and this head's scores are gathered by aggregation={self.aggregation!r}; "
                "leave prune out"
            )

    @classmethod
    def of(cls, additional_config: Any) -> "Options":
        """What vLLM was started with.

        Raises:
            ValueError: nothing of the kind, or a setting that does not exist.
        """
        said = additional_config.get(NAME) if isinstance(additional_config, dict) else None
        if not isinstance(said, dict) or "head" not in said:
            raise ValueError(
                f"additional_config={additional_config!r}: expected {{{NAME!r}: {{'head': PATH, ...}}}}; reflective.vllm.settings makes it"
            )
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in said if name not in known]:
            raise ValueError(f"additional_config[{NAME!r}]: unknown {', '.join(unknown)}; expected {', '.join(known)}")
        return cls(**said)

    def record(self) -> dict[str, Any]:
        """For ``additional_config``: what differs from the defaults."""
        usual = {f.name: f.default for f in fields(self)}
        said = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return said | ({"layers": list(self.layers)} if "layers" in said else {})

    @property
    def prune_rule(self) -> PruneRule | None:
        """
        Raises:
            ValueError: it is none.
        """
        if self.prune is None:
            return None
        try:
            return PruneRule(**self.prune)
        except TypeError as error:
            raise ValueError(f"prune={self.prune!r}: {error}; expected threshold, and perhaps min_steps") from None

    @property
    def tap(self) -> Tap:
        return Tap(self.layers, self.norm, self.at)

    @property
    def reading(self) -> dict[str, Any]:
        """How a log of steps is read: ``at``, and what the head says of scores."""
        return {"at": self.at, **self._scores}

    @property
    def _scores(self) -> dict[str, Any]:
        return {"aggregation": self.aggregation, "sigmoid": self.sigmoid, "higher_is_better": self.higher_is_better}

    def logged(self, positions: int) -> int:
        """Steps that are logged of a request, in a model of so many ``positions``."""
        return self.max_steps or (positions if self.at == "every" else STEPS)

    def load_head(self, dtype: torch.dtype) -> SPRM:
        return SPRM.from_pretrained(self.head, dtype=dtype).use(tap=self.tap, **self._scores)

    def load_steps(self, tokenizer: Any, vocab_size: int, but: Collection[int]) -> StepTokens:
        """Those of a model with ``vocab_size`` ids; with ``at="every"`` all but those ``but``, which end a sequence or pad it.

        Raises:
            ValueError: the tokenizer and the model differ; see ``StepTokens.from_tokenizer``.
        """
        if self.at == "every":
            return StepTokens.every(vocab_size, but)
        delimiter = self.delimiter if isinstance(self.delimiter, str) else tuple(self.delimiter)
        steps = StepTokens.from_tokenizer(
            tokenizer, rule=self.rule, delimiter=delimiter, think_start_id=self.think_start_id,
            think_end_id=self.think_end_id, consecutive=self.consecutive,
        )  # fmt: skip
        steps.check_model(vocab_size)
        return steps.resized(vocab_size)

    def head_dtype(self) -> torch.dtype | None:
        return None if self.w1_dtype is None else getattr(torch, self.w1_dtype)


def no_text(generation: dict[str, Any] | None) -> set[int]:
    """Tokens that end a sequence or pad it, by a model's generation configuration."""
    said = generation or {}
    ends = said.get("eos_token_id")
    return {t for t in (*(ends if isinstance(ends, list | tuple) else [ends]), said.get("pad_token_id")) if t is not None}
