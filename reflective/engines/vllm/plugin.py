"""Entry point ``vllm.general_plugins``: one more architecture for every one that vLLM has, with scores.

Nothing of vLLM is changed: ``ReflectiveQwen2ForCausalLM`` stands beside ``Qwen2ForCausalLM``, and is a class only when it is asked for by
``hf_overrides``. Which of them can be scored is found out then, see ``models``.
"""

PREFIX = "Reflective"


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in [n for n in ModelRegistry.models if not n.startswith(PREFIX)]:
        ModelRegistry.register_model(PREFIX + name, f"{__package__}.models:{PREFIX}{name}")
        if name in MODELS_CONFIG_MAP:  # what vLLM sets up for some architectures by their name
            MODELS_CONFIG_MAP.setdefault(PREFIX + name, MODELS_CONFIG_MAP[name])
