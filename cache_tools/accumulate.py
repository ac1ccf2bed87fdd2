"""Sums down the rows of tiles, compiled by numba."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def accumulate_rows(chunk):
    """Add to each row of (C, rows, columns) int8 the sum of those before it, modulo 256."""
    channels, rows, columns = chunk.shape
    for channel in range(channels):
        for row in range(1, rows):
            for column in range(columns):
                chunk[channel, row, column] = np.int8(
                    chunk[channel, row, column] + chunk[channel, row - 1, column]
                )
