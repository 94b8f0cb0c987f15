"""Published heads in their own forms: recognised by the keys and shapes of their tensors, never by a file's name.

====================  ==================================================  ==================================================
MetaStone-S1, XBai    ``0.weight 0.bias 3.weight 3.bias``                 an MLP on the state that predicted the step-token
STEP, Gambit          ``net.0.weight net.0.bias net.2.weight net.2.bias`` an MLP on the step-token's state after the final norm
SWIFT                 ``fused_layer.weight [2, K] fused_layer.bias``      a gate and a value on every token, all layers
SWIFT without a gate  ``reward_layer.weight [1, K] reward_layer.bias``    a value on every token, all layers
SingProbe's MLP       ``fc1.weight fc1.bias fc2.weight fc2.bias``         an MLP of several outputs on every token, some layers
``GatedLinear``       ``value.weight value.bias gate.weight gate.bias``  a gate and a value, as saved here
linear probes         ``weight [1, K]``, with or without ``bias``         whatever the metadata say
====================  ==================================================  ==================================================

A checkpoint seldom says all of its use. What its project's code fixes is taken from there; what nothing fixes is in
``Form.unknown``, with what is assumed.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..utils.arguments import brief, one_of
from ..utils.json_file import read as read_json
from .heads import ACTIVATIONS, FLOATS
from .taps import Norm

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
MOST = 200  # tensors in a file; the largest probe among those that are refused by name has some 40, a model hundreds

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # in files; widened when they are read
_QUANTISED = re.compile("scale|zero|absmax|quant|qweight|packed|SCB")  # in what quantisers call their tensors
_WRAPPED = ("model_state_dict", "state_dict", "model")  # where a training script puts the weights beside its own state
_PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
)  # what DistributedDataParallel, torch.compile and wrappers put before keys
_BESIDE = ("config.json", "training_state.json")
_KNOWN = (
    "MetaStone's (0.weight 0.bias 3.weight 3.bias), STEP's (net.0.weight net.0.bias net.2.weight net.2.bias), "
    "SWIFT's (fused_layer.weight fused_layer.bias, or reward_layer.weight reward_layer.bias), "
    "SingProbe's MLP (fc1.weight fc1.bias fc2.weight fc2.bias), a linear probe (weight, or weight bias)"
)


@dataclass(frozen=True, eq=False)
class Form:
    """What a checkpoint is, in our order.

    Attributes:
        name: ``"metastone"``, ``"step"``, ``"swift"``, ``"singprobe"`` or ``"linear"``.
        kind: ``"mlp"``, ``"linear"`` or ``"gated_linear"``.
        tensors: copies, in the file's dtypes. ``"mlp"``: w1 [units, K], b1 [units], w2 [1, units], b2 [1]; ``"linear"``:
            w [1, K], b [1]; ``"gated_linear"``: those of the value, then those of the gate.
        layers: indices of ``hidden_states`` whose states are concatenated; None: the file does not say, see ``for_model``.
        norm: what is done to each of them: nothing, the model's final norm (which -1 has already), or ``"rms"``: divided by
            ``sqrt(mean(x^2) + 1e-6)``, without a weight.
        at: which token's state is a step's feature: ``"predict"``, ``"token"`` or ``"every"``.
        activation: of the hidden layer; None where there is none.
        aggregation: how step scores become a trajectory's, a name of ``scores.AGGREGATIONS`` or ``"gated"``:
            ``sum_i g_i v_i / sum_i g_i``.
        sigmoid: whether a step's score is the sigmoid of its logit; else the logit (of a gated head, of its value; the gate
            always has one).
        step_rule: arguments of ``StepTokens.from_tokenizer`` that it was trained with; None where there is none or nothing
            tells.
        trained_on: name of the model; None: unknown.
        output: which of the checkpoint's outputs this is.
        higher_is_better: False for scores of risk.
        unknown: what neither the file nor its project's code tells, and what is assumed.
    """

    name: str
    kind: Literal["mlp", "linear", "gated_linear"]
    tensors: tuple[Tensor, ...]
    layers: tuple[int, ...] | None
    norm: Norm
    at: Literal["predict", "token", "every"]
    activation: str | None
    aggregation: str
    sigmoid: bool
    step_rule: dict[str, Any] | None = None
    trained_on: str | None = None
    output: int = 0
    higher_is_better: bool = True
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Inputs, K: the hidden sizes of all layers together."""
        return self.tensors[0].shape[1]

    def for_model(
        self,
        hidden_size: int,
        n_layers: int,
        *,
        vocab_size: int | None = None,
        layers: tuple[int, ...] | None = None,
        norm: Norm | None = None,
    ) -> "Form":
        """This form for a model of ``n_layers`` layers, which has ``n_layers + 1`` ``hidden_states``: with its layers known.

        Where nothing names them, a width of ``n_layers + 1`` hidden sizes is all of them in order.

        Args:
            vocab_size: of the model, to tell heads on logits apart.
            layers, norm: instead of what the file says or is assumed.

        Raises:
            ValueError: the width is not that of the layers, or of no number of layers; nothing names them; there is no such
                layer; the states are to be normed in a way that no tap has.
        """
        K, H = self.width, hidden_size
        if layers is None and not ("layers" in self.unknown and self.layers and len(self.layers) * H != K):
            layers = self.layers
        told = {"layers"} if norm is None else {"layers", "norm"}
        norm = self.norm if norm is None else norm
        if vocab_size is not None and vocab_size == K != H:
            raise ValueError(
                f"head: {K} inputs are the model's vocabulary: it was trained on logits, which a stream does not keep"
            )
        if K % H:
            raise ValueError(
                f"head: {K} inputs are no multiple of the model's hidden size {H}: it was made for another model, or reads "
                "something else than hidden states (logits, probabilities, maps of attention)"
            )
        if layers is None and K == (n_layers + 1) * H:
            layers = tuple(range(n_layers + 1))
        if layers is None:
            raise ValueError(
                f"head: {K} inputs are {K // H} of the model's {n_layers + 1} hidden_states, and nothing says which; give layers="
            )
        layers = _integers("layers", layers)
        if len(layers) * H != K:
            raise ValueError(
                f"layers={layers}: {len(layers)} of hidden size {H} are {len(layers) * H} inputs, and the head has {K}"
            )
        for layer in layers:
            if not -n_layers - 1 <= layer <= n_layers:
                raise ValueError(f"layers={layers}: the model has hidden_states 0 to {n_layers}, so no {layer}")
        if self.name == "swift":  # whose code concatenates in ascending order, whatever the order given
            layers = tuple(sorted(layers, key=lambda layer: layer % (n_layers + 1)))
        if self.name == "swift" and norm is True and {-1, n_layers} & set(layers):
            raise ValueError(
                "norm=True: SWIFT's --apply_norm norms the last of hidden_states a second time, which no tap does; such a head "
                "must be trained on layers below it"
            )
        unknown = {what: why for what, why in self.unknown.items() if what not in told}
        return replace(self, layers=layers, norm=norm, unknown=unknown)


# -- recognised --------------------------------------------------------------------------------------------------------


def found(state: Mapping[str, Any], metadata: Mapping[str, str] | None = None, *, output: int | None = None) -> Form:
    """Which of the forms a checkpoint has.

    Args:
        state: its tensors by key, alone or as a training script saves them (under ``model_state_dict`` or ``state_dict``);
            prefixes of wrappers (``module.``) are taken off.
        metadata: of the file: ``layers``, ``norm``, ``at``, ``aggregation``, ``sigmoid``, ``activation``, ``step_rule`` and
            ``trained_on`` as JSON, which win over what the form fixes; SingProbe's ``base_model_layer_ids``, ``hidden_act``,
            ``hidden_size``, ``labels`` and ``base_model_name``.
        output: which output of a head that has several.

    Raises:
        ValueError: none of them; one that cannot ride in a stream; a gate without a value; shapes that do not fit together;
            weights that are no floats, quantised, NaN or infinite; several outputs and none chosen; metadata that make no sense.
    """
    tensors, said = _unwrapped(state, metadata or {})
    _refuse(tensors, said)
    keys = set(tensors)
    for known, of in (
        ({"0.weight", "0.bias", "3.weight", "3.bias"}, _metastone),
        ({"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}, _step),
        ({"fused_layer.weight", "fused_layer.bias"}, _swift),
        ({"reward_layer.weight", "reward_layer.bias"}, _swift_ungated),
        ({"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}, _singprobe),
        ({"value.weight", "value.bias", "gate.weight", "gate.bias"}, _gated),
        ({"weight"}, _linear),
        ({"weight", "bias"}, _linear),
    ):
        if keys == known:
            break
    else:
        raise ValueError(_unknown_keys(keys))
    for key, value in tensors.items():
        _check(key, value)
    return with_metadata(of(tensors, said, output), said)


def form_of(path: str | Path, *, output: int | None = None) -> Form:
    """``found`` of a file, see ``read``; errors name it.

    Raises:
        FileNotFoundError, ValueError: see ``read`` and ``found``.
    """
    state, metadata = read(path)
    try:
        return found(state, metadata, output=output)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _metastone(tensors: dict[str, Tensor], said: Mapping[str, Any], output: int | None) -> Form:
    """arXiv 2507.01951."""
    return Form(
        "metastone", "mlp", _mlp(tensors, "0", "3", _only(output)),
        layers=(-2,), norm=False, at="predict", activation="relu", aggregation="geometric_mean", sigmoid=True,
    )  # fmt: skip


def _step(tensors: dict[str, Tensor], said: Mapping[str, Any], output: int | None) -> Form:
    """arXiv 2601.09093, and Gambit, arXiv 2608.08020: every generated token with an empty line in it, also behind ``</think>``."""
    return Form(
        "step", "mlp", _mlp(tensors, "net.0", "net.2", _only(output)),
        layers=(-1,), norm=False, at="token", activation="relu", aggregation="mean", sigmoid=True,
        step_rule={
            "rule": "contains", "delimiter": "\n\n", "think_start_id": None, "think_end_id": None, "consecutive": "all",
        },
    )  # fmt: skip


_SWIFT_UNKNOWN = {
    "layers": "which of hidden_states; all of them where the width fits the model, else give layers=",
    "norm": "whether --apply_norm was given; assumed that it was not",
}


def _swift(tensors: dict[str, Tensor], said: Mapping[str, Any], output: int | None) -> Form:
    """arXiv 2505.12225: the first row is the gate, the second the value."""
    weight, bias = tensors["fused_layer.weight"], tensors["fused_layer.bias"]
    _only(output)
    if weight.dim() == 2 and len(weight) == 1:
        raise ValueError(
            "fused_layer.weight has one row, a gate without a value; SWIFT's has two, the gate and the value"
        )
    _shapes(tensors, {"fused_layer.weight": (2, None), "fused_layer.bias": (2,)})
    gate, value = ((weight[i : i + 1], bias[i : i + 1]) for i in range(2))
    return Form(
        "swift", "gated_linear", _copies(*value, *gate),
        layers=None, norm=False, at="every", activation=None, aggregation="gated", sigmoid=False, unknown=dict(_SWIFT_UNKNOWN),
    )  # fmt: skip


def _swift_ungated(tensors: dict[str, Tensor], said: Mapping[str, Any], output: int | None) -> Form:
    """SWIFT's ``--disable_gate``."""
    _only(output)
    _shapes(tensors, {"reward_layer.weight": (1, None), "reward_layer.bias": (1,)})
    return Form(
        "swift", "linear", _copies(tensors["reward_layer.weight"], tensors["reward_layer.bias"]),
        layers=None, norm=False, at="every", activation=None, aggregation="mean", sigmoid=False, unknown=dict(_SWIFT_UNKNOWN),
    )  # fmt: skip


def _gated(tensors: dict[str, Tensor], said: Mapping[str, Any], output: int | None) -> Form:
    """A ``GatedLinear`` as it is saved here, whose metadata say the rest."""
    _only(output)
    names = [f"{part}.{what}" for part in ("value", "gate") for what in ("weight", "bias")]
    _shapes(tensors, {name: (1, None) if name.endswith("weight") else (1,) for name in names})
    return Form(
        "gated_linear", "gated_linear", _copies(*(tensors[name] for name in names)),
        layers=None, norm=False, at="every", activation=None, aggregation="gated", sigmoid=True,
        unknown={"layers": "which of hidden_states; all of them where the width fits the model, else give layers="},
    )  # fmt: skip


def _singprobe(tensors: dict[str, Tensor], said: Mapping[str, Any], output: int | None) -> Form:
    """arXiv 2608.30703: one of its outputs; the state that enters decoder layer i is ``hidden_states[i]``."""
    weight = tensors["fc2.weight"]
    n = len(weight) if weight.dim() else 0
    labels = said.get("labels") or [f"label_{i}" for i in range(n)]
    if output is None and n > 1:
        raise ValueError(
            f"fc2.weight has {n} outputs ({', '.join(map(str, labels))}), and a head has one: give output=, 0 to {n - 1} (as "
            "published 8: the response is unsafe, 9: this token is hallucinated)"
        )
    output = output or 0
    if not 0 <= output < max(n, 1):
        raise ValueError(f"output={output}: fc2.weight has {n}, 0 to {n - 1}")
    activation, unknown = said.get("hidden_act"), {}
    if activation is None:
        unknown["activation"] = "hidden_act is in the config.json beside the file; assumed gelu, as published"
    one_of("hidden_act", activation or "gelu", ("gelu", "relu"))
    layers = said.get("base_model_layer_ids")
    if layers is None:
        unknown["layers"] = "base_model_layer_ids are in the config.json beside the file; give layers="
    else:
        layers = _integers("base_model_layer_ids", layers)
    unknown["aggregation"] = "nothing published makes one number of a sequence; assumed max, of a risk"
    made = _mlp(tensors, "fc1", "fc2", output)
    if layers is not None and (size := said.get("hidden_size")) and made[0].shape[1] != size * len(layers):
        raise ValueError(
            f"fc1.weight has {made[0].shape[1]} inputs, and {len(layers)} layers (base_model_layer_ids) of hidden_size {size} "
            f"are {size * len(layers)}"
        )
    return Form(
        "singprobe", "mlp", made,
        layers=layers, norm="rms", at="every", activation=activation or "gelu", aggregation="max", sigmoid=True,
        trained_on=said.get("base_model_name"), output=output, higher_is_better=n == 10 and output == 7, unknown=unknown,
    )  # fmt: skip


def _linear(tensors: dict[str, Tensor], said: Mapping[str, Any], output: int | None) -> Form:
    """A probe that says nothing of itself: the paper's tap is assumed."""
    _only(output)
    weight = tensors["weight"]
    if weight.dim() == 2 and len(weight) > 1:
        raise ValueError(
            f"weight has {len(weight)} outputs, and a head has one; save the row of the output that is wanted"
        )
    _shapes(tensors, {"weight": (1, None), **({"bias": (1,)} if "bias" in tensors else {})})
    bias = tensors["bias"] if "bias" in tensors else weight.new_zeros(1)
    assumed = {
        "layers": "which of hidden_states; assumed (-2,) where the width is one hidden size",
        "norm": "assumed that states are read as they are",
        "at": "which token's state is a step's; assumed 'token'",
        "aggregation": "assumed mean",
        "sigmoid": "assumed that a score is the sigmoid of the logit",
    }
    return Form(
        "linear", "linear", _copies(weight, bias),
        layers=(-2,), norm=False, at="token", activation=None, aggregation="mean", sigmoid=True, unknown=assumed,
    )  # fmt: skip


def _mlp(tensors: dict[str, Tensor], first: str, second: str, output: int) -> tuple[Tensor, ...]:
    """``(w1, b1, w2, b2)`` of one output of ``Linear(K, units) -> activation -> Linear(units, outputs)``."""
    w1, b1, w2, b2 = (tensors[f"{layer}.{what}"] for layer in (first, second) for what in ("weight", "bias"))
    units, outputs = len(w1) if w1.dim() else 0, len(w2) if w2.dim() else 0
    _shapes(
        tensors,
        {
            f"{first}.weight": (units, None), f"{first}.bias": (units,),
            f"{second}.weight": (outputs, units), f"{second}.bias": (outputs,),
        },
    )  # fmt: skip
    if outputs > 1 and first != "fc1":
        raise ValueError(f"{second}.weight has {outputs} outputs; a head has one")
    return _copies(w1, b1, w2[output : output + 1], b2[output : output + 1])


def _only(output: int | None) -> int:
    """The output of a form that has no other."""
    if output:
        raise ValueError(f"output={output}: this head has one output, 0")
    return 0


# -- refused -----------------------------------------------------------------------------------------------------------

_KEEPS = "and a stream keeps one row a step"
_REFUSED = (
    (
        r"^(proj_q|proj_k|proj_v|proj_qkv)\.|^attn_layer\.",
        (
            "is an attention probe over the sequence (SingProbe's): a score needs keys and values of all tokens before it, "
            f"{_KEEPS}; SingProbe's MLP can be loaded"
        ),
    ),
    (
        r"(^|\.)transformer_encoder\.|(^|\.)(step_end|entity)_embedding\.",
        f"is a transformer over the tokens (ReProbe, uncertainty heads): a score needs the states of a whole step, {_KEEPS}",
    ),
    (
        r"(^|\.)layers\.\d+\.(attn|self_attn|ffn)\.|^input_proj\.",
        (
            f"is a transformer over the steps (Gambit's sequence scorer): a score needs all steps before it, {_KEEPS}; Gambit's MLP "
            "can be loaded"
        ),
    ),
    (r"(^|\.)weight_[ih]h_l\d", f"is a recurrent network: a score needs all steps before it, {_KEEPS}"),
    (
        r"^dim_reduction\.|^base_model\.(fused|reward)_layer\.",
        "projects the states before its head, which SWIFT's code itself calls not ready for use",
    ),
)


def _refuse(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """ValueError for what is known and cannot be a head, with the reason."""
    for pattern, why in _REFUSED:
        if there := [key for key in tensors if re.search(pattern, key)]:
            raise ValueError(f"{there[0]}: this {why}")
    if said.get("type") == "sequence_transformer":
        raise ValueError(f"model_config.type: this {_REFUSED[2][1]}")
    gates = [key for key in tensors if re.search(r"(^|[._])gate", key)]
    if gates and not any(re.search("reward|value", key) for key in tensors):
        raise ValueError(f"{_listed(tensors)}: this is a gate without a value, and a gate weighs values")
    linear = [key for key, value in tensors.items() if key.endswith("weight") and value.dim() == 2]
    if len(linear) > 2 and {key.removesuffix("weight") + "bias" for key in linear} | set(linear) == set(tensors):
        raise ValueError(f"{_listed(tensors)}: this is an MLP of {len(linear) - 1} hidden layers, and a head has one")


def _unknown_keys(keys: set[str]) -> str:
    message = f"found {_listed(keys)}; no form that is known has these keys; known are {_KNOWN}"
    if any(map(_QUANTISED.search, keys)):
        message += "; it looks quantised, so give the head as it was trained"
    return message


def _listed(keys: Any) -> str:
    keys = sorted(map(str, keys))
    return (" ".join(keys[:12]) + f" and {len(keys) - 12} more" * (len(keys) > 12)) or "no tensor"


def _check(key: str, weight: Tensor) -> None:
    """ValueError unless it is a plain tensor of finite floats."""
    if hasattr(type(weight), "__tensor_flatten__"):  # torchao's, DTensor: what their memory holds is their own affair
        raise ValueError(f"{key} is a {type(weight).__name__}, no plain tensor; give the head as it was trained")
    if weight.dtype not in (*FLOATS, *_FLOAT8) or weight.layout != torch.strided:
        odd = weight.layout if weight.layout != torch.strided else weight.dtype
        raise ValueError(
            f"{key} is {odd}, no plain float: the head was quantised or cast, and its scales are not known here; give the head as "
            "it was trained"
        )
    wide = weight.float() if weight.dtype in _FLOAT8 else weight
    if not wide.isfinite().all():
        raise ValueError(f"{key} holds NaN or infinity, and every score would be NaN; train the head anew")


def _shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int | None, ...]]) -> None:
    """ValueError unless the tensors have these shapes; None stands for any size but 0."""
    for key, sizes in expected.items():
        shape = tuple(tensors[key].shape)
        if len(shape) != len(sizes) or 0 in shape or any(s not in (None, n) for s, n in zip(sizes, shape, strict=True)):
            raise ValueError(
                f"shapes do not fit together: {key} is {list(shape)}, expected [{', '.join('K' if s is None else str(s) for s in sizes)}]; "
                f"there are { ({k: list(tensors[k].shape) for k in expected}) }"
            )


def _copies(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copied: what safetensors reads is mapped from the file, which may be written anew while the head is in use."""
    return tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)


# -- metadata ----------------------------------------------------------------------------------------------------------


def _unwrapped(state: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, without wrappers' prefixes, and what is said of them: beside them, and in the metadata, which win."""
    if not isinstance(state, Mapping):
        raise ValueError(f"expected tensors by key, found {type(state).__name__}; save the head's state_dict()")  # noqa: TRY004
    said: dict[str, Any] = {}
    for name in _WRAPPED:
        if isinstance(state.get(name), Mapping):
            if isinstance(beside := state.get("model_config"), Mapping):
                said.update(beside)
            state = state[name]
            break
    if not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise ValueError(_unknown_keys(set(map(str, state))))
    tensors = {str(key): value for key, value in state.items()}
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    owners = {key.rpartition(".")[0] for key in tensors}
    if len(owners) == 1 and {key.rpartition(".")[2] for key in tensors} <= {"weight", "bias"} and len(tensors) <= 2:
        owner = owners.pop()  # one layer, whatever its name is
        if owner not in ("", "fused_layer", "reward_layer") and "gate" not in owner:
            tensors = {key.rpartition(".")[2]: value for key, value in tensors.items()}
    return tensors, said | {key: _parsed(value) for key, value in metadata.items()}


def _parsed(text: Any) -> Any:
    """A value of the metadata: JSON, or the text itself."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def with_metadata(form: Form, said: Mapping[str, Any]) -> Form:
    """The form as the metadata have it."""
    changes: dict[str, Any] = {}
    if "layers" in said:
        changes["layers"] = _integers("layers", said["layers"])
    if "norm" in said:
        if said["norm"] not in (False, True, "rms"):
            raise ValueError(f'norm={said["norm"]!r}; expected false, true or "rms"')
        changes["norm"] = said["norm"]
    if "at" in said:
        one_of("at", said["at"], ("predict", "token", "every"))
        changes["at"] = said["at"]
    if "activation" in said and form.activation is not None:
        one_of("activation", said["activation"], tuple(ACTIVATIONS))
        changes["activation"] = said["activation"]
    if "aggregation" in said:
        if not isinstance(said["aggregation"], str) or (said["aggregation"] == "gated") != (
            form.kind == "gated_linear"
        ):
            raise ValueError(f"aggregation={said['aggregation']!r} does not go with a head of the form {form.kind}")
        changes["aggregation"] = said["aggregation"]
    if isinstance(said.get("higher_is_better"), bool):
        changes["higher_is_better"] = said["higher_is_better"]
    if "sigmoid" in said:
        if not isinstance(said["sigmoid"], bool):
            raise ValueError(f"sigmoid={said['sigmoid']!r}; expected true or false")
        changes["sigmoid"] = said["sigmoid"]
    if said.get("step_rule") is not None:
        if not isinstance(said["step_rule"], dict):
            raise ValueError(
                f"step_rule={brief(said['step_rule'])}; expected an object, arguments of StepTokens.from_tokenizer"
            )
        changes["step_rule"] = said["step_rule"]
    if isinstance(said.get("trained_on"), str):
        changes["trained_on"] = said["trained_on"]
    unknown = {what: why for what, why in form.unknown.items() if what not in changes}
    return replace(form, **changes, unknown=unknown)


def _integers(name: str, value: Any) -> tuple[int, ...]:
    """Indices of layers, each once."""
    value = [value] if isinstance(value, int) else value
    whole = isinstance(value, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if not whole or not value or len(set(value)) != len(value):
        raise ValueError(f"{name}={brief(value)}: expected indices of layers, each once, such as [6, 14, 22]")
    return tuple(value)


# -- files -------------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a checkpoint holds, and its metadata: of the safetensors file, and those that SingProbe keeps in a file beside.

    Pickled code is never run: ``weights_only=True``, with numpy's scalars allowed, in which training scripts keep metrics.

    Args:
        path: a ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, or a directory with one.

    Returns:
        ``(state, metadata)``, for ``found``; the values of ``metadata`` are JSON or plain text.

    Raises:
        FileNotFoundError: no such file, or a directory with none or several.
        ValueError: truncated, damaged, a whole model, or pickled code.
    """
    file = _file(Path(path).expanduser())
    try:
        if file.suffix == ".safetensors":
            state, metadata = _safetensors(file)
        else:
            with torch.serialization.safe_globals(_numpy_scalars()):
                state, metadata = torch.load(file, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as e:
        why = "a pickled scikit-learn object (LYNX's probe, say)" if "sklearn" in str(e) else "pickled code"
        raise ValueError(
            f"{file} was refused: it is damaged, or holds {why} instead of tensors alone. Save the head's state dict with "
            f"torch.save(head.state_dict(), path). ({e})"
        ) from e
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError) as e:
        raise ValueError(f"{file} cannot be read as a checkpoint (truncated or corrupted?): {e}") from e
    return state, {**_beside(file), **metadata}


def _file(place: Path) -> Path:
    if place.is_file():
        return place
    files = sorted(f for f in place.iterdir() if f.suffix in SUFFIXES and f.is_file()) if place.is_dir() else []
    if len(files) != 1:
        there = f"holds {', '.join(f.name for f in files)}: give one of them" if files else "is no file of weights"
        raise FileNotFoundError(
            f"path={str(place)!r} {there}; expected a file that ends in one of {', '.join(SUFFIXES)}"
        )
    return files[0]


def _safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as content:
        keys = list(content.keys())
        if len(keys) > MOST:
            raise ValueError(f"{file} holds {len(keys)} tensors: a model, no head")
        return {key: content.get_tensor(key) for key in keys}, dict(content.metadata() or {})


def _numpy_scalars() -> list[Any]:
    """What unpickling a numpy scalar calls, under the names that numpy 1 and 2 gave it."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)}
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def _beside(file: Path) -> dict[str, str]:
    """What SingProbe's files beside say, as its converted ``config.json`` has it."""
    config, state = (read_json(file.parent / name) for name in _BESIDE)
    said: dict[str, Any] = {}
    trained = state.get("config")
    if isinstance(trained, dict) and isinstance(probe := trained.get("singprobe_model"), dict):
        base = trained.get("base_model") if isinstance(trained.get("base_model"), dict) else {}
        said = {
            "base_model_layer_ids": base.get("hidden_layers"), "hidden_size": base.get("hidden_size"),
            "base_model_name": base.get("name"), "hidden_act": probe.get("activation"),
        }  # fmt: skip
    if str(config.get("model_type", "")).startswith("sing_probe"):
        names = ("base_model_layer_ids", "hidden_size", "base_model_name", "hidden_act", "labels")
        said |= {name: config[name] for name in names if name in config}
    return {key: json.dumps(value) for key, value in said.items() if value is not None}
