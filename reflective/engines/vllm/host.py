"""A model whose weights are in vLLM, and what can be made of it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...scoring.scores import TrajectoryScores
from ..base import Sampling, Score
from .core import start, version
from .engine import VLLMEngine
from .finished import Finished, of_response
from .options import Options, no_text
from .sequences import settings

# Settings of vLLM that say where it lies and how much it runs at a time, not what.
NEUTRAL = (
    "model", "dtype", "hf_overrides", "worker_extension_cls", "additional_config", "download_dir", "disable_log_stats", "gpu_memory_utilization",
    "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens",
)  # fmt: skip
FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer*")
BIASES = 1024  # tokens of a logit_bias that Model Runner V2 has room for: more would end its worker
# Settings of a scorer that vLLM's worker has already, and of decoding that vLLM does by its own; with what they are where nobody says.
NOT_HERE = {
    "schedule": None, "backend": None, "w1_dtype": None, "process_group": None, "decoding": "auto", "kv_tokens": None,
}  # fmt: skip


class VLLMHost:
    """
    Args:
        settings: of vLLM, those of ``reflective.vllm.settings`` among them.
        tokenizer: of the model.

    Attributes:
        name: path of the model's directory; dtype: of the weights; max_length: tokens of prompt and response together; vocab_size.
        longest_text: tokens of a finished text that can be scored.

    Raises:
        ImportError, ValueError: see ``core.start``.
    """

    def __init__(self, settings: dict[str, Any], tokenizer: Any) -> None:
        self._settings = dict(settings)
        self.core = start(settings)
        config = self.core.config.model_config
        self.options = Options.of(self.core.config.additional_config)
        self.name, self.dtype = str(settings["model"]), config.dtype
        self.max_length, self.vocab_size = config.max_model_len, config.get_vocab_size()
        self.longest_text = self.max_length - 1  # vLLM runs no prompt without a token behind it
        generation = config.try_get_generation_config() or {}
        self.steps = self.options.load_steps(tokenizer, self.vocab_size, no_text(generation))
        ends = generation.get("eos_token_id", tokenizer.eos_token_id)
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())

    def engine(self, *, batch_rows: int | None = None, **scoring: Any) -> VLLMEngine:
        """What decodes and scores for a search.

        Args:
            batch_rows: candidates decoded together at most; None: as many as vLLM's ``max_num_seqs``.

        Raises:
            ValueError: a setting of the scorer, which is set up already.
        """
        self.refuse(scoring)
        reading = {name: value for name, value in self.options.reading.items() if name != "higher_is_better"}  # which the search knows
        return VLLMEngine(self.core, self.steps, **reading, ends=self.ends, batch_rows=batch_rows)

    def scoring(self, texts: Sequence[tuple[Sequence[int], int]], *, begin: bool = True) -> Finished:
        """``(ids, prompt_length)`` of finished texts, to be scored while vLLM steps; ``begin``: see ``Finished``."""
        return Finished(self.core, self.steps, texts=texts, begin=begin, **self.options.reading)

    def score(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
        """The same, at once.

        Raises:
            ValueError: a text that leaves vLLM no position.
        """
        for i, (ids, _) in enumerate(texts):
            if len(ids) > self.longest_text:
                raise ValueError(
                    f"responses[{i}]: with its prompt {len(ids)} tokens, and vLLM scores up to {self.longest_text}, one below max_model_len"
                )
        found: list[TrajectoryScores] = self.scoring(texts).run()
        return [of_response(scores, start) for scores, (_, start) in zip(found, texts, strict=True)]

    def check_sampling(self, sampling: Sampling) -> None:
        """
        Raises:
            ValueError: settings that vLLM does not take.
        """
        self.core.check(**settings(sampling))
        if len(sampling.logit_bias) > BIASES:
            raise ValueError(f"logit_bias: {len(sampling.logit_bias)} tokens, and vLLM takes {BIASES}; give fewer")
        if self.core.config.speculative_config is not None and (sampling.min_p or sampling.logit_bias):
            raise ValueError(
                "min_p, logit_bias: not by vLLM while it drafts tokens (speculative_config); leave out either"
            )

    def refuse(self, scoring: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: one of these settings is given.
        """
        for name, usual in NOT_HERE.items():
            if scoring.get(name, usual) not in (None, usual):
                raise ValueError(f"{name}={scoring[name]!r}: vLLM is set up when the model is loaded; see from_pretrained")

    def identity(self) -> dict[str, Any]:
        """What results depend on beside the head: the files of the model, by their names, sizes and times; vLLM and its settings."""
        digest, place = hashlib.sha256(), Path(self.name)
        for file in sorted({f for pattern in FILES for f in place.glob(pattern)}):
            told = file.stat()
            digest.update(f"{file.name} {told.st_size} {told.st_mtime_ns}\n".encode())
        said = {name: repr(value) for name, value in sorted(self._settings.items()) if name not in NEUTRAL}
        scoring = {name: value for name, value in self.options.record().items() if name != "head"}
        return {
            "model": digest.hexdigest()[:16], "dtype": str(self.dtype), "vllm": version(), "vllm settings": said | {"scoring": scoring},
        }  # fmt: skip

    def close(self) -> None:
        """Give back vLLM's memory; the host is of no use any more."""
        self.core.close()
