r"""its_hub: one backbone that generates and scores, for its best-of-N, beam search and particle methods.

    engine = Engine(rf.ReflectiveModel.from_pretrained(path))
    lm = ReflectiveLanguageModel(engine)
    BestOfN(ReflectiveOutcomeRewardModel(engine)).infer(lm, "question", budget=8)
    search = BeamSearch(StepGeneration(max_steps=32, step_token="\n\n"), ReflectiveProcessRewardModel(engine), beam_width=2)
    search.infer(lm, "question", budget=8)

Reward models and language model may also be used each alone, with others of its_hub's.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from its_hub.api import (
    AbstractLanguageModel,
    AbstractOutcomeRewardModel,
    AbstractProcessRewardModel,
    ChatMessage,
    ChatMessages,
    GenerationUsage,
)
from typing_extensions import Unpack

from ..model import Candidate
from ..scoring.scores import aggregate
from ..search.candidates import SamplingSettings
from ..serve.engine import Engine, QueueFull
from ..utils.arguments import brief, check_text, whole
from ..utils.messages import text_of
from . import RETRY_S, aggregation, scored


class Decoded(str):
    """A response's text that knows the scores it got while it was decoded. A copy is a plain text.

    Attributes:
        engine, prompt: it was decoded by and behind; candidate: what came of it.
    """

    engine: Engine
    prompt: str
    candidate: Candidate

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[str]]:
        return str, (str(self),)


class ReflectiveLanguageModel(AbstractLanguageModel):
    """Decodes on the engine; what is asked for at the same time is decoded in one batch.

    A last message of the assistant's is continued. Whatever its_hub asks of several conversations, each is decoded alone in
    its candidate's own random stream, so a ``seed`` repeats a run as long as its_hub asks in the same order.

    Args:
        engine: of the model.
        max_completion_tokens, temperature: where a call says nothing else. A response ends where the model has no further position.
        seed: None draws one.
        **sampling: as for ``ReflectiveModel.generate``.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_completion_tokens: int = 512,
        temperature: float = 0.6,
        seed: int | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> None:
        self.engine, self.sampling = engine, sampling
        self.max_completion_tokens, self.temperature = max_completion_tokens, temperature
        self._random = random.Random(seed)

    async def agenerate(
        self,
        messages: list[ChatMessage] | list[list[ChatMessage]],
        stop: str | list[str] | None = None,
        *,
        temperature: float | list[float] | None = None,
        **settings: Any,
    ) -> dict | list[dict]:
        """``agenerate_single`` of one conversation, or of each of several, with a temperature each where that is a list."""
        if messages and not isinstance(messages[0], list):
            return await self.agenerate_single(messages, stop, temperature=temperature, **settings)
        temperatures = temperature if isinstance(temperature, list) else [temperature] * len(messages)
        if len(temperatures) != len(messages):
            raise ValueError(
                f"temperature: {len(temperatures)} for {len(messages)} conversations; give one, or one each"
            )
        return await asyncio.gather(
            *(
                self.agenerate_single(conversation, stop, temperature=t, **settings)
                for conversation, t in zip(messages, temperatures, strict=True)
            )
        )

    async def agenerate_single(
        self,
        messages: list[ChatMessage],
        stop: str | list[str] | None = None,
        *,
        max_completion_tokens: int | None = None,
        temperature: float | None = None,
        include_stop_str_in_output: bool | None = None,
        tools: list[dict] | None = None,
        tool_choice: str | dict | None = None,
        response_format: dict | None = None,
        usage_accumulator: GenerationUsage | None = None,
        loop: Any = None,
    ) -> dict:
        """The assistant's message that follows, as ``{"role", "content"}``, up to ``stop`` (a text or several), which is part
        of it with ``include_stop_str_in_output``. Cancelling it ends the decoding.

        Raises:
            ValueError: tools or a response format are asked for; an empty prompt; a setting out of its range.
        """
        if tools or response_format:
            raise ValueError("tools, response_format: this model writes plain text; leave them out")
        conversation, begun = _split(messages)
        prompt = self.engine.model.format(conversation, "messages")
        ids = self.engine.encode(prompt)
        if begun:
            ids += self.engine.model.tokenizer(begun, add_special_tokens=False).input_ids
        limit = self.max_completion_tokens if max_completion_tokens is None else max_completion_tokens
        whole("max_completion_tokens", limit, 1)
        if self.engine.max_length is not None:
            limit = min(limit, self.engine.max_length - len(ids))
            if limit < 1:
                return {"role": "assistant", "content": ""}
        stops = [stop] if isinstance(stop, str) and stop else list(stop or ())
        settings = {
            **self.sampling,
            "max_new_tokens": limit,
            "temperature": self.temperature if temperature is None else temperature,
            "seed": self._random.getrandbits(32),
            "stop": stops,
        }
        while True:
            try:
                # In no thread of the default executor: with those its_hub's orchestrator waits for its turn, and a model
                # that waited for one would have all wait for ever.
                job = self.engine.generate(ids, n=1, **settings)
                break
            except QueueFull:
                await asyncio.sleep(RETRY_S)
        generation = await asyncio.wrap_future(job)
        if usage_accumulator is not None:
            usage_accumulator.add(len(ids), generation.tokens)
        content = Decoded(_cut(generation.text, stops, bool(include_stop_str_in_output)))
        if not begun and content == generation.text:
            content.engine, content.prompt, content.candidate = self.engine, prompt, generation.best
        return {"role": "assistant", "content": content}


class _RewardModel:
    """Scores responses by one number, an aggregation over the steps of the SPRM."""

    def __init__(self, engine: Engine, aggregation_method: Any = "geometric_mean") -> None:
        self.engine, self.aggregation = engine, aggregation(aggregation_method)

    def _score(self, prompts: list[str], responses: list[str]) -> list[float]:
        known = [
            r.candidate if getattr(r, "engine", None) is self.engine and r.prompt == p else None
            for p, r in zip(prompts, responses, strict=True)
        ]
        rest = [i for i, c in enumerate(known) if c is None]
        for i, c in zip(
            rest, scored(self.engine, [prompts[i] for i in rest], [responses[i] for i in rest]), strict=True
        ):
            known[i] = c
        return [0.0 if c.error else aggregate(c.step_scores, self.aggregation) for c in known]


class ReflectiveOutcomeRewardModel(_RewardModel, AbstractOutcomeRewardModel):
    """Scores finished responses, for ``BestOfN``.

    What ``ReflectiveLanguageModel`` has decoded on the same engine was scored then, and is not run through the model again. That
    also spares it the tokenizer, whose tokens for a text need not be those that were decoded: then its scores are others.

    Args:
        engine: of the model.
        aggregation_method: name in ``reflective.scoring.scores.AGGREGATIONS``, or reward_hub's, see ``integrations.aggregation``.
    """

    def score(
        self, messages: list[ChatMessage] | list[list[ChatMessage]] | ChatMessages, **kwargs: Any
    ) -> float | list[float]:
        """The score in [0, 1] of a conversation's last message, the assistant's; of several, a list. 0 without a step.

        Raises:
            ValueError: a conversation without one; a text that the model has no room for.
        """
        if isinstance(messages, ChatMessages):
            messages = messages.to_chat_messages()
        several = bool(messages) and isinstance(messages[0], list)
        prompts, responses = [], []
        for conversation in messages if several else [messages]:
            if not conversation or conversation[-1].role != "assistant" or conversation[-1].content is None:
                raise ValueError("messages: expected the last one to be the assistant's, which is scored")
            before, response = _split(conversation)
            prompts.append(self.engine.model.format(before, "messages"))
            responses.append(response)
        found = self._score(prompts, responses)
        return found if several else found[0]

    async def ascore(
        self,
        messages: list[ChatMessage] | list[list[ChatMessage]] | ChatMessages,
        orchestrator: Any = None,
        **kwargs: Any,
    ) -> float | list[float]:
        """``score``, while the event loop goes on."""
        return await asyncio.to_thread(self.score, messages)


class ReflectiveProcessRewardModel(_RewardModel, AbstractProcessRewardModel):
    """Scores responses that go on, for ``BeamSearch`` and ``ParticleFiltering``.

    As in its_hub's own, and as its searches have it, a list is several responses, not the steps of one, and each gets one
    number: an aggregation over the steps of the SPRM in all of its text. Its_hub joins steps by their separator and leaves out
    the last one's, with which the step that was just decoded ended: it is put there again, for the SPRM scores at it.

    Args:
        engine: of the model.
        aggregation_method: as for ``ReflectiveOutcomeRewardModel``.
        step_sep: ``step_token`` of the ``StepGeneration``; None: responses are scored as they are, which is right where it has
            ``include_stop_str_in_output`` or ``tokens_per_step``.
    """

    def __init__(
        self, engine: Engine, aggregation_method: Any = "geometric_mean", step_sep: str | None = "\n\n"
    ) -> None:
        super().__init__(engine, aggregation_method)
        self.step_sep = step_sep

    def score(
        self, prompt_or_messages: str | list[ChatMessage] | ChatMessages, response_or_responses: str | list[str]
    ) -> float | list[float]:
        """The score in [0, 1] of a response; of several, a list. 0 without a step.

        Raises:
            ValueError: a text that the model has no room for.
        """
        conversation = ChatMessages.from_prompt_or_messages(prompt_or_messages).to_chat_messages()
        prompt = self.engine.model.format([_plain(m) for m in conversation], "messages")
        single = isinstance(response_or_responses, str)
        if not single and not isinstance(response_or_responses, Sequence):
            raise ValueError(
                f"response_or_responses={brief(response_or_responses)}: expected a text, or a list of texts"
            )
        for r in [] if single else response_or_responses:
            check_text("response_or_responses", r)
        responses = [self._closed(r) for r in ([response_or_responses] if single else response_or_responses)]
        found = self._score([prompt] * len(responses), responses)
        return found[0] if single else found

    async def ascore(
        self, prompt_or_messages: str | list[ChatMessage] | ChatMessages, response_or_responses: str | list[str]
    ) -> float | list[float]:
        """``score``, while the event loop goes on."""
        return await asyncio.to_thread(self.score, prompt_or_messages, response_or_responses)

    def _closed(self, response: str) -> str:
        return response if not self.step_sep or response.endswith(self.step_sep) else response + self.step_sep


def _plain(message: ChatMessage) -> dict[str, str]:
    return {"role": message.role, "content": text_of(message.content, f"content of the {message.role}'s message")}


def _split(messages: Sequence[ChatMessage]) -> tuple[list[dict[str, str]], str]:
    """The conversation, and the text of the assistant's message that ends it."""
    conversation = [_plain(m) for m in messages]
    if conversation and conversation[-1]["role"] == "assistant":
        return conversation[:-1], conversation[-1]["content"]
    return conversation, ""


def _cut(text: str, stops: Sequence[str], include: bool) -> str:
    """``text`` up to the first of ``stops``."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text
    at, stop = min(found)
    return text[: at + len(stop) * include]
