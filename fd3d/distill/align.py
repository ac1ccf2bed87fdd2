"""Bringing an apprentice's map and an expert's map to one grid and one number of channels.

FD3D's pairs see the same square of ground at different cell sizes (256x256 and 128x128 at full
size). The comparison may happen on the expert's grid, the apprentice's map being upsampled (FD3D's
figure), or on the apprentice's, the expert's map being averaged, which is cheaper. Pairs of other
squares are compared on the apprentice's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

# Of the apprentice's ground that an expert must see to teach it.
_LEAST_SHARE = 0.5

# Of a channel's standard deviation in units of what is usual, before it counts as noise.
_LEAST_SCALE = 0.05


def check_grids(apprentice: BEVGrid, expert: BEVGrid) -> int:
    """Expert cells per apprentice cell along each axis; pairs that do not nest are refused.

    `comparison_grid` gives a grid that nests for any expert.
    """
    ratio = _ratio(apprentice, expert)
    if not ratio:
        raise UsageError(
            f"expert map {expert} cannot be compared with apprentice map {apprentice} as it is: "
            "bring it to their comparison_grid"
        )
    return ratio


def comparison_grid(apprentice: BEVGrid, expert: BEVGrid) -> BEVGrid:
    """The grid, in the apprentice's frame, that the expert's map is brought to for comparison.

    The expert's cells over the apprentice's square of ground, where both have one square and the
    expert a whole number of cells in each of the apprentice's. It is the expert's own grid where
    both see one frame; squares of equal bounds in two frames (LIDAR and ego differ by a quarter
    turn and a metre) overlap but for a strip. For every other pair it is the apprentice's own
    grid. An expert that sees less than half of the apprentice's ground raises `UsageError`.
    """
    moved = replace(expert, frame=apprentice.frame)
    if _ratio(apprentice, moved):
        return moved
    share = _share(apprentice, moved)
    if share < _LEAST_SHARE:
        raise UsageError(
            f"expert map {expert} cannot be compared with apprentice map {apprentice}: it covers "
            f"{share:.0%} of its ground; choose a pair that sees the same ground"
        )
    return apprentice


def _ratio(apprentice: BEVGrid, expert: BEVGrid) -> int:
    """Expert cells per apprentice cell along each axis; 0 where they do not nest."""
    ratio_x, rest_x = divmod(expert.nx, apprentice.nx)
    ratio_y, rest_y = divmod(expert.ny, apprentice.ny)
    if not apprentice.same_extent(expert) or rest_x or rest_y or ratio_x != ratio_y:
        return 0
    return ratio_x


def _share(apprentice: BEVGrid, expert: BEVGrid) -> float:
    """How much of the apprentice's rectangle the expert's covers."""
    x = min(apprentice.x_max, expert.x_max) - max(apprentice.x_min, expert.x_min)
    y = min(apprentice.y_max, expert.y_max) - max(apprentice.y_min, expert.y_min)
    area = (apprentice.x_max - apprentice.x_min) * (apprentice.y_max - apprentice.y_min)
    return max(0.0, x) * max(0.0, y) / area


def seen_cells(expert: dict[str, Tensor]) -> Tensor:
    """(B, 1, Y, X) bool: the cells of expert["bev"] or, without that, of its heatmap that count:
    expert["valid"], or all of them where that is not there."""
    if "valid" in expert:
        return expert["valid"]
    like = expert["bev"] if "bev" in expert else expert["heatmap"]
    return torch.ones_like(like[:, :1], dtype=torch.bool)


def to_grid(bev: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, C, Y, X) resampled to `shape` over the same extent: area mean when shrinking, bilinear
    between cell centres when growing."""
    if tuple(bev.shape[-2:]) == tuple(shape):
        return bev
    if bev.shape[-1] > shape[-1]:
        return functional.adaptive_avg_pool2d(bev, shape)
    return functional.interpolate(bev, size=tuple(shape), mode="bilinear", align_corners=False)


class Project(nn.Module):
    """Apprentice map to the expert's channels by a 1x1 convolution, then to the grid of
    comparison; the alignment of FitNets.

    Args:
        channels: of the apprentice's map.
        expert_channels: of the expert's map.
        shape: (Y, X) of the grid of comparison.
    """

    def __init__(self, *, channels: int, expert_channels: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.conv = nn.Conv2d(channels, expert_channels, 1)

    def forward(self, bev: Tensor) -> Tensor:
        """(B, channels, Ya, Xa) to (B, expert_channels, *shape)."""
        return to_grid(self.conv(bev), self.shape)


class Upsample(nn.Module):
    """Learned upsampling of the apprentice's map by `ratio`, a power of two, to the expert's
    channels: per factor of two ConvTranspose 4x4 - BN - ReLU, then a 3x3 convolution.

    With one factor of two this is the adaptor of the baseline that FD3D's authors released.
    """

    def __init__(self, *, channels: int, expert_channels: int, ratio: int) -> None:
        super().__init__()
        if ratio < 1 or ratio & (ratio - 1):
            raise UsageError(f"the learned upsampling needs a grid ratio of 1, 2 or 4, not {ratio}")
        layers: list[nn.Module] = []
        width = channels
        for _ in range(ratio.bit_length() - 1):
            layers += [
                nn.ConvTranspose2d(width, expert_channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(expert_channels),
                nn.ReLU(inplace=True),
            ]
            width = expert_channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, expert_channels, 3, padding=1))

    def forward(self, bev: Tensor) -> Tensor:
        """(B, channels, Ya, Xa) to (B, expert_channels, ratio * Ya, ratio * Xa)."""
        return self.layers(bev)


def channel_scale(bev: Tensor, valid: Tensor | None = None) -> Tensor:
    """(1, C, 1, 1) standard deviation of each channel of an expert map over batch and cells.

    `valid`, (B, 1, Y, X) bool, leaves out cells that the expert did not see.

    Dividing both maps by it makes the loss, and so its weight, independent of the arbitrary scale
    of the expert's last convolution. A channel that hardly varies, as one that a ReLU has closed,
    gets a twentieth of the root mean square of all; a map that does not vary at all, ones.
    """
    if valid is None:
        scale = bev.float().std(dim=(0, 2, 3), keepdim=True)
    else:
        seen = bev.float().movedim(1, -1)[valid[:, 0]]  # (cells, C)
        scale = seen.std(dim=0)[None, :, None, None]
    typical = scale.square().mean().sqrt()
    scale = scale.clamp(min=_LEAST_SCALE * typical)
    return torch.where(typical > 1e-6, scale, torch.ones_like(scale)).detach()
