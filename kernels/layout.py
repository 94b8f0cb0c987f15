"""Where each number of the stream's state and of the step automaton lives. Shared by every backend.

The C++ mirror is ``csrc/layout.h``; ``tests/test_build.py`` compares the two.
"""

import math

# Columns of ``seq``, int64 [N, SEQ_FIELDS]: one row a sequence. Columns of token ids are counted with left padding.
AUTOMATON = 0  # state of the step automaton before the next token
SEEN = 1  # columns consumed, so also the column of the next token
PAD = 2  # columns of left padding: the text's index 0 is column PAD
START = 3  # first column whose steps are in scope
N_THINK = 4  # think-start tags seen
N_END = 5  # think-end tags seen
HASH = 6  # running hash of every id consumed (wrapping 64-bit)
N_STEPS = 7  # steps found so far, scored or still waiting in the slot buffer
SEQ_FIELDS = 8

# Last dimension of ``tally``, float64 [N, N_REGIONS, TALLY_FIELDS]: sums over the scored steps of one region.
COUNT, LOG_SUM, MIN, LAST = range(4)
TALLY_FIELDS = 4

# A step's region: AFTER_THINK and AFTER_END flags, taken before the step's own token is counted as a tag. Which regions
# count is decided when the result is read: a second tag means that the tags bound nothing.
AFTER_THINK, AFTER_END = 1, 2
N_REGIONS = 4

# Columns of ``slot_owner``, int32 [R, OWNER_FIELDS]: whose step each row of the slot buffer is.
OWNER_SEQUENCE, OWNER_STEP, OWNER_REGION = range(3)
OWNER_FIELDS = 3

# An entry of ``transition``, int32 [n_classes, n_states]: next state in the low 16 bits, flags above.
NEXT_STATE = 0xFFFF
STEP, THINK, END = 1 << 16, 1 << 17, 1 << 18

# The workspace, float32 [workspace_size]: a header that is zero between calls (counters of arrived blocks), then sums.
WORKSPACE_HEADER = 64
UNIT_GROUP = 16  # units that share a line of partial sums at the least: one tile of the tensor cores' product

# What a head does with its hidden units, the ops' argument ``activation``. GELU is the exact one, by the error function.
RELU, GELU, GELU_TANH, SILU = range(4)

HASH_FACTOR = 6364136223846793005  # Knuth's MMIX multiplier; hash <- hash * factor + id + 1, modulo 2**64
LOG_FLOOR = math.log(1e-10)  # a step's log-score is never below this (paper section 3.2: scores clamped at 1e-10)


def counted_regions(n_think: int, n_end: int) -> list[int]:
    """Regions whose steps count, for the number of think-start and think-end tags in a whole text."""
    return [r for r in range(N_REGIONS) if (n_think != 1 or r & AFTER_THINK) and (n_end != 1 or not r & AFTER_END)]


def workspace_size(rows: int, units: int) -> int:
    """Floats of workspace that scoring ``rows`` rows at once takes at most, for a head of ``units`` units."""
    return WORKSPACE_HEADER + rows * (-(-units // UNIT_GROUP) + 4)
