"""Moving the adjacent frame's BEV map to where the current frame's grid lies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fd3d.grid import BEVGrid
from fd3d.models.precision import full_precision


def adjacent_to_current(rots: Tensor, trans: Tensor, moment: int = 1) -> Tensor:
    """(B, 3, 3) motion in the ground plane of a moment's map against the current one.

    rots (B, T, N, 3, 3) and trans (B, T, N, 3) as in `Batch`; as in G1 the pose of the first
    camera stands for all.
    """
    pair = [0, moment]
    poses = torch.eye(4, device=rots.device).expand(rots.shape[0], 2, 4, 4).clone()
    poses[:, :, :3, :3] = rots[:, pair, 0]
    poses[:, :, :3, 3] = trans[:, pair, 0]
    with full_precision(rots):
        motion = poses[:, 0] @ torch.linalg.inv(poses[:, 1])
    plane = [0, 1, 3]
    return motion[:, plane][:, :, plane]


def warp(bev: Tensor, motion: Tensor, grid: BEVGrid) -> Tensor:
    """The adjacent map (B, C, Y, X) read at A @ (col, row, 1), bilinear, zero outside.

    G1 measures cells from the grid's lower bound, not from the first cell's centre; that half
    cell under rotation is kept.
    """
    rows, columns = grid.shape
    device = bev.device
    with full_precision(bev):
        to_metres = torch.tensor(
            [[grid.cell_x, 0.0, grid.x_min], [0.0, grid.cell_y, grid.y_min], [0.0, 0.0, 1.0]],
            device=device,
        )
        cell_motion = torch.linalg.inv(to_metres) @ motion.float() @ to_metres
        row, column = torch.meshgrid(
            torch.arange(rows, device=device, dtype=torch.float32),
            torch.arange(columns, device=device, dtype=torch.float32),
            indexing="ij",
        )
        cells = torch.stack([column, row, torch.ones_like(row)], dim=-1).view(1, -1, 3)
        source = (cells @ cell_motion.transpose(1, 2))[..., :2]
        size = torch.tensor([columns - 1.0, rows - 1.0], device=device)
        where = (source / size * 2 - 1).view(-1, rows, columns, 2)
        return functional.grid_sample(
            bev.float(), where, mode="bilinear", padding_mode="zeros", align_corners=True
        )
