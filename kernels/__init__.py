"""The ops: ``<op>.py`` is each op's plain-PyTorch definition, ``<op>_triton.py`` its Triton kernel."""

from .decode_step import decode_step
from .flush import flush
from .score_rows import score_rows
from .step_mask import step_mask

__all__ = ["decode_step", "flush", "score_rows", "step_mask"]
