"""What training learns from: trajectories with outcomes, and the features of their steps where these were recorded."""

import itertools
import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..scoring.taps import Tap
from ..search.strategies.votes import answer_numbers
from ..tasks import Question
from ..utils.outputs import partial, replacing
from ..utils.records import Lines, form_of, open_file

Format = Literal["jsonl", "parquet"]


@dataclass
class Rollouts:
    """N different trajectories that a policy drew, each ``count`` times; M steps.

    Attributes:
        tokens: [T] int32, prompt and response of every trajectory, one behind the other.
        length, prompt_length: [N] int64, tokens of each, and how many of these are its prompt's.
        question: [N] int64, the question that was answered.
        outcome: [N] float32, 1 correct, 0 incorrect, NaN without a verdict.
        answer: [N] int64, equal numbers for equal answers to one question, -1 where none was given.
        count: [N] int64, how often it was drawn.
        features: [M, K], the states that a head reads, of H values for each layer; None where none were recorded.
        trajectory, position: [M] int64, owner of each step, ascending, and its step-token's place in the owner's tokens.
        tap: where the features were read; of several layers, a head may learn from some alone, see ``read``. None: not known,
            as in files of before there were taps.
        model: name of the model whose states they are; None: not known.
    """

    tokens: Tensor
    length: Tensor
    prompt_length: Tensor
    question: Tensor
    outcome: Tensor
    answer: Tensor
    count: Tensor
    features: Tensor | None = None
    trajectory: Tensor | None = None
    position: Tensor | None = None
    tap: Tap | None = None
    model: str | None = None

    def __len__(self) -> int:
        return len(self.length)

    @cached_property
    def _end(self) -> Tensor:
        """[N] int64, where each trajectory's tokens end."""
        return self.length.cumsum(0)

    def ids(self, i: int) -> Tensor:
        """Prompt and response of trajectory ``i``, [T_i] int32."""
        end = int(self._end[i])
        return self.tokens[end - int(self.length[i]) : end]

    def padded(self, rows: Tensor | Sequence[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """Trajectories ``rows`` [B] as ``(ids, attention_mask, prompt_lengths)``: [B, T], [B, T] and [B] int64, padded at the
        right with ``pad``; T is the longest one's length."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        length = self.length[rows]
        column = torch.arange(int(length.max()) if len(rows) else 0)
        real = column < length[:, None]  # [B, T]
        place = (self._end[rows] - length)[:, None] + column
        ids = torch.where(real, self.tokens[place.clamp_max(len(self.tokens) - 1)].long(), pad)
        return ids, real.long(), self.prompt_length[rows]

    def select(self, keep: Tensor) -> "Rollouts":
        """The trajectories where ``keep`` [N] is True."""
        chosen = {name: getattr(self, name)[keep] for name in _PER_TRAJECTORY}
        chosen["tokens"] = self.tokens[keep.repeat_interleave(self.length)]
        if self.trajectory is not None:
            steps = keep[self.trajectory]
            chosen |= {n: getattr(self, n)[steps] for n in ("features", "position") if getattr(self, n) is not None}
            chosen["trajectory"] = (keep.cumsum(0) - 1)[self.trajectory[steps]]
        return replace(self, **chosen)

    def read(self, tap: Tap) -> "Rollouts":
        """The same with the features that a head at ``tap`` reads: of the layers that were recorded those that it names, in its
        order. Rollouts of which it is not known what was recorded are returned as they are.

        Raises:
            ValueError: one of them was not recorded, or was with another ``norm`` or ``at``.
        """
        if self.features is None or self.tap is None or tap == self.tap:
            return self
        if not set(tap.layers) <= set(self.tap.layers) or replace(tap, layers=self.tap.layers) != self.tap:
            raise ValueError(f"rollouts: features of {self.tap}, and the head reads {tap}; record them with that tap")
        size = self.features.shape[1] // len(self.tap.layers)
        places = [self.tap.layers.index(layer) for layer in tap.layers]
        parts = [self.features[:, place * size : (place + 1) * size] for place in places]
        return replace(self, features=torch.cat(parts, 1), tap=tap)

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """The fields that are tensors, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _SAID}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, ``tap`` and ``model`` as its metadata.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {k: v.contiguous() for k, v in self.tensors.items() if v is not None}
        said = {"tap": self.tap and json.dumps(self.tap.to_dict()), "model": self.model}
        with replacing(path, what="path"):  # by its name: as bytes, features would be in memory twice
            try:
                safetensors.torch.save_file(tensors, partial(path), {k: v for k, v in said.items() if v} or None)
            except safetensors.SafetensorError as error:
                raise OSError(f"path: {path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Rollouts":
        """What ``save`` wrote; files of before there were taps say nothing of theirs."""
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
        tap = Tap.from_dict(json.loads(said["tap"])) if "tap" in said else None
        return cls(**safetensors.torch.load_file(path), tap=tap, model=said.get("model"))

    @classmethod
    def join(cls, parts: Sequence["Rollouts"]) -> "Rollouts":
        """One behind the other. ``features`` are kept where all parts have them.

        Raises:
            ValueError: features of different taps.
        """
        kept = [name for name in parts[0].tensors if all(getattr(p, name) is not None for p in parts)]
        said: dict[str, Any] = {}
        for name in _SAID:
            found = {value for value in (getattr(p, name) for p in parts) if value is not None}
            if len(found) > 1 and name == "tap" and "features" in kept:
                raise ValueError(f"parts: features of {' and of '.join(map(str, found))}; record them all with one tap")
            said[name] = found.pop() if len(found) == 1 else None
        joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in kept}
        if "trajectory" in joined:
            shift = torch.tensor([0, *(len(p) for p in parts)]).cumsum(0).tolist()
            joined["trajectory"] = torch.cat([p.trajectory + s for p, s in zip(parts, shift, strict=False)])
        return cls(**joined, **said)


_SAID = ("tap", "model")  # of the features, in words
_PER_TRAJECTORY = ("length", "prompt_length", "question", "outcome", "answer", "count")


def question_weights(question: Tensor, outcome: Tensor, count: Tensor, *, within_questions: bool) -> Tensor:
    """Weight of each trajectory in the loss: ``count`` over its mean, or balanced within questions.

    Balanced, each outcome's trajectories share half of their question's draws, and a question with one outcome only weighs
    nothing: what is learnt cannot be how hard a question is.

    Args:
        question, count: [N] int64, as in ``Rollouts``; outcome: [N] in [0, 1], NaN without a verdict.

    Returns:
        [N] float32.
    """
    count, judged = count.float(), ~outcome.isnan()
    if not within_questions:
        return count / count.mean()
    distinct, question = question.unique(return_inverse=True)
    none = torch.zeros(len(distinct), device=count.device)
    right = none.index_add(0, question, count * (judged & (outcome > 0.5)))
    wrong = none.index_add(0, question, count * (judged & (outcome < 0.5)))
    side = torch.where(outcome > 0.5, right[question], wrong[question])
    both = judged & ((right > 0) & (wrong > 0))[question]
    weight = torch.where(both, count * (right + wrong)[question] / (2 * side), 0.0)
    return weight / count.mean()


def split_questions(rollouts: Rollouts, fraction: float, seed: int = 0) -> tuple[Rollouts, Rollouts]:
    """Two parts without a common question, the first with ``fraction`` of the questions, at least one in each.

    Raises:
        ValueError: a fraction outside (0, 1), or fewer than two questions.
    """
    questions = rollouts.question.unique()
    if not 0 < fraction < 1 or len(questions) < 2:
        raise ValueError(
            f"cannot split {len(questions)} questions at fraction={fraction}; expected two, and 0 < fraction < 1"
        )
    first = min(max(round(fraction * len(questions)), 1), len(questions) - 1)
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
    chosen = torch.isin(rollouts.question, questions[order[:first]])
    return rollouts.select(chosen), rollouts.select(~chosen)


def read_rollouts(path: str | Path, tokenizer: PreTrainedTokenizerBase, *, format: Format | None = None) -> Rollouts:
    """Trajectories from a file of JSON or parquet, one draw or ``count`` draws a record; equal ones are counted together.

    ====================  =====================================================================================
    ``prompt``            text, or a conversation ``[{"role", "content"}, ...]`` for the tokenizer's chat template
    ``response``          text
    ``outcome``           1 or true correct, 0 or false incorrect, null or NaN without a verdict
    ``question``          what the records of one question have in common; by default the prompt
    ``answer``            the answer given, text or number; null for none
    ``count``             how often the response was drawn, 1 by default
    ``prompt_ids``        token ids, in place of the texts and never tokenised again
    ``response_ids``
    ====================  =====================================================================================

    Prompt and response are tokenised apart, as they were when the response was decoded. A prompt gets the tokenizer's
    special tokens unless a chat template made it or it begins with the beginning-of-sequence token.

    Args:
        format: of the file; None goes by what it holds.

    Raises:
        ValueError: a record that is not of this form, or equal trajectories whose outcomes differ, by its line; no record.
    """
    read = [_Record.read(where, record, tokenizer) for where, record in _records(path, format)]
    if not read:
        raise ValueError(f"{path}: no record")
    ids = _encode(tokenizer, itertools.chain.from_iterable((r.prompt, r.response) for r in read))
    questions: dict[Hashable, int] = {}
    merged: dict[tuple[Hashable, ...], _Record] = {}
    for r in read:
        r.prompt, r.response = (ids.get(part, part) for part in (r.prompt, r.response))
        if not r.prompt:
            raise ValueError(f"{r.where}: the prompt is empty")
        r.question = questions.setdefault(r.prompt if r.question is None else r.question, len(questions))
        first = merged.setdefault((r.question, r.prompt, r.response), r)
        if first is not r:
            if first.outcome != r.outcome:
                raise ValueError(
                    f"{r.where}: outcome {r.outcome}, but {first.outcome} for the same response in {first.where}"
                )
            first.count += r.count
    rows = list(merged.values())
    return Rollouts(
        tokens=torch.tensor([t for r in rows for t in (*r.prompt, *r.response)], dtype=torch.int32),
        length=torch.tensor([len(r.prompt) + len(r.response) for r in rows]),
        prompt_length=torch.tensor([len(r.prompt) for r in rows]),
        question=torch.tensor([r.question for r in rows]),
        outcome=torch.tensor([math.nan if r.outcome is None else r.outcome for r in rows], dtype=torch.float32),
        answer=torch.tensor(answer_numbers([r.question for r in rows], [r.answer for r in rows])),
        count=torch.tensor([r.count for r in rows]),
    )


def write_rollouts(rollouts: Rollouts, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what ``read_rollouts`` reads, features left out; JSON or parquet by the suffix, see ``utils.records.form_of``.

    Texts hold their special tokens, and the token ids lie beside them. The file appears when it is complete.

    Raises:
        ValueError: a suffix of another form. OSError: ``path`` cannot be written.
    """
    path = Path(path)
    form, _ = form_of(path)
    halves = [(ids[:k].tolist(), ids[k:].tolist()) for ids, k in zip(
        rollouts.tokens.split(rollouts.length.tolist()), rollouts.prompt_length.tolist(), strict=True
    )]  # fmt: skip

    def texts(side: int) -> list[str]:
        return [
            tokenizer.decode(h[side], skip_special_tokens=False, clean_up_tokenization_spaces=False) for h in halves
        ]

    columns = {
        "question": rollouts.question.tolist(),
        "prompt": texts(0),
        "response": texts(1),
        "outcome": [None if math.isnan(y) else int(y) for y in rollouts.outcome.tolist()],
        "answer": [None if a < 0 else a for a in rollouts.answer.tolist()],
        "count": rollouts.count.tolist(),
        "prompt_ids": [h[0] for h in halves],
        "response_ids": [h[1] for h in halves],
    }
    with replacing(path, what="path") as file:
        if form != "parquet":
            with Lines(file, path) as lines:
                for values in zip(*columns.values(), strict=True):
                    lines.write(dict(zip(columns, values, strict=True)))
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole, text = pa.int64(), pa.string()
        types = [whole, text, text, pa.int8(), whole, whole, pa.list_(pa.int32()), pa.list_(pa.int32())]
        pq.write_table(pa.table(columns, schema=pa.schema(list(zip(columns, types, strict=True)))), file)


def read_questions(path: str | Path, *, format: Format | None = None) -> Iterator[Question]:
    """Questions from a file of JSON or parquet with an ``answer`` and a ``question``, ``prompt`` or ``problem``: a text, or a
    conversation of one user message. Each keeps its record as ``entry``.

    Raises:
        ValueError: a record that is not of this form, by its line.
    """
    for where, record in _records(path, format):
        text = next((record[k] for k in ("question", "prompt", "problem") if record.get(k) is not None), None)
        if _is_chat(text) and [m["role"] for m in text] == ["user"]:
            text = text[0]["content"]
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: expected a question, prompt or problem: a text, or one user message")
        answer = _answer(where, record)
        if answer is None:
            raise ValueError(f"{where}: no answer")
        yield Question(text, answer, record)


_Ids = tuple[int, ...]
_Text = tuple[str, bool]  # and whether it gets special tokens


@dataclass
class _Record:
    """A line of a file of rollouts. ``where``: its place; ``outcome`` None: no verdict; ``question`` None: its prompt."""

    where: str
    prompt: _Ids | _Text
    response: _Ids | _Text
    question: Hashable
    outcome: int | None
    answer: str | None
    count: int

    @classmethod
    def read(cls, where: str, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> "_Record":
        prompt, response = (_ids(where, record, side) for side in ("prompt_ids", "response_ids"))
        if prompt is None:
            prompt = _prompt(where, record.get("prompt"), tokenizer)
        if response is None:
            if not isinstance(record.get("response"), str):
                raise ValueError(f"{where}: response={record.get('response')!r}; expected a text, or response_ids")
            response = record["response"], False
        outcome, count = record.get("outcome", "missing"), record.get("count", 1)
        if isinstance(outcome, float) and math.isnan(outcome):
            outcome = None
        if outcome is not None and outcome not in (0, 1):
            raise ValueError(f"{where}: outcome={outcome!r}; expected 0, 1, true, false, or null for no verdict")
        if type(count) is not int or count < 1:
            raise ValueError(f"{where}: count={count!r}; expected an integer of at least 1")
        question = record.get("question")
        return cls(
            where, prompt, response,
            question=question if question is None else json.dumps(question, sort_keys=True, default=str),
            outcome=None if outcome is None else int(outcome), answer=_answer(where, record), count=count,
        )  # fmt: skip


def _records(path: str | Path, format: Format | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(its place, record)`` of every record; blank lines are none."""
    file = open_file(path, "path", format)
    for record in file.records():
        where = f"{path}, {file.row} {record.number}"
        if record.fault:
            raise ValueError(f"{where}: {record.fault}")
        yield where, record.fields


def _ids(where: str, record: dict[str, Any], name: str) -> _Ids | None:
    ids = record.get(name)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{where}: {name} is no list of token ids")
    return tuple(ids)


def _prompt(where: str, prompt: Any, tokenizer: PreTrainedTokenizerBase) -> _Text:
    if _is_chat(prompt):
        answered = prompt[-1]["role"] == "assistant"  # the response goes on from there
        text = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=not answered, continue_final_message=answered
        )
        return text, False
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{where}: prompt={prompt!r}; expected a text or a list of messages, or prompt_ids")
    return prompt, tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )


def _answer(where: str, record: dict[str, Any]) -> str | None:
    answer = record.get("answer")
    if answer is not None and not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: answer={answer!r}; expected a text or a number")
    return None if answer is None else str(answer).strip() or None


def _encode(tokenizer: Callable[..., Any], parts: Iterable[_Ids | _Text]) -> dict[_Text, _Ids]:
    """Token ids of every different text among ``parts``."""
    wanted = dict.fromkeys(p for p in parts if p and isinstance(p[0], str))
    found = {}
    for special in (False, True):
        texts = [p for p in wanted if p[1] == special]
        if texts:
            encoded = tokenizer([text for text, _ in texts], add_special_tokens=special).input_ids
            found |= zip(texts, map(tuple, encoded), strict=True)
    return found
