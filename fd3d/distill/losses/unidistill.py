"""`unidistill`: UniDistill (Zhou et al., CVPR 2023).

Nine points of each true box, corners, edge middles and centre. Feature: mean L1 distance of both
maps there. Relation: mean L1 distance of the two 9x9 tables of cosines between a box's points.
Response: L1 distance of the best class scores inside the true boxes' Gaussians (overlap .7, no
smallest radius), over their sum. Published weights: `WEIGHTS`. The published response compares the
regressed maps too; caches do not hold the expert's, and it is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.data.batch import Batch
from fd3d.distill.align import Project, check_grids, seen_cells, to_grid
from fd3d.distill.areas import object_gaussians
from fd3d.distill.points import nine_points, on_grid, values_at
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs
from fd3d.models.precision import full_precision

WEIGHTS = {"unidistill.feature": 100.0, "unidistill.relation": 40.0, "unidistill.response": 10.0}


class UniDistill(nn.Module):
    """Features and relations at the points of boxes, and scores around them.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
    """

    def __init__(
        self, *, channels: int, grid: BEVGrid, expert_channels: int, expert_grid: BEVGrid
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        self.grid = expert_grid
        self.align = Project(
            channels=channels, expert_channels=expert_channels, shape=expert_grid.shape
        )

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The terms of `WEIGHTS`, unweighted; needs the signals bev and heatmap (scores)."""
        mine, theirs = self.align(apprentice.bev).float(), expert["bev"].detach().float()
        # Nothing to tell apart where the expert saw nothing.
        valid = seen_cells(expert)
        mine, theirs = mine * valid, theirs * valid
        ours, wanted = [], []
        for row, boxes in enumerate(batch.boxes):
            places = nine_points(boxes[on_grid(boxes, self.grid)].to(mine))
            ours.append(values_at(mine[row], places, self.grid))
            wanted.append(values_at(theirs[row], places, self.grid))
        one, other = torch.cat(ours), torch.cat(wanted)  # (M, 9, C)
        count = max(1, len(one))
        relation = (_cosines(one) - _cosines(other)).abs().mean(dim=(1, 2)).sum()
        return {
            "unidistill.feature": (one - other).abs().mean(dim=(1, 2)).sum() / count,
            "unidistill.relation": relation / count,
            "unidistill.response": self._response(apprentice, expert, batch),
        }

    def _response(self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch) -> Tensor:
        # The apprentice's are logits; the cached ones are scores already.
        scores = torch.cat([maps["heatmap"].float() for maps in apprentice.tasks], dim=1).sigmoid()
        mine = to_grid(scores, self.grid.shape).amax(dim=1, keepdim=True)
        error = (mine - expert["heatmap"].detach().float().amax(dim=1, keepdim=True)).abs()
        mask = object_gaussians(batch, self.grid, min_overlap=0.7, min_radius=0).to(error)
        mask = mask * seen_cells(expert)
        return (error * mask).sum() / mask.sum().clamp(min=1.0)


def _cosines(points: Tensor) -> Tensor:
    """(M, 9, 9) of (M, 9, C)."""
    with full_precision(points):
        unit = functional.normalize(points, dim=2)
        return unit @ unit.transpose(1, 2)
