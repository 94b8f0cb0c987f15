"""What all systems are given: a small random model with its tokenizer and a head, in memory and on disk, and the truth about any tokens.

The truth is computed with nothing of this package: which steps count by the prose of the definition, their states by transformers, in float64,
the head by its formula.
"""

import copy
import functools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reflective.engines.hf.internals import cache_of, with_cache  # how transformers calls its cache, and no more

END, PAD, THINK, END_THINK = range(4)  # ids of the special tokens
DELIMITER = ".\n\n"
LAYER = -2  # of ``hidden_states``: the last layer's input
HIDDEN = 128  # in heads of 32: vLLM's attention on a CPU takes no narrower ones
LETTERS = "XYZW"  # tokens of their own in any company
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Truth:
    """Of one sequence: the columns of its step-tokens, the logarithms of their scores, and how far these may be missed."""

    columns: list[int]
    log_scores: list[float]
    allowed: float


class World:
    """
    Args:
        folder: where the model lies for those who load it from there; None: a temporary one.
        seed: of the weights.

    Attributes:
        path: directory of model and tokenizer; head_path: of the head, ``score_module.safetensors``.
        model: the model of transformers, a Qwen2 of 4 layers in float32 on the CPU; draft: one whose guesses are often refused.
        tokenizer: bytes, and as merges ``"\\n\\n"`` and ``".\\n\\n"`` alone.
        head: ``Linear, ReLU, Linear`` as in a published ``score_module.pt``; ``head(hidden).sigmoid()`` is a step's score.
        step_id: the token ``".\\n\\n"``.
    """

    def __init__(self, folder: Path | str | None = None, seed: int = 0) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        import reflective as rf

        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        place = Path(folder or self._temporary.name)
        self._truths: dict[Any, Truth] = {}
        self.path, self.head_path = place / "model", place / "head"
        self.tokenizer = _tokenizer()
        self.step_id = self.tokenizer.encode(DELIMITER)[0]
        config = Qwen2Config(
            vocab_size=len(self.tokenizer) + -len(self.tokenizer) % 16, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=END, bos_token_id=None,
            pad_token_id=PAD, tie_word_embeddings=False, initializer_range=0.1,
        )  # fmt: skip
        self.vocabulary = config.vocab_size  # ids of the model, some of which the tokenizer does not have
        torch.manual_seed(seed)
        self.model = Qwen2ForCausalLM(config).float().eval().requires_grad_(False)
        # Every allowed token has a fair chance, so that what a case is about comes about.
        self.model.lm_head.weight.mul_(0.1)
        self.draft = copy.deepcopy(self.model)
        self.draft.lm_head.weight.add_(0.05 * torch.randn_like(self.draft.lm_head.weight))
        self.head = rf.SPRM(HIDDEN, dtype=torch.float32).requires_grad_(False).eval()
        for name, w in self.head.state_dict().items():
            if name.startswith("3."):
                w.mul_(4.0)  # neighbouring rows are to have scores that differ
        self.model.save_pretrained(self.path)
        self.tokenizer.save_pretrained(self.path)
        self.draft_path = place / "draft"
        self.draft.save_pretrained(self.draft_path)
        self.tokenizer.save_pretrained(self.draft_path)
        self.head.save_pretrained(self.head_path)

    def steps(self, rule: str = "exact") -> Any:
        """The step-tokens as ``reflective.StepTokens``: ``"exact"`` knows ``step_id`` alone, ``"text"`` the delimiter however it is split."""
        import reflective as rf

        return rf.StepTokens.from_tokenizer(self.tokenizer, rule=rule, delimiter=DELIMITER)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def allowed(self, names: Sequence[str]) -> list[int]:
        """Ids of tokens by their texts."""
        found = self.tokenizer.convert_tokens_to_ids([_written(name) for name in names])
        if None in found:
            raise ValueError(f"tokens: {names[found.index(None)]!r} is no token of this world")
        return sorted(found)

    def columns(self, ids: Sequence[int], prompt: int, rule: str = "exact") -> list[int]:
        """Where in ``ids`` the steps end that count: from the prose of the definition. Attach a scorer to these, or to ``steps``.

        A step-token counts inside the thinking (from ``<think>`` to ``</think>``, where a tag that does not occur exactly once is as if it were not
        there), not in the prompt, not right behind ``<think>``, and of several in a row the first.
        """
        ids = list(ids)
        a = ids.index(THINK) if ids.count(THINK) == 1 else 0
        e = ids.index(END_THINK) if ids.count(END_THINK) == 1 else len(ids)
        ends = self._ends_of_text(ids) if rule == "text" else self._ends(ids)
        return [t for t in ends if a + 2 <= t <= e and t >= max(prompt, 1)]

    def log(self, score: float) -> float:
        return math.nan if math.isnan(score) else math.log(max(score, 1e-10))

    def truth(self, ids: Sequence[int], prompt: int, rule: str = "exact") -> Truth:
        """What the steps of ``ids`` score, by a second pass over ``ids`` in float64.

        ``allowed`` is twice the largest error of the second pass in float32 at any token of the text. Its sums may be taken in any order, so it is
        run in several ways: the whole text at once and eight tokens at a time, with transformers' fused attention and with its plain one.
        """
        key = tuple(ids), prompt, rule
        if key not in self._truths:
            self._truths[key] = self._truth(list(ids), self.columns(ids, prompt, rule))
        return self._truths[key]

    def _truth(self, ids: list[int], columns: list[int]) -> Truth:
        if not columns:
            return Truth([], [], 0.0)
        text = torch.tensor([ids])
        exact = self.log_scores(_states(self._double, text))
        errors = [
            (self.log_scores(states) - exact)[1:].abs().max().item()
            for states in (_states(self.model, text), _states(self._plain, text), _states(self._plain, text, piece=8))
        ]
        exact = exact[[t - 1 for t in columns]]
        ulp = EPS * max(1.0, exact.abs().max().item())
        return Truth(columns, exact.tolist(), max(2 * max(errors), 4 * ulp))

    def log_scores(self, features: Tensor) -> Tensor:
        """``ln sigmoid(W3 relu(W0 f + b0) + b3)`` in the dtype of ``features`` [M, H], as float64 [M]."""
        w = {name: v.to(features.dtype) for name, v in self.head.state_dict().items()}
        inner = F.linear(features, w["0.weight"], w["0.bias"]).relu()
        return F.logsigmoid(F.linear(inner, w["3.weight"], w["3.bias"])).clamp_min(math.log(1e-10)).flatten().double()

    @functools.cached_property
    def _double(self) -> Any:
        return copy.deepcopy(self.model).double()

    @functools.cached_property
    def _plain(self) -> Any:
        plain = copy.deepcopy(self.model)
        plain.set_attn_implementation("eager")
        return plain

    def _ends(self, ids: list[int]) -> list[int]:
        """Step-tokens that neither stand behind another one nor behind ``<think>``."""
        return [t for t in range(1, len(ids)) if ids[t] == self.step_id and ids[t - 1] not in (self.step_id, THINK)]

    def _ends_of_text(self, ids: list[int]) -> list[int]:
        """Tokens in which the delimiter's last character lies; of several with nothing but blanks between them the first, and none with nothing
        but blanks behind ``<think>``."""
        text, token = "", []
        for t, i in enumerate(ids):
            piece = "\0" if i < 4 else self.tokenizer.decode([i])  # a special token has no text, and is no blank
            piece = "\1" if i == THINK else piece
            text, token = text + piece, token + [t] * len(piece)
        found, past, begin, counts = [], 0, text.find(DELIMITER), True
        while begin >= 0:
            between = text[past:begin]
            counts = counts if between.isspace() or not between else True
            blank = between.rpartition("\1")[2] if "\1" in between else None
            if blank is not None and not blank.strip():
                counts = False
            past = begin + len(DELIMITER)
            if counts:
                found.append(token[past - 1])
            counts, begin = False, text.find(DELIMITER, past)
        return found


@torch.no_grad()
def _states(model: Any, ids: Tensor, piece: int | None = None) -> Tensor:
    """[T, H]: ``hidden_states[LAYER]`` of one text, run ``piece`` tokens at a time."""
    cache, states = None, []
    for part in ids.split(piece or ids.shape[1], 1):
        out = model(part, **({} if cache is None else with_cache(model, cache)), use_cache=True, output_hidden_states=True)
        cache = cache_of(out)
        states.append(out.hidden_states[LAYER][0])
    return torch.cat(states)


def _written(text: str) -> str:
    """As a byte-level vocabulary writes it."""
    return text.replace("\n", "Ċ").replace(" ", "Ġ")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    line = _written("\n")
    special = ["<|end|>", "<|pad|>", "<think>", "</think>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), 2 * line, "." + 2 * line]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [(line, line), (".", 2 * line)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[END], pad_token=special[PAD], additional_special_tokens=special[THINK:]
    )
