"""What a training or inference step receives: images, camera geometry and ground truth.

Axes: B frames of the batch, N = 6 cameras in the order of `fd3d.classes.CAMERAS`, T moments
(0 = the keyframe, then its adjacent frames; single-frame networks have T = 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Frames as the networks take them; see the field comments for shapes and frames.

    A point of camera n at moment t, p = rots @ (K^-1 @ (u d, v d, d)) + trans, lies in the frame
    that the network works in (`fd3d.grid.FRAMES`: the keyframe's LIDAR_TOP or ego), BEV
    augmentation included; network pixel = post_rots @ (u, v, 1) + post_trans. For the adjacent
    moments the ego motion is already in rots/trans.
    """

    tokens: tuple[str, ...]  # B frame keys
    images: Tensor  # (B, N, T, 3, H, W) float32, normalised
    rots: Tensor  # (B, T, N, 3, 3) float32
    trans: Tensor  # (B, T, N, 3) metres
    intrins: Tensor  # (B, T, N, 3, 3) pixels of the stored image
    post_rots: Tensor  # (B, T, N, 3, 3) image augmentation and resizing
    post_trans: Tensor  # (B, T, N, 3)
    dt: Tensor  # (B,) seconds between keyframe and first adjacent frame, >= 0; 0 where T = 1
    bev_augment: Tensor | None = None  # (B, 3, 3) what rots/trans hold of it; None = nothing
    ego2lidar: Tensor | None = None  # (B, 4, 4) keyframe's ego to its LIDAR_TOP, un-augmented
    depth: Tensor | None = None  # (B, N, h, w) metres on the network's depth map, 0 = no point
    # B x (M, 9) float32, same frame as rots; velocities NaN where the data set has none
    boxes: tuple[Tensor, ...] | None = None
    labels: tuple[Tensor, ...] | None = None  # B x (M,) int64, index into CLASSES

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""

        def move(value):
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                return tuple(item.to(device, non_blocking=True) for item in value)
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def without_truth(self) -> Batch:
        """The same batch as at inference: no depth map, no boxes."""
        return replace(self, depth=None, boxes=None, labels=None)


@dataclass(frozen=True, kw_only=True)
class Rig:
    """The cameras of B frames without their pictures; fields as in `Batch`."""

    rots: Tensor
    trans: Tensor
    intrins: Tensor
    post_rots: Tensor
    post_trans: Tensor
    bev_augment: Tensor | None = None


def collate(samples: Sequence[Batch]) -> Batch:
    """One batch from single-frame batches (B = 1 each), in order."""
    if not samples:
        raise ValueError("cannot collate an empty list of samples")
    joined = {}
    for field in fields(Batch):
        values = [getattr(sample, field.name) for sample in samples]
        if values[0] is None:
            joined[field.name] = None
        elif isinstance(values[0], tuple):
            joined[field.name] = tuple(item for value in values for item in value)
        else:
            joined[field.name] = torch.cat(values)
    return Batch(**joined)


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Boxes that a network found in one frame, in the frame of its BEV grid.

    boxes: (M, 9) float32 as `fd3d.boxes`, velocity in m/s; scores: (M,) in [0, 1];
    labels: (M,) int64 into CLASSES. Sorted as the decoder left them. frame: one of
    `fd3d.grid.FRAMES`.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    frame: str = "lidar"

    def __len__(self) -> int:
        return len(self.scores)
