"""Instance areas: which cells of a BEV grid belong to boxes."""

from __future__ import annotations

import numpy as np

from fd3d.boxes import YAW, L, W
from fd3d.grid import BEVGrid


def footprints(boxes: np.ndarray, *, grid: BEVGrid, margin: float = 0.0) -> np.ndarray:
    """(Y, X) bool: cells whose square meets a box seen from above.

    A cell counts when its centre lies within the rotated rectangle, grown by `margin` and half a
    cell on every side, so that a box smaller than a cell has one.

    Args:
        boxes: (N, 9) as `fd3d.boxes`, in the grid's frame.
        margin: metres that the rectangle is wider on each side.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 9)
    x = grid.x_min + (np.arange(grid.nx) + 0.5) * grid.cell_x
    y = grid.y_min + (np.arange(grid.ny) + 0.5) * grid.cell_y
    found = np.zeros(grid.shape, bool)
    for box in boxes:
        cos, sin = np.cos(box[YAW]), np.sin(box[YAW])
        # The axes of the box take their share of each half cell.
        along = box[L] / 2 + margin + (abs(cos) * grid.cell_x + abs(sin) * grid.cell_y) / 2
        across = box[W] / 2 + margin + (abs(sin) * grid.cell_x + abs(cos) * grid.cell_y) / 2
        reach = np.hypot(along, across)
        rows = np.flatnonzero(np.abs(y - box[1]) <= reach)
        columns = np.flatnonzero(np.abs(x - box[0]) <= reach)
        if not len(rows) or not len(columns):
            continue
        dx = x[columns][None, :] - box[0]
        dy = y[rows][:, None] - box[1]
        inside = (np.abs(cos * dx + sin * dy) <= along) & (np.abs(cos * dy - sin * dx) <= across)
        found[np.ix_(rows, columns)] |= inside
    return found
