"""The ops that score a reasoning trace while it is decoded: a step detector over token ids and a small head on hidden states.

Each is a ``torch.ops`` op with a fake, so that ``torch.compile`` takes it into its graph. ``definition`` holds the same functions in plain
PyTorch, with every argument explained; ``layout`` says where each number of the stream's state lies. Compiled kernels answer on CPUs and,
in a build with CUDA, on NVIDIA GPUs of compute capability 8.0 and later; Triton answers on GPUs where there are none.
"""

from . import kernels as definition
from .kernels import layout
from .scoring.ops import cuda_architectures, op

step_mask = op.step_mask
score_rows = op.score_rows
logit_rows = op.logit_rows
decode_step = op.decode_step
flush = op.flush
tally_slots = op.tally_slots
sprm_loss = op.sprm_loss

__all__ = [
    "cuda_architectures",
    "decode_step",
    "definition",
    "flush",
    "layout",
    "logit_rows",
    "score_rows",
    "sprm_loss",
    "step_mask",
    "tally_slots",
]
