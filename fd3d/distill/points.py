"""Places on a BEV map in metres: a box's points, and what a map says there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fd3d.boxes import YAW, L, W
from fd3d.grid import BEVGrid

# Fractions of length and width from the centre: corners, edge middles, centre, row by row.
_NINE = tuple((along, across) for along in (0.5, 0.0, -0.5) for across in (0.5, 0.0, -0.5))


def nine_points(boxes: Tensor) -> Tensor:
    """(M, 9, 2) metres: corners, middles of the edges and centre of boxes (M, 9) from above."""
    steps = boxes.new_tensor(_NINE)
    along = steps[:, 0] * boxes[:, L, None]
    across = steps[:, 1] * boxes[:, W, None]
    cos, sin = boxes[:, YAW, None].cos(), boxes[:, YAW, None].sin()
    x = boxes[:, :1] + cos * along - sin * across
    y = boxes[:, 1:2] + sin * along + cos * across
    return torch.stack([x, y], dim=-1)


def on_grid(boxes: Tensor, grid: BEVGrid) -> Tensor:
    """(M,) bool: the centre lies on the grid."""
    x, y = boxes[:, 0], boxes[:, 1]
    return (x >= grid.x_min) & (x < grid.x_max) & (y >= grid.y_min) & (y < grid.y_max)


def values_at(bev: Tensor, places: Tensor, grid: BEVGrid) -> Tensor:
    """(..., C) values of one frame's map (C, Y, X) at places (..., 2) in metres, bilinearly; zero
    beyond the grid."""
    low = places.new_tensor([grid.x_min, grid.y_min])
    size = places.new_tensor([grid.x_max - grid.x_min, grid.y_max - grid.y_min])
    where = (2 * (places - low) / size - 1).reshape(1, 1, -1, 2)
    found = functional.grid_sample(bev[None], where.to(bev.dtype), align_corners=False)
    return found[0, :, 0].T.reshape(*places.shape[:-1], len(bev))
