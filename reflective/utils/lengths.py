"""Which texts share a forward."""

import numpy as np

FORWARD = 128  # tokens that a forward costs besides its own: launches, and weights that are read again


def batches_by_length(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Rows grouped by length, each group's padded size within ``batch_tokens`` (or a single row), so that all forwards
    together cost the least: ``sum over groups of (rows x longest + FORWARD)``, found by dynamic programming."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cost, begin = np.zeros(len(order) + 1), [0] * (len(order) + 1)  # of the first i rows; where their last group begins
    for i, row in enumerate(order, 1):
        first = max(0, i - max(1, batch_tokens // max(1, lengths[row])))
        sums = cost[first:i] + lengths[row] * np.arange(i - first, 0, -1) + FORWARD
        begin[i] = first + int(sums.argmin())
        cost[i] = sums.min()
    groups, end = [], len(order)
    while end:
        groups.append(order[begin[end] : end])
        end = begin[end]
    return groups[::-1]
