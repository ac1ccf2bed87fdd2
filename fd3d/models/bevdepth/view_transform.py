"""From the neck's image features to a BEV map: depth, context, geometry, splat.

What the generations of BEVDet share is in `ViewTransform`; how depth and context are read from the
neck's map is in its sub-classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fd3d.data.images import ImageSpec
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth import camera_aware
from fd3d.models.bevdepth.depth_net import (
    CameraGate,
    Cameras,
    DepthConv,
    camera_numbers,
    depth_blocks,
)
from fd3d.models.bevdepth.pooling import PointTable, cells_of, point_table, pool
from fd3d.models.precision import full_precision


def depth_values(image: ImageSpec, device: torch.device) -> Tensor:
    """(D,) float32 metres of the depth bins."""
    return torch.arange(*image.depth_range, dtype=torch.float32, device=device)


# Probability mass below which the mean of a cell fades to zero instead of amplifying noise.
MASS_FLOOR = 0.1


def frustum_points(cameras: Cameras, image: ImageSpec) -> Tensor:
    """(B, N, D, h, w, 3) metres in the network's frame: where each bin of each cell lies.

    Cells sit on a lattice whose ends are the picture's corners, as in LSS, not at cell centres.
    """
    device = cameras.rots.device
    height, width = image.depth_shape
    with full_precision(cameras.rots):
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
    """Lifts and splats; sub-classes say where depth and context come from.

    Args:
        image, grid: what is lifted, and where to.
        heights: lowest and highest metres of what is splatted.
        pooling: "sum" or "mean", see `BEVDepthConfig`.
    """

    def __init__(
        self,
        *,
        image: ImageSpec,
        grid: BEVGrid,
        heights: tuple[float, float],
        pooling: str = "sum",
    ) -> None:
        super().__init__()
        self.image, self.grid, self.heights, self.pooling = image, grid, heights, pooling

    def forward(self, neck: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """Depth logits (B * N, D, h, w) and context (B * N, C, h, w) of a neck map
        (B * N, inputs, h, w); `cameras` are those that the depth branch is told of."""
        raise NotImplementedError

    def table(self, cameras: Cameras) -> PointTable:
        """The splatting table of one moment's cameras."""
        with torch.no_grad():
            points = frustum_points(cameras, self.image)
            return point_table(cells_of(points, self.grid, self.heights), self.grid)

    def splat(self, probability: Tensor, context: Tensor, table: PointTable) -> Tensor:
        """BEV (B, C, Y, X) from depth probabilities (B * N, D, h, w) and context (B * N, C, h, w).

        `table` is that of the cameras to lift with, which need not be those that the depth branch
        was told of.
        """
        if self.pooling == "sum":
            return pool(probability, context, table)
        mass = torch.ones_like(context[:, :1])
        pooled = pool(probability, torch.cat([context, mass], dim=1), table)
        # The mass only scales: were it learned from, depth would be pulled towards full cells.
        return pooled[:, :-1] / (pooled[:, -1:].detach() + MASS_FLOOR)


class GatedViewTransform(ViewTransform):
    """BEVDepth's, first generation; sub-modules carry the names of its checkpoints.

    Args:
        inputs: channels of the neck's map.
        width: channels of the depth branch.
        context: channels that are splatted.
        blocks: residual blocks of the depth branch.
        deformable: whether its last convolution is deformable.
        shared: what `ViewTransform` takes.
    """

    def __init__(
        self, *, inputs: int, width: int, context: int, blocks: int, deformable: bool, **shared
    ) -> None:
        super().__init__(**shared)
        self.se = CameraGate(inputs=inputs, outputs=width)
        self.extra_depthnet = depth_blocks(width, blocks)
        self.dcn = DepthConv(width, deformable=deformable)
        self.depthnet = nn.Conv2d(width, self.image.depth_bins, 1)
        self.featnet = nn.Conv2d(inputs, context, 1)

    def forward(self, neck: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
        (x,) = self.extra_depthnet(self.se(neck, camera_numbers(cameras)))
        return self.depthnet(self.dcn(x)), self.featnet(neck)


class AwareViewTransform(ViewTransform):
    """BEVDepth's, second generation: everything is read by one `camera_aware.DepthNet`.

    Args:
        depth_net: of the right number of bins.
        shared: what `ViewTransform` takes.
    """

    def __init__(self, *, depth_net: camera_aware.DepthNet, **shared) -> None:
        super().__init__(**shared)
        self.depth_net = depth_net

    def forward(self, neck: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
        return self.depth_net(neck, camera_aware.camera_numbers(cameras))


class PlainViewTransform(ViewTransform):
    """BEVDet's: one 1x1 convolution that knows nothing of the cameras.

    Args:
        inputs, context: channels of the neck's map, and of what is splatted.
        key: what checkpoints call the convolution: "depthnet" in BEVDet's first generation,
            "depth_net" in its second.
        shared: what `ViewTransform` takes.
    """

    def __init__(self, *, inputs: int, context: int, key: str, **shared) -> None:
        super().__init__(**shared)
        self.key = key
        self.add_module(key, nn.Conv2d(inputs, self.image.depth_bins + context, 1))

    def forward(self, neck: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
        both = getattr(self, self.key)(neck)
        return both[:, : self.image.depth_bins], both[:, self.image.depth_bins :]
