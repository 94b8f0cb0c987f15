"""What this package knows of transformers beyond its documentation: all of it stands here, each fact with the releases it
was seen in, and nobody else spells these names.

``make compat`` runs the tests with both ends of ``TESTED``. With a release outside of it the first scorer that is attached
tries on a small model of transformers' own whether what scoring relies on still holds (``reflective.engines.hf.trial``), and warns.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VERSION = transformers.__version__
TESTED = ((5, 17), (5, 24))  # the oldest and the newest release that the tests were run with
_TESTED = " to ".join(".".join(map(str, version)) for version in TESTED)

try:
    from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer  # 5.17 to 5.24
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function  # 5.17 to 5.24
    from transformers.pytorch_utils import Conv1D  # 5.17 to 5.24
except ImportError as e:
    raise ImportError(
        f"transformers {VERSION} lacks what reflective-kernels needs of it ({e}); it was tested with {_TESTED}"
    ) from e

__all__ = ["Conv1D", "DynamicLayer", "DynamicSlidingWindowLayer", "causal_mask_function"]

# What a forward calls its cache where no annotation tells: "past_key_values" up to 5.23; from 5.24 on "cache", the other is
# deprecated. "layer_past" is what the layers of Bloom, Falcon, GPT-NeoX and MPT call it, 5.17 to 5.24.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past")

_COMPILED_CALL = "_compiled_call"  # where generate keeps its compiled forward, 5.17 to 5.24


# -- releases ------------------------------------------------------------------------------------------------------------


def release() -> tuple[int, int]:
    """Of the transformers that is installed."""
    major, minor = VERSION.split(".")[:2]
    return int(major), int(minor)


def unknown(what: str, model: nn.Module | None = None) -> RuntimeError:
    """The error for what the package relies on and does not find: ``what``, and who is to be asked about it."""
    name = type(model).__name__ if model is not None else "this model"
    if release() > TESTED[1]:
        why = (
            f"transformers {VERSION} is newer than this release of reflective-kernels knows: it was tested with {_TESTED}. "
            "Install one of these, and please report it in the issue tracker of reflective-kernels"
        )
    elif release() < TESTED[0]:
        why = f"transformers {VERSION} is older than reflective-kernels supports; install one of {_TESTED}"
    else:
        why = (
            f"The models of transformers {VERSION} that this was tested with are not so: look at the code of {name} itself; if it "
            "is transformers' own, please report it in the issue tracker of reflective-kernels"
        )
    return RuntimeError(f"{what}. {why}")


def is_tested() -> bool:
    """Whether the installed transformers is one that the tests were run with, or lies between two."""
    return TESTED[0] <= release() <= TESTED[1]


def warn_untested() -> None:
    """Say that the release is outside of ``TESTED``, and that all the same it has just been tried with success."""
    age = "newer" if release() > TESTED[1] else "older"
    warnings.warn(
        f"transformers {VERSION} is {age} than this release of reflective-kernels was tested with ({_TESTED}); "
        "what scoring relies on was tried on a small model and holds. If a score looks wrong, install a tested release, and "
        "please report it in the issue tracker of reflective-kernels",
        stacklevel=5,  # the `with` of whoever attaches a scorer
    )


def small_model() -> PreTrainedModel:
    """Two random layers of transformers' own, to try things on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 16,
    }
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


# -- forwards ------------------------------------------------------------------------------------------------------------


def ids_argument(model: nn.Module) -> str:
    """What the model's forward calls the token ids.

    Raises:
        RuntimeError: it takes none.
    """
    names = inspect.signature(model.forward).parameters
    wrapped = any(p.kind is p.VAR_KEYWORD for p in names.values())
    for name in ("input_ids", getattr(model, "main_input_name", "input_ids")):
        if name in names or wrapped and name == "input_ids":
            return name
    raise unknown(f"model: the forward of {type(model).__name__} takes no input_ids, only {', '.join(names)}", model)


def cache_in(values: Iterable[Any]) -> Any:
    """The key-value cache among the arguments or outputs of a forward, whatever it is called there: a ``Cache``, or what
    custom code has in its place, which counts its tokens as one does."""
    return next((value for value in values if isinstance(value, Cache) or hasattr(value, "get_seq_length")), None)


def cache_of(output: Any) -> Any:
    """The cache in what a model's forward returned."""
    return cache_in(output.values() if isinstance(output, Mapping) else output)


def cache_argument(module: nn.Module) -> str:
    """What the forward of ``module``, or of the model that it wraps, calls the cache that it takes.

    Raises:
        RuntimeError: it takes none.
    """
    for inner in module.modules():
        parameters = inspect.signature(inner.forward).parameters
        for name, parameter in parameters.items():
            if "Cache" in str(parameter.annotation):
                return name
        for name in _CACHE_NAMES:
            if name in parameters:
                return name
    raise unknown(f"model: no forward of {type(module).__name__} takes a cache", module)


def with_cache(module: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The argument by which to call ``module``, or its ``generate``, on ``cache``."""
    return {cache_argument(module): cache}


def state_argument(layer: nn.Module) -> str:
    """What a decoder layer's forward calls the hidden states: the first of its arguments, 5.17 to 5.24."""
    return next(iter(inspect.signature(layer.forward).parameters))


def state_in(name: str, size: int, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among the arguments of a decoder layer whose first one is called ``name``: that one, or the only one
    that is [B, q, size]. None if neither is a tensor."""
    given = args[0] if args else kwargs.get(name)
    if _is_state(given, size):
        return given
    found = [value for value in (*args, *kwargs.values()) if _is_state(value, size)]
    if len(found) == 1:
        return found[0]
    return given if isinstance(given, Tensor) else None


def _is_state(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] == size and value.is_floating_point()


def take_compiled_call(model: nn.Module) -> Any:
    """Take away the forward that generate has compiled; None if it has not."""
    return vars(model).pop(_COMPILED_CALL, None)


def give_compiled_call(model: nn.Module, compiled: Any) -> None:
    """Give back what ``take_compiled_call`` took, in place of what has been compiled since."""
    vars(model).pop(_COMPILED_CALL, None)
    if compiled is not None:
        vars(model)[_COMPILED_CALL] = compiled


# -- caches --------------------------------------------------------------------------------------------------------------


def counts_on_device(cache: Cache) -> bool:
    """Whether to ask a cache for its length makes the host wait: static ones count on the device, 5.17 to 5.24."""
    return bool(getattr(cache, "is_compileable", False))


def cache_layers(config: Any) -> list[Any]:
    """The layers of the cache that a model of this configuration makes by default."""
    return DynamicCache(config=config).layers


def cache_of_layers(layer: type[DynamicLayer]) -> DynamicCache:
    """An empty cache that makes itself a ``layer`` for every layer of the model."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = layer  # 5.17 to 5.24
    return cache


def has_float8_cache() -> bool:
    """Whether ``QuantizedCache`` has the backend "fp8": from some release after 5.17 on."""
    return hasattr(transformers.cache_utils, "Fp8QuantizedLayer")


class SeatLayer(CacheLayerMixin):
    """Keys and values [S, heads, C, width] of S seats, which stay where they are: a token of seat ``seats[i]``, which is i, goes to
    column ``lengths[i]``.

    For one token at a time, with a mask that says which columns a seat has: the layer itself has no length.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, seats: Tensor, lengths: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.seats, self.lengths = keys, values, seats, lengths
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.seats, :, self.lengths] = key_states[:, :, 0]
        self.values[self.seats, :, self.lengths] = value_states[:, :, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class SeatCache(Cache):
    """Of ``SeatLayer``, one a layer of the model; ``columns`` a seat, of ``dtype``."""

    def __init__(self, layers: list[SeatLayer]) -> None:
        super().__init__(layers=layers)
        self.columns, self.dtype = layers[0].keys.shape[2], layers[0].keys.dtype

    @property
    def reorder_cache(self) -> Any:
        """None: whose seat is whose, its owner alone knows, so that nobody need follow this cache."""
        raise AttributeError("seats are not reordered")


def vary(cache: SeatCache, *of_seats: Tensor) -> None:
    """Tell torch.compile that there will be other numbers of seats, of which there is one in ``of_seats`` [S, ...] each, and of columns."""
    mark = torch._dynamo.maybe_mark_dynamic
    for tensor in of_seats:
        mark(tensor, 0)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values, layer.lengths, layer.seats):
            mark(tensor, 0)
        mark(layer.keys, 2)
        mark(layer.values, 2)


def takes_dynamic_cache(model: PreTrainedModel) -> bool:
    """Whether a model is decoded with a ``DynamicCache``, or with a kind of its own. 5.17 to 5.24."""
    return model._supports_default_dynamic_cache()


# -- attention -----------------------------------------------------------------------------------------------------------


def can_exchange_attention(model: PreTrainedModel) -> bool:
    """Whether all of the model's attention goes through transformers' attention interface. 5.17 to 5.24."""
    return model._can_set_attn_implementation()


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """An attention under ``name``, and where a model asks for the mask that goes with it."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention_of(config: Any) -> str:
    """The name by which a model of this configuration attends. 5.17 to 5.24."""
    return config._attn_implementation


def exchange_attention(decoder: nn.Module, name: str) -> str:
    """From now on ``decoder`` attends by ``name``; returns by what before. Assigned as a dictionary it is that of this
    configuration alone, and of none within. 5.17 to 5.24."""
    before = attention_of(decoder.config)
    decoder.config._attn_implementation = {"": name}
    return before


# -- training ------------------------------------------------------------------------------------------------------------


def checkpoints(module: nn.Module) -> bool:
    """Whether ``module``, or a part of it, keeps only its inputs for the backward pass. 5.17 to 5.24; the property of models
    that tells so has had another name since 5.23, and warns under the old one."""
    return any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def set_checkpointing(model: PreTrainedModel, on: bool, reentrant: bool = False) -> None:
    """Switch gradient checkpointing. From 5.23 on it is "activation checkpointing", and warns under the old name."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": reentrant})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()
        model.disable_input_require_grads()  # which enabling brought along


def checkpointing_setting(on: bool) -> dict[str, bool]:
    """The same for ``TrainingArguments``."""
    from transformers import TrainingArguments  # heavy

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": on}


# -- generate ------------------------------------------------------------------------------------------------------------


# Arguments of generate by which it drafts tokens, and takes back what it does not accept: 5.17 to 5.24.
DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def compiled_everywhere(config: Any) -> Any:
    """A ``CompileConfig`` by which generate compiles on CPUs too, as it does for its own tests. 5.17 to 5.24."""
    config._compile_all_devices = True
    return config


# -- continuous batching ---------------------------------------------------------------------------------------------------


def unseen_forwards(manager: Any) -> list[str]:
    """What in a manager's configuration has it run the model where Python does not see its forwards. 5.17 to 5.24."""
    config = manager.continuous_batching_config
    unseen = {
        "use_cuda_graph": any(config.cuda_graph_booleans),
        "use_async_batching": bool(config.use_async_batching),
        "varlen_compile_config": config.varlen_compile_config is not None,
        "decode_compile_config": config.decode_compile_config is not None,
    }
    return [name for name, given in unseen.items() if given]


class BatchedRequest:
    """A request's part in a manager's next forward.

    Attributes:
        name: of the request.
        tokens, past: how many it has in this forward, and before it.
        prompt: its ids; once its cache was given up these are the beginning of what it is fed anew.
        children: names of the requests that go on from its prompt, which this forward ends.
    """

    def __init__(self, future: Any) -> None:  # 5.17 to 5.24
        state = future.state
        self.name, self.tokens = state.request_id, future.query_length
        self.past = state.position_offset - self.tokens  # the manager has moved it on already
        self.prompt = state.initial_tokens[: state._true_initial_tokens or None]
        forks = state.num_children if future.has_new_token else 0
        self.children = [f"{self.name}__child#{i}" for i in range(forks)]


def batched_requests(manager: Any) -> list[BatchedRequest]:
    """What the manager has put into its next batch. 5.17 to 5.24."""
    return [BatchedRequest(future) for future in manager.batch_processor.inputs_and_outputs.requests_in_batch]
