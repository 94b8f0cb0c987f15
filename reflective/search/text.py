"""What the search reads in a response's text: where thinking ends, the answer, whether the response is complete."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..utils.patterns import search

TAIL = 24  # tokens decoded to look for a response's end; no pattern in use spans more


class Tokenizer(Protocol):
    """What of a transformers tokenizer is used."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


@dataclass(frozen=True)
class Reader:
    """Reads the responses of one checkpoint.

    Attributes:
        tokenizer: of the model.
        think_start, think_end: ids of ``<think>`` and ``</think>``, where the vocabulary has them.
        end_thinking: text that is written to end thinking; None: ``</think>``.
        stop: regular expression that ends a response; None: only the end-of-sequence token does.
        pattern: regular expression whose first group is the answer; None: no answers are read.
    """

    tokenizer: Tokenizer
    think_start: int | None = None
    think_end: int | None = None
    end_thinking: str | None = None
    stop: str | None = None
    pattern: str | None = None

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of ``tokens``; ``special``: with that of special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def ends(self, tokens: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Where in the decoded text each step-token ends. Decodes two steps at a time: a token's text depends on its
        neighbours, but decoding every prefix anew would take seconds for a thousand steps."""
        ends, length, anchor, last = [], 0, 0, 0
        for step in steps:
            length += len(self.decode(tokens[anchor : step + 1])) - len(self.decode(tokens[anchor:last]))
            ends.append(length)
            anchor, last = last, step + 1
        return ends

    def answer(self, text: str) -> str | None:
        """What the pattern finds in a response, or behind its ``</think>`` if it has one."""
        if self.pattern is None:
            return None
        text = text if self.think_end is None else text.rpartition(self.decode([self.think_end], special=True))[2]
        match = search(self.pattern, text)
        return match.group(1).strip() if match and match.group(1) is not None else None

    def thinking_end(self) -> list[int]:
        """The tokens that end thinking.

        Raises:
            ValueError: there is neither a text for it nor a ``</think>`` in the vocabulary.
        """
        if self.end_thinking:
            return self.tokenizer(self.end_thinking, add_special_tokens=False).input_ids
        if self.think_end is None:
            raise ValueError(
                "the tokenizer has no </think>; give think_end in reflective.json, a text that ends thinking"
            )
        return [self.think_end]

    def opens(self, prompt: Sequence[int]) -> tuple[bool, bool]:
        """Whether the thinking that a prompt opens lasts to its end, and whether it may be ended behind it."""
        last = {token: i for i, token in enumerate(prompt)}
        opened, closed = (last.get(tag, -1) for tag in (self.think_start, self.think_end))
        return opened > closed, closed <= opened


class Watch:
    """Whether responses to one question are complete.

    Args:
        stops: texts that end a response, beside the reader's pattern.
    """

    def __init__(self, reader: Reader, stops: Sequence[str] = ()) -> None:
        self.reader = reader
        self._stops = tuple(stops)  # looked for as they are: as a pattern the first search for one of 4,000 characters takes 14 s
        self._tail = max([TAIL, *map(len, stops)])  # tokens: at least one character each
        self._answer = reader.pattern

    def complete(self, tokens: Sequence[int], answer_from: int | None) -> bool:
        """Whether the newest text holds a stop or, where the checkpoint has no stop pattern, an answer with something behind it.

        Args:
            answer_from: where thinking ended in ``tokens``; None within it.
        """
        if self._stops or self.reader.stop:
            text = self.reader.decode(tokens[-self._tail :])
            if any(stop in text for stop in self._stops) or (self.reader.stop and search(self.reader.stop, text)):
                return True
        if self.reader.stop or not self._answer or answer_from is None:
            return False
        text = self.reader.decode(tokens[max(answer_from, len(tokens) - TAIL) :])
        found = search(self._answer, text)
        return bool(found) and found.end() < len(text)
