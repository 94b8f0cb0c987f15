"""Questions, texts or conversations, and the prompts that they become."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..utils.arguments import brief, check_text
from ..utils.messages import asked, is_conversation

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PromptFormat:
    """Attributes: ``template``: text around a question, with ``{question}``; None: the tokenizer's chat template, if it has one."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None

    @property
    def _by_chat(self) -> bool:
        return self.template is None and self.tokenizer.chat_template is not None

    def text(self, chat: list[dict[str, Any]], name: str = "question", answered: bool = False) -> str:
        """The prompt for a conversation, see ``ReflectiveModel.format``."""
        if self._by_chat:
            from jinja2 import TemplateError

            try:
                return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=not answered)
            except (TemplateError, TypeError) as error:
                raise ValueError(f"{name}: the tokenizer's chat template refuses it: {error}") from error
        roles = [m["role"] for m in chat]
        if roles != ["user"]:
            raise ValueError(
                f"{name}: the roles of its messages are {roles}, but the checkpoint's prompt takes one question, of the user"
            )
        text = chat[0]["content"]
        return text if self.template is None else self.template.replace("{question}", text)

    def ids(self, text: str) -> Tensor:
        """A prompt as ids [1, T], see ``ReflectiveModel.encode``."""
        check_text("question", text)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self._by_chat).input_ids
        if not ids.shape[1]:
            raise ValueError("question: the prompt is empty; give at least one character")
        return ids


def with_behind(chat: Messages, text: str) -> Messages:
    """``chat`` with ``text`` behind what was said last."""
    *before, last = chat
    return [*before, {**last, "content": last["content"] + text}]


def asking_anew(ids: Callable[[str], list[int]], max_new_tokens: int, max_length: int | None) -> Callable[[str], list[int] | None]:
    """For ``Ask.again``: ``ids`` of the prompt with a text behind its question, as long as a model of ``max_length`` positions can answer it."""

    def again(text: str) -> list[int] | None:
        found = ids(text)
        return None if max_length is not None and len(found) + max_new_tokens > max_length else found

    return again


def seeds(seed: Any, questions: int) -> list[tuple[int, int]]:
    """Of every question the seed and the number that its candidates draw by: of one seed for all the numbers differ; with a seed
    of its own a question is answered as it would be alone.

    Raises:
        ValueError: ``seed`` is neither an integer nor one for each question.
    """
    if isinstance(seed, Integral):
        found = [(seed, i) for i in range(questions)]
    elif not isinstance(seed, str | bytes) and getattr(seed, "ndim", 1) and isinstance(seed, Iterable):
        found = [(s, 0) for s in seed]
    else:
        raise ValueError(f"seed={seed!r}: expected an integer, or a list of one for each question")
    if len(found) != questions:
        raise ValueError(f"seed: {len(found)} seeds for {questions} questions; give one, or one each")
    return found


def conversations(question: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """The questions, as conversations, and whether it is a single one.

    Raises:
        ValueError: anything else, or an empty one.
    """
    single = isinstance(question, str) or is_conversation(question)
    if not single and (isinstance(question, bytes | Mapping) or not isinstance(question, Iterable)):
        raise ValueError(f"question={brief(question)}: expected a text, a list of messages, or a list of these")
    questions = []
    for i, q in enumerate([question] if single else question):
        name = "question" if single else f"question[{i}]"
        if not isinstance(q, str) and not is_conversation(q):
            raise ValueError(f"{name}={brief(q)}: expected a text or a list of messages, each with role and content")
        questions.append(asked(q, name))
        if not "".join(m["content"] for m in questions[-1]).strip():
            raise ValueError(f"{name}: it is empty")
    return questions, single


def text_list(name: str, given: Any, *, empty: bool = False) -> list[str]:
    """``given``, a list of texts.

    Raises:
        ValueError: none, or one of them is no text or, unless they may be, ``empty``.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{name}={brief(given)}: expected a list of texts")  # noqa: TRY004
    texts = list(given)
    for i, text in enumerate(texts):
        check_text(f"{name}[{i}]", text)
        if not text and not empty:
            raise ValueError(f"{name}[{i}]: it is empty; expected at least one character")
    return texts
