"""The models of vLLM, with the states that the head reads kept where the scorer finds them.

``getattr(models, "ReflectiveQwen2ForCausalLM")`` makes a subclass of vLLM's ``Qwen2ForCausalLM``. The states are auxiliary outputs of the kind that
EAGLE-3 drafters read, so every model that serves those can be scored; the state after the final norm is the output of any.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import EagleModelMixin, supports_eagle3

from ...scoring.sharded import aligned
from ...scoring.sprm import KEYS
from ...scoring.taps import Tap, by_rms
from . import modes
from .options import Options
from .plugin import PREFIX


class Scored:
    """What a model class of vLLM gets before it.

    Attributes:
        reflective_hidden: [rows, K], where every forward leaves what the head reads, its layers' states side by side and zeros up to a multiple
            of 8: a place that stays, for a CUDA graph writes there.
        reflective: the scores of its requests, once the runner is set up.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        modes.check(vllm_config)
        config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        plain = type(self).__mro__[2]  # [Reflective..., Scored, ...]
        tap, size = Options.of(vllm_config.additional_config).tap, config.get_hidden_size()
        order, below = _order(plain, tap, config.hf_text_config.num_hidden_layers)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if below:
            self.set_aux_hidden_state_layers(below)
        if 0 in below:
            _spare_embeddings(self)
        # As many as the largest graph has, which may be padded beyond the scheduler's tokens.
        rows = max(scheduler.max_num_batched_tokens, *(vllm_config.compilation_config.cudagraph_capture_sizes or [0]))
        self.reflective_hidden = torch.zeros(
            rows, aligned(size * len(order)), dtype=config.dtype, device=vllm_config.device_config.device
        )
        # Which auxiliary states there are, and where each state goes: those, and last the model's output.
        self._reflective_below, places = below, self.reflective_hidden[:, : size * len(order)].split(size, 1)
        self._reflective_places = dict(zip(order, places, strict=True))
        self._reflective_by_rms = tap.norm == "rms"
        self.reflective: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(*args, **kwargs)
        hidden, auxiliary = out if isinstance(out, tuple) else (out, [])
        if len(auxiliary) != len(self._reflective_below):
            raise ValueError(
                f"{type(self).__mro__[2].__name__} gives {len(auxiliary)} auxiliary hidden states where those of layers {self._reflective_below} "
                "were asked for, so which they are is not known; the Hugging Face engine can score it"
            )
        states = *auxiliary, hidden
        for i, place in self._reflective_places.items():
            place[: len(hidden)].copy_(by_rms(states[i]) if self._reflective_by_rms else states[i])
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Those of a head that lies beside the model's, which vLLM takes for the model's own, are passed over."""
        return super().load_weights((name, weight) for name, weight in weights if name not in KEYS)

    def get_model_state_cls(self) -> type:
        from .runner import scored_state

        return scored_state(super().get_model_state_cls() if hasattr(super(), "get_model_state_cls") else None)


def _spare_embeddings(model: nn.Module) -> None:
    """Have the first layer of ``model`` work on a copy of its input: the auxiliary state of index 0 is that input itself, which the layer takes for
    its residual and adds to in place.

    Raises:
        ValueError: the model gives no such state.
    """
    inner = getattr(model, "model", model)
    if not isinstance(inner, EagleModelMixin) or not hasattr(inner, "layers"):
        raise ValueError(
            f"layers: {type(model).__mro__[2].__name__} gives no auxiliary hidden state of index 0, the embeddings; the Hugging Face engine can "
            "score this head"
        )
    inner.layers[0].register_forward_pre_hook(_copied, with_kwargs=True)


def _copied(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(copy(value) for value in args), {name: copy(value) for name, value in kwargs.items()}


def _order(plain: type, tap: Tap, n: int) -> tuple[list[int], tuple[int, ...]]:
    """For a model of class ``plain`` with ``n`` layers: the states that are read, in the head's order, as places among the auxiliary states and,
    last, the model's output; and the indices of these auxiliary states, in ascending order, as they come. Index i is the output of layer i counted
    from 1, residual added, as in Hugging Face's ``hidden_states``; n is what comes behind the final norm.

    Raises:
        ValueError: the model has no such layer, or vLLM does not give it.
    """
    name = plain.__name__
    indices = tap.indices(n, name)
    below = tuple(sorted(i for i in indices if i < n))
    if tap.norm is True and below:
        raise ValueError(
            f"norm=True with layers={tap.layers}: vLLM gives states of layers below the last as they are, and the final norm is inside "
            "the model; the Hugging Face engine can score this head"
        )
    if below and not supports_eagle3(plain):
        raise ValueError(
            f"{name} gives no auxiliary hidden states (it is no SupportsEagle3), so it cannot be scored in vLLM by a head that reads layers "
            f"{tap.layers}; the Hugging Face engine can"
        )
    if n in indices and name.startswith("MiniCPM"):  # its output is divided by scale_width
        raise ValueError(f"layers={tap.layers}: {name} scales its output in vLLM, so -1 is another state there; the Hugging Face engine can")
    return [below.index(i) if i < n else len(below) for i in indices], below


@functools.cache
def scored(name: str) -> type[nn.Module]:
    """The class for vLLM's architecture ``name``.

    Raises:
        AttributeError: it has none.
    """
    if (entry := ModelRegistry.models.get(name)) is None:
        raise AttributeError(f"vLLM has no architecture {name}")
    plain = entry.load_model_cls()
    return type(PREFIX + name, (Scored, plain), {"__module__": __name__, "__doc__": f"``{name}`` with scores."})


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return scored(name.removeprefix(PREFIX))
