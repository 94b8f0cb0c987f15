"""The ops: ``<op>.py`` is each op's plain-PyTorch definition, ``<op>_triton.py`` its Triton kernel."""

from .decode_step import decode_step
from .flush import flush
from .logit_rows import logit_rows
from .score_rows import score_rows
from .sprm_loss import sprm_loss, sprm_loss_backward
from .step_mask import step_mask
from .tally_slots import tally_slots

__all__ = [
    "decode_step",
    "flush",
    "logit_rows",
    "score_rows",
    "sprm_loss",
    "sprm_loss_backward",
    "step_mask",
    "tally_slots",
]
