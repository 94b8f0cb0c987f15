"""Batch work: a file of texts or questions in, the same file with scores or answers out.

The input is read a window at a time, so memory does not grow with it: ``score.WINDOW_ROWS`` rows and ``score.WINDOW_TEXT``
characters of text at most (one row at the least), their tokens, and one batch's forward; of a file that is written,
``records.PIECE_BYTES``.

A run that was killed goes on where it was, see ``journal``: results are kept batch by batch, and batches are the same whenever
the same run is started, so that in the end the output is too, to the last bit.
"""

from ..utils.outputs import replacing
from ..utils.records import arriving, form_of, is_parquet, open_file, read_lines
from .generate import generate_file, seed_of
from .score import score_file, score_stream, windows

__all__ = [
    "arriving", "form_of", "generate_file", "is_parquet", "open_file", "read_lines", "replacing", "score_file", "score_stream",
    "seed_of", "windows",
]  # fmt: skip
