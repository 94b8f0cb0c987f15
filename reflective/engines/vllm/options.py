"""What a user says of the scoring when vLLM is started: ``additional_config["reflective"]``, plain values that every process gets."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ...scoring.sprm import SPRM
from ...scoring.steps import StepTokens
from ...scoring.taps import At
from ...utils.arguments import one_of, whole
from .pruning import PruneRule

NAME = "reflective"  # in additional_config, and in extra_args of a request
SCORING = ("max_steps", "backend", "w1_dtype", "prune")  # options that are no part of a checkpoint


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        head: directory or file of the head.
        rule, delimiter, at: as for ``StepTokens.from_tokenizer`` and ``StreamScorer``.
        backend, w1_dtype: as for ``StreamScorer``; the latter by name, ``"float8_e4m3fn"``.
        max_steps: of a request, that can be scored.
        prune: ``{"threshold": nats, "min_steps": k}``: requests of one group are pruned by the worker, see ``pruning``.
    """

    head: str
    rule: str = "contains"
    delimiter: str | list[str] = ".\n\n"
    at: At = "predict"
    backend: str | None = None
    w1_dtype: str | None = None
    max_steps: int = 4096
    prune: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        one_of("at", self.at, ("predict", "token"))
        whole("max_steps", self.max_steps, 1)
        self.prune_rule  # noqa: B018  # raises

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
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

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

    def load_head(self, dtype: torch.dtype) -> SPRM:
        return SPRM.from_pretrained(self.head, dtype=dtype).requires_grad_(False).eval()

    def load_steps(self, tokenizer: Any) -> StepTokens:
        return StepTokens.from_tokenizer(tokenizer, rule=self.rule, delimiter=self.delimiter)

    def head_dtype(self) -> torch.dtype | None:
        return None if self.w1_dtype is None else getattr(torch, self.w1_dtype)
