"""Which ways of running vLLM are refused: those in which nobody has compared the scores."""

from typing import Any

DRAFTS = ("ngram", "draft_model")  # ways of speculation that were tried


def check(config: Any) -> None:
    """``config``: vLLM's.

    Raises:
        ValueError: a mode that is not supported, by its name in vLLM.
    """
    parallel, compilation, speculation = config.parallel_config, config.compilation_config, config.speculative_config
    model = config.model_config
    refused = {
        "is_multimodal_model": model.is_multimodal_model and "it was tried on text alone",
        "is_hybrid": (model.is_hybrid or model.is_attention_free) and "recurrent states were not tried",
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1 and "the layers that are read may lie on two ranks",
        "data_parallel_size": parallel.data_parallel_size > 1 and "replicas have to be started apart",
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1 and "ranks see parts of a prompt",
        "decode_context_parallel_size": getattr(parallel, "decode_context_parallel_size", 1) > 1 and "it was not tried",
        "enable_batch_sharded_sampling": getattr(parallel, "enable_batch_sharded_sampling", None) and "ranks see other requests",
        "enable_dbo": getattr(parallel, "use_ubatching", parallel.enable_dbo) and "a forward is cut in two",
        "pass_config.enable_sp": getattr(compilation.pass_config, "enable_sp", False) and "ranks see parts of the hidden states",
        "speculative_config.method": speculation is not None
        and speculation.method not in DRAFTS
        and f"{speculation.method!r} is not among {', '.join(DRAFTS)}",
        "watermark_config": getattr(config, "watermark_config", None) is not None and "it takes the sampler's place",
        "enable_prompt_embeds": model.enable_prompt_embeds and "such a prompt has no ids",
        "kv_transfer_config": config.kv_transfer_config is not None and "tokens that another engine computed have no states here",
    }  # fmt: skip
    for name, why in refused.items():
        if why:
            raise ValueError(f"{name}: reflective does not score in this mode: {why}")
