"""`l2`: squared error between aligned maps everywhere (FitNets, Romero et al. 2015)."""

from __future__ import annotations

from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.distill.align import Project, channel_scale, check_grids, to_grid
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs


class L2(nn.Module):
    """Mean squared error over batch, channels and cells, in units of the expert's channel sd.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map.
        compare: "expert" to compare on the expert's grid, "apprentice" on the smaller one.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        compare: str = "expert",
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        shape = expert_grid.shape if compare == "expert" else grid.shape
        self.align = Project(channels=channels, expert_channels=expert_channels, shape=shape)

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Term `l2`, unweighted, from the maps apprentice.bev (B, Ca, Ya, Xa) and expert["bev"]
        (B, C, Ye, Xe); over the cells of expert["valid"] only, where that is there."""
        del batch  # this distiller looks at no boxes
        aligned = self.align(apprentice.bev).float()
        target = to_grid(expert["bev"].detach().float(), aligned.shape[-2:])
        valid = expert.get("valid")
        if valid is None:
            return {"l2": (((aligned - target) / channel_scale(target)) ** 2).mean()}
        # A cell that averages unseen ones is not known.
        valid = to_grid(valid.float(), aligned.shape[-2:]) > 1 - 1e-6
        error = (((aligned - target) / channel_scale(target, valid)) ** 2).mean(dim=1, keepdim=True)
        return {"l2": (error * valid).sum() / valid.sum().clamp(min=1)}
