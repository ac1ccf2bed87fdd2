"""The BEVDepth network, of either generation and any number of frames, from a batch to boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fd3d.data.batch import Batch, Detections, Rig
from fd3d.errors import UsageError
from fd3d.models.bevdepth.alignment import adjacent_to_current, warp
from fd3d.models.bevdepth.bev_encoder import BEVPyramid, BEVResNet
from fd3d.models.bevdepth.camera_aware import DepthNet
from fd3d.models.bevdepth.config import BEVDepthConfig
from fd3d.models.bevdepth.decode import decode
from fd3d.models.bevdepth.depth_net import Cameras
from fd3d.models.bevdepth.head import CenterHead
from fd3d.models.bevdepth.losses import depth_loss, head_losses
from fd3d.models.bevdepth.parts import PARTS, part_labels, part_loss
from fd3d.models.bevdepth.targets import make_targets
from fd3d.models.bevdepth.view_transform import (
    AwareViewTransform,
    GatedViewTransform,
    PlainViewTransform,
    PointTable,
    ViewTransform,
)
from fd3d.models.fpn import FPN
from fd3d.models.resnet import ResNet


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the image branch makes of one moment, in N cameras' image planes.

    depth_logits: (B * N, D, h, w). context: (B * N, C, h, w). pv: (B * N, neck, h, w), the image
    neck's map, of the keyframe; None of the others, which keep no more than they need.
    """

    depth_logits: Tensor
    context: Tensor
    pv: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a forward pass yields.

    depth_logits: (B * N, D, h, w) of the keyframe. bev: (B, C, Y, X), the map that the head reads
    ("bev_encoder_out"). shared: (B, head, Y, X), the map inside the head that all its branches
    read, behind a ReLU. tasks: the head's raw maps, see `head.CenterHead`. pv: (B * N, neck, h, w)
    of the keyframe, see `Seen`. part_logits: (B * N, PARTS, h, w) of the keyframe, None in networks
    without that training aid.
    """

    depth_logits: Tensor
    bev: Tensor
    shared: Tensor
    tasks: tuple[dict[str, Tensor], ...]
    pv: Tensor
    part_logits: Tensor | None = None


class BEVDepth(nn.Module):
    """BEVDepth as in BEVDet, whose adjacent frames are detached.

    State-dict keys are those of its checkpoints; tensors are built from torch's global generator.

    Args:
        config: see `BEVDepthConfig`.
    """

    def __init__(self, config: BEVDepthConfig) -> None:
        super().__init__()
        self.config = config
        self.img_backbone = ResNet(config.backbone)
        self.img_neck = FPN(inputs=config.backbone.output_channels, outputs=config.neck)
        self.img_view_transformer = _view_transform(config)
        self.pre_process_net = None
        if config.pre_process_blocks:
            self.pre_process_net = BEVResNet(
                inputs=config.context,
                widths=(config.context,),
                blocks=(config.pre_process_blocks,),
                strides=(1,),
            )
        self.img_bev_encoder_backbone = BEVResNet(
            inputs=config.image.moments * config.context,
            widths=config.bev_widths,
            blocks=config.bev_blocks,
            strides=config.bev_strides,
        )
        self.img_bev_encoder_neck = BEVPyramid(
            inputs=config.bev_widths[0] + config.bev_widths[2],
            width=config.pyramid,
            outputs=config.bev_channels,
            stride=config.bev_strides[0],
        )
        self.pts_bbox_head = CenterHead(
            inputs=config.bev_channels, width=config.head, tasks=config.tasks
        )
        self.part_head = None
        if config.loss.parts:
            self.part_head = nn.Conv2d(config.context, PARTS, 1)
        self.to(memory_format=torch.channels_last)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def grid(self):
        """Where the cells of `bev` and of the head's maps lie."""
        return self.config.grid

    @property
    def image(self):
        """The preprocessing that the pictures need."""
        return self.config.image

    @property
    def bev_channels(self) -> int:
        return self.config.bev_channels

    def forward(self, batch: Batch) -> Outputs:
        """All moments to the head's maps; adjacent ones take no part in autograd.

        The batch norms still learn their statistics, after the keyframe's, as in BEVDet.
        """
        if batch.images.shape[2] != self.image.moments:
            raise UsageError(
                f"{self.name} needs {self.image.moments} moments a frame, not "
                f"{batch.images.shape[2]}: load the frames with the network's own image spec"
            )
        return self.outputs(self.see(batch), batch)

    def outputs(self, seen: Sequence[Seen], batch: Batch) -> Outputs:
        """The head's maps from what `see` gave for the batch."""
        now = seen[0]
        bev = self.assemble([(_probability(one.depth_logits), one.context) for one in seen], batch)
        shared = self.pts_bbox_head.shared_conv(bev)
        return Outputs(
            depth_logits=now.depth_logits,
            bev=bev,
            shared=shared,
            tasks=self.pts_bbox_head.branches(shared),
            pv=now.pv,
            part_logits=self.part_head(now.context) if self.part_head is not None else None,
        )

    def see(self, batch: Batch) -> list[Seen]:
        """What the image branch makes of each moment, the keyframe first.

        The depth branch is told the keyframe's poses at every moment, in both generations.
        """
        found = []
        for moment in range(self.image.moments):
            with torch.set_grad_enabled(torch.is_grad_enabled() and moment == 0):
                images = batch.images[:, :, moment].flatten(0, 1)
                images = images.contiguous(memory_format=torch.channels_last)
                neck = self.img_neck(self.img_backbone(images))
                told = moment_cameras(batch, moment)
                logits, context = self.img_view_transformer(neck, told)
                kept = neck if moment == 0 else None
                found.append(Seen(depth_logits=logits, context=context, pv=kept))
        return found

    def assemble(self, factors: Sequence[tuple[Tensor, Tensor]], rig: Batch | Rig) -> Tensor:
        """The map that the head reads, from the moments' factors: splatted, aligned, encoded.

        Args:
            factors: depth probabilities (B * N, D, h, w) and context (B * N, C, h, w) of each
                moment, from `see` or a cache.
            rig: the geometry, which may be another than the factors were seen with.
        """
        view = self.img_view_transformer
        placed = moment_cameras(rig, 0)
        table = view.table(placed)
        maps = [self._splat(*factors[0], table)]
        for moment, (probability, context) in enumerate(factors[1:], 1):
            with torch.no_grad():
                before, placed = placed, moment_cameras(rig, moment, own=not self.config.aligned)
                if not _same(before, placed):
                    table = view.table(placed)
                adjacent = self._splat(probability, context, table)
                if self.config.aligned:
                    motion = adjacent_to_current(rig.rots, rig.trans, moment)
                    adjacent = warp(adjacent, motion, self.grid)
                maps.append(adjacent.to(maps[0].dtype))
        return self.encode(torch.cat(maps, dim=1))

    def _splat(self, probability: Tensor, context: Tensor, table: PointTable) -> Tensor:
        """One moment's BEV map before alignment."""
        bev = self.img_view_transformer.splat(probability, context, table)
        if self.pre_process_net is not None:
            (bev,) = self.pre_process_net(bev)
        return bev

    def drop_image_branch(self) -> None:
        """Forget the weights in front of the splat; `assemble` and what follows it still work."""
        self.img_backbone = self.img_neck = self.part_head = None
        for name in list(self.img_view_transformer._modules):
            setattr(self.img_view_transformer, name, None)

    def encode(self, bev: Tensor) -> Tensor:
        """All moments' maps (B, moments * context, Y, X) to the map that the head reads."""
        fine, _, coarse = self.img_bev_encoder_backbone(bev)
        return self.img_bev_encoder_neck(fine, coarse)

    def head(self, bev: Tensor) -> tuple[dict[str, Tensor], ...]:
        """The raw maps of every task from (B, C, Y, X), a cached one for instance."""
        return self.pts_bbox_head(bev)

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms whose sum is trained; `batch` must hold depth, boxes and labels."""
        if batch.boxes is None or batch.labels is None or batch.depth is None:
            raise UsageError("the loss needs depth, boxes and labels: load the frames with truth")
        targets = make_targets(
            boxes=batch.boxes,
            labels=batch.labels,
            dt=self._seconds(batch.dt),
            grid=self.grid,
            tasks=self.config.tasks,
            convention=self.config.convention,
        )
        terms = head_losses(outputs.tasks, targets, self.config.loss)
        weights = self.config.loss
        if weights.depth:
            depth = depth_loss(outputs.depth_logits, batch.depth, self.image, weights.depth_form)
            terms["depth"] = depth * weights.depth
        if outputs.part_logits is not None:
            parts = part_loss(outputs.part_logits, part_labels(batch, self.image))
            terms["parts"] = parts * weights.parts
        return terms

    def decode(self, tasks: tuple[dict[str, Tensor], ...], dt: Tensor) -> list[Detections]:
        """Boxes of every frame in the grid's frame, m/s; dt (B,) seconds to the adjacent frame."""
        return decode(
            tasks,
            self._seconds(dt),
            grid=self.grid,
            config=self.config.decode,
            convention=self.config.convention,
        )

    def heatmaps(self, tasks: tuple[dict[str, Tensor], ...]) -> Tensor:
        """(B, 10, Y, X) float32 scores in the order of `fd3d.classes.CLASSES`."""
        return torch.cat([maps["heatmap"] for maps in tasks], dim=1).float().sigmoid()

    def _seconds(self, dt: Tensor) -> Tensor:
        """What a velocity is multiplied by to be what the head predicts."""
        return dt if self.config.displacement else torch.ones_like(dt)


def _view_transform(config: BEVDepthConfig) -> ViewTransform:
    shared = {
        "image": config.image,
        "grid": config.grid,
        "heights": config.heights,
        "pooling": config.pooling,
    }
    sizes = {"inputs": config.neck, "context": config.context}
    if config.depth_net == "plain":
        key = "depthnet" if config.convention == "old" else "depth_net"
        return PlainViewTransform(**sizes, key=key, **shared)
    sizes |= {
        "width": config.depth_width,
        "blocks": config.depth_blocks,
        "deformable": config.deformable,
    }
    if config.depth_net == "gated":
        return GatedViewTransform(**sizes, **shared)
    net = DepthNet(**sizes, aspp=config.aspp, bins=config.image.depth_bins)
    return AwareViewTransform(depth_net=net, **shared)


def moment_cameras(batch: Batch | Rig, moment: int, *, own: bool = False) -> Cameras:
    """The cameras of one moment: its own optics, and the keyframe's poses or its `own`.

    G1 lifts with the keyframe's poses, which leaves an adjacent map in the frame of its own time;
    `alignment` then moves it. Both generations tell the depth branch the keyframe's poses.
    """
    pose = moment if own else 0
    return Cameras(
        rots=batch.rots[:, pose],
        trans=batch.trans[:, pose],
        intrins=batch.intrins[:, moment],
        post_rots=batch.post_rots[:, moment],
        post_trans=batch.post_trans[:, moment],
        bev_augment=batch.bev_augment,
    )


def _probability(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=1)


def _same(one: Cameras, other: Cameras) -> bool:
    """True when both frusta are equal, which lets one table serve both."""
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("rots", "trans", "intrins", "post_rots", "post_trans")
    )
