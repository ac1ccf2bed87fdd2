"""`bevdistill`: BEVDistill (Chen et al., ICLR 2023), for a network with a centre head.

Dense: squared error, mean over channels, inside the Gaussians of the true boxes, over the sum of
the mask. Sparse: the published form matches a student's queries to a teacher's boxes. A centre head
has no queries, so ours takes the features of both maps at the 50 best boxes of the expert and asks
by InfoNCE that each of the apprentice's be nearest to the expert's of the same box. Published
weights: .01 for the dense term, .2 for InfoNCE.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.data.batch import Batch
from fd3d.distill.align import Project, check_grids, seen_cells
from fd3d.distill.areas import cached_boxes, object_gaussians
from fd3d.distill.points import on_grid, values_at
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs
from fd3d.models.precision import full_precision

WEIGHTS = {"bevdistill.dense": 1e-2, "bevdistill.sparse": 0.2}


class BEVDistill(nn.Module):
    """Dense features near objects, and contrast between the expert's objects.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
        objects: of the expert's boxes, by score. temperature: of the contrast.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        objects: int = 50,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        self.grid, self.objects, self.temperature = expert_grid, objects, temperature
        self.align = Project(
            channels=channels, expert_channels=expert_channels, shape=expert_grid.shape
        )

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The terms of `WEIGHTS`, unweighted; needs the signals bev and detections."""
        mine, theirs = self.align(apprentice.bev).float(), expert["bev"].detach().float()
        valid = seen_cells(expert)
        mine, theirs = mine * valid, theirs * valid
        mask = object_gaussians(batch, self.grid).to(mine) * valid
        error = (mine - theirs).square().mean(dim=1, keepdim=True)
        best = [table[table[:, 9].argsort(descending=True)] for table in expert["detections"]]
        tables = [table[: self.objects] for table in best]
        found = [
            self._contrast(*frame)
            for frame in zip(
                mine, theirs, valid, cached_boxes(tables, batch, grid=self.grid), strict=True
            )
        ]
        return {
            "bevdistill.dense": (error * mask).sum() / mask.sum().clamp(min=1.0),
            "bevdistill.sparse": torch.stack(found).mean(),
        }

    def _contrast(self, mine: Tensor, theirs: Tensor, valid: Tensor, boxes: Tensor) -> Tensor:
        """InfoNCE of one frame, zero where it has fewer than two boxes to tell apart."""
        centres = boxes[on_grid(boxes, self.grid), :2]
        unseen = values_at((~valid).float(), centres, self.grid)[:, 0]
        centres = centres[unseen < 1e-3]
        if len(centres) < 2:
            return mine.sum() * 0.0
        ours = functional.normalize(values_at(mine, centres, self.grid), dim=1)
        wanted = functional.normalize(values_at(theirs, centres, self.grid), dim=1)
        with full_precision(ours):
            alike = ours @ wanted.T / self.temperature
        return functional.cross_entropy(alike, torch.arange(len(centres), device=alike.device))
