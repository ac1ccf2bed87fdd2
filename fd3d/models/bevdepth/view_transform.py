"""From the neck's image features to a BEV map: depth, context, geometry, splat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fd3d.data.images import ImageSpec
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.depth_net import CameraGate, DepthConv, camera_numbers, depth_blocks
from fd3d.models.bevdepth.pooling import PointTable, cells_of, point_table, pool


@dataclass(frozen=True, kw_only=True)
class Cameras:
    """Geometry of one moment's cameras, each field (B, N, ...) as in `fd3d.data.batch.Batch`."""

    rots: Tensor
    trans: Tensor
    intrins: Tensor
    post_rots: Tensor
    post_trans: Tensor


def depth_values(image: ImageSpec, device: torch.device) -> Tensor:
    """(D,) float32 metres of the depth bins."""
    return torch.arange(*image.depth_range, dtype=torch.float32, device=device)


# Probability mass below which the mean of a cell fades to zero instead of amplifying noise.
MASS_FLOOR = 0.1


def frustum_points(cameras: Cameras, image: ImageSpec) -> Tensor:
    """(B, N, D, h, w, 3) metres in the keyframe's LIDAR frame: where each bin of each cell lies.

    Cells sit on a lattice whose ends are the picture's corners, as in LSS, not at cell centres.
    """
    device = cameras.rots.device
    height, width = image.depth_shape
    with torch.autocast(device.type, enabled=False):
        u = torch.linspace(0, image.width - 1, width, device=device)
        v = torch.linspace(0, image.height - 1, height, device=device)
        row, column = torch.meshgrid(v, u, indexing="ij")
        # The image augmentation acts in the plane, so undoing it does not depend on depth.
        pixels = torch.stack([column, row], dim=-1).view(1, 1, -1, 2)
        pixels = pixels - cameras.post_trans[:, :, None, :2]
        turn = torch.linalg.inv(cameras.post_rots)[:, :, :2, :2]
        pixels = pixels @ turn.transpose(-1, -2)
        pixels = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
        lift = cameras.rots @ torch.linalg.inv(cameras.intrins)
        rays = (pixels @ lift.transpose(-1, -2)).view(*lift.shape[:2], 1, height, width, 3)
        bins = depth_values(image, device).view(1, 1, -1, 1, 1, 1)
        return rays * bins + cameras.trans[:, :, None, None, None]


class ViewTransform(nn.Module):
    """BEVDepth's view transformer; sub-modules carry the names of its checkpoints.

    Args:
        image, grid: what is lifted, and where to.
        inputs: channels of the neck's map.
        width: channels of the depth branch.
        context: channels that are splatted.
        blocks: residual blocks of the depth branch.
        deformable: whether its last convolution is deformable.
        pooling: "sum" or "mean", see `BEVDepthConfig`.
    """

    def __init__(
        self,
        *,
        image: ImageSpec,
        grid: BEVGrid,
        inputs: int,
        width: int,
        context: int,
        blocks: int,
        deformable: bool,
        pooling: str = "sum",
    ) -> None:
        super().__init__()
        self.image, self.grid, self.pooling = image, grid, pooling
        self.se = CameraGate(inputs=inputs, outputs=width)
        self.extra_depthnet = depth_blocks(width, blocks)
        self.dcn = DepthConv(width, deformable=deformable)
        self.depthnet = nn.Conv2d(width, image.depth_bins, 1)
        self.featnet = nn.Conv2d(inputs, context, 1)

    def table(self, cameras: Cameras) -> PointTable:
        """The splatting table of one moment's cameras."""
        with torch.no_grad():
            points = frustum_points(cameras, self.image)
            return point_table(cells_of(points, self.grid), self.grid)

    def forward(
        self, neck: Tensor, cameras: Cameras, table: PointTable
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Neck map (B * N, inputs, h, w) to BEV (B, context, Y, X), depth logits and context."""
        numbers = camera_numbers(
            rots=cameras.rots,
            trans=cameras.trans,
            intrins=cameras.intrins,
            post_rots=cameras.post_rots,
            post_trans=cameras.post_trans,
        )
        (x,) = self.extra_depthnet(self.se(neck, numbers))
        logits = self.depthnet(self.dcn(x))
        context = self.featnet(neck)
        probability = logits.float().softmax(dim=1)
        if self.pooling == "sum":
            return pool(probability, context, table), logits, context
        mass = torch.ones_like(context[:, :1])
        pooled = pool(probability, torch.cat([context, mass], dim=1), table)
        # The mass only scales: were it learned from, depth would be pulled towards full cells.
        return pooled[:, :-1] / (pooled[:, -1:].detach() + MASS_FLOOR), logits, context
