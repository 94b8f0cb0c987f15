"""TRL: the SPRM as a reward of GRPO and RLOO, and TRL's stepwise supervision from and to our rollouts.

    from reflective.integrations.trl import SPRMReward

    GRPOTrainer(model=policy, reward_funcs=SPRMReward(rf.ReflectiveModel.from_pretrained(path)), ...)

TRL asks for no base class, so this module does not import it. Written for trl 1.16.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engines.hf.finished import score
from ..engines.hf.generation import end_tokens
from ..model import ReflectiveModel
from ..scoring.scores import aggregate
from ..train.data import Rollouts
from ..utils.arguments import brief
from ..utils.messages import is_conversation, plain
from ..utils.outputs import replacing
from ..utils.records import Lines

_NO_IMAGES = (
    "SPRMReward reads text alone, and would score as if there were none; leave it out of the rewards of such a run"
)

# -- the reward --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SPRMReward:
    """``reward_i = aggregate(step scores of completion i)``, in [0, 1]; None where a hidden state was not finite.

    Scored are the ids that were sampled, behind the prompt's ids as the trainer makes them, by one forward of the truncated
    backbone, without gradient or dropout. What tools wrote into a completion counts as the policy's own. Text alone is scored:
    what follows an image cannot be.

    Args:
        model: the scorer. Made of the module that the trainer is given as ``model``, it scores by the policy of the moment:
            LoRA included, not under FSDP or DeepSpeed stage 3, which keep a part of the weights elsewhere. Any other model
            stays as it is, and has the policy's tokenizer.
        aggregation: see ``reflective.scoring.scores.aggregate``.
        chat_template_kwargs: with which conversational prompts are rendered: those of the trainer's settings, and its ``tools``
            if it has any.
        batch_tokens: padded tokens a forward.

    Raises:
        ValueError: unknown aggregation. When called: no ``completion_ids``; completions of another tokenizer; prompts that
            are neither texts nor conversations, or with images; a head that does not fit.
    """

    model: ReflectiveModel
    aggregation: str = "geometric_mean"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_tokens: int = 16_384

    def __post_init__(self) -> None:
        aggregate([], self.aggregation)

    @property
    def __name__(self) -> str:
        """By which TRL logs the reward."""
        return f"sprm_{self.aggregation}"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        for name, given in (("completions", completions), ("completion_ids", completion_ids)):
            if given is None or len(given) != len(prompts):
                count = "none" if given is None else len(given)
                raise ValueError(f"{name}: {count} for {len(prompts)} prompts; TRL passes one each, of ids a list")
        for name in ("image", "images"):
            if any(image is not None and image != [] for image in columns.get(name) or ()):
                raise ValueError(f"{name}: {_NO_IMAGES}")
        if not len(prompts):
            return []
        responses = self.model.token_ids("completion_ids", completion_ids)
        self._check_tokenizer(completions, responses)
        known = self._prompt_ids(prompts)
        rewards: list[float | None] = [0.0] * len(prompts)
        there = [i for i, (p, r) in enumerate(zip(known, responses, strict=True)) if p or r]  # else there is no step
        if not there:
            return rewards
        with evaluating(self.model.model):
            scores = score(
                self.model.model, self.model.head, self.model.steps,
                [torch.tensor([*known[i], *responses[i]]) for i in there], at=self.model.config.at,
                prompt_lengths=[len(known[i]) for i in there], batch_tokens=self.batch_tokens,
            )  # fmt: skip
        for i, reward in zip(there, scores.aggregate(self.aggregation).tolist(), strict=True):
            rewards[i] = None if math.isnan(reward) else reward
        return rewards

    def _prompt_ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        """As ``_tokenize_prompts`` of TRL's trainers: a text with the tokenizer's special tokens, a conversation rendered."""
        tokenizer = self.model.tokenizer
        if all(isinstance(p, str) for p in prompts):
            return tokenizer(text=list(prompts))["input_ids"]
        for i, prompt in enumerate(prompts):
            if not is_conversation(prompt):
                raise ValueError(
                    f"prompts[{i}]={brief(prompt)}: expected texts, or conversations of role and content, all of one kind"
                )
            for j, message in enumerate(prompt):
                parts = message.get("content")
                for part in parts if isinstance(parts, list) else ():
                    if not isinstance(part, Mapping) or part.get("type") != "text":
                        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                        raise ValueError(f"prompts[{i}][{j}].content holds a part of type {kind!r}: {_NO_IMAGES}")
        if tokenizer.chat_template is None:
            raise ValueError(
                "prompts: they are conversations, and the scorer's tokenizer has no chat template; set one"
            )
        from jinja2 import TemplateError

        def rendered(conversations: list[Any]) -> list[list[int]]:
            return tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
            )["input_ids"]

        try:
            return rendered(list(prompts))  # as the trainer does, whatever a template makes of parts or of no content
        except (TemplateError, TypeError):
            texts = [plain(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        try:
            return rendered(texts)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"prompts: the tokenizer's chat template refuses them: {error}") from error

    def _check_tokenizer(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> None:
        """Another tokenizer's ids would be scored as if they were ours, and nothing would tell."""
        first = next((i for i, text in enumerate(completions) if isinstance(text, str) and text), None)
        if first is None:
            return
        theirs, ours = completions[first], self.model.tokenizer.decode(completion_ids[first], skip_special_tokens=True)
        if ours != theirs:
            raise ValueError(
                f"completion_ids: the scorer's tokenizer reads them as {ours[:40]!r}, the trainer's as {theirs[:40]!r}; "
                "score with a model that has the policy's tokenizer"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, every module of ``model`` is in evaluation mode; afterwards each is in the mode that it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# -- stepwise supervision ----------------------------------------------------------------------------------------------


def to_stepwise(rollouts: Rollouts, model: ReflectiveModel) -> Iterator[dict[str, Any]]:
    """Records of TRL's stepwise supervision: ``{"prompt": text, "completions": [text a step], "labels": [bool a step]}``.

    The steps are those that ``rf.score`` counts, each with its delimiter, so that together they are the response: train with
    ``PRMConfig(step_separator="")``. Text behind the last step is a step more; the end-of-sequence token is left out. The
    label of every step is its trajectory's outcome, for there is no other verdict. A trajectory drawn several times comes as
    often; one without a verdict, or without text, does not come. A beginning-of-sequence token that the tokenizer puts
    before every text is left out: ``PRMTrainer`` puts it there too.

    Args:
        model: its tokenizer and its step-tokens are those of the rollouts.
    """
    ends, bos = end_tokens(model.model, model.tokenizer), model.tokenizer.bos_token_id
    adds_bos = bos is not None and model.tokenizer("a").input_ids[0] == bos
    for i in range(len(rollouts)):
        outcome, n = float(rollouts.outcome[i]), int(rollouts.prompt_length[i])
        ids = rollouts.ids(i).tolist()
        while len(ids) > n and ids[-1] in ends:
            ids.pop()
        if math.isnan(outcome) or len(ids) == n:
            continue
        prompt, response = ids[:n], ids[n:]
        steps = [t + 1 for t in _steps(model, prompt, response)]
        completions = _pieces(model, response, steps if steps[-1:] == [len(response)] else [*steps, len(response)])
        record = {
            "prompt": model.decode(prompt[adds_bos and prompt[:1] == [bos] :], special=True),
            "completions": completions,
            "labels": [outcome > 0.5] * len(completions),
        }
        yield from itertools.repeat(record, int(rollouts.count[i]))


def from_stepwise(
    records: Iterable[Mapping[str, Any]], path: str | Path, model: ReflectiveModel, *, separator: str = ""
) -> int:
    """Write TRL's stepwise supervision as the JSONL that ``reflective train --data`` and ``read_rollouts`` read.

    A response is its steps with ``separator`` behind each, every one tokenized apart, as ``PRMTrainer`` does; its outcome is
    its last step's label. Left out, with a warning, is a record in which the step-tokens of ``model`` find other steps than
    those given: all of these, but that the last may go without a delimiter. The file appears when it is complete.

    Args:
        records: with ``prompt``, which gets the tokenizer's special tokens unless it begins with the beginning-of-sequence
            token, ``completions`` and ``labels``; a ``datasets.Dataset`` for instance.
        separator: ``step_separator`` of ``PRMConfig``, there ``"\\n"``; ``""`` where each step has its delimiter.

    Returns:
        How many records were written.

    Raises:
        ValueError: a record that is not of this form, by its number; none that could be written.
    """
    path, written, strangers = Path(path), 0, []
    between = model.tokenizer(separator, add_special_tokens=False).input_ids
    with replacing(path, what="path") as file, Lines(file, path) as lines:
        for number, record in enumerate(records, 1):
            prompt, completions, labels = _stepwise(number, record)
            bos = model.tokenizer.bos_token
            prompt_ids = model.tokenizer(prompt, add_special_tokens=bos is None or not prompt.startswith(bos)).input_ids
            parts = [[*model.tokenizer(c, add_special_tokens=False).input_ids, *between] for c in completions]
            response_ids = [*itertools.chain.from_iterable(parts)]
            ends = [end - 1 for end in itertools.accumulate(map(len, parts))]
            if _steps(model, prompt_ids, response_ids) not in (ends, ends[:-1]):
                strangers.append(number)
                continue
            line = {
                "prompt": prompt,
                "response": "".join(c + separator for c in completions),
                "outcome": int(labels[-1]),
                "prompt_ids": prompt_ids,
                "response_ids": response_ids,
            }
            lines.write(line)
            written += 1
        what = f"{len(strangers)} of {written + len(strangers)} records, the first of them number {[*strangers, 0][0]},"
        why = f"the steps of {what} are not those that end in {list(model.steps.delimiters) or 'a step-token'}"
        if strangers and not written:
            raise ValueError(f"separator={separator!r}: {why}; give the one by which the model knows its steps")
    if strangers:
        warnings.warn(f"{why}; left out", stacklevel=2)
    return written


def _stepwise(number: int, record: Mapping[str, Any]) -> tuple[str, list[str], list[Any]]:
    """A record's prompt, steps and labels; ValueError if it is of another form."""
    prompt, completions, labels = (record.get(name) for name in ("prompt", "completions", "labels"))
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"record {number}: prompt={prompt!r}; expected a text")
    if not completions or not all(isinstance(c, str) and c for c in completions):
        raise ValueError(f"record {number}: completions={completions!r}; expected the text of at least one step")
    if not isinstance(labels, Sequence) or len(labels) != len(completions) or any(x not in (0, 1) for x in labels):
        raise ValueError(
            f"record {number}: labels={labels!r}; expected true or false for each of its {len(completions)} steps"
        )
    return prompt, list(completions), list(labels)


def _steps(model: ReflectiveModel, prompt: list[int], response: list[int]) -> list[int]:
    """Where in ``response`` the step-tokens that count are."""
    mask = model.steps.mask([prompt + response], prompt_lengths=[len(prompt)])[0]
    return (mask.nonzero().flatten() - len(prompt)).tolist()


def _pieces(model: ReflectiveModel, tokens: list[int], ends: list[int]) -> list[str]:
    """``tokens`` cut at ``ends``, as texts, each decoded behind the one before it: a token's text depends on its neighbours."""
    texts, anchor, begin = [], 0, 0
    for end in ends:
        before = model.decode(tokens[anchor:begin], special=True)
        texts.append(model.decode(tokens[anchor:end], special=True)[len(before) :])
        anchor, begin = begin, end
    return texts
