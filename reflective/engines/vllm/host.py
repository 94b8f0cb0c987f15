"""A model whose weights are in vLLM, and what can be made of it."""

from collections.abc import Sequence
from typing import Any

from ...scoring.scores import TrajectoryScores
from ..base import Score
from .core import start
from .engine import VLLMEngine
from .finished import Finished, of_response
from .options import Options

NOT_HERE = ("schedule", "backend", "w1_dtype", "process_group")  # settings of a scorer that vLLM's worker has already


class VLLMHost:
    """
    Args:
        settings: of vLLM, those of ``reflective.vllm.settings`` among them.
        tokenizer: of the model.

    Attributes:
        name: path or repository; dtype: of the weights; max_length: tokens of prompt and response together; vocab_size.

    Raises:
        ImportError, ValueError: see ``core.start``.
    """

    def __init__(self, settings: dict[str, Any], tokenizer: Any) -> None:
        self.core = start(settings)
        config = self.core.config.model_config
        self.options = Options.of(self.core.config.additional_config)
        self.name, self.dtype = str(settings["model"]), config.dtype
        self.max_length, self.vocab_size = config.max_model_len, config.get_vocab_size()
        self.steps = self.options.load_steps(tokenizer).resized(self.vocab_size)
        ends = (config.try_get_generation_config() or {}).get("eos_token_id", tokenizer.eos_token_id)
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())

    def engine(self, *, batch_rows: int | None = None, **scoring: Any) -> VLLMEngine:
        """What decodes and scores for a search.

        Args:
            batch_rows: candidates decoded together at most; None: as many as vLLM's ``max_num_seqs``.

        Raises:
            ValueError: a setting of the scorer, which is set up already.
        """
        self.refuse(scoring)
        return VLLMEngine(self.core, self.steps, at=self.options.at, ends=self.ends, batch_rows=batch_rows)

    def scoring(self, texts: Sequence[tuple[Sequence[int], int]]) -> Finished:
        """``(ids, prompt_length)`` of finished texts, to be scored while vLLM steps."""
        return Finished(self.core, self.steps, self.options.at, texts)

    def score(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
        """The same, at once.

        Raises:
            ValueError: a text that leaves vLLM no position.
        """
        for i, (ids, _) in enumerate(texts):
            if len(ids) >= self.max_length:
                raise ValueError(
                    f"responses[{i}]: with its prompt {len(ids)} tokens, and vLLM scores up to {self.max_length - 1}, one below max_model_len"
                )
        found: list[TrajectoryScores] = self.scoring(texts).run()
        return [of_response(scores, start) for scores, (_, start) in zip(found, texts, strict=True)]

    def refuse(self, scoring: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: one of these settings is given.
        """
        for name in NOT_HERE:
            if scoring.get(name) is not None:
                raise ValueError(
                    f"{name}={scoring[name]!r}: vLLM's scorer is set up when the model is loaded; see from_pretrained"
                )

    def close(self) -> None:
        """Give back vLLM's memory; the host is of no use any more."""
        self.core.close()
