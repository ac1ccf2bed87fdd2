"""`heatmap`: squared error inside ground-truth Gaussians, the baseline FD3D's authors released.

The term is sum((A - E)^2 M^2) / sum(M) with M the class-agnostic maximum of the Gaussians that
CenterPoint draws for the ground truth, on the expert's grid; its published weight is 0.1. The
released baseline adds channel-wise distillation on image-plane features; this is its BEV part.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.distill.align import Upsample, channel_scale, check_grids
from fd3d.distill.areas import object_gaussians
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs


class Heatmap(nn.Module):
    """Squared error where objects are, the apprentice's map upsampled by a learned layer.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
        standardise: divide by the expert's channel sd and the number of channels, so that one
            weight serves experts of any scale; False is the released form.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        ratio = check_grids(grid, expert_grid)
        self.grid = expert_grid
        self.standardise = standardise
        self.align = Upsample(channels=channels, expert_channels=expert_channels, ratio=ratio)

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Term `heatmap`, unweighted; zero, but still in the graph, where no frame has a box.

        Cells outside expert["valid"], where that is there, do not count.
        """
        target = expert["bev"].float()
        error = self.align(apprentice.bev).float() - target
        valid = expert.get("valid")
        if self.standardise:
            error = error / channel_scale(target, valid) / error.shape[1] ** 0.5
        mask = object_gaussians(batch, self.grid).to(error)
        if valid is not None:
            mask = mask * valid
        return {"heatmap": (error.square() * mask.square()).sum() / mask.sum().clamp(min=1.0)}
