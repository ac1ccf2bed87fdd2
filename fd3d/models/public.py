"""The networks of BEVDet's two generations that others have trained, by the names of its configs.

Their state-dict keys and shapes are those of its checkpoints. `docs/models.md` says where the
generations differ.
"""

from __future__ import annotations

from dataclasses import replace

from fd3d.classes import ONE_TASK, SIX_TASKS
from fd3d.data.images import ImageSpec
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.config import (
    SIX_TASK_NMS,
    BEVDepthConfig,
    DecodeConfig,
    LossConfig,
    NMSConfig,
)
from fd3d.models.presets import HALF_EXTENT, r50

# Velocities count a fifth in the networks that see one frame.
SLOW_CODE = (1.0,) * 8 + (0.2, 0.2)
TEN_CLASS_NMS = (
    NMSConfig(threshold=0.2, factors=(1.0, 0.7, 0.7, 0.4, 0.55, 1.1, 1.0, 1.0, 1.5, 3.5), keep=500),
)


def bevdepth_r50l_single() -> BEVDepthConfig:
    """G1's bevdepth-r50: one frame of 256x704."""
    return _single(r50("bevdepth-r50l-single", height=256, width=704, cells=128))


def bevdepth_r50h_single() -> BEVDepthConfig:
    """The same on 512x1408 pictures and 256x256 cells."""
    return _single(r50("bevdepth-r50h-single", height=512, width=1408, cells=256))


def bevdet_r50_g1() -> BEVDepthConfig:
    """G1's bevdet-r50: one frame, depth from one convolution without supervision."""
    config = _single(r50("bevdet-r50-g1", height=256, width=704, cells=128))
    return replace(config, depth_net="plain", loss=LossConfig(code=SLOW_CODE, depth=0.0))


def _single(config: BEVDepthConfig) -> BEVDepthConfig:
    return replace(
        config,
        image=replace(config.image, moments=1),
        pre_process_blocks=0,
        displacement=False,
        loss=LossConfig(code=SLOW_CODE),
    )


def bevdet_r50() -> BEVDepthConfig:
    """G2's bevdet-r50: one frame, depth from one convolution without supervision."""
    return replace(
        _second("bevdet-r50", moments=1, one_task=True),
        image=_second_image(moments=1, step=1.0),
        neck=256,
        depth_net="plain",
        context=64,
        bev_widths=(128, 256, 512),
        loss=LossConfig(code=SLOW_CODE, depth=0.0),
    )


def bevdepth_r50_g2() -> BEVDepthConfig:
    """One frame of G2's BEVDepth with six tasks, which its 2.0 has as a two-frame network only."""
    return replace(_second("bevdepth-r50-g2", moments=1, one_task=False), aspp=512)


def bevdepth_r50_g2_dcn() -> BEVDepthConfig:
    """The same with the deformable convolution that G2's class has unless told otherwise."""
    return replace(bevdepth_r50_g2(), name="bevdepth-r50-g2-dcn", deformable=True)


def bevdet4d_r50_depth() -> BEVDepthConfig:
    """G2's bevdet4d-r50-depth-cbgs of version 2.0: nine frames, six tasks."""
    return replace(_second("bevdet4d-r50-depth", moments=9, one_task=False), aspp=512)


def bevdet_r50_4d_depth() -> BEVDepthConfig:
    """G2's bevdet-r50-4d-depth-cbgs of version 2.1: two frames, one task."""
    return _second("bevdet-r50-4d-depth", moments=2, one_task=True)


def bevdet_r50_4dlongterm_depth() -> BEVDepthConfig:
    """G2's bevdet-r50-4dlongterm-depth-cbgs of version 2.1: nine frames, one task."""
    return _second("bevdet-r50-4dlongterm-depth", moments=9, one_task=True)


def _second_image(*, moments: int, step: float) -> ImageSpec:
    return ImageSpec(
        height=256,
        width=704,
        depth_range=(1.0, 60.0, step),
        depth_cells="floor",
        channels="bgr",
        frame="ego",
        moments=moments,
    )


def _second(name: str, *, moments: int, one_task: bool) -> BEVDepthConfig:
    # Version 2.1 has one task and its own weights; 2.0 has six and G1's.
    heat, boxes = (6.0, 1.5) if one_task else (1.0, 0.25)
    return BEVDepthConfig(
        name=name,
        image=_second_image(moments=moments, step=0.5),
        grid=BEVGrid.square(half_extent=HALF_EXTENT, cells=128, frame="ego"),
        heights=(-5.0, 3.0),
        depth_net="aware",
        depth_width=512,
        deformable=False,
        context=80,
        aligned=False,
        pre_process_blocks=2 if moments > 1 else 0,
        bev_widths=(160, 320, 640),
        tasks=ONE_TASK if one_task else SIX_TASKS,
        convention="new",
        displacement=False,
        loss=LossConfig(heatmap=heat, bbox=boxes, depth=3.0, depth_form="softmax-bce"),
        decode=DecodeConfig(nms=TEN_CLASS_NMS if one_task else SIX_TASK_NMS),
    )
