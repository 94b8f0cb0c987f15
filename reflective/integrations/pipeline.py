"""transformers: ``pipeline("text-generation")`` with a score beside every generated text, and best of N.

pipe = pipeline("text-generation", model="MetaStone-S1-1.5B", pipeline_class=ScoredTextGenerationPipeline)
pipe("How many primes are below 100?", best_of=8)  # [{"generated_text": ..., "score": ..., "step_scores": [...]}]
"""

import collections
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import TextGenerationPipeline

from ..checkpoints.loading import load_used
from ..engines.hf.scorer import Schedule, StreamScorer
from ..scoring.heads import Head
from ..scoring.scores import aggregate
from ..scoring.steps import StepTokens
from ..scoring.taps import At
from ..search.strategies import SCORED, WITHOUT_SCORE, WITHOUT_STEP
from ..utils.arguments import check_text, whole


class ScoredTextGenerationPipeline(TextGenerationPipeline):
    """``TextGenerationPipeline`` whose records have two keys more, of the response alone:

    ``"score"``: its trajectory score, NaN where a hidden state was not finite; ``"step_scores"``: list of its steps' scores.

    The model's own ``generate`` is scored while it runs, by a ``StreamScorer``: nothing is decoded differently, and there is no
    second forward. All else, texts, chats, tensors, batches and settings of generation, is the pipeline's own.

    Args:
        head: a head, or where one lies: file, directory or repository; None: where the model was loaded from.
        steps, at: as for ``StreamScorer``; None: what the ``reflective.json`` beside the head says, or for a published head the
            rule ``"exact"``. With a head itself the steps must be given.
        schedule, backend: as for ``StreamScorer``.
        best_of: sample so many responses to a prompt and give the one with the highest score, in a list of one. Where none has
            a step, it is the text that comes most often, and of equally frequent ones the first; ``"chosen_by"`` in its record
            is ``"score"``, ``"majority"`` or ``"first"``. Here, or in a call.
        aggregation: of step scores to ``"score"``, see ``reflective.scoring.scores.aggregate``. Here, or in a call.
        *args, **kwargs: as for ``TextGenerationPipeline``.

    Raises:
        FileNotFoundError: no head there.
        ValueError: head, steps and model do not fit together, or steps are missing; ``best_of`` beside ``num_return_sequences``, or below 1; unknown
            ``aggregation``; what ``StreamScorer`` refuses.
    """

    def __init__(
        self,
        *args: Any,
        head: Head | str | Path | None = None,
        steps: StepTokens | None = None,
        at: At | None = None,
        schedule: Schedule = "deferred",
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(head, Head):
            head, config = load_used(head or self.model.name_or_path, self.model)
            if steps is None:
                steps = StepTokens.from_tokenizer(self.tokenizer, **config.step_rule)
        elif steps is None and (at or head.tap.at) != "every":
            raise ValueError("steps: a head alone does not say which tokens end a step; give them, or the head's directory")
        self.scorer = StreamScorer(self.model, head, steps, schedule, at, backend=backend)

    def _sanitize_parameters(
        self, best_of: int | None = None, aggregation: str | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        one = {"best": best_of is not None} if best_of is not None or "num_return_sequences" in kwargs else {}
        if best_of is not None:
            whole("best_of", best_of, 1)
            if "num_return_sequences" in kwargs:
                raise ValueError(
                    f"best_of={best_of}: not beside num_return_sequences, which gives every response; leave one of them out"
                )
            kwargs["num_return_sequences"] = best_of
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if aggregation is not None:
            aggregate([], aggregation)
            forward["aggregation"] = aggregation
        return preprocess, forward, postprocess | one

    def __call__(self, text_inputs: Any, **kwargs: Any) -> list:
        """As the pipeline's own; nothing comes of no texts, and what is no text is refused."""
        if isinstance(text_inputs, list | tuple):
            if not text_inputs:
                return []
            for i, text in enumerate(text_inputs):
                if not isinstance(text, list | tuple | dict):  # of messages, or one of them
                    check_text(f"text_inputs[{i}]", text)
        elif text_inputs is None or isinstance(text_inputs, str | bytes | dict | int | float):
            check_text("text_inputs", text_inputs)
        return super().__call__(text_inputs, **kwargs)

    def _forward(
        self, model_inputs: dict[str, Any], aggregation: str = "geometric_mean", **generate_kwargs: Any
    ) -> dict[str, Any]:
        with self.scorer:
            outputs = super()._forward(model_inputs, **generate_kwargs)
        shape = outputs["generated_sequence"].shape[:2]  # prompts, responses to each
        scores = self.scorer.result(outputs["generated_sequence"].flatten(0, 1))
        # As tensors, which the pipeline takes apart, prompt by prompt, as it does the sequences.
        steps = pad_sequence([s.cpu() for s in scores.step_scores], batch_first=True)
        return {
            **outputs,
            "score": scores.aggregate(aggregation).unflatten(0, shape),
            "step_scores": steps.unflatten(0, shape),
            "n_steps": torch.tensor([len(s) for s in scores.step_scores]).unflatten(0, shape),
        }

    def postprocess(self, model_outputs: dict[str, Any], *args: Any, best: bool = False, **kwargs: Any) -> list[dict]:
        score, steps, n_steps = (model_outputs.pop(key)[0].tolist() for key in ("score", "step_scores", "n_steps"))
        records = super().postprocess(model_outputs, *args, **kwargs)
        for i, record in enumerate(records):
            record |= {"score": score[i], "step_scores": steps[i][: n_steps[i]]}
        return [_best(records)] if best else records


def _best(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The record to choose, of equals the first. Ranked as by ``Strategy.choose``, but nothing is known of likelihoods."""
    standings = [_standing(record) for record in records]
    best = max(standings)
    level = [record for record, (rank, _) in zip(records, standings, strict=True) if rank == best[0]]
    if best[0] == SCORED or len(level) == 1:
        return {**records[standings.index(best)], "chosen_by": "score"}
    said = [repr([record[key] for key in record if key.startswith("generated_")]) for record in level]
    votes = collections.Counter(said).most_common()  # of equally frequent ones the first comes first
    alone = len(votes) == 1 or votes[0][1] > votes[1][1]
    return {**level[said.index(votes[0][0])], "chosen_by": "majority" if alone else "first"}


def _standing(record: dict[str, Any]) -> tuple[int, float]:
    """One without a step never beats one that has some; one without a score comes last."""
    if math.isnan(record["score"]):
        return WITHOUT_SCORE, 0.0
    return (SCORED, record["score"]) if record["step_scores"] else (WITHOUT_STEP, 0.0)
