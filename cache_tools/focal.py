"""Maps that are stored in full only where objects are: whole tiles there, block means elsewhere.

Both are in the codes of one scale and zero, so a map put together of them is one int8 map like any
other, and the tiles that are there are what `balanced` would have stored.
"""

from __future__ import annotations

import numpy as np

Place = tuple[int, int, int]

# Under this name an expert gives the mask of what is to be kept, beside its signals.
FOCUS = "focus"


def tiles_in(focus: np.ndarray, tile: int) -> np.ndarray:
    """(tile rows, tile columns) uint8: 1 where any cell of a tile is in `focus`, (Y, X) bool."""
    return _blocks(focus, tile).any(axis=(1, 3)).astype(np.uint8)


def coarse(code: np.ndarray, block: int) -> np.ndarray:
    """(C, Y, X) int8 codes to the means of blocks of cells, rounded; blocks at the far edges are
    filled up with the map's last cells."""
    found = [np.rint(_blocks(plane, block, mode="edge").mean(axis=(1, 3))) for plane in code]
    return np.stack(found).astype(np.int8)


def spread(means: np.ndarray, out: np.ndarray, block: int) -> None:
    """Fill `out`, (C, Y, X) with any strides, with the mean of the block that each cell is in."""
    for row in range(min(block, out.shape[1])):
        for column in range(min(block, out.shape[2])):
            into = out[:, row::block, column::block]
            into[...] = means[:, : into.shape[1], : into.shape[2]]


def places(tiles: np.ndarray) -> frozenset[Place]:
    """The chunks of the map's array that the tiles mark."""
    return frozenset((0, int(row), int(column)) for row, column in np.argwhere(tiles == 1))


def cells(tiles: np.ndarray, tile: int, shape: tuple[int, int]) -> np.ndarray:
    """(Y, X) bool: the cells of a map of that shape that are inside marked tiles."""
    whole = np.repeat(np.repeat(tiles == 1, tile, axis=0), tile, axis=1)
    return whole[: shape[0], : shape[1]]


def _blocks(plane: np.ndarray, edge: int, mode: str = "constant") -> np.ndarray:
    """(Y, X) to (rows, edge, columns, edge), padded where the plane does not divide."""
    pad = [(0, -length % edge) for length in plane.shape]
    padded = np.pad(plane, pad, mode=mode)
    rows, columns = (length // edge for length in padded.shape)
    return padded.reshape(rows, edge, columns, edge)
