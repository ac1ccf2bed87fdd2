"""Maps as differences between rows: what is smooth packs into two thirds of the bytes.

Inside a tile each row but the first is stored as what it adds to the row before it, modulo 256.
Plain zarr-python reads the differences like any int8 array; `numpy.cumsum` undoes them.
"""

from __future__ import annotations

import numpy as np

from fd3d.resample import fused

_COMPILED = fused.found()


def differences(tile: np.ndarray) -> np.ndarray:
    """A tile (C, rows, columns) of int8 codes as differences of rows."""
    found = tile.copy()
    found[:, 1:] -= tile[:, :-1]
    return found


def accumulate(chunk: np.ndarray) -> None:
    """Undo `differences` in one tile (C, rows, columns) int8, in place."""
    if _COMPILED and chunk.flags.c_contiguous:
        from cache_tools.accumulate import accumulate_rows

        accumulate_rows(chunk)
        return
    for row in range(1, chunk.shape[1]):
        chunk[:, row] += chunk[:, row - 1]
