"""Step-tokens: where reasoning steps end, for any tokenizer, compiled into one automaton over token ids."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layout import END, NEXT_STATE, STEP, THINK
from ..utils.arguments import one_of
from .ops import op
from .vocabulary import read_vocabulary, token_bytes  # noqa: F401

RULES = ("exact", "contains", "text", "zh")
_ZH_MARKS = ("\n", "。")

Consecutive = Literal["first", "all"]



class StepTokens:
    """``state, flags = transition[token_class[id], state]``: which tokens are step-tokens, and the two think tags.

    ``token_class`` is int32 [V], ``transition`` int32 [n_classes, n_states] with entries as in ``kernels/layout.py``.
    State 0 is the text's start, class 0 an ordinary token of no meaning to the rule. The tables are shared between
    copies and never written to.

    Args:
        step_ids: ids of the step-tokens. Of a run of them the first counts; one directly after think-start does not.
        think_start_id: id of ``<think>``, not a step-token; None if there is none.
        think_end_id: id of ``</think>``, possibly a step-token too; None if there is none.
        vocab_size: V. By default the largest of these ids plus one; see ``resized``.
        consecutive: ``"first"``: of a run of step-tokens the first counts, as published; ``"all"``: each does, also directly after
            think-start.

    Attributes:
        rule: the rule of ``from_tokenizer``; None for tokens given by hand.
        delimiters: the texts that end a step; empty for tokens given by hand.
        step_ids: sorted ids; None for rule ``"text"``, where whether a token ends a step depends on those before it.

    Raises:
        ValueError: no step ids, an id outside [0, V), think-start among the step ids or equal to think-end.
    """

    def __init__(
        self,
        step_ids: Iterable[int],
        think_start_id: int | None = None,
        think_end_id: int | None = None,
        *,
        vocab_size: int | None = None,
        consecutive: Consecutive = "first",
    ) -> None:
        one_of("consecutive", consecutive, ("first", "all"))
        ids = sorted({int(i) for i in step_ids})
        if not ids:
            raise ValueError("step_ids is empty: give at least one token id")
        if think_start_id in ids:
            raise ValueError(f"think_start_id={think_start_id} is among step_ids: a think-start tag cannot end a step")
        if vocab_size is None:
            vocab_size = 1 + max(i for i in (*ids, think_start_id, think_end_id) if i is not None)
        _check_ids("step_ids", ids, vocab_size)
        if consecutive == "all":
            entries = np.zeros((vocab_size, 1), np.int32)
            entries[ids] = STEP
        else:
            entries = np.zeros((vocab_size, 2), np.int32)  # state 1: the token before was a step-token or think-start
            entries[ids] = STEP | 1, 1
        self._compile(entries, entries.shape[1] - 1, think_start_id, think_end_id)
        self.rule: str | None = None
        self.delimiters: tuple[str, ...] = ()
        self.step_ids: tuple[int, ...] | None = tuple(ids)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        rule: str = "contains",
        delimiter: str | Sequence[str] = ".\n\n",
        *,
        think_start_id: int | str | None = "auto",
        think_end_id: int | str | None = "auto",
        consecutive: Consecutive = "first",
    ) -> "StepTokens":
        r"""The step-tokens of a Hugging Face tokenizer.

        Args:
            tokenizer: a tokenizer of transformers, of any kind.
            rule: ``"exact"``: the one id that each delimiter encodes to. ``"contains"``: every vocabulary entry whose
                text contains a delimiter. ``"text"``: the token in which the last byte of a delimiter lies, however
                the tokenizer splits it; delimiters with only whitespace between them are one run, and special tokens
                have no text. ``"zh"``: every entry of at most 3 characters that contains ``\n`` or ``。`` and at most
                one character besides that.
            delimiter: one text or several; ``"zh"`` has its own.
            think_start_id, think_end_id: ``"auto"`` takes ``<think>`` and ``</think>`` where each is a vocabulary
                entry; None for no such tag.
            consecutive: as for the constructor; rule ``"text"`` knows runs only by their first.

        Raises:
            ValueError: unknown rule, empty delimiter, ``"exact"`` with a delimiter that is not one token,
                ``"contains"`` with one that no entry contains, a vocabulary without any step-token, one that cannot be
                read (see ``read_vocabulary``), and those of the constructor.
        """
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is not one of {', '.join(map(repr, RULES))}")
        delimiters = _ZH_MARKS if rule == "zh" else (delimiter,) if isinstance(delimiter, str) else tuple(delimiter)
        if not delimiters or not all(isinstance(d, str) and d for d in delimiters):
            raise ValueError(f"delimiter={delimiter!r} must be a non-empty text or several of them")
        vocabulary = read_vocabulary(tokenizer)
        start = vocabulary.ids.get("<think>") if think_start_id == "auto" else think_start_id
        end = vocabulary.ids.get("</think>") if think_end_id == "auto" else think_end_id
        tokens = vocabulary.texts
        split = [d for d in delimiters if not d.isascii()]
        if rule == "text" and split and vocabulary.unclear:
            raise ValueError(
                f'rule="text": delimiter {split[0]!r} may be split between tokens, and {type(tokenizer).__name__} shows '
                f"the part of a character that {len(vocabulary.unclear)} of its tokens are, such as "
                f"{vocabulary.unclear[0]}, as U+FFFD only; give the model's fast tokenizer (tokenizer.json), a delimiter "
                'in ASCII, or rule="contains"'
            )
        if rule == "text":
            if consecutive != "first":
                raise ValueError(f'consecutive={consecutive!r}: rule="text" knows runs only by their first; take another rule')
            steps = cls.__new__(cls)
            entries, after_think = _text_entries(tokens, [d.encode() for d in delimiters])
            if not (entries & STEP).any():
                raise ValueError(f'rule="text": no entry of the vocabulary ends {" or ".join(map(repr, delimiters))}')
            steps._compile(entries, after_think, start, end)
            steps.step_ids = None
        else:
            ids = _ids_of_rule(tokenizer, tokens, rule, delimiters)
            steps = cls(ids, start, end, vocab_size=len(tokens), consecutive=consecutive)
        steps.rule, steps.delimiters = rule, delimiters
        return steps

    @classmethod
    def every(cls, vocab_size: int, but: Iterable[int] = ()) -> "StepTokens":
        """Every token of [0, ``vocab_size``) is a step-token that counts, wherever it lies, but for the ids ``but``.

        Raises:
            ValueError: no other is left.
        """
        out = set(but)
        return cls((i for i in range(vocab_size) if i not in out), vocab_size=vocab_size, consecutive="all")

    def _compile(
        self, entries: np.ndarray, after_think: int, think_start_id: int | None, think_end_id: int | None
    ) -> None:
        """Sets the tables from ``entries`` [V, n_states], one row a token, and from the tags."""
        for name, tag in (("think_start_id", think_start_id), ("think_end_id", think_end_id)):
            if tag is not None:
                _check_ids(name, [tag], len(entries))
        if think_end_id is not None:
            if think_end_id == think_start_id:
                raise ValueError(f"think_start_id and think_end_id are both {think_end_id}: they must differ")
            entries[think_end_id] |= END
        if think_start_id is not None:
            entries[think_start_id] = THINK | after_think
        # One opaque item a row: for 151,648 rows of 15 that is 8 ms, np.unique(axis=0) takes 101. The row of zeros put
        # before them sorts first, so that class 0 is an ordinary token in every table.
        rows = np.vstack([np.zeros_like(entries[:1]), entries])
        items = rows.view(f"V{rows.itemsize * rows.shape[1]}").ravel()
        _, first, inverse = np.unique(items, return_index=True, return_inverse=True)
        self.transition = torch.from_numpy(rows[first])
        self.token_class = torch.from_numpy(inverse[1:].astype(np.int32))
        self.think_start_id, self.think_end_id = think_start_id, think_end_id

    @property
    def vocab_size(self) -> int:
        """V, the number of ids that the tables cover."""
        return self.token_class.numel()

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.token_class.device

    def __repr__(self) -> str:
        if self.step_ids is None:
            ids = ""
        elif len(self.step_ids) <= 8:
            ids = f"step_ids={list(self.step_ids)}, "
        else:
            ids = f"step_ids=[{', '.join(map(str, self.step_ids[:6]))}, ...] ({len(self.step_ids)} ids), "
        rule = "" if self.rule is None else f"rule={self.rule!r}, delimiters={list(self.delimiters)}, "
        classes, states = self.transition.shape
        return (
            f"StepTokens({rule}{ids}think_start_id={self.think_start_id}, think_end_id={self.think_end_id}, "
            f"vocab_size={self.vocab_size}, classes={classes}, states={states}, device={str(self.device)!r})"
        )

    def to(self, device: torch.device | str) -> "StepTokens":
        """A copy with its tables on ``device``."""
        moved = copy.copy(self)
        moved.token_class, moved.transition = self.token_class.to(device), self.transition.to(device)
        return moved

    def resized(self, vocab_size: int) -> "StepTokens":
        """A copy for ids in [0, ``vocab_size``), as kernels index tables unchecked; new ids are ordinary tokens.

        Raises:
            ValueError: an id with a meaning to the rule would be cut off.
        """
        self._check_covered(vocab_size)
        other = copy.copy(self)
        other.token_class = F.pad(self.token_class, (0, vocab_size - self.vocab_size))
        return other

    def check_model(self, vocab_size: int) -> None:
        """Whether a model with ``vocab_size`` token ids can go with the tokenizer that these step-tokens are from.

        Models often pad their vocabulary, and tokenizers carry entries that no model was trained on, so the sizes may
        differ: by 1,024 or a tenth, whichever is more.

        Raises:
            ValueError: the model lacks an id with a meaning to the rule, or the sizes are further apart.
        """
        self._check_covered(vocab_size)
        if self.rule is not None and abs(vocab_size - self.vocab_size) > max(1024, vocab_size / 10):
            raise ValueError(
                f"tokenizer and model differ: the tokenizer has {self.vocab_size} entries, the model's vocabulary "
                f"{vocab_size}; build StepTokens from the model's own tokenizer"
            )

    def _check_covered(self, vocab_size: int) -> None:
        last = int(self.token_class.nonzero().max())
        if last >= vocab_size:
            raise ValueError(
                f"tokenizer and model differ: token id {last} is outside a vocabulary of {vocab_size}; "
                "build StepTokens from the model's own tokenizer"
            )

    def mask(
        self,
        input_ids: Tensor | Sequence,
        attention_mask: Tensor | Sequence | None = None,
        prompt_lengths: Tensor | Sequence[int] | int | None = None,
    ) -> Tensor:
        """True at the step-tokens that count: ``a + 2 <= t <= e`` and ``t >= prompt_lengths``, see ``step_mask``.

        Args:
            input_ids: integer [B, T], or [T] for a batch of one. Ids under padding are not looked at.
            attention_mask: [B, T] (or [T]), zero at padding on the left, the right or both; None for no padding.
            prompt_lengths: tokens of the prompt, padding not counted: one number or [B]; None for the whole text.

        Returns:
            bool [B, T] on the device of ``input_ids``.

        Raises:
            ValueError: an empty batch or row, a hole in ``attention_mask``, an id outside [0, V), a prompt longer than
                its text, wrong shapes or dtypes.
        """
        ids = integers("input_ids", input_ids)
        if ids.dim() == 1:
            ids = ids[None]
        if ids.dim() != 2:
            raise ValueError(f"input_ids has shape {list(ids.shape)}: give [B, T] or [T]")
        pad, length = padding(attention_mask, ids.shape, ids.device)
        column = torch.arange(ids.shape[1], device=ids.device)
        real = (column >= pad[:, None]) & (column < length[:, None])  # [B, T]
        outside = (real & ((ids < 0) | (ids >= self.vocab_size))).nonzero()
        if len(outside):
            row, at = outside[0].tolist()
            raise ValueError(
                f"input_ids[{row}, {at}] = {int(ids[row, at])} is outside [0, {self.vocab_size}): use the tokenizer "
                "of these step-tokens, resized() for a model with a larger vocabulary, attention_mask for padding"
            )
        start = pad
        if prompt_lengths is not None:
            prompt = integers("prompt_lengths", prompt_lengths).to(ids.device)
            if prompt.shape not in ((), (1,), pad.shape):
                raise ValueError(f"prompt_lengths has shape {list(prompt.shape)}: give one number or [{len(pad)}]")
            prompt = prompt.expand_as(pad)
            wrong = ((prompt < 0) | (prompt > length - pad)).nonzero()
            if len(wrong):
                row = int(wrong[0])
                raise ValueError(
                    f"prompt_lengths of row {row} is {int(prompt[row])}, its text has {int((length - pad)[row])} "
                    "tokens; count the prompt's tokens, without padding"
                )
            start = pad + prompt
        token_class, transition = self.token_class.to(ids.device), self.transition.to(ids.device)
        return op.step_mask(ids.masked_fill(~real, 0), token_class, transition, pad, length, start)


def padding(
    attention_mask: Tensor | Sequence | None, shape: Sequence[int], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """``(pad, length)``, int64 [B]: the column of each row's first token, and the column after its last.

    Args:
        attention_mask: [B, T] (or [T]), zero at padding; None for no padding.
        shape: (B, T).
        device: where the results go.

    Raises:
        ValueError: an empty batch, a row without a token, a mask of another shape or with a hole in a row.
    """
    B, T = shape
    if B == 0 or T == 0:
        raise ValueError(f"input_ids has shape [{B}, {T}]: give at least one row of at least one token")
    if attention_mask is None:
        return torch.zeros(B, dtype=torch.int64, device=device), torch.full((B,), T, dtype=torch.int64, device=device)
    mask = torch.as_tensor(attention_mask, device=device) != 0
    if mask.dim() == 1:
        mask = mask[None]
    if mask.shape != (B, T):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids [{B}, {T}]: they must be the same")
    pad = mask.int().argmax(1)
    length = T - mask.flip(1).int().argmax(1)
    n_tokens = mask.sum(1)
    for message, rows in (
        ("is all padding: leave the row out", n_tokens == 0),
        ("has padding between its tokens: pad on the left or the right only", length - pad != n_tokens),
    ):
        if rows.any():
            raise ValueError(f"attention_mask row {int(rows.nonzero()[0])} {message}")
    return pad, length


def _ids_of_rule(tokenizer: Any, tokens: Sequence[bytes | None], rule: str, delimiters: Sequence[str]) -> list[int]:
    """The step-tokens of the rules that look at one token at a time."""
    if rule == "exact":
        return [_only_id(tokenizer, tokens, delimiter) for delimiter in delimiters]

    def is_step(text: str, mark: str) -> bool:
        return mark in text and (rule == "contains" or (len(text) <= 3 and len(text.replace(mark, "")) <= 1))

    texts = [(i, token.decode(errors="replace")) for i, token in enumerate(tokens) if token]
    ids = {mark: [i for i, text in texts if is_step(text, mark)] for mark in delimiters}
    missing = [mark for mark in delimiters if not ids[mark]]
    if missing and (rule == "contains" or len(missing) == len(delimiters)):
        raise ValueError(
            f"rule={rule!r}: no entry of the vocabulary contains {' or '.join(map(repr, missing))}; "
            'rule="text" finds delimiters that the tokenizer splits'
        )
    return [i for mark in delimiters for i in ids[mark]]


def _only_id(tokenizer: Any, tokens: Sequence[bytes | None], delimiter: str) -> int:
    """The id of a delimiter that is one token; a ValueError that names the remedy otherwise."""
    try:
        ids = list(tokenizer.encode(delimiter, add_special_tokens=False))
    except Exception as error:
        raise ValueError(
            f'rule="exact": encode({delimiter!r}) of a {type(tokenizer).__name__} fails, {type(error).__name__}: {error}; '
            'use rule="text", which reads the vocabulary only'
        ) from error
    if len(ids) != 1:
        what = f"is {len(ids)} tokens here, {ids}"
    elif ids[0] == getattr(tokenizer, "unk_token_id", None):
        what = "is unknown to the tokenizer"
    # A tokenizer that drops whitespace encodes ".\n\n" as ".", and any sentence would end a step.
    elif (text := tokens[ids[0]]) is not None and delimiter.encode() not in text:
        what = f"becomes {text.decode(errors='replace')!r} here, token {ids[0]}"
    else:
        return ids[0]
    raise ValueError(
        f'rule="exact" needs a delimiter of one token: {delimiter!r} {what}; use rule="text", which finds it '
        "however the tokenizer splits it"
    )


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"{name}: id {i} is outside the vocabulary, [0, {vocab_size})")


def integers(name: str, value: Any) -> Tensor:
    """``value`` as an int64 tensor; ValueError, naming ``name``, for what holds no integers."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not one block of integers ({error}): pad rows to one length") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} has dtype {tensor.dtype}: give integers")
    return tensor.long()


_SUPPRESSED = 1  # state of the byte automaton when nothing but whitespace came since the last delimiter


def _text_entries(tokens: Sequence[bytes | None], delimiters: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """Rule ``"text"``: where each token leads from each state, and the state directly after think-start.

    A byte automaton, walked over every token's bytes at once, byte position by byte position. One more state than it
    has: a step that ends in the token directly after think-start does not count.

    Returns:
        int32 [V, n_states] as in ``transition``; the last state, which is the one after think-start.
    """
    following, ends_step = _byte_automaton(delimiters)  # [256, S] both
    n_states = following.shape[1]
    # Walked in doubled states, s + n_states once a step has ended in this token: one look-up a byte.
    table = np.hstack([following + n_states * ends_step, following + n_states]).astype(np.int32)

    sizes = np.array([len(token or b"") for token in tokens])
    order = np.argsort(-sizes, kind="stable")  # longest first: those with a byte left are the first n
    text = np.frombuffer(b"".join(token or b"" for token in tokens), np.uint8)
    offset = (np.cumsum(sizes) - sizes)[order]
    walk = np.tile(np.arange(n_states, dtype=np.int32), (len(tokens), 1))  # [V, S]
    for position in range(sizes.max(initial=0)):
        n = np.count_nonzero(sizes > position)
        walk[:n] = table[text[offset[:n] + position, None], walk[:n]]

    entries = np.empty((len(tokens), n_states + 1), np.int32)
    entries[order, :n_states] = np.where(walk < n_states, walk, (walk - n_states) | STEP)
    entries[:, n_states] = entries[:, _SUPPRESSED] & NEXT_STATE
    entries[[token is None for token in tokens]] = 0  # no text: breaks a match and is not whitespace
    return entries, n_states


def _byte_automaton(delimiters: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """``following[byte, state]`` and ``ends_step[byte, state]``: the search for delimiters in a stream of bytes.

    A state is ``(armed, tail)``. ``armed``: a delimiter starting now would count, as something other than whitespace
    came since the last one. ``tail``: the longest end of the bytes since then that may still become a delimiter or,
    where that matters, a whitespace character; bytes are judged when they leave it, so a delimiter's own never are.
    """
    heads = {delimiter[:n] for delimiter in delimiters for n in range(len(delimiter))}
    spaces = [char.encode() for char in map(chr, range(0x10000)) if char.isspace()]  # there are none beyond U+FFFF
    space_heads = heads.union(space[:n] for space in spaces for n in range(len(space)))

    def tail(text: bytes, heads: set[bytes]) -> bytes:
        return next(text[n:] for n in range(len(text) + 1) if text[n:] in heads)

    states = {(True, b""): 0, (False, b""): _SUPPRESSED}
    following, ends_step = [], []
    queue = list(states)
    for armed, kept in queue:
        rows = []
        for byte in range(256):
            text = kept + bytes([byte])
            found = max((d for d in delimiters if text.endswith(d)), key=len, default=b"")
            rest = b"" if found else tail(text, space_heads)
            armed_now = armed or not _is_blank(text[: len(text) - len(found or rest)])
            state = (False, b"") if found else (armed_now, tail(rest, heads) if armed_now else rest)
            if state not in states:
                states[state] = len(states)
                queue.append(state)
            rows.append((states[state], bool(found) and armed_now))
        next_states, ends = zip(*rows, strict=True)
        following.append(next_states)
        ends_step.append(ends)
    return np.array(following, np.int32).T, np.array(ends_step).T


def _is_blank(text: bytes) -> bool:
    try:
        return text == b"" or text.decode().isspace()
    except UnicodeDecodeError:
        return False
