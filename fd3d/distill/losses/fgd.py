"""`fgd`: focal and global distillation (Yang et al., CVPR 2022), on a BEV map.

Focal: squared errors weighted by the expert's spatial and channel attention, apart for the cells of
boxes, each box counting alike whatever its size, and for the others; and the L1 distance of both
networks' attention. Global: the squared error of what a context block makes of each map. All sums,
divided by the number of frames. Published weights for one-stage detectors: `WEIGHTS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.distill.align import Project, check_grids, seen_cells
from fd3d.distill.areas import footprints
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs

WEIGHTS = {"fgd.fg": 1e-3, "fgd.bg": 5e-4, "fgd.attention": 1e-3, "fgd.global": 5e-6}


class FGD(nn.Module):
    """Foreground and background apart, attention, and global context.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
        temperature: of the attentions.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        self.grid, self.temperature = expert_grid, temperature
        self.align = Project(
            channels=channels, expert_channels=expert_channels, shape=expert_grid.shape
        )
        self.context = Context(expert_channels)
        self.expert_context = Context(expert_channels)

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The terms of `WEIGHTS`, unweighted; outside expert["valid"] both maps are zero."""
        mine, theirs = self.align(apprentice.bev).float(), expert["bev"].detach().float()
        valid = seen_cells(expert)
        mine, theirs = mine * valid, theirs * valid
        frames = len(mine)
        where, which = attention(theirs, self.temperature)
        my_where, my_which = attention(mine, self.temperature)
        error = (mine - theirs).square() * where * which
        fg, bg = area_weights(batch.boxes, self.grid, valid)
        apart = (my_where - where).abs().sum() + (my_which - which).abs().sum()
        context = self.context(mine) - self.expert_context(theirs)
        return {
            "fgd.fg": (error * fg).sum() / frames,
            "fgd.bg": (error * bg).sum() / frames,
            "fgd.attention": apart / frames,
            "fgd.global": context.square().sum() / frames,
        }


class Context(nn.Module):
    """A global context block (Cao et al. 2019): one weighted mean of the map, added everywhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.where = nn.Conv2d(channels, 1, 1)
        self.change = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )
        nn.init.kaiming_normal_(self.where.weight)
        nn.init.zeros_(self.where.bias)
        # Begins as the map itself.
        nn.init.zeros_(self.change[-1].weight)
        nn.init.zeros_(self.change[-1].bias)

    def forward(self, bev: Tensor) -> Tensor:
        """(B, C, Y, X) to the same."""
        share = self.where(bev).flatten(2).softmax(dim=2)  # (B, 1, Y * X)
        mean = (bev.flatten(2) * share).sum(dim=2)[:, :, None, None]
        return bev + self.change(mean)


def attention(bev: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, 1, Y, X) spatial and (B, C, 1, 1) channel attention of a map, each with mean one."""
    size = bev.abs()
    where = (size.mean(dim=1).flatten(1) / temperature).softmax(dim=1)
    which = (size.mean(dim=(2, 3)) / temperature).softmax(dim=1)
    where = where.unflatten(1, bev.shape[-2:])[:, None] * where.shape[1]
    return where, which[:, :, None, None] * which.shape[1]


def area_weights(boxes: Sequence[Tensor], grid: BEVGrid, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, Y, X) weights of the foreground, 1 / cells of the smallest box that a cell lies in,
    and of the background, 1 / its cells that are `valid` (B, 1, Y, X)."""
    fg = even_weights(boxes, grid, power=1.0)
    empty = ((fg == 0) & valid).float()
    return fg, empty / empty.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1.0)


def even_weights(boxes: Sequence[Tensor], grid: BEVGrid, *, power: float) -> Tensor:
    """(B, 1, Y, X): one over the cells, to a power, of the smallest box that a cell lies in; zero
    outside of all."""
    frames = []
    for frame in boxes:
        weights = torch.zeros(grid.shape, device=frame.device)
        for box in frame:
            area = footprints(box[None], grid=grid)
            weights = torch.maximum(weights, area / area.sum().clamp(min=1) ** power)
        frames.append(weights)
    return torch.stack(frames)[:, None]
