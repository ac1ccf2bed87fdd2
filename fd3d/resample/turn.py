"""Matrix transposition for the CPU loops: planar to channels-last and back, compiled by numba.

Eight bytes at a time: small squares of numbers are turned in registers, for one-byte numbers
eight times faster than moving them one by one. Numbers are only moved, so types go by size.

Nothing here may be called from a compiled function of another file: numba's cache on disk does
not notice when a file beside the caller's changes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_compiled = njit(cache=True, nogil=True)
_inlined = njit(inline="always")

# Squares of a tile along the longer lines; source and target of a tile stay in the first cache.
_TILE = 64


@_compiled
def turn(source, out):
    """The transpose of (R, K) `source` into (K, R) `out`.

    Both C-contiguous, of one number type of 1, 2 or 4 bytes.
    """
    lanes = 8 // source.itemsize
    rows, columns = source.shape
    if rows % lanes or columns % lanes:
        _turn_singly(source, out)
        return
    _turn_squares(lanes, source.view(np.uint64), out.view(np.uint64))


@_compiled
def _turn_singly(source, out):
    rows, columns = source.shape
    for start in range(0, columns, _TILE):
        for row in range(rows):
            for column in range(start, min(start + _TILE, columns)):
                out[column, row] = source[row, column]


@_compiled
def _swap(upper, lower, bits, mask):
    """Two rows of a square with the halves beside the diagonal exchanged."""
    crossed = ((upper >> np.uint64(bits)) ^ lower) & np.uint64(mask)
    return upper ^ (crossed << np.uint64(bits)), lower ^ crossed


@_inlined
def _square_of_words(source, group, k, out):
    a, b = _swap(source[2 * group, k], source[2 * group + 1, k], 32, 0xFFFFFFFF)
    out[2 * k, group] = a
    out[2 * k + 1, group] = b


@_inlined
def _square_of_halves(source, group, k, out):
    row, wide, narrow = 4 * group, 0x00000000FFFFFFFF, 0x0000FFFF0000FFFF
    a, c = _swap(source[row, k], source[row + 2, k], 32, wide)
    b, d = _swap(source[row + 1, k], source[row + 3, k], 32, wide)
    a, b = _swap(a, b, 16, narrow)
    c, d = _swap(c, d, 16, narrow)
    out[4 * k, group], out[4 * k + 1, group] = a, b
    out[4 * k + 2, group], out[4 * k + 3, group] = c, d


@_inlined
def _square_of_bytes(source, group, k, out):
    row = 8 * group
    wide, narrow, single = 0x00000000FFFFFFFF, 0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF
    a, e = _swap(source[row, k], source[row + 4, k], 32, wide)
    b, f = _swap(source[row + 1, k], source[row + 5, k], 32, wide)
    c, g = _swap(source[row + 2, k], source[row + 6, k], 32, wide)
    d, h = _swap(source[row + 3, k], source[row + 7, k], 32, wide)
    a, c = _swap(a, c, 16, narrow)
    b, d = _swap(b, d, 16, narrow)
    e, g = _swap(e, g, 16, narrow)
    f, h = _swap(f, h, 16, narrow)
    a, b = _swap(a, b, 8, single)
    c, d = _swap(c, d, 8, single)
    e, f = _swap(e, f, 8, single)
    g, h = _swap(g, h, 8, single)
    out[8 * k, group], out[8 * k + 1, group] = a, b
    out[8 * k + 2, group], out[8 * k + 3, group] = c, d
    out[8 * k + 4, group], out[8 * k + 5, group] = e, f
    out[8 * k + 6, group], out[8 * k + 7, group] = g, h


@_compiled
def _turn_squares(lanes, source, out):
    groups, words = source.shape[0] // lanes, source.shape[1]
    # Keep to few of the longer lines at a time: lines lie powers of two apart, where caches hold
    # only a few of them.
    if groups > words:
        for start in range(0, groups, _TILE):
            for k in range(words):
                for group in range(start, min(start + _TILE, groups)):
                    _square(lanes, source, group, k, out)
        return
    for start in range(0, words, _TILE):
        for group in range(groups):
            for k in range(start, min(start + _TILE, words)):
                _square(lanes, source, group, k, out)


@_inlined
def _square(lanes, source, group, k, out):
    if lanes == 8:
        _square_of_bytes(source, group, k, out)
    elif lanes == 4:
        _square_of_halves(source, group, k, out)
    else:
        _square_of_words(source, group, k, out)
