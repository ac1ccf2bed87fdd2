"""The networks that can be asked for by name."""

from __future__ import annotations

from fd3d.classes import ONE_TASK
from fd3d.data.images import ImageSpec
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.config import ONE_TASK_NMS, BEVDepthConfig, DecodeConfig, LossConfig
from fd3d.models.resnet import ResNetConfig

HALF_EXTENT = 51.2
# More weight on the sine and cosine of yaw and on displacement. At one, two thousand steps leave
# them at the median of their loss, which is zero; docs/models.md has the comparison.
MOTION_CODE = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 3.0, 3.0)
# The tiny pair looks half as far: at 1.6 m a cell a car is one cell wide and shows no heading.
TINY_HALF_EXTENT = 25.6


def bevdepth_r50h() -> BEVDepthConfig:
    """FD3D's expert: R50, 512x1408 pictures, 256x256 cells of 0.4 m."""
    return r50("bevdepth-r50h", height=512, width=1408, cells=256)


def bevdepth_r50l() -> BEVDepthConfig:
    """FD3D's apprentice: R50, 256x704 pictures, 128x128 cells of 0.8 m."""
    return r50("bevdepth-r50l", height=256, width=704, cells=128)


def bevdepth_tiny_h() -> BEVDepthConfig:
    """An expert that two CPU cores can train: 128x352 pictures, 64x64 cells of 0.8 m."""
    return _tiny("bevdepth-tiny-h", height=128, width=352, cells=64)


def bevdepth_tiny_l() -> BEVDepthConfig:
    """Its apprentice, the same network on 64x176 pictures and 32x32 cells of 1.6 m."""
    return _tiny("bevdepth-tiny-l", height=64, width=176, cells=32)


def r50(name: str, *, height: int, width: int, cells: int) -> BEVDepthConfig:
    """G1's bevdepth4d-r50 at a picture size and a number of cells along each side."""
    return BEVDepthConfig(
        name=name,
        image=ImageSpec(height=height, width=width, resize_test=0.04),
        grid=BEVGrid.square(half_extent=HALF_EXTENT, cells=cells),
    )


def _tiny(name: str, *, height: int, width: int, cells: int) -> BEVDepthConfig:
    # Around a million parameters against 53, one task in place of six, and, because nothing starts
    # from ImageNet weights and few steps follow, three aids that G1 does not have: mean pooling,
    # softmax cross-entropy for depth, and part labels. docs/models.md has what they were worth.
    return BEVDepthConfig(
        name=name,
        image=ImageSpec(height=height, width=width, stride=8, depth_range=(1.0, 40.0, 0.5)),
        grid=BEVGrid.square(half_extent=TINY_HALF_EXTENT, cells=cells),
        backbone=ResNetConfig(
            bottleneck=False, stem=16, widths=(32, 64, 96), blocks=(2, 2, 2), outputs=(1, 2)
        ),
        neck=48,
        depth_width=32,
        depth_blocks=1,
        deformable=False,
        context=32,
        pooling="mean",
        pre_process_blocks=1,
        bev_widths=(64, 96, 128),
        bev_blocks=(1, 1, 1),
        bev_strides=(1, 2, 2),
        pyramid=64,
        bev_channels=64,
        head=32,
        tasks=ONE_TASK,
        loss=LossConfig(
            bbox=0.3,
            depth=0.5,
            depth_form="ce",
            parts=1.0,
            code=MOTION_CODE,
            nan_velocity="ignore",
        ),
        decode=DecodeConfig(nms=ONE_TASK_NMS, min_score=0.03),
    )
