"""Part labels: which object, and which half of it, a cell of the image map looks at.

A training aid of the narrow presets, off in G1. From random weights the lifted features learn what
they show only through the whole BEV network, which takes thousands of steps; real recipes start
from ImageNet weights instead. Labelling image cells by the boxes that their lidar points lie in is
published (SA-BEV, Zhang et al., ICCV 2023); telling the front half from the rear is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fd3d.boxes import YAW, H, L, W, X, Y, Z
from fd3d.classes import CLASSES
from fd3d.data.batch import Batch
from fd3d.data.images import ImageSpec

# 0 is background, 1 + 2 * class the front half of an object, one more its rear half.
PARTS = 1 + 2 * len(CLASSES)
UNKNOWN = -1

# A cell's point is known to half a cell only, so boxes are a little generous.
MARGIN = 0.2  # metres on each side
BACKGROUND_WEIGHT = 0.2


def cell_points(batch: Batch, image: ImageSpec) -> Tensor:
    """(B, N, h, w, 3) metres in the keyframe's LIDAR frame: each cell's lidar point.

    The cell stands for its rounded pixel; cells without a point lie at the camera.
    """
    rows, columns = batch.depth.shape[-2:]
    device = batch.depth.device
    v, u = torch.meshgrid(
        torch.arange(rows, device=device) * float(image.stride),
        torch.arange(columns, device=device) * float(image.stride),
        indexing="ij",
    )
    pixels = torch.stack([u, v], dim=-1).view(1, 1, -1, 2) - batch.post_trans[:, 0, :, None, :2]
    turn = torch.linalg.inv(batch.post_rots[:, 0])[:, :, :2, :2]
    pixels = pixels @ turn.transpose(-1, -2)
    pixels = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
    lift = batch.rots[:, 0] @ torch.linalg.inv(batch.intrins[:, 0])
    rays = pixels @ lift.transpose(-1, -2)
    points = rays * batch.depth.flatten(2)[..., None] + batch.trans[:, 0, :, None]
    return points.view(*batch.depth.shape, 3)


@torch.no_grad()
def part_labels(batch: Batch, image: ImageSpec) -> Tensor:
    """(B * N, h, w) int64 part of every cell; `UNKNOWN` where no lidar point fell."""
    points = cell_points(batch, image)
    labels = torch.zeros(batch.depth.shape, dtype=torch.int64, device=points.device)
    for frame, (boxes, classes) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        if not len(boxes):
            continue
        offset = points[frame].reshape(-1, 1, 3) - boxes[:, [X, Y, Z]]
        cos, sin = boxes[:, YAW].cos(), boxes[:, YAW].sin()
        along = cos * offset[..., 0] + sin * offset[..., 1]
        across = cos * offset[..., 1] - sin * offset[..., 0]
        inside = (along.abs() < boxes[:, L] / 2 + MARGIN) & (
            across.abs() < boxes[:, W] / 2 + MARGIN
        )
        inside &= offset[..., 2].abs() < boxes[:, H] / 2 + MARGIN
        # Of two boxes that hold a point, the one whose centre is nearer.
        away = offset.square().sum(dim=-1).masked_fill(~inside, torch.inf)
        nearest, box = away.min(dim=1)
        part = 1 + 2 * classes[box] + (along.gather(1, box[:, None])[:, 0] < 0)
        labels[frame] = torch.where(nearest.isfinite(), part, 0).view(labels[frame].shape)
    return torch.where(batch.depth > 0, labels, UNKNOWN).flatten(0, 1)


def part_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B * N, PARTS, h, w) over the cells whose part is known."""
    weight = logits.new_ones(PARTS, dtype=torch.float32)
    weight[0] = BACKGROUND_WEIGHT
    entropy = functional.cross_entropy(
        logits.float(), labels, weight=weight, ignore_index=UNKNOWN, reduction="sum"
    )
    known = labels[labels >= 0]
    return entropy / weight[known].sum().clamp(min=1.0)
