"""Boxes in the head's own terms, and back: the one place where mmdet3d's conventions appear.

A code is ten numbers: offset in the cell (column, row), z of the centre, three log sizes, sine and
cosine of an angle, and two numbers for motion. What the sizes and the angle are depends on the
version of mmdet3d that a network was written for, and nothing in a checkpoint tells them apart; a
mixed pair looks like boxes of swapped width and length that are turned by a right angle.

    old (before 1.0, BEVDet's first generation): w l h, angle = `old_yaw`
    new (from 1.0 on, its second generation):    l w h, angle = yaw
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd3d.boxes import VX, VY, YAW, H, L, W, Z, old_yaw, wrap_angle

CONVENTIONS = ("old", "new")
# Which column of a box each log size is.
_SIZES = {"old": [W, L, H], "new": [L, W, H]}


def encode(boxes: Tensor, offset: Tensor, convention: str) -> Tensor:
    """(K, 10) codes of boxes (K, 9) as `fd3d.boxes` whose centres lie at `offset` (K, 2) in their
    cells; the last two numbers are the boxes' last two columns as they are."""
    angle = boxes[:, YAW] if convention == "new" else old_yaw(boxes[:, YAW])
    columns = [
        offset,
        boxes[:, Z, None],
        boxes[:, _SIZES[convention]].log(),
        angle.sin()[:, None],
        angle.cos()[:, None],
        boxes[:, VX : VY + 1],
    ]
    return torch.cat(columns, dim=1)


def decode_codes(codes: Tensor, x: Tensor, y: Tensor, convention: str) -> Tensor:
    """(..., 9) boxes of codes (..., 10) whose centres lie at x, y (...) metres."""
    angle = torch.atan2(codes[..., 6], codes[..., 7])
    yaw = angle if convention == "new" else wrap_angle(old_yaw(angle))
    sizes = codes[..., 3:6].exp()
    w, l, h = (sizes[..., _SIZES[convention].index(column)] for column in (W, L, H))  # noqa: E741
    return torch.stack([x, y, codes[..., 2], w, l, h, yaw, codes[..., 8], codes[..., 9]], dim=-1)
