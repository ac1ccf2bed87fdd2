"""The parts of the first generation's depth branch: a gate that knows the camera, and blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fd3d.models.bevdepth.bev_encoder import BEVResNet
from fd3d.models.deformable import DeformableConv2d
from fd3d.models.precision import full_precision

CAMERA_NUMBERS = 33


@dataclass(frozen=True, kw_only=True)
class Cameras:
    """Geometry of one moment's cameras, each field (B, N, ...) as in `fd3d.data.batch.Batch`, and
    the BEV augmentation (B, 3, 3) that is already in rots and trans, None where there is none."""

    rots: Tensor
    trans: Tensor
    intrins: Tensor
    post_rots: Tensor
    post_trans: Tensor
    bev_augment: Tensor | None = None


class CameraGate(nn.Module):
    """Scales channels by a sigmoid of the camera's parameters ("SE" in BEVDepth)."""

    def __init__(self, *, inputs: int, outputs: int) -> None:
        super().__init__()
        self.input_conv = nn.Conv2d(inputs, outputs, 1)
        self.fc = nn.Sequential(
            nn.BatchNorm1d(CAMERA_NUMBERS), nn.Linear(CAMERA_NUMBERS, outputs), nn.Sigmoid()
        )

    def forward(self, x: Tensor, cameras: Tensor) -> Tensor:
        """(P, inputs, h, w) and (P, 33) camera numbers to (P, outputs, h, w)."""
        # Focal lengths are in the thousands: the gate is computed in float32 under autocast too.
        with full_precision(x):
            gate = self.fc(cameras.float())
        x = self.input_conv(x)
        return x * gate.to(x.dtype)[:, :, None, None]


def camera_numbers(cameras: Cameras) -> Tensor:
    """(B * N, 33): K, image rotation, image shift, camera rotation, camera position, row-major."""
    names = ("intrins", "post_rots", "post_trans", "rots", "trans")
    return torch.cat([getattr(cameras, name).flatten(0, 1).flatten(1) for name in names], dim=1)


class DepthConv(nn.Sequential):
    """Deformable (or plain 3x3) convolution, then a batch norm without activation."""

    def __init__(self, width: int, *, deformable: bool) -> None:
        conv = DeformableConv2d(width, width) if deformable else nn.Conv2d(width, width, 3, 1, 1)
        super().__init__(conv, nn.BatchNorm2d(width))


def depth_blocks(width: int, blocks: int) -> BEVResNet:
    """The residual blocks between the gate and the deformable convolution, all at stride 1."""
    return BEVResNet(inputs=width, widths=(width,), blocks=(blocks,), strides=(1,))
