"""The models of vLLM, with the input of their last layer kept where the scorer finds it.

``getattr(models, "ReflectiveQwen2ForCausalLM")`` makes a subclass of vLLM's ``Qwen2ForCausalLM``. The state is an auxiliary output of the kind that
EAGLE-3 drafters read, so every model that serves those can be scored, and no other.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import supports_eagle3

from ...scoring.sprm import KEYS
from . import modes
from .plugin import PREFIX


class Scored:
    """What a model class of vLLM gets before it.

    Attributes:
        reflective_hidden: [rows, H], where every forward leaves the input of the last layer: a place that stays, for a CUDA graph writes there.
        reflective: the scores of its requests, once the runner is set up.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        modes.check(vllm_config)
        config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        plain = type(self).__mro__[2]  # [Reflective..., Scored, ...]
        if not supports_eagle3(plain):
            raise ValueError(
                f"{plain.__name__} gives no auxiliary hidden states (it is no SupportsEagle3), so it cannot be scored in vLLM; "
                "the Hugging Face engine can"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Index i: the output of layer i counted from 1, residual added. So this is Hugging Face's hidden_states[-2].
        self.set_aux_hidden_state_layers((config.hf_text_config.num_hidden_layers - 1,))
        # As many as the largest graph has, which may be padded beyond the scheduler's tokens.
        rows = max(scheduler.max_num_batched_tokens, *(vllm_config.compilation_config.cudagraph_capture_sizes or [0]))
        self.reflective_hidden = torch.zeros(
            rows, config.get_hidden_size(), dtype=config.dtype, device=vllm_config.device_config.device
        )
        self.reflective: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(*args, **kwargs)
        hidden, auxiliary = out
        self.reflective_hidden[: len(auxiliary[-1])].copy_(auxiliary[-1])
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Those of a head that lies beside the model's, which vLLM takes for the model's own, are passed over."""
        return super().load_weights((name, weight) for name, weight in weights if name not in KEYS)

    def get_model_state_cls(self) -> type:
        from .runner import scored_state

        return scored_state(super().get_model_state_cls() if hasattr(super(), "get_model_state_cls") else None)


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
