"""Splatting image features into the BEV: which cell each frustum point falls in, and the sum.

A point is one (camera, depth bin, pixel); its feature is depth probability times the pixel's
context. `pool_reference` builds all of them and adds; `pool` gets the same sums from a table of
points sorted by cell, without ever holding a feature per point, as points outside are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fd3d import cuda
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.pooling_cuda import pool_cupy
from fd3d.models.precision import full_precision


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """The points inside the grid, sorted by cell.

    Args:
        points: (K,) int64 into the flattened (P, D, h, w) depth probabilities.
        pixels: (K,) int32 into the (P * h * w) pixels.
        starts: (B * Y * X + 1,) int32, first point of every cell, K at the end.
        shape: (B, Y, X).
        cells: (P * D * h * w,) int32 cell of every point, -1 outside; on CUDA devices only, whose
            gradients need it.
    """

    points: Tensor
    pixels: Tensor
    starts: Tensor
    shape: tuple[int, int, int]
    cells: Tensor | None = None


def cells_of(points: Tensor, grid: BEVGrid, heights: tuple[float, float]) -> Tensor:
    """(B, ...) int64 flat index into (B, Y, X) of points (B, ..., 3) in metres; -1 outside.

    BEVDet truncates towards zero, so what lies up to one cell below a lower bound counts as inside:
    in height too, where `heights` (lowest, highest metres) is the one cell.
    """
    lowest, highest = heights
    column = (points[..., 0] - grid.x_min) / grid.cell_x
    row = (points[..., 1] - grid.y_min) / grid.cell_y
    level = (points[..., 2] - lowest) / (highest - lowest)
    inside = (column > -1) & (column < grid.nx) & (row > -1) & (row < grid.ny)
    inside &= (level > -1) & (level < 1)
    batch = torch.arange(len(points), device=points.device) * (grid.ny * grid.nx)
    flat = row.long() * grid.nx + column.long()
    flat += batch.view(-1, *[1] * (flat.dim() - 1))
    return flat.masked_fill_(~inside, -1)


def point_table(cells: Tensor, grid: BEVGrid) -> PointTable:
    """The table of `cells` (B, N, D, h, w) from `cells_of`."""
    batch, cameras, bins, height, width = cells.shape
    flat = cells.flatten()
    points = (flat >= 0).nonzero()[:, 0]
    sorted_cells, order = torch.sort(flat[points].int(), stable=True)
    points = points[order]
    pixels = points // (bins * height * width) * (height * width) + points % (height * width)
    bounds = torch.arange(
        batch * grid.ny * grid.nx + 1, device=cells.device, dtype=sorted_cells.dtype
    )
    starts = torch.searchsorted(sorted_cells, bounds, out_int32=True)
    # 32 bits are enough for both and make the backward pass, which sorts them, a quarter faster.
    return PointTable(
        points=points,
        pixels=pixels.int(),
        starts=starts,
        shape=(batch, grid.ny, grid.nx),
        cells=flat.int() if flat.is_cuda else None,
    )


def pool(depth: Tensor, context: Tensor, table: PointTable) -> Tensor:
    """(B, C, Y, X) float32 sums over cameras, depths and pixels.

    Args:
        depth: (P, D, h, w) probabilities, P = B * N.
        context: (P, C, h, w).
        table: of the frusta's points.
    """
    channels = context.shape[1]
    with full_precision(depth):
        rows = context.float().permute(0, 2, 3, 1)
        if depth.is_cuda and cuda.missing() is None:
            sums = pool_cupy(depth.float(), rows, table)
            return sums.view(*table.shape, channels).permute(0, 3, 1, 2)
        rows = rows.reshape(-1, channels)
        weights = depth.float().reshape(-1)[table.points]
        sums = functional.embedding_bag(
            table.pixels,
            rows,
            table.starts,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
    return sums.view(*table.shape, channels).permute(0, 3, 1, 2)


def pool_reference(depth: Tensor, context: Tensor, cells: Tensor, grid: BEVGrid) -> Tensor:
    """As `pool`, straight from the definition, with every point's feature in memory.

    `cells` (B, N, D, h, w) is what `cells_of` returned.
    """
    volume = depth.float()[:, :, None] * context.float()[:, None]  # (P, D, C, h, w)
    features = volume.permute(0, 1, 3, 4, 2).reshape(-1, context.shape[1])
    flat = cells.flatten()
    sums = features.new_zeros(len(cells) * grid.ny * grid.nx, context.shape[1])
    sums = sums.index_add(0, flat[flat >= 0], features[flat >= 0])
    return sums.view(len(cells), grid.ny, grid.nx, -1).permute(0, 3, 1, 2)
