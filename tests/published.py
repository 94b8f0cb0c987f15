"""Others' heads as their projects compute them: written from their descriptions, in plain torch, with nothing of this package.

Every ``oracle_*`` takes a model of transformers, the token ids of prompt and response, the prompt's length and a checkpoint's
content as ``*_checkpoint`` makes it, and returns ``Scored``. ``streamed``: the ids were decoded, and the last was never fed back,
so it has no state. ``leave_out``: ids that a stream counts as no step (those that end or pad a sequence).
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Scored(NamedTuple):
    """Attributes: ``score``: None without a step. ``positions``: indices of the tokens that are steps, in prompt and response."""

    score: float | None
    step_scores: list[float]
    positions: list[int]


# -- the model ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_states(model: Any, ids: Sequence[int]) -> tuple[Tensor, ...]:
    """n + 1 tensors [T, H]: the embeddings, what each layer but the last puts out, and the final norm of the last's."""
    states = model(torch.tensor([list(ids)], device=model.device), output_hidden_states=True).hidden_states
    return tuple(state[0] for state in states)


def response(ids: Sequence[int], prompt_length: int, streamed: bool, leave_out: Collection[int] = ()) -> list[int]:
    return [t for t in range(prompt_length, len(ids) - streamed) if ids[t] not in leave_out]


def weights(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


# -- MetaStone-S1, XBai-o4 (arXiv 2507.01951) --------------------------------------------------------------------------


def metastone_checkpoint(hidden: int, seed: int = 0) -> dict[str, Tensor]:
    units = 2 * hidden
    return {
        "0.weight": weights(units, hidden, seed=seed, scale=hidden**-0.5),
        "0.bias": weights(units, seed=seed + 1, scale=0.1),
        "3.weight": weights(1, units, seed=seed + 2, scale=2 * units**-0.5),
        "3.bias": weights(1, seed=seed + 3, scale=0.1),
    }


@torch.no_grad()
def oracle_metastone(
    model: Any, ids: Sequence[int], prompt_length: int, state: dict[str, Tensor], *, tokenizer: Any
) -> Scored:
    """The state before each ``.\\n\\n`` within the thinking, the last layer's input; of consecutive ones the first; geometric mean."""
    ids = list(ids)
    (step,) = tokenizer.encode(".\n\n", add_special_tokens=False)
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    a = ids.index(start) if ids.count(start) == 1 else 0
    e = ids.index(end) if ids.count(end) == 1 else len(ids)
    positions = [
        t
        for t in range(max(prompt_length, 1), len(ids))
        if ids[t] == step and ids[t - 1] not in (step, start) and a < t - 1 < e
    ]
    features = hidden_states(model, ids)[-2][[t - 1 for t in positions]].float()
    inner = (features @ state["0.weight"].float().T + state["0.bias"].float()).clamp_min(0)
    scores = torch.sigmoid(inner @ state["3.weight"].float().T + state["3.bias"].float())[:, 0].tolist()
    if not scores:
        return Scored(None, [], [])
    return Scored(math.exp(sum(math.log(max(s, 1e-10)) for s in scores) / len(scores)), scores, positions)


# -- STEP (arXiv 2601.09093) and Gambit (arXiv 2608.08020) -------------------------------------------------------------


def step_checkpoint(hidden: int, seed: int = 0, units: int = 512) -> dict[str, Any]:
    """As its training saves it, with the optimizer's state and scikit-learn's metrics."""
    state = {
        "net.0.weight": weights(units, hidden, seed=seed, scale=hidden**-0.5),
        "net.0.bias": weights(units, seed=seed + 1, scale=0.1),
        "net.2.weight": weights(1, units, seed=seed + 2, scale=2 * units**-0.5),
        "net.2.bias": weights(1, seed=seed + 3, scale=0.1),
    }
    parameters = [torch.nn.Parameter(value.clone()) for value in state.values()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, weight_decay=1e-5)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    return {
        "epoch": 7, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict(),
        "best_score": np.float64(0.81), "config_name": "default_config", "loss_curve": [0.6, 0.5],
        "metrics": {"auc": np.float64(0.83), "acc": 0.77, "f1": np.float64(0.7), "precision": np.float32(0.7), "recall": np.int64(1)},
    }  # fmt: skip


@torch.no_grad()
def oracle_step(
    model: Any, ids: Sequence[int], prompt_length: int, state: dict[str, Any], *, tokenizer: Any, streamed: bool = False
) -> Scored:
    """The own state, after the final norm and in float32, of every generated token whose text holds an empty line: thought or
    answer, however many there are in a row. Arithmetic mean."""
    state = state.get("model_state_dict", state)
    empty_line = {
        i for i in range(tokenizer.vocab_size) if "\n\n" in tokenizer.decode([i], clean_up_tokenization_spaces=False)
    }
    positions = [t for t in response(ids, prompt_length, streamed) if ids[t] in empty_line]
    features = hidden_states(model, ids)[-1][positions].float()
    inner = torch.relu(features @ state["net.0.weight"].T + state["net.0.bias"])
    scores = torch.sigmoid(inner @ state["net.2.weight"].T + state["net.2.bias"]).flatten().tolist()
    return Scored(sum(scores) / len(scores) if scores else None, scores, positions)


# -- SWIFT (arXiv 2505.12225) ------------------------------------------------------------------------------------------


def swift_checkpoint(inputs: int, seed: int = 0, *, gate: bool = True) -> dict[str, Tensor]:
    """A state dict alone: with a gate one layer of two rows, the first of them the gate."""
    if not gate:
        return {
            "reward_layer.weight": weights(1, inputs, seed=seed, scale=inputs**-0.5),
            "reward_layer.bias": weights(1, seed=seed + 1, scale=0.1),
        }
    return {
        "fused_layer.weight": weights(2, inputs, seed=seed, scale=inputs**-0.5),
        "fused_layer.bias": weights(2, seed=seed + 1, scale=0.1),
    }


@torch.no_grad()
def oracle_swift(
    model: Any,
    ids: Sequence[int],
    prompt_length: int,
    state: dict[str, Tensor],
    *,
    layers: Sequence[int] | None = None,
    apply_norm: bool = False,
    leave_out: Collection[int] = (),
    streamed: bool = False,
) -> Scored:
    """A value of every token of the response, weighted by the sigmoid of its gate; from ``hidden_states`` of all layers (or of
    ``layers``, ascending), side by side. The score of a step is its value, no probability."""
    states = hidden_states(model, ids)
    if apply_norm:
        states = tuple(model.model.norm(state) for state in states)
    chosen = range(len(states)) if layers is None else sorted(layers)
    positions = response(ids, prompt_length, streamed, leave_out)
    features = torch.cat([states[layer].float() for layer in chosen], dim=-1)[positions]
    if "reward_layer.weight" in state:
        values = (features @ state["reward_layer.weight"].T + state["reward_layer.bias"])[:, 0]
        return Scored(float(values.sum()) / max(len(positions), 1), values.tolist(), positions)
    both = features @ state["fused_layer.weight"].T + state["fused_layer.bias"]
    gates, values = torch.sigmoid(both[:, 0]), both[:, 1]
    return Scored(float((gates * values).sum() / gates.sum().clamp(min=1e-8)), values.tolist(), positions)


# -- SingProbe (arXiv 2608.30703), its MLP -----------------------------------------------------------------------------


def singprobe_checkpoint(inputs: int, seed: int = 0, units: int = 24, outputs: int = 10) -> dict[str, Tensor]:
    return {
        "fc1.weight": weights(units, inputs, seed=seed, scale=inputs**-0.5),
        "fc1.bias": weights(units, seed=seed + 1, scale=0.1),
        "fc2.weight": weights(outputs, units, seed=seed + 2, scale=2 * units**-0.5),
        "fc2.bias": weights(outputs, seed=seed + 3, scale=0.1),
    }


def singprobe_config(hidden: int, layers: Sequence[int], act: str = "gelu", units: int = 24, outputs: int = 10) -> dict:
    """``config.json`` beside a converted checkpoint."""
    return {
        "architectures": ["SingProbeMlpModel"], "model_type": "sing_probe_mlp", "hidden_size": hidden,
        "base_model_layer_ids": list(layers), "intermediate_size": units, "hidden_act": act, "num_labels": outputs,
        "base_model_name": "inclusionAI/Ling-3.0-flash", "torch_dtype": "float32",
    }  # fmt: skip


@torch.no_grad()
def oracle_singprobe(
    model: Any,
    ids: Sequence[int],
    prompt_length: int,
    state: dict[str, Tensor],
    *,
    config: dict[str, Any],
    output: int,
    leave_out: Collection[int] = (),
    streamed: bool = False,
) -> Scored:
    """One output's probability at every token of the response, from what enters some decoder layers: each state over its root mean
    square, without a weight. No number for a sequence is published: the greatest here."""
    states = hidden_states(model, ids)
    positions = response(ids, prompt_length, streamed, leave_out)
    tapped = [states[layer][positions].float() for layer in config["base_model_layer_ids"]]
    features = torch.cat([x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) for x in tapped], dim=-1)
    z = features @ state["fc1.weight"].T + state["fc1.bias"]
    if config["hidden_act"] == "gelu":
        z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    else:
        z = z.clamp_min(0)
    probabilities = torch.sigmoid(z @ state["fc2.weight"].T + state["fc2.bias"])[:, output].tolist()
    return Scored(max(probabilities, default=None), probabilities, positions)


# -- linear probes -----------------------------------------------------------------------------------------------------


def linear_checkpoint(inputs: int, seed: int = 0, *, bias: bool = True) -> dict[str, Tensor]:
    state = {"weight": weights(1, inputs, seed=seed, scale=2 * inputs**-0.5)}
    return state | {"bias": weights(1, seed=seed + 1, scale=0.1)} if bias else state


@torch.no_grad()
def oracle_linear(
    model: Any,
    ids: Sequence[int],
    positions: Sequence[int],
    state: dict[str, Tensor],
    *,
    layers: Sequence[int],
    sigmoid: bool,
) -> Scored:
    """``w . h + b`` at the tokens ``positions``, or the sigmoid of it; arithmetic mean."""
    states = hidden_states(model, ids)
    features = torch.cat([states[layer].float() for layer in layers], dim=-1)[list(positions)]
    values = features @ state["weight"][0] + state.get("bias", torch.zeros(1))
    scores = (torch.sigmoid(values) if sigmoid else values).tolist()
    return Scored(sum(scores) / len(scores) if scores else None, scores, list(positions))


# -- what is published and is no head of one row -----------------------------------------------------------------------


def attention_probe_checkpoint(inputs: int, heads: int = 4, size: int = 8, outputs: int = 10) -> dict[str, Tensor]:
    """SingProbe's other probe."""
    width = heads * size
    shapes = {
        "proj_q.weight": (width, inputs), "proj_k.weight": (size, inputs), "proj_v.weight": (size, inputs),
        "o_proj.weight": (width, width), "norm.weight": (width,), "classifier.weight": (outputs, width), "classifier.bias": (outputs,),
    }  # fmt: skip
    return {key: weights(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}


def sequence_scorer_checkpoint(hidden: int, width: int = 16) -> dict[str, Any]:
    """Gambit's transformer over the steps."""
    shapes = {
        "input_proj.0.weight": (hidden,), "input_proj.0.bias": (hidden,), "input_proj.1.weight": (width, hidden),
        "input_proj.1.bias": (width,), "layers.0.norm1.weight": (width,), "layers.0.norm1.bias": (width,),
        "layers.0.attn.qkv.weight": (3 * width, width), "layers.0.attn.out_proj.weight": (width, width),
        "layers.0.ffn.gate.weight": (4 * width, width), "layers.0.ffn.up.weight": (4 * width, width),
        "layers.0.ffn.down.weight": (width, 4 * width), "norm.weight": (width,), "norm.bias": (width,),
        "head.weight": (1, width), "head.bias": (1,),
    }  # fmt: skip
    state = {key: weights(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    return {
        "model_state_dict": state,
        "model_config": {"type": "sequence_transformer", "input_dim": hidden, "d_model": width},
    }


def reprobe_checkpoint(hidden: int, width: int = 16) -> dict[str, Tensor]:
    """ReProbe (arXiv 2511.06209): a transformer encoder over the tokens."""
    layer = torch.nn.TransformerEncoderLayer(width, 4, 32, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    state = {f"transformer_encoder.{key}": value for key, value in encoder.state_dict().items()}
    return state | {
        "proj.0.weight": weights(2 * width, hidden, seed=0), "proj.0.bias": weights(2 * width, seed=1),
        "step_end_embedding.weight": weights(2, width, seed=2), "classifier.0.weight": weights(width, width, seed=3),
        "classifier.0.bias": weights(width, seed=4), "classifier.4.weight": weights(1, width, seed=5),
        "classifier.4.bias": weights(1, seed=6),
    }  # fmt: skip
