"""What requests may hold. Fields that are not known are ignored, as the servers do whose interfaces these are; fields that are
known and cannot be honoured are refused unless they ask for nothing."""

import contextlib
import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    model_validator,
)

from ..search.candidates import SamplingSettings

Item = TypeVar("Item")
# A body of 8 MiB has room for 4 million items, and as many errors.
Several = Annotated[list[Item], Field(min_length=1, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Alternatives = Annotated[int, Field(ge=0, le=20, strict=True)]
StopTexts = Annotated[list[StopText], Field(max_length=16, fail_fast=True)]
LogitBias = Annotated[dict[int, Annotated[FiniteFloat, Field(ge=-100, le=100)]], Field(max_length=1024)]


def _is_text(item: Any) -> bool:
    return isinstance(item, str)


def _are_ids(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(type(i) is int for i in item)


def _items(value: Any, known: tuple[Callable[[Any], bool], ...], expected: str) -> list[Any]:
    """``value`` as a list of one or several items of a known kind; an empty text is one, for its place to be told."""
    if any(known_as(value) for known_as in known):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected {expected}, or a list of at least 1 item")
    for i, item in enumerate(value):
        if not any(known_as(item) for known_as in known):
            raise ValueError(f"item {i}: expected {expected}")
    return value


Texts = Annotated[list[str], BeforeValidator(lambda value: _items(value, (_is_text,), "a text"))]
TextsOrIds = Annotated[
    list[str | list[int]], BeforeValidator(lambda value: _items(value, (_is_text, _are_ids), "a text or token ids"))
]


class _Request(BaseModel):
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field -> values that ask for nothing, beside None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None}  # null is absent
        for name, neutral in cls.refused.items():
            if name in data and data[name] not in neutral:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return data


class PublishedScore(_Request):
    """``POST /score`` of MetaStone-S1's score server."""

    text: str
    return_all_scores: bool = False


class PublishedGenerate(_Request):
    """``POST /generate`` of MetaStone-S1's policy server, whose repetition penalty is always 1.05."""

    prefix_prompt: str
    max_tokens: int = 1024
    response_num: int = 8
    stop: StopTexts | None = None
    temperature: FiniteFloat = 0.8
    repetition_penalty: FiniteFloat = 1.05
    seed: int | None = None


_TEMPLATE = {  # vLLM's: how a chat becomes a prompt
    "chat_template": (), "chat_template_kwargs": ({},), "continue_final_message": (False,), "mm_processor_kwargs": ({},),
}  # fmt: skip


class _Pooled(_Request):
    refused = {
        "truncate_prompt_tokens": (), "dimensions": (), "encoding_format": ("float",), "embed_dtype": ("float32",),
        # Scores are what the head's sigmoid gives; each of these has asked for that, or for logits.
        "use_activation": (True,), "activation": (True,), "softmax": (True,), "normalize": (True,),
        **_TEMPLATE,
    }  # fmt: skip

    model: str | None = None


class PairScore(_Pooled):
    """``POST /score`` of vLLM: questions and their responses, one to many or as many."""

    questions: Texts = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    responses: Texts = Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))


_PAIR_FIELDS = {
    name for field in ("questions", "responses") for name in PairScore.model_fields[field].validation_alias.choices
}


def _form(body: Any) -> str:
    """Which ``POST /score`` is meant, MetaStone-S1's or vLLM's: the fields tell, for the path is the same."""
    given = {name for name, value in body.items() if value is not None} if isinstance(body, dict) else set()
    return "pairs" if _PAIR_FIELDS & given else "published"


ScoreBody = Annotated[
    Annotated[PublishedScore, Tag("published")] | Annotated[PairScore, Tag("pairs")], Discriminator(_form)
]


class _TextPart(_Request):
    type: Literal["text"]
    text: str


class Message(_Request):
    role: str
    content: str | Annotated[list[_TextPart], Field(fail_fast=True)] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        given = self.content or ""
        return given if isinstance(given, str) else "".join(part.text for part in given)

    @property
    def templated(self) -> dict[str, Any]:
        """As chat templates take it: the arguments of the tools that were called as a mapping, where they are one."""
        told: dict[str, Any] = self.model_dump(include={"tool_call_id", "name"}, exclude_none=True)
        if self.tool_calls:
            told["tool_calls"] = [dict(call) for call in self.tool_calls]
            for call in told["tool_calls"]:
                if isinstance(call.get("function"), dict) and isinstance(call["function"].get("arguments"), str):
                    with contextlib.suppress(ValueError):
                        call["function"] = {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
        return {"role": self.role, "content": self.text, **told}

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":  # who may have called a tool instead
            raise ValueError("content: Field required")
        return self


Messages = Several[Message]


class Pooling(_Pooled):
    """``POST /pooling`` of vLLM: whole texts, or their ids, or a chat whose last message may be the response."""

    refused = {**_Pooled.refused, "add_generation_prompt": (False,)}

    input: TextsOrIds | None = None
    add_special_tokens: bool | None = None
    messages: Messages | None = None
    task: Literal["token_classify", "classify"] = "token_classify"

    @model_validator(mode="after")
    def _one(self) -> "Pooling":
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected input or messages")
        # A text has the tokenizer's special tokens, a chat those of its template.
        if self.add_special_tokens not in (None, self.messages is None):
            raise ValueError("add_special_tokens is not supported by this server; leave it out")
        return self


class StreamOptions(_Request):
    include_usage: bool = False


class Extras(_Request):
    """What is asked of this package alone. ``watch``: to be told, in the stream, what becomes of every candidate, see ``watch``."""

    watch: bool = False


class Sampling(_Request):
    """What OpenAI's two ways to ask have in common.

    Beyond OpenAI's: ``effort`` (low, medium, high: 2, 8, 32; auto: as many as are needed), ``best_of`` or ``strategy`` has so many candidates decoded and
    one of them chosen; ``thinking_budget``; a list of temperatures, one a candidate; and vLLM's ``top_k``, ``min_p``,
    ``repetition_penalty``, ``min_tokens``. Temperature and top-p default to the published 0.6 and 0.95, ``max_tokens`` to
    what the model has positions for.
    """

    refused = {
        "prompt_logprobs": (), "length_penalty": (1,), "ignore_eos": (False,), "stop_token_ids": ([],), "bad_words": ([],),
        "allowed_token_ids": (), "use_beam_search": (False,), "truncate_prompt_tokens": (),
        "include_stop_str_in_output": (False,), "response_format": ({"type": "text"},), "structured_outputs": (),
        "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "modalities": (["text"],),
        "audio": (), "suffix": ("",), **_TEMPLATE,
    }  # fmt: skip

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: FiniteFloat | Several[FiniteFloat] | None = None
    top_p: FiniteFloat | None = None
    top_k: Annotated[int, AfterValidator(lambda value: 0 if value == -1 else value)] | None = None  # vLLM's -1: all
    min_p: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    logit_bias: LogitBias | None = None
    min_tokens: int | None = None
    stop: Literal[""] | StopText | StopTexts | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    effort: Literal["low", "medium", "high", "auto"] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    strategy: str | None = None
    thinking_budget: int | None = None
    reflective: Extras | None = None

    @property
    def watched(self) -> bool:
        """Whether the stream is to tell what becomes of every candidate."""
        return self.reflective is not None and self.reflective.watch

    @property
    def sampling(self) -> SamplingSettings:
        """What is said of it."""
        said = {name: getattr(self, name) for name in SamplingSettings.__annotations__}
        return SamplingSettings(**{name: value for name, value in said.items() if value is not None})

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop or ())

    @property
    def steered(self) -> bool:
        """Whether one of several candidates is asked for."""
        return any(value is not None for value in (self.effort, self.best_of, self.strategy))

    @property
    def alternatives(self) -> int | None:
        """Of how many tokens log-probabilities are asked for, beside that of the token that came; None: of none at all."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether the prompt is to be repeated."""
        return False

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _one_answer(self) -> "Sampling":
        if self.steered and (self.n or 1) > 1:
            raise ValueError(f"n={self.n}: best_of, effort and strategy choose one answer; leave n at 1")
        if self.watched and not self.stream:
            raise ValueError("reflective.watch: candidates are watched in a stream; ask for stream, true, too")
        return self


class ChatCompletion(Sampling):
    refused = {
        **Sampling.refused, "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
        "function_call": ("none", "auto"), "add_generation_prompt": (True,), "echo": (False,),
    }  # fmt: skip

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _with_logprobs(self) -> "ChatCompletion":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs}: ask for logprobs, true, too")
        return self

    @model_validator(mode="before")
    @classmethod
    def _uncalled(cls, data: Any) -> Any:
        """Tools that must not be called ask for nothing."""
        if not isinstance(data, dict):
            return data
        choices = {"tools": "tool_choice", "functions": "function_call"}
        idle = {tools for tools, choice in choices.items() if data.get(choice) == "none"}
        return {name: value for name, value in data.items() if name not in idle}


class Completion(Sampling):
    """``max_tokens`` 0 with ``echo`` gives the prompt back, with its log-probabilities."""

    refused = {**Sampling.refused, "top_logprobs": (0,)}

    prompt: TextsOrIds
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[Alternatives | None, BeforeValidator(lambda value: None if value is False else value)] = None
    echo: bool | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @model_validator(mode="after")
    def _something(self) -> "Completion":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0: should be greater than or equal to 1, unless with echo, true")
        return self
