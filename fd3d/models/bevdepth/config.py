"""Everything that tells one BEVDepth network from another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fd3d.classes import SIX_TASKS
from fd3d.data.images import ImageSpec
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.codes import CONVENTIONS
from fd3d.models.resnet import ResNetConfig

NAN_VELOCITY = ("zero", "ignore")
POOLING = ("sum", "mean")
DEPTH_FORMS = ("bce", "softmax-bce", "ce")
DEPTH_NETS = ("gated", "aware", "plain")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the training terms; the defaults are G1's.

    Args:
        heatmap, bbox, depth: weight of each kind of term; a depth of 0 leaves that term out.
        depth_form: "bce", G1's binary cross-entropy of every bin, averaged over all cells;
            "softmax-bce", G2's; or "ce", the cross-entropy of the softmax that the lift uses,
            averaged over cells with a lidar point, which sharpens depth within fewer steps.
        parts: weight of the part labels on the image map, see `parts`; 0 leaves the aid out.
        code: one factor for each of the ten regressed numbers (offset 2, z, log size 3, sine and
            cosine of yaw, displacement 2).
        nan_velocity: boxes without a known velocity (nuScenes has them where a track is too
            short) teach a velocity of zero ("zero"), as in G1, whose info files store zero, though
            some of them move; or no velocity at all ("ignore").
    """

    heatmap: float = 1.0
    bbox: float = 0.25
    depth: float = 100.0
    depth_form: str = "bce"
    parts: float = 0.0
    code: tuple[float, ...] = (1.0,) * 10
    nan_velocity: str = "zero"

    def __post_init__(self) -> None:
        if self.nan_velocity not in NAN_VELOCITY:
            raise UsageError(
                f"nan_velocity {self.nan_velocity!r} is not known: use one of "
                f"{', '.join(NAN_VELOCITY)}"
            )
        if self.depth_form not in DEPTH_FORMS:
            raise UsageError(
                f"depth_form {self.depth_form!r} is not known: use one of {', '.join(DEPTH_FORMS)}"
            )
        if len(self.code) != 10:
            raise UsageError(f"code needs ten weights, one a regressed number, not {self.code}")


@dataclass(frozen=True, kw_only=True)
class NMSConfig:
    """Suppression within one task.

    Args:
        threshold: rotated IoU above which the lower score goes; for `circle`, the largest squared
            centre distance in square metres at which it goes.
        factors: of the sizes, one for each class of the task ("scale-NMS"), only for the overlap.
        keep: most boxes left.
        circle: compare centre distances instead of overlaps.
    """

    threshold: float
    factors: tuple[float, ...]
    keep: int
    circle: bool = False


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """From maps to boxes; the defaults are G1's.

    Args:
        candidates: highest scores looked at in each task.
        min_score: lower ones are dropped.
        nms: one for each task.
        centre_limit: |x|, |y| and |z| in metres that a centre may reach.
    """

    nms: tuple[NMSConfig, ...]
    candidates: int = 500
    min_score: float = 0.1
    centre_limit: tuple[float, float, float] = (61.2, 61.2, 10.0)


SIX_TASK_NMS = (
    NMSConfig(threshold=0.2, factors=(1.0,), keep=83),
    NMSConfig(threshold=0.2, factors=(0.7, 0.7), keep=83),
    NMSConfig(threshold=0.2, factors=(0.4, 0.55), keep=83),
    NMSConfig(threshold=1.0, factors=(1.1,), keep=83, circle=True),
    NMSConfig(threshold=0.2, factors=(1.0, 1.0), keep=83),
    NMSConfig(threshold=0.5, factors=(4.5, 9.0), keep=83),
)
# Ten classes in one task, and networks whose yaw is not yet good enough for overlaps: one box
# within 2 m. Boxes of wrong heading overlap little and would all stay, in rows along the ray.
ONE_TASK_NMS = (NMSConfig(threshold=4.0, factors=(1.0,) * 10, keep=200, circle=True),)


@dataclass(frozen=True, kw_only=True)
class BEVDepthConfig:
    """One BEVDepth network; the defaults are those of G1's R50 with two frames.

    G1 and G2 are the first and the second generation of BEVDet; docs/models.md has one table of
    where they differ.

    Args:
        name: what checkpoints and caches record.
        image: what the network takes in; its stride must be that of the finest of the backbone's
            outputs, its frame the grid's.
        grid: of the BEV map; cells along each axis divide by the product of `bev_strides`.
        heights: lowest and highest metres of what is splatted.
        backbone: image network.
        neck: channels of the image neck.
        depth_net: "gated", G1's; "aware", G2's; "plain", BEVDet's one convolution.
        depth_width, depth_blocks: channels and residual blocks of the depth branch.
        aspp: channels of each branch of the pyramid in an aware depth branch.
        deformable: whether the depth branch ends in a deformable convolution.
        context: channels splatted for each moment.
        pooling: "sum" of what falls into a cell, as LSS and G1; or its "mean", weighted by depth
            probability. With wide cells a near one sums hundreds of points and a far one less than
            one, and a network without pretrained weights then spends its first thousand steps on
            that range.
        aligned: lift adjacent moments with the keyframe's cameras and warp their maps afterwards,
            as G1; otherwise each is lifted with its own cameras.
        pre_process_blocks: residual blocks on each moment's map before alignment, 0 for none.
        bev_widths, bev_blocks, bev_strides: of the three stages of the BEV network.
        pyramid: channels inside the BEV pyramid.
        bev_channels: of the map that the head reads, the signal `bev`.
        head: channels inside the head.
        tasks: class names of each task; concatenated they are `fd3d.classes.CLASSES`.
        convention: of the head's boxes, see `codes`.
        displacement: the head says how far objects move until the adjacent frame, not how fast.
        loss, decode: training terms and decoding.
    """

    name: str
    image: ImageSpec
    grid: BEVGrid
    heights: tuple[float, float] = (-10.0, 10.0)
    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    neck: int = 512
    depth_net: str = "gated"
    depth_width: int = 256
    depth_blocks: int = 3
    aspp: int = 96
    deformable: bool = True
    context: int = 64
    pooling: str = "sum"
    aligned: bool = True
    pre_process_blocks: int = 2
    bev_widths: tuple[int, int, int] = (128, 256, 512)
    bev_blocks: tuple[int, int, int] = (2, 2, 2)
    bev_strides: tuple[int, int, int] = (2, 2, 2)
    pyramid: int = 512
    bev_channels: int = 256
    head: int = 64
    tasks: tuple[tuple[str, ...], ...] = SIX_TASKS
    convention: str = "old"
    displacement: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    decode: DecodeConfig = field(default_factory=lambda: DecodeConfig(nms=SIX_TASK_NMS))

    def __post_init__(self) -> None:
        stride = self.backbone.output_stride()
        if stride != self.image.stride:
            raise UsageError(
                f"{self.name}: the backbone's finest output has stride {stride} but the image "
                f"spec says {self.image.stride}: make them equal"
            )
        step = math.prod(self.bev_strides)
        if self.grid.nx % step or self.grid.ny % step:
            raise UsageError(f"{self.name}: grid {self.grid} must have cells that divide by {step}")
        if self.grid.frame != self.image.frame:
            raise UsageError(
                f"{self.name}: the grid lies in the {self.grid.frame} frame but the image spec "
                f"says {self.image.frame}: make them equal"
            )
        for field_name, known in (
            ("pooling", POOLING),
            ("depth_net", DEPTH_NETS),
            ("convention", CONVENTIONS),
        ):
            value = getattr(self, field_name)
            if value not in known:
                raise UsageError(
                    f"{self.name}: {field_name} {value!r} is not known: use one of "
                    f"{', '.join(known)}"
                )
        if len(self.decode.nms) != len(self.tasks):
            raise UsageError(
                f"{self.name}: {len(self.tasks)} tasks need as many NMS settings, not "
                f"{len(self.decode.nms)}"
            )
