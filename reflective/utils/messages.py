"""Conversations, ``{"role", "content"}`` each message, as those of OpenAI's clients and of chat templates."""

from collections.abc import Mapping, Sequence
from typing import Any

from .arguments import brief


def is_conversation(value: Any) -> bool:
    """Whether it is a list of messages; not whether these are good ones."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return listed and bool(value) and all(isinstance(m, Mapping) for m in value)


def text_of(content: Any, name: str) -> str:
    """The text of a message's ``content``: itself; of a list of parts the texts joined; of None, as the assistant's has that
    called a tool, none.

    Raises:
        ValueError: an image, or anything else that is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{name}: expected a text or a list of text parts, not {type(content).__name__}")  # noqa: TRY004
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{name}[{i}] is of type {kind!r}; text alone is read, so give parts of type 'text'")
    return "".join(part["text"] for part in content)


def asked(question: Any, name: str = "question") -> list[dict[str, Any]]:
    """The conversation that asks ``question``: of a text one message, of the user; else ``plain`` of its messages."""
    return [{"role": "user", "content": question}] if isinstance(question, str) else plain(question, name)


def plain(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """The messages with texts for contents, and what else they hold.

    Raises:
        ValueError: no list of messages, or one without a role or of which the content is no text, by its number.
    """
    if not is_conversation(messages):
        raise ValueError(f"{name}: expected a list of messages, each with role and content, not {brief(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{name}[{i}]: role={message.get('role')!r}; expected 'system', 'user' or 'assistant'")  # noqa: TRY004
        if "content" not in message and not message.get("tool_calls"):
            raise ValueError(f"{name}[{i}] has no content")
    return [{**m, "content": text_of(m.get("content"), f"{name}[{i}].content")} for i, m in enumerate(messages)]
