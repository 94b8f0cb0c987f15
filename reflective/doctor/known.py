"""The known trajectory: a small model made by arithmetic, token ids, and what their scores are in float64.

Every weight is a fraction of a power of two that a counter gives, so that no generator, file or library has a say in it: the
same on every machine, to the bit. ``python -m reflective.doctor.known`` computes the recorded numbers anew.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("known.json")
VOCAB, HIDDEN, THINK, END_THINK = 64, 64, 3, 4
STEP_IDS = tuple(range(10, 26))  # about one token in four ends a step
PROMPT = (1, 28, 10, 32, 51, THINK, 26, 38)  # the step-token at 2 lies before the response, and does not count
LENGTH = 56  # tokens decoded after it
ROWS = 64  # rows of states for the head alone
# What the default model is asked, and says: its tokens are in the file.
QUESTION, SAYS = "15 + 7 + 16", "15 + 7 = 22.\n\n22 + 16 = 38.\n\nThe answer is 38."
ROUNDING = 2.0**-24  # of float32: half the distance from 1 to the next number


@dataclass(frozen=True)
class Known:
    """What is recorded of the known trajectory, in float64.

    Attributes:
        ids: of prompt and response, those that greedy decoding takes.
        margin: by how much the logit of each decoded token exceeds the next one's, at least.
        positions, log_scores: columns of the steps that count, and the logarithm of each one's score.
        score: their geometric mean.
        condition: relative change of all weights by e changes a log-score by at most so many times e, in random directions.
        longest: terms of the longest sum in the model or the head.
        rows: log-scores of ``rows()`` by the head.
        default_ids, default_prompt: of the default model's text, and how many of these are its prompt.
        default_positions, default_log_scores, default_condition, default_longest: the same of it.
    """

    ids: list[int]
    margin: float
    positions: list[int]
    log_scores: list[float]
    score: float
    condition: float
    longest: int
    rows: list[float]
    default_ids: list[int]
    default_prompt: int
    default_positions: list[int]
    default_log_scores: list[float]
    default_condition: float
    default_longest: int

    @classmethod
    def read(cls) -> "Known":
        return cls(**json.loads(FILE.read_text(encoding="utf-8")))

    @property
    def tolerance(self) -> float:
        """By how much a log-score in float32 may differ from float64: see ``allowed``."""
        return allowed(self.condition, self.longest)

    @property
    def default_tolerance(self) -> float:
        return allowed(self.default_condition, self.default_longest)


def allowed(condition: float, longest: int) -> float:
    """What rounding to float32 can do to a log-score.

    The computed sum of K products is the exact one of factors that differ relatively by about sqrt(K) u, u = 2^-24, in any order of
    summation, and practically never by four times as much (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).
    So a forward in float32 is an exact one with weights that differ so much, which change a log-score ``condition`` times as much. What a
    kernel that is wrong, TF32 or bfloat16 does is larger.
    """
    return condition * 4 * longest**0.5 * ROUNDING


def fractions(seed: int, bits: int) -> Iterator[float]:
    """Without end, in [-1, 1), multiples of 2^(1 - bits)."""
    while True:
        seed = (1664525 * seed + 1013904223) % 2**32
        yield (seed >> (32 - bits)) / 2 ** (bits - 1) - 1


def filled(shape: tuple[int, ...], source: Iterator[float], scale: float) -> Any:
    """A tensor in float64."""
    import math

    import torch

    values = [next(source) for _ in range(math.prod(shape))]
    return (torch.tensor(values, dtype=torch.float64) * scale).view(shape)


def model(dtype: Any = None) -> Any:
    """The small model: a Llama of four layers, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    made = LlamaForCausalLM._from_config(config, dtype=dtype or torch.float32).eval()
    made.generation_config.eos_token_id = None
    source = fractions(20, 12)
    with torch.no_grad():
        for _, weight in sorted(made.named_parameters()):
            if weight.dim() > 1:
                weight.copy_(filled(tuple(weight.shape), source, 0.25))
    return made.requires_grad_(False)


def head(dtype: Any = None) -> Any:
    """Its head, whose weights have 8 bits: bfloat16 and float16 hold them exactly."""
    import torch

    import reflective as rf

    made, source = rf.SPRM(HIDDEN), fractions(7, 8)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(filled(tuple(weight.shape), source, 0.25 if name.startswith("0") else 0.5))
    return made.to(dtype or torch.float32).requires_grad_(False).eval()


def rows(dtype: Any) -> Any:
    """States [ROWS, HIDDEN], of 8 bits too."""
    return filled((ROWS, HIDDEN), fractions(3, 8), 2.0).to(dtype)


def steps() -> Any:
    import reflective as rf

    return rf.StepTokens(step_ids=list(STEP_IDS), think_start_id=THINK, think_end_id=END_THINK)


# -- recording -----------------------------------------------------------------------------------------------------------


def exact(net: Any, sprm: Any, ids: list[int], positions: list[int]) -> Any:
    """Log-scores of the steps at ``positions``, as the published pipeline has them: one forward of the whole text, all states kept, of which
    the head reads one layer's, and the head as a module of torch. Nothing of this package's ops."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        hidden = net(torch.tensor([ids], device=net.device), output_hidden_states=True).hidden_states[sprm.tap.layers[0]][0]
        before = torch.tensor(positions, device=net.device) - 1
        w1, b1, w2, b2 = sprm.parameters()
        return F.logsigmoid(F.linear(F.relu(F.linear(hidden[before], w1, b1)), w2, b2)[:, 0]).clamp_min(math.log(1e-10))


def counted(ids: list[int], prompt: int) -> list[int]:
    """Columns of the steps that count, by the specification's words: step-tokens of the response within its thinking, the first of a run,
    none directly behind ``<think>``."""
    begin = ids.index(THINK) if ids.count(THINK) == 1 else 0
    end = ids.index(END_THINK) if ids.count(END_THINK) == 1 else len(ids)
    return [
        t for t in range(max(prompt, begin + 2), len(ids))
        if t <= end and ids[t] in STEP_IDS and ids[t - 1] not in STEP_IDS and ids[t - 1] != THINK
    ]  # fmt: skip


def conditioned(net: Any, sprm: Any, ids: list[int], positions: list[int], draws: int) -> float:
    """``Known.condition``, the largest of so many random directions."""
    import torch

    e, worst = 2.0**-20, 0.0
    truth = exact(net, sprm, ids, positions)
    weights = [*net.parameters(), *sprm.parameters()]
    kept = [weight.clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        for weight, was in zip(weights, kept, strict=True):
            sign = torch.randint(0, 2, was.shape, generator=generator, dtype=torch.int8) * 2 - 1
            weight.copy_(was * (1 + e * sign))
        worst = max(worst, float((exact(net, sprm, ids, positions) - truth).abs().max()) / e)
    for weight, was in zip(weights, kept, strict=True):
        weight.copy_(was)
    return worst


def record() -> dict[str, Any]:
    """Everything in ``Known``, computed in float64; the default model is needed."""
    import torch
    import torch.nn.functional as F

    import reflective as rf

    net, sprm, ids, margin = model(torch.float64), head(torch.float64), list(PROMPT), float("inf")
    with torch.no_grad():
        for _ in range(LENGTH):
            first, second = net(torch.tensor([ids])).logits[0, -1].topk(2).values
            margin = min(margin, float(first - second))
            ids.append(int(net(torch.tensor([ids])).logits[0, -1].argmax()))
        positions = counted(ids, len(PROMPT))
        log_scores = exact(net, sprm, ids, positions)
        w1, b1, w2, b2 = sprm.parameters()
        scored = F.logsigmoid(F.linear(F.relu(F.linear(rows(torch.float64), w1, b1)), w2, b2)[:, 0])
    default = rf.ReflectiveModel.default()
    prompt = default.encode(default.format(QUESTION))[0].tolist()
    said = prompt + default.tokenizer(SAYS, add_special_tokens=False).input_ids
    mask = default.steps.mask(torch.tensor([said]), None, [len(prompt)])[0]
    there = mask.nonzero().flatten().tolist()
    large, its = default.model.double().requires_grad_(False), default.head.double()
    return {
        "ids": ids, "margin": margin, "positions": positions, "log_scores": log_scores.tolist(),
        "score": float(log_scores.mean().exp()), "condition": conditioned(net, sprm, ids, positions, 64),
        "longest": 2 * HIDDEN, "rows": scored.tolist(),
        "default_ids": said, "default_prompt": len(prompt), "default_positions": there,
        "default_log_scores": exact(large, its, said, there).tolist(), "default_condition": conditioned(large, its, said, there, 4),
        "default_longest": large.config.intermediate_size,
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
