"""reward_hub: its process reward model, by the SPRM.

from reward_hub.base import AggregationMethod

prm = ReflectiveProcessRewardModel(Engine(model))
prm.score(messages, aggregation_method=AggregationMethod.MIN)
"""

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from reward_hub.base import AbstractProcessRewardModel, AggregationMethod, PRMResult
from tqdm import tqdm

from ..scoring.scores import aggregate
from ..serve.engine import Engine
from ..utils.messages import is_conversation, plain
from . import aggregation, scored

_ROWS = 64  # conversations between two moves of the progress bar


class ReflectiveProcessRewardModel(AbstractProcessRewardModel):
    """``score`` as ``reward_hub.vllm.reward.VllmProcessRewardModel`` has it.

    The numbers of a response are aggregations over the steps of the SPRM, which the checkpoint's own delimiter ends, each
    counted once: those of ``ReflectiveModel.score``. ``step_sep`` says what a step is to the caller, and only arranges
    ``PRMResult.step_scores``: one for each of ``content.split(step_sep)``, namely the score of the last SPRM step that ends in
    it. One in which none ends lies within a longer SPRM step and has that one's score; what follows the last SPRM step has
    the last score; all have 0 where there is no SPRM step, or no valid score.

    Args:
        engine: of the model.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def score(
        self,
        messages: Sequence[Sequence[Mapping[str, str]]] | Sequence[Mapping[str, str]],
        max_input_tokens: int = 8192,
        step_sep: str = "\n\n",
        aggregation_method: AggregationMethod | str = AggregationMethod.LAST,
        return_full_prm_result: bool = False,
        use_tqdm: bool = False,
    ) -> list[PRMResult] | list[float]:
        """Score the last message, the assistant's, of each conversation.

        Args:
            messages: conversations of ``{"role", "content"}``, or one.
            max_input_tokens: of prompt and response; what is behind them has no score, which is warned of. What is before
                them does not change by that, as the model is causal.
            step_sep: see the class.
            aggregation_method: ``prod``, ``min``, ``last``; ``model``: the geometric mean, the trajectory's score; or a name of
                ``reflective.scoring.scores.AGGREGATIONS``.
            return_full_prm_result: whether to return ``PRMResult``: ``step_scores``, and over the steps of the SPRM ``product``,
                ``min``, ``last`` and, by ``aggregation_method``, ``score``. With ``model`` the response is one step.
            use_tqdm: show the progress.

        Raises:
            ValueError: a conversation that does not end with text of the assistant's, an empty ``step_sep``, an unknown
                aggregation; more tokens than the model has positions.
        """
        how = aggregation(aggregation_method)
        if not step_sep:
            raise ValueError("step_sep: it is empty; give the text that separates steps")
        conversations = []
        for i, given in enumerate([messages] if is_conversation(messages) else messages):
            conversations.append(plain(given, f"messages[{i}]"))
            if given[-1]["role"] != "assistant" or given[-1].get("content") is None:
                raise ValueError(
                    f"messages[{i}]: expected the last message to be text of the assistant's, which is scored"
                )
        results = []
        for begin in tqdm(range(0, len(conversations), _ROWS), disable=not use_tqdm):
            part = conversations[begin : begin + _ROWS]
            prompts, responses = zip(*(self._encode(c, max_input_tokens) for c in part), strict=True)
            for c, candidate in zip(part, scored(self.engine, prompts, responses), strict=True):
                own = candidate.step_scores or [0.0]
                result = PRMResult(own)
                result.score = aggregate(candidate.step_scores, how)
                if getattr(aggregation_method, "value", aggregation_method) == AggregationMethod.MODEL.value:
                    result.step_scores = [result.score]
                else:
                    ends_in = [candidate.text.count(step_sep, 0, end - 1) for _, end in candidate.step_spans]
                    result.step_scores = _by_piece(own, ends_in, c[-1]["content"].count(step_sep) + 1)
                results.append(result)
        return results if return_full_prm_result else [r.score for r in results]

    def _encode(self, conversation: Sequence[Mapping[str, str]], limit: int) -> tuple[list[int], list[int]]:
        prompt = self.engine.encode(self.engine.model.format(conversation[:-1], "messages"))
        response = self.engine.model.tokenizer(conversation[-1]["content"], add_special_tokens=False).input_ids
        if len(prompt) + len(response) > limit:
            warnings.warn(
                f"max_input_tokens={limit}: a conversation has {len(prompt) + len(response)}; what is behind is not scored",
                stacklevel=4,
            )
        return prompt, response[: max(0, limit - len(prompt))]


def _by_piece(scores: list[float], ends_in: list[int], pieces: int) -> list[float]:
    """A score for each piece, from those of steps that end in the pieces ``ends_in``, ascending."""
    found = []
    for piece in range(pieces):
        i = bisect_right(ends_in, piece)
        found.append(scores[i - 1] if piece in ends_in else scores[min(i, len(scores) - 1)])
    return found
