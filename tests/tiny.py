"""Small random models and an oracle that follows the specification word by word."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import reflective as rf

PATIENCE = 3600  # seconds after which a process or thread hangs: no measure of how fast a machine is
VOCAB, HIDDEN, THINK, END_THINK, PAD = 61, 64, 3, 4, 0
IMAGE, VIDEO, VISION_START = range(VOCAB, VOCAB + 3)  # of vision-language models only
STEP_IDS = list(range(10, 22))  # about one sampled token in five ends a step
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD,
}  # fmt: skip
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16, "experts_implementation": "eager"}  # the fused has no float64
_SEEING = {**_SIZES, "vocab_size": VOCAB + 3}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "mistral_sliding": MistralConfig(**_SIZES, sliding_window=8),
    "gemma": GemmaConfig(**_SIZES, head_dim=16),
    "gemma2": Gemma2Config(**_SIZES, **_WINDOW, head_dim=16),
    "gemma3": Gemma3TextConfig(**_SIZES, **_WINDOW, head_dim=16),
    "phi": PhiConfig(**_SIZES),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=PAD),
    # As many experts, and layers in the vision tower, as the decoder has layers: neither may be taken for these.
    "mixtral": MixtralConfig(**_SIZES, **_EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**_SIZES, **_EXPERTS, num_experts=4, moe_intermediate_size=48),
    "qwen2_vl": Qwen2VLConfig(
        text_config={**_SEEING, "rope_parameters": _MROPE},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START,
        vision_config={"depth": 4, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4},
    ),
    "llava": LlavaConfig(
        text_config=LlamaConfig(**_SEEING), image_token_index=IMAGE, vision_feature_layer=-2,
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4,
        ),
    ),
}  # fmt: skip


def model(kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[kind])  # which the model changes, for instance with its attention
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    net = auto.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(6.0)  # the default initialisation hardly moves the hidden state
    return net


def head(dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, seed: int = 0) -> rf.SPRM:
    torch.manual_seed(seed)
    return rf.SPRM(hidden).to(dtype).requires_grad_(False).eval()


def steps(**kwargs: object) -> rf.StepTokens:
    return rf.StepTokens(**{"step_ids": STEP_IDS, "think_start_id": THINK, "think_end_id": END_THINK, **kwargs})


def expected_steps(ids: Sequence[int], prompt_length: int = 0) -> list[int]:
    """Text indices of the step-tokens that count, from the prose of the specification."""
    a = ids.index(THINK) if ids.count(THINK) == 1 else 0
    e = ids.index(END_THINK) if ids.count(END_THINK) == 1 else len(ids)
    return [
        t
        for t in range(len(ids))
        if ids[t] in STEP_IDS and ids[t - 1] not in STEP_IDS and ids[t - 1] != THINK
        and a + 2 <= t <= e and t >= max(prompt_length, 2)
    ]  # fmt: skip


def second_pass(net: PreTrainedModel, sprm: rf.SPRM, ids: Sequence[int], at: str, prompt_length: int = 0) -> Tensor:
    """Step log-scores as the published pipeline gets them: the whole text alone, every hidden state kept."""
    with torch.no_grad():
        hidden = net(torch.tensor([ids], device=net.device), output_hidden_states=True).hidden_states[-2][0]
        found = [t - (at == "predict") for t in expected_steps(ids, prompt_length)]
        return F.logsigmoid(sprm(hidden[found]).squeeze(-1).to(torch.promote_types(sprm.dtype, torch.float32))).cpu()


def geometric_mean(log_scores: Tensor) -> float:
    return math.exp(log_scores.double().clamp_min(math.log(1e-10)).mean()) if len(log_scores) else 0.0
