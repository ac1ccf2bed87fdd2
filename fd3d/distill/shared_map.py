"""Distilling inside the heads: the maps that all branches of a CenterPoint head read.

The expert's is not cached: the first convolution of its head, whose weights lie beside a cache
(`fd3d.distill.bev_part`), makes it of the cached map. Behind that convolution's ReLU is what the
head has picked of the map for its boxes, in fewer channels (64 of 256 at full size).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.models.bevdepth.network import Outputs
from fd3d.models.precision import full_precision


class AtSharedMap(nn.Module):
    """A distiller that compares the shared maps in place of those that the heads read.

    Args:
        distiller: made for the shared maps' channels, on the expert's own grid.
        expert_conv: `CenterHead.shared_conv` of the expert; used as it is, never trained.
    """

    def __init__(self, *, distiller: nn.Module, expert_conv: nn.Module) -> None:
        super().__init__()
        self.distiller = distiller
        self.expert_conv = expert_conv.requires_grad_(False)

    def train(self, mode: bool = True) -> AtSharedMap:
        """As torch's, but the expert's batch norm stays in eval mode."""
        super().train(mode)
        self.expert_conv.eval()
        return self

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The distiller's terms, from apprentice.shared and what the expert's head makes of
        expert["bev"], which must be on the grid that the head was trained on."""
        with torch.no_grad(), full_precision(expert["bev"]):
            shared = self.expert_conv(expert["bev"].float())
        inside = replace(apprentice, bev=apprentice.shared)
        return self.distiller(inside, {**expert, "bev": shared}, batch)
