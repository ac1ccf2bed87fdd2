"""The meaning of resampling, in float64 and in the plainest steps; every fast path is held to it.

Dequantise, read the map between cell centres at every part of every target cell, then average
(intensity) or sum (density) the parts of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd3d.resample.geometry import ONE, Plan


def positions(plan: Plan, frame: int) -> tuple[Tensor, Tensor]:
    """Columns and rows of the source at which one frame is read, (Y * sy, X * sx) float64."""
    ax, bx, cx, ay, by, cy, sx, sy = (int(step) for step in plan.steps[frame])
    rows = torch.arange(plan.to_shape[0] * sy)[:, None]
    cols = torch.arange(plan.to_shape[1] * sx)[None, :]
    # Whole numbers up to here; float64 holds those of every position inside a map exactly.
    column = (ax * cols + bx * rows + cx).double() / ONE
    row = (ay * cols + by * rows + cy).double() / ONE
    return column, row


def resample_reference(
    stored: Tensor, *, scale: Tensor, zero: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """(B, C, Y, X) float64 map and (B, 1, Y, X) bool mask of what has a source.

    Args:
        stored: (B, C, *plan.from_shape), any dtype.
        scale, zero: (B, C), value = zero + scale * stored.
        plan: from `make_plan`.
    """
    frames, channels = stored.shape[:2]
    result = stored.new_empty((frames, channels, *plan.to_shape), dtype=torch.float64)
    valid = torch.empty((frames, 1, *plan.to_shape), dtype=torch.bool)
    for frame in range(frames):
        value = zero[frame].double()[:, None, None] + (
            scale[frame].double()[:, None, None] * stored[frame].double()
        )
        result[frame], valid[frame, 0] = _one_frame(value, plan, frame)
    return result, valid


def _one_frame(value: Tensor, plan: Plan, frame: int) -> tuple[Tensor, Tensor]:
    high, wide = plan.from_shape
    column, row = positions(plan, frame)
    # A position has a source where it lies in the map's rectangle, edges included.
    inside = (column >= -0.5) & (column <= wide - 0.5) & (row >= -0.5) & (row <= high - 0.5)
    left, top = column.floor(), row.floor()
    right_share, bottom_share = column - left, row - top

    def read(at_row: Tensor, at_column: Tensor) -> Tensor:
        # Beyond the outermost centres the outermost cells go on.
        return value[:, at_row.long().clamp(0, high - 1), at_column.long().clamp(0, wide - 1)]

    upper = read(top, left) * (1 - right_share) + read(top, left + 1) * right_share
    lower = read(top + 1, left) * (1 - right_share) + read(top + 1, left + 1) * right_share
    parts = (upper * (1 - bottom_share) + lower * bottom_share) * inside

    sx, sy = (int(count) for count in plan.steps[frame, 6:])
    shape = (plan.to_shape[0], sy, plan.to_shape[1], sx)
    total = parts.reshape(len(value), *shape).sum(dim=(2, 4))
    found = inside.reshape(shape).sum(dim=(1, 3))
    if plan.density:
        return total / (sx * sy) * float(plan.gain[frame]), found > 0
    return total / found.clamp(min=1), found > 0
