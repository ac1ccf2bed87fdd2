"""Ground-truth heatmaps as CenterPoint draws them: one Gaussian a box, merged by maximum.

Zhou et al., "Objects as Points"; Yin et al., "Center-based 3D Object Detection and Tracking". The
radius comes from the box's footprint and the overlap that a shifted box must still have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd3d.boxes import L, W
from fd3d.grid import BEVGrid

MIN_OVERLAP = 0.1
MIN_RADIUS = 2


def gaussian_radius(length: Tensor, width: Tensor, min_overlap: float = MIN_OVERLAP) -> Tensor:
    """How far, in the unit of the sizes, a box may shift and still overlap by `min_overlap`.

    CornerNet's three cases, with the roots divided by 2 throughout, as every code base that
    descends from CenterNet does.
    """
    total, area = length + width, length * width
    both_shifted = area * (1 - min_overlap) / (1 + min_overlap)
    first = (total + (total**2 - 4 * both_shifted).sqrt()) / 2
    second = (2 * total + (4 * total**2 - 16 * (1 - min_overlap) * area).sqrt()) / 2
    shrink = -2 * min_overlap * total
    third = (shrink + (shrink**2 - 16 * min_overlap * (min_overlap - 1) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(first, second), third)


def box_radii(
    boxes: Tensor,
    grid: BEVGrid,
    min_overlap: float = MIN_OVERLAP,
    min_radius: int = MIN_RADIUS,
) -> Tensor:
    """(M,) int64 radius in cells of the Gaussians of `boxes` (M, 9), at least `min_radius`."""
    radius = gaussian_radius(boxes[:, L] / grid.cell_y, boxes[:, W] / grid.cell_x, min_overlap)
    return radius.long().clamp(min=min_radius)


def box_cells(boxes: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Centres of `boxes` (M, 9) as (col, row) in cells: float (M, 2), truncated int64 (M, 2), and
    (M,) bool: on the grid, and with a footprint."""
    lower = boxes.new_tensor([grid.x_min, grid.y_min])
    cell = boxes.new_tensor([grid.cell_x, grid.cell_y])
    exact = (boxes[:, :2] - lower) / cell
    whole = exact.long()
    size = torch.tensor([grid.nx, grid.ny], device=boxes.device)
    valid = ((whole >= 0) & (whole < size)).all(dim=1)
    valid &= (boxes[:, W] > 0) & (boxes[:, L] > 0)
    return exact, whole, valid


def draw_gaussians(
    *, cells: Tensor, radii: Tensor, planes: Tensor, count: int, shape: tuple[int, int]
) -> Tensor:
    """(count, Y, X) float32 maps, each the maximum of the Gaussians drawn into it.

    Args:
        cells: (M, 2) int64 (col, row) of the peaks, on the map.
        radii: (M,) int64; sigma is (2 r + 1) / 6, nothing is drawn further than r away in x or y.
        planes: (M,) int64 in [0, count).
        count, shape: how many maps, and their (Y, X).
    """
    rows, columns = shape
    maps = torch.zeros(count * rows * columns, device=cells.device)
    if not len(cells):
        return maps.view(count, rows, columns)
    reach = int(radii.max())
    steps = torch.arange(-reach, reach + 1, device=cells.device)
    dy, dx = (step.reshape(1, -1) for step in torch.meshgrid(steps, steps, indexing="ij"))
    sigma = (2 * radii + 1).to(torch.float64)[:, None] / 6
    values = torch.exp(-(dx**2 + dy**2) / (2 * sigma**2)).float()
    column, row = cells[:, :1] + dx, cells[:, 1:] + dy
    near = torch.maximum(dx.abs(), dy.abs()) <= radii[:, None]
    near &= (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    flat = (planes[:, None] * rows + row) * columns + column
    maps.scatter_reduce_(0, flat[near], values[near], reduce="amax")
    return maps.view(count, rows, columns)


def box_heatmap(
    boxes: Tensor,
    labels: Tensor,
    *,
    grid: BEVGrid,
    classes: int,
    min_overlap: float = MIN_OVERLAP,
    min_radius: int = MIN_RADIUS,
) -> Tensor:
    """(classes, Y, X) float32 heatmap of one frame's `boxes` (M, 9) on `grid`; 1 at centres.

    Boxes outside of the grid, without a footprint, or labelled outside [0, classes) are left out.
    """
    _, cells, valid = box_cells(boxes, grid)
    valid &= (labels >= 0) & (labels < classes)
    return draw_gaussians(
        cells=cells[valid],
        radii=box_radii(boxes[valid], grid, min_overlap, min_radius),
        planes=labels[valid],
        count=classes,
        shape=grid.shape,
    )
