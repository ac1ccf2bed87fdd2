"""Instance areas: which cells of a BEV grid, or of the image planes, belong to boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fd3d.boxes import YAW, L, W
from fd3d.data.batch import Batch
from fd3d.data.images import ImageSpec
from fd3d.distill.pv import cell_pixels, stored_pixels
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.heatmap import MIN_OVERLAP, MIN_RADIUS, box_heatmap
from fd3d.models.precision import full_precision


def footprints(boxes: Tensor, *, grid: BEVGrid, margin: float = 0.0) -> Tensor:
    """(Y, X) bool: cells whose square meets a box seen from above.

    A cell counts when its centre lies within the rotated rectangle, grown by `margin` and half a
    cell on every side, so that a box smaller than a cell has one.

    Args:
        boxes: (M, 9) as `fd3d.boxes`, in the grid's frame.
        margin: metres that the rectangle is wider on each side.
    """
    x = grid.x_min + (torch.arange(grid.nx, device=boxes.device) + 0.5) * grid.cell_x
    y = grid.y_min + (torch.arange(grid.ny, device=boxes.device) + 0.5) * grid.cell_y
    cos, sin = boxes[:, YAW].cos(), boxes[:, YAW].sin()
    # The axes of the box take their share of each half cell.
    along = boxes[:, L] / 2 + margin + (cos.abs() * grid.cell_x + sin.abs() * grid.cell_y) / 2
    across = boxes[:, W] / 2 + margin + (sin.abs() * grid.cell_x + cos.abs() * grid.cell_y) / 2
    dx = x - boxes[:, :1]
    dy = y - boxes[:, 1:2]
    # (M, Y, X) distances along and across each box.
    ahead = (cos[:, None] * dx)[:, None, :] + (sin[:, None] * dy)[:, :, None]
    aside = (cos[:, None] * dy)[:, :, None] - (sin[:, None] * dx)[:, None, :]
    inside = (ahead.abs() <= along[:, None, None]) & (aside.abs() <= across[:, None, None])
    return inside.any(dim=0)


def bev_areas(boxes: Sequence[Tensor], *, grid: BEVGrid, margin: float = 0.0) -> Tensor:
    """(B, 1, Y, X) bool: `footprints` of each of B frames' boxes."""
    return torch.stack([footprints(one, grid=grid, margin=margin) for one in boxes])[:, None]


def image_areas(
    boxes: Sequence[Tensor], *, batch: Batch, image: ImageSpec, shape: tuple[int, int]
) -> Tensor:
    """(B * N, 1, h, w) bool: cells of the keyframe's image planes that look at a box.

    A cell's ray meets the box, which is the hull of the box's projected corners, and needs no
    clipping where a box reaches behind the camera. Boxes are wider on every side by half of what a
    cell covers at their distance, so that each box in sight has a cell.

    Args:
        boxes: B x (M, 9), in the frame of the batch.
        batch: the cameras.
        image: what the network takes in; `shape` (h, w) cells cover it.
    """
    pixels = stored_pixels(batch, cell_pixels(image, shape, batch.rots.device)).flatten(2, 3)
    with full_precision(batch.rots):
        pixels = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
        lift = batch.rots[:, 0] @ torch.linalg.inv(batch.intrins[:, 0])
        rays = pixels @ lift.transpose(-1, -2)  # (B, N, h * w, 3)
        rays = rays / rays.norm(dim=-1, keepdim=True)
        # Half of the angle between a row's neighbours.
        apart = rays.unflatten(2, shape).diff(dim=3).norm(dim=-1).flatten(1).mean(dim=1) / 2
        found = [
            _met(boxes[row], batch.trans[row, 0], rays[row], apart[row])
            for row in range(len(batch))
        ]
    return torch.stack(found).flatten(0, 1).unflatten(1, (1, *shape))


def _met(boxes: Tensor, origins: Tensor, rays: Tensor, spread: Tensor) -> Tensor:
    """(N, K) bool: which of the rays (N, K, 3) from `origins` (N, 3) meet one of `boxes`."""
    cos, sin = boxes[:, YAW].cos(), boxes[:, YAW].sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], dim=1).view(-1, 3, 3)
    start = torch.einsum("mij,nmj->nmi", turn, origins[:, None] - boxes[:, :3])  # (N, M, 3)
    ways = torch.einsum("mij,nkj->nmki", turn, rays)
    half = boxes[:, [L, W, 5]] / 2 + start.norm(dim=-1, keepdim=True) * spread
    # A ray along a face would divide nothing by nothing.
    ways = torch.where(ways.abs() < 1e-9, torch.full_like(ways, 1e-9), ways)
    low = (-half - start)[:, :, None] / ways
    high = (half - start)[:, :, None] / ways
    enter = torch.minimum(low, high).amax(dim=-1)
    leave = torch.maximum(low, high).amin(dim=-1)
    return ((enter <= leave) & (leave > 0)).any(dim=1)


def cached_boxes(tables: Sequence[Tensor], batch: Batch, *, grid: BEVGrid) -> list[Tensor]:
    """B x (M, 9) boxes of `detections` tables in the frame that the batch is in.

    The tables lie in the keyframe's LIDAR frame and know of no augmentation. Velocities and yaw
    turn with the boxes; under a mirroring augmentation yaw is mirrored.
    """
    if grid.frame == "ego" and batch.ego2lidar is None:
        raise UsageError(
            "cached detections lie in the LIDAR frame, and the batch does not say how the ego "
            "frame lies to it: give it ego2lidar"
        )
    found = []
    for row, table in enumerate(tables):
        with full_precision(table):
            matrix = torch.eye(3, device=table.device)
            shift = torch.zeros(3, device=table.device)
            if grid.frame == "ego":
                whole = torch.linalg.inv(batch.ego2lidar[row].double()).to(table)
                matrix, shift = whole[:3, :3], whole[:3, 3]
            if batch.bev_augment is not None:
                turn = batch.bev_augment[row].to(table)
                matrix, shift = turn @ matrix, turn @ shift
            found.append(_moved(table[:, :9], matrix, shift))
    return found


def object_gaussians(
    batch: Batch,
    grid: BEVGrid,
    *,
    min_overlap: float = MIN_OVERLAP,
    min_radius: int = MIN_RADIUS,
) -> Tensor:
    """(B, 1, Y, X): maximum over the true boxes of the Gaussians that CenterPoint draws, by
    default with its overlap and smallest radius."""
    size = {"min_overlap": min_overlap, "min_radius": min_radius}
    drawn = [
        box_heatmap(boxes, torch.zeros_like(labels), grid=grid, classes=1, **size)
        for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
    ]
    return torch.stack(drawn)


def _moved(boxes: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    heading = torch.stack([boxes[:, YAW].cos(), boxes[:, YAW].sin()], dim=1) @ matrix[:2, :2].T
    scale = torch.linalg.det(matrix[:2, :2]).abs().sqrt()
    return torch.cat(
        [
            boxes[:, :3] @ matrix.T + shift,
            boxes[:, 3:6] * scale,
            torch.atan2(heading[:, 1], heading[:, 0])[:, None],
            boxes[:, 7:9] @ matrix[:2, :2].T,
        ],
        dim=1,
    )
